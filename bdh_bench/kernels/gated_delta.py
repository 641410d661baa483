"""The gated delta rule in chunks, forward and backward: how does a memory that corrects itself train in parallel?

    S̃ = α_t S_{t-1}        u_t = β_t (v_t − k_t S̃)        S_t = S̃ + k_tᵀ u_t        y_t = q_t S_t

A token fades the memory by α, asks it what the key k holds, and writes the part β of the difference to its own value. Over a
chunk with state S before it, let γ_t be the product of α from the chunk's head to t, Γ_ts = γ_t / γ_s for s ≤ t and 0 after,
and ε_t = γ_C / γ_t, what is left of token t at the chunk's end. Then the writes U solve one unit lower triangular system:

    (I + M) U = β (V − γ K S)        M = β · strict_lower(K Kᵀ Γ)
    Y = γ Q S + A U                  A = lower(Q Kᵀ Γ)
    S' = γ_C S + (ε K)ᵀ U

With X = (I + M)⁻¹ β V and W = (I + M)⁻¹ β γ K, which need no state, U = X − W S, and only this line and the next state run
from chunk to chunk. The backward pass is written out: it keeps the inputs, U, W and the state at the head of each chunk,
walks the chunks in reverse with G, the gradient of the state, by

    dU = Aᵀ dY + ε K G'              G = γ_C G' + (γ Q)ᵀ dY − Wᵀ dU

and does the rest for all chunks at once.

Source: Yang, Kautz & Hatamizadeh, "Gated Delta Networks" (2024, arXiv 2412.06464), equations 8 to 10; the chunk form with a
triangular solve from Yang et al., "Parallelizing Linear Transformers with the Delta Rule" (2024, arXiv 2406.06484). The
gradient is ours. Everything is computed in float32 or wider.

Legend: B batch, H heads, T tokens, C chunk, R chunks, N features of a key, D features of a value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdh_bench.kernels.linear_attention import cut, join

#: Tokens per chunk; measured on a CPU with N = 32 to 64.
CHUNK = 64


def gated_delta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Reads (B, H, T, D) and the state after the last token; differentiable in every tensor.

    query, key (B, H, T, N); value (B, H, T, D); log_alpha (at most 0) and beta (B, H, T); state (B, H, N, D) or None for
    zeros, never changed in place. Keys of length at most 1 and β of at most 2 keep the memory stable. The results are
    float32, or float64 where an input is.
    """
    given = (query, key, value, log_alpha, beta) if state is None else (query, key, value, log_alpha, beta, state)
    wide = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
    tensors = [x.to(wide) for x in given]
    before = tensors[5] if state is not None else None
    read, after = _Rule.apply(*tensors[:5], before, min(chunk, query.shape[2]))  # type: ignore[no-untyped-call]
    return read, after


def gated_delta_step(
    query: Tensor, key: Tensor, value: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: query, key (B, H, N), value (B, H, D), log_alpha, beta (B, H) → the read (B, H, D) and the new state, in its dtype."""
    query, key, value, log_alpha, beta = (x.to(state.dtype) for x in (query, key, value, log_alpha, beta))
    with torch.autocast(state.device.type, enabled=False):
        state = state * log_alpha.exp()[..., None, None]
        written = beta.unsqueeze(2) * (value - (key.unsqueeze(2) @ state).squeeze(2))
        state = torch.addcmul(state, key.unsqueeze(3), written.unsqueeze(2))
        return (query.unsqueeze(2) @ state).squeeze(2), state


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        log_alpha: Tensor,
        beta: Tensor,
        state: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(query.device.type, enabled=False):
            q, k, v, a, b = (cut(x, chunk) for x in (query, key, value, log_alpha, beta))
            fade, b = _Fade.of(a), b.unsqueeze(4)  # (B, H, R, C, 1)
            system = (b * (k @ k.mT * fade.pair)).tril_(-1)  # M; the solves take the diagonal as ones
            right = b * torch.cat((v, fade.start * k), 4)
            solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
            parts = solved.split((v.shape[4], k.shape[4]), 4)
            written, reach = (x.contiguous() for x in parts)  # X (B, H, R, C, D) and W (B, H, R, C, N)
            late = fade.end * k
            after = value.new_zeros(*q.shape[:2], q.shape[4], v.shape[4]) if state is None else state
            edges = []
            for r in range(q.shape[2]):
                edges.append(after)
                written[:, :, r] -= reach[:, :, r] @ after  # U of this chunk
                after = fade.whole[:, :, r] * after + late[:, :, r].mT @ written[:, :, r]
            before = torch.stack(edges, 2)  # (B, H, R, N, D)
            read = (q @ k.mT * fade.pair) @ written + fade.start * (q @ before)
        ctx.save_for_backward(query, key, value, log_alpha, beta, before, written, reach)
        ctx.chunk, ctx.has_state = chunk, state is not None
        return join(read, query.shape[2]), after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_read: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, log_alpha, beta, before, written, reach = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            q, k, v, a, b, dy = (cut(x, ctx.chunk) for x in (query, key, value, log_alpha, beta, d_read))
            fade, b = _Fade.of(a), b.unsqueeze(4)
            alike, seen = k @ k.mT * fade.pair, q @ k.mT * fade.pair  # K Kᵀ Γ and A (B, H, R, C, C)
            d_written, late = seen.mT @ dy, fade.end * k
            read = (fade.start * q).mT @ dy
            flow, flows = d_after, []
            for r in range(q.shape[2] - 1, -1, -1):
                flows.append(flow)
                d_written[:, :, r] += late[:, :, r] @ flow
                flow = fade.whole[:, :, r] * flow + read[:, :, r] - reach[:, :, r].mT @ d_written[:, :, r]
            after = torch.stack(flows[::-1], 2)  # G' of every chunk (B, H, R, N, D)
            # through the system: dR of its right side, dM of its matrix
            d_right = torch.linalg.solve_triangular((b * alike).tril(-1).mT, d_written, upper=True, unitriangular=True)
            d_mixed = -(d_right @ written.mT).tril_(-1)
            d_seen = (dy @ written.mT).tril_()
            d_scores, mixed = d_seen * fade.pair, d_mixed * alike
            d_value, d_alike, answered = b * d_right, b * d_mixed * fade.pair, fade.start * (k @ before)
            from_before, from_after = dy @ before.mT, written @ after.mT
            d_query = d_scores @ k + fade.start * from_before
            d_key = (d_alike + d_alike.mT) @ k + d_scores.mT @ q
            d_key += fade.end * from_after - fade.start * (d_value @ before.mT)
            d_beta = (d_right * (v - answered)).sum(4) + mixed.sum(4)
            # through the fading: every factor is the exponential of a difference of two sums of log α
            pairs = b * mixed + d_seen * seen
            ends = (late * from_after).sum(4)
            d_sum = pairs.sum(4) - pairs.sum(3) + (fade.start * q * from_before).sum(4) - ends
            d_sum -= (d_value * answered).sum(4)
            d_sum[..., -1] += ends.sum(3) + (fade.whole * before * after).sum((3, 4))
            d_log = d_sum.flip(3).cumsum(3).flip(3)
        length = query.shape[2]
        joined = (join(x, length) for x in (d_query, d_key, d_value, d_log, d_beta))
        return *joined, flow if ctx.has_state else None, None


class _Fade(NamedTuple):
    """What is left: γ (…, C, 1) of the chunk's head at t, ε (…, C, 1) of t at its end, Γ (…, C, C) of s at t, γ_C (…, 1, 1)."""

    start: Tensor
    end: Tensor
    pair: Tensor
    whole: Tensor

    @classmethod
    def of(cls, log_alpha: Tensor) -> _Fade:
        """From (B, H, R, C). Differences are taken before the exponential: γ itself may underflow, its ratios must not."""
        total = log_alpha.cumsum(3).unsqueeze(4)
        last = total[..., -1:, :]
        length = log_alpha.shape[3]
        future = torch.ones(length, length, dtype=torch.bool, device=log_alpha.device).triu_(1)
        pair = (total - total.mT).masked_fill_(future, -torch.inf).exp_()
        return cls(total.exp(), (last - total).exp(), pair, last.exp())
