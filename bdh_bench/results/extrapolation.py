"""What is a longer context worth to one model, and does it hold up beyond the context it was trained on?

All from the same-target sweep of one model, paired by document (each document's mean over the seeds); T is the training context.

* gain(c) = bpb(c_min) − bpb(c); slope = change of bits per byte per doubling of context between two neighbours,
* effective context: the smallest c for which the upper 95 % limit of bpb(c) − bpb(c_max) is below 0.005,
* beyond T: the 95 % interval of bpb(L) − bpb(T) lies below 0 (*uses* it), contains 0 (*flat*) or lies above (*degrades*); and the
  first L with bpb(L) > bpb(T) + 0.05,
* half of the training: the same verdict of the same model with the weights of half its training bytes, at one context beyond T. Where it
  is another than that of the last weights there, more training changes how far the model reaches.
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
HALFWAY = "halfway_bits_per_byte"
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
class Halfway:
    """bpb(context) − bpb(T) at half of the training with its verdict, and the verdict of the last weights at that context."""

    context: int
    change: Estimate
    verdict: Verdict
    final: Verdict

    @property
    def differs(self) -> bool:
        """Whether more training changed the verdict; what is undecided says nothing."""
        return self.verdict != self.final and "undecided" not in (self.verdict, self.final)

    @property
    def text(self) -> str:
        """For a sentence on the last weights."""
        where = f"at {count(self.context)} bytes"
        if "undecided" in (self.verdict, self.final):
            return f"whether more training changes that is not decided {where}"
        if self.differs:
            then = f"was {self.verdict!r} at half of the training and is {self.final!r} at its end"
            return f"more training changes it: {where} the verdict {then}"
        return f"{where} the verdict was {self.verdict!r} at half of the training already"


@dataclass(frozen=True)
class Sweep:
    """What longer contexts are worth to one model.

    effective     smallest sufficient context; None where documents are too few to say
    first_worse   first L > T with bpb(L) > bpb(T) + 0.05
    base          T, where it was measured; None otherwise
    halfway       the verdict at half of the training; None where that was not measured
    """

    model: str
    base: int | None
    steps: tuple[Step, ...]
    effective: int | None
    first_worse: int | None
    seeds: int
    points: tuple[Point, ...]
    halfway: Halfway | None = None

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
    half = _halfway(facts, model, line[contexts[0]][0], base, steps)
    return Sweep(model, base, tuple(steps), next(reached, None), min(worse, default=None), seeds, chosen, half)


def _halfway(facts: Facts, model: str, like: Point, base: int | None, steps: Sequence[Step]) -> Halfway | None:
    """From the scores with the weights of half the training, at T and at the longest context beyond it."""
    final = {step.context: step.verdict for step in steps if step.verdict}
    points = {
        p.context: p
        for p in facts.select(model, HALFWAY)
        if (p.task, p.target_hash) == (like.task, like.target_hash) and p.context in (base, *final)
    }
    longest = max(points, default=0)
    verdict = final.get(longest)
    if base not in points or verdict is None:
        return None
    at = [facts.documents_over_seeds(points[c]) for c in (longest, base)]
    change = statistics.paired_difference(at[0], at[1], facts.clusters)
    return Halfway(longest, change, verdict_of(change), verdict)


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
        "first worse by 0.05", "at half of the training",
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
        _entry_halfway(sweep.halfway, undertrained),
    )


def _entry_halfway(half: Halfway | None, undertrained: bool) -> Entry:
    if half is None:
        return Entry("not measured")
    at = f"at {count(half.context)}: {signed(half.change.value)} {signed_interval(half.change.low, half.change.high)}"
    return Entry("undertrained" if undertrained else f"{half.verdict}, then {half.final}", at)


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
        "halfway": _halfway_as_json(sweep.halfway),
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


def _halfway_as_json(half: Halfway | None) -> dict[str, Any] | None:
    if half is None:
        return None
    change = half.change
    about = {"context": half.context, "change": change.value, "low": change.low, "high": change.high}
    return {**about, "verdict": half.verdict, "final": half.final, "differs": half.differs}
