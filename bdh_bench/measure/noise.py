"""How steady is this machine at this moment? Two things of known length, repeated for two seconds: a fixed piece of arithmetic and a sleep.

Each is timed some hundred times, in turn. Three numbers per kind say what a timing taken now would suffer from:

    spread         (third − first quartile) / median: how far apart two equal timings usually are
    interrupted    share of repeats that took over one and a half times the median: another process had the core
    median_s       of one repeat

The grade is the worst of all: quiet, where a difference of 2 % can be seen; usable, where 10 % can; noisy, where medians of many rounds are
needed for less. It holds for the moment it was taken, no longer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bdh_bench.measure.clock import now_s

SLEEP_S = 0.001
#: Grade → the most that spread and interrupted may be; what is worse is noisy.
BOUNDS = {"quiet": 0.02, "usable": 0.10}
NOISY = "noisy"

_SIDE = 64  # of the square matrices: small enough for one core and its nearest cache
_PRODUCTS = 200  # in one repeat: about a millisecond


@dataclass(frozen=True)
class Steadiness:
    """What the repeats of one kind say."""

    median_s: float
    spread: float
    interrupted: float
    repeats: int

    @property
    def grade(self) -> str:
        worst = max(self.spread, self.interrupted)
        return next((name for name, bound in BOUNDS.items() if worst <= bound), NOISY)


@dataclass(frozen=True)
class Noise:
    """Of arithmetic and of sleeping, and the worse grade of both."""

    arithmetic: Steadiness
    sleep: Steadiness

    @property
    def grade(self) -> str:
        grades = (*BOUNDS, NOISY)
        return max((self.arithmetic.grade, self.sleep.grade), key=grades.index)

    def as_json(self) -> dict[str, Any]:
        return {"grade": self.grade, "arithmetic": asdict(self.arithmetic), "sleep": asdict(self.sleep)}


def steadiness(seconds: Sequence[float]) -> Steadiness:
    """Raises ValueError for fewer than four repeats: they have no quartiles."""
    if len(seconds) < 4:
        raise ValueError(f"got {len(seconds)} repeats · expected at least 4")
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    slow = sum(s > 1.5 * median for s in seconds)
    return Steadiness(median, (third - first) / median, slow / len(seconds), len(seconds))


def measure_noise(duration_s: float = 2.0, clock: Callable[[], float] = now_s) -> Noise:
    """Take both kinds in turn for ``duration_s``, after a first repeat of each that is not counted."""
    arithmetic = _arithmetic()
    kinds: tuple[tuple[Callable[[], object], list[float]], ...] = (
        (arithmetic, []),
        (lambda: time.sleep(SLEEP_S), []),
    )
    for action, _ in kinds:
        action()
    end = clock() + duration_s
    while clock() < end or len(kinds[0][1]) < 4:
        for action, taken in kinds:
            started = clock()
            action()
            taken.append(clock() - started)
    return Noise(*(steadiness(taken) for _, taken in kinds))


def _arithmetic() -> Callable[[], object]:
    import numpy as np

    matrix = np.full((_SIDE, _SIDE), 1.0 / _SIDE, dtype=np.float32)  # its powers stay as they are: no overflow
    out = np.empty_like(matrix)

    def work() -> object:
        for _ in range(_PRODUCTS):
            np.matmul(matrix, matrix, out=out)
        return out

    return work
