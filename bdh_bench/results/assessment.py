"""All that the rules make of a run, computed once: who was compared, with what verdict, how fairly, and after enough training?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bdh_bench.results.comparisons import Comparison, comparison_as_json, comparison_table, comparisons_of
from bdh_bench.results.contenders import Facts
from bdh_bench.results.extrapolation import Sweep, extrapolation_table, sweep_as_json, sweeps_of
from bdh_bench.results.fairness import Card, card_of, fairness_table
from bdh_bench.results.gates import gates_of
from bdh_bench.results.store import Run
from bdh_bench.results.sufficiency import Sufficiency, sufficiency_of
from bdh_bench.results.tables import Point, Table, points_of


@dataclass(frozen=True)
class Assessment:
    """A run after every rule was applied."""

    facts: Facts
    card: Card
    training: Sufficiency
    comparisons: tuple[Comparison, ...]
    sweeps: tuple[Sweep, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """What a reader must know before anything else: the run's own labels, and ``undertrained``."""
        own = [str(label) for label in self.facts.run.manifest.get("labels") or []]
        return (*own, *(["undertrained"] if self.training.undertrained else []))

    def tables(self) -> tuple[Table, ...]:
        """Comparisons, what contexts are worth, and the fairness card; each only where it has rows."""
        note = f"{self.training.status}: {self.training.text}."
        found = (
            comparison_table(self.facts, self.comparisons),
            extrapolation_table(self.facts, self.sweeps, note),
            fairness_table(self.card, self.facts),
        )
        return tuple(table for table in found if table.rows and len(table.columns) > 1)

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values, for other programs."""
        return {
            "labels": list(self.labels),
            "comparisons": [comparison_as_json(c, self.facts, self.card) for c in self.comparisons],
            "extrapolation": [sweep_as_json(sweep) for sweep in self.sweeps],
            "training": {"status": self.training.status, "text": self.training.text, "share": self.training.share},
            "fairness": self.card.as_json(),
            "gates": gates_of(self.facts.run),
        }


def assess(run: Run, points: Sequence[Point] | None = None) -> Assessment:
    """Apply every rule to a run."""
    facts = Facts(run, points_of(run) if points is None else points)
    card, training = card_of(facts), sufficiency_of(facts)
    return Assessment(facts, card, training, comparisons_of(facts, card, training), sweeps_of(facts))
