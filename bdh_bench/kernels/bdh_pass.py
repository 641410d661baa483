"""One pass of BDH over a piece of text, from the residual stream to the decoder, without a T×T tensor: how?

    K = select(x E)                        keys of every head, E = encoder; select = relu in the published form
    Q = R(K)                               rotary
    A = LN(strict_lower(Q Qᵀ) x + Q S)     what the memory returns; S sums Qᵀ x over all earlier tokens
    G = relu(A E_v)                        gates
    z = (K ⊙ G) D                          D = decoder, summed over heads

The text is cut into chunks of C tokens and everything above is done for one chunk after the other, so that the T×N tensors
of a chunk are still in the cache of the processor when the next operation reads them. With a decay of λ_h nats per token
(ours, not the published form) a score from s to t is multiplied by exp(−λ_h (t − s)), and S is read and written accordingly.

The backward pass is written out. It keeps K, G, A and the state at the head of each chunk, in the dtype of the products,
recomputes Q, and walks the chunks in reverse with the gradient of the state.

Heads come first in every tensor here, so that no product needs a permuted copy; neurons are in the split order of rotary.py.

Legend: B batch, T tokens, C chunk, H heads, N neurons per head, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdh_bench.kernels.rotary import Turn, rotate, rotate_back

_EPS = 1e-5


class Weights(NamedTuple):
    """encoder and encoder_v (H, D, N), decoder (H, N, D); neurons in split order."""

    encoder: Tensor
    encoder_v: Tensor
    decoder: Tensor


@dataclass(frozen=True)
class Form:
    """What is fixed over a run of passes: chunk length, and what differs from the published form.

    signed    keys without relu
    active    neurons kept per head and token, the largest ones; 0 keeps all
    decay     (H,) nats per token, or None
    dropout   share of K ⊙ G that is dropped
    carry     whether the state after the last token is wanted; without it that work is left out
    """

    chunk: int
    signed: bool = False
    active: int = 0
    decay: Tensor | None = None
    dropout: float = 0.0
    carry: bool = True


def chunk_length(width: int) -> int:
    """The default C for values of this width: D, where in-chunk work is half of the state's, within 128 and 512.

    bdh-facts §3 puts the balance of operations at 2·D; measured on a CPU, D was faster at widths of 64 to 256.
    """
    return max(128, min(512, 1 << (width - 1).bit_length()))


def bdh_pass(
    x: Tensor, weights: Weights, turn: Turn | None, state: Tensor | None, form: Form
) -> tuple[Tensor, Tensor | None]:
    """z (B, T, D) and the new state (None without ``form.carry``); differentiable in x, the weights and the state.

    x      (B, T, D)
    turn   (T, N/2) each, or None for keys that are not rotated
    state  (B, H, N, D), or None for an empty memory; never changed in place
    The state stays in its own dtype (float32 for None); products are in bfloat16 under autocast, else in the dtype of x.
    """
    cos, sin = turn if turn is not None else (None, None)
    outputs: tuple[Tensor, Tensor | None] = _Pass.apply(x, *weights, state, cos, sin, form)  # type: ignore[no-untyped-call]
    return outputs


def read_chunk(
    x: Tensor, weights: Weights, turn: Turn | None, state: Tensor, form: Form
) -> tuple[Tensor, Tensor, Tensor]:
    """z (B, C, D), keys and gates (H, B·C, N) of one chunk without gradients; the state (B, H, N, D) is updated in place."""
    dtype = _product_dtype(x)
    cast = Weights(*(w.to(dtype) for w in weights))
    with torch.autocast(x.device.type, enabled=False):
        turn = None if turn is None else turn.to(dtype)
        z, _, record = _forward(x.to(dtype), cast, turn, state.transpose(0, 1), form, _write_in_place)
    keys, gates = record[:2]
    assert keys is not None
    assert gates is not None
    return z, keys, gates


def _product_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        encoder: Tensor,
        encoder_v: Tensor,
        decoder: Tensor,
        state: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        form: Form,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = _product_dtype(x)
        weights = Weights(*(w.to(dtype) for w in (encoder, encoder_v, decoder)))
        turn = None if cos is None or sin is None else Turn(cos, sin).to(dtype)
        values, z = x.to(dtype), torch.empty(x.shape, dtype=dtype, device=x.device)
        running = None if state is None else state.transpose(0, 1)  # (H, B, N, D)
        kept: list[Tensor | None] = []
        with torch.autocast(x.device.type, enabled=False):
            for part in chunks(x.shape[1], form.chunk):
                write = attend_write if form.carry or part.stop < x.shape[1] else None
                z[:, part], running, record = _forward(
                    values[:, part], weights, turn and turn.part(part), running, form, write
                )
                if any(ctx.needs_input_grad):
                    kept.extend(record)
        ctx.save_for_backward(values, cos, sin, *weights, *kept)
        ctx.form, ctx.records = form, len(record)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, encoder, encoder_v, decoder, state)]
        ctx.set_materialize_grads(False)
        return z, None if running is None else running.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_z: Tensor | None, d_state: Tensor | None) -> tuple[Tensor | None, ...]:
        values, cos, sin, encoder, encoder_v, decoder, *kept = ctx.saved_tensors
        weights = Weights(encoder, encoder_v, decoder)
        dtype = values.dtype
        turn = None if cos is None else Turn(cos, sin).to(dtype)
        d_z = torch.zeros_like(values) if d_z is None else d_z.to(dtype)
        d_state = None if d_state is None else d_state.transpose(0, 1).clone()  # written in place below
        d_weights = [
            torch.zeros(w.shape, dtype=kind, device=w.device) for w, kind in zip(weights, ctx.dtypes[1:4], strict=True)
        ]
        d_x = torch.empty(values.shape, dtype=ctx.dtypes[0], device=values.device)
        with torch.autocast(values.device.type, enabled=False):
            for index, part in reversed(list(enumerate(chunks(values.shape[1], ctx.form.chunk)))):
                record = kept[index * ctx.records : (index + 1) * ctx.records]
                here = values[:, part], weights, turn and turn.part(part), ctx.form, record
                wanted = index > 0 or ctx.dtypes[4] is not None
                d_x[:, part], d_state = _backward(*here, d_z[:, part], d_state, wanted, d_weights)
        if ctx.dtypes[4] is None or d_state is None:
            return d_x, *d_weights, None, None, None, None
        return d_x, *d_weights, d_state.transpose(0, 1), None, None, None


def chunks(length: int, chunk: int) -> Iterator[slice]:
    """Consecutive slices of at most ``chunk`` tokens."""
    for start in range(0, length, chunk):
        yield slice(start, min(start + chunk, length))


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, C, D) → (H, B·C, D). A real copy: products of a batch with stride 0 run at half the speed on a CPU."""
    return x.reshape(1, -1, x.shape[-1]).repeat(heads, 1, 1)


_Write = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def _forward(
    x: Tensor, weights: Weights, turn: Turn | None, state: Tensor | None, form: Form, write: _Write | None
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """One chunk (B, C, D): z, the state after it (None without ``write``), and what the backward pass needs."""
    encoder, encoder_v, decoder = weights
    batch, length, width = x.shape
    heads, _, neurons = encoder.shape
    keys = select(torch.bmm(_heads(x, heads), encoder), form)  # (H, B·C, N)
    query = keys.view(heads, batch, length, neurons)
    query = rotate(query, turn) if turn is not None else query
    read, scores, before = attend(query, x, state, form.decay)  # (H, B, C, D)
    after = write(query, x, state, form.decay) if write else None
    answer, mean, rstd = torch.native_layer_norm(read, (width,), None, None, _EPS)
    gates = torch.bmm(answer.view(heads, -1, width), encoder_v).relu_()  # (H, B·C, N)
    gated, mask = keys * gates, None
    if form.dropout:
        gated, mask = torch.native_dropout(gated, form.dropout, True)
    z = torch.bmm(gated, decoder).sum(0).view(batch, length, width)
    return z, after, (keys, gates, read, mean, rstd, answer, scores, before, mask)


def _backward(
    x: Tensor,
    weights: Weights,
    turn: Turn | None,
    form: Form,
    record: list[Any],
    d_z: Tensor,
    d_state: Tensor | None,
    wanted: bool,
    d_weights: list[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """One chunk: gradients of x and, if wanted, of the state before it; those of the weights are added to ``d_weights``."""
    encoder, encoder_v, decoder = weights
    keys, gates, read, mean, rstd, answer, scores, state, mask = record
    heads, batch, length, width = read.shape
    wide = _heads(d_z, heads)
    d_gated = torch.bmm(wide, decoder.mT)  # (H, B·C, N)
    gated = keys * gates
    if mask is not None:
        gated, d_gated = gated * mask / (1 - form.dropout), d_gated * mask / (1 - form.dropout)
    d_weights[2] += torch.bmm(gated.mT, wide)
    d_gates = torch.ops.aten.threshold_backward(d_gated * keys, gates, 0)
    d_weights[1] += torch.bmm(answer.view(heads, -1, width).mT, d_gates)
    d_answer = torch.bmm(d_gates, encoder_v.mT).view(read.shape)
    d_read = torch.ops.aten.native_layer_norm_backward(
        d_answer, read, (width,), mean, rstd, None, None, (True, False, False)
    )[0]
    query = keys.view(heads, batch, length, -1)
    query = rotate(query, turn) if turn is not None else query
    d_query, d_values = attend_backward(query, x, scores, state, form.decay, d_read, d_state)
    d_state = attend_write_backward(query, form.decay, d_read, d_state) if wanted else None
    d_keys = (rotate_back(d_query, turn) if turn is not None else d_query).view(keys.shape)
    d_keys = d_keys.addcmul_(d_gated, gates)
    d_keys = d_keys * (keys != 0) if form.signed else torch.ops.aten.threshold_backward(d_keys, keys, 0)
    d_weights[0] += torch.bmm(_heads(x, heads).mT, d_keys)
    d_x = torch.bmm(d_keys, encoder.mT).sum(0).view(x.shape) + d_values
    return d_x, d_state


def select(keys: Tensor, form: Form) -> Tensor:
    """The published relu, or our variants: signed keys, and only the largest ``active`` of each head."""
    if not form.signed:
        keys = keys.relu_()
    if form.active and form.active < keys.shape[-1]:
        size = keys.abs() if form.signed else keys
        least = size.topk(form.active, -1).values[..., -1:]
        keys = keys * (size >= least)
    return keys


def attend(
    query: Tensor, values: Tensor, state: Tensor | None, decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a chunk reads: Q (H, B, C, N), V (B, C, D) and the state (H, B, N, D) before it.

    Returns the reads (H, B, C, D), the scores (H, B, C, C) of earlier tokens in the chunk, and the state in the dtype of
    the products, None where it was empty.
    """
    scores = lower(query @ query.mT, decay)
    read = scores @ values
    if state is None:
        return read, scores, None
    before = state.to(query.dtype)
    early = query if decay is None else query * _since_start(query, decay)
    return _product_sum(read, early, before), scores, before


def attend_write(query: Tensor, values: Tensor, state: Tensor | None, decay: Tensor | None) -> Tensor:
    """The state (H, B, N, D) after a chunk."""
    late = query if decay is None else query * _until_end(query, decay)
    written = late.mT @ values
    if state is None:
        return written.to(torch.promote_types(written.dtype, torch.float32))
    return ((state if decay is None else _fade(state, decay, query.shape[2])) + written).to(state.dtype)


def _write_in_place(query: Tensor, values: Tensor, state: Tensor | None, decay: Tensor | None) -> Tensor:
    """``attend_write`` into the storage of the state."""
    assert state is not None
    if decay is not None:
        state.mul_((-decay * query.shape[2]).exp().view(-1, 1, 1, 1))
        query = query * _until_end(query, decay)
    if (
        state.shape[1] == 1 and state.dtype == query.dtype
    ):  # one stream: the product is added without a copy of the state
        state.squeeze(1).baddbmm_(query.squeeze(1).mT, values.expand(len(query), -1, -1))
    else:
        state += query.mT @ values
    return state


def attend_backward(
    query: Tensor,
    values: Tensor,
    scores: Tensor,
    state: Tensor | None,
    decay: Tensor | None,
    d_read: Tensor,
    d_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of Q and V from those of the reads and of the state after the chunk (None for none).

    ``scores`` and ``state`` are what ``attend`` returned.
    """
    d_scores = lower(d_read @ values.mT, decay)
    d_query = (d_scores + d_scores.mT) @ query
    d_values = scores.mT @ d_read
    if state is not None:
        d_early = d_read if decay is None else d_read * _since_start(query, decay)
        d_query = _product_sum(d_query, d_early, state.mT)
    if d_state is not None:
        flow = d_state.to(query.dtype)
        end = 1 if decay is None else _until_end(query, decay)
        d_query = _product_sum(d_query, values.expand_as(d_read) * end, flow.mT)
        d_values = _product_sum(d_values, query if decay is None else query * end, flow)
    return d_query, d_values.sum(0)


def attend_write_backward(query: Tensor, decay: Tensor | None, d_read: Tensor, d_state: Tensor | None) -> Tensor:
    """Gradient of the state before a chunk; ``d_state``, that of the state after it, is used up."""
    d_early = d_read if decay is None else d_read * _since_start(query, decay)
    read = query.mT @ d_early
    if d_state is None:
        return read.to(torch.promote_types(read.dtype, torch.float32))
    if decay is not None:
        d_state.mul_((-decay * query.shape[2]).exp().view(-1, 1, 1, 1))
    return d_state.add_(read)


def _product_sum(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right over two leading dimensions, in the storage of ``total``."""
    flat = total.view(-1, *total.shape[2:])
    flat.baddbmm_(left.reshape(-1, *left.shape[2:]), right.reshape(-1, *right.shape[2:]))
    return total


def _fade(state: Tensor, decay: Tensor, tokens: int) -> Tensor:
    """The state (H, B, N, D) after so many tokens of decay."""
    return state * (-decay * tokens).exp().view(-1, 1, 1, 1).to(state.dtype)


def lower(scores: Tensor, decay: Tensor | None) -> Tensor:
    """Scores (H, B, C, C) of strictly earlier tokens, the others zero; multiplied by exp(−λ (t − s)) where there is decay."""
    if decay is not None:
        where = torch.arange(scores.shape[-1], device=scores.device, dtype=decay.dtype)
        age = (where.view(-1, 1) - where).clamp_(min=0)
        scores = scores * (-decay.view(-1, 1, 1, 1) * age).exp().to(scores.dtype)
    return scores.tril_(-1)


def _since_start(query: Tensor, decay: Tensor) -> Tensor:
    """exp(−λ (t + 1)) (H, 1, C, 1): how much of the state before the chunk is left when token t reads it."""
    where = torch.arange(1, query.shape[2] + 1, device=query.device, dtype=decay.dtype)
    return (-decay.view(-1, 1, 1, 1) * where.view(-1, 1)).exp().to(query.dtype)


def _until_end(query: Tensor, decay: Tensor) -> Tensor:
    """exp(−λ (C − 1 − t)) (H, 1, C, 1): how much of token t is left in the state when the chunk ends."""
    length = query.shape[2]
    where = torch.arange(length - 1, -1, -1, device=query.device, dtype=decay.dtype)
    return (-decay.view(-1, 1, 1, 1) * where.view(-1, 1)).exp().to(query.dtype)
