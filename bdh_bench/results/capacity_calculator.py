"""What does the calculator of the page know of a run's models, and what stands there without a script?

Weights and states are rows of the task ``memory``, counted, at a batch of 1. Between counted contexts a state is read on the straight
line, which is exact for caches and constant states; beyond them only where all counted states lie on one line, else it is unknown. A
single measured batch is no grid: it cannot say how many fit. The page's capacity.js does the arithmetic of capacity_planning.py on
the same numbers; tests hold one against the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bdh_bench.results.capacity_planning import Capacity, Grids, Needs, Wish, as_row, capacity_from, grids_of
from bdh_bench.results.contenders import Facts
from bdh_bench.results.display import count, quantity
from bdh_bench.results.escaping import plain
from bdh_bench.results.tables import Entry, Table, finite

#: Machines of the table without a script.
_MEMORIES = (16 * 2**30, 80 * 2**30)


@dataclass(frozen=True)
class Known:
    """The rows of one model: weights, state by context (``straight`` if on one line), position limit, and what was measured."""

    model: str
    label: str
    weights: int | None
    states: Mapping[int, int]
    max_positions: int | None
    grids: Grids

    @property
    def straight(self) -> bool:
        """Whether at least three counted states, or two that are equal, lie on one line."""
        places = sorted(self.states)
        if len(places) < 2:
            return False
        (first, last), at = (places[0], places[-1]), self.states
        rise, run = at[last] - at[first], last - first
        on_line = all((at[p] - at[first]) * run == rise * (p - first) for p in places)
        return on_line and (len(places) > 2 or rise == 0)

    def state_at(self, context: int) -> int | None:
        """Bytes of one stream; None where nothing was counted that says so."""
        places = sorted(self.states)
        if context in self.states:
            return self.states[context]
        if len(places) < 2:
            return None
        low, high = places[0], places[-1]
        if low < context < high:
            low = max(p for p in places if p < context)
            high = min(p for p in places if p > context)
        elif not self.straight:
            return None
        slope = (self.states[high] - self.states[low]) / (high - low)
        return max(0, self.states[low] + math.ceil(slope * (context - low) - 1e-6))

    def needs(self, context: int) -> Needs:
        """What the formula needs at a context."""
        state, problem = self.state_at(context), ""
        if self.weights is None:
            problem = "its weights were not counted"
        elif state is None and not (self.max_positions is not None and context > self.max_positions):
            problem = "its state was not counted around this context"
        limit = self.max_positions
        return Needs(self.model, weights_bytes=self.weights, state_bytes=state, max_positions=limit, problem=problem)

    def capacity(self, wish: Wish) -> Capacity:
        """The answer for this model."""
        return capacity_from(self.needs(wish.context), wish, self.grids)

    def as_json(self) -> dict[str, Any]:
        """The same for the script of the page."""
        grids = {
            name: [[batch, context, value] for (batch, context), value in sorted(grid.items())]
            for name, grid in (
                ("footprints", self.grids.footprints),
                ("times", self.grids.times),
                ("tails", self.grids.tails),
            )
        }
        return {
            "label": plain(self.label),
            "weights": self.weights,
            "states": sorted(self.states.items()),
            "straight": self.straight,
            "positions": self.max_positions,
            **grids,
        }


@dataclass(frozen=True)
class Fixed:
    """The table without a script, at one context."""

    context: int
    table: Table


def known_of(facts: Facts) -> tuple[Known, ...]:
    """The models of a run of which anything about capacity is known."""
    every = (_known(facts, model) for model in facts.machines())
    return tuple(one for one in every if one.grids.footprints or (one.weights is not None and one.states))


def _known(facts: Facts, model: str) -> Known:
    plain_rows = [p for m in ("weights_bytes", "state_bytes") for p in facts.select(model, m) if p.batch_size == 1]
    counted = [p for p in plain_rows if "axis" not in dict(p.axes) and p.value is not None]
    weights = [int(p.value or 0) for p in counted if p.metric == "weights_bytes"]
    states: dict[int, int] = {}
    for p in counted:
        if p.metric == "state_bytes" and p.context > 0:
            states[p.context] = max(int(p.value or 0), states.get(p.context, 0))
    limits = [finite(cell.facts.get("max_positions")) for cell in facts.run.cells if cell.model == model]
    limit = min((int(value) for value in limits if value is not None), default=None)
    grids = grids_of(facts.run, model)
    if len({batch for batch, _ in grids.footprints}) < 2:
        grids = Grids({}, {}, {})
    return Known(model, facts.label(model), max(weights, default=None), states, limit, grids)


def without_script(facts: Facts, known: Sequence[Known]) -> Fixed:
    """Streams within 16 and 80 GiB at the longest context that was counted or measured."""
    contexts = [c for one in known for c in (*one.states, *(c for _, c in one.grids.footprints))]
    context = max(contexts, default=1)
    columns = ("model", "memory", "streams", "tokens/s", "limit", "remark")
    rows = []
    for one in known:
        for memory in _MEMORIES:
            said = as_row(one.capacity(Wish(memory, context)))
            texts = (one.label, quantity(memory, "byte"), *(said[name] for name in columns[2:]))
            rows.append(tuple(Entry(text) for text in texts))
    title = f"What fits at a context of {count(context)} tokens"
    return Fixed(context, Table("capacity-table", title, "", columns, tuple(rows)))
