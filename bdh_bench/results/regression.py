"""Has a run become worse than another one, of the same models on the same machine? The gate behind ``bdh-bench compare A B``.

Points of A and B are matched by model, task, metric, metric id, context, batch, seed and axes; each pair has the ratio B/A with an
interval, and a verdict. A rule such as ``tpot_s:5%`` says how much worse a metric may get. A pair is a *regression* where

* times and peaks (reduction ``median``): a two-sided Mann-Whitney test over rounds gives p < 0.002, and the effect is more than the rule
  allows, in *every* B run that is given (a second run of B must see it again). It needs seven rounds per side: with six against six the
  smallest possible p is 0.0022. With one run of B a regression is reported as *seen once* and fails the gate too, so that a gate on one run
  is not silently open; the table says which,
* integers (``exact``): any difference beyond the rule, since they repeat exactly,
* quality (``ratio`` and ``share``): the same targets, documents paired, the 95 % interval of the difference on the wrong side of 0, and an
  effect beyond the rule.

Different machines are not compared: processor, cores, memory, device and threads must be the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from bdh_bench.errors import SpecError
from bdh_bench.metrics import METRICS, Metric, metric
from bdh_bench.results.display import GAP, count, number, quantity
from bdh_bench.results.resampling import RESAMPLES, SEED
from bdh_bench.results.rounds import FEWEST_ROUNDS, Rounds, grouped, interval_of, point_of, resampled
from bdh_bench.results.statistics import mean_difference, median, weighted_ratio
from bdh_bench.results.store import Run
from bdh_bench.results.tables import Entry, Table, clusters_of, finite, frozen_axes, samples_of
from bdh_bench.types import Record

Verdict = Literal["regression", "better", "no regression", "not decided", "not compared"]
MOST_P = 0.002
ROUNDS_FOR_GATE = 7
_RULE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*:\s*(\d+(?:\.\d+)?)\s*(%?)\s*\Z")
_HARDWARE = ("cpu", "cores", "memory_bytes", "gpus", "gpu")
_SETTINGS = ("device", "threads")


@dataclass(frozen=True)
class Rule:
    """How much worse a metric may get, as a share of what it was."""

    metric: str
    allowed: float


@dataclass(frozen=True)
class Change:
    """One point of A and B. ``ratio`` is B/A; ``p`` of a test over rounds; ``seen`` in how many of the B runs it is a regression."""

    model: str
    task: str
    metric: str
    context: int
    batch_size: int
    axes: tuple[tuple[str, Any], ...]
    before: float | None
    after: float | None
    ratio: float | None
    low: float | None
    high: float | None
    p: float | None
    rounds: tuple[int, int]
    verdict: Verdict
    reason: str
    seen: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Report:
    """Everything that was compared; ``refused`` is why nothing was."""

    first: str
    second: tuple[str, ...]
    rules: tuple[Rule, ...]
    changes: tuple[Change, ...]
    refused: str = ""

    @property
    def regressions(self) -> list[Change]:
        return [c for c in self.changes if c.verdict == "regression"]

    @property
    def exit_code(self) -> int:
        """4 where a rule was broken, 5 where nothing could be compared (of what the rules name, if there are rules)."""
        if self.regressions:
            return 4
        named = {rule.metric for rule in self.rules}
        usable = [c for c in self.changes if c.ratio is not None and (not named or c.metric in named)]
        return 0 if usable else 5


def parse_rules(text: str) -> tuple[Rule, ...]:
    """``tpot_s:5%,state_bytes:0``. Raises SpecError, and UnknownNameError for a metric that does not exist."""
    rules = []
    for part in filter(str.strip, text.split(",")):
        found = _RULE.match(part)
        if not found:
            raise SpecError(f"got --fail-on {part.strip()!r} · expected METRIC:SHARE", "for example tpot_s:5%")
        known = metric(found[1])
        if known.better == "neither":
            raise SpecError(f"got --fail-on {known.name} · expected a metric of which more or less is better")
        rules.append(Rule(known.name, float(found[2]) / (100 if found[3] else 1)))
    return tuple(rules)


def compare(first: Run, second: Sequence[Run], rules: Sequence[Rule] = ()) -> Report:
    """The first run against each of the second ones, judged together."""
    names = tuple(run.id for run in second)
    if why := next((why for run in second if (why := unlike(first, run))), ""):
        return Report(first.id, names, tuple(rules), (), why)
    allowed = {rule.metric: rule.allowed for rule in rules}
    before, after = _points(first), [_points(run) for run in second]
    clusters = clusters_of(first)
    changes = []
    for key, rows in before.items():
        sides = [found[key] for found in after if key in found]
        if sides:
            each = [_change(key, rows, side, allowed.get(key[2]), clusters) for side in sides]
            changes.append(_together(each, len(second)))
    return Report(first.id, names, tuple(rules), tuple(changes))


def unlike(first: Run, second: Run) -> str:
    """Why the machines of two runs are not the same; "" where they are."""
    for what, names in (("environment", _HARDWARE), ("spec", _SETTINGS)):
        one, two = (_mapping(run.manifest.get(what)) for run in (first, second))
        for name in names:
            if one.get(name) != two.get(name):
                return f"different hardware: {what} {name} is {one.get(name)!r} in {first.id} and {two.get(name)!r} in {second.id}"
    return ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


_Key = tuple[Any, ...]


def _points(run: Run) -> dict[_Key, list[Record]]:
    """The records that have a value, by what must be the same on both sides."""
    found: dict[_Key, list[Record]] = {}
    for r in run.records:
        known = METRICS.get(r.metric)
        if known is None or known.better == "neither" or finite(r.value) is None:
            continue
        key = (r.model, r.task, r.metric, r.metric_id, r.context, r.batch_size, r.seed, frozen_axes(r.axes))
        found.setdefault(key, []).append(r)
    return found


# -- one point -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    """Both values, the interval of their ratio, what a test over rounds says, and why nothing is decided, where nothing is."""

    before: float
    after: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    rounds: tuple[int, int] = (0, 0)
    sure: bool = False
    doubt: str = ""


def _change(
    key: _Key, before: Sequence[Record], after: Sequence[Record], allowed: float | None, clusters: Mapping[str, str]
) -> Change:
    known = METRICS[key[2]]
    how = {"exact": _exact, "median": _times}.get(known.reduction)
    found = how(before, after) if how else _quality(before, after, clusters)
    about = (key[0], key[1], key[2], key[4], key[5], key[7])
    if isinstance(found, str):
        return Change(*about, None, None, None, None, None, None, (0, 0), "not compared", found)
    ratio = found.after / found.before if found.before else (1.0 if found.after == found.before else math.inf)
    verdict, reason = _verdict(known, found, ratio, allowed)
    shown = ratio if math.isfinite(ratio) else None
    return Change(
        *about, found.before, found.after, shown, found.low, found.high, found.p, found.rounds, verdict, reason
    )


def _verdict(known: Metric, found: _Measured, ratio: float, allowed: float | None) -> tuple[Verdict, str]:
    """What the rule makes of it; without a rule for the metric, any sure difference is told and none is a regression."""
    worse = ratio - 1 if known.better == "lower" else 1 - ratio
    if not found.sure:
        return ("not decided", found.doubt) if found.doubt else ("no regression", "no sure difference")
    if worse < 0:
        return "better", ""
    if allowed is None:
        return "no regression", "no rule for this metric" if worse > 0 else ""
    if worse > allowed:
        return "regression", f"worse by {worse:.1%}, {allowed:.1%} are allowed"
    return "no regression", "within what is allowed" if worse > 0 else ""


def _exact(before: Sequence[Record], after: Sequence[Record]) -> _Measured | str:
    values = [{finite(r.value) for r in side} for side in (before, after)]
    if any(len(side) != 1 for side in values):
        return "repeats disagree"
    one, two = (float(side.pop() or 0) for side in values)
    return _Measured(one, two, sure=True)


def _times(before: Sequence[Record], after: Sequence[Record]) -> _Measured | str:
    one, two = (grouped((r.round, float(r.value or 0)) for r in side) for side in (before, after))
    values, rounds = (point_of(one), point_of(two)), (len(one), len(two))
    low, high = _apart(one, two) if min(rounds) >= FEWEST_ROUNDS and min(values) > 0 else (None, None)
    p = mann_whitney([median(w) for w in one.values()], [median(w) for w in two.values()])
    if min(rounds) < ROUNDS_FOR_GATE:
        doubt = f"{rounds[0]} and {rounds[1]} rounds, {ROUNDS_FOR_GATE} per side are needed"
        return _Measured(*values, low, high, p, rounds, False, doubt)
    return _Measured(*values, low, high, p, rounds, p < MOST_P)


def _apart(one: Rounds, two: Rounds) -> tuple[float, float]:
    """The interval of two/one: runs are not interleaved, so that rounds are drawn apart."""
    draws = [np.log(resampled([side])[:, 0]) for side in (one, two)]
    order = np.random.default_rng([SEED, 6]).permutation(RESAMPLES)  # else equal counts would draw equal rounds
    low, high = interval_of(draws[1] - draws[0][order], min(len(one), len(two)))
    return math.exp(low), math.exp(high)


def _quality(before: Sequence[Record], after: Sequence[Record], clusters: Mapping[str, str]) -> _Measured | str:
    one, two = samples_of(before), samples_of(after)
    if set(one) != set(two):
        return "not the same documents"
    if any(one[name][1] != two[name][1] for name in one):
        return "not the same targets"
    values = (weighted_ratio(one), weighted_ratio(two))
    apart = mean_difference([(two, one)], clusters)
    if apart.low is None or apart.high is None:
        return _Measured(*values, doubt=f"{apart.units} independent documents are too few for an interval")
    base = values[0]
    low, high = (1 + apart.low / base, 1 + apart.high / base) if base > 0 else (None, None)
    return _Measured(*values, low, high, None, (0, 0), not apart.low <= 0 <= apart.high)


def _together(each: Sequence[Change], runs: int) -> Change:
    """The changes of one point in several B runs: a regression only where every one of them sees it."""
    seen = sum(c.verdict == "regression" for c in each)
    first = each[0]
    if 0 < seen < runs:
        chosen = next(c for c in each if c.verdict == "regression")
        return replace(
            chosen, verdict="not decided", reason=f"seen in {seen} of {runs} runs: {chosen.reason}", seen=(seen, runs)
        )
    if seen:
        again = "seen once: give a second run of B to confirm it" if runs == 1 else f"seen in all {runs} runs"
        exact = METRICS[first.metric].reduction == "exact"
        return replace(first, reason=first.reason if exact else f"{first.reason}; {again}", seen=(seen, runs))
    worst = next((c for c in each if c.verdict in ("not decided", "not compared")), first)
    return replace(worst, seen=(0, runs))


# -- the test --------------------------------------------------------------------------------------------------------


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of the rank-sum test: exact without ties and up to twenty values a side, else the normal form with ties.

    Mann and Whitney 1947; the exact distribution by their recurrence.
    """
    m, n = len(first), len(second)
    if not m or not n:
        return 1.0
    above = sum((a > b) + 0.5 * (a == b) for a in first for b in second)
    least = min(above, m * n - above)
    tied = len({*first, *second}) < m + n
    if not tied and max(m, n) <= 20:
        ways = _ways(m, n)
        return min(1.0, 2 * sum(ways[: int(least) + 1]) / math.comb(m + n, m))
    counts = np.unique(np.array([*first, *second]), return_counts=True)[1].astype(float)
    total = m + n
    spread = m * n / 12 * (total + 1 - float((counts**3 - counts).sum()) / (total * (total - 1))) if total > 1 else 0.0
    if spread <= 0:
        return 1.0
    return min(1.0, math.erfc(max(0.0, m * n / 2 - least - 0.5) / math.sqrt(2 * spread)))


@lru_cache(maxsize=64)
def _ways(m: int, n: int) -> tuple[int, ...]:
    """How many orders of m and n values have the statistic 0, 1, … m·n: coefficients of the Gaussian binomial."""
    ways = [1] + [0] * (m * n)
    for i in range(1, m + 1):
        for u in range(m * n, n + i - 1, -1):  # times 1 − q^(n+i)
            ways[u] -= ways[u - n - i]
        for u in range(i, m * n + 1):  # over 1 − q^i
            ways[u] += ways[u - i]
    return tuple(ways)


# -- views -----------------------------------------------------------------------------------------------------------


def comparison_rows(report: Report) -> Iterator[tuple[Change, dict[str, str]]]:
    """A row of text per change, what the rules name first."""
    named = {rule.metric for rule in report.rules}
    for c in sorted(report.changes, key=lambda c: (c.verdict != "regression", c.metric not in named)):
        unit = METRICS[c.metric].unit
        ends = f" [{number(c.low)}, {number(c.high)}]" if c.low is not None else ""
        axes = " ".join(f"{name}={value}" for name, value in c.axes if name != "target_hash")
        yield (
            c,
            {
                "model": c.model,
                "task": c.task,
                "metric": c.metric,
                "context": count(c.context),
                "batch": count(c.batch_size),
                "axes": axes,
                "before": quantity(c.before, unit),
                "after": quantity(c.after, unit),
                "ratio": f"{number(c.ratio)}{ends}" if c.ratio is not None else GAP,
                "verdict": c.verdict,
                "why": c.reason,
            },
        )


def baseline_table(report: Report) -> Table:
    """The comparison with a baseline as a table of the report."""
    rows = tuple(
        (Entry(row["model"]), *(Entry(row[name]) for name in ("task", "metric", "context", "before", "after", "ratio")),
         Entry(c.verdict, c.reason))
        for c, row in comparison_rows(report)
    )  # fmt: skip
    columns = ("model", "task", "metric", "context", "baseline", "this run", "ratio", "verdict")
    note = report.refused[:1].upper() + report.refused[1:]
    return Table("table-baseline", f"Against the baseline {report.first}", "Ratio: this run over it.", columns, rows, note)  # fmt: skip


def as_json(report: Report) -> dict[str, Any]:
    """The comparison for other programs."""
    return {
        "first": report.first,
        "second": list(report.second),
        "rules": [{"metric": rule.metric, "allowed": rule.allowed} for rule in report.rules],
        "regressions": len(report.regressions),
        "refused": report.refused,
        "changes": [
            {
                "model": c.model, "task": c.task, "metric": c.metric, "context": c.context, "batch_size": c.batch_size,
                "axes": dict(c.axes), "before": c.before, "after": c.after, "ratio": c.ratio, "low": c.low, "high": c.high, "p": c.p,
                "rounds": list(c.rounds), "verdict": c.verdict, "reason": c.reason, "seen_in": c.seen[0], "of_runs": c.seen[1],
            }
            for c in report.changes
        ],
    }  # fmt: skip
