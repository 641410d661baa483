"""May a winner be named, may two models be called equal, and if neither: why not?

Every reason against naming a winner is a value, so that a table can show it, a program can count it and a test can ask for it. The
verdict is about the first of two models:

* ``better``, ``worse``   no reason at all stands against it,
* ``equivalent``          the 90 % interval lies inside ±margin (two one-sided tests at 5 %), and the data may be ranked,
* ``undecided``           neither; a difference that was not found is never read as a match.

Where a difference is both proven and inside the margin the winner is named: it had to be at least max(0.005, MDE) for that. A real
difference smaller than this, inside the margin, is ``equivalent``.

Reasons come in two kinds. Those of ``RANKING`` say that these data rank nothing, in either direction. The others (too small, contains
0, Holm) stand against a winner only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from bdh_bench.results.display import count, number
from bdh_bench.results.statistics import Estimate

Verdict = Literal["better", "equivalent", "worse", "undecided"]
ClaimKind = Literal["checkpoint", "architecture"]

FEWEST_DOCUMENTS = 20
SEEDS_TO_SHOW = 3
SEEDS_TO_RANK = 5
#: Least difference that is worth a sentence, in bits per byte.
SMALLEST_DIFFERENCE = 0.005
#: Margin of equivalence in bits per byte, where a run's request was recorded before it held one.
EQUIVALENCE_MARGIN = 0.02
SIGNIFICANCE = 0.05


class Why(StrEnum):
    """What stands against naming a winner."""

    UNTRAINED = "untrained"
    FEW_DOCUMENTS = "few documents"
    FEW_SEEDS_TO_SHOW = "too few seeds to show"
    FEW_SEEDS_TO_RANK = "too few seeds to rank"
    UNMATCHED = "fairness card unmatched"
    METRIC_ID = "metric id differs"
    TARGET_HASH = "targets differ"
    REGIME = "training regime differs"
    STATE_PROTOCOL = "state protocol differs"
    GATE = "a gate failed"
    UNDERTRAINED = "undertrained"
    NO_SIGNAL = "no signal"
    CONTAINS_ZERO = "interval contains 0"
    TOO_SMALL = "too small"
    HOLM = "Holm-adjusted p"


#: Reasons that forbid any ranking, equivalence too.
RANKING = frozenset(Why) - {Why.CONTAINS_ZERO, Why.TOO_SMALL, Why.HOLM}


@dataclass(frozen=True)
class Reason:
    """One reason, and the sentence for a reader."""

    why: Why
    text: str


@dataclass(frozen=True)
class Evidence:
    """What a decision is made from.

    difference   first − second, from the units of the claim: documents for checkpoints, seeds for architectures
    second_look  the two-level interval, which an architecture claim must pass as well
    p            Holm-adjusted; None where nothing could be tested
    documents    independent ones: clusters
    lower_wins   whether a smaller value is better
    least        least difference worth a sentence (0 for a metric that has none)
    margin       of equivalence; None where none was declared for this metric
    barred       reasons found outside the numbers: identity of the metric, fairness, gates, weights
    """

    claim: ClaimKind
    difference: Estimate | None
    p: float | None
    documents: int
    seeds: int
    second_look: Estimate | None = None
    lower_wins: bool = True
    least: float = SMALLEST_DIFFERENCE
    margin: float | None = EQUIVALENCE_MARGIN
    barred: Mapping[Why, str] = field(default_factory=dict)

    @property
    def looks(self) -> tuple[Estimate, ...]:
        """Every interval that must agree."""
        return tuple(look for look in (self.difference, self.second_look) if look is not None)


@dataclass(frozen=True)
class Decision:
    """The verdict on the first model, and what stands against a winner (empty where one is named)."""

    verdict: Verdict
    reasons: tuple[Reason, ...]

    @property
    def unranked(self) -> bool:
        """Whether these data rank nothing at all."""
        return any(reason.why in RANKING for reason in self.reasons)

    def has(self, why: Why) -> bool:
        return any(reason.why is why for reason in self.reasons)


def decide(evidence: Evidence) -> Decision:
    """The verdict, with every reason against a winner."""
    reasons = tuple(_reasons(evidence))
    if not reasons and evidence.difference is not None:
        return Decision("better" if (evidence.difference.value < 0) == evidence.lower_wins else "worse", ())
    open_ = not any(reason.why in RANKING for reason in reasons)
    margin = evidence.margin
    if open_ and margin is not None and evidence.looks and all(look.within(margin) for look in evidence.looks):
        return Decision("equivalent", reasons)
    return Decision("undecided", reasons)


def least_difference(evidence: Evidence) -> float:
    """max(least, MDE): what a difference must reach before it has a winner."""
    return max(evidence.least, *(look.mde or 0.0 for look in evidence.looks), 0.0)


def _reasons(e: Evidence) -> list[Reason]:
    found = [Reason(why, text) for why, text in e.barred.items()]
    if e.difference is None:
        return found or [Reason(Why.FEW_DOCUMENTS, "nothing was scored by both")]
    if e.documents < FEWEST_DOCUMENTS:
        text = f"smoke: not ranked ({count(e.documents)} documents, {FEWEST_DOCUMENTS} are needed)"
        found.append(Reason(Why.FEW_DOCUMENTS, text))
    if e.claim == "architecture" and e.seeds < SEEDS_TO_SHOW:
        found.append(
            Reason(Why.FEW_SEEDS_TO_SHOW, f"{e.seeds} seeds, {SEEDS_TO_SHOW} are needed to show architectures")
        )
    if e.claim == "architecture" and e.seeds < SEEDS_TO_RANK:
        found.append(
            Reason(Why.FEW_SEEDS_TO_RANK, f"{e.seeds} seeds, {SEEDS_TO_RANK} are needed to rank architectures")
        )
    if any(look.contains_zero for look in e.looks):
        found.append(Reason(Why.CONTAINS_ZERO, "the interval contains 0"))
    least = least_difference(e)
    if abs(e.difference.value) < least:
        found.append(Reason(Why.TOO_SMALL, f"smaller than {least:.3f}, the least difference that would be found"))
    if e.p is None or e.p >= SIGNIFICANCE:
        text = f"Holm-adjusted p {number(e.p)}" if e.p is not None else "no p-value"
        found.append(Reason(Why.HOLM, f"{text}, below {SIGNIFICANCE} is needed"))
    return found
