"""LSTM: what does the recurrent network before transformers reach, with a state that is a vector and not a matrix?

Layers of torch's LSTM, each with an RMS norm before it and a residual around it, and one table for input and output. O(D²)
parameters write into 2·D numbers of state per layer, where a memory of outer products has O(D²) of both: the other end of the
scale of state per parameter.

Source: Hochreiter & Schmidhuber (1997), with the forget gate of Gers et al. (2000), as torch implements it. Weights start from
torch's U(±1/√D), the forget gate's bias from 1 (Jozefowicz et al. 2015), the table from N(0, 0.02²). Few layers, as was usual
(Merity et al. 2018 have three at 24M parameters).

Precision: the recurrence runs in the dtype of its weights, under autocast too, so that the state of a float32 model is float32.
On a CPU autocast only cost time (a training step of D = 256 took twice as long in bfloat16, measured with torch 2.13).

Legend: B batch, T tokens, V vocabulary, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdh_bench.errors import SpecError
from bdh_bench.models._block import RMSNorm, close, width_near
from bdh_bench.session import Streaming, TensorMemory
from bdh_bench.types import Keep

DEFAULTS = {
    "learning_rate": 4e-3,
    "position_limit": "none",
    "kind": "recurrent",
    "architecture": "LSTM layers with a residual, RMSNorm before each, one table for input and output, no positions",
}

#: Parameters up to which so many layers are the natural ones; beyond the last, 4.
_LAYERS = ((2e6, 2), (3e7, 3))


@dataclass(frozen=True)
class Config:
    """Shape of the model.

    d_model     width D of the residual stream and of every layer's state
    n_layer     layers
    vocab_size  tokens; 256 are the bytes
    """

    d_model: int = 128
    n_layer: int = 2
    vocab_size: int = 256


def parameters(config: Config) -> int:
    """V·D + D + L·(8·D² + 8·D + D)."""
    d = config.d_model
    return config.vocab_size * d + d + config.n_layer * (8 * d * d + 9 * d)


def scaled(target: int, **pinned: Any) -> Iterator[Config]:
    """Shapes near ``target``: two to four layers."""
    natural = next((layers for limit, layers in _LAYERS if target <= limit), 4)
    vocabulary = pinned.get("vocab_size", 256)
    near = [n for n in (natural, natural + 1, natural - 1) if n > 0]
    if "d_model" in pinned:
        near = sorted(range(1, 65), key=lambda n: abs(n - natural))
    for layers in [pinned["n_layer"]] if "n_layer" in pinned else near:
        config = Config(pinned.get("d_model") or _width(target, layers, vocabulary), layers, vocabulary)
        yield config
        if close(parameters(config), target):
            return


def _width(target: int, layers: int, vocabulary: int) -> int:
    return width_near(target, lambda width: parameters(Config(width, layers, vocabulary)))


class Model(Streaming, nn.Module):
    """Embedding, residual LSTM layers, norm; logits by the embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        for field in fields(config):
            if getattr(config, field.name) < 1:
                raise SpecError(f"got {field.name}={getattr(config, field.name)} for lstm · expected at least 1")
        self.config = config
        self.vocab_size = config.vocab_size
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(config.d_model) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model)

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, V), from an empty state."""
        return self.advance(self.memory(tokens.shape[0]), 0, tokens, "all")

    forward = logits

    def memory(self, batch_size: int) -> TensorMemory:
        """Zeros: per layer the output h and the cell c, (B, D) each."""
        weight = self.embedding.weight
        return TensorMemory(
            (f"{kind}.{i}", weight.new_zeros(batch_size, self.config.d_model))
            for i in range(self.config.n_layer)
            for kind in ("h", "c")
        )

    def advance(self, memory: TensorMemory, position: int, tokens: Tensor, keep: Keep) -> Tensor:
        """Read tokens (B, T); the memory's tensors are replaced, never written into, so that autograd may pass through."""
        x = self.embedding(tokens)  # (B, T, D)
        for i, layer in enumerate(cast(list[Layer], self.layers)):
            x, memory[f"h.{i}"], memory[f"c.{i}"] = layer(x, memory[f"h.{i}"], memory[f"c.{i}"])
        return F.linear(self.norm(x if keep == "all" else x[:, -1:]), self.embedding.weight)

    def state_bytes(self, batch_size: int, context: int) -> int:
        """2·L·D elements at every context."""
        return batch_size * 2 * self.config.n_layer * self.config.d_model * self.embedding.weight.itemsize

    def flops_per_token(self, context: int, mode: str = "recurrent") -> float:
        """Per layer: two matrices of 4·D², two biases, and 9 operations on each of D cells; the same in every mode.

        The nine: five activations (1 each), forget, input and output gates (1 each) and the sum of the cell.
        """
        c = self.config
        return float(c.n_layer * (16 * c.d_model**2 + 8 * c.d_model + 9 * c.d_model) + 2 * c.vocab_size * c.d_model)

    def kernels(self) -> str:
        """What runs here."""
        return "torch LSTM"


class Layer(nn.Module):
    """x + LSTM(norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        with torch.no_grad():  # two biases are added; gates are in the order input, forget, cell, output
            for name, forget in (("bias_ih_l0", 1.0), ("bias_hh_l0", 0.0)):
                self.lstm.get_parameter(name)[width : 2 * width] = forget

    def train(self, mode: bool = True) -> Layer:
        """As always, but the LSTM stays in training mode: without dropout it only tells cuDNN that gradients may follow."""
        super().train(mode)
        self.lstm.train()
        return self

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D), h and c (B, D) → the same shapes."""
        cell = self.lstm
        with torch.autocast(x.device.type, enabled=False):
            normed = self.norm(x)
            if x.shape[1] == 1:  # on a CPU a quarter of the time that the LSTM takes for one token
                first, again, *biases = (w for _, w in cell.named_parameters())
                h, c = torch.lstm_cell(normed[:, 0], (h, c), first, again, *biases)
                return x + h.unsqueeze(1), h, c
            out, (h, c) = cell(normed, (h.unsqueeze(0), c.unsqueeze(0)))
            return x + out, h[0], c[0]
