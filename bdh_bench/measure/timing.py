"""How long does a call take, again and again, and may the answer be believed?

A *sample* is one call, or a block of very short ones; a *window* is samples back to back. Around every sample there are raw stamps on a
monotonic clock, and around every window what the process used, so that a window in which something else had the core can be told:

    warm_up    windows until three in a row have medians within 2 %, for at least so long; else what follows is ``unsteady``
    measure    windows until there are enough of them, for at least so long
    noisy      why a window is not to be trusted, or ""
    overhead   what the stamps themselves cost, from windows of calls that do nothing

Nothing else runs inside a window: no garbage collector, no progress, no sampler. Medians are taken when results are read; those here only
decide when to stop warming up.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bdh_bench.measure.clock import Clocks, Usage

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Shorter calls are timed in blocks that last at least so long.
SHORTEST_CALL_S, SHORTEST_BLOCK_S = 25e-6, 100e-6
#: Most that stamps may take of a window of calls of a millisecond or more.
OVERHEAD_LIMIT, OVERHEAD_FROM_S = 0.01, 1e-3
#: A window is noisy where it lasted so many times what its thread had of the core, or its threads were put off it more often than this.
WALL_PER_CPU, SWITCHES, SWITCHES_PER_S = 1.10, 2, 20.0
_STEADY, _IN_A_ROW = 1.02, 3


@dataclass(frozen=True)
class Budget:
    """How long to warm up and to measure, at least and at most. ``warm_up_calls`` at least, too."""

    warm_up_s: float
    warm_up_calls: int
    warm_up_most_s: float
    measure_s: float
    measure_most_s: float


BUDGETS = {
    "full": Budget(3.0, 5, 60.0, 5.0, 120.0),
    "quick": Budget(0.3, 3, 3.0, 0.5, 10.0),
    "smoke": Budget(0.0, 3, 0.2, 0.02, 0.5),
}


@dataclass(frozen=True)
class Window:
    """Samples back to back. ``stamps`` (S, 1 + P): nanoseconds at the start of a sample and behind each of its P parts.

    block    calls in one sample
    span_ns  of the whole window, with what was done between samples
    used     by the process meanwhile
    """

    stamps: NDArray[np.int64]
    block: int
    span_ns: int
    used: Usage

    @property
    def calls(self) -> int:
        return len(self.stamps) * self.block

    @property
    def wall_s(self) -> float:
        """From the first stamp to the last."""
        return int(self.stamps[-1, -1] - self.stamps[0, 0]) * 1e-9

    def each_s(self, part: int = -1) -> NDArray[np.float64]:
        """Seconds of a call, by sample, from its start until behind that part."""
        return np.asarray((self.stamps[:, part] - self.stamps[:, 0]) * (1e-9 / self.block), dtype=np.float64)


def timed(
    parts: Sequence[Callable[[], object]],
    samples: int,
    clocks: Clocks,
    block: int = 1,
    before: Callable[[], object] | None = None,
) -> Window:
    """Call the parts in turn, ``samples`` × ``block`` times; the device has settled at every stamp. ``before`` is outside the stamps."""
    now, settle = clocks.now_ns, clocks.settle
    width = 1 + len(parts)
    stamps = [0] * (samples * width)  # a list: storing into it costs a fifth of storing into an array
    settle()
    used, began = clocks.usage(), now()
    at = 0
    for _ in range(samples):
        if before is not None:
            before()
            settle()
        stamps[at] = now()
        for part in parts:
            at += 1
            for _ in range(block):
                part()
            settle()
            stamps[at] = now()
        at += 1
    ended, then = now(), clocks.usage()
    return Window(np.array(stamps, dtype=np.int64).reshape(samples, width), block, ended - began, then.since(used))


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection inside; what exists already is left alone by later ones until the end."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def steady(windows: Sequence[Window]) -> bool:
    """Whether the medians of the last three windows are within 2 %."""
    medians = [float(np.median(w.each_s())) for w in windows[-_IN_A_ROW:]]
    return len(medians) == _IN_A_ROW and max(medians) <= _STEADY * min(medians)


def warm_up(take: Callable[[], Window], budget: Budget, clocks: Clocks) -> tuple[list[Window], bool]:
    """Windows until they are steady, and whether they became so in time."""
    began, windows, calls = clocks.now_ns(), list[Window](), 0
    while True:
        windows.append(take())
        calls += windows[-1].calls
        spent = (clocks.now_ns() - began) * 1e-9
        if spent >= budget.warm_up_s and calls >= budget.warm_up_calls and steady(windows):
            return windows, True
        if spent >= budget.warm_up_most_s:
            return windows, False


def measure(
    take: Callable[[], Window], budget: Budget, clocks: Clocks, windows: int = 1, calls: int = 1
) -> list[Window]:
    """At least so many windows and calls, for at least as long as the budget says; fewer where it ends before."""
    began, taken, done = clocks.now_ns(), list[Window](), 0
    while True:
        taken.append(take())
        done += taken[-1].calls
        spent = (clocks.now_ns() - began) * 1e-9
        enough = len(taken) >= windows and done >= calls and spent >= budget.measure_s
        if enough or spent >= budget.measure_most_s:
            return taken


def noisy(window: Window) -> str:
    """Why this window is not to be trusted, or "".

    A thread that gives its core up of its own accord at every sample waits for something: its wall time says nothing about others.
    """
    span, used = window.span_ns * 1e-9, window.used
    if used.involuntary > max(SWITCHES, SWITCHES_PER_S * span):
        return f"put off its core {used.involuntary} times in {span:.3g} s"
    if used.voluntary < len(window.stamps) and window.span_ns > WALL_PER_CPU * used.thread_ns:
        return f"{span:.3g} s passed in {used.thread_ns * 1e-9:.3g} s of processor time"
    return ""


def block_length(call_s: float, calls: int) -> int:
    """How many of ``calls`` make a sample: one, or as many very short ones as last a tenth of a millisecond; it divides ``calls``."""
    if call_s >= SHORTEST_CALL_S:
        return 1
    wanted = min(calls, math.ceil(SHORTEST_BLOCK_S / max(call_s, 1e-9)))
    return next(length for length in range(wanted, calls + 1) if calls % length == 0)


def overhead_s(clocks: Clocks, parts: int = 1) -> float:
    """What the harness adds to a sample: the shortest of five windows of calls that do nothing."""
    nothing = [lambda: None] * parts
    return min(window.wall_s / 200 for window in (timed(nothing, 200, clocks) for _ in range(5)))


def overhead_share(windows: Sequence[Window], cost_s: float) -> float:
    """Share of the time of these windows that went into stamping them."""
    samples = sum(len(w.stamps) for w in windows)
    return samples * cost_s / max(sum(float(w.each_s().sum()) * w.block for w in windows), 1e-12)


def overheavy(windows: Sequence[Window], cost_s: float) -> bool:
    """Whether stamps took 1 % or more of calls of a millisecond or more: then something is wrong with the clock or the harness."""
    calls = sum(w.calls for w in windows)
    long = sum(float(w.each_s().sum()) * w.block for w in windows) >= OVERHEAD_FROM_S * calls
    return long and overhead_share(windows, cost_s) >= OVERHEAD_LIMIT


def arrays(windows: Sequence[Window], prefix: str = "") -> dict[str, NDArray[np.int64]]:
    """The raw stamps (W, S, 1 + P) and what was used, by window, to be stored."""
    used = np.array([w.used for w in windows], dtype=np.int64).reshape(-1, len(Usage._fields))
    return {
        f"{prefix}stamps_ns": np.stack([w.stamps for w in windows]),
        f"{prefix}span_ns": np.array([w.span_ns for w in windows], dtype=np.int64),
        f"{prefix}block": np.array(windows[0].block),
        **{f"{prefix}{name}": used[:, i] for i, name in enumerate(Usage._fields)},
    }
