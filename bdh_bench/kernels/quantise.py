"""How is a key or a value kept in 8 or 4 bits, and how does attention read it?

Symmetric rounding, one scale per token and head: with q = 127 or 7,

    scale = max |x| / q        code = round(x / scale) ∈ [−q, q]        x̂ = code · scale        |x̂ − x| ≤ scale / 2

The largest feature of a head is kept exactly and zero stays zero. A scale is at least float32: a narrower one would be a second
rounding. 8 bits are stored as int8; two codes of 4 bits share a byte, feature i with feature i + D/2, both shifted by 8.

One query reads the codes in blocks small enough to be turned back within the processor's cache, so that memory is asked for the codes
alone and not for a float copy of them.

transformers' own ``QuantizedCache`` (5.23) is not used: its integer backends need optimum-quanto or hqq, round the past anew whenever
their window of unrounded tokens is full, and read that window unrounded; its fp8 backend keeps one scale for a whole tensor, from the first
piece. All of them make numbers depend on how a text was cut. Here a token is rounded once, alone, before anyone reads it.

Source: the scheme is plain absmax rounding; compare KIVI (arXiv 2402.02750), which groups keys by channel over tokens.

Legend: B batch, K key and value heads, G queries that share a key, S tokens in the cache, D features per head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Bits per code that can be stored.
BITS = (8, 4)

#: Features that are turned back at once: 1 MiB of float32.
_BLOCK = 2**18


class Codes(NamedTuple):
    """Keys or values of a cache that were not turned back: codes (B, K, S, …), scales (B, K, S, 1), to be read as ``dtype``."""

    codes: Tensor
    scale: Tensor
    bits: int
    dtype: torch.dtype

    def part(self, tokens: slice) -> Tensor:
        """So many tokens turned back, heads in one row, in the dtype of the scales: (B·K, tokens, D)."""
        codes, scale = (t[:, :, tokens].flatten(0, 1) for t in (self.codes, self.scale))
        return dequantise(codes, scale, self.bits, self.dtype).to(scale.dtype)


def code_bytes(features: int, bits: int) -> int:
    """Bytes of the codes of so many features (an even number)."""
    return features * bits // 8


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the scales for values of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(…, D) → codes (…, D) int8 or (…, D/2) uint8, and scales (…, 1)."""
    limit = 2 ** (bits - 1) - 1
    wide = x.to(scale_dtype(x.dtype))
    scale = wide.abs().amax(-1, keepdim=True) / limit
    codes = (wide / scale.clamp(min=torch.finfo(wide.dtype).tiny)).round_().clamp_(-limit, limit)
    if bits == 8:
        return codes.to(torch.int8), scale
    low, high = (codes + 8).to(torch.uint8).chunk(2, -1)
    return low | (high << 4), scale


def dequantise(codes: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Back to (…, D) of ``dtype``."""
    # In place: a second temporary of the size of a whole cache costs more than the arithmetic.
    wide = torch.cat((codes & 15, codes >> 4), -1).to(scale.dtype).sub_(8) if bits == 4 else codes.to(scale.dtype)
    return wide.mul_(scale).to(dtype)


def read_codes(query: Tensor, key: Codes, value: Codes, scaling: float) -> Tensor:
    """Softmax attention of one token, (B, K, G, D) → the same shape, over all that is kept."""
    batch, heads, _, width = query.shape
    total = key.codes.shape[2]
    step = max(16, _BLOCK // (batch * heads * width))
    blocks = [slice(start, min(start + step, total)) for start in range(0, total, step)]
    asked = (query.to(key.scale.dtype) * scaling).flatten(0, 1)  # (B·K, G, D)
    weights = torch.cat([asked @ key.part(block).mT for block in blocks], -1).softmax(-1)  # (B·K, G, S)
    mixed = torch.zeros_like(asked)
    for block in blocks:
        mixed = torch.baddbmm(mixed, weights[:, :, block], value.part(block))
    return mixed.view(query.shape).to(query.dtype)


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The value of ``rounded`` with the gradient of ``x``."""
    out: Tensor = _StraightThrough.apply(x, rounded)  # type: ignore[no-untyped-call]
    return out


class _StraightThrough(torch.autograd.Function):
    """Not x + (x̂ − x).detach(), which is x̂ only up to rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
