"""What does a reader see first? The question of the project, answered in a few labelled lines, each by rules from rows.

Quality        may the subject (BDH where the run has it) be said to match the strongest transformer that it was compared with?
Long contexts  what context past the training context is worth to both
Memory         the bytes that each model keeps per stream, and from which context on the subject keeps less
Time           the seconds of one output token at the deepest place where both were timed alike
Other models   the subject against everything else
Incomplete     tasks without a signal, cells without a result

The strongest transformer is the one that was compared at the longest context, and of several the one with the fewest bits there. The
word *matches* stands only where the verdict is ``equivalent``; where models were trained too little, nothing past T is compared. A
line without rows says that nothing was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bdh_bench.results.claim import Claim, Kind
from bdh_bench.results.contenders import QUALITY, SUBJECT, TRANSFORMER, Facts
from bdh_bench.results.decisions import Why
from bdh_bench.results.display import count, number, quantity, signed, signed_interval
from bdh_bench.results.rounds import point_of
from bdh_bench.results.speed import ratio_text, verdict_text
from bdh_bench.results.state_crossover import census_of, formula_of
from bdh_bench.results.statistics import t_interval
from bdh_bench.results.tables import finite
from bdh_bench.results.validity import without_signal

if TYPE_CHECKING:
    from bdh_bench.results.assessment import Assessment
    from bdh_bench.results.comparisons import Comparison
    from bdh_bench.results.extrapolation import Sweep
    from bdh_bench.results.speed import SpeedComparison
    from bdh_bench.results.store import CellOutcome

QUESTION = "Does BDH match transformers and state-space models on long contexts without a KV cache?"
#: For somebody who has never heard of any of this.
BACKGROUND = (
    "A transformer remembers the text that it has read in a KV cache, which grows with every byte. BDH, a language model built after a "
    "network of neurons, keeps a memory of fixed size instead, and so do state-space models such as Mamba: if they predict as well, a "
    "context of any length costs the same memory. Compared here: how well each model predicts the next byte of unseen text after a "
    "given number of bytes of context (bits per byte, fewer is better), how many bytes it keeps meanwhile, and how long it takes."
)
#: Models that one line names at the most.
_MOST = 5


def lines_of(known: Assessment) -> tuple[Claim, ...]:
    """The lines of the answer, in the order above; the topic of each is its label."""
    best = _strongest(known)
    made = (
        _quality(known, best),
        _beyond(known, best),
        _memory(known, best),
        _time(known, best),
        _others(known),
        _incomplete(known),
    )
    return tuple(line for line in made if line is not None)


# -- quality ---------------------------------------------------------------------------------------------------------


def _fair(known: Assessment) -> list[Comparison]:
    """Comparisons of bits per byte that a sentence may be made of: never across training regimes, not past T where undertrained."""
    barred = (Why.REGIME, Why.UNDERTRAINED)
    found = [c for c in known.comparisons if c.point.metric == QUALITY and c.difference is not None]
    return [c for c in found if not any(c.decision.has(why) for why in barred)]


def _strongest(known: Assessment) -> Comparison | None:
    """The comparison that the answer is made of: a subject and the strongest transformer."""
    facts = known.facts
    found = [c for c in _fair(known) if c.first in facts.subjects and facts.kind[c.second] == TRANSFORMER]
    order = {model: place for place, model in enumerate(facts.subjects)}
    return min(found, key=lambda c: (-c.context, order[c.first], _means(c)[1]), default=None)


def _means(c: Comparison) -> tuple[float, float]:
    """The scores of both, as means over the seeds that both have."""
    one, two = (t_interval([float(pair[side].value or 0) for pair in c.pairs]).value for side in (0, 1))
    return one, two


def _quality(known: Assessment, best: Comparison | None) -> Claim:
    facts = known.facts
    absent = "" if any(facts.family[m] == SUBJECT for m in facts.contenders) else " BDH was not measured in this run."
    if best is None or best.difference is None:
        text = "Not answered: no model and transformer of this run scored the same bytes under the same training."
        return Claim(text + absent, (), "this run", "not decided", "Quality")
    a, b, unit = facts.label(best.first), facts.label(best.second), best.point.unit
    one, two = _means(best)
    apart = f"{signed(best.difference.value)} {signed_interval(best.difference.low, best.difference.high)}"
    within = facts.train_context is not None and best.context <= facts.train_context
    where = f"after {count(best.context)} bytes of context" + (", no more than they were trained on" if within else "")
    text = (
        f"{_verdict(best, a, b)} {where}: {a} needs {number(one, unit)} bits per byte, "
        f"{b} {number(two, unit)} (difference {apart}; below 0, {a} is better)"
    )
    kind: Kind = "not decided" if best.decision.verdict == "undecided" else "measured"
    if kind == "not decided":
        text += f". No verdict, because: {_why(best)}"
    if best.decision.verdict == "equivalent":
        inner = best.difference.inner
        text += f". The 90 % interval {signed_interval(*inner) if inner else ''} lies inside ±{number(best.evidence.margin)}"
    scope = [scope_of(facts, (best.first, best.second)), f"{count(best.documents)} documents"]
    return Claim(f"{text}.{absent}", best.cells, ", ".join(filter(None, scope)), kind, "Quality", context=best.context)


def _why(c: Comparison) -> str:
    """What stands against a winner; that a difference is small only where nothing else does."""
    said = [r.text for r in c.decision.reasons if r.why not in (Why.TOO_SMALL, Why.HOLM)]
    return "; ".join(said or [r.text for r in c.decision.reasons])


def _verdict(c: Comparison, a: str, b: str) -> str:
    """Who matches whom; of checkpoints, where there are too few seeds for more."""
    if c.claim == "checkpoint":
        a, b = f"this {a} checkpoint", f"this {b} checkpoint"
    words = {
        "equivalent": f"{a} matches {b}",
        "better": f"{a} is ahead of {b}",
        "worse": f"{a} does not match {b}, which is ahead,",
        "undecided": f"whether {a} matches {b} is not decided",
    }[c.decision.verdict]
    return words[0].upper() + words[1:] if words.startswith(("this", "whether")) else words


def _beyond(known: Assessment, best: Comparison | None) -> Claim | None:
    """What the longest context is worth past T, to the two models of the answer, or that nothing may be said of it."""
    facts, training = known.facts, known.training
    if training.undertrained:
        text = f"Not answered: {training.text}. Models that hardly use the context they were trained on show nothing about longer ones."
        return Claim(text, training.cells, "this run", "not decided", "Long contexts")
    chosen = (best.first, best.second) if best else tuple(facts.contenders[:2])
    sweeps = [s for s in known.sweeps if s.model in chosen and s.beyond and s.beyond[-1].beyond]
    if not sweeps:
        return None
    parts = [part for sweep in sweeps for part in [_worth(facts, sweep)] if part]
    text = f"Against the end of its training context, on the same bytes: {'; '.join(parts)}."
    cells = _distinct(key for sweep in sweeps for point in sweep.points for key in point.cells)
    decided = any(s.verdict in ("uses", "degrades", "flat") for s in sweeps)
    return Claim(
        text,
        cells,
        scope_of(facts, chosen),
        "measured" if decided and not facts.blocks else "not decided",
        "Long contexts",
    )


def _worth(facts: Facts, sweep: Sweep) -> str:
    last, base = sweep.beyond[-1], sweep.base
    if last.beyond is None or base is None:
        return ""
    means = {"uses": "it gains", "flat": "no change is shown", "degrades": "it gets worse"}
    verdict = "not decided" if last.beyond.low is None else means.get(str(last.verdict), "not decided")
    change = f"{signed(last.beyond.value)} {signed_interval(last.beyond.low, last.beyond.high)}"
    return f"{facts.label(sweep.model)} {change} bits per byte from {count(base)} to {count(last.context)} bytes ({verdict})"


def _others(known: Assessment) -> Claim | None:
    """The first subject against everything that is no transformer, each at the longest context that may be compared."""
    facts = known.facts
    found = [c for c in _fair(known) if facts.kind[c.second] != TRANSFORMER and c.second not in facts.subjects]
    first = next((m for m in facts.subjects if any(c.first == m for c in found)), None)
    pairs: dict[str, Comparison] = {}
    for c in sorted((c for c in found if c.first == first), key=lambda c: c.context):
        pairs[c.second] = c
    if first is None or not pairs:
        return None
    parts = []
    for c in list(pairs.values())[:_MOST]:
        assert c.difference is not None  # _fair asks for these only
        apart = f"{signed(c.difference.value)} {signed_interval(c.difference.low, c.difference.high)}"
        said = {"better": "ahead", "worse": "behind", "equivalent": "matches", "undecided": "not decided"}
        parts.append(
            f"{apart} against {facts.label(c.second)} after {count(c.context)} bytes ({said[c.decision.verdict]})"
        )
    more = f"; {len(pairs) - _MOST} more in the tables" if len(pairs) > _MOST else ""
    checkpoints = any(c.claim == "checkpoint" for c in pairs.values())
    who = f"This {facts.label(first)} checkpoint" if checkpoints else facts.label(first)
    text = f"{who}, difference in bits per byte (below 0, it is better): {'; '.join(parts)}{more}."
    decided = any(c.decision.verdict != "undecided" for c in pairs.values())
    cells = _distinct(key for c in pairs.values() for key in c.cells)
    return Claim(
        text, cells, scope_of(facts, (first, *pairs)), "measured" if decided else "not decided", "Other models"
    )


# -- memory and time -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class States:
    """Bytes per stream by context: counted, else as the model's formula says."""

    at: Mapping[int, float]
    counted: bool
    cells: tuple[str, ...]


def states_of(facts: Facts, model: str) -> States | None:
    """What is known of the bytes that a model keeps per stream: the census first; None where nothing is."""
    if census := census_of(facts, model):
        cells = _distinct(key for _, point in census.values() for key in point.cells)
        return States({context: value for context, (value, _) in census.items()}, True, cells)
    for cell in _cells_of(facts, model):
        stored = cell.facts.get("state_bytes")
        if isinstance(stored, Mapping):
            pairs = {int(c): v for c, b in stored.items() if str(c).isdigit() and (v := finite(b)) is not None}
            if pairs:
                return States(dict(sorted(pairs.items())), False, (cell.key,))
        if curve := formula_of(facts, model):
            return States(curve, False, (cell.key,))
    return None


def _memory(known: Assessment, best: Comparison | None) -> Claim:
    """The bytes of the subject, of the strongest transformer and of the others, and who keeps less."""
    facts = known.facts
    named = [m for m in ((best.first, best.second) if best else ()) if m in facts.machines()]
    transformers = [m for m in facts.machines() if facts.kind[m] == TRANSFORMER]
    models = _distinct((*facts.subjects[:1], *named, *transformers, *facts.machines()))
    states = {m: s for m in models if m in facts.machines() and (s := states_of(facts, m)) is not None}
    if not states:
        return Claim("Not measured in this run.", (), "this run", "not decided", "Memory")
    shown = dict(list(states.items())[:_MOST])
    text = f"Per stream, {'; '.join(_kept(facts, m, s) for m, s in shown.items())}."
    if len(states) > _MOST:
        text += f" {len(states) - _MOST} more in the tables."
    subject = next((m for m in facts.subjects if m in states), None)
    other = next((m for m in (*named, *transformers) if m in states and m != subject), None)
    cells = _distinct(key for s in shown.values() for key in s.cells)
    if subject is not None and other is not None:
        sentence, more = _less(known, subject, other, states)
        text, cells = text + sentence, _distinct((*cells, *more))
    how = {s.counted for s in shown.values()}
    scope = "counted" if how == {True} else "by formula" if how == {False} else "counted, else by formula"
    sizes = scope_of(facts, tuple(shown), trained=False)
    decided = any(s.counted and len(s.at) > 1 for s in shown.values())
    return Claim(
        text, cells, ", ".join(filter(None, (scope, sizes))), "measured" if decided else "not decided", "Memory"
    )


def _kept(facts: Facts, model: str, states: States) -> str:
    name, contexts, values = facts.label(model), list(states.at), list(states.at.values())
    ends = [quantity(value, "byte") for value in (values[0], values[-1])]
    if len(contexts) == 1:
        return f"{name} keeps {ends[0]} at {count(contexts[0])} bytes of context"
    grid = f"from {count(contexts[0])} to {count(contexts[-1])} bytes of context"
    if len(set(values)) == 1:
        return f"{name} keeps the same {ends[0]} {grid}"
    return f"{name} keeps {ends[0]} at {count(contexts[0])} and {ends[1]} at {count(contexts[-1])} bytes of context"


def _less(known: Assessment, subject: str, other: str, states: Mapping[str, States]) -> tuple[str, tuple[str, ...]]:
    """Who keeps less at the longest context that is known of both, and where they are equal."""
    facts, one, two = known.facts, states[subject].at, states[other].at
    a, b = facts.label(subject), facts.label(other)
    both = sorted(set(one) & set(two))
    text = ""
    if both and two[both[-1]] and one[both[-1]]:
        ratio = one[both[-1]] / two[both[-1]]
        text = f" At {count(both[-1])} bytes {a} keeps {number(ratio)} times the bytes of {b}."
    crossing = next((c for c in known.card.crossovers if (c.first, c.second) == (subject, other)), None)
    if crossing is None or crossing.found is None or crossing.contradicted:
        return text, ()
    less = {"first": a, "second": b}.get(crossing.found.lower)
    if crossing.found.at and less:
        text += f" Both keep as much at {crossing.text.replace(' (', ' bytes (', 1)}; beyond it {less} keeps less."
    return text, crossing.cells


def _time(known: Assessment, best: Comparison | None) -> Claim:
    """The time of one output token, of a subject and a transformer, as deep as both were timed alike."""
    facts = known.facts
    found = [s for s in known.speeds if s.first.metric == "tpot_s" and not s.best_of_each]
    found = [s for s in found if s.first.model in facts.subjects]
    chosen = best.second if best else ""

    def order(s: SpeedComparison) -> tuple[bool, bool, int, int]:
        other = s.second.model
        return (other == chosen, facts.kind[other] == TRANSFORMER, s.first.context, -s.first.batch_size)

    if not found:
        return Claim("Not measured in this run.", (), "this run", "not decided", "Time")
    s = max(found, key=order)
    names = [facts.label(t.model) for t in (s.first, s.second)]
    took = [quantity(point_of(t.rounds), "s") for t in (s.first, s.second)]
    said = {"faster": f"{names[0]} is faster", "slower": f"{names[1]} is faster"}
    verdict = said.get(s.ratio.verdict, verdict_text(s.ratio))
    text = (
        f"After {count(s.first.context)} bytes of context one output token takes {names[0]} {took[0]} and {names[1]} {took[1]} "
        f"(ratio {ratio_text(s.ratio)}): {verdict}."
    )
    decided: Kind = "not decided" if s.ratio.verdict == "not decided" else "measured"
    rounds = f"{s.ratio.rounds} round{'' if s.ratio.rounds == 1 else 's'}"
    scope = ["this machine", rounds, scope_of(facts, (s.first.model, s.second.model), trained=False)]
    return Claim(text, s.cells, ", ".join(filter(None, scope)), decided, "Time", context=s.first.context)


# -- what is missing, and the scope ----------------------------------------------------------------------------------


def _incomplete(known: Assessment) -> Claim | None:
    """Tasks that nobody learned, and cells without a result."""
    run, parts, cells = known.facts.run, [], []
    for task in without_signal(known.signals):
        parts.append(f"{task}: invalid, no signal")
        cells += [key for s in known.signals if s.task == task for key in s.cells]
    for kind, what in (("failed", "failed"), ("pending", "have no result yet")):
        found = [cell.key for cell in run.cells if cell.kind == kind]
        if found:
            parts.append(f"{count(len(found))} of {count(len(run.cells))} cells {what}")
            cells += found
    return Claim(f"{'; '.join(parts)}.", _distinct(cells), "this run", "not decided", "Incomplete") if parts else None


def scope_of(facts: Facts, models: Iterable[str], trained: bool = True) -> str:
    """At 0.3M parameters, trained on 1.50 MiB, 3 seeds: what a sentence about these models is about; what is unknown is left out."""
    cells = [cell for model in models for cell in _cells_of(facts, model)]
    parts = []
    if sizes := _values(cell.facts.get("parameters") for cell in cells):
        alike = sizes[-1:] if sizes[-1] <= 1.05 * sizes[0] else sizes  # as near as a match by parameters allows
        parts.append(f"at {_span([f'{size / 1e6:.2g}M' for size in alike])} parameters")
    if trained:
        reports = [cell.facts["training"] for cell in cells if isinstance(cell.facts.get("training"), Mapping)]
        if read := _values(report.get("bytes") for report in reports):
            parts.append(f"trained on {_span([quantity(size, 'byte') for size in read])}")
        if any(cell.facts.get("weights") == "random" for cell in cells):
            parts.append("random weights")
        seeds = len({cell.seed for cell in cells})
        parts.append(f"{seeds} training seed{'' if seeds == 1 else 's'}")
    return ", ".join(parts)


def _values(found: Iterable[object]) -> list[float]:
    return sorted({float(value) for one in found if (value := finite(one)) is not None and value > 0})


def _span(texts: Sequence[str]) -> str:
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def _cells_of(facts: Facts, model: str) -> Iterator[CellOutcome]:
    return (cell for cell in facts.run.cells if cell.model == model)


def _distinct(keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(keys))
