"""Reading one token: which bytes of memory and weights must move, and how few can it be?

``dense`` reads the whole state of a pass, S (H, N, D), and adds a rank-1 update to it. ``sparse`` touches only the rows
whose rotated key is not zero (a pair turns together, so either member wakes both), only the gates of neurons with a
positive key, and only their rows of the decoder. Zero rows contribute exactly zero, so the two agree to rounding.

The encoder is always read whole: nobody knows which keys are positive before they are computed.

Legend: B streams, H heads, N neurons per head, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 4096  # rows gathered at a time: their storage is small enough to be reused instead of fetched anew


def read_dense(query: Tensor, value: Tensor, state: Tensor, fade: Tensor | None = None) -> Tensor:
    """Read, then write in place: keys (H, B, N), value (B, D), state (B, H, N, D) → reads (H, B, D).

    ``fade`` (H,) is what one token of decay leaves of the state, or None.
    """
    batch, heads, neurons, width = state.shape
    keys = query.transpose(0, 1).to(state.dtype)  # (B, H, N)
    flat = state.view(batch * heads, neurons, width)
    if fade is not None:
        state.mul_(fade.view(-1, 1, 1))
    read = torch.bmm(keys.reshape(-1, 1, neurons), flat).view(batch, heads, width)
    state.addcmul_(keys.unsqueeze(-1), value.to(state.dtype).view(batch, 1, 1, width))
    return read.transpose(0, 1).to(query.dtype)


def read_sparse(query: Tensor, value: Tensor, state: Tensor) -> tuple[Tensor, float]:
    """The same on the rows whose key is not zero; also their share of all rows."""
    batch, heads, neurons, width = state.shape
    keys = query.transpose(0, 1).reshape(-1)  # (B·H·N)
    rows = keys.nonzero().squeeze(1)
    strength = keys.index_select(0, rows).to(state.dtype)
    flat = state.view(-1, width)
    bags = _bags(rows, batch * heads, neurons)
    read = F.embedding_bag(rows, flat, bags, mode="sum", per_sample_weights=strength)
    value = value.to(state.dtype)
    for some, by in zip(rows.split(_BLOCK), strength.split(_BLOCK), strict=True):
        written = value if batch == 1 else value[some // (heads * neurons)]
        flat.index_add_(0, some, by.unsqueeze(1) * written)
    return read.view(batch, heads, width).transpose(0, 1).to(query.dtype), len(rows) / len(keys)


def gate_dense(keys: Tensor, answer: Tensor, encoder_v: Tensor, decoder: Tensor) -> Tensor:
    """keys (H, B, N), answers (H, B, D), encoder_v (H, D, N), decoder (H, N, D) → z (B, D)."""
    gated = torch.bmm(answer, encoder_v).relu_().mul_(keys)
    return torch.bmm(gated, decoder).sum(0)


def gate_sparse(keys: Tensor, answer: Tensor, rows_v: Tensor, decoder: Tensor) -> Tensor:
    """The same on the neurons whose key is not zero; ``rows_v`` (H·N, D) is encoder_v with one row per neuron."""
    return torch.cat([_gate_stream(keys[:, i], answer[:, i], rows_v, decoder) for i in range(keys.shape[1])])


def _gate_stream(keys: Tensor, answer: Tensor, rows_v: Tensor, decoder: Tensor) -> Tensor:
    """One stream: keys (H, N), answers (H, D) → z (1, D)."""
    flat = keys.reshape(-1)
    active = flat.nonzero().squeeze(1)
    # Every picked neuron times the answers of all heads, then its own: one product instead of a gathered copy of answers.
    crossed = torch.cat([rows_v.index_select(0, some) @ answer.mT for some in active.split(_BLOCK)])  # (active, H)
    gates = crossed.gather(1, (active // keys.shape[1]).unsqueeze(1)).squeeze(1)
    gated = gates.relu_().mul_(flat.index_select(0, active))
    weights = decoder.view(-1, decoder.shape[-1])
    return F.embedding_bag(active, weights, active.new_zeros(1), mode="sum", per_sample_weights=gated)


def _bags(rows: Tensor, count: int, size: int) -> Tensor:
    """Where each of ``count`` groups of ``size`` consecutive indices begins in the sorted ``rows``."""
    return torch.searchsorted(rows, torch.arange(0, count * size, size, device=rows.device))
