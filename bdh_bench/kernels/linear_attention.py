"""Causal linear attention without the diagonal over rotary positive keys: how, without a T×T tensor?

The published form reads ``strict_lower(Q Qᵀ) V`` with Q = R(k), the rotated keys. Cut into chunks of C tokens with a state S
that sums what lies before the chunk, the same numbers are (bdh-facts: exact recurrent and chunked forms)

    O = strict_lower(Q Qᵀ) V + Q S          S ← S + Qᵀ V

The backward pass is written out. It keeps the keys before rotation (the caller needs them anyway) and recomputes Q and S:
once forward over the chunks for the gradient that queries get through S, once backward for all else. Nothing of size T×T,
no rotated copy and no state per chunk is kept.

Phases are fractions of a turn in float64, from the model's float32 frequency table, reduced before the cosine: a float32
phase would be off by 0.05 rad at position 2^20.

Legend: B batch, T tokens, C chunk, H heads, N neurons per head (keys), D values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_THETA = 2.0**16


def frequencies(neurons: int) -> Tensor:
    """Turns per token of each key index, float32 (N,): θ^(−2⌊i/2⌋/N) / 2π with θ = 2^16, as in the published code."""
    pair = torch.arange(0, neurons, 1, dtype=torch.float32).div(2).floor().mul(2)
    return 1.0 / (_THETA ** (pair / neurons)) / (2 * math.pi)


def rotations(freqs: Tensor, position: int, length: int) -> Tensor:
    """Unit complex numbers for positions [position, position + length): (T, N/2) complex64.

    ``freqs`` (N,) holds each frequency twice, once for either member of a pair.
    """
    where = torch.arange(position, position + length, dtype=torch.float64, device=freqs.device)
    turns = torch.outer(where, freqs.flatten()[::2].double()).remainder_(1.0)
    angle = turns.mul_(2 * math.pi).float()
    return torch.complex(angle.cos(), angle.sin())


def rotate(keys: Tensor, turn: Tensor) -> Tensor:
    """Rotate each pair (2k, 2k+1) of keys (B, T, H, N) by ``turn`` (T, N/2) → (B, H, T, N), contiguous.

    The product is taken in float32 and returned in the dtype of the keys.
    """
    pairs = torch.view_as_complex(keys.float().unflatten(-1, (-1, 2)).transpose(1, 2))  # (B, H, T, N/2)
    return torch.view_as_real((pairs * turn).contiguous()).flatten(-2).to(keys.dtype)


def chunk_length(values: int) -> int:
    """The default C for D-dimensional values: 2·D, where in-chunk work equals state work, between 64 and 1,024."""
    return max(64, min(1024, 1 << (2 * values - 1).bit_length()))


def linear_attention(
    keys: Tensor, values: Tensor, freqs: Tensor, position: int, state: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Read and extend the memory over one piece of text; differentiable in keys, values and state.

    keys    (B, T, H, N) before rotation; each serves as query and as key
    values  (B, T, D), shared by all heads
    state   (B, H, N, D) or None for an empty memory; never changed in place
    returns reads (B, H, T, D) in the dtype of the keys, and the new state in the state's dtype (float32 for None)
    """
    empty = state is None
    if state is None:
        batch, _, heads, neurons = keys.shape
        state = torch.zeros(batch, heads, neurons, values.shape[-1], dtype=torch.float32, device=keys.device)
    outputs: tuple[Tensor, Tensor] = _LinearAttention.apply(  # type: ignore[no-untyped-call]
        keys, values, state, freqs, position, chunk, empty
    )
    return outputs


class _LinearAttention(torch.autograd.Function):
    """Chunked forward and its backward; ``empty`` says that the incoming state is zero and need not be read."""

    @staticmethod
    def forward(
        ctx: Any, keys: Tensor, values: Tensor, state: Tensor, freqs: Tensor, position: int, chunk: int, empty: bool
    ) -> tuple[Tensor, Tensor]:
        batch, length, heads, _ = keys.shape
        reads = keys.new_empty(batch, heads, length, values.shape[-1])
        work = values.to(keys.dtype).unsqueeze(1)  # (B, 1, T, D)
        running = state
        for part in _chunks(length, chunk):
            query, value = rotate(keys[:, part], rotations(freqs, position + part.start, _size(part))), work[:, :, part]
            read = (query @ query.mT).tril_(-1) @ value  # (B, H, C, D)
            if not (empty and part.start == 0):
                read += query @ running.to(query.dtype)
            reads[:, :, part] = read
            running = running + (query.mT @ value).to(state.dtype)
        ctx.save_for_backward(keys, values, state, freqs)
        ctx.position, ctx.chunk, ctx.empty = position, chunk, empty
        return reads, running

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_reads: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        keys, values, state, freqs = ctx.saved_tensors
        length = keys.shape[1]
        dtype = keys.dtype
        work, d_reads = values.to(dtype).unsqueeze(1), d_reads.to(dtype)
        parts = list(_chunks(length, ctx.chunk))
        turns = [rotations(freqs, ctx.position + part.start, _size(part)) for part in parts]
        d_keys = torch.zeros_like(keys)
        d_values = torch.empty_like(values)
        if len(parts) > 1 or not ctx.empty:  # what queries receive through the state, in reading order
            running = state
            for part, turn in zip(parts, turns, strict=True):
                d_keys[:, part] = _rotate_back(d_reads[:, :, part] @ running.to(dtype).mT, turn)
                if part is not parts[-1]:
                    running = running + (rotate(keys[:, part], turn).mT @ work[:, :, part]).to(state.dtype)
        for part, turn in zip(reversed(parts), reversed(turns), strict=True):
            query, value, d_read = rotate(keys[:, part], turn), work[:, :, part], d_reads[:, :, part]
            flow = d_state.to(dtype)
            d_scores = (d_read @ value.mT).tril_(-1)  # (B, H, C, C)
            scores = (query @ query.mT).tril_(-1)
            d_query = (d_scores + d_scores.mT) @ query + value @ flow.mT
            d_values[:, part] = (scores.mT @ d_read + query @ flow).sum(1).to(values.dtype)
            d_keys[:, part] += _rotate_back(d_query, turn)
            d_state = d_state + (query.mT @ d_read).to(d_state.dtype)
        return d_keys, d_values, d_state, None, None, None, None


def _rotate_back(query: Tensor, turn: Tensor) -> Tensor:
    """The transpose of ``rotate``: (B, H, T, N) → (B, T, H, N)."""
    pairs = torch.view_as_complex(query.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn.conj()).flatten(-2).transpose(1, 2).to(query.dtype)


def _chunks(length: int, chunk: int) -> Iterator[slice]:
    for start in range(0, length, chunk):
        yield slice(start, min(start + chunk, length))


def _size(part: slice) -> int:
    return int(part.stop - part.start)
