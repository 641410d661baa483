"""Clocks: running averages whose half-lives are fixed, from one token to a thousand, and an MLP that reads them.

Question: how far does a memory come that chooses nothing, and only forgets at several speeds?

Per layer, with x the residual stream and a_d = 2^(-1 / half-life of channel d):

    h_t = a · h_{t-1} + (1 - a) · write(x_t),    x_t = x_t + read(silu(join([x_t, h_t])))

The averages stay float32 in a model of another dtype: the slowest clocks move by less than bfloat16 can tell.

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

from bdh_bench.errors import SpecError
from bdh_bench.session import Streaming, TensorMemory
from bdh_bench.types import Keep

DEFAULTS = {
    "learning_rate": 4e-3,
    "position_limit": "none",
    "kind": "recurrent",
    "architecture": "averages at fixed speeds and an MLP that reads them, tied embeddings, no positions",
}


@dataclass(frozen=True)
class Config:
    """Shape of the model.

    d_model     width D of the residual stream
    n_layer     layers
    longest     half-life of the slowest channel, in tokens
    vocab_size  tokens; 256 are the bytes
    """

    d_model: int = 128
    n_layer: int = 4
    longest: int = 1024
    vocab_size: int = 256


def parameters(config: Config) -> int:
    """V·D + L·(7·D² + 4·D): write has D², join 4·D², read 2·D²; biases of D, 2·D and D."""
    width = config.d_model
    return config.vocab_size * width + config.n_layer * (7 * width**2 + 4 * width)


def scaled(target: int, **pinned: Any) -> Iterator[Config]:
    """The widths on both sides of the solution of ``parameters(config) = target``."""
    layers, vocabulary = pinned.get("n_layer", 4), pinned.get("vocab_size", 256)
    square, linear = 7 * layers, vocabulary + 4 * layers
    width = int((math.sqrt(linear**2 + 4 * square * target) - linear) / (2 * square))
    for d_model in (width, width + 1):
        yield Config(max(1, d_model), layers, pinned.get("longest", 1024), vocabulary)


class Model(Streaming, nn.Module):
    """Embedding, layers, logits by the embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.longest < 1:
            raise SpecError(f"got longest={config.longest} · expected a half-life of at least 1 token")
        self.config, self.vocab_size = config, config.vocab_size
        width = config.d_model
        self.embed = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.write = nn.ModuleList(nn.Linear(width, width) for _ in range(config.n_layer))
        self.join = nn.ModuleList(nn.Linear(2 * width, 2 * width) for _ in range(config.n_layer))
        self.read = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(config.n_layer))

    def logits(self, tokens: Tensor) -> Tensor:
        """Teacher forcing, (B, T) → (B, T, V)."""
        return self.advance(self.memory(tokens.shape[0]), 0, tokens, "all")

    def memory(self, batch_size: int) -> TensorMemory:
        """One average per layer and channel, (B, D), all 0."""
        shape, weight = (batch_size, self.config.d_model), self.embed.weight
        layers = range(self.config.n_layer)
        return TensorMemory({f"layer{i}": weight.new_zeros(shape, dtype=_wide(weight.dtype)) for i in layers})

    def advance(self, memory: TensorMemory, position: int, tokens: Tensor, keep: Keep) -> Tensor:
        """Read (B, T) from where the averages stand."""
        x = self.embed(tokens)  # (B, T, D)
        fade = self._fade(x)
        for i in range(self.config.n_layer):
            new = (1 - fade) * self.write[i](_norm(x)).to(fade.dtype)
            averages = _run(fade, new, memory[f"layer{i}"])  # (B, T, D)
            memory[f"layer{i}"] = averages[:, -1].clone()  # a copy: a view would keep the whole piece alive
            x = x + self.read[i](F.silu(self.join[i](torch.cat((_norm(x), averages.to(x.dtype)), -1))))
        return _norm(x if keep == "all" else x[:, -1:]) @ self.embed.weight.mT  # (B, T or 1, V)

    def _fade(self, x: Tensor) -> Tensor:
        """2^(-1 / half-life), (D,): half-lives from 1 to ``longest`` in equal ratios."""
        halves = torch.logspace(0, math.log10(self.config.longest), self.config.d_model, device=x.device)
        return (2 ** (-1 / halves)).to(_wide(x.dtype))

    def state_bytes(self, batch_size: int, context: int) -> int:
        """L·D numbers at every context."""
        return batch_size * self.config.n_layer * self.config.d_model * _wide(self.embed.weight.dtype).itemsize

    def flops_per_token(self, context: int, mode: str = "recurrent") -> float:
        """2 per multiply-add: 7·D² per layer, the averages, and the logits."""
        width = self.config.d_model
        return float(self.config.n_layer * (14 * width**2 + 4 * width) + 2 * self.vocab_size * width)

    def kernels(self) -> str:
        """What runs here."""
        return "torch, spans joined by doubling"


def _run(fade: Tensor, new: Tensor, state: Tensor) -> Tensor:
    """h_t = fade · h_{t-1} + new_t for all t at once, from h = state (B, D): spans of 1, 2, 4, … tokens are joined."""
    new = torch.cat((new[:, :1] + fade * state.unsqueeze(1), new[:, 1:]), 1)
    span = 1
    while span < new.shape[1]:
        new = torch.cat((new[:, :span], new[:, span:] + fade**span * new[:, :-span]), 1)
        span *= 2
    return new


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
