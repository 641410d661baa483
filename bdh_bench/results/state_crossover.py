"""From which context on does one model of a run keep fewer bytes than another (T*_state), and does the census agree?

From the knots of both formulae, which the worker stores with a cell: exact, ``analytic``. The formula is held against the census at every
context that was measured: the model that it says keeps less must be found to keep less, on both sides of T*. A run recorded before knots
were stored has the census alone: ``measured``, interpolated between contexts.

The answer moves with the pairing (how the two were matched) and with the types of the states, so both stand beside it. Tokens of
different vocabularies are not the same context: such pairs have no T*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bdh_bench.results.contenders import Facts
from bdh_bench.results.crossover import Crossover, Curve, analytic, at, measured
from bdh_bench.results.display import GAP, count
from bdh_bench.results.tables import Entry, Point, Table, finite

#: context → (bytes per stream, the point that says so)
Census = Mapping[int, tuple[float, Point]]


@dataclass(frozen=True)
class StateCrossover:
    """T* of two models. ``found`` is None, with a reason in ``remark``, where nothing can be said.

    remark      what the census says of a formula: confirmed, contradicted, or not measured around T*
    contradicted  the census disagrees: formula or measurement is wrong, and nothing follows
    cells       the cells behind it
    """

    first: str
    second: str
    found: Crossover | None
    remark: str
    contradicted: bool
    cells: tuple[str, ...]

    @property
    def text(self) -> str:
        """For a cell of the fairness card."""
        if self.found is None or self.contradicted:
            return f"not decided: {self.remark}"
        if not self.found.at:
            return f"none up to {count(self.found.reach)}"
        kind = "interpolated between contexts" if self.found.kind == "measured" else self.found.kind
        about = "" if self.found.kind == "analytic" else "about "
        return f"{about}{' and '.join(count(place) for place in self.found.at)} ({kind})"

    def as_json(self) -> dict[str, Any]:
        found = self.found
        return {
            "first": self.first,
            "second": self.second,
            "contexts": list(found.at) if found else [],
            "kind": found.kind if found else None,
            "basis": found.basis if found else None,
            "reach": found.reach if found else None,
            "lower_beyond": {"first": self.first, "second": self.second}.get(found.lower) if found else None,
            "contradicted": self.contradicted,
            "remark": self.remark,
        }


def state_crossovers(facts: Facts) -> tuple[StateCrossover, ...]:
    """One per pair of models whose bytes are their own and of which anything is known."""
    machines = set(facts.machines())
    made = (_of_pair(facts, *pair) for pair in facts.pairs() if set(pair) <= machines)
    return tuple(crossover for crossover in made if crossover is not None)


def census_of(facts: Facts, model: str) -> Census:
    """The bytes per stream that were counted, from the smallest batch of each context."""
    curve: dict[int, tuple[float, Point]] = {}
    for point in sorted(facts.select(model, "state_bytes"), key=lambda p: (p.context, p.batch_size)):
        if "axis" not in dict(point.axes):  # what a task varied itself is no sweep over contexts
            curve.setdefault(point.context, (float(point.value or 0) / max(1, point.batch_size), point))
    return curve


def formula_of(facts: Facts, model: str) -> dict[int, float]:
    """The knots that a cell of the model holds; empty where none does."""
    for cell in facts.run.cells:
        rows = cell.facts.get("state_curve") if cell.model == model else None
        pairs = [
            (finite(row[0]), finite(row[1])) for row in rows or () if isinstance(row, list | tuple) and len(row) == 2
        ]
        curve = {int(c): float(b) for c, b in pairs if c is not None and b is not None}
        if len(curve) >= 2:
            return curve
    return {}


def _of_pair(facts: Facts, first: str, second: str) -> StateCrossover | None:
    formulae = formula_of(facts, first), formula_of(facts, second)
    counted = census_of(facts, first), census_of(facts, second)
    grid = [c for c in sorted(set(counted[0]) & set(counted[1])) if c > 0]
    cells = tuple(dict.fromkeys(key for side in counted for c in grid for key in side[c][1].cells))
    if not all(formulae) and not grid:
        return None
    cells = cells or tuple(_holder(facts, model) for model in (first, second))
    vocabularies = {size for model in (first, second) if (size := _vocabulary(facts, model)) is not None}
    if len(vocabularies) > 1:
        return StateCrossover(first, second, None, "their tokens are of different vocabularies", False, cells)
    census = ({c: side[c][0] for c in grid} for side in counted)
    if not all(formulae):
        found = measured(*census)
        return None if found is None else StateCrossover(first, second, found, "from the census alone", False, cells)
    found = analytic(*formulae)
    if found is None:
        return StateCrossover(first, second, None, "they have no two contexts in common", False, cells)
    remark, wrong = _checked(formulae, *census)
    return StateCrossover(first, second, found, remark or _around(found, grid), wrong, cells)


def _holder(facts: Facts, model: str) -> str:
    return next(cell.key for cell in facts.run.cells if cell.model == model and cell.facts.get("state_curve"))


def _vocabulary(facts: Facts, model: str) -> int | None:
    known = (finite(cell.facts.get("vocab_size")) for cell in facts.run.cells if cell.model == model)
    return next((int(size) for size in known if size is not None), None)


def _checked(formulae: Sequence[Curve], one: Curve, two: Curve) -> tuple[str, bool]:
    """Where the census finds another model smaller than the formulae do; ("", False) where it does nowhere."""
    for context in one:
        theory = at(formulae[0], context) - at(formulae[1], context)
        counted = one[context] - two[context]
        if (theory > 0) - (theory < 0) != (counted > 0) - (counted < 0):
            return f"the census at {count(context)} contradicts the formulae", True
    return "", False


def _around(found: Crossover, grid: Sequence[int]) -> str:
    """What the census, which nowhere disagrees, saw of it."""
    if not grid:
        return "formulae; no census"
    if not found.at:
        return f"formulae; the census agrees from {count(grid[0])} to {count(grid[-1])}"
    near = [
        (max((c for c in grid if c <= place), default=None), min((c for c in grid if c >= place), default=None))
        for place in found.at
    ]
    if any(left is None or right is None for left, right in near):
        return f"formulae; no census around it, which agrees from {count(grid[0])} to {count(grid[-1])}"
    return f"formulae; the census agrees at {' and '.join(count(c) for pair in near for c in dict.fromkeys(pair) if c is not None)}"


def state_crossover_table(facts: Facts, crossovers: Sequence[StateCrossover], pairing: str) -> Table:
    """T* of every pair, and what the census says of it."""
    rows = tuple(_row(facts, crossover) for crossover in crossovers)
    meaning = "The context at which the states of two models are equally large; past it the named one keeps fewer bytes per stream."
    note = f"Matched on: {pairing}. T* moves with the matching, and in proportion to the width of the states' types."
    columns = ("models", "T*", "keeps less beyond", "how it is known")
    return Table("table-state-crossover", "Crossover of states", meaning, columns, rows, note)


def _row(facts: Facts, c: StateCrossover) -> tuple[Entry, ...]:
    names = {"first": facts.label(c.first), "second": facts.label(c.second), "": "neither"}
    lower = names[c.found.lower] if c.found and not c.contradicted else GAP
    return (
        Entry(f"{facts.label(c.first)} and {facts.label(c.second)}"),
        Entry(c.text),
        Entry(lower),
        Entry(c.remark),
    )
