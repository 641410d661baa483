"""Is the chunked form the recurrence it stands for: outputs, last state, every gradient, every cut, both precisions?"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bdh_bench.kernels import ssd as kernel
from bdh_bench.kernels.ssd import ssd, ssd_step

NAMES = ("x", "delta", "A", "B", "C", "D", "state")


def inputs(
    batch: int, length: int, heads: int, width: int, groups: int, size: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, delta = normal(batch, length, heads, width), normal(batch, length, heads).abs() * 0.3
    A, D = -normal(heads).exp(), normal(heads)
    B, C = normal(batch, length, groups, size), normal(batch, length, groups, size)
    return [t.to(dtype).requires_grad_() for t in (x, delta, A, B, C, D, normal(batch, heads, width, size))]


def slow(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as written, token by token; its gradients are autograd's."""
    rows = []
    group = [head * B.shape[2] // x.shape[2] for head in range(x.shape[2])]
    for t in range(x.shape[1]):
        step = delta[:, t, :, None, None]  # (B, H, 1, 1)
        h = torch.exp(step * A[:, None, None]) * h + step * x[:, t, :, :, None] * B[:, t, group, None]  # (B, H, P, N)
        rows.append((h * C[:, t, group, None]).sum(3) + D[:, None] * x[:, t])
    return torch.stack(rows, 1), h


def gradients(outputs: tuple[Tensor, Tensor], given: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a loss in which the outputs and the last state both count, each element with its own weight."""
    weights = [torch.linspace(-1, 1, t.numel(), dtype=torch.float64).view_as(t) for t in outputs]
    loss = sum((t.double() * w).sum() for t, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, given)


def compare(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], near: float) -> None:
    for t, truth in zip(got, wanted, strict=True):
        scale = truth.abs().max()
        torch.testing.assert_close(t.double() / scale, truth / scale, rtol=near, atol=near)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (16, 16), (65, 16), (65, 64), (130, 64), (33, 1), (7, 64)])
def test_outputs_and_gradients_are_those_of_the_recurrence(length: int, chunk: int, groups: int) -> None:
    exact = inputs(2, length, 4, 3, groups, 5)
    truth = slow(*exact)
    wanted = gradients(truth, exact)
    for dtype, near in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        given = [t.detach().to(dtype).requires_grad_() for t in exact]
        got = ssd(*given, chunk=chunk)
        compare((*got, *gradients(got, given)), (*truth, *wanted), near)


def test_parts_that_do_not_fit_at_once_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(2, 90, 4, 3, 2, 5)
    truth = slow(*given)
    monkeypatch.setattr(kernel, "_PIECE_ELEMENTS", 2 * 4 * 8 * 8 * 3)  # three chunks of 8 at once
    got = ssd(*given, chunk=8)
    compare((*got, *gradients(got, given)), (*truth, *gradients(truth, given)), 1e-10)


@pytest.mark.parametrize(("tokens", "chunk", "together"), [(1, 64, 4), (64, 64, 1), (200, 64, 2), (200, 8, 100)])
def test_parts_cover_the_text_once(tokens: int, chunk: int, together: int) -> None:
    parts = list(kernel._parts(tokens, chunk, together))
    assert (parts[0].where.start, parts[-1].where.stop) == (0, tokens)
    assert all(a.where.stop == b.where.start for a, b in pairwise(parts))
    for part in parts:
        assert part.length <= chunk
        assert (part.where.stop - part.where.start) % part.length == 0


@pytest.mark.parametrize("chunk", [2, 5])
def test_gradcheck(chunk: int) -> None:
    assert torch.autograd.gradcheck(lambda *t: ssd(*t, chunk=chunk), inputs(1, 5, 2, 2, 1, 2))
    assert torch.autograd.gradcheck(lambda *t: ssd(*t, chunk=chunk), inputs(1, 5, 2, 2, 2, 2)[:6])


@pytest.mark.parametrize("needed", NAMES)
def test_gradient_where_only_one_input_needs_it(needed: str) -> None:
    given = [t.detach().requires_grad_(n == needed) for n, t in zip(NAMES, inputs(1, 9, 2, 3, 1, 2), strict=True)]
    one = [given[NAMES.index(needed)]]
    compare(gradients(ssd(*given, chunk=4), one), gradients(slow(*given), one), 1e-10)


def test_without_a_state_it_starts_from_zeros() -> None:
    given = inputs(2, 20, 2, 3, 1, 2)
    zeros = [*given[:6], torch.zeros_like(given[6])]
    fresh, truth = ssd(*given[:6], chunk=8), slow(*zeros)
    compare((*fresh, *gradients(fresh, given[:6])), (*truth, *gradients(truth, given[:6])), 1e-10)


def test_uneven_cuts_and_single_steps_give_the_same_stream_and_gradients() -> None:
    given = inputs(2, 70, 4, 3, 2, 5)
    x, delta, A, B, C, D, h = given
    rows, start = [], 0
    for cut in (1, 7, 1, 16, 45):
        part = slice(start, start + cut)
        if cut == 1:
            y, h = ssd_step(x[:, start], delta[:, start], A, B[:, start], C[:, start], D, h)
            rows.append(y.unsqueeze(1))
        else:
            y, h = ssd(x[:, part], delta[:, part], A, B[:, part], C[:, part], D, h, chunk=8)
            rows.append(y)
        start += cut
    got, truth = (torch.cat(rows, 1), h), slow(*given)
    compare((*got, *gradients(got, given)), (*truth, *gradients(truth, given)), 1e-10)


def test_strong_decay_neither_overflows_nor_loses_the_gradient() -> None:
    given = inputs(1, 130, 2, 3, 1, 2)
    with torch.no_grad():
        given[1].mul_(20)  # Δ A sums to hundreds within a chunk, exp of which is no float32
    truth = slow(*given)
    single = [t.detach().float().requires_grad_() for t in given]
    got = ssd(*single)
    compare((*got, *gradients(got, single)), (*truth, *gradients(truth, given)), 1e-3)


def test_autocast_rounds_the_products_and_not_the_state() -> None:
    exact = inputs(2, 150, 4, 8, 2, 16)
    truth = slow(*exact)
    given = [t.detach().float().requires_grad_() for t in exact]
    with torch.autocast("cpu", torch.bfloat16):
        got = ssd(*given)
        found = gradients(got, given)  # backward inside autocast as well
    assert got[0].dtype == got[1].dtype == torch.float32
    for name, t, wanted in zip(("y", "h", *NAMES), (*got, *found), (*truth, *gradients(truth, exact)), strict=True):
        error = float(((t.double() - wanted).norm() / wanted.norm()).detach())
        assert 1e-6 < error < 1e-2 or name == "D", f"{name}: {error}"  # rounded, and no more than rounded


def test_half_precision_inputs_are_widened() -> None:
    given = inputs(2, 33, 2, 3, 1, 4, torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in given]
    got, truth = ssd(*given), ssd(*wide)
    for t, wanted in zip(got, truth, strict=True):
        torch.testing.assert_close(t, wanted, rtol=0, atol=0)
    for t, wanted in zip(gradients(got, given), gradients(truth, wide), strict=True):
        torch.testing.assert_close(t, wanted.bfloat16(), rtol=0, atol=0)


def test_saved_for_backward_is_one_state_per_chunk_and_nothing_without_grad() -> None:
    given = inputs(2, 64, 2, 3, 1, 4, torch.float32)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ssd(*given, chunk=16)
    assert sum(t.numel() for t in saved) == sum(t.numel() for t in given[:6]) + 4 * given[6].numel()
    with torch.no_grad():
        y, state = ssd(*given, chunk=16)
    assert y.grad_fn is None
    assert state.untyped_storage().nbytes() == state.numel() * 4


def test_incoming_state_is_never_changed() -> None:
    given = [t.detach() for t in inputs(2, 20, 2, 3, 1, 2)]
    before = given[6].clone()
    ssd(*given, chunk=8)
    ssd_step(*(given[i][:, 0] if i in (0, 1, 3, 4) else given[i] for i in range(7)))
    assert torch.equal(given[6], before)
