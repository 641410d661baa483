"""Do intervals behave as intervals must?"""

from __future__ import annotations

import time

import numpy as np
import pytest

from bdh_bench.results import statistics
from bdh_bench.results.statistics import bootstrap_ratio, merge_samples, paired_difference, t_interval

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
