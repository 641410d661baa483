"""How fast can plain torch run Mamba-2's recurrence, forward and backward? As products of matrices, chunk by chunk.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ        y_t = h_t C_t + D x_t        one A, Δ and D per head

Source: Dao & Gu, "Transformers are SSMs" (2024), sections 6 and 7 (the SSD algorithm). With s_t the sum of Δ A from the start
of a chunk to t, a chunk that starts with state h₀ is

    y = (C Bᵀ ⊙ exp(s_t − s_r)_{r ≤ t}) (Δ x) + exp(s_t) C h₀ᵀ        h = exp(s_L) h₀ + Σ_r exp(s_L − s_r) (Δ_r x_r) B_rᵀ

Many chunks are computed at once; only their states run in order. Heads of one group share B and C, so that products with the
state are one product per group. The backward pass is written out: it keeps the inputs and the state at the head of each chunk and
recomputes all else. The gradient of s needs no subtraction of large sums: from a state or to a state it is accumulated in the
direction in which the terms add up, and within a chunk it is a difference of row and column sums of one matrix.

Precision: sums of Δ A, decays and states are float32 or wider. The operands of the products are bfloat16 under autocast
(what a chunk adds to a state is then rounded once to bfloat16, the state is not), else float32 or wider.

Legend: B batch, T tokens, H heads, P channels of a head, G groups, K heads of a group, N state size, L tokens of a chunk,
Z chunks at once (of all rows of the batch).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Tokens of a chunk: in-chunk work grows with it, work on states shrinks.
_CHUNK = 64
#: Elements of the decays (Z, H, L, L) computed at once (float32: 4 MiB).
_PIECE_ELEMENTS = 1 << 20


def ssd(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None = None,
    *,
    chunk: int = _CHUNK,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, T, H, P) and the state after the last token (B, H, P, N), float32 or wider; differentiable in every tensor.

    x (B, T, H, P); delta (B, T, H); A, D (H); B, C (B, T, G, N), G a divisor of H; state (B, H, P, N) or None for zeros.
    """
    given = (x, delta, A, B, C, D) if state is None else (x, delta, A, B, C, D, state)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
    kind = x.device.type
    products = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and wide == torch.float32 else wide
    tensors = [t.to(wide) for t in given]
    first = tensors[6] if state is not None else None
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    y, last = _SSD.apply(*tensors[:6], first, chunk, products, keep)  # type: ignore[no-untyped-call]
    return y, last


def ssd_step(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: x (B, H, P), delta (B, H), B and C (B, G, N), state (B, H, P, N) → outputs (B, H, P) and the new state."""
    x, delta, A, B, C, D = (t.to(state.dtype) for t in (x, delta, A, B, C, D))
    heads, groups = x.shape[1], B.shape[1]
    B, C = (t.repeat_interleave(heads // groups, 1) for t in (B, C))  # (B, H, N)
    fade, fed = torch.exp(delta * A)[..., None, None], x * delta.unsqueeze(2)
    state = torch.addcmul(fed.unsqueeze(3) * B.unsqueeze(2), fade, state)
    return torch.addcmul((state @ C.unsqueeze(3)).squeeze(3), x, D.unsqueeze(1)), state


class _Part(NamedTuple):
    """Consecutive chunks of equal length: tokens ``where`` of the text, ``length`` tokens in each chunk."""

    where: slice
    length: int


def _parts(tokens: int, chunk: int, together: int) -> Iterator[_Part]:
    """All whole chunks, at most ``together`` in a part, then the rest of the text as one short chunk."""
    whole = tokens // chunk * chunk
    for start in range(0, whole, together * chunk):
        yield _Part(slice(start, min(start + together * chunk, whole)), chunk)
    if whole < tokens:
        yield _Part(slice(whole, tokens), tokens - whole)


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        state: Tensor | None,
        chunk: int,
        products: torch.dtype,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, tokens, heads, width = x.shape
        together = max(1, _PIECE_ELEMENTS // (batch * heads * chunk * chunk))
        parts = list(_parts(tokens, chunk, together))
        h = x.new_zeros(batch, heads, width, B.shape[3]) if state is None else state
        y = x * D.unsqueeze(1)
        edges = []
        with torch.autocast(x.device.type, enabled=False):
            for part in parts:
                piece = _Piece(x, delta, A, B, C, part, products)
                edge, h = piece.states(h)
                y[:, part.where] += piece.outputs(edge).reshape(batch, -1, heads, width)
                edges.append(edge)
        if keep:
            ctx.save_for_backward(x, delta, A, B, C, D, *edges)
            ctx.parts, ctx.products, ctx.has_state = parts, products, state is not None
        return y, h.clone() if h is state else h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, A, B, C, D, *edges = ctx.saved_tensors
        dx, ddelta = dy * D.unsqueeze(1), torch.empty_like(delta)
        dA, dB, dC = torch.zeros_like(A), torch.empty_like(B), torch.empty_like(C)
        carry = dlast
        with torch.autocast(x.device.type, enabled=False):
            for part, edge in reversed(list(zip(ctx.parts, edges, strict=True))):
                piece = _Piece(x, delta, A, B, C, part, ctx.products)
                found, carry = piece.gradients(edge, dy[:, part.where].reshape(piece.x.shape), carry)
                at = part.where
                dx[:, at].addcmul_(found.fed.reshape(dx[:, at].shape), delta[:, at].unsqueeze(3))
                dlog = found.log.reshape(ddelta[:, at].shape)
                ddelta[:, at] = (found.fed * piece.x).sum(3).reshape(dlog.shape).addcmul_(dlog, A)
                dA += (dlog * delta[:, at]).sum((0, 1))
                dB[:, at], dC[:, at] = (t.transpose(1, 2).reshape(dB[:, at].shape) for t in (found.B, found.C))
            dD = (dy * x).sum((0, 1, 3))
        return dx, ddelta, dA, dB, dC, dD, carry if ctx.has_state else None, None, None, None


class _Gradients(NamedTuple):
    """fed: of Δ x (Z, L, H, P); log: of Δ A (Z, L, H); B and C (Z, G, L, N)."""

    fed: Tensor
    log: Tensor
    B: Tensor
    C: Tensor


class _Piece:
    """The operands of one part, cut into chunks."""

    def __init__(
        self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, part: _Part, products: torch.dtype
    ) -> None:
        self.batch, self.groups = x.shape[0], B.shape[2]
        self.x, delta, B, C = (t[:, part.where].reshape(-1, part.length, *t.shape[2:]) for t in (x, delta, B, C))
        self.dtype = products
        self.B, self.C = (t.transpose(1, 2).to(products).contiguous() for t in (B, C))  # (Z, G, L, N)
        self.fed = self.x * delta.unsqueeze(3)  # (Z, L, H, P)
        self.heads = self._by_head(self.fed)  # (Z, H, L, P)
        log = (delta * A).cumsum(1)  # (Z, L, H)
        self.start, self.end = log.exp().unsqueeze(3), (log[:, -1:] - log).exp().unsqueeze(3)  # (Z, L, H, 1)
        self.fade = log[:, -1].exp().view(self.batch, -1, log.shape[2], 1, 1)  # (B, Z / B, H, 1, 1)
        later = torch.ones(part.length, part.length, dtype=torch.bool, device=x.device).triu_(1)
        rows = log.transpose(1, 2)  # (Z, H, L)
        gap = rows.unsqueeze(3) - rows.unsqueeze(2)
        self.decay = gap.masked_fill_(later, -torch.inf).exp_()  # (Z, H, L, L); exp of a future gap would overflow
        scores = (self.C @ self.B.mT).unsqueeze(2)  # (Z, G, 1, L, L)
        self.mixed = (self._grouped(self.decay) * scores).view(self.decay.shape)
        self.mixer = self.mixed.to(products)

    def states(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """The states before each chunk (Z, H, P, N), and the one after the last (B, H, P, N)."""
        written = self._by_group(self.fed * self.end).mT @ self.B  # (Z, G, K·P, N)
        return self._run(written, before, reverse=False)

    def outputs(self, before: Tensor) -> Tensor:
        """(Z, L, H, P), without D x."""
        inside = self.mixer @ self.heads  # (Z, H, L, P)
        return (self._by_token(self.C @ self._matrix(before).mT) * self.start).add_(inside.transpose(1, 2))

    def gradients(self, before: Tensor, dy: Tensor, carry: Tensor) -> tuple[_Gradients, Tensor]:
        """All gradients from those of the outputs and of the last state; and that of the first state."""
        dheads = self._by_head(dy)
        dmixed = (dheads @ self.heads.mT).to(self.decay.dtype)  # (Z, H, L, L)
        moved = dmixed * self.mixed
        log = (moved.sum(3) - moved.sum(2)).transpose(1, 2)  # (Z, L, H), of s
        dscores = self._grouped(dmixed.mul_(self.decay)).sum(2).to(self.dtype)  # (Z, G, L, L)
        inside = self.mixer.mT @ dheads  # (Z, H, L, P), of Δ x

        faded = dy * self.start
        read = self._by_group(faded)  # (Z, G, L, K·P)
        after, first = self._run(read.mT @ self.C, carry, reverse=True)
        old, new = self._matrix(before), self._matrix(after)  # (Z, G, K·P, N)
        log = log + (faded * self._by_token(self.C @ old.mT)).sum(3)
        dfed = self._by_token(self.B @ new.mT) * self.end  # (Z, L, H, P), through the state
        passed = (self.fed * dfed).sum(3)  # (Z, L, H): what flows from a token to the end of the chunk
        through = self.fade.view(len(before), 1, -1) * (after * before).sum((2, 3)).unsqueeze(1)
        summed = log.flip(1).cumsum(1).flip(1) + (passed.cumsum(1) - passed) + through

        dB = dscores.mT @ self.C + self._by_group(self.fed * self.end) @ new
        dC = dscores @ self.B + read @ old
        return _Gradients(dfed.add_(inside.transpose(1, 2)), summed, dB, dC), first

    def _run(self, added: Tensor, h: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        """h ← fade h + added over the chunks of a row: h before each of them (Z, H, P, N), and after the last."""
        added = added.reshape(self.batch, -1, *h.shape[1:])
        seen = h.new_empty(added.shape)
        order = range(added.shape[1])
        for i in reversed(order) if reverse else order:
            seen[:, i] = h
            h = torch.addcmul(added[:, i], self.fade[:, i], h)
        return seen.flatten(0, 1), h

    def _by_head(self, t: Tensor) -> Tensor:
        """(Z, L, H, P) → (Z, H, L, P) for a product."""
        return t.transpose(1, 2).to(self.dtype).contiguous()

    def _by_group(self, t: Tensor) -> Tensor:
        """(Z, L, H, P) → (Z, G, L, K·P) for a product."""
        return t.reshape(*t.shape[:2], self.groups, -1).transpose(1, 2).to(self.dtype).contiguous()

    def _by_token(self, t: Tensor) -> Tensor:
        """(Z, G, L, K·P) → (Z, L, H, P)."""
        return t.transpose(1, 2).reshape(self.x.shape)

    def _matrix(self, states: Tensor) -> Tensor:
        """(Z, H, P, N) → (Z, G, K·P, N) for a product."""
        return states.view(len(states), self.groups, -1, states.shape[3]).to(self.dtype)

    def _grouped(self, t: Tensor) -> Tensor:
        """(Z, H, L, L) → (Z, G, K, L, L)."""
        return t.view(len(t), self.groups, -1, *t.shape[2:])
