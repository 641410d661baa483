"""Does every rule against naming a winner hold by itself, and does nothing but a proof name a winner or a match?

The simulations score texts byte by byte: two models on the same bytes differ by a small perturbation of the same scores, while
documents differ by far more.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bdh_bench.results import significance, statistics
from bdh_bench.results.decisions import RANKING, Decision, Evidence, Why, decide, least_difference
from bdh_bench.results.resampling import Samples
from bdh_bench.results.statistics import Estimate


def estimate(value: float, se: float = 0.001) -> Estimate:
    ends = (value - 1.96 * se, value + 1.96 * se)
    return Estimate(value, *ends, se, 40, 40, (value - 1.645 * se, value + 1.645 * se), "percentile")


SOUND = Evidence("checkpoint", estimate(-0.05), 0.001, 40, 1)
DESIGN = replace(SOUND, claim="architecture", seeds=5, second_look=estimate(-0.05, 0.002))


def test_a_sound_difference_has_a_winner() -> None:
    assert decide(SOUND) == Decision("better", ())
    assert decide(replace(SOUND, difference=estimate(0.05))).verdict == "worse"
    assert decide(replace(SOUND, lower_wins=False)).verdict == "worse"
    assert decide(DESIGN).verdict == "better"


ONE_REASON = {
    Why.FEW_DOCUMENTS: replace(SOUND, documents=19),
    Why.FEW_SEEDS_TO_RANK: replace(DESIGN, seeds=4),
    Why.CONTAINS_ZERO: replace(SOUND, difference=replace(estimate(-0.05), high=0.0)),
    Why.HOLM: replace(SOUND, p=0.05),
    Why.TOO_SMALL: replace(SOUND, difference=estimate(-0.0049, 0.0001), margin=None),
    **{
        why: replace(SOUND, barred={why: "said outside"})
        for why in (
            Why.UNTRAINED, Why.UNMATCHED, Why.METRIC_ID, Why.TARGET_HASH, Why.REGIME, Why.STATE_PROTOCOL, Why.GATE,
            Why.UNDERTRAINED, Why.NO_SIGNAL,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("why", ONE_REASON, ids=lambda why: why.name)
def test_each_reason_alone_forbids_a_winner(why: Why) -> None:
    found = decide(ONE_REASON[why])
    assert found.verdict == "undecided"
    assert [reason.why for reason in found.reasons] == [why]
    assert found.unranked == (why in RANKING)


def test_two_seeds_are_not_even_shown() -> None:
    found = decide(replace(DESIGN, seeds=2))
    assert [reason.why for reason in found.reasons] == [Why.FEW_SEEDS_TO_SHOW, Why.FEW_SEEDS_TO_RANK]
    assert not decide(replace(DESIGN, seeds=3)).has(Why.FEW_SEEDS_TO_SHOW)


def test_every_reason_has_its_test() -> None:
    assert {*ONE_REASON, Why.FEW_SEEDS_TO_SHOW} == set(Why)


def test_the_least_difference_is_the_larger_of_the_two() -> None:
    assert least_difference(SOUND) == 0.005
    assert least_difference(replace(SOUND, difference=estimate(-0.05, 0.01))) == pytest.approx(0.028)
    wide = replace(SOUND, difference=estimate(-0.05, 0.02), margin=None)  # found by the interval, but not by 2.8 errors
    assert decide(wide).has(Why.TOO_SMALL)
    assert not decide(wide).has(Why.CONTAINS_ZERO)
    assert least_difference(replace(DESIGN, second_look=estimate(-0.05, 0.01))) == pytest.approx(0.028)


def test_equivalence_is_a_claim_of_its_own() -> None:
    near = replace(SOUND, difference=estimate(0.004, 0.004), p=0.4)
    assert decide(near).verdict == "equivalent"
    assert decide(replace(near, difference=estimate(0.004, 0.02))).verdict == "undecided"  # not found is no match
    assert decide(replace(near, margin=0.005)).verdict == "undecided"
    assert decide(replace(near, margin=None)).verdict == "undecided"
    assert decide(replace(near, documents=19)).verdict == "undecided"  # what may not be ranked may not be matched
    for why in RANKING:
        assert decide(replace(near, barred={why: "x"})).verdict == "undecided"


def test_equivalence_ends_where_the_90_percent_interval_does() -> None:
    edge = replace(
        estimate(0.0, 0.001), inner=(-0.0199, 0.0199), low=-0.024, high=0.024
    )  # 95 % sticks out, 90 % does not
    assert decide(replace(SOUND, difference=edge)).verdict == "equivalent"
    assert decide(replace(SOUND, difference=replace(edge, inner=(-0.0199, 0.02)))).verdict == "undecided"


def test_a_proven_winner_is_named_inside_the_margin_too() -> None:
    assert decide(replace(SOUND, difference=estimate(-0.010))).verdict == "better"
    small = decide(replace(SOUND, difference=estimate(-0.003, 0.0005)))
    assert small.verdict == "equivalent"
    assert [reason.why for reason in small.reasons] == [Why.TOO_SMALL]


def test_both_looks_at_an_architecture_must_agree() -> None:
    assert decide(replace(DESIGN, second_look=estimate(-0.05, 0.03))).has(Why.CONTAINS_ZERO)
    match = replace(DESIGN, difference=estimate(0.001), p=0.5, second_look=estimate(0.001))
    assert decide(match).verdict == "equivalent"
    assert decide(replace(match, second_look=estimate(0.001, 0.03))).verdict == "undecided"


# -- simulations -----------------------------------------------------------------------------------------------------


def scored(
    generator: np.random.Generator, documents: int, shift: float, own: float = 0.02, scores: int = 256
) -> tuple[Samples, Samples]:
    """Two models on some bytes each of some documents: the same bits, and a perturbation of every byte for the second.

    Documents spread by 0.12; the second model suits some documents a little more (``own``), and each byte by 0.15 at random.
    """
    level = generator.normal(2.3, 0.12, documents)
    bits = generator.gamma(1.0, 1.0, (documents, scores)) * level[:, None]
    moved = bits + shift + generator.normal(0, own, (documents, 1)) + generator.normal(0, 0.15, bits.shape)
    both = (bits.mean(1), moved.mean(1))
    one, two = ({f"d{i}": (float(v), float(scores)) for i, v in enumerate(means)} for means in both)
    return one, two


def judged(one: Samples, two: Samples) -> Decision:
    difference = statistics.paired_difference(one, two)
    p = significance.sign_flip(statistics.cluster_differences([(one, two)]))
    return decide(Evidence("checkpoint", difference, p.value, difference.units, 1))


@pytest.mark.parametrize("documents", [24, 40])
def test_equal_models_are_not_told_apart_and_are_called_equivalent(documents: int) -> None:
    generator = np.random.default_rng(20)
    verdicts = [judged(*scored(generator, documents, 0.0)).verdict for _ in range(200)]
    assert sum(v in ("better", "worse") for v in verdicts) < 0.05 * 200
    assert verdicts.count("equivalent") >= 0.80 * 200


def test_a_difference_of_0003_is_found_paired_and_missed_unpaired() -> None:
    generator = np.random.default_rng(21)
    found = missed = 0
    for _ in range(50):
        one, two = scored(generator, 40, 0.003, own=0.0, scores=1024)
        paired = statistics.paired_difference(two, one)
        p = significance.sign_flip(statistics.cluster_differences([(two, one)]))
        found += paired.value > 0 and not paired.contains_zero and p.value < 0.05
        left, right = statistics.bootstrap_ratio(one), statistics.bootstrap_ratio(two)
        apart = 1.96 * float(np.hypot(left.se or 0, right.se or 0))
        missed += abs(right.value - left.value) < apart
    assert found >= 40  # 80 % power
    assert missed == 50
    assert judged(two, one).verdict == "equivalent"  # real, and too small to name a winner by


def test_a_large_difference_names_the_right_model() -> None:
    generator = np.random.default_rng(22)
    verdicts = [judged(*scored(generator, 40, 0.03)).verdict for _ in range(50)]
    assert verdicts.count("better") >= 45
    assert "worse" not in verdicts


def test_the_sign_flip_test_keeps_its_level() -> None:
    generator = np.random.default_rng(23)
    rejected = sum(
        significance.sign_flip(statistics.cluster_differences([scored(generator, 20, 0.0)])).value < 0.05
        for _ in range(200)
    )
    assert rejected <= 18  # 10 expected; more than 18 happens once in 200 such tests
