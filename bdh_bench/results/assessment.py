"""All that the rules make of a run, computed once: who was compared, with what verdict, how fairly, and after enough training?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bdh_bench.results.blocks import LABEL
from bdh_bench.results.comparisons import Comparison, comparison_as_json, comparison_table, comparisons_of
from bdh_bench.results.contenders import Facts
from bdh_bench.results.depth import (
    DepthCurve,
    TimeCrossover,
    crossing_as_json,
    crossings_of,
    curves_of,
    depth_tables,
)
from bdh_bench.results.extrapolation import Sweep, extrapolation_table, sweep_as_json, sweeps_of
from bdh_bench.results.fairness import Card, card_of, fairness_table
from bdh_bench.results.footprint_crossover import footprint_crossover_table
from bdh_bench.results.gates import gates_of
from bdh_bench.results.speed import SpeedComparison, speed_as_json, speed_tables, speeds_of, timed_of
from bdh_bench.results.state_crossover import state_crossover_table
from bdh_bench.results.store import Run
from bdh_bench.results.sufficiency import Sufficiency, sufficiency_of
from bdh_bench.results.tables import Point, Table, points_of
from bdh_bench.results.validity import Signal, signals_of, without_signal


@dataclass(frozen=True)
class Assessment:
    """A run after every rule was applied."""

    facts: Facts
    card: Card
    training: Sufficiency
    comparisons: tuple[Comparison, ...]
    sweeps: tuple[Sweep, ...]
    signals: tuple[Signal, ...] = ()
    speeds: tuple[SpeedComparison, ...] = ()
    curves: tuple[DepthCurve, ...] = ()
    time_crossings: tuple[TimeCrossover, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """What a reader must know before anything else: the run's own labels, ``blocks``, ``undertrained``, and tasks without a signal."""
        own = [str(label) for label in self.facts.run.manifest.get("labels") or []]
        invalid = [f"{task}: no signal" for task in without_signal(self.signals)]
        blocks = [LABEL] if self.facts.blocks else []
        return (*own, *blocks, *(["undertrained"] if self.training.undertrained else []), *invalid)

    def tables(self) -> tuple[Table, ...]:
        """Comparisons, what contexts are worth, where curves cross, who is faster, and the fairness card; each only where it has rows."""
        note = f"{self.training.status.capitalize()}: {self.training.text}."
        found = (
            replace(comparison_table(self.facts, self.comparisons), detail=True),
            extrapolation_table(self.facts, self.sweeps, note, self.training.undertrained),
            state_crossover_table(self.facts, self.card.crossovers, self.card.axis),
            footprint_crossover_table(self.facts, self.card.axis),
            *speed_tables(self.facts, self.speeds),
            *depth_tables(self.facts, self.curves, self.time_crossings),
            replace(fairness_table(self.card, self.facts), detail=True),
        )
        return tuple(table for table in found if table.rows and len(table.columns) > 1)

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values, for other programs."""
        return {
            "labels": list(self.labels),
            "comparisons": [comparison_as_json(c, self.facts, self.card) for c in self.comparisons],
            "extrapolation": [sweep_as_json(sweep) for sweep in self.sweeps],
            "training": {"status": self.training.status, "text": self.training.text, "share": self.training.share},
            "signals": [{"task": s.task, "metric": s.metric, "valid": s.valid, "text": s.text} for s in self.signals],
            "speed": [speed_as_json(s) for s in self.speeds],
            "time_crossovers": [crossing_as_json(c) for c in self.time_crossings],
            "fairness": self.card.as_json(),
            "gates": gates_of(self.facts.run),
        }


def assess(run: Run, points: Sequence[Point] | None = None) -> Assessment:
    """Apply every rule to a run."""
    facts = Facts(run, points_of(run) if points is None else points)
    card, training = card_of(facts), sufficiency_of(facts)
    signals = signals_of(facts)
    comparisons = comparisons_of(facts, card, training, signals)
    timed = timed_of(run)
    curves = tuple(curves_of(timed))
    times = (speeds_of(facts, timed), curves, crossings_of(facts, curves))
    return Assessment(facts, card, training, comparisons, sweeps_of(facts), signals, *times)
