"""From which context on does the whole process of one model take less memory than another's (T*_footprint), and where is T* drawn?

From ``peak_footprint_bytes`` on the contexts and the batch that both were measured at: interpolated in log-log, ``measured``; past the
grid only as ``extrapolated``. One process per context is one round, and decides nothing. The program is part of a footprint, and what one
family loads and another does not (a library of some hundred MiB) moves T*; states are compared without it by ``state_crossover``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bdh_bench.results.contenders import Facts
from bdh_bench.results.crossover import Crossover, at, measured
from bdh_bench.results.display import GAP, shortened, tick
from bdh_bench.results.escaping import plain
from bdh_bench.results.figure import Mark
from bdh_bench.results.state_crossover import census_of, formula_of, state_crossovers
from bdh_bench.results.tables import Entry, Point, Table

FOOTPRINT = "peak_footprint_bytes"


@dataclass(frozen=True)
class FootprintCrossover:
    """T*_footprint of two models, and the curves it was read from."""

    first: str
    second: str
    found: Crossover
    curve: Mapping[int, float]
    cells: tuple[str, ...]


def footprint_crossovers(facts: Facts) -> tuple[FootprintCrossover, ...]:
    """One per pair of models whose bytes are their own and whose footprints share two contexts."""
    return tuple(_crossovers(facts))


def _crossovers(facts: Facts) -> Iterator[FootprintCrossover]:
    machines = set(facts.machines())
    for first, second in facts.pairs():
        if not {first, second} <= machines:
            continue
        one, two = (_curve(facts.select(model, FOOTPRINT)) for model in (first, second))
        shared = sorted(set(one) & set(two))
        batch = min((b for b, _ in shared), default=0)
        contexts = [c for b, c in shared if b == batch]
        found = measured(*({c: float(side[batch, c].value or 0) for c in contexts} for side in (one, two)))
        if found is not None:
            cells = tuple(dict.fromkeys(key for side in (one, two) for c in contexts for key in side[batch, c].cells))
            yield FootprintCrossover(
                first, second, found, {c: float(one[batch, c].value or 0) for c in contexts}, cells
            )


def _curve(points: Sequence[Point]) -> dict[tuple[int, int], Point]:
    """(batch size, context) → the point."""
    curve: dict[tuple[int, int], Point] = {}
    for point in points:
        curve.setdefault((point.batch_size, point.context), point)
    return curve


def footprint_crossover_table(facts: Facts, pairing: str) -> Table:
    """T*_footprint of every pair."""
    rows = tuple(_row(facts, crossover) for crossover in footprint_crossovers(facts))
    meaning = "The context at which the processes of two models take the same memory at their worst moment."
    note = (
        f"Matched on: {pairing}. Programs and libraries are part of a footprint; one process per context is one round."
    )
    columns = ("models", "T*", "takes less at the last context")
    return Table("table-footprint-crossover", "Crossover of footprints", meaning, columns, rows, note)


def _row(facts: Facts, c: FootprintCrossover) -> tuple[Entry, ...]:
    names = {"first": facts.label(c.first), "second": facts.label(c.second), "": GAP}
    pair = f"{facts.label(c.first)} and {facts.label(c.second)}"
    return (Entry(pair), Entry(c.found.text), Entry(names[c.found.lower]))


# -- where T* is drawn -------------------------------------------------------------------------------------------------


def state_marks(facts: Facts) -> tuple[Mark, ...]:
    """T*_state on the curve of states, where it lies between contexts that were counted."""
    marks: list[Mark] = []
    for c in state_crossovers(facts):
        counted = {context: value for context, (value, _) in census_of(facts, c.first).items()}
        curve = formula_of(facts, c.first)
        if c.found is None or c.contradicted or not counted:
            continue
        for place in c.found.at:
            height = at(curve, round(place)) if curve else _between(counted, place)
            marks += _mark(facts, c.first, c.second, place, height, counted)
    return tuple(marks)


def footprint_marks(facts: Facts) -> tuple[Mark, ...]:
    """T*_footprint on the curve of footprints, where it was measured."""
    return tuple(
        mark
        for c in footprint_crossovers(facts)
        if c.found.kind == "measured"
        for place in c.found.at
        for mark in _mark(facts, c.first, c.second, place, _between(c.curve, place), c.curve)
    )


def _mark(
    facts: Facts, first: str, second: str, place: float, height: float, drawn: Mapping[int, float]
) -> Iterator[Mark]:
    if min(drawn) <= place <= max(drawn) and height > 0:
        one, two = (plain(shortened(facts.label(model), 20)) for model in (first, second))
        yield Mark(float(place), float(height), f"T* {one} = {two}: {tick(round(place))}", "crossing")


def _between(curve: Mapping[int, float], place: float) -> float:
    """The curve at a place, straight in log-log; 0 where it is not above 0 on both sides."""
    left, right = max(c for c in curve if c <= place), min(c for c in curve if c >= place)
    if left == right or min(curve[left], curve[right]) <= 0:
        return curve[left] if left == right else 0.0
    share = math.log(place / left) / math.log(right / left)
    return math.exp((1 - share) * math.log(curve[left]) + share * math.log(curve[right]))
