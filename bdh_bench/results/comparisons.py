"""What does a run say about two models on the same targets: how far apart, how sure, and may one be called better or equal?

Only points with the same metric id, target hash, training regime and state protocol are compared. What the difference is taken over
depends on the claim:

* *checkpoint* ("these weights are better"; fewer than three seeds): documents, in clusters, resampled for both models with the same
  draws; p from sign flips over clusters,
* *architecture* ("this design is better"): differences paired by seed with Student's t, and beside it seeds then documents drawn
  (two-level). Both must agree. p is the larger of the t-test's over seeds and the sign-flip's over documents; the exact sign-flip
  over seeds is printed with its floor (2/2ⁿ: 0.0625 for five seeds), which five seeds can never get below 0.05.

Primary metrics, declared beforehand: bits per byte at c = T and at c = 4T. Holm's correction runs over them: every pair × context ×
task. Any other comparison is corrected over all comparisons of the run, which costs it more.

Trials that succeed or fail are compared by McNemar's exact test, and their difference is resampled by prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bdh_bench.metrics import METRICS
from bdh_bench.results import significance, statistics
from bdh_bench.results.blocks import LABEL
from bdh_bench.results.contenders import QUALITY, Facts
from bdh_bench.results.decisions import (
    SEEDS_TO_RANK,
    SEEDS_TO_SHOW,
    SMALLEST_DIFFERENCE,
    ClaimKind,
    Decision,
    Evidence,
    Why,
    decide,
    least_difference,
)
from bdh_bench.results.display import GAP, count, number, signed, signed_interval
from bdh_bench.results.fairness import Card, card_of
from bdh_bench.results.reductions import DERIVED
from bdh_bench.results.resampling import RESAMPLES, SEED, Samples
from bdh_bench.results.significance import PValue
from bdh_bench.results.statistics import Estimate
from bdh_bench.results.sufficiency import Sufficiency, sufficiency_of
from bdh_bench.results.tables import HASH_AXIS, Entry, Point, Table, finite
from bdh_bench.results.validity import Signal, signals_of, without_signal

_STATE = re.compile(r"\bstate=(\w+)")
_BITS = "bit/byte"


@dataclass(frozen=True)
class Comparison:
    """Two models at one context: ``pairs`` are their points, one pair per common seed (the first only, of checkpoints).

    p_documents, p_seeds   sign flips over clusters (or McNemar's over trials) and over seeds; p what is corrected; holm corrected
    documents, independent  how many both scored, and how many of them are independent
    evidence, decision     what was decided on, and the verdict on the first model
    """

    first: str
    second: str
    pairs: tuple[tuple[Point, Point], ...]
    evidence: Evidence
    documents: int
    p_documents: PValue | None
    p_seeds: PValue | None
    p: float | None
    primary: bool
    decision: Decision

    @property
    def point(self) -> Point:
        return self.pairs[0][0]

    @property
    def context(self) -> int:
        return self.point.context

    @property
    def claim(self) -> ClaimKind:
        return self.evidence.claim

    @property
    def difference(self) -> Estimate | None:
        return self.evidence.difference

    @property
    def holm(self) -> float | None:
        return self.evidence.p

    @property
    def cells(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key for pair in self.pairs for point in pair for key in point.cells))

    @property
    def mde(self) -> float | None:
        """Of the least certain of the intervals that must agree."""
        return max((look.mde for look in self.evidence.looks if look.mde is not None), default=None)


def comparisons_of(
    facts: Facts,
    card: Card | None = None,
    enough: Sufficiency | None = None,
    signals: Sequence[Signal] | None = None,
) -> tuple[Comparison, ...]:
    """Every comparison of a run, by pair, metric and context, with verdicts after Holm's correction."""
    card = card or card_of(facts)
    enough = enough or sufficiency_of(facts)
    invalid = without_signal(signals_of(facts) if signals is None else signals)
    found = [
        _without_signal(c, invalid[c.point.task]) if c.point.task in invalid else c
        for first, second in facts.pairs()
        for c in _of_pair(facts, first, second, card, enough)
    ]
    adjusted: dict[int, float] = {}
    for family in ([c for c in found if c.primary], found):
        tested = [c for c in family if c.p is not None]
        for comparison, p in zip(tested, significance.holm([c.p or 0.0 for c in tested]), strict=True):
            adjusted.setdefault(id(comparison), p)  # a primary one keeps the correction over the primary ones
    return tuple(_decided(c, adjusted.get(id(c))) for c in found)


def _without_signal(comparison: Comparison, signal: Signal) -> Comparison:
    """A comparison of what nobody learned ranks nothing."""
    barred = {Why.NO_SIGNAL: f"invalid, {signal.text}", **comparison.evidence.barred}
    evidence = replace(comparison.evidence, barred=barred)
    return replace(comparison, evidence=evidence, decision=decide(evidence))


def _decided(comparison: Comparison, p: float | None) -> Comparison:
    evidence = replace(comparison.evidence, p=p)
    return replace(comparison, evidence=evidence, decision=decide(evidence))


def _of_pair(facts: Facts, first: str, second: str, card: Card, enough: Sufficiency) -> Iterator[Comparison]:
    unmatched = card.unmatched(first, second)
    theirs: dict[tuple[Any, ...], list[Point]] = {}
    for point in facts.points:
        if point.model == second and point.value is not None and _comparable(point):
            theirs.setdefault(_place(point), []).append(point)
    groups: dict[tuple[Any, ...], list[tuple[Point, Point]]] = {}
    for point in facts.points:
        if point.model == first and point.value is not None and _comparable(point) and _place(point) in theirs:
            partner = _partner(point, theirs[_place(point)])
            groups.setdefault((*_place(point)[1:], point.metric_id, point.axes), []).append((point, partner))
    for pairs in sorted(groups.values(), key=lambda g: (g[0][0].task, g[0][0].metric, g[0][0].context)):
        yield _comparison(facts, sorted(pairs, key=lambda p: p[0].seed or 0), unmatched, enough)


def _comparable(point: Point) -> bool:
    """Bits per byte, and shares of trials: what was measured, on independent samples, and has a direction."""
    known = None if point.metric in DERIVED else METRICS.get(point.metric)
    return known is not None and (known.unit == _BITS or known.reduction == "share") and known.better != "neither"


def _place(point: Point) -> tuple[Any, ...]:
    return (point.seed, point.task, point.metric, point.context, point.batch_size)


def _partner(point: Point, candidates: Sequence[Point]) -> Point:
    """The point of the other model that measured the same, or the nearest that did not: the verdict then says what differs."""
    return min(candidates, key=lambda c: (c.metric_id != point.metric_id, c.axes != point.axes))


def _comparison(facts: Facts, pairs: Sequence[tuple[Point, Point]], unmatched: str, enough: Sufficiency) -> Comparison:
    claim: ClaimKind = "architecture" if len(pairs) >= SEEDS_TO_SHOW else "checkpoint"
    used = tuple(pairs if claim == "architecture" else pairs[:1])
    one, two = used[0]
    samples = [(facts.documents(a), facts.documents(b)) for a, b in used]
    barred = dict(_barred(facts, used, unmatched, enough))
    common = sorted(set(samples[0][0]).intersection(*(side for pair in samples for side in pair)))
    identical = not {Why.METRIC_ID, Why.TARGET_HASH, Why.STATE_PROTOCOL} & set(barred)
    if not identical or not common:
        evidence = Evidence(claim, None, None, 0, len(used), barred=barred)
        return Comparison(one.model, two.model, used, evidence, 0, None, None, None, False, decide(evidence))
    documents, units = facts.counted(common)
    bits = METRICS[one.metric].unit == _BITS
    over_documents = statistics.mean_difference(samples, facts.clusters)
    own = [float(a.value or 0) - float(b.value or 0) for a, b in used]
    seeds = claim == "architecture"
    p_documents = _p_documents(samples, facts) if bits or seeds else _mcnemar(samples[0])
    p_seeds = significance.sign_flip(own) if seeds else None
    p = max(p_documents.value, statistics.t_p_value(own)) if seeds else p_documents.value
    evidence = Evidence(
        claim,
        statistics.t_interval(own) if seeds else over_documents,
        None,
        units,
        len(used),
        statistics.two_level_difference(samples, facts.clusters) if seeds else None,
        METRICS[one.metric].better == "lower",
        SMALLEST_DIFFERENCE if bits else 0.0,
        facts.margin if bits else None,
        barred,
    )
    primary = one.metric == QUALITY and one.context in facts.primary_contexts
    return Comparison(
        one.model, two.model, used, evidence, documents, p_documents, p_seeds, p, primary, decide(evidence)
    )


def _p_documents(samples: Sequence[tuple[Samples, Samples]], facts: Facts) -> PValue:
    return significance.sign_flip(statistics.cluster_differences(samples, facts.clusters))


def _mcnemar(samples: tuple[Samples, Samples]) -> PValue:
    """Over the trials that both took; a trial succeeded where its value is at least a half."""
    first, second = samples
    right = [(first[name][0] >= 0.5, second[name][0] >= 0.5) for name in set(first) & set(second)]
    return significance.mcnemar(sum(a and not b for a, b in right), sum(b and not a for a, b in right))


def _barred(
    facts: Facts, pairs: Sequence[tuple[Point, Point]], unmatched: str, enough: Sufficiency
) -> Iterator[tuple[Why, str]]:
    """Reasons against any ranking that are found outside the numbers."""
    one, two = pairs[0]
    if any(point.weights == "random" for pair in pairs for point in pair):
        yield Why.UNTRAINED, "random weights: quality is not ranked"
    if state_protocol(one) != state_protocol(two):
        names = " and ".join(state_protocol(point) or "empty" for point in (one, two))
        yield Why.STATE_PROTOCOL, f"the state protocols differ ({names})"
    elif one.metric_id != two.metric_id:
        yield Why.METRIC_ID, f"the metrics differ ({one.metric_id} and {two.metric_id})"
    if any(a.target_hash != b.target_hash or (a.metric == QUALITY and not a.target_hash) for a, b in pairs):
        yield Why.TARGET_HASH, "they did not score the same bytes"
    regimes = [facts.regime(model) for model in (one.model, two.model)]
    if regimes[0] != regimes[1]:
        yield Why.REGIME, f"the training regimes differ ({' and '.join(r or 'unknown' for r in regimes)})"
    failed = [model for model in (one.model, two.model) if model in facts.gate_failed]
    if failed:
        yield Why.GATE, f"a correctness gate failed for {' and '.join(failed)}"
    if unmatched:
        yield Why.UNMATCHED, f"unranked: {unmatched}"
    beyond = facts.train_context is not None and one.context > facts.train_context
    if enough.undertrained and beyond and METRICS[one.metric].unit == _BITS:
        yield Why.UNDERTRAINED, f"undertrained: {enough.text}"


def state_protocol(point: Point) -> str:
    """carry, cold or window, as the metric's id or axes say; "" for the sweep, whose state is empty before its context."""
    named = _STATE.search(point.metric_id)
    return named.group(1) if named else str(dict(point.axes).get("state") or "")


# -- views -----------------------------------------------------------------------------------------------------------


def headline(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """What a reader is shown: the primary contexts, and the longest context of each pair and metric."""
    longest: dict[tuple[Any, ...], int] = {}
    for c in comparisons:
        longest[_line(c)] = max(longest.get(_line(c), 0), c.context)
    return [c for c in comparisons if c.primary or c.context == longest[_line(c)]]


def _line(c: Comparison) -> tuple[Any, ...]:
    axes = tuple(pair for pair in c.point.axes if pair[0] != HASH_AXIS)
    return (c.first, c.second, c.point.task, c.point.metric, c.point.batch_size, axes)


def comparison_table(facts: Facts, comparisons: Sequence[Comparison]) -> Table:
    """Verdicts with everything they rest on."""
    columns = (
        "comparison", "claim", "context", "difference", "95 %", "90 %", "MDE", "p (floor)", "Holm p", "documents", "verdict",
    )  # fmt: skip
    shown = headline(comparisons)
    texts = [{reason.text for reason in c.decision.reasons} for c in shown]
    shared = (
        [r.text for r in shown[0].decision.reasons if all(r.text in own for own in texts)] if len(shown) > 1 else []
    )
    rows = tuple(_table_row(facts, c, shared) for c in shown)
    primary = " and ".join(f"{count(c)}" for c in facts.primary_contexts) or "T and 4T (T is not known)"
    kinds = sorted({c.claim for c in comparisons}) or ["checkpoint"]
    unranked = sum(c.decision.unranked for c in comparisons)
    note = (
        f"Claims about {' and '.join(_PLURAL[k] for k in kinds)}. Difference: first minus second, bits per byte unless named; "
        f"equivalence margin ±{facts.margin:g} bits per byte, 90 % interval; * primary: bits per byte at {primary} bytes of "
        f"context. MDE is 2.8 standard errors. {RESAMPLES:,} resamples, seed {SEED}. "
        + (f"Against every winner here: {'; '.join(shared)}. " if shared else "")
        + (f"Unranked: {unranked} of {len(comparisons)} comparisons, for the reasons given." if unranked else "")
    )
    if facts.blocks:
        note += "Intervals and p-values are over blocks, not documents: there are fewer than five. "
    meaning = (
        "First against second on the same targets. No winner is named while any reason stands against it, and a difference "
        "that was not found is no match."
    )
    return Table("table-comparisons", "Comparisons", meaning, columns, rows, note.strip())


_PLURAL: Mapping[ClaimKind, str] = {"checkpoint": "these checkpoints", "architecture": "architectures"}


def _table_row(facts: Facts, c: Comparison, shared: Sequence[str]) -> tuple[Entry, ...]:
    difference, known = c.difference, METRICS[c.point.metric]
    inner = difference.inner if difference else None
    clusters = "" if c.evidence.documents == c.documents else f" in {count(c.evidence.documents)} clusters"
    flips = f"{number(c.p_documents.value)} ({number(c.p_documents.floor)})" if c.p_documents else GAP
    seeds = f"; seeds {number(c.p_seeds.value)} ({number(c.p_seeds.floor)})" if c.p_seeds else ""
    why = "; ".join(reason.text for reason in c.decision.reasons if reason.text not in shared)
    verdict = f"unranked ({c.decision.verdict})" if c.decision.unranked else c.decision.verdict
    what = "" if c.point.metric == QUALITY else f", {known.label}"
    return (
        Entry(f"{facts.label(c.first)} − {facts.label(c.second)}{what}{' *' if c.primary else ''}", c.point.metric_id),
        Entry(c.claim if c.claim == "checkpoint" else f"architecture, {len(c.pairs)} seeds"),
        Entry(count(c.context) if c.context else "any"),
        Entry(signed(difference.value) if difference else GAP),
        Entry(signed_interval(difference.low, difference.high) if difference else GAP),
        Entry(signed_interval(*inner) if inner else GAP),
        Entry(number(c.mde, known.unit) if c.mde is not None else GAP),
        Entry(flips + seeds),
        Entry(number(c.holm)),
        Entry(count(c.documents) + clusters),
        Entry(verdict, why),
    )


def comparison_as_json(c: Comparison, facts: Facts, card: Card) -> dict[str, Any]:
    """One comparison as JSON values, with the fairness card of its two models and how its intervals were drawn."""
    return {
        "first": c.first,
        "second": c.second,
        "claim": c.claim,
        "task": c.point.task,
        "metric": c.point.metric,
        "metric_id": c.point.metric_id,
        "context": c.context,
        "target_hash": c.point.target_hash,
        "primary": c.primary,
        "verdict": c.decision.verdict,
        "unranked": c.decision.unranked,
        "reasons": [{"code": reason.why.name.lower(), "text": reason.text} for reason in c.decision.reasons],
        "difference": _estimate_as_json(c.difference),
        "two_level": _estimate_as_json(c.evidence.second_look),
        "mde": finite(c.mde),
        "least_difference": least_difference(c.evidence),
        "equivalence_margin": c.evidence.margin,
        "p": c.p,
        "p_holm": c.holm,
        "p_documents": _p_as_json(c.p_documents),
        "p_seeds": _p_as_json(c.p_seeds),
        "documents": c.documents,
        "independent": c.evidence.documents,
        "resampled": LABEL if facts.blocks else "documents",
        "seeds": len(c.pairs),
        "seeds_to_rank": SEEDS_TO_RANK,
        "resamples": RESAMPLES,
        "resampling_seed": SEED,
        "fairness": card.as_json(c.first, c.second) | {"ratios": card.ratios(c.first, c.second)},
        "cells": list(c.cells),
    }


def _estimate_as_json(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    inner = estimate.inner or (None, None)
    return {
        "value": finite(estimate.value),
        "low": finite(estimate.low),
        "high": finite(estimate.high),
        "low_90": finite(inner[0]),
        "high_90": finite(inner[1]),
        "se": finite(estimate.se),
        "method": estimate.method,
    }


def _p_as_json(p: PValue | None) -> dict[str, Any] | None:
    return None if p is None else {"value": p.value, "floor": p.floor, "units": p.units, "exact": p.exact}
