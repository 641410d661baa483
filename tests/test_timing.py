"""Do stamps, windows and the end of a warm-up say what happened, on clocks whose truth is known?"""

from __future__ import annotations

import ast
import gc
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from false_clock import FalseClock

from bdh_bench.measure import timing
from bdh_bench.measure.clock import Clocks, usage
from bdh_bench.measure.timing import Budget, Window

_PACKAGE = Path(__file__).parent.parent / "bdh_bench"


def _budget(**changes: float) -> Budget:
    return Budget(**{**timing.BUDGETS["full"].__dict__, **changes})  # type: ignore[arg-type]


def test_every_part_has_its_stamp_and_what_comes_before_has_none() -> None:
    clock = FalseClock()
    parts = (lambda: clock.work(0.003), lambda: clock.work(0.001))
    window = timing.timed(parts, 4, clock.clocks(), before=lambda: clock.work(0.5))
    assert window.stamps.shape == (4, 3)
    assert window.each_s(1) == pytest.approx([0.003] * 4)
    assert window.each_s() == pytest.approx([0.004] * 4)
    assert window.span_ns == round(4 * 0.504e9)
    assert (window.calls, window.used.thread_ns) == (4, window.span_ns)


def test_a_block_is_one_sample_of_many_calls() -> None:
    clock, calls = FalseClock(), count()
    window = timing.timed((lambda: clock.work(next(calls) * 0 + 2e-6),), 3, clock.clocks(), block=50)
    assert (len(window.stamps), window.calls, next(calls)) == (3, 150, 150)
    assert window.each_s() == pytest.approx([2e-6] * 3)
    assert window.wall_s / window.calls == pytest.approx(2e-6)


def test_the_device_has_settled_at_every_stamp() -> None:
    """Work that is only queued would be a lie of a fifth of its time."""
    clock, queued = FalseClock(), [0.0]

    def settle() -> None:
        clock.work(queued[0])
        queued[0] = 0.0

    def launch() -> None:
        clock.work(0.001)
        queued[0] += 0.004

    clocks = Clocks(clock.look, clock.clocks().usage, settle)
    assert timing.timed((launch,), 5, clocks).each_s() == pytest.approx([0.005] * 5)
    assert timing.timed((launch,), 5, clock.clocks()).each_s() == pytest.approx([0.001] * 5)  # without settling


def _slow_at_first(clock: FalseClock, slow: int) -> Callable[[], Window]:
    calls = count()

    def take() -> Window:
        return timing.timed((lambda: clock.work(0.1 if next(calls) < slow else 0.01),), 10, clock.clocks())

    return take


def test_slow_first_calls_are_in_the_warm_up_and_not_in_the_samples() -> None:
    clock = FalseClock()
    take = _slow_at_first(clock, 25)
    warm, steady = timing.warm_up(take, _budget(), clock.clocks())
    measured = timing.measure(take, _budget(), clock.clocks(), windows=5)
    assert steady
    assert sum(int((w.each_s() > 0.05).sum()) for w in warm) == 25
    assert all((w.each_s() < 0.02).all() for w in measured)
    # the planted bug: warm-up by count, as if one window were enough
    unwarmed = timing.measure(_slow_at_first(clock, 25), _budget(), clock.clocks(), windows=5)
    assert any((w.each_s() > 0.05).any() for w in unwarmed)


def test_a_warm_up_that_never_agrees_ends_unsteady_after_its_time() -> None:
    clock, turn = FalseClock(), count()
    take = lambda: timing.timed((lambda: clock.work(1.0 if next(turn) % 2 else 1.03),), 1, clock.clocks())  # noqa: E731
    warm, steady = timing.warm_up(take, _budget(), clock.clocks())
    assert not steady
    assert 60 <= sum(w.span_ns for w in warm) * 1e-9 <= 62


@pytest.mark.parametrize(("least_s", "calls", "expected"), [(3.0, 5, 30), (0.0, 5, 5), (0.0, 50, 50), (0.0, 1, 3)])
def test_a_warm_up_lasts_so_long_and_so_many_calls(least_s: float, calls: int, expected: int) -> None:
    clock = FalseClock()
    take = lambda: timing.timed((lambda: clock.work(0.1),), 1, clock.clocks())  # noqa: E731
    warm, steady = timing.warm_up(take, _budget(warm_up_s=least_s, warm_up_calls=calls), clock.clocks())
    assert steady
    assert len(warm) == expected


@pytest.mark.parametrize(
    ("call_s", "windows", "calls", "expected"),
    [(0.1, 5, 1, 50), (2.0, 5, 1, 5), (2.0, 1, 20, 20), (30.0, 5, 20, 4), (500.0, 5, 20, 1)],
)
def test_measuring_ends_when_there_is_enough_or_the_budget_is_spent(
    call_s: float, windows: int, calls: int, expected: int
) -> None:
    clock = FalseClock()
    take = lambda: timing.timed((lambda: clock.work(call_s),), 1, clock.clocks())  # noqa: E731
    assert len(timing.measure(take, _budget(), clock.clocks(), windows, calls)) == expected


def _window(clock: FalseClock, *events: Callable[[], Any]) -> Window:
    turn = iter(events)
    return timing.timed((lambda: next(turn)(),), len(events), clock.clocks())


def test_a_window_that_lost_its_core_is_noisy_and_one_that_waits_is_not() -> None:
    clock = FalseClock()
    work = lambda: clock.work(0.01)  # noqa: E731
    assert timing.noisy(_window(clock, work, work)) == ""
    assert timing.noisy(_window(clock, work, lambda: clock.lose(0.0005, involuntary=2))) == ""
    assert "processor time" in timing.noisy(_window(clock, work, lambda: clock.lose(0.005, involuntary=1)))
    assert "processor time" in timing.noisy(_window(clock, work, lambda: clock.lose(0.005)))  # another machine had it
    assert "3 times" in timing.noisy(_window(clock, work, lambda: clock.lose(0.0, involuntary=3)))
    waiting = lambda: clock.lose(0.01, voluntary=1)  # noqa: E731
    assert timing.noisy(_window(clock, waiting, waiting)) == ""


@pytest.mark.parametrize(
    ("call_s", "calls", "block"),
    [(1e-3, 64, 1), (25e-6, 64, 1), (24e-6, 64, 8), (2e-6, 64, 64), (0.0, 64, 64), (1e-5, 7, 7)],
)
def test_short_calls_are_timed_in_blocks_that_divide_the_window(call_s: float, calls: int, block: int) -> None:
    assert timing.block_length(call_s, calls) == block


@pytest.mark.parametrize(
    ("reading_ns", "call_s", "too_much"), [(100, 1e-3, False), (6_000, 1e-3, True), (6_000, 5e-4, False)]
)
def test_a_harness_that_is_a_part_of_what_it_measures_is_told(reading_ns: int, call_s: float, too_much: bool) -> None:
    """Two looks per call; the time of a look is known here, and calls under a millisecond are not judged."""
    clock = FalseClock(reading_ns)
    cost = timing.overhead_s(clock.clocks())
    assert cost == pytest.approx(2 * reading_ns * 1e-9, rel=0.01)
    windows = [timing.timed((lambda: clock.work(call_s),), 10, clock.clocks()) for _ in range(3)]
    assert timing.overhead_share(windows, cost) == pytest.approx(
        2 * reading_ns * 1e-9 / (call_s + reading_ns * 1e-9), rel=0.01
    )
    assert timing.overheavy(windows, cost) == too_much


def test_stamps_of_this_machine_take_less_than_a_hundredth_of_a_millisecond() -> None:
    assert timing.overhead_s(Clocks()) < timing.OVERHEAD_LIMIT * timing.OVERHEAD_FROM_S


def test_no_garbage_is_collected_while_timing_and_it_is_afterwards() -> None:
    assert gc.isenabled()
    with timing.quiet():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    with pytest.raises(ZeroDivisionError), timing.quiet():
        _ = 1 // 0
    assert gc.isenabled()


def test_raw_stamps_are_stored_by_window() -> None:
    clock = FalseClock()
    windows = [_window(clock, lambda: clock.work(0.01), lambda: clock.lose(0.02, involuntary=4)) for _ in range(3)]
    stored = timing.arrays(windows, "warm_up_")
    assert stored["warm_up_stamps_ns"].shape == (3, 2, 2)
    assert (np.diff(stored["warm_up_stamps_ns"], axis=2)[..., 0] == [10_000_000, 20_000_000]).all()
    assert stored["warm_up_involuntary"].tolist() == [4, 4, 4]


def test_usage_counts_this_thread() -> None:
    before = usage()
    total = sum(i * i for i in range(300_000))
    used = usage().since(before)
    assert total > 0
    assert used.process_ns >= 0.99 * used.thread_ns > 0  # read one after the other
    assert min(used.involuntary, used.voluntary) >= 0


def test_clocks_are_read_in_one_place() -> None:
    """The heartbeat of the progress display measures nothing, the selftest examines the clocks; everybody else asks ``measure``."""
    clocks = {
        "perf_counter",
        "perf_counter_ns",
        "monotonic",
        "monotonic_ns",
        "time",
        "time_ns",
        "process_time",
        "thread_time",
    }
    for path in _PACKAGE.rglob("*.py"):
        if path.parent.name in ("measure", "selftest") or path.name == "progress.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
                assert node.attr not in clocks, f"{path.name} reads a clock"
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                assert not clocks & {alias.name for alias in node.names}, f"{path.name} reads a clock"
