"""What is a longer context worth to one model, and does it hold up beyond the context it was trained on?

All from the same-target sweep of one model, paired by document (each document's mean over the seeds); T is the training context.

* gain(c) = bpb(c_min) − bpb(c); slope = change of bits per byte per doubling of context between two neighbours,
* effective context: the smallest c for which the upper 95 % limit of bpb(c) − bpb(c_max) is below 0.005,
* beyond T: the 95 % interval of bpb(L) − bpb(T) lies below 0 (*uses* it), contains 0 (*flat*) or lies above (*degrades*); and the
  first L with bpb(L) > bpb(T) + 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from bdh_bench.results import statistics
from bdh_bench.results.contenders import QUALITY, Facts
from bdh_bench.results.display import GAP, count, signed, signed_interval
from bdh_bench.results.statistics import Estimate
from bdh_bench.results.tables import Entry, Point, Table

Verdict = Literal["uses", "flat", "degrades", "undecided"]
NEGLIGIBLE = 0.005
WORSE_BY = 0.05


@dataclass(frozen=True)
class Step:
    """One context of a model's sweep. ``beyond`` is bpb(c) − bpb(T) where c > T, else None."""

    context: int
    value: float
    gain: float
    slope: float | None
    beyond: Estimate | None
    verdict: Verdict | None


@dataclass(frozen=True)
class Sweep:
    """What longer contexts are worth to one model.

    effective     smallest sufficient context; None where documents are too few to say
    first_worse   first L > T with bpb(L) > bpb(T) + 0.05
    base          T, where it was measured; None otherwise
    """

    model: str
    base: int | None
    steps: tuple[Step, ...]
    effective: int | None
    first_worse: int | None
    seeds: int
    points: tuple[Point, ...]

    @property
    def beyond(self) -> tuple[Step, ...]:
        """The steps past T."""
        return tuple(step for step in self.steps if step.beyond is not None)

    @property
    def verdict(self) -> Verdict | None:
        """At the longest context past T; None where there is none."""
        return self.beyond[-1].verdict if self.beyond else None


def sweeps_of(facts: Facts) -> tuple[Sweep, ...]:
    """One per model, task and set of targets, where at least two contexts were scored."""
    found = []
    for model in facts.models:
        lines: dict[tuple[str, str], dict[int, list[Point]]] = {}
        for point in facts.select(model, QUALITY):
            if point.target_hash:
                lines.setdefault((point.task, point.target_hash), {}).setdefault(point.context, []).append(point)
        found += [_sweep(facts, model, line) for line in lines.values() if len(line) >= 2]
    return tuple(found)


def _sweep(facts: Facts, model: str, line: dict[int, list[Point]]) -> Sweep:
    contexts = sorted(line)
    samples = {c: facts.documents_over_seeds(line[c][0]) for c in contexts}
    values = {c: statistics.weighted_ratio(samples[c]) for c in contexts}
    base = facts.train_context if facts.train_context in line else None
    slopes = {
        right: (values[right] - values[left]) / math.log2(right / left)
        for left, right in pairwise(contexts)
        if left > 0
    }
    steps = []
    for c in contexts:
        past = base is not None and c > base
        beyond = statistics.paired_difference(samples[c], samples[base], facts.clusters) if past and base else None
        gain = values[contexts[0]] - values[c]
        steps.append(Step(c, values[c], gain, slopes.get(c), beyond, verdict_of(beyond) if beyond else None))
    worse = [s.context for s in steps if s.beyond and base and s.value > values[base] + WORSE_BY]
    reached = (
        c
        for c in contexts
        if _no_worse(statistics.paired_difference(samples[c], samples[contexts[-1]], facts.clusters))
    )
    seeds = max(len(points) for points in line.values())
    chosen = tuple(point for c in contexts for point in line[c])
    return Sweep(model, base, tuple(steps), next(reached, None), min(worse, default=None), seeds, chosen)


def verdict_of(change: Estimate) -> Verdict:
    """From the interval of bpb(L) − bpb(T)."""
    if change.low is None or change.high is None:
        return "undecided"
    if change.high < 0:
        return "uses"
    return "degrades" if change.low > 0 else "flat"


def _no_worse(difference: Estimate) -> bool:
    return difference.high is not None and difference.high < NEGLIGIBLE


def extrapolation_table(facts: Facts, sweeps: Sequence[Sweep], note: str = "", undertrained: bool = False) -> Table:
    """One row per model: gains, slope, effective context and the verdict beyond T (none where training was too short)."""
    t = facts.train_context
    columns = (
        "model", "claim", "gain to T", "gain to the longest", "slope per doubling", "effective context", "beyond T", "change",
        "first worse by 0.05",
    )  # fmt: skip
    where = f"T = {count(t)} bytes" if t else "T is not known"
    scope = f"{where}. Statements about these checkpoints, each document's mean over the seeds. {note}".strip()
    meaning = (
        "Bits per byte gained from context, on the same targets; beyond T: uses (95 % interval of bpb(L) − bpb(T) below 0), "
        "flat (contains 0), degrades (above 0)."
    )
    rows = tuple(_row(facts, sweep, undertrained) for sweep in sweeps if sweep.model in facts.contenders)
    return Table("table-extrapolation", "What longer contexts are worth", meaning, columns, rows, scope)


def _row(facts: Facts, sweep: Sweep, undertrained: bool) -> tuple[Entry, ...]:
    last = sweep.steps[-1]
    at_base = next((step for step in sweep.steps if step.context == sweep.base), None)
    beyond = sweep.beyond[-1] if sweep.beyond else None
    change = beyond.beyond if beyond else None
    return (
        Entry(facts.label(sweep.model)),
        Entry("checkpoint"),
        Entry(signed(at_base.gain) if at_base else GAP),
        Entry(signed(last.gain), f"at {count(last.context)}"),
        Entry(signed(last.slope) if last.slope is not None else GAP, "last doubling"),
        Entry(count(sweep.effective) if sweep.effective is not None else GAP),
        Entry(_beyond(beyond, undertrained), f"at {count(beyond.context)}" if beyond else ""),
        Entry(signed(change.value) if change else GAP, signed_interval(change.low, change.high) if change else ""),
        Entry(count(sweep.first_worse) if sweep.first_worse is not None else ("none" if beyond else GAP)),
    )


def _beyond(step: Step | None, undertrained: bool) -> str:
    if step is None:
        return "not measured"
    return "undertrained" if undertrained else str(step.verdict)


def sweep_as_json(sweep: Sweep) -> dict[str, Any]:
    """One sweep as JSON values."""
    return {
        "model": sweep.model,
        "task": sweep.points[0].task,
        "target_hash": sweep.points[0].target_hash,
        "train_context": sweep.base,
        "claim": "checkpoint",
        "seeds": sweep.seeds,
        "effective_context": sweep.effective,
        "first_worse": sweep.first_worse,
        "verdict": sweep.verdict,
        "steps": [
            {
                "context": step.context,
                "value": step.value,
                "gain": step.gain,
                "slope_per_doubling": step.slope,
                "change": step.beyond.value if step.beyond else None,
                "low": step.beyond.low if step.beyond else None,
                "high": step.beyond.high if step.beyond else None,
                "verdict": step.verdict,
            }
            for step in sweep.steps
        ],
    }
