"""Linear attention: the transformer made linear, with small keys; does a recurrent memory need more than a sum of outer products?

    S_t = S_{t-1} + k_tᵀ v_t        y_t = q_t S_t        q, k = rotate(feature(W x))

Source: Katharopoulos et al., "Transformers are RNNs" (2020, arXiv 2006.16236). Around it stands the block of ``llama``, in the
same shapes, so that the two differ in their memory only. ``feature`` chooses the keys:

    identity   signed keys; the read goes through an RMS norm per head instead of a normaliser, as in RetNet (Sun et al. 2023)
               and gated linear attention (Yang et al. 2023), but without their decay and output gate
    relu       positive, partly zero keys (the sign of BDH's, not its number), and the same norm
    elu        elu + 1 and the sum of the weights as normaliser: the published form, which has no norm

With ``rope`` queries and keys are rotated as in llama; the normaliser of elu sums keys that are not, as in RoFormer (Su et al.
2021, equation 19), because rotated ones could sum to zero. Without it a sum does not know the order of what it holds.

Legend: B batch, T tokens, V vocabulary, D width, L layers, H heads, N features of a key, F width of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdh_bench.errors import SpecError
from bdh_bench.kernels import rotary
from bdh_bench.kernels.linear_attention import CHUNK, linear_attention, linear_attention_step
from bdh_bench.models._block import (
    Mixer,
    RMSNorm,
    Stack,
    bracket,
    close,
    depths,
    surrounding_flops,
    surroundings,
    wide,
    wide_dtype,
)
from bdh_bench.session import Streaming, TensorMemory
from bdh_bench.types import Keep

DEFAULTS = {
    "learning_rate": 1e-3,
    "position_limit": "none",
    "kind": "recurrent",
    "architecture": "a sum of outer products per head, optional rotary positions, RMSNorm before each block, gated SiLU",
}

_FEATURES = ("identity", "elu", "relu")
_EPS = 1e-6  # of the normaliser, as in the published code


@dataclass(frozen=True)
class Config:
    """Shape of the model.

    d_model     width D of the residual stream
    n_layer     layers
    n_head      heads
    key_dim     features of a key; 0 means as many as of a value, d_model / n_head
    feature     of queries and keys: identity (signed), relu (partly zero) or elu (elu + 1, with a normaliser)
    rope        off leaves queries and keys unrotated: the order of what was read is lost
    vocab_size  tokens; 256 are the bytes
    rope_theta  base of the rotary frequencies
    """

    d_model: int = 76
    n_layer: int = 4
    n_head: int = 2
    key_dim: int = 0
    feature: str = "identity"
    rope: bool = True
    vocab_size: int = 256
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        """Features of a value."""
        return self.d_model // self.n_head

    @property
    def neurons(self) -> int:
        """N, features of a key."""
        return self.key_dim or self.head_dim

    @property
    def summed(self) -> bool:
        """Whether reads are divided by the sum of their weights."""
        return self.feature == "elu"


def parameters(config: Config) -> int:
    """Those around the mixers, and L·(2·D·H·N + 2·D² + the norm of a head)."""
    d = config.d_model
    mixer = 2 * d * config.n_head * config.neurons + 2 * d * d + (0 if config.summed else config.head_dim)
    return surroundings(config.vocab_size, d, config.n_layer) + config.n_layer * mixer


def scaled(target: int, **pinned: Any) -> Iterator[Config]:
    """Shapes near ``target``: the natural depth first, then its neighbours; heads of about 32 features, 64 when large."""
    wanted = 32 if target < 5e6 else 64
    for depth in [pinned["n_layer"]] if "n_layer" in pinned else depths(target, bool(pinned)):
        found: list[tuple[float, Config]] = []
        for heads in [pinned["n_head"]] if "n_head" in pinned else range(1, 65):
            for width in _widths(target, depth, heads, pinned):
                config = Config(**{**pinned, "d_model": width, "n_layer": depth, "n_head": heads})
                found.append((abs(parameters(config) / target - 1) + abs(config.head_dim - wanted) / 1e4, config))
        usable = [f for f in found if "n_head" in pinned or 16 <= f[1].head_dim <= 64] or found
        for _, config in sorted(usable, key=lambda f: f[0]):
            yield config
        if any(close(parameters(config), target) for _, config in usable):
            return


def _widths(target: int, depth: int, heads: int, pinned: dict[str, Any]) -> list[int]:
    """Widths of even heads on both sides of the target."""
    if "d_model" in pinned:
        return [pinned["d_model"]] if pinned["d_model"] % (2 * heads) == 0 else []

    def count(half: int) -> int:
        return parameters(Config(**{**pinned, "d_model": heads * 2 * half, "n_layer": depth, "n_head": heads}))

    return [heads * 2 * half for half in bracket(target, count)]


class Model(Streaming, nn.Module):
    """A stack of blocks around ``LinearAttention``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.vocab_size = config.vocab_size
        self.stack = Stack(config.vocab_size, config.d_model, config.n_layer, lambda: LinearAttention(config))

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, V), from an empty state."""
        return self.advance(TensorMemory(), 0, tokens, "all")

    forward = logits

    def memory(self, batch_size: int) -> TensorMemory:
        """Zeros: per layer S (B, H, N, D/H), and for elu the sum of the keys (B, H, N)."""
        return self.stack.memory(batch_size)

    def advance(self, memory: TensorMemory, position: int, tokens: Tensor, keep: Keep) -> Tensor:
        """Read tokens (B, T) at ``position``; in chunks, or in one step where there is one token."""
        by = None
        if self.config.rope:
            freqs = rotary.frequencies(self.config.neurons, self.config.rope_theta).to(tokens.device)
            by = rotary.turn(freqs, position, tokens.shape[1]).to(wide_dtype(self.stack.embedding.weight.dtype))
        logits: Tensor = self.stack(tokens, memory, keep, by)
        return logits

    def state_bytes(self, batch_size: int, context: int) -> int:
        """The same at every context: L·H·N·(D/H), and one more column where the keys are summed."""
        c = self.config
        elements = c.n_layer * c.n_head * c.neurons * (c.head_dim + c.summed)
        return batch_size * elements * wide_dtype(self.stack.embedding.weight.dtype).itemsize

    def flops_per_token(self, context: int, mode: str = "recurrent") -> float:
        """Matrices, and of the memory: writing and reading S (``recurrent``), scores within a chunk beside them (``chunked``).

        The chunked form computes the masked half of its scores too, and it is counted.
        """
        c = self.config
        n, d = c.n_head * c.neurons, c.d_model
        memory = {"recurrent": 4 * n * c.head_dim, "chunked": 4 * n * c.head_dim + 2 * min(CHUNK, context) * (n + d)}[
            mode
        ]
        memory += 4 * n if c.summed else 0
        matrices = 4 * d * (n + d)
        return float(surrounding_flops(c.vocab_size, d, c.n_layer) + c.n_layer * (matrices + memory))

    def kernels(self) -> str:
        """What runs here."""
        return "torch chunked linear attention"


class LinearAttention(Mixer):
    """Queries, keys and values from one matrix; the memory; and a matrix back."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.kept = ("state", "keys") if config.summed else ("state",)
        keys = config.n_head * config.neurons
        self.parts = (keys, keys, config.d_model)
        self.qkv = nn.Linear(config.d_model, sum(self.parts), bias=False)
        self.norm = None if config.summed else RMSNorm(config.head_dim, 1e-5)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def empty(self, batch_size: int) -> dict[str, Tensor]:
        c, weight = self.config, self.qkv.weight
        kept = {"state": weight.new_zeros(batch_size, c.n_head, c.neurons, c.head_dim, dtype=wide_dtype(weight.dtype))}
        if c.summed:
            kept["keys"] = torch.zeros_like(kept["state"][..., 0])
        return kept

    def forward(self, x: Tensor, past: dict[str, Tensor], by: rotary.Turn | None) -> tuple[Tensor, dict[str, Tensor]]:
        """(B, T, D) → (B, T, D)."""
        heads = (
            part.unflatten(-1, (self.config.n_head, -1)).transpose(1, 2) for part in self.qkv(x).split(self.parts, -1)
        )
        query, key, value = (wide(part) for part in heads)  # (B, H, T, ·)
        query, key = self._feature(query * self.config.neurons**-0.5), self._feature(key)
        turned = (query, key) if by is None else (rotary.turned(query, by), rotary.turned(key, by))
        read, state = _attend(*turned, value, past.get("state"))
        now = {"state": state}
        if self.norm is None:
            sums = key.cumsum(2) + (past["keys"].unsqueeze(2) if past else 0)  # (B, H, T, N)
            read = read / ((query * sums).sum(3, keepdim=True) + _EPS)
            now["keys"] = sums[:, :, -1].clone()
        else:
            read = self.norm(read)
        return self.out(read.transpose(1, 2).flatten(2).to(x.dtype)), now

    def _feature(self, keys: Tensor) -> Tensor:
        match self.config.feature:
            case "elu":
                return F.elu(keys) + 1
            case "relu":
                return F.relu(keys)
            case _:
                return keys


def _attend(query: Tensor, key: Tensor, value: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    if query.shape[2] > 1 or state is None:
        return linear_attention(query, key, value, state)
    read, state = linear_attention_step(query[:, :, 0], key[:, :, 0], value[:, :, 0], state)
    return read.unsqueeze(2), state


def _check(config: Config) -> None:
    for name, least in (("d_model", 1), ("n_layer", 1), ("n_head", 1), ("key_dim", 0), ("vocab_size", 1)):
        if getattr(config, name) < least:
            raise SpecError(f"got {name}={getattr(config, name)} for linear_attention · expected at least {least}")
    if config.feature not in _FEATURES:
        raise SpecError(f"got feature={config.feature} · expected one of {', '.join(_FEATURES)}")
    if config.d_model % config.n_head:
        raise SpecError(f"got d_model={config.d_model} for {config.n_head} heads · expected a multiple")
    if config.rope and config.neurons % 2:
        raise SpecError(
            f"got {config.neurons} features per key · expected an even number (they rotate in pairs)",
            "set key_dim, or rope=off",
        )
    if not config.rope_theta > 0:
        raise SpecError(f"got rope_theta={config.rope_theta} · expected more than 0")
