"""What does a run not decide, and which run would? One plain sentence each, with a command line where a run can help.

A command repeats the request of this run with what was missing (``next_run``). It is the run that could decide the question, not one that
must: a longer training can turn out too short as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bdh_bench.results.answer import states_of
from bdh_bench.results.assessment import Assessment
from bdh_bench.results.claim import Claim
from bdh_bench.results.contenders import QUALITY, SUBJECT, TRANSFORMER, YARDSTICK
from bdh_bench.results.decisions import FEWEST_DOCUMENTS, SEEDS_TO_RANK
from bdh_bench.results.display import count
from bdh_bench.results.naming import without_regime
from bdh_bench.results.next_run import measured_again, next_run

#: What a command asks for where this run had too little: documents, rounds, and how many times the training.
_DOCUMENTS, _ROUNDS, _LONGER = 40, 5, 10
#: What is measured beside each other where a run has nothing to compare.
_USUAL = ("bdh", "llama", "mamba")
_YARDSTICK = "ngram_cache"


def open_of(
    known: Assessment, quality: Sequence[Claim], memory: Sequence[Claim], latency: Sequence[Claim]
) -> Iterator[Claim]:
    """Questions that stay open, the first ones first; ``quality``, ``memory`` and ``latency`` are what could be said."""
    yield from _of_quality(known, quality)
    yield from _of_costs(known, memory, latency)
    yield from _of_reach(known)
    yield from _of_fairness(known, quality)


def _open(text: str, claims: Iterable[Claim] = (), command: str = "", scope: str = "this run") -> Claim:
    evidence = tuple(dict.fromkeys(key for claim in claims for key in claim.evidence))
    return Claim(text, evidence, scope, "not decided", "open", command=command)


def _of_quality(known: Assessment, quality: Sequence[Claim]) -> Iterator[Claim]:
    facts, spec = known.facts, known.facts.spec
    models = _beside(known)
    tasks = ("long_ppl",)
    enough = {"documents": _DOCUMENTS} if _documents(known) < FEWEST_DOCUMENTS else {}
    if not quality:
        text = "Quality: no two models scored the same bytes."
        yield _open(text, command=next_run(spec, models, tasks, **enough))
    if 0 < facts.seeds < SEEDS_TO_RANK:
        seeds = f"{facts.seeds} training seed{'' if facts.seeds == 1 else 's'}, {SEEDS_TO_RANK} are needed"
        command = next_run(spec, models, tasks, seeds=SEEDS_TO_RANK, **enough)
        yield _open(f"Which architecture has the better quality ({seeds}).", quality, command, "architectures")
    unranked = [claim for claim in quality if claim.kind == "not decided"]
    if unranked:
        more: dict[str, object] = {"seeds": max(SEEDS_TO_RANK, 2 * facts.seeds)} if facts.seeds > 1 else {}
        asked = spec.get("documents")
        documents = {"documents": max(_DOCUMENTS, 2 * asked if isinstance(asked, int) and not enough else 0)}
        text = f"Which of two models is ahead in {len(unranked)} of {len(quality)} comparisons."
        yield _open(text, unranked, next_run(spec, models, tasks, **documents, **more))
    if quality and known.training.undertrained:
        longer = spec.get("train_bytes")
        change = {"train_bytes": _LONGER * longer} if isinstance(longer, int) else {}
        text = f"Anything about long contexts: undertrained. Longer training, here {_LONGER} times, can show whether that was all."
        yield Claim(
            text if change else "Anything about long contexts: undertrained.", known.training.cells, "this run", "not decided", "open",
            command=next_run(spec, models, tasks, **change) if change else "",
        )  # fmt: skip
    elif quality and known.training.status == "not judged":
        lacks = {_YARDSTICK} - {facts.family[m] for m in facts.of_kind(YARDSTICK)}
        command = next_run(spec, [*models, *lacks], tasks) if lacks else ""
        yield Claim(
            f"Whether training was long enough: {known.training.text}.", known.training.cells, "this run", "not decided", "open",
            command=command,
        )  # fmt: skip


def _of_costs(known: Assessment, memory: Sequence[Claim], latency: Sequence[Claim]) -> Iterator[Claim]:
    facts, spec = known.facts, known.facts.spec
    models = list(dict.fromkeys(without_regime(m) for m in _beside(known) if m not in facts.of_kind(YARDSTICK)))
    if not memory:
        formula = any(states_of(facts, m) for m in facts.contenders)
        text = "Bytes: the state was not counted" + (", its size is a formula's." if formula else ".")
        yield _open(text, command=measured_again(spec, models, "memory"))
    ratios = [claim for claim in latency if claim.short]  # the others say where curves cross
    undecided = [claim for claim in ratios if claim.kind == "not decided"]
    command = measured_again(spec, models, "latency", rounds=_ROUNDS)
    if undecided and all("single round" in claim.text for claim in undecided):
        text = "Which model is faster: one round in one process is no ranking."
        yield _open(text, latency, command, "this machine")
    elif undecided:
        text = f"Which model is faster in {len(undecided)} of {len(ratios)} comparisons."
        command = measured_again(spec, models, "latency", rounds=2 * _ROUNDS)
        yield _open(text, undecided, command, "this machine")
    elif not ratios:
        yield _open("Time: no two models were timed at the same context.", command=command)


def _of_reach(known: Assessment) -> Iterator[Claim]:
    facts = known.facts
    reached = [p for p in facts.points if p.value is not None]
    longest = max((p.context for p in reached), default=0)
    if not longest:
        return
    tasks = list(dict.fromkeys(p.task for p in reached if p.context == longest))
    models = list(dict.fromkeys(p.model for p in reached if p.context == longest))
    asked = facts.spec.get("contexts")
    contexts = [*(asked if isinstance(asked, list | tuple) else [longest]), 4 * longest]
    command = next_run(facts.spec, models, tasks, contexts=contexts)
    yield _open(f"Anything beyond {count(longest)} bytes of context.", command=command)


def _of_fairness(known: Assessment, quality: Sequence[Claim]) -> Iterator[Claim]:
    facts = known.facts
    for first, second in facts.pairs() if quality else ():
        if why := known.card.unmatched(first, second):
            pair = f"{facts.label(first)} and {facts.label(second)}"
            yield _open(f"What a fair match of {pair} would show: {why}.")


def _beside(known: Assessment) -> list[str]:
    """The models of the run that compete or are a yardstick; and, where no model stands beside a transformer, who is missing."""
    facts = known.facts
    models = [*facts.contenders, *facts.of_kind(YARDSTICK)]
    families = {facts.family[m] for m in facts.contenders}
    if SUBJECT not in families:
        models.insert(0, SUBJECT)
    if not any(facts.kind[m] == TRANSFORMER for m in facts.contenders):
        models += [name for name in _USUAL if name not in (*families, SUBJECT)]
    return models


def _documents(known: Assessment) -> int:
    """Independent documents behind the comparisons of bits per byte; 0 without any."""
    return max((c.evidence.documents for c in known.comparisons if c.point.metric == QUALITY), default=0)
