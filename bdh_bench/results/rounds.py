"""How sure can one be of a time, and of the ratio of two? The unit is the round, one fresh process; windows and steps lie inside it.

The value of a round is the median of its windows, that of a measurement the median over its rounds. Intervals come from a hierarchical
bootstrap: rounds are drawn with replacement, then windows inside each drawn round. Quantities that are compared are drawn with the same
rounds: rounds are interleaved over models, so what a round did to all of them cancels.

* an interval from three rounds on, "few rounds" below five; a verdict from five on,
* ends of intervals are expanded percentiles (Hesterberg 2015): a bootstrap of n units is too narrow by what n − 1 and the normal hide,
* outliers (Tukey's fences over the windows) are counted and never dropped,
* the noise of a run is what an A/A comparison in it could look like: threshold of ``within noise``.

The median of W windows drawn with replacement need not be drawn window by window: it is the sorted window at the place that the median
of W uniform numbers points to, which has a Beta distribution. Cost does not grow with W, and the distribution is the same.

Legend: R resamples, N rounds, W windows, K quantities.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bdh_bench.results.resampling import RESAMPLES, SEED, Floats
from bdh_bench.results.statistics import LEVEL, median, t_quantile

#: round → the values of its windows. What names a round is the same for quantities measured side by side.
Rounds = Mapping[Any, Sequence[float]]
Verdict = Literal["faster", "slower", "within noise", "not decided"]

FEWEST_ROUNDS = 3
ROUNDS_TO_DECIDE = 5
#: The least ratio apart from 1 that is worth a word, whatever the noise.
THRESHOLD = 0.02
_ROUND_STREAM, _WINDOW_STREAM = 4, 5
_NORMAL = NormalDist()
#: Of a median of many normal values against their mean: √(π/2).
_MEDIAN_SPREAD = math.sqrt(math.pi / 2)
_MAD_TO_SIGMA = 1.4826
#: Of so many quantities intervals are made to see how wide they are.
_NEIGHBOURS = 8


@dataclass(frozen=True)
class Outliers:
    """How many values lie beyond Tukey's inner (mild) and outer (severe) fences, of ``of``."""

    mild: int
    severe: int
    of: int

    @property
    def text(self) -> str:
        found = [f"{n} {kind}" for n, kind in ((self.mild, "mild"), (self.severe, "severe")) if n]
        return f"{' and '.join(found)} outliers of {self.of} windows" if found else ""


@dataclass(frozen=True)
class Timing:
    """A median over rounds with its 95 % interval (None below three rounds)."""

    value: float
    low: float | None
    high: float | None
    rounds: int
    outliers: Outliers

    @property
    def remark(self) -> str:
        """What a reader must know about it."""
        return " · ".join(part for part in (few(self.rounds), self.outliers.text) if part)


@dataclass(frozen=True)
class Ratio:
    """Median of the first over median of the second, over the rounds that both have; ``threshold`` is what counts as noise."""

    value: float
    low: float | None
    high: float | None
    rounds: int
    threshold: float

    @property
    def verdict(self) -> Verdict:
        """On the first, for a quantity of which less is faster."""
        if self.low is None or self.high is None or self.rounds < ROUNDS_TO_DECIDE:
            return "not decided"
        if 1 / (1 + self.threshold) <= self.low and self.high <= 1 + self.threshold:
            return "within noise"
        if self.excludes_1 and not 1 / (1 + THRESHOLD) <= self.value <= 1 + THRESHOLD:
            return "faster" if self.value < 1 else "slower"
        return "not decided"

    @property
    def excludes_1(self) -> bool:
        """Whether the interval lies on one side of "as fast"."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high

    @property
    def reason(self) -> str:
        """Why nothing is decided, where nothing is."""
        if self.verdict != "not decided":
            return ""
        if self.rounds < ROUNDS_TO_DECIDE:
            return f"{self.rounds} round{'' if self.rounds == 1 else 's'}, {ROUNDS_TO_DECIDE} are needed"
        if self.excludes_1:
            return f"apart by less than {THRESHOLD:.0%}"
        return f"the interval contains 1 and reaches past the noise of ±{self.threshold:.1%}"


def few(rounds: int) -> str:
    """A remark on an interval of too few rounds, or on none."""
    if rounds < FEWEST_ROUNDS:
        return f"no interval: {rounds} round{'' if rounds == 1 else 's'}, {FEWEST_ROUNDS} are needed"
    return f"few rounds ({rounds})" if rounds < ROUNDS_TO_DECIDE else ""


def timing_of(rounds: Rounds) -> Timing:
    """The median over rounds of the medians of their windows. Raises ValueError where there is no value."""
    value = point_of(rounds)
    low, high = None, None
    if len(rounds) >= FEWEST_ROUNDS:
        low, high = interval_of(resampled([rounds])[:, 0], len(rounds))
    return Timing(value, low, high, len(rounds), outliers([v for windows in rounds.values() for v in windows]))


def ratio_of(first: Rounds, second: Rounds, noise: float | None = None) -> Ratio:
    """How much the first takes of what the second takes, over their common rounds; ``noise`` as ``noise_of`` found it.

    Raises ValueError for no common round, or a median that is not above 0.
    """
    names = common([first, second])
    if not names:
        raise ValueError("got no round that both have · expected interleaved rounds")
    one, two = ({name: side[name] for name in names} for side in (first, second))
    above, below = point_of(one), point_of(two)
    if not (above > 0 and below > 0):
        raise ValueError(f"got medians {above} and {below} · expected values above 0")
    low, high = None, None
    if len(names) >= FEWEST_ROUNDS:
        draws = np.log(resampled([one, two]))
        ends = interval_of(draws[:, 0] - draws[:, 1], len(names))
        low, high = math.exp(ends[0]), math.exp(ends[1])
    return Ratio(above / below, low, high, len(names), max(THRESHOLD, noise or 0.0))


def common(quantities: Sequence[Rounds]) -> list[Any]:
    """The rounds that all of them have, in the order of the first."""
    return [name for name in quantities[0] if all(name in other for other in quantities[1:])] if quantities else []


def point_of(rounds: Rounds) -> float:
    """The median over rounds of the medians of their windows. Raises ValueError where there is no value."""
    if not rounds or not all(len(windows) for windows in rounds.values()):
        raise ValueError(f"got {len(rounds)} rounds, some of them empty · expected at least one window in each")
    return median([median(windows) for windows in rounds.values()])


def grouped(rows: Iterable[tuple[Hashable, float]]) -> dict[Any, list[float]]:
    """(round, value) rows → Rounds."""
    found: dict[Any, list[float]] = {}
    for name, value in rows:
        found.setdefault(name, []).append(value)
    return found


# -- resampling ------------------------------------------------------------------------------------------------------


def resampled(quantities: Sequence[Rounds]) -> Floats:
    """What each quantity would have been with other rounds and windows, (R, K): the same rounds for all, windows of their own."""
    names = common(quantities)
    n = len(names)
    drawn = _drawn_rounds(n)
    out = np.empty((RESAMPLES, len(quantities)))
    for k, rounds in enumerate(quantities):
        values = np.empty(RESAMPLES * n)
        for name, here in zip(names, drawn, strict=True):
            ordered = np.sort(np.asarray(rounds[name], dtype=np.float64))
            lower, *upper = _median_places(len(ordered), n, k)
            values[here] = ordered[lower[here]]
            for place in upper:
                values[here] = (values[here] + ordered[place[here]]) / 2
        each = np.sort(values.reshape(RESAMPLES, n), axis=1)
        out[:, k] = (each[:, (n - 1) // 2] + each[:, n // 2]) / 2
    return out


@lru_cache(maxsize=8)
def _drawn_rounds(n: int) -> tuple[NDArray[np.intp], ...]:
    """For each of n rounds, where in R · n draws it is drawn."""
    drawn = np.random.default_rng([SEED, _ROUND_STREAM]).integers(0, n, RESAMPLES * n)
    return tuple(np.flatnonzero(drawn == j) for j in range(n))


@lru_cache(maxsize=32)
def _median_places(w: int, n: int, stream: int) -> tuple[NDArray[np.int32], ...]:
    """Which of w ordered windows is in the middle of w drawn ones, (R · N,); for an even w the two that are."""
    generator = np.random.default_rng([SEED, _WINDOW_STREAM, stream])
    k = (w + 1) // 2  # the lower middle one of w
    places = [generator.beta(k, w - k + 1, RESAMPLES * n)]
    if w % 2 == 0:  # the least of the w − k uniform numbers above it
        places.append(1 - (1 - places[0]) * generator.random(RESAMPLES * n) ** (1 / (w - k)))
    return tuple(np.minimum(place * w, w - 1).astype(np.int32) for place in places)


def interval_of(draws: Floats, units: int) -> tuple[float, float]:
    """The expanded 95 % percentiles of draws (R,) from so many rounds."""
    tail = _NORMAL.cdf(-math.sqrt(units / (units - 1)) * t_quantile(units - 1, LEVEL))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


# -- noise -----------------------------------------------------------------------------------------------------------


def outliers(values: Sequence[float]) -> Outliers:
    """Counts beyond 1.5 and 3 interquartile ranges from the quartiles."""
    found = np.asarray(values, dtype=np.float64)
    if len(found) < 4:
        return Outliers(0, 0, len(found))
    first, third = np.quantile(found, [0.25, 0.75])
    reach = third - first
    beyond = np.maximum(first - found, found - third)
    severe = int((beyond > 3 * reach).sum())
    return Outliers(int((beyond > 1.5 * reach).sum()) - severe, severe, len(found))


def noise_of(quantities: Sequence[Rounds]) -> float | None:
    """How far from 1 the interval of an A/A ratio in this run reaches, from quantities measured in the same rounds.

    What is left of each round's median after the quantity's own level and the round's effect on all of them are taken off (one pass of
    Tukey's median polish, on logarithms) is chance; its spread makes that of a ratio of two medians, which lies up to 1.96 of these from
    1. Its interval reaches further by the half width that nine in ten intervals of neighbouring quantities stay within. None below three
    rounds.
    """
    chosen = [q for q in quantities if len(q) >= FEWEST_ROUNDS and all(median(w) > 0 for w in q.values())]
    names = common(chosen)
    if len(names) < FEWEST_ROUNDS:
        return None
    logs = np.log([[median(q[name]) for name in names] for q in chosen])  # (K, N)
    left = logs - np.median(logs, axis=1, keepdims=True)
    k, n = left.shape
    freedom = k * n / ((k - 1 or 1) * (n - 1))
    if k > 1:
        left = left - np.median(left, axis=0)
    sigma = _MAD_TO_SIGMA * float(np.median(np.abs(left))) * math.sqrt(freedom)
    apart = _NORMAL.inv_cdf((1 + LEVEL) / 2) * math.sqrt(2) * _MEDIAN_SPREAD * sigma / math.sqrt(n)
    few_of = chosen[:_NEIGHBOURS]
    halves = [
        _half_width({name: q[name] for name in names}, other)
        for q, other in zip(few_of, few_of[1:] + few_of[:1], strict=True)
    ]
    return math.expm1(apart + float(np.quantile(halves, 0.9)))


def _half_width(first: Rounds, second: Rounds) -> float:
    """Half of the interval of the logarithm of a ratio."""
    draws = np.log(resampled([first, second]))
    low, high = interval_of(draws[:, 0] - draws[:, 1], len(first))
    return (high - low) / 2
