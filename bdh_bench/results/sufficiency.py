"""Were the models trained long enough that long contexts could show at all?

A yardstick (a model without learning) shows what context is worth in this corpus: its gain in bits per byte from the shortest
context to T. Where the best transformer captures less than 20 % of that gain, the comparison is *undertrained*: its models do not use
even the context they were trained on, so nothing follows about longer ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bdh_bench.results.contenders import QUALITY, TRANSFORMER, YARDSTICK, Facts
from bdh_bench.results.display import count, number, signed
from bdh_bench.results.tables import Point

LEAST_SHARE = 0.20
Status = Literal["sufficient", "undertrained", "not judged"]


@dataclass(frozen=True)
class Sufficiency:
    """The answer, a sentence, the cells behind it, and the share of the yardstick's gain that was captured."""

    status: Status
    text: str
    cells: tuple[str, ...] = ()
    share: float | None = None

    @property
    def undertrained(self) -> bool:
        return self.status == "undertrained"


def sufficiency_of(facts: Facts) -> Sufficiency:
    """Whether the best transformer of the run uses context, measured by the run's yardstick."""
    yardsticks = facts.of_kind(YARDSTICK)
    if not yardsticks:
        return Sufficiency("not judged", "no yardstick: no model without learning shows what context is worth here")
    if not facts.of_kind(TRANSFORMER):
        return Sufficiency("not judged", "no transformer was measured beside the yardstick")
    if facts.train_context is None:
        return Sufficiency("not judged", "the training context is not known")
    for yardstick in yardsticks:
        span = _span(facts, yardstick)
        if span:
            return _judge(facts, yardstick, span)
    return Sufficiency("not judged", f"the yardstick has no two contexts up to {count(facts.train_context)} bytes")


def _span(facts: Facts, model: str, ends: tuple[int, int] | None = None, target: str = "") -> list[Point]:
    """Points at the shortest context and at T (or at these ends), on the same targets."""
    points = [p for p in facts.select(model, QUALITY) if p.context <= (facts.train_context or 0) and p.target_hash]
    points = [p for p in points if p.target_hash == (target or points[0].target_hash)]
    short, long = ends or (min((p.context for p in points), default=0), facts.train_context)
    chosen = [p for p in points if p.context in (short, long)]
    return chosen if short != long and {p.context for p in chosen} == {short, long} else []


def _gain(points: Sequence[Point]) -> float:
    """bpb(shortest) − bpb(T), as means over the seeds."""
    short = min(p.context for p in points)
    ends = [[float(p.value or 0) for p in points if (p.context == short) is first] for first in (True, False)]
    return sum(ends[0]) / len(ends[0]) - sum(ends[1]) / len(ends[1])


def _judge(facts: Facts, yardstick: str, span: list[Point]) -> Sufficiency:
    ends = (min(p.context for p in span), max(p.context for p in span))
    worth = _gain(span)
    rows = {m: _span(facts, m, ends, span[0].target_hash) for m in facts.of_kind(TRANSFORMER)}
    rows = {m: points for m, points in rows.items() if points and all(p.weights != "random" for p in points)}
    where = f"from {count(ends[0])} to {count(ends[1])} bytes of context"
    if not rows:
        return Sufficiency("not judged", f"no trained transformer was scored {where} on the yardstick's targets")
    if worth <= 0:
        return Sufficiency("not judged", f"the yardstick itself gains nothing {where} ({signed(worth)} bits per byte)")
    best = min(rows, key=lambda m: _at(rows[m], ends[1]))
    gained = _gain(rows[best])
    share = gained / worth
    cells = tuple(dict.fromkeys(key for p in (*span, *rows[best]) for key in p.cells))
    ratio = f", {number(round(100 * share))} % of it" if gained > 0 else ""
    text = (
        f"{where} the best transformer, {facts.label(best)}, {'gains' if gained > 0 else 'loses'} {number(abs(gained))} bits per byte "
        f"where the yardstick {facts.label(yardstick)} gains {number(worth)}{ratio} ({100 * LEAST_SHARE:.0f} % are needed)"
    )
    return Sufficiency("undertrained" if share < LEAST_SHARE else "sufficient", text, cells, share)


def _at(points: Sequence[Point], context: int) -> float:
    values = [float(p.value or 0) for p in points if p.context == context]
    return sum(values) / len(values)
