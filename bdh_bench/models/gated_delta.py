"""Gated DeltaNet: a recurrent memory that overwrites; is a small state enough if a token can replace what its key holds?

    S_t = α_t S_{t-1} + k_tᵀ β_t (v_t − α_t k_t S_{t-1})        y_t = q_t S_t

Source: Yang, Kautz & Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024, arXiv 2412.06464): short
convolutions and SiLU on q, k and v, q and k of length 1, α and β per head from the input, an RMS norm per head and a SiLU gate on
the reads, values twice as wide as keys, and 3/4 of the width for all keys. α = exp(−A softplus(a)) with A from U(1, 16) and the
bias of a such that its softplus lies between 0.001 and 0.1, evenly in its logarithm (both as in Mamba-2); the convolutions start
from U(±1/√K), torch's own range. Around the mixer stands the block of ``llama`` (models/_block.py).

Legend: B batch, T tokens, V vocabulary, D width, L layers, H heads, N features of a key, K length of the convolution, F width of
the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdh_bench.errors import SpecError
from bdh_bench.kernels.gated_delta import CHUNK, gated_delta, gated_delta_step
from bdh_bench.kernels.short_convolution import short_convolution
from bdh_bench.models._block import (
    Mixer,
    RMSNorm,
    Stack,
    close,
    depths,
    surrounding_flops,
    surroundings,
    wide,
    wide_dtype,
    width_near,
)
from bdh_bench.session import Streaming, TensorMemory
from bdh_bench.types import Keep

DEFAULTS = {
    "learning_rate": 2e-3,
    "position_limit": "none",
    "kind": "recurrent",
    "architecture": "gated delta rule per head, short convolution, RMSNorm before each block, gated SiLU, no positions",
}


@dataclass(frozen=True)
class Config:
    """Shape of the model; for a size, d_model and n_layer are solved.

    d_model      width D of the residual stream
    n_layer      layers
    n_head       heads, each with a memory of its own
    key_dim      features of a key of one head
    value_dim    features of a value of one head; 0 means twice key_dim
    conv_kernel  tokens under the short convolution; 1 is none, each token by itself
    vocab_size   tokens; 256 are the bytes
    """

    d_model: int = 66
    n_layer: int = 4
    n_head: int = 2
    key_dim: int = 32
    value_dim: int = 0
    conv_kernel: int = 4
    vocab_size: int = 256

    @property
    def value_width(self) -> int:
        """Features of a value of one head."""
        return self.value_dim or 2 * self.key_dim

    @property
    def parts(self) -> tuple[int, int, int]:
        """Channels of queries, keys and values, all heads together."""
        keys = self.n_head * self.key_dim
        return keys, keys, self.n_head * self.value_width


def parameters(config: Config) -> int:
    """Those around the mixers, and L·(matrices in and out, convolutions, norm of a head, A and bias of α)."""
    c = config
    channels, values = sum(c.parts), c.parts[2]
    matrices = c.d_model * (channels + values + 2 * c.n_head) + values * c.d_model
    mixer = matrices + channels * c.conv_kernel + c.value_width + 2 * c.n_head
    return surroundings(c.vocab_size, c.d_model, c.n_layer) + c.n_layer * mixer


def scaled(target: int, **pinned: Any) -> Iterator[Config]:
    """Shapes near ``target``: natural depths first; keys of 32 features, 64 when large, and heads for 3/4 of the width."""
    key = pinned.get("key_dim", 32 if target < 5e6 else 64)
    for depth in [pinned["n_layer"]] if "n_layer" in pinned else depths(target, bool(pinned)):
        rough = (target / depth / 14) ** 0.5  # a block has about 14·D²
        for heads in [pinned["n_head"]] if "n_head" in pinned else _near(0.75 * rough / key):
            shape = {**pinned, "n_layer": depth, "n_head": heads, "key_dim": key}
            config = Config(**({"d_model": _width(target, shape)} | shape))
            yield config
            if close(parameters(config), target):
                return


def _width(target: int, shape: dict[str, Any]) -> int:
    return width_near(target, lambda width: parameters(Config(**{**shape, "d_model": width})))


def _near(heads: float) -> list[int]:
    middle = max(1, round(heads))
    return [n for n in (middle, middle - 1, middle + 1) if n > 0]


class Model(Streaming, nn.Module):
    """A stack of blocks around ``GatedDelta``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        for field in fields(config):
            least = {"value_dim": 0}.get(field.name, 1)
            if getattr(config, field.name) < least:
                got = getattr(config, field.name)
                raise SpecError(f"got {field.name}={got} for gated_delta · expected at least {least}")
        self.config = config
        self.vocab_size = config.vocab_size
        self.stack = Stack(config.vocab_size, config.d_model, config.n_layer, lambda: GatedDelta(config))

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, V), from an empty state."""
        return self.advance(TensorMemory(), 0, tokens, "all")

    forward = logits

    def memory(self, batch_size: int) -> TensorMemory:
        """Zeros: per layer the last K − 1 inputs of the convolution (B, K − 1, channels) and S (B, H, N, value_width)."""
        return self.stack.memory(batch_size)

    def advance(self, memory: TensorMemory, position: int, tokens: Tensor, keep: Keep) -> Tensor:
        """Read tokens (B, T): in chunks, or in one step where there is one token; positions play no part."""
        logits: Tensor = self.stack(tokens, memory, keep)
        return logits

    def state_bytes(self, batch_size: int, context: int) -> int:
        """The same at every context."""
        c = self.config
        elements = (c.conv_kernel - 1) * sum(c.parts) + c.n_head * c.key_dim * c.value_width
        return batch_size * c.n_layer * elements * wide_dtype(self.stack.embedding.weight.dtype).itemsize

    def flops_per_token(self, context: int, mode: str = "recurrent") -> float:
        """Matrices, convolutions and the memory, per element of S: to fade it 1, to ask, write and read it 2 each.

        ``chunked`` fades once per chunk instead, and adds per token and head the scores K Kᵀ and Q Kᵀ (the masked half too),
        the triangular solve for D and N columns (half a product each) and the sum over the chunk's writes.
        """
        c = self.config
        d, n, v = c.d_model, c.key_dim, c.value_width
        chunk = min(CHUNK, context)
        memory = {"recurrent": 7 * n * v, "chunked": 6 * n * v + chunk * (4 * n + (n + v) + 2 * v)}[mode]
        channels, values = sum(c.parts), c.parts[2]
        matrices = 2 * d * (channels + 2 * values + 2 * c.n_head)
        mixer = matrices + 2 * c.conv_kernel * channels + c.n_head * memory
        return float(surrounding_flops(c.vocab_size, d, c.n_layer) + c.n_layer * mixer)

    def kernels(self) -> str:
        """What runs here."""
        return "torch chunked gated delta rule"


class GatedDelta(Mixer):
    """One matrix in, convolutions, the memory, norm and gate, one matrix out."""

    kept = ("conv", "state")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        channels, values, heads = sum(config.parts), config.parts[2], config.n_head
        self.split = (channels, values, heads, heads)
        self.in_proj = nn.Linear(config.d_model, sum(self.split), bias=False)
        self.conv = nn.Parameter(torch.empty(channels, config.conv_kernel).uniform_(-1, 1) * config.conv_kernel**-0.5)
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.alpha_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus of the bias is the step
        self.norm = RMSNorm(config.value_width, 1e-5)
        self.out = nn.Linear(values, config.d_model, bias=False)

    def empty(self, batch_size: int) -> dict[str, Tensor]:
        c, weight = self.config, self.in_proj.weight
        shapes = {"conv": (c.conv_kernel - 1, sum(c.parts)), "state": (c.n_head, c.key_dim, c.value_width)}
        dtype = wide_dtype(weight.dtype)
        return {name: weight.new_zeros(batch_size, *shape, dtype=dtype) for name, shape in shapes.items()}

    def forward(self, x: Tensor, past: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, T, D) → (B, T, D)."""
        raw, gate, strength, rate = self.in_proj(x).split(self.split, -1)
        mixed, conv = short_convolution(wide(raw), wide(self.conv), past.get("conv"))
        heads = (part.unflatten(-1, (self.config.n_head, -1)) for part in F.silu(mixed).split(self.config.parts, -1))
        query, key, value = (part.transpose(1, 2) for part in heads)  # (B, H, T, ·)
        query, key = F.normalize(query, dim=-1) * self.config.key_dim**-0.5, F.normalize(key, dim=-1)
        log_alpha = -wide(self.A_log).exp() * F.softplus(wide(rate) + wide(self.alpha_bias))  # (B, T, H)
        gates = log_alpha.transpose(1, 2), wide(strength).sigmoid().transpose(1, 2)  # (B, H, T)
        read, state = _remember(query, key, value, *gates, past.get("state"))
        gated = self.norm(read).transpose(1, 2).flatten(2) * F.silu(wide(gate))
        return self.out(gated.to(x.dtype)), {"conv": conv, "state": state}


def _remember(
    query: Tensor, key: Tensor, value: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    if query.shape[2] > 1 or state is None:
        return gated_delta(query, key, value, log_alpha, beta, state)
    query, key, value, log_alpha, beta = (x[:, :, 0] for x in (query, key, value, log_alpha, beta))
    read, state = gated_delta_step(query, key, value, log_alpha, beta, state)
    return read.unsqueeze(2), state
