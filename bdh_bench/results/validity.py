"""Did anybody learn what a task lets its models practise? If nobody did, its numbers say nothing about memory, and rank nothing.

* ``recall``: attention can solve it, so it is the proof that practice sufficed. Where no transformer of the run reaches 0.99 at 4 pairs in
  64 tokens, the task is *invalid*: no signal.
* ``induction``, ``copy``: where no model reaches 0.9 at any length, the same.

The best seed counts: one model that learned it shows that it can be learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bdh_bench.results.contenders import TRANSFORMER, Facts
from bdh_bench.results.display import number
from bdh_bench.results.tables import Point

SHARE = "share"


@dataclass(frozen=True)
class Rule:
    """Who must reach how much, and where."""

    least: float
    who: str  # a kind of model, or "" for any contender
    where: str
    counts: Callable[[Point], bool]


def _easiest_recall(point: Point) -> bool:
    axes = dict(point.axes)
    return (axes.get("axis"), axes.get("pairs"), point.context) == ("pairs", 4, 64)


RULES: Mapping[str, Rule] = {
    "recall_accuracy": Rule(0.99, TRANSFORMER, "at 4 pairs in 64 tokens", _easiest_recall),
    "induction_accuracy": Rule(0.9, "", "at any length", lambda point: True),
    "copy_accuracy": Rule(0.9, "", "at any length", lambda point: True),
}


@dataclass(frozen=True)
class Signal:
    """Whether one task of a run has a signal, in words, and the cells behind it."""

    task: str
    metric: str
    valid: bool
    text: str
    cells: tuple[str, ...]


def signals_of(facts: Facts) -> tuple[Signal, ...]:
    """One per task that lets its models practise."""
    found = dict.fromkeys((p.task, p.metric) for p in facts.points if p.metric in RULES)
    return tuple(_signal(facts, task, metric) for task, metric in found)


def without_signal(signals: Sequence[Signal]) -> dict[str, Signal]:
    """task → why it is invalid, for those that are."""
    return {signal.task: signal for signal in signals if not signal.valid}


def _signal(facts: Facts, task: str, metric: str) -> Signal:
    rule = RULES[metric]
    own = [p for p in facts.points if (p.task, p.metric) == (task, metric)]
    eligible = [m for m in facts.contenders if rule.who in ("", facts.kind[m])]
    scored = [p for p in own if p.model in eligible and p.value is not None and rule.counts(p)]
    cells = tuple(dict.fromkeys(key for p in scored or own for key in p.cells))
    who = rule.who or "model"
    if not scored:
        return Signal(task, metric, False, f"no signal: no {who} was examined {rule.where}", cells)
    best = max(scored, key=lambda p: float(p.value or 0))
    reached = f"{facts.label(best.model)} answered {number(best.value, SHARE)} right"
    chance = dict(best.axes).get("chance")
    if isinstance(chance, float):
        reached += f", chance is {number(chance, SHARE)}"
    if float(best.value or 0) >= rule.least:
        return Signal(task, metric, True, f"{reached} {rule.where}", best.cells)
    text = f"no signal: no {who} reaches {rule.least:g} {rule.where} (the best, {reached})"
    return Signal(task, metric, False, text, cells)
