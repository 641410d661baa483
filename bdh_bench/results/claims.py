"""What may be said about a run, by rules, and what may not?

Every sentence is made from points, names the cells behind it and says what it is a statement about. A difference between
trained models is a statement about these checkpoints; a statement about architectures needs training seeds. Winners and
matches are named by ``decisions`` alone; no time is ranked on a single round; and where models were trained too little to
use context, no sentence about long contexts is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bdh_bench.results import statistics
from bdh_bench.results.answer import lines_of
from bdh_bench.results.assessment import Assessment, assess
from bdh_bench.results.claim import Claim, Kind
from bdh_bench.results.comparisons import Comparison, headline
from bdh_bench.results.contenders import QUALITY, TRANSFORMER, Facts
from bdh_bench.results.decisions import RANKING, Why
from bdh_bench.results.depth import crossing_sentence
from bdh_bench.results.display import count, number, quantity, signed, signed_interval
from bdh_bench.results.extrapolation import WORSE_BY, Sweep
from bdh_bench.results.open_questions import open_of
from bdh_bench.results.rounds import point_of
from bdh_bench.results.speed import SpeedComparison, ratio_text, verdict_text
from bdh_bench.results.state_crossover import Census, StateCrossover, census_of
from bdh_bench.results.store import Run
from bdh_bench.results.tables import Point, finite
from bdh_bench.results.thresholds import SOLVED, first_below
from bdh_bench.results.validity import Signal

#: How a line of ``Answer.verdicts`` on quality is read.
VERDICTS_MEAN = "Differences in bits per byte on the same targets: below 0, the model named first is better."


@dataclass(frozen=True)
class Answer:
    """What a reader sees first: labelled lines, a verdict per pair, what stays open; the sentences behind them, and all the rules made.

    Every statement of ``claims`` on quality is in ``verdicts`` too, in short: a view shows these first and the others on request.
    """

    lines: tuple[Claim, ...]
    verdicts: tuple[Claim, ...]
    open: tuple[Claim, ...]
    claims: tuple[Claim, ...]
    assessment: Assessment

    @property
    def details(self) -> tuple[Claim, ...]:
        """The claims that no verdict says already in the same words."""
        return tuple(claim for claim in self.claims if claim not in self.verdicts)


def answer_of(run: Run, points: Sequence[Point] | None = None) -> Answer:
    """The answer of a run to the question of the project."""
    known = assess(run, points)
    facts = known.facts
    by_pair = [list(_quality(known, *pair)) for pair in facts.pairs()]
    quality = [claim for claims in by_pair for claim in claims]
    memory = list(_memory(known))
    latency = list(_latency(known))
    first = (*_training(known), *_signals(known), *_regimes(known))
    rest = (*_contexts(known), *_references(known), *memory, *latency, *_limits(facts), *_failures(facts))
    claims = (*quality, *first, *rest)
    verdicts = (*first, *_verdicts(known, quality), *memory)
    return Answer(lines_of(known), verdicts, tuple(open_of(known, quality, memory, latency)), claims, known)


# -- quality ---------------------------------------------------------------------------------------------------------


def _quality(known: Assessment, first: str, second: str) -> Iterator[Claim]:
    """Two models at the primary contexts and at the longest that both reached; not past T where training was too short."""
    facts = known.facts
    if not facts.select(first, QUALITY) and not facts.select(second, QUALITY):
        return
    made = _comparisons(known, first, second)
    if made and all(c.decision.has(Why.REGIME) for c in made):
        return  # said once for all of them
    same = [c for c in made if c.difference is not None]
    if not same:
        why = [reason.text for reason in made[0].decision.reasons] if made else []
        yield Claim(
            f"{facts.label(first)} and {facts.label(second)} were not compared: "
            f"there is no context at which both scored the same bytes{f' ({why[0]})' if why else ''}.",
            _cells(facts.select(first, QUALITY) + facts.select(second, QUALITY)),
            "quality",
            "not decided",
            "quality",
        )
    for comparison in headline(same):
        if not comparison.decision.has(Why.UNDERTRAINED):
            yield _comparison(facts, comparison)


def _comparisons(known: Assessment, first: str, second: str) -> list[Comparison]:
    return [c for c in known.comparisons if (c.first, c.second) == (first, second) and c.point.metric == QUALITY]


def _verdicts(known: Assessment, quality: Sequence[Claim]) -> Iterator[Claim]:
    """One line per pair, all its contexts together; a reason that stands against every one of them is said once, at the end."""
    facts = known.facts
    lines: list[list[Comparison]] = []
    for pair in facts.pairs():
        made = [c for c in headline(_comparisons(known, *pair)) if c.difference is not None]
        made = [c for c in made if not (c.decision.has(Why.UNDERTRAINED) or c.decision.has(Why.REGIME))]
        lines += [made] if made else []
    every = [c for line in lines for c in line]
    shared = [r.text for r in every[0].decision.reasons if r.why in RANKING] if every else []
    shared = [text for text in shared if all(text in {r.text for r in c.decision.reasons} for c in every)]
    yield from (_line_of(facts, line, shared) for line in lines)
    if shared:
        text = f"None of these differences is ranked: {'; '.join(shared)}."
        yield Claim(
            text, _cells(p for c in every for pair in c.pairs for p in pair), "this run", "not decided", "quality"
        )
    yield from (claim for claim in quality if "were not compared" in claim.text)


def _line_of(facts: Facts, line: Sequence[Comparison], shared: Sequence[str]) -> Claim:
    a, b = facts.label(line[0].first), facts.label(line[0].second)
    parts = []
    for c in line:
        assert c.difference is not None  # _verdicts asks for these only
        apart = f"{signed(c.difference.value)} {signed_interval(c.difference.low, c.difference.high)}"
        parts.append(f"{apart} after {count(c.context)} bytes{_remark(c, a, b, shared)}")
    seeds = "" if line[0].claim == "checkpoint" else f" ({len(line[0].pairs)} seeds)"
    text = f"{a} minus {b}{seeds}: {'; '.join(parts)}."
    decided = any(c.decision.verdict != "undecided" for c in line)
    scope = "these checkpoints" if line[0].claim == "checkpoint" else "architectures"
    cells = tuple(dict.fromkeys(key for c in line for key in c.cells))
    return Claim(text, cells, scope, "measured" if decided else "not decided", "quality")


def _remark(c: Comparison, a: str, b: str, shared: Sequence[str]) -> str:
    """The verdict of one context in brackets; nothing where only what is said for all stands against a winner."""
    if c.decision.verdict in ("better", "worse"):
        return f" ({a if c.decision.verdict == 'better' else b} is ahead)"
    if c.decision.verdict == "equivalent":
        return " (equivalent)"
    ranking = [r.text for r in c.decision.reasons if r.why in RANKING]
    why = [text for text in ranking or [r.text for r in c.decision.reasons] if text not in shared]
    return f" ({'not ranked' if ranking else 'not decided'}: {'; '.join(why)})" if why else ""


def _comparison(facts: Facts, c: Comparison) -> Claim:
    """The sentence of one comparison, and its short form for the paragraph."""
    assert c.difference is not None  # _quality asks for these only
    a, b = facts.label(c.first), facts.label(c.second)
    unit = c.point.unit
    values = [statistics.t_interval([float(pair[i].value or 0) for pair in c.pairs]).value for i in (0, 1)]
    scores = (number(values[0], unit), number(values[1], unit))
    apart = f"{signed(c.difference.value)} {signed_interval(c.difference.low, c.difference.high)}"
    documents = count(c.documents) + (
        f" documents in {count(c.evidence.documents)} clusters" if c.documents != c.evidence.documents else " documents"
    )
    least = f", least difference that would be found {number(c.mde, unit)}" if c.mde is not None else ""
    at = f"{count(c.context)} bytes of context"
    if c.claim == "checkpoint":
        scored = (
            f"this {a} checkpoint scored {scores[0]} bits per byte, this {b} checkpoint {scores[1]}; paired difference"
        )
    else:
        scored = f"{a} scored {scores[0]} bits per byte and {b} {scores[1]} (means over {len(c.pairs)} seeds)"
        scored += "; difference paired by seed"
    verdict = _verdict(c, a, b)
    text = f"At {at} {scored} {apart} over {documents}{least}; {verdict}{'' if verdict.endswith('.') else '.'}"
    short = f"at {at} {a} scored {scores[0]} and {b} {scores[1]} bits per byte ({apart}, "
    short += f"{'not ranked' if c.decision.verdict == 'undecided' else verdict})"
    kind: Kind = "not decided" if c.decision.verdict == "undecided" else "measured"
    scope = "these checkpoints" if c.claim == "checkpoint" else "architectures"
    return Claim(text, c.cells, scope, kind, "quality", short, c.context)


def _verdict(c: Comparison, a: str, b: str) -> str:
    """The verdict in words, with why nothing is decided where nothing is."""
    ahead, noun = a if c.decision.verdict == "better" else b, " checkpoint" if c.claim == "checkpoint" else ""
    if c.decision.verdict in ("better", "worse"):
        recipe = "" if c.claim == "checkpoint" else " with this recipe and this size"
        return f"the {ahead}{noun} is ahead" if noun else f"{ahead} is ahead{recipe}"
    if c.decision.verdict == "equivalent":
        inner = c.difference.inner if c.difference else None
        within = f"90 % interval {signed_interval(*inner)}" if inner else "both intervals"
        why = ", ".join(reason.text for reason in c.decision.reasons)
        return f"equivalent: {within} inside ±{number(c.evidence.margin)} bits per byte; no winner: {why}"
    reasons = c.decision.reasons
    if c.decision.has(Why.FEW_SEEDS_TO_RANK) and {r.why for r in reasons if r.why in RANKING} == {
        Why.FEW_SEEDS_TO_RANK
    }:
        return "shown, not ranked"
    ranking = [r.text for r in reasons if r.why in RANKING and r.why is not Why.FEW_SEEDS_TO_RANK]
    return ", ".join(ranking) or "not decided: " + ", ".join(r.text for r in reasons)


# -- context ---------------------------------------------------------------------------------------------------------


def _training(known: Assessment) -> Iterator[Claim]:
    """Whether the models learned enough for a sentence about contexts."""
    training = known.training
    if training.undertrained:
        text = f"Undertrained: {training.text}; no sentence about longer contexts is written."
        yield Claim(text, training.cells, "this run", "measured", "context")


def _signals(known: Assessment) -> Iterator[Claim]:
    """Tasks that nobody learned are invalid; of the others, how far each model solves them."""
    for signal in known.signals:
        if signal.valid:
            yield from _solved(known.facts, signal)
        else:
            text = f"{signal.task} is invalid, {signal.text}: nothing about memory follows from its numbers."
            yield Claim(text, signal.cells, "this run", "not decided", "validity")


def _solved(facts: Facts, signal: Signal) -> Iterator[Claim]:
    """Up to how many pairs, or what length, each model answers at least 0.9 of the questions."""
    parts, used = [], []
    for model in facts.contenders:
        own = [p for p in facts.select(model, signal.metric) if p.task == signal.task]
        place = "pairs" if any("pairs" in dict(p.axes) for p in own) else ""
        own = [p for p in own if not place or dict(p.axes).get("axis") == place]
        curve: dict[float, list[float]] = {}
        for p in own:
            curve.setdefault(float(dict(p.axes).get(place) or p.context), []).append(float(p.value or 0))
        if curve:
            used += own
            parts.append(
                f"{facts.label(model)} {_reach({x: sum(ys) / len(ys) for x, ys in curve.items()}, place or 'tokens')}"
            )
    if parts:
        text = f"{signal.task}: at least {SOLVED:g} of the answers are right (read between measured places) for {'; '.join(parts)}."
        yield Claim(text, _cells(used), "these checkpoints", "measured", "validity")


def _reach(curve: Mapping[float, float], unit: str) -> str:
    end = first_below(list(curve.items()), SOLVED)
    if curve[min(curve)] < SOLVED:
        return f"at no measured place ({number(curve[min(curve)], 'share')} at {count(min(curve))} {unit})"
    if end is None:
        return f"everywhere up to {count(max(curve))} {unit}"
    return f"up to about {count(end.at)} {unit}"


def _regimes(known: Assessment) -> Iterator[Claim]:
    """Models that were trained in different ways: which they are, and that they are not ranked against each other."""
    facts = known.facts
    groups: dict[str, list[str]] = {}
    for model in facts.contenders:
        if regime := facts.regime(model):
            groups.setdefault(regime, []).append(model)
    if len(groups) > 1:
        listed = "; ".join(f"{regime}: {', '.join(map(facts.label, models))}" for regime, models in groups.items())
        text = f"Trained under different regimes, and never ranked across them: {listed}."
        cells = tuple({c.model: c.key for c in reversed(facts.run.cells) if "training" in c.facts}.values())
        yield Claim(text, cells, "this run", "measured", "regime")


def _contexts(known: Assessment) -> Iterator[Claim]:
    if known.training.undertrained:
        return
    for sweep in known.sweeps:
        if sweep.model in known.facts.contenders:
            yield _context(known.facts, sweep)


def _context(facts: Facts, sweep: Sweep) -> Claim:
    """What the longest context is worth to one model: against T where it goes past T, else against its shortest."""
    first, last = sweep.steps[0], sweep.steps[-1]
    past = sweep.beyond[-1] if sweep.beyond else None
    start = sweep.base if past and sweep.base else first.context
    samples = {p.context: facts.documents_over_seeds(p) for p in sweep.points}
    change = (past and past.beyond) or statistics.paired_difference(
        samples[last.context], samples[start], facts.clusters
    )
    units = "blocks" if facts.blocks else "documents"
    why_not = "random weights: quality is not ranked" if any(p.weights == "random" for p in sweep.points) else ""
    if not why_not and change.low is None:
        why_not = f"{count(change.n)} {units} are too few for an interval: not decided"
    if past:
        verdict = {
            "uses": "it uses context beyond its training context",
            "flat": "flat: the interval contains 0, so beyond its training context it neither gains nor loses",
            "degrades": "it degrades beyond its training context",
        }.get(str(past.verdict), "")
        verdict += (
            f"; worse by more than {WORSE_BY} from {count(sweep.first_worse)} bytes on" if sweep.first_worse else ""
        )
        verdict += f"; {sweep.halfway.text}" if sweep.halfway else ""
    elif change.contains_zero:
        why_not = why_not or "the interval contains 0: whether it uses the longer context is not decided"
        verdict = ""
    else:
        verdict = "it uses the longer context" if change.value < 0 else "the longer context makes it worse"
    if sweep.effective is not None and not why_not:
        verdict += f"; effective context {count(sweep.effective)} bytes"
    subject = f"this {facts.label(sweep.model)} checkpoint changes"
    if sweep.seeds > 1:
        subject = f"these {sweep.seeds} {facts.label(sweep.model)} checkpoints change on average"
    text = (
        f"On the same targets {subject} by {signed(change.value)} bits per byte "
        f"{signed_interval(change.low, change.high)} from {count(start)} to {count(last.context)} bytes of "
        f"context, over {count(change.n)} {units}; {why_not or verdict}."
    )
    kind: Kind = "not decided" if why_not else "measured"
    return Claim(text, _cells(sweep.points), "this checkpoint", kind, "context")


def references_of(run: Run) -> list[tuple[str, float, str]]:
    """(name, bits per byte, target hash) of the manifest's byte models that learn nothing from training."""
    found = []
    for reference in run.manifest.get("references") or []:
        value = finite(reference.get("bits_per_byte"))
        if value is not None:
            found.append((str(reference.get("name", "")), float(value), str(reference.get("target_hash") or "")))
    return found


def _references(known: Assessment) -> Iterator[Claim]:
    """One sentence for every set of targets: which models are below the best reference, at their longest context."""
    facts = known.facts
    references = references_of(facts.run)
    longest = facts.train_context if known.training.undertrained else None
    groups: dict[tuple[str, float], list[Point]] = {}
    for model in facts.contenders:
        points = [p for p in facts.select(model, QUALITY) if longest is None or p.context <= longest]
        point = max(points, key=lambda p: p.context, default=None)
        same = [r for r in references if point and r[2] in ("", point.target_hash)]
        if point is not None and same:
            name, value, _ = min(same, key=lambda r: r[1])
            groups.setdefault((name, value), []).append(point)
    for (name, value), points in groups.items():
        unit = points[0].unit
        sides = []
        for side, chosen in (
            ("below it", [p for p in points if float(p.value or 0) < value]),
            ("not below it", [p for p in points if float(p.value or 0) >= value]),
        ):
            each = ", ".join(
                f"{facts.label(p.model)} with {number(p.value, unit)} after {count(p.context)} bytes" for p in chosen
            )
            sides += [f"{side}: {each}"] if chosen else []
        text = f"The best reference without a network, {name}, needs {number(value, unit)} bits per byte; {'; '.join(sides)}."
        if len(sides) == 2 or sides[0].startswith("not"):
            text += " A model that is not below it is undertrained: nothing about long contexts follows from it."
        yield Claim(text, _cells(points), "these checkpoints", "measured", "reference")


# -- memory and time -------------------------------------------------------------------------------------------------


def _memory(known: Assessment) -> Iterator[Claim]:
    facts = known.facts
    for model in facts.machines():
        if curve := census_of(facts, model):
            yield _growth(facts, model, curve)
    for crossover in known.card.crossovers:
        if crossover.found is not None:
            yield _crossing(facts, crossover)


def _apart(facts: Facts) -> list[tuple[str, str]]:
    """The pairs whose bytes and times can differ."""
    machines = set(facts.machines())
    return [pair for pair in facts.pairs() if set(pair) <= machines]


def _growth(facts: Facts, model: str, curve: Census) -> Claim:
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
        what = "cache" if facts.kind[model] == TRANSFORMER else "state"
        text = f"{name}'s {what} grows to {last} per stream at {count(contexts[-1])} bytes of context (from {first} at "
        text += f"{count(contexts[0])})."
    else:
        text = (
            f"{name}'s state is between {quantity(min(values), 'byte')} and {quantity(max(values), 'byte')} ({grid})."
        )
    return Claim(text, _cells(point for _, point in curve.values()), "state per stream", kind, "memory")


def _crossing(facts: Facts, c: StateCrossover) -> Claim:
    """T* of two states, and who keeps less past it; a formula that the census contradicts says nothing."""
    assert c.found is not None  # _memory asks for these only
    names = {"first": facts.label(c.first), "second": facts.label(c.second), "": "neither"}
    states = f"The states of {names['first']} and {names['second']}"
    less = f"{names[c.found.lower]} keeps less"
    kind: Kind = "measured"
    if c.contradicted:
        text, kind = f"Where {states[0].lower()}{states[1:]} are equal is not decided: {c.remark}.", "not decided"
    elif not c.found.at:
        text = f"{states} are nowhere equal up to {count(c.found.reach)} bytes of context: {less} ({c.remark})."
    else:
        kind = "not decided" if c.found.kind == "extrapolated" else "measured"
        text = f"{states} are equal at {c.text.replace(' (', ' bytes of context (', 1)}; beyond it {less} ({c.remark})."
    return Claim(text, c.cells, "state per stream", kind, "memory")


def _latency(known: Assessment) -> Iterator[Claim]:
    """Each pair at the longest context at which both were timed alike, least batch; decided by the ratio over paired rounds."""
    for metric, what in (("tpot_s", "per output token"), ("prefill_s", "for prefill")):
        for first, second in _apart(known.facts):
            made = [
                s for s in known.speeds if (s.first.model, s.second.model, s.first.metric) == (first, second, metric)
            ]
            made = [s for s in made if not s.best_of_each]
            if made:
                yield _speed(known.facts, max(made, key=lambda s: (s.first.context, -s.first.batch_size)), what)
    for crossing in known.time_crossings:
        if crossing.found.rounds > 1:  # of a single round the ratio above says all there is
            kind: Kind = "measured" if crossing.found.decided else "not decided"
            yield Claim(crossing_sentence(known.facts, crossing), crossing.cells, "this machine", kind, "time")


def _speed(facts: Facts, s: SpeedComparison, what: str) -> Claim:
    names = [facts.label(t.model) for t in (s.first, s.second)]
    took = [quantity(point_of(t.rounds), "s") for t in (s.first, s.second)]
    marks = "".join(f", {mark}" for mark in sorted({*s.first.marks, *s.second.marks}))
    runtime = f", runtime {s.runtime}" if s.runtime else ""
    decided = s.ratio.verdict != "not decided"
    said = {"faster": f"{names[0]} is faster", "slower": f"{names[1]} is faster"}
    if s.ratio.rounds == 1:
        verdict = "single round: not decided"
    else:
        verdict = f"{said.get(s.ratio.verdict, verdict_text(s.ratio))} ({count(s.ratio.rounds)} rounds)"
    at = f"{count(s.first.context)} bytes of context"
    text = f"At {at} {names[0]} took {took[0]} {what}, {names[1]} {took[1]} (ratio {ratio_text(s.ratio)}{runtime}{marks}); {verdict}."
    short = f"at {count(s.first.context)} bytes {names[0]} took {took[0]} {what}, {names[1]} {took[1]} ({verdict})"
    return Claim(text, s.cells, "this machine", "measured" if decided else "not decided", "time", short)


# -- limits and failures --------------------------------------------------------------------------------------------


def _limits(facts: Facts) -> Iterator[Claim]:
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


def _failures(facts: Facts) -> Iterator[Claim]:
    failed = [cell for cell in facts.run.cells if cell.kind == "failed"]
    pending = [cell for cell in facts.run.cells if cell.kind == "pending"]
    total = count(len(facts.run.cells))
    for cells, what in ((failed, "failed"), (pending, "have no result yet")):
        if cells:
            names = ", ".join(dict.fromkeys(f"{cell.model} on {cell.task}" for cell in cells))
            text = f"{count(len(cells))} of {total} cells {what}: {names}."
            yield Claim(text, tuple(cell.key for cell in cells), "this run", "not decided", "failure")


def _cells(points: Iterable[Point]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key for point in points for key in point.cells))
