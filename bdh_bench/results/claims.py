"""What may be said about a run, by rules, and what may not?

Every sentence is made from points, names the cells behind it and says what it is a statement about. A difference between
trained models is a statement about these checkpoints; a statement about architectures needs training seeds. No winner is
named on a paired interval that contains 0, a difference too small to be found, or too few documents; no time is ranked
on a single round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from bdh_bench.results import statistics
from bdh_bench.results.display import count, number, quantity, signed, signed_interval
from bdh_bench.results.statistics import Estimate
from bdh_bench.results.store import Run
from bdh_bench.results.tables import HASH_AXIS, Point, finite, points_of, samples_of

Kind = Literal["measured", "not decided"]
SUBJECT = "bdh"
CONTROLS = frozenset({"toy"})
CACHES = frozenset({"gpt2", "llama", "hf"})
QUALITY = "bits_per_byte"
FEWEST_DOCUMENTS = 20
SEEDS_TO_SHOW = 3
SEEDS_TO_RANK = 5
SMALLEST_DIFFERENCE = 0.005
ARCHITECTURES_OPEN = f"Architectures: not decided — run with --seeds {SEEDS_TO_RANK}."


@dataclass(frozen=True)
class Claim:
    """One sentence, the cells behind it, what it speaks about, and whether it decides anything."""

    text: str
    evidence: tuple[str, ...]
    scope: str
    kind: Kind
    topic: str = ""
    short: str = ""


@dataclass(frozen=True)
class Answer:
    """What a reader sees first: one paragraph, what stays open, and the sentences behind both."""

    paragraph: Claim
    open: tuple[Claim, ...]
    claims: tuple[Claim, ...]


def answer_of(run: Run, points: Sequence[Point] | None = None) -> Answer:
    """The answer of a run to the question of the project."""
    facts = _Facts(run, points_of(run) if points is None else points)
    quality = list(_quality(facts))
    memory = list(_memory(facts))
    latency = list(_latency(facts))
    claims = (*quality, *_gains(facts), *_references(facts), *memory, *latency, *_limits(facts), *_failures(facts))
    paragraph = _paragraph(facts, claims)
    return Answer(paragraph, tuple(_open(facts, quality, memory, latency)), claims)


class _Facts:
    """The points and records of a run by what the rules ask for."""

    def __init__(self, run: Run, points: Sequence[Point]) -> None:
        self.run = run
        self.points = [point for point in points if point.seed is not None]
        self.models = list(dict.fromkeys(cell.model for cell in run.cells))
        self.family = {cell.model: cell.family for cell in run.cells}
        self.seeds = len({cell.seed for cell in run.cells})
        self.contenders = [m for m in self.models if self.family[m] not in CONTROLS]
        own = [m for m in self.contenders if self.family[m] == SUBJECT]
        self.subjects = own or self.contenders[:1]
        self.samples: dict[tuple[Any, ...], dict[str, tuple[float, float]]] = {}
        rows: dict[tuple[Any, ...], list[Any]] = {}
        for r in run.records:
            rows.setdefault((r.model, r.seed, r.metric_id, r.context, str(r.axes.get(HASH_AXIS) or "")), []).append(r)
        self.samples = {key: samples_of(group) for key, group in rows.items() if group[0].metric == QUALITY}

    def label(self, model: str) -> str:
        """The family where it names one model only, else the whole name."""
        family = self.family[model]
        return family if list(self.family.values()).count(family) == 1 else model

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Each subject with each other contender, once."""
        for subject in self.subjects:
            yield from ((subject, other) for other in self.contenders if other not in self.subjects)
        yield from pairwise(self.subjects)

    def select(self, model: str, metric: str) -> list[Point]:
        """Points of one model and metric that have a value, by context."""
        found = [p for p in self.points if p.model == model and p.metric == metric and p.value is not None]
        return sorted(found, key=lambda p: p.context)

    def documents(self, point: Point) -> dict[str, tuple[float, float]]:
        """The scored documents of a quality point."""
        key = (point.model, point.seed, point.metric_id, point.context, point.target_hash)
        return self.samples.get(key, {})

    def stopped(self, model: str) -> Point | None:
        """The first point of a quality sweep that the model could not take."""
        gone = [p for p in self.points if p.model == model and p.metric == QUALITY and p.status == "unsupported"]
        return min(gone, key=lambda p: p.context, default=None)


# -- quality ---------------------------------------------------------------------------------------------------------


def _quality(facts: _Facts) -> Iterator[Claim]:
    for first, second in facts.pairs():
        if not facts.select(first, QUALITY) and not facts.select(second, QUALITY):
            continue
        matched = _matched(facts, first, second)
        if not matched:
            yield Claim(
                f"{facts.label(first)} and {facts.label(second)} were not compared: "
                "there is no context at which both scored the same bytes.",
                _cells(facts.select(first, QUALITY) + facts.select(second, QUALITY)),
                "quality",
                "not decided",
                "quality",
            )
        elif len(matched) < SEEDS_TO_SHOW:
            yield _checkpoint_claim(facts, *matched[0])
        else:
            yield _architecture_claim(facts, matched)


def _matched(facts: _Facts, first: str, second: str) -> list[tuple[Point, Point]]:
    """The two models at their longest common context on the same targets, one pair per common seed."""
    theirs = {
        (p.seed, p.context, p.metric_id, p.target_hash): p for p in facts.select(second, QUALITY) if p.target_hash
    }
    pairs = [
        (p, theirs[key])
        for p in facts.select(first, QUALITY)
        if (key := (p.seed, p.context, p.metric_id, p.target_hash)) in theirs
    ]
    longest = max((p.context for p, _ in pairs), default=0)
    chosen = [pair for pair in pairs if pair[0].context == longest]
    same = (chosen[0][0].metric_id, chosen[0][0].target_hash) if chosen else ("", "")
    return [pair for pair in chosen if (pair[0].metric_id, pair[0].target_hash) == same]


def _checkpoint_claim(facts: _Facts, one: Point, two: Point) -> Claim:
    difference = statistics.paired_difference(facts.documents(one), facts.documents(two))
    a, b = facts.label(one.model), facts.label(two.model)
    text = (
        f"At {count(one.context)} bytes of context this {a} checkpoint scored {number(one.value, one.unit)} bits per byte, "
        f"this {b} checkpoint {number(two.value, two.unit)}; paired difference {signed(difference.value)} "
        f"{signed_interval(difference.low, difference.high)} over {count(difference.n)} documents"
    )
    why_not = _untrained(one, two) or _no_winner(difference, difference.n)
    verdict = why_not or f"the {a if difference.value < 0 else b} checkpoint is ahead"
    decided: Kind = "not decided" if why_not else "measured"
    short = _in_short(one.context, (a, number(one.value, one.unit)), (b, number(two.value, two.unit)), difference)
    short += f"{'not ranked' if why_not else verdict})"
    text = f"{text}; {verdict}. {ARCHITECTURES_OPEN}"
    return Claim(text, _cells([one, two]), "these checkpoints", decided, "quality", short)


def _in_short(context: int, first: tuple[str, str], second: tuple[str, str], difference: Estimate) -> str:
    """The comparison for the paragraph, with the bracket left open for its verdict."""
    return (
        f"at {count(context)} bytes of context {first[0]} scored {first[1]} and {second[0]} {second[1]} bits per byte "
        f"({signed(difference.value)} {signed_interval(difference.low, difference.high)}, "
    )


def _architecture_claim(facts: _Facts, matched: Sequence[tuple[Point, Point]]) -> Claim:
    one, two = matched[0]
    a, b = facts.label(one.model), facts.label(two.model)
    means = [statistics.t_interval([float(pair[i].value or 0) for pair in matched]).value for i in (0, 1)]
    difference = statistics.t_interval([float(p.value or 0) - float(q.value or 0) for p, q in matched])
    documents = min(len(set(facts.documents(p)) & set(facts.documents(q))) for p, q in matched)
    text = (
        f"At {count(one.context)} bytes of context {a} scored {number(means[0], one.unit)} bits per byte and {b} "
        f"{number(means[1], one.unit)} (means over {len(matched)} seeds); difference paired by seed "
        f"{signed(difference.value)} {signed_interval(difference.low, difference.high)} over {count(documents)} documents"
    )
    why_not = _untrained(one, two) or _no_winner(difference, documents)
    if why_not:
        verdict, decided = f"{why_not}. Architectures: not decided", False
    elif len(matched) < SEEDS_TO_RANK:
        verdict, decided = f"shown, not ranked. {ARCHITECTURES_OPEN.rstrip('.')}", False
    else:
        verdict, decided = f"{a if difference.value < 0 else b} is ahead with this recipe and this size", True
    evidence = _cells(point for pair in matched for point in pair)
    kind: Kind = "measured" if decided else "not decided"
    short = _in_short(one.context, (a, number(means[0], one.unit)), (b, number(means[1], one.unit)), difference)
    short += f"{verdict if decided else 'not ranked'})"
    return Claim(f"{text}; {verdict}.", evidence, "architectures", kind, "quality", short)


def _untrained(*points: Point) -> str:
    return "random weights: quality is not ranked" if any(p.weights == "random" for p in points) else ""


def _no_winner(difference: Estimate, documents: int) -> str:
    """Why no winner may be named; nothing where one may."""
    if documents < FEWEST_DOCUMENTS:
        return f"smoke: not ranked ({count(documents)} documents, {FEWEST_DOCUMENTS} are needed)"
    if difference.contains_zero:
        return "not decided: the interval contains 0"
    least = max(SMALLEST_DIFFERENCE, difference.mde or 0.0)
    if abs(difference.value) < least:
        return f"not decided: smaller than {least:.3f}, the least difference that would be found"
    return ""


def _gains(facts: _Facts) -> Iterator[Claim]:
    for model in facts.contenders:
        points = facts.select(model, QUALITY)
        points = [p for p in points if p.seed == points[0].seed and p.target_hash]
        ends = [p for p in points if p.target_hash == points[0].target_hash]
        if len({p.context for p in ends}) >= 2:
            yield _gain(facts, ends[0], ends[-1])


def _gain(facts: _Facts, short: Point, long: Point) -> Claim:
    change = statistics.paired_difference(facts.documents(long), facts.documents(short))
    why_not = _untrained(long)
    if not why_not and change.low is None:
        why_not = f"{count(change.n)} documents are too few for an interval: not decided"
    if not why_not and change.contains_zero:
        why_not = "the interval contains 0: whether it uses the longer context is not decided"
    verdict = "it uses the longer context" if change.value < 0 else "the longer context makes it worse"
    text = (
        f"On the same targets this {facts.label(long.model)} checkpoint changes by {signed(change.value)} bits per byte "
        f"{signed_interval(change.low, change.high)} from {count(short.context)} to {count(long.context)} bytes of "
        f"context, over {count(change.n)} documents; {why_not or verdict}."
    )
    kind: Kind = "not decided" if why_not else "measured"
    return Claim(text, _cells([short, long]), "this checkpoint", kind, "context")


def references_of(run: Run) -> list[tuple[str, float, str]]:
    """(name, bits per byte, target hash) of the manifest's byte models that learn nothing from training."""
    found = []
    for reference in run.manifest.get("references") or []:
        value = finite(reference.get("bits_per_byte"))
        if value is not None:
            found.append((str(reference.get("name", "")), float(value), str(reference.get("target_hash") or "")))
    return found


def _references(facts: _Facts) -> Iterator[Claim]:
    references = references_of(facts.run)
    for model in facts.contenders:
        point = max(facts.select(model, QUALITY), key=lambda p: p.context, default=None)
        same = [r for r in references if point and r[2] in ("", point.target_hash)]
        if point is None or point.value is None or not same:
            continue
        name, value, _ = min(same, key=lambda r: r[1])
        side = "below" if point.value < value else "not below"
        remark = (
            "" if side == "below" else " Such a model is undertrained: nothing about long contexts follows from it."
        )
        text = (
            f"The best reference without a network, {name}, needs {number(value, point.unit)} bits per byte; this "
            f"{facts.label(model)} checkpoint is {side} it with {number(point.value, point.unit)} at "
            f"{count(point.context)} bytes of context.{remark}"
        )
        yield Claim(text, point.cells, "this checkpoint", "measured", "reference")


# -- memory and time -------------------------------------------------------------------------------------------------


def _memory(facts: _Facts) -> Iterator[Claim]:
    curves = {model: _per_stream(facts.select(model, "state_bytes")) for model in facts.contenders}
    for model, curve in curves.items():
        if curve:
            yield _growth(facts, model, curve)
    for first, second in facts.pairs():
        claim = _crossing(facts, curves[first], curves[second])
        if claim:
            yield claim


def _per_stream(points: Sequence[Point]) -> dict[int, tuple[float, Point]]:
    """context → (bytes per stream, point), from the smallest batch of each context."""
    curve: dict[int, tuple[float, Point]] = {}
    for point in sorted(points, key=lambda p: (p.context, p.batch_size)):
        curve.setdefault(point.context, (float(point.value or 0) / max(1, point.batch_size), point))
    return curve


def _growth(facts: _Facts, model: str, curve: Mapping[int, tuple[float, Point]]) -> Claim:
    name, contexts = facts.label(model), list(curve)
    values = [value for value, _ in curve.values()]
    first, last = quantity(values[0], "byte"), quantity(values[-1], "byte")
    grid = f"{count(contexts[0])} to {count(contexts[-1])} bytes"
    kind: Kind = "measured"
    if len(values) == 1:
        text = (
            f"{name} keeps {first} per stream at {count(contexts[0])} bytes of context; one context decides no growth."
        )
        kind = "not decided"
    elif len(set(values)) == 1:
        text = f"{name} keeps {first} per stream at every measured context ({grid})."
    elif all(a < b for a, b in pairwise(values)):
        what = "cache" if facts.family[model] in CACHES else "state"
        text = f"{name}'s {what} grows to {last} per stream at {count(contexts[-1])} bytes of context (from {first} at "
        text += f"{count(contexts[0])})."
    else:
        text = (
            f"{name}'s state is between {quantity(min(values), 'byte')} and {quantity(max(values), 'byte')} ({grid})."
        )
    return Claim(text, _cells(point for _, point in curve.values()), "state per stream", kind, "memory")


def _crossing(
    facts: _Facts, one: Mapping[int, tuple[float, Point]], two: Mapping[int, tuple[float, Point]]
) -> Claim | None:
    grid = [c for c in sorted(set(one) & set(two)) if c > 0 and one[c][0] > 0 and two[c][0] > 0]
    if len(grid) < 2:
        return None
    a, b = (facts.label(curve[grid[0]][1].model) for curve in (one, two))
    evidence = _cells(curve[c][1] for curve in (one, two) for c in grid)
    logs = {c: math.log(one[c][0] / two[c][0]) for c in grid}
    for left, right in pairwise(grid):
        text = ""
        if logs[left] != 0 and logs[right] == 0:
            text = f"The states of {a} and {b} are equal at {count(right)} bytes of context."
        elif logs[left] * logs[right] < 0:
            at = crossing_between(left, right, logs[left], logs[right])
            text = (
                f"The states of {a} and {b} are equal at about {count(at)} bytes of context (interpolated between "
                f"{count(left)} and {count(right)}); at {count(right)} bytes {a if logs[right] < 0 else b} keeps less."
            )
        if text:
            return Claim(text, evidence, "state per stream", "measured", "memory")
    last = grid[-1]
    ratio = one[last][0] / two[last][0]
    relation = "as much as" if ratio == 1 else f"{number(ratio)} times the bytes of"
    text = (
        f"The states of {a} and {b} do not cross between {count(grid[0])} and {count(last)} bytes of context: "
        f"at {count(last)} bytes {a} keeps {relation} {b}."
    )
    return Claim(text, evidence, "state per stream", "measured", "memory")


def crossing_between(left: int, right: int, log_left: float, log_right: float) -> float:
    """Context at which the log ratio is 0, on a straight line in log context."""
    share = log_left / (log_left - log_right)
    return math.exp(math.log(left) + share * (math.log(right) - math.log(left)))


def _latency(facts: _Facts) -> Iterator[Claim]:
    for metric, what in (("tpot_s", "per output token"), ("prefill_s", "for prefill")):
        for first, second in facts.pairs():
            pair = _same_load(facts.select(first, metric), facts.select(second, metric))
            if pair:
                yield _speed(facts, *pair, what)


def _same_load(ours: Sequence[Point], theirs: Sequence[Point]) -> tuple[Point, Point] | None:
    """Both models at their longest common context with the same batch and seed."""
    other: dict[tuple[int, int, int | None], Point] = {}
    for point in theirs:
        other.setdefault((point.context, point.batch_size, point.seed), point)
    pairs = [(p, other[key]) for p in ours if (key := (p.context, p.batch_size, p.seed)) in other]
    return max(pairs, key=lambda pair: (pair[0].context, -pair[0].batch_size), default=None)


def _speed(facts: _Facts, one: Point, two: Point, what: str) -> Claim:
    ratio = float(one.value or 0) / float(two.value) if two.value else math.nan
    marks = {p.status for p in (one, two)} - {"ok"}
    text = (
        f"At {count(one.context)} bytes of context {facts.label(one.model)} took {quantity(one.value, 's')} {what}, "
        f"{facts.label(two.model)} {quantity(two.value, 's')} (ratio {number(ratio)}"
        f"{''.join(f', {mark}' for mark in sorted(marks))}); single round: not decided."
    )
    short = f"at {count(one.context)} bytes {facts.label(one.model)} took {quantity(one.value, 's')} {what}, "
    short += f"{facts.label(two.model)} {quantity(two.value, 's')}"
    return Claim(text, _cells([one, two]), "this machine", "not decided", "time", short)


# -- limits, failures, the paragraph ---------------------------------------------------------------------------------


def _limits(facts: _Facts) -> Iterator[Claim]:
    for model in facts.contenders:
        stop, reached = facts.stopped(model), facts.select(model, QUALITY)
        if stop is None:
            continue
        cell = next((c for c in facts.run.cells if c.key in stop.cells), None)
        limit = finite(cell.facts.get("max_positions")) if cell else None
        has = f" has {count(limit)} learned positions:" if limit and facts.family[model] == "gpt2" else ""
        has = has or (f" has {count(limit)} positions:" if limit else ":")
        last = (
            f"it stopped at {count(reached[-1].context)} bytes of context"
            if reached
            else "it took no context of the grid"
        )
        text = f"{facts.label(model)}{has} {last}; its input was never truncated to make {count(stop.context)} fit."
        yield Claim(text, _cells([*reached[-1:], stop]), "position limit", "measured", "limit")


def _failures(facts: _Facts) -> Iterator[Claim]:
    failed = [cell for cell in facts.run.cells if cell.kind == "failed"]
    pending = [cell for cell in facts.run.cells if cell.kind == "pending"]
    total = count(len(facts.run.cells))
    for cells, what in ((failed, "failed"), (pending, "have no result yet")):
        if cells:
            names = ", ".join(dict.fromkeys(f"{cell.model} on {cell.task}" for cell in cells))
            text = f"{count(len(cells))} of {total} cells {what}: {names}."
            yield Claim(text, tuple(cell.key for cell in cells), "this run", "not decided", "failure")


def _paragraph(facts: _Facts, claims: Sequence[Claim]) -> Claim:
    """The answer in one paragraph: what is decided at all, then quality, bytes and time."""
    quality = [claim for claim in claims if claim.topic == "quality"]
    decided = any(claim.kind == "measured" for claim in quality)
    parts, evidence = [_headline(facts, quality)], []
    for title, topic, end in (
        ("Quality", "quality", ""),
        ("Bytes", "memory", ""),
        ("Time", "time", " (single round: not decided)"),
    ):
        chosen = [claim for claim in claims if claim.topic == topic][: 3 if topic == "memory" else 2]
        sentences = "; ".join((claim.short or claim.text).rstrip(".") for claim in chosen)
        parts.append(f"{title}: {sentences}{end}." if chosen else f"{title}: not measured in this run.")
        evidence += [key for claim in chosen for key in claim.evidence]
    if facts.seeds < SEEDS_TO_RANK:
        parts.append(ARCHITECTURES_OPEN)
    kind: Kind = "measured" if decided else "not decided"
    return Claim(" ".join(parts), tuple(dict.fromkeys(evidence)), "this run", kind, "answer")


def _headline(facts: _Facts, quality: Sequence[Claim]) -> str:
    if _is_smoke(facts.run):
        return "Not decided: this was a smoke run, which shows that everything works and not who is better."
    if not quality:
        return "Not decided: this run compares no quality."
    decided = sum(claim.kind == "measured" for claim in quality)
    if not decided:
        return "Not decided by this run."
    who = "between designs" if facts.seeds >= SEEDS_TO_RANK else "between these checkpoints"
    return f"Decided {who} in {decided} of {len(quality)} comparisons of quality."


def _is_smoke(run: Run) -> bool:
    return "smoke" in (run.manifest.get("labels") or [])


def _open(
    facts: _Facts, quality: Sequence[Claim], memory: Sequence[Claim], latency: Sequence[Claim]
) -> Iterator[Claim]:
    """What this run does not decide, one plain sentence each."""

    def undecided(text: str, claims: Iterable[Claim] = (), scope: str = "this run") -> Claim:
        evidence = tuple(dict.fromkeys(key for claim in claims for key in claim.evidence))
        return Claim(text, evidence, scope, "not decided", "open")

    if facts.seeds < SEEDS_TO_RANK:
        seeds = f"{facts.seeds} training seed{'' if facts.seeds == 1 else 's'}, {SEEDS_TO_RANK} are needed"
        yield undecided(f"Which architecture has the better quality ({seeds}).", quality, "architectures")
    unranked = [claim for claim in quality if claim.kind == "not decided"]
    if unranked:
        yield undecided(f"Which checkpoint is ahead in {len(unranked)} of {len(quality)} comparisons.", unranked)
    if not quality:
        yield undecided("Quality: no two models scored the same bytes.")
    if not memory:
        yield undecided("Bytes: the state was not measured.")
    if latency:
        yield undecided("Which model is faster: one round in one process is no ranking.", latency, "this machine")
    else:
        yield undecided("Time: no two models were timed at the same context.")
    longest = max((p.context for p in facts.points if p.value is not None), default=0)
    if longest:
        yield undecided(f"Anything beyond {count(longest)} bytes of context.")
    sizes = _sizes(facts)
    if len(sizes) > 1 and max(sizes.values()) > 1.05 * min(sizes.values()):
        listed = ", ".join(f"{facts.label(model)} {count(size)}" for model, size in sizes.items())
        yield undecided(f"What equal sizes would show: the parameters differ by more than 5 % ({listed}).")


def _sizes(facts: _Facts) -> dict[str, float]:
    found: dict[str, float] = {}
    for cell in facts.run.cells:
        size = finite(cell.facts.get("parameters"))
        if size and cell.model in facts.contenders:
            found.setdefault(cell.model, size)
    return found


def _cells(points: Iterable[Point]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key for point in points for key in point.cells))
