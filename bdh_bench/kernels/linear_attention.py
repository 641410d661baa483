"""Causal linear attention, forward and backward, without a T×T tensor and without a loop over tokens: how?

    S_t = S_{t-1} + k_tᵀ v_t        y_t = q_t S_t

Over a chunk of C tokens with state S before it, and with the gradient G of the state after it:

    Y = tril(Q Kᵀ) V + Q S                      S' = S + Kᵀ V
    dQ = tril(dY Vᵀ) K + dY Sᵀ                  dK = tril(dY Vᵀ)ᵀ Q + V Gᵀ
    dV = tril(Q Kᵀ)ᵀ dY + K G                   G' = G + Qᵀ dY

The states at the chunk heads are running sums of Kᵀ V and their gradients are running sums of Qᵀ dY from the other end, so
that all chunks are computed at once. The backward pass keeps the inputs only and computes the states again.

Source: Katharopoulos et al., "Transformers are RNNs" (2020), equations 16 to 18; the chunked form follows from the sum, as in
Hua et al., "Transformer Quality in Linear Time" (2022). It is not BDH's pass (bdh_pass.py): a token reads what it writes
itself, queries and keys differ, and every head has values of its own.

Everything is computed in float32 or wider: with small keys the products are a small part of a model, and a state that sums
a long text in half precision stops taking in new tokens.

Legend: B batch, H heads, T tokens, C chunk, R chunks, N features of a key, D features of a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

#: Tokens per chunk: near the size of a state (N = D = 64), where work inside chunks and on states is about equal.
CHUNK = 64


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor | None = None, *, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Reads (B, H, T, D) and the state after the last token; differentiable in every tensor.

    query, key (B, H, T, N); value (B, H, T, D); state (B, H, N, D) or None for zeros, never changed in place. The results
    are float32, or float64 where an input is.
    """
    given = (query, key, value) if state is None else (query, key, value, state)
    wide = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
    tensors = [x.to(wide) for x in given]
    before = tensors[3] if state is not None else None
    read, after = _Attention.apply(*tensors[:3], before, min(chunk, query.shape[2]))  # type: ignore[no-untyped-call]
    return read, after


def linear_attention_step(query: Tensor, key: Tensor, value: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: query, key (B, H, N), value (B, H, D), state (B, H, N, D) → the read (B, H, D) and the new state, in its dtype."""
    query, key, value = (x.to(state.dtype) for x in (query, key, value))
    state = torch.addcmul(state, key.unsqueeze(3), value.unsqueeze(2))
    with torch.autocast(state.device.type, enabled=False):
        return (query.unsqueeze(2) @ state).squeeze(2), state


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, state: Tensor | None, chunk: int
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = (cut(x, chunk) for x in (query, key, value))
            states = _states(k, v, state)
            read = (q @ k.mT).tril_() @ v + q @ states[:, :, :-1]
        ctx.save_for_backward(query, key, value, state)
        ctx.chunk = chunk
        return join(read, query.shape[2]), states[
            :, :, -1
        ].clone()  # a copy: a view would keep every chunk's state alive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_read: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, state = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            q, k, v, d = (cut(x, ctx.chunk) for x in (query, key, value, d_read))
            flow = _flows(q, d, d_after)
            states = _states(k, v, state)[:, :, :-1]
            d_scores = (d @ v.mT).tril_()
            d_query = d_scores @ k + d @ states.mT
            d_key = d_scores.mT @ q + v @ flow[:, :, 1:].mT
            d_value = (q @ k.mT).tril_().mT @ d + k @ flow[:, :, 1:]
        length = query.shape[2]
        d_state = flow[:, :, 0].clone() if state is not None else None
        return join(d_query, length), join(d_key, length), join(d_value, length), d_state, None


def cut(x: Tensor, chunk: int) -> Tensor:
    """(B, H, T, …) → (B, H, R, C, …); the last chunk is filled with zeros, which write nothing."""
    missing = -x.shape[2] % chunk
    if missing:
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, missing))
    pieces: Tensor = x.unflatten(2, (-1, chunk))
    return pieces


def join(x: Tensor, length: int) -> Tensor:
    """(B, H, R, C, …) → (B, H, T, …), the inverse of ``cut``."""
    return x.flatten(2, 3)[:, :, :length]


def _states(k: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    """The states (B, H, R + 1, N, D) before the first chunk and after each."""
    written = k.mT @ v
    first = torch.zeros_like(written[:, :, 0]) if state is None else state
    return torch.cat((first.unsqueeze(2), written), 2).cumsum_(2)


def _flows(q: Tensor, d: Tensor, d_after: Tensor) -> Tensor:
    """The gradients (B, H, R + 1, N, D) of those states."""
    return torch.cat((q.mT @ d, d_after.unsqueeze(2)), 2).flip(2).cumsum_(2).flip(2)
