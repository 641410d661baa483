"""A gated average: each channel forgets at a rate that its input chooses. (This line is what `bdh-bench list models` shows.)

Per layer, with x the residual stream: f = sigmoid(fade(x)), h_t = f_t · h_{t-1} + (1 - f_t) · new(x_t), x = x + out(h · silu(gate(x))).
``logits`` computes all h at once, a session goes on from the h it kept; ``bdh-bench check`` holds the two to the same numbers.

Legend: B batch, T tokens in this call, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdh_bench.session import Streaming, TensorMemory
from bdh_bench.types import Keep

#: ``kind`` is transformer, recurrent, or control; ``architecture`` says in a few words what is not in other models. The report shows both.
DEFAULTS = {
    "learning_rate": 4e-3,
    "position_limit": "none",
    "kind": "recurrent",
    "architecture": "a gated average per channel, RMSNorm before each layer, tied embeddings, no positions",
}


@dataclass(frozen=True)
class Config:
    """The options on the command line, NAME:d_model=64; ``bdh-bench list models NAME`` shows what is said of them here.

    d_model     width D of the residual stream
    n_layer     layers
    vocab_size  tokens; 256 are the bytes
    """

    d_model: int = 128
    n_layer: int = 4
    vocab_size: int = 256


def scaled(target: int, **pinned: Any) -> Iterator[Config]:
    """Candidates near ``target`` parameters, V·D + L·(4·D² + 4·D): the widths on both sides of the solution."""
    layers, vocabulary = pinned.get("n_layer", 4), pinned.get("vocab_size", 256)
    linear = vocabulary / (4 * layers) + 1
    width = int((math.sqrt(linear**2 + target / layers) - linear) / 2)
    for d_model in (width, width + 1):
        yield Config(max(1, d_model), layers, vocabulary)


class Model(Streaming, nn.Module):
    """Embedding, layers, logits by the embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.vocab_size = config, config.vocab_size
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.inputs = nn.ModuleList(nn.Linear(config.d_model, 3 * config.d_model) for _ in range(config.n_layer))
        self.outputs = nn.ModuleList(nn.Linear(config.d_model, config.d_model) for _ in range(config.n_layer))

    def logits(self, tokens: Tensor) -> Tensor:
        """Teacher forcing, (B, T) → (B, T, V): the truth for every session."""
        return self.advance(self.memory(tokens.shape[0]), 0, tokens, "all")

    def memory(self, batch_size: int) -> TensorMemory:
        """The state of an empty stream: every tensor that must survive until the next token, by name."""
        shape, weight = (batch_size, self.config.d_model), self.embed.weight
        return TensorMemory({f"layer{i}": weight.new_zeros(shape) for i in range(self.config.n_layer)})

    def advance(self, memory: TensorMemory, position: int, tokens: Tensor, keep: Keep) -> Tensor:
        """Read (B, T) from where the memory stands, and leave it at the end of the piece."""
        x = self.embed(tokens)  # (B, T, D)
        for i, (inputs, outputs) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            fade, new, gate = inputs(F.rms_norm(x, x.shape[-1:])).chunk(3, -1)
            fade = torch.sigmoid(fade + 2)
            states = _scan(fade, (1 - fade) * new, memory[f"layer{i}"])  # (B, T, D)
            memory[f"layer{i}"] = states[:, -1].clone()  # a copy: a view would keep the whole piece alive
            x = x + outputs(states * F.silu(gate))
        x = F.rms_norm(x if keep == "all" else x[:, -1:], x.shape[-1:])
        return x @ self.embed.weight.mT  # (B, T or 1, V)

    def state_bytes(self, batch_size: int, context: int) -> int:
        """L·D elements at every context; a law compares this with the tensors of ``memory``."""
        return batch_size * self.config.n_layer * self.config.d_model * self.embed.weight.dtype.itemsize

    def flops_per_token(self, context: int, mode: str = "recurrent") -> float:
        """2 per multiply-add, forward only: two projections and the recurrence per layer, and the logits."""
        width = self.config.d_model
        return float(self.config.n_layer * (8 * width**2 + 4 * width) + 2 * self.vocab_size * width)


def _scan(fade: Tensor, new: Tensor, state: Tensor) -> Tensor:
    """h_t = fade_t · h_{t-1} + new_t for all t at once, from h = state (B, D): spans of 1, 2, 4, … tokens are joined."""
    new = torch.cat((new[:, :1] + fade[:, :1] * state.unsqueeze(1), new[:, 1:]), 1)
    span = 1
    while span < new.shape[1]:
        new = torch.cat((new[:, :span], new[:, span:] + fade[:, span:] * new[:, :-span]), 1)
        fade = torch.cat((fade[:, :span], fade[:, span:] * fade[:, :-span]), 1)
        span *= 2
    return new
