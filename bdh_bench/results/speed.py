"""Which of two models is faster in a run, at which context, and is it more than noise?

A comparison is the ratio of two medians over paired rounds (``rounds``). Only rows of the same task, metric, context, batch and
*runtime* are paired: the same weights can run many times faster compiled than not, so a ratio across runtimes says nothing of models.
"Best of each", whatever its runtime, is made only where a run has several runtimes, and is labelled so everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bdh_bench.metrics import METRICS
from bdh_bench.results.contenders import Facts
from bdh_bench.results.display import count, number
from bdh_bench.results.rounds import Ratio, Rounds, grouped, noise_of, point_of, ratio_of
from bdh_bench.results.store import Run
from bdh_bench.results.tables import Axes, Entry, Table, finite, frozen_axes
from bdh_bench.types import Record

#: What models are compared by, most asked for first.
TIMES = ("tpot_s", "ttft_s", "prefill_s")
RUNTIME = "runtime"


@dataclass(frozen=True)
class Timed:
    """One time of one model at one place, in rounds; a round is named by its seed and number."""

    model: str
    task: str
    metric: str
    context: int
    batch_size: int
    axes: Axes
    rounds: Rounds
    cells: tuple[str, ...]
    marks: tuple[str, ...]

    @property
    def runtime(self) -> str:
        """How the model ran; "" for rows older than this axis, which ran as their files are written."""
        return str(dict(self.axes).get(RUNTIME, ""))

    @property
    def load(self) -> tuple[Any, ...]:
        """What must be the same for a comparison of models."""
        return (self.task, self.metric, self.context, self.batch_size, self.runtime)


@dataclass(frozen=True)
class SpeedComparison:
    """Two models under the same load; ``best_of_each`` where each ran in the runtime that suits it."""

    first: Timed
    second: Timed
    ratio: Ratio
    best_of_each: bool = False

    @property
    def cells(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.first.cells, *self.second.cells)))

    @property
    def runtime(self) -> str:
        """Of both, or of each."""
        if not self.best_of_each:
            return self.first.runtime
        return f"best of each: {self.first.runtime} against {self.second.runtime}"


def timed_of(run: Run) -> list[Timed]:
    """Every time of the run that has values, by model, place and axes."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for r in run.records:
        if r.metric in TIMES and finite(r.value) is not None:
            key = (r.model, r.task, r.metric, r.context, r.batch_size, frozen_axes(r.axes))
            groups.setdefault(key, []).append(r)
    return [
        Timed(
            model,
            task,
            metric,
            context,
            batch,
            axes,
            grouped(((r.seed, r.round), float(r.value or 0)) for r in rows),
            tuple(dict.fromkeys(r.cell for r in rows)),
            tuple(sorted({r.status for r in rows} - {"ok"})),
        )
        for (model, task, metric, context, batch, axes), rows in groups.items()
    ]


def speeds_of(facts: Facts, timed: Sequence[Timed] | None = None) -> tuple[SpeedComparison, ...]:
    """Every pair of the run's models whose times are their own, at every load that both were timed at."""
    timed = timed_of(facts.run) if timed is None else timed
    noise = noise_by_load(timed)
    found = []
    for first, second in comparable_pairs(facts):
        ours, theirs = ([t for t in timed if t.model == model] for model in (first, second))
        same = [(a, b, False) for a in ours for b in theirs if a.load == b.load]
        for a, b, best in (*same, *((a, b, True) for a, b in _best_of_each(ours, theirs))):
            made = _compared(a, b, max((n for t in (a, b) if (n := noise[_pool(t)]) is not None), default=None), best)
            found += [made] if made else []
    return tuple(found)


def comparable_pairs(facts: Facts) -> list[tuple[str, str]]:
    """The pairs whose times can differ, and whose tokens are the same: those of different vocabularies are not comparable."""
    machines = set(facts.machines())
    sizes = {c.model: size for c in facts.run.cells if (size := finite(c.facts.get("vocab_size"))) is not None}
    pairs = [pair for pair in facts.pairs() if set(pair) <= machines]
    return [(a, b) for a, b in pairs if sizes.get(a, sizes.get(b)) == sizes.get(b, sizes.get(a))]


def _compared(a: Timed, b: Timed, noise: float | None, best: bool) -> SpeedComparison | None:
    try:
        return SpeedComparison(a, b, ratio_of(a.rounds, b.rounds, noise), best)
    except ValueError:  # no round in common, or a time that is none
        return None


def noise_by_load(timed: Sequence[Timed]) -> dict[tuple[Any, ...], float | None]:
    """(task, metric, runtime) → the noise of everything that was timed so, in one run."""
    pools: dict[tuple[Any, ...], list[Rounds]] = {}
    for t in timed:
        pools.setdefault(_pool(t), []).append(t.rounds)
    return {key: noise_of(rounds) for key, rounds in pools.items()}


def _pool(timed: Timed) -> tuple[Any, ...]:
    return (timed.task, timed.metric, timed.runtime)


def _best_of_each(ours: Sequence[Timed], theirs: Sequence[Timed]) -> Iterator[tuple[Timed, Timed]]:
    """The fastest of each at every place, where that is in different runtimes."""
    places = dict.fromkeys((t.metric, t.context, t.batch_size) for t in ours)
    for place in places:
        best = [
            min((t for t in side if (t.metric, t.context, t.batch_size) == place), key=_point, default=None)
            for side in (ours, theirs)
        ]
        one, two = best
        if one and two and one.runtime != two.runtime:
            yield one, two


def _point(timed: Timed) -> float:
    return point_of(timed.rounds)


# -- views -----------------------------------------------------------------------------------------------------------


def ratio_text(ratio: Ratio) -> str:
    """0.82 [0.80, 0.84]"""
    if ratio.low is None or ratio.high is None:
        return number(ratio.value)
    return f"{number(ratio.value)} [{number(ratio.low)}, {number(ratio.high)}]"


def verdict_text(ratio: Ratio) -> str:
    """The verdict, with what stands against one."""
    if ratio.verdict == "within noise":
        return f"within noise of ±{ratio.threshold:.1%}"
    return f"not decided: {ratio.reason}" if ratio.reason else ratio.verdict


def speed_tables(facts: Facts, speeds: Sequence[SpeedComparison]) -> list[Table]:
    """One table of ratios per time, a row per pair and runtime; the time per token first, the others are details."""
    tables = []
    for metric in TIMES:
        for best in (False, True):
            chosen = [s for s in speeds if s.first.metric == metric and s.best_of_each is best]
            if chosen:
                tables.append(_speed_table(facts, metric, chosen, best))
    return tables


def _speed_table(facts: Facts, metric: str, speeds: Sequence[SpeedComparison], best: bool) -> Table:
    contexts = sorted({s.first.context for s in speeds})
    rows: dict[tuple[str, ...], dict[int, SpeedComparison]] = {}
    for s in speeds:
        rows.setdefault(_row_name(facts, s), {})[s.first.context] = s
    several = len({s.first.batch_size for s in speeds}) > 1
    body = tuple(
        (
            Entry(name),
            Entry(runtime if not several else f"{runtime}, batch {batch}"),
            *(_entry(found.get(c)) for c in contexts),
        )
        for (name, runtime, batch), found in rows.items()
    )
    label = METRICS[metric].label
    title = f"Ratio of medians: {label}{', best of each (runtimes differ)' if best else ''}"
    meaning = (
        "Below 1 the model named first is faster. Rounds are paired; the interval draws rounds, then windows in them."
    )
    columns = ("models", "runtime", *(f"c = {c:,}" for c in contexts))
    made = Table(f"table-speed-{metric}{'-best' if best else ''}", title, meaning, columns, body)
    return replace(made, detail=best or metric != TIMES[0])


def _row_name(facts: Facts, s: SpeedComparison) -> tuple[str, str, str]:
    name = f"{facts.label(s.first.model)} / {facts.label(s.second.model)}"
    apart = [f"{n}={v}" for t in (s.first, s.second) for n, v in t.axes if n not in (RUNTIME, "axis")]
    return name + (f" ({', '.join(dict.fromkeys(apart))})" if apart else ""), s.runtime, str(s.first.batch_size)


def _entry(s: SpeedComparison | None) -> Entry:
    if s is None:
        return Entry("—", "not planned")
    marks = ", ".join(dict.fromkeys((*s.first.marks, *s.second.marks)))
    note = f"{verdict_text(s.ratio)}; {count(s.ratio.rounds)} rounds{f'; {marks}' if marks else ''}"
    return Entry(f"{ratio_text(s.ratio)} {s.ratio.verdict}", note)


def speed_as_json(s: SpeedComparison) -> dict[str, Any]:
    """A comparison for other programs."""
    finite_threshold = s.ratio.threshold if math.isfinite(s.ratio.threshold) else None
    return {
        "first": s.first.model,
        "second": s.second.model,
        "metric": s.first.metric,
        "context": s.first.context,
        "batch_size": s.first.batch_size,
        "runtime": s.runtime,
        "best_of_each": s.best_of_each,
        "ratio": s.ratio.value,
        "low": s.ratio.low,
        "high": s.ratio.high,
        "rounds": s.ratio.rounds,
        "threshold": finite_threshold,
        "verdict": s.ratio.verdict,
        "reason": s.ratio.reason,
    }
