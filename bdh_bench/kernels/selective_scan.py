"""How fast can plain torch run Mamba's selective scan, forward and backward, without keeping every state?

    h_t = exp(Δ_t A) ⊙ h_{t-1} + Δ_t u_t B_t        y_t = C_t · h_t + D u_t

Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), equation 2 and section 3.3
(recompute the states in the backward pass instead of storing them). Departure: the paper's kernel scans in parallel on a
GPU; here time runs in order inside a chunk, and all that does not depend on the previous state is done for the whole
chunk at once, in buffers that stay in the cache. What is kept for the backward pass is the state at each chunk's edge.

Inside, tensors are time-major with the channels last, (T, B, N, E): every broadcast then runs along a long contiguous
axis, where a trailing axis of N = 16 would cost several times as much.

Legend: B batch, T tokens, E channels (the inner width), N state size per channel, L tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Elements of one chunk's buffer (float32: 512 KiB): three of them stay in the second-level cache of one core.
_CHUNK_ELEMENTS = 131_072
_CHUNK_MIN, _CHUNK_MAX = 16, 64


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None = None,
    *,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, E) and the state after the last token (B, E, N); differentiable in every tensor argument.

    u, delta (B, T, E); A (E, N); B, C (B, T, N); D (E); state (B, E, N) or None for zeros. Half precision is computed
    in float32, inside autocast too. ``chunk`` is the number of tokens per chunk, 0 for a choice by size.
    """
    given = (u, delta, A, B, C, D) if state is None else (u, delta, A, B, C, D, state)
    wide = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
    tensors = [x.to(wide) for x in given]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    batch, length, channels = u.shape
    if not chunk:
        step = batch * channels * A.shape[1]
        chunk = min(max(_CHUNK_ELEMENTS // step, _CHUNK_MIN), _CHUNK_MAX)
    first = tensors[6] if state is not None else None
    y, last = _Scan.apply(*tensors[:6], first, min(chunk, length), keep)  # type: ignore[no-untyped-call]
    return y, last


def selective_scan_step(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: u, delta (B, E); B, C (B, N); state (B, E, N) → outputs (B, E) and the new state, in its dtype."""
    u, delta, A, B, C, D = (x.to(state.dtype) for x in (u, delta, A, B, C, D))
    drive = (delta * u).unsqueeze(2) * B.unsqueeze(1)  # (B, E, N)
    state = torch.addcmul(drive, torch.exp(delta.unsqueeze(2) * A), state)
    return torch.addcmul((state * C.unsqueeze(1)).sum(2), u, D), state


class _Scan(torch.autograd.Function):
    """The scan with its gradient: G_t = ∂loss/∂h_t runs backwards by G_t = dy_t C_t + exp(Δ_{t+1} A) G_{t+1}."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        state: Tensor | None,
        chunk: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(u.device.type, enabled=False):
            piece = _Pieces(u, delta, A, B, C, chunk)
            length, batch, channels = piece.delta.shape
            h = u.new_zeros(batch, A.shape[1], channels) if state is None else state.transpose(1, 2).contiguous()
            edges = [h] if keep else []
            y = u.new_empty(length, batch, channels)
            for part in piece.parts():
                _, states = piece.states(part, h)
                torch.bmm(_rows(piece.C[part]), states[1:].flatten(0, 1), out=_rows(y[part]))
                # a copy: the buffer is overwritten by the next chunk
                h = states[-1].clone()  # (B, N, E)
                if keep:
                    edges.append(h)
            y = y.transpose(0, 1).contiguous().addcmul_(u, D)  # (B, T, E)
            if keep:
                ctx.save_for_backward(u, delta, A, B, C, D, *edges[:-1])
                ctx.chunk, ctx.has_state = chunk, state is not None
            return y, h.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, *edges = ctx.saved_tensors
        with torch.autocast(u.device.type, enabled=False):
            piece = _Pieces(u, delta, A, B, C, ctx.chunk)
            dyt = dy.transpose(0, 1).contiguous()  # (T, B, E)
            carry = dlast.transpose(1, 2)  # (B, N, E), what flows into the last state of a chunk from after it
            grad, work = torch.empty_like(piece.decay), torch.empty_like(piece.decay)
            gs = grad.unbind(0)
            dA, dB, dC = torch.zeros_like(piece.A), torch.empty_like(piece.B), torch.empty_like(piece.C)
            dx, dexp = torch.empty_like(dyt), torch.empty_like(dyt)
            for part, edge in reversed(list(zip(piece.parts(), edges, strict=True))):
                n = part.stop - part.start
                a, states = piece.states(part, edge)
                g, w = grad[:n], work[:n]
                torch.mul(dyt[part].unsqueeze(2), piece.C[part].unsqueeze(3), out=g)  # (L, B, N, E)
                later = gs[n - 1].add_(carry)
                for t in range(n - 2, -1, -1):
                    later = gs[t].addcmul_(piece.decays[t + 1], later)
                carry = piece.decays[0] * later
                torch.bmm(_rows(dyt[part]), states[1:].flatten(0, 1).mT, out=_rows(dC[part]))
                torch.bmm(_rows(piece.x[part]), g.flatten(0, 1).mT, out=_rows(dB[part]))
                torch.bmm(_rows(piece.B[part]), g.flatten(0, 1), out=_rows(dx[part]))
                a.mul_(g).mul_(states[:-1])  # now ∂loss/∂(Δ_t A)
                torch.sum(torch.mul(a, piece.A, out=w), 2, out=dexp[part])
                dA += a.mul_(piece.delta[part].unsqueeze(2)).sum((0, 1))
            dxb = dx.transpose(0, 1)  # (B, T, E)
            du = (dxb * delta).addcmul_(dy, D)
            ddelta = torch.addcmul(dexp.transpose(0, 1), dxb, u)
            dstate = carry.transpose(1, 2) if ctx.has_state else None
            dD = (dy * u).sum((0, 1))
        return du, ddelta, dA.t(), dB.transpose(0, 1), dC.transpose(0, 1), dD, dstate, None, None


class _Pieces:
    """The scan's inputs, time-major, and two buffers in which the states of one chunk at a time are computed."""

    def __init__(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> None:
        self.delta = delta.transpose(0, 1).contiguous()  # (T, B, E)
        self.x = torch.mul(u.transpose(0, 1), self.delta, out=torch.empty_like(self.delta))  # (T, B, E)
        self.A = A.t().contiguous()  # (N, E)
        self.B = B.transpose(0, 1).contiguous()  # (T, B, N)
        self.C = C.transpose(0, 1).contiguous()  # (T, B, N)
        self.chunk = chunk
        shape = (u.shape[0], A.shape[1], u.shape[2])
        self.decay = u.new_empty(chunk, *shape)  # (L, B, N, E)
        self.h = u.new_empty(chunk + 1, *shape)  # (L + 1, B, N, E), from the state before the chunk on
        # one view per token, made once: a view costs half as much as the step that uses it
        self.decays, self.steps = self.decay.unbind(0), self.h.unbind(0)

    def parts(self) -> Iterator[slice]:
        length = self.delta.shape[0]
        for start in range(0, length, self.chunk):
            yield slice(start, min(start + self.chunk, length))

    def states(self, part: slice, before: Tensor) -> tuple[Tensor, Tensor]:
        """exp(Δ_t A) (L, B, N, E) and the states (L + 1, B, N, E) of one chunk; both live in the buffers."""
        n = part.stop - part.start
        a, h = self.decay[:n], self.h[: n + 1]
        torch.mul(self.delta[part].unsqueeze(2), self.A, out=a).exp_()
        torch.mul(self.x[part].unsqueeze(2), self.B[part].unsqueeze(3), out=h[1:])
        last = self.steps[0].copy_(before)
        for t in range(n):
            last = self.steps[t + 1].addcmul_(self.decays[t], last)
        return a, h


def _rows(x: Tensor) -> Tensor:
    """(L, B, X) → (L·B, 1, X): one row vector per token and stream, for products with its states (N, E)."""
    return x.view(-1, 1, x.shape[2])
