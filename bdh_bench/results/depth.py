"""How does the time per token change with the tokens read before it, and from which context on is one model faster than another?

* cost slope: the least-squares line of the time per token against depth, in µs per 1,000 tokens. *Flat* is a slope whose interval
  contains 0 and which over the measured depths makes less than 2 % of the time per token,
* T*_latency: where the curves of two models cross (``crossover``), from resamples that draw the same rounds for both.

Both draw rounds, then windows in them, one draw of rounds for all depths: a slow round is slow at every depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bdh_bench.results.contenders import Facts
from bdh_bench.results.crossover import Crossover, measured, with_resamples
from bdh_bench.results.display import GAP, count, number, quantity
from bdh_bench.results.rounds import (
    FEWEST_ROUNDS,
    ROUNDS_TO_DECIDE,
    Rounds,
    common,
    few,
    interval_of,
    point_of,
    resampled,
)
from bdh_bench.results.speed import RUNTIME, Timed, comparable_pairs
from bdh_bench.results.tables import Entry, Table

STEP = "tpot_s"
#: Least part of the time per token that a slope must make over the measured depths to be one.
FLAT = 0.02
_PER = 1000  # tokens
Curve = Mapping[int, Rounds]


@dataclass(frozen=True)
class Slope:
    """Seconds per token of depth with their 95 % interval; ``share`` of the time per token that it makes over ``span``."""

    value: float
    low: float | None
    high: float | None
    share: float
    span: tuple[int, int]
    rounds: int

    @property
    def verdict(self) -> Literal["flat", "grows", "falls", "not decided"]:
        if self.low is None or self.high is None or self.rounds < ROUNDS_TO_DECIDE:
            return "not decided"
        if self.low <= 0 <= self.high:
            return "flat" if self.share < FLAT else "not decided"
        return "grows" if self.value > 0 else "falls"

    @property
    def label(self) -> str:
        """For the end of a line in a picture."""
        return "flat" if self.verdict == "flat" else f"{_per_thousand(self.value)} µs per 1k"

    @property
    def text(self) -> str:
        """The slope with its interval, verdict, and what is missing."""
        ends = f" [{_per_thousand(self.low)}, {_per_thousand(self.high)}]" if self.low is not None else ""
        return f"{_per_thousand(self.value)} µs per 1,000 tokens{ends}"

    @property
    def remark(self) -> str:
        said = few(self.rounds)
        if self.verdict == "not decided" and self.rounds >= ROUNDS_TO_DECIDE:
            said = f"the interval contains 0, and the slope makes {self.share:.1%} of the time per token, {FLAT:.0%} are allowed"
        return said


def _per_thousand(value: float | None) -> str:
    text = number((value or 0.0) * _PER * 1e6)
    return text if text.startswith("−") or text == "0" else f"+{text}"


@dataclass(frozen=True)
class DepthCurve:
    """The times per token of one model in one way of running, by depth."""

    model: str
    task: str
    batch_size: int
    axes: tuple[tuple[str, Any], ...]
    curve: Curve
    cells: tuple[str, ...]

    @property
    def runtime(self) -> str:
        return str(dict(self.axes).get(RUNTIME, ""))


@dataclass(frozen=True)
class TimeCrossover:
    """Where the curve of the first crosses that of the second, both in the same runtime."""

    first: DepthCurve
    second: DepthCurve
    found: Crossover

    @property
    def cells(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.first.cells, *self.second.cells)))


def curves_of(timed: Sequence[Timed]) -> list[DepthCurve]:
    """The curves of all that was timed at a depth above 0."""
    groups: dict[tuple[Any, ...], list[Timed]] = {}
    for t in timed:
        if t.metric == STEP and t.context > 0:
            groups.setdefault((t.model, t.task, t.batch_size, t.axes), []).append(t)
    return [
        DepthCurve(
            model,
            task,
            batch,
            axes,
            {t.context: t.rounds for t in sorted(group, key=lambda t: t.context)},
            tuple(dict.fromkeys(cell for t in group for cell in t.cells)),
        )
        for (model, task, batch, axes), group in groups.items()
    ]


def slope_of(curve: Curve) -> Slope | None:
    """The slope over the rounds that every depth has; None for fewer than two depths, or no such round."""
    depths, names = sorted(curve), common(list(curve.values()))
    if len(depths) < 2 or not names:
        return None
    kept = [{name: curve[d][name] for name in names} for d in depths]
    x = np.array(depths, dtype=np.float64) - np.mean(depths)
    line = x / (x @ x)  # (G,): its product with the times is the slope
    times = np.array([point_of(rounds) for rounds in kept])
    value = float(line @ times)
    low, high = None, None
    if len(names) >= FEWEST_ROUNDS:
        low, high = interval_of(resampled(kept) @ line, len(names))
    span = (depths[0], depths[-1])
    share = abs(value) * (span[1] - span[0]) / float(times.mean())
    return Slope(value, low, high, share, span, len(names))


def crossing_of(first: Curve, second: Curve) -> Crossover | None:
    """T* of two curves over the depths and rounds that both have; None for fewer than two such depths."""
    grid = [c for c in sorted(set(first) & set(second)) if c > 0]
    names = common([side[c] for side in (first, second) for c in grid])
    if not names:
        return None
    kept = [[{name: side[c][name] for name in names} for c in grid] for side in (first, second)]
    points = [dict(zip(grid, map(point_of, side), strict=True)) for side in kept]
    found = measured(points[0], points[1])
    if found is None or len(names) < FEWEST_ROUNDS:
        return found
    draws = resampled([*kept[0], *kept[1]])  # (R, 2G)
    return with_resamples(found, grid, draws[:, : len(grid)], draws[:, len(grid) :], len(names))


def crossings_of(facts: Facts, curves: Sequence[DepthCurve]) -> tuple[TimeCrossover, ...]:
    """Every pair of comparable models in the same task, runtime and batch."""
    found = []
    for first, second in comparable_pairs(facts):
        for a in (c for c in curves if c.model == first):
            for b in (c for c in curves if c.model == second):
                same = (a.task, a.batch_size, a.runtime) == (b.task, b.batch_size, b.runtime)
                crossing = crossing_of(a.curve, b.curve) if same else None
                found += [TimeCrossover(a, b, crossing)] if crossing else []
    return tuple(found)


# -- views -----------------------------------------------------------------------------------------------------------


def depth_tables(facts: Facts, curves: Sequence[DepthCurve], crossings: Sequence[TimeCrossover]) -> list[Table]:
    """Slopes by model, and T* by pair."""
    slopes = tuple(_slope_row(facts, c, slope) for c in curves if (slope := slope_of(c.curve)) is not None)
    meaning = "The least-squares line of the time per token against the tokens read before it; rounds are drawn, then windows in them."
    columns = ("model", "runtime", "slope", "verdict", "depths", "rounds")
    note = (
        f"Flat: the interval contains 0 and the slope makes less than {FLAT:.0%} of the time per token over the depths."
    )
    crossed = tuple(_crossing_row(facts, c) for c in crossings)
    about = "The context at which two models take equally long per token; past it the named one is faster."
    heads = ("models", "runtime", "T*", "faster beyond", "rounds")
    return [
        Table("table-slopes", "Cost slope of the time per token", meaning, columns, slopes, note, True),
        Table("table-time-crossover", "Crossover of times per token", about, heads, crossed),
    ]


def _slope_row(facts: Facts, c: DepthCurve, slope: Slope) -> tuple[Entry, ...]:
    depths = f"{count(slope.span[0])} to {count(slope.span[1])}"
    return (
        Entry(facts.label(c.model) + _batch(c)),
        Entry(c.runtime or GAP),
        Entry(slope.text),
        Entry(slope.verdict, slope.remark),
        Entry(depths),
        Entry(count(slope.rounds)),
    )


def _crossing_row(facts: Facts, c: TimeCrossover) -> tuple[Entry, ...]:
    names = {"first": facts.label(c.first.model), "second": facts.label(c.second.model), "": "neither"}
    return (
        Entry(f"{names['first']} and {names['second']}{_batch(c.first)}"),
        Entry(c.first.runtime or GAP),
        Entry(c.found.text),
        Entry(names[c.found.lower] if c.found.decided else GAP, "" if c.found.decided else c.found.doubt),
        Entry(count(c.found.rounds or 1)),
    )


def _batch(curve: DepthCurve) -> str:
    return "" if curve.batch_size == 1 else f" (batch {curve.batch_size})"


def crossing_sentence(facts: Facts, c: TimeCrossover) -> str:
    """T* in words."""
    names = {"first": facts.label(c.first.model), "second": facts.label(c.second.model), "": "neither"}
    pair = f"{names['first']} and {names['second']}{_batch(c.first)}"
    if not c.found.decided:
        return f"Where {pair} take equally long per token is not decided: {c.found.doubt}."
    if not c.found.at:
        longest = quantity(point_of(c.first.curve[c.found.reach]), "s")
        return (
            f"{pair} nowhere take equally long per token up to {count(c.found.reach)} bytes of context, where "
            f"{names['first']} takes {longest}: {names[c.found.lower]} is faster ({count(c.found.rounds)} rounds)."
        )
    at = c.found.text.replace(" (", " bytes of context (", 1)
    return f"{pair} take equally long per token at {at}; beyond it {names[c.found.lower]} is faster ({count(c.found.rounds)} rounds)."


def crossing_as_json(c: TimeCrossover) -> dict[str, Any]:
    """T* for other programs."""
    return {
        "first": c.first.model,
        "second": c.second.model,
        "batch_size": c.first.batch_size,
        "runtime": c.first.runtime,
        "at": list(c.found.at),
        "kind": c.found.kind,
        "low": c.found.low,
        "high": c.found.high,
        "dissent": c.found.dissent,
        "rounds": c.found.rounds,
        "reach": c.found.reach,
        "decided": c.found.decided,
        "lower": c.found.lower,
    }
