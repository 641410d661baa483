"""Do intervals behave as intervals must?"""

from __future__ import annotations

import time

import numpy as np
import pytest

from bdh_bench.results import statistics
from bdh_bench.results.resampling import PERCENTILE_FROM, RESAMPLES, intervals
from bdh_bench.results.statistics import (
    bootstrap_ratio,
    cluster_differences,
    merge_samples,
    paired_difference,
    t_inside,
    t_interval,
    t_p_value,
    two_level_difference,
    wilson,
)

EVEN = {f"d{i}": (8.0, 128.0) for i in range(12)}


def noisy(seed: int, n: int = 30, shift: float = 0.0) -> dict[str, tuple[float, float]]:
    shared = np.random.default_rng(0).normal(2.3, 0.3, n)
    own = np.random.default_rng(seed).normal(shift, 0.01, n)
    return {f"d{i}": (float(shared[i] + own[i]), float(100 + 10 * i)) for i in range(n)}


def test_equal_documents_have_no_width() -> None:
    estimate = bootstrap_ratio(EVEN)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (8.0, 8.0, 8.0, 12)


def test_the_ratio_weighs_documents() -> None:
    assert bootstrap_ratio({"a": (1.0, 3.0), "b": (5.0, 1.0)}).value == 2.0


def test_pairing_removes_what_documents_share() -> None:
    one, two = noisy(1), noisy(2, shift=0.02)
    paired = paired_difference(one, two)
    apart = [bootstrap_ratio(one), bootstrap_ratio(two)]
    assert paired.high is not None
    assert paired.low is not None
    assert paired.high - paired.low < 0.3 * min((e.high or 0) - (e.low or 0) for e in apart)
    assert paired.value == pytest.approx(apart[0].value - apart[1].value)
    assert paired.mde == pytest.approx(2.8 * (paired.se or 0))
    assert not paired.contains_zero


def test_a_model_equals_itself() -> None:
    same = paired_difference(noisy(1), noisy(1))
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert same.contains_zero


def test_the_interval_covers_the_truth() -> None:
    generator = np.random.default_rng(7)
    hits = 0
    for _ in range(100):
        values = generator.normal(2.0, 0.5, 40)
        estimate = bootstrap_ratio({str(i): (float(v), 1.0) for i, v in enumerate(values)})
        hits += (estimate.low or 0) <= 2.0 <= (estimate.high or 0)
    assert 85 <= hits <= 100


def test_the_same_run_gives_the_same_interval() -> None:
    assert bootstrap_ratio(noisy(3)) == bootstrap_ratio(noisy(3))


def test_few_documents_have_no_interval_and_exclude_nothing() -> None:
    estimate = bootstrap_ratio(noisy(1, n=4))
    assert (estimate.low, estimate.high, estimate.mde) == (None, None, None)
    assert estimate.contains_zero


def test_several_rows_of_a_document_stay_one_document() -> None:
    assert merge_samples([("a", 1.0, 1.0), ("a", 3.0, 3.0), ("b", 2.0, 1.0)]) == {"a": (2.5, 4.0), "b": (2.0, 1.0)}


def test_nothing_weighed_is_an_error() -> None:
    with pytest.raises(ValueError, match="positive weight"):
        bootstrap_ratio({"a": (1.0, 0.0)})


def test_seeds_use_students_t() -> None:
    estimate = t_interval([1.0, 2.0, 3.0])
    half = 4.302652730 / 3**0.5
    assert (estimate.low, estimate.high) == (pytest.approx(2 - half), pytest.approx(2 + half))
    assert t_interval([1.0, 2.0]).low is None
    assert statistics.t_quantile(40) == pytest.approx(2.0211, abs=1e-3)


def test_many_documents_stay_fast() -> None:
    many = noisy(1, n=1500)
    start = time.perf_counter()
    bootstrap_ratio(many)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(("values", "middle"), [([3.0, 1.0, 2.0], 2.0), ([4.0, 1.0, 2.0, 3.0], 2.5)])
def test_median(values: list[float], middle: float) -> None:
    assert statistics.median(values) == middle


# -- clusters --------------------------------------------------------------------------------------------------------


def width(estimate: statistics.Estimate) -> float:
    return (estimate.high or 0) - (estimate.low or 0)


def test_clusters_widen_the_interval_and_count_once() -> None:
    """Ten books of four chapters each: the chapters of a book share their difference."""
    own = np.random.default_rng(5).normal(0, 0.02, 10)
    one = {f"{book}/{chapter}": (2.0 + own[book], 100.0) for book in range(10) for chapter in range(4)}
    two = {name: (2.0, 100.0) for name in one}
    books = {name: name.split("/")[0] for name in one}
    loose, tied = paired_difference(one, two), paired_difference(one, two, books)
    assert tied.value == pytest.approx(loose.value)
    assert (loose.units, tied.units, tied.n) == (40, 10, 40)
    assert width(tied) > 1.7 * width(loose)  # √4 in theory
    assert len(cluster_differences([(one, two)], books)) == 10
    assert float(cluster_differences([(one, two)], books).sum()) == pytest.approx(tied.value)


def test_documents_without_a_cluster_stay_their_own() -> None:
    one = noisy(1)
    assert bootstrap_ratio(one, {}) == bootstrap_ratio(one)
    alone = {"d0": "d7"}  # a cluster that is called like another document is not that document
    assert bootstrap_ratio(one, alone).units == len(one)
    assert bootstrap_ratio(one, {"d0": "same", "d1": "same"}).units == len(one) - 1


def test_fewer_than_five_clusters_have_no_interval() -> None:
    assert bootstrap_ratio(noisy(1), {f"d{i}": f"book{i % 4}" for i in range(30)}).low is None


# -- BCa -------------------------------------------------------------------------------------------------------------


def test_bca_is_used_below_thirty_clusters() -> None:
    assert bootstrap_ratio(noisy(1, n=PERCENTILE_FROM - 1)).method == "bca"
    assert bootstrap_ratio(noisy(1, n=PERCENTILE_FROM)).method == "percentile"


def test_bca_reads_the_percentiles_of_efron() -> None:
    """On draws that are an even grid, the ends must be Φ(z0 + (z0+z)/(1 − a(z0+z))), worked out here by hand."""
    from statistics import NormalDist

    normal = NormalDist()
    draws = np.linspace(-0.4, 0.6, 100_001)  # 40 % below the estimate
    jackknife = np.array([3.0, 0.0, 0.0, 0.0, 0.0])
    mean = 0.6
    apart = [mean - 3.0, *[mean] * 4]
    a = sum(d**3 for d in apart) / (6 * sum(d**2 for d in apart) ** 1.5)
    z0 = normal.inv_cdf(0.4)
    for got, share in zip(intervals(draws, jackknife, [0.95])[0], (0.025, 0.975), strict=True):
        z = z0 + normal.inv_cdf(share)
        assert got == pytest.approx(normal.cdf(z0 + z / (1 - a * z)) - 0.4, abs=1e-4)


def test_bca_leans_with_a_skewed_statistic_and_not_with_an_even_one() -> None:
    values = {str(i): (float(v), 1.0) for i, v in enumerate(np.random.default_rng(2).exponential(1.0, 20) ** 2)}
    bca = bootstrap_ratio(values)
    plain = _percentile(values)
    assert bca.high is not None
    assert bca.low is not None
    assert bca.high > plain[1] + 0.02  # the long tail is on the right
    assert bca.low > plain[0]
    even = {str(i): (float(i), 1.0) for i in range(-10, 11)}
    assert bootstrap_ratio(even).low == pytest.approx(_percentile(even)[0], abs=0.25)


def _percentile(samples: dict[str, tuple[float, float]]) -> tuple[float, float]:
    values = np.array([v for v, _ in samples.values()])
    drawn = np.random.default_rng(9).choice(values, (RESAMPLES, len(values))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def test_bca_covers_a_skewed_truth_at_least_as_often() -> None:
    generator, hits, plain = np.random.default_rng(11), 0, 0
    for _ in range(120):
        values = {str(i): (float(v), 1.0) for i, v in enumerate(generator.exponential(1.0, 15))}
        estimate, ends = bootstrap_ratio(values), _percentile(values)
        hits += (estimate.low or 0) <= 1.0 <= (estimate.high or 0)
        plain += ends[0] <= 1.0 <= ends[1]
    assert plain <= hits
    assert hits >= 0.85 * 120


def test_the_inner_interval_holds_ninety_percent() -> None:
    """Two one-sided tests at 5 %: 1.645 standard errors for many documents, t(0.95) for seeds."""
    values = {str(i): (float(v), 1.0) for i, v in enumerate(np.random.default_rng(8).normal(2.0, 0.5, 200))}
    many = bootstrap_ratio(values)
    assert many.inner is not None
    assert many.value - many.inner[0] == pytest.approx(1.645 * (many.se or 0), rel=0.03)
    assert many.inner[1] - many.value == pytest.approx(1.645 * (many.se or 0), rel=0.03)
    seeds = t_interval([1.0, 2.0, 3.0])
    assert seeds.inner == pytest.approx((2 - 2.919986 / 3**0.5, 2 + 2.919986 / 3**0.5))


# -- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("df", "level", "t"),
    [
        (1, 0.95, 12.7062),
        (2, 0.95, 4.30265),
        (4, 0.95, 2.77645),
        (9, 0.95, 2.26216),
        (2, 0.90, 2.91999),
        (30, 0.99, 2.75000),
    ],
)
def test_student_quantiles_are_the_tabulated_ones(df: int, level: float, t: float) -> None:
    assert statistics.t_quantile(df, level) == pytest.approx(t, rel=2e-5)
    assert t_inside(t, df) == pytest.approx(level, abs=1e-5)


def test_the_t_test_and_its_interval_agree() -> None:
    values = [0.010, 0.014, 0.021, 0.007, 0.012]
    estimate = t_interval(values)
    at_zero = [v - (estimate.low or 0) for v in values]  # shifted so that the interval just touches 0
    assert t_p_value(at_zero) == pytest.approx(0.05)
    assert t_p_value(values) < 0.05
    assert (t_p_value([1.0, 1.0, 1.0]), t_p_value([0.0] * 3), t_p_value([1.0, 2.0])) == (0.0, 1.0, 1.0)


def test_wilson_is_its_closed_form() -> None:
    """The ends solve (p − k/n)² = z²·p(1 − p)/n."""
    z = 1.959963985
    for successes, trials in ((45, 50), (1, 100), (50, 100), (30, 200)):
        found = wilson(successes, trials)
        for end in (found.low, found.high):
            assert end is not None
            assert (end - successes / trials) ** 2 == pytest.approx(z**2 * end * (1 - end) / trials, rel=1e-6)
    half = wilson(25, 50)
    assert width(half) / 2 == pytest.approx(0.134, abs=0.001)  # ±13.4 points at n = 50
    assert (wilson(0, 10).low, wilson(10, 10).high) == (0.0, 1.0)
    assert (wilson(0, 10).high or 0) > 0.2
    with pytest.raises(ValueError, match="trials"):
        wilson(3, 2)


# -- seeds and documents together ------------------------------------------------------------------------------------


def seeds_of(n: int, between: float) -> list[tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]]:
    moves = np.random.default_rng(4).normal(0, between, n)
    return [(noisy(2 * s, shift=0.05 + moves[s]), noisy(2 * s + 1)) for s in range(n)]


def test_two_levels_see_what_seeds_do() -> None:
    calm, wild = seeds_of(5, 0.0), seeds_of(5, 0.03)
    documents = [statistics.mean_difference(pairs) for pairs in (calm, wild)]
    both = [two_level_difference(pairs) for pairs in (calm, wild)]
    assert both[1].value == pytest.approx(documents[1].value)
    assert (both[1].se or 0) > 8 * (documents[1].se or 0)  # documents alone do not know that seeds differ
    assert (both[0].se or 0) < 3 * (documents[0].se or 0)
    assert two_level_difference(calm[:2]).low is None


def test_the_mean_over_one_seed_is_the_paired_difference() -> None:
    assert statistics.mean_difference([(noisy(1), noisy(2))]) == paired_difference(noisy(1), noisy(2))


def test_two_hundred_documents_ten_contexts_six_models_take_a_second() -> None:
    generator = np.random.default_rng(0)
    many = [{str(i): (float(v), 128.0) for i, v in enumerate(generator.normal(2, 0.3, 200))} for _ in range(60)]
    bootstrap_ratio(many[0])  # the draws are shared by all that follow
    start = time.process_time()
    for samples in many:
        bootstrap_ratio(samples)
    assert time.process_time() - start < 1.0
