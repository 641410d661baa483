"""Rotary phases of BDH's keys: which angle at which position, and the rotation itself.

Phases are fractions of a turn in float64, from the model's float32 frequency table, reduced before the cosine: a float32
phase would be off by 0.05 rad at position 2^20. Multiplying and reducing is exact enough to any position below 2^40.

A key has N neurons; members 2k and 2k+1 turn together. The kernels keep the neurons of a head in *split order*, all even
members first and all odd members after them, so that a rotation works on two contiguous halves.

Source: the rotary embedding of ``pathwaycom/bdh`` (bdh-facts §1), θ = 2^16.

Legend: T tokens, N neurons per head, M = N/2 pairs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_THETA = 2.0**16


class Turn(NamedTuple):
    """Cosine and sine of every pair at every position of a piece, each (T, M)."""

    cos: Tensor
    sin: Tensor

    def part(self, piece: slice) -> Turn:
        """The positions of ``piece``."""
        return Turn(self.cos[piece], self.sin[piece])

    def to(self, dtype: torch.dtype) -> Turn:
        """The same in another dtype."""
        return Turn(self.cos.to(dtype), self.sin.to(dtype))


def frequencies(neurons: int, theta: float = _THETA) -> Tensor:
    """Turns per token of each neuron, float32 (N,): θ^(−2⌊i/2⌋/N) / 2π, as in the published code (θ = 2^16)."""
    pair = torch.arange(0, neurons, 1, dtype=torch.float32).div(2).floor().mul(2)
    return 1.0 / (theta ** (pair / neurons)) / (2 * math.pi)


def turn(freqs: Tensor, position: int, length: int) -> Turn:
    """Cosines and sines, float64, for positions [position, position + length).

    ``freqs`` (…, N) holds each frequency twice in a row, once for either member of a pair.
    """
    where = torch.arange(position, position + length, dtype=torch.float64, device=freqs.device)
    angle = torch.outer(where, freqs.flatten()[::2].double()).remainder_(1.0).mul_(2 * math.pi)
    return Turn(angle.cos(), angle.sin())


def split_order(weight: Tensor) -> Tensor:
    """(…, N) in published order → the same neurons, even members first."""
    pairs: Tensor = weight.unflatten(-1, (-1, 2))
    return pairs.mT.flatten(-2)


def rotate(keys: Tensor, by: Turn) -> Tensor:
    """Rotate keys (…, T, N), in split order, by a turn of their own dtype: (u, w) → (u·cos − w·sin, w·cos + u·sin)."""
    (u, w), (cos, sin) = keys.chunk(2, -1), by
    out = torch.empty_like(keys)
    first, second = out.chunk(2, -1)
    torch.mul(u, cos, out=first).addcmul_(w, sin, value=-1)
    torch.mul(w, cos, out=second).addcmul_(u, sin)
    return out


def turned(keys: Tensor, by: Turn) -> Tensor:
    """``rotate`` for autograd to follow."""
    (u, w), cos, sin = keys.chunk(2, -1), by.cos.to(keys.dtype), by.sin.to(keys.dtype)
    return torch.cat((u * cos - w * sin, w * cos + u * sin), -1)


def rotate_back(rotated: Tensor, by: Turn) -> Tensor:
    """The inverse of ``rotate``, which is its transpose."""
    return rotate(rotated, Turn(by.cos, -by.sin))
