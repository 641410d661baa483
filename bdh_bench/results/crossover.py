"""From which context on is one model cheaper than another: T*, in bytes of state, of footprint, or in seconds per token?

A curve is context → value. T* is where the difference of two curves changes its sign; where it is 0 before it does, the first 0. A curve
that only touches the other, or starts equal to it, does not cross it.

* ``analytic``      two formulae that are straight between their knots (a KV cache, a window that fills, a constant): exact,
* ``measured``      two curves on a grid of contexts: straight between grid points in log-log,
* ``extrapolated``  no crossing on the grid, but the outermost pieces meet within four doublings of it. Never said without that word,
* ``none``          neither: none up to the longest context that both have.

Curves that cross more than once have every T* listed. Of measured curves rounds (fresh processes) are drawn with replacement, the same
ones for both models, and T* is read from every resample: its interval is that of the first T*. A resample that does not cross on the
grid where the point does, or does where the point does not, dissents; more than 5 % of them leave T* *not decided*, as do fewer than
five rounds. An extrapolated T* is never decided.

Legend: R resamples, N rounds, G contexts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from bdh_bench.results.display import count, number
from bdh_bench.results.resampling import RESAMPLES, SEED, Floats

Kind = Literal["analytic", "measured", "extrapolated", "none"]
#: context → value
Curve = Mapping[int, float]
#: context → round → the value of that round (for a time, the median of its windows)
Rounds = Mapping[int, Mapping[int, float]]

MOST_DISSENT = 0.05
FEWEST_ROUNDS = 3  # to show an interval
ROUNDS_TO_DECIDE = 5
#: How many times past an end of the grid a crossing is still looked for.
FARTHEST = 16.0
_LEVEL = 0.95
_STREAM = 3  # of the draws of rounds


@dataclass(frozen=True)
class Crossover:
    """Where the first curve crosses the second.

    at         every T*, ascending; empty for ``none``
    basis      whether the curves are formulae or measurements, whatever ``kind`` the crossing is of
    reach      the longest context that both curves have
    lower      which curve is lower at ``reach``; "" where they are equal
    low, high  95 % interval of the first T* over resampled rounds; None where there is none
    dissent    share of resamples that say otherwise; None without resamples
    rounds     how many were drawn from; 0 for formulae and single measurements
    """

    at: tuple[float, ...]
    kind: Kind
    basis: Literal["analytic", "measured"]
    reach: int
    lower: Literal["first", "second", ""]
    low: float | None = None
    high: float | None = None
    dissent: float | None = None
    rounds: int = 0

    @property
    def first(self) -> float | None:
        """The T* that is quoted where one is: the smallest."""
        return self.at[0] if self.at else None

    @property
    def several(self) -> bool:
        return len(self.at) > 1

    @property
    def decided(self) -> bool:
        """Whether the answer, be it a T* or that there is none, may be told as one."""
        if self.basis == "analytic":
            return True
        sure = self.dissent is not None and self.dissent <= MOST_DISSENT
        return self.kind != "extrapolated" and sure and self.rounds >= ROUNDS_TO_DECIDE

    @property
    def text(self) -> str:
        """For a table: the contexts, their kind, the interval, and why nothing is decided where nothing is."""
        if not self.at:
            found = f"none up to {count(self.reach)}"
        else:
            found = (
                f"{' and '.join(count(place) for place in self.at)} ({self.kind}{', several' if self.several else ''})"
            )
        if self.low is not None and self.high is not None:
            found += f" [{count(self.low)}, {count(self.high)}]"
        return found if self.decided else f"{found}; not decided: {self.doubt}"

    @property
    def doubt(self) -> str:
        """What stands against saying more; nothing where it is decided."""
        if self.decided:
            return ""
        if self.dissent is None:
            return "outside the measured contexts" if self.kind == "extrapolated" else "a single round"
        if self.dissent > MOST_DISSENT:
            return f"{number(round(100 * self.dissent, 1))} % of the resamples {'cross' if self.kind == 'none' else 'do not cross'}"
        if self.kind == "extrapolated":
            return "outside the measured contexts"
        return f"{self.rounds} rounds, {ROUNDS_TO_DECIDE} are needed"


def analytic(first: Curve, second: Curve) -> Crossover | None:
    """T* of two formulae, given at their knots: exact. None where they have no two contexts in common.

    A model that stops at a last position has no knot past it, and there is no T* past it either.
    """
    start, reach = _common_ends(first, second)
    grid = sorted({c for c in (*first, *second) if start <= c <= reach} | {start, reach})
    if len(grid) < 2:
        return None
    one, two = (_read(curve, grid) for curve in (first, second))
    places = _crossings(np.array(grid, dtype=np.float64), one - two)
    return Crossover(tuple(places), "analytic" if places else "none", "analytic", reach, _lower(one[-1], two[-1]))


def measured(first: Curve, second: Curve) -> Crossover | None:
    """T* of two measured curves over the contexts at which both are above 0. None for fewer than two of those."""
    grid = _common_grid(first, second)
    if len(grid) < 2:
        return None
    one, two = (np.array([float(curve[c]) for c in grid]) for curve in (first, second))
    x, apart = np.log(np.array(grid, dtype=np.float64)), np.log(one) - np.log(two)
    inside = tuple(math.exp(place) for place in _crossings(x, apart))
    outside = () if inside else tuple(math.exp(place) for place in _beyond(x, apart))
    kind: Kind = "measured" if inside else "extrapolated" if outside else "none"
    return Crossover(inside or outside, kind, "measured", grid[-1], _lower(one[-1], two[-1]))


def over_rounds(first: Rounds, second: Rounds) -> Crossover | None:
    """The same from medians over rounds, with the interval and the dissent of resampled rounds where there are three or more.

    Only rounds that every context of both models has: they are paired.
    """
    grid = [c for c in sorted(set(first) & set(second)) if first[c] and second[c]]
    names = sorted(set.intersection(*(set(side[c]) for side in (first, second) for c in grid))) if grid else []
    if not names:
        return None
    values = [np.array([[side[c][r] for c in grid] for r in names], dtype=np.float64) for side in (first, second)]
    one, two = (dict(zip(grid, np.median(v, axis=0).tolist(), strict=True)) for v in values)
    found = measured(one, two)
    if found is None or len(names) < FEWEST_ROUNDS:
        return found and replace(found, rounds=len(names))
    generator = np.random.default_rng([SEED, _STREAM])
    drawn = generator.integers(0, len(names), (RESAMPLES, len(names)))  # (R, N)
    medians = [np.median(v[drawn], axis=1) for v in values]  # (R, G)
    return with_resamples(found, grid, medians[0], medians[1], len(names))


def with_resamples(point: Crossover, contexts: Sequence[int], first: Floats, second: Floats, rounds: int) -> Crossover:
    """The point with what resampled curves (R, G) at ``contexts`` say of it, however they were drawn."""
    kept = [i for i in range(len(contexts)) if (first[:, i] > 0).all() and (second[:, i] > 0).all()]
    x = np.log(np.array([contexts[i] for i in kept], dtype=np.float64))
    apart = np.log(first[:, kept]) - np.log(second[:, kept])  # (R, G)
    found = np.exp(np.fmin.reduce(_places(x, apart), axis=1))  # (R,), nan where a resample does not cross
    crossed = np.isfinite(found)
    if point.kind != "measured":
        return replace(point, dissent=float(crossed.mean()), rounds=rounds)
    low, high = (
        np.quantile(found[crossed], [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2]).tolist() if crossed.any() else (None, None)
    )
    return replace(point, low=low, high=high, dissent=float(1 - crossed.mean()), rounds=rounds)


def at(formula: Curve, context: int) -> float:
    """A formula at one context, straight between its knots and flat outside them."""
    return float(_read(formula, [context])[0])


# -- the arithmetic ----------------------------------------------------------------------------------------------------


def _common_ends(first: Curve, second: Curve) -> tuple[int, int]:
    if not first or not second:
        return (0, 0)
    return max(min(first), min(second)), min(max(first), max(second))


def _read(curve: Curve, grid: Sequence[int]) -> Floats:
    """The curve at these contexts, straight between its knots."""
    knots = sorted(curve)
    return np.interp(np.array(grid, dtype=np.float64), knots, [float(curve[c]) for c in knots])


def _common_grid(first: Curve, second: Curve) -> list[int]:
    return [c for c in sorted(set(first) & set(second)) if c > 0 and first[c] > 0 and second[c] > 0]


def _lower(one: float, two: float) -> Literal["first", "second", ""]:
    return "" if one == two else "first" if one < two else "second"


def _crossings(x: Floats, apart: Floats) -> list[float]:
    """Every place where ``apart`` (G,) changes its sign, straight between the places ``x`` (G,)."""
    places = _places(x, apart[None])[0]
    return [float(place) for place in places if math.isfinite(place)]


def _places(x: Floats, apart: Floats) -> Floats:
    """Where each row of ``apart`` (R, G) changes its sign: (R, G), nan for a piece without a change. The last column is for rows
    that end equal."""
    rows, columns = apart.shape
    places = np.full((rows, columns), np.nan)
    sign = np.sign(apart[:, 0])  # the last that was not 0
    equal = np.full(rows, np.nan)  # where a run of zeros began, if one did after a sign
    for i in range(1, columns):
        left, right, new = apart[:, i - 1], apart[:, i], np.sign(apart[:, i])
        turned = new * sign < 0
        share = np.divide(left, left - right, out=np.zeros(rows), where=turned)
        places[:, i - 1] = np.where(
            turned, np.where(np.isnan(equal), x[i - 1] + share * (x[i] - x[i - 1]), equal), np.nan
        )
        begins = (new == 0) & (sign != 0) & np.isnan(equal)
        equal = np.where(new != 0, np.nan, np.where(begins, x[i], equal))
        sign = np.where(new != 0, new, sign)
    places[:, -1] = equal
    return places


def _beyond(x: Floats, apart: Floats) -> Iterable[float]:
    """Where the outermost pieces would meet, past either end of the grid (logarithms of contexts)."""
    for end, near in ((0, 1), (-1, -2)):
        slope = (apart[near] - apart[end]) / (x[near] - x[end])
        if slope and apart[end]:
            place = float(x[end] - apart[end] / slope)
            outwards = place - float(x[end]) if end else float(x[end]) - place
            if 0 < outwards <= math.log(FARTHEST) and place >= 0:
                yield place
