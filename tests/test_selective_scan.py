"""Is the fast scan the recurrence it stands for: outputs, last state, every gradient, every cut?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bdh_bench.kernels.selective_scan import selective_scan, selective_scan_step

NAMES = ("u", "delta", "A", "B", "C", "D", "state")


def inputs(batch: int, length: int, channels: int, size: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u, delta = normal(batch, length, channels), normal(batch, length, channels).abs() * 0.3
    A, D = -normal(channels, size).exp(), normal(channels)
    B, C, state = normal(batch, length, size), normal(batch, length, size), normal(batch, channels, size)
    return [x.to(dtype).requires_grad_() for x in (u, delta, A, B, C, D, state)]


def slow(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as written, token by token; its gradients are autograd's."""
    rows = []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]  # (B, E, 1)
        h = torch.exp(step * A) * h + step * B[:, t, None] * u[:, t, :, None]  # (B, E, N)
        rows.append((h * C[:, t, None]).sum(2) + D * u[:, t])
    return torch.stack(rows, 1), h


def gradients(outputs: tuple[Tensor, Tensor], given: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a loss in which the outputs and the last state both count, each element with its own weight."""
    weights = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x) for x in outputs]
    loss = sum((x.double() * w).sum() for x, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, given)


@pytest.mark.parametrize("chunk", [1, 16, 64, 0])
@pytest.mark.parametrize("length", [1, 65, 130])
def test_outputs_and_gradients_are_those_of_the_recurrence(length: int, chunk: int) -> None:
    exact = inputs(2, length, 6, 4)
    truth = slow(*exact)
    wanted = gradients(truth, exact)
    for dtype, near in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        given = [x.detach().to(dtype).requires_grad_() for x in exact]
        got = selective_scan(*given, chunk=chunk)
        for x, y in zip(got, truth, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=near, atol=near)
        for name, x, y in zip(NAMES, gradients(got, given), wanted, strict=True):
            torch.testing.assert_close(x.double() / y.abs().max(), y / y.abs().max(), rtol=near, atol=near, msg=name)


@pytest.mark.parametrize("chunk", [2, 5])
def test_gradcheck(chunk: int) -> None:
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, chunk=chunk), inputs(2, 5, 3, 2))


@pytest.mark.parametrize("needed", NAMES)
def test_gradient_where_only_one_input_needs_it(needed: str) -> None:
    given = [x.detach().requires_grad_(name == needed) for name, x in zip(NAMES, inputs(1, 9, 3, 2), strict=True)]
    one = [given[NAMES.index(needed)]]
    for got, wanted in zip(gradients(selective_scan(*given), one), gradients(slow(*given), one), strict=True):
        torch.testing.assert_close(got, wanted)


def test_without_a_state_it_starts_from_zeros() -> None:
    given = inputs(2, 20, 3, 2)
    zeros = [*given[:6], torch.zeros_like(given[6])]
    fresh = selective_scan(*given[:6])
    for got, wanted in zip(fresh, slow(*zeros), strict=True):
        torch.testing.assert_close(got, wanted)
    for got, wanted in zip(gradients(fresh, given[:6]), gradients(slow(*zeros), given[:6]), strict=True):
        torch.testing.assert_close(got, wanted)


def test_uneven_cuts_give_the_same_stream_and_gradients_through_the_state() -> None:
    given = inputs(2, 70, 5, 3)
    u, delta, A, B, C, D, h = given
    rows, start = [], 0
    for cut in (1, 7, 1, 16, 45):
        part = slice(start, start + cut)
        y, h = selective_scan(u[:, part], delta[:, part], A, B[:, part], C[:, part], D, h, chunk=4)
        rows.append(y)
        start += cut
    got, truth = (torch.cat(rows, 1), h), slow(*given)
    for x, y in zip((*got, *gradients(got, given)), (*truth, *gradients(truth, given)), strict=True):
        torch.testing.assert_close(x, y)


def test_single_steps_are_the_scan() -> None:
    u, delta, A, B, C, D, h = given = inputs(2, 12, 5, 3)
    rows = []
    for t in range(12):
        y, h = selective_scan_step(u[:, t], delta[:, t], A, B[:, t], C[:, t], D, h)
        rows.append(y)
    got, truth = (torch.stack(rows, 1), h), selective_scan(*given)
    for x, y in zip((*got, *gradients(got, given)), (*truth, *gradients(truth, given)), strict=True):
        torch.testing.assert_close(x, y)


def test_autocast_leaves_the_scan_in_float32() -> None:
    given = inputs(2, 40, 6, 4, torch.float32)
    plain = selective_scan(*given)
    with torch.autocast("cpu", torch.bfloat16):
        got = selective_scan(*given)
        found = gradients(got, given)  # backward inside autocast as well
    assert got[0].dtype == torch.float32
    for x, y in zip((*got, *found), (*plain, *gradients(plain, given)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_half_precision_inputs_are_widened() -> None:
    given = inputs(2, 33, 6, 4, torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in given]
    got, truth = selective_scan(*given), selective_scan(*wide)
    for x, y in zip(got, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    for x, y in zip(gradients(got, given), gradients(truth, wide), strict=True):
        torch.testing.assert_close(x, y.bfloat16(), rtol=0, atol=0)


def test_saved_for_backward_is_one_state_per_chunk_and_nothing_without_grad() -> None:
    given = inputs(2, 64, 5, 3, torch.float32)
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        selective_scan(*given, chunk=16)
    assert sum(x.numel() for x in saved) == sum(x.numel() for x in given[:6]) + 4 * given[6].numel()
    with torch.no_grad():
        y, state = selective_scan(*given, chunk=16)
    assert y.grad_fn is None
    assert state.untyped_storage().nbytes() == state.numel() * 4  # no chunk buffer hangs on it


def test_incoming_state_is_never_changed() -> None:
    given = [x.detach() for x in inputs(2, 20, 3, 2)]
    before = given[6].clone()
    selective_scan(*given)
    assert torch.equal(given[6], before)
