"""Do intervals of times hold the truth, is an A/A comparison noise, and is a real difference found?"""

from __future__ import annotations

import math

import numpy as np
import pytest
from timed_run import drift, rounds

from bdh_bench.results import rounds as module
from bdh_bench.results.rounds import Rounds, noise_of, outliers, ratio_of, resampled, timing_of

SEEDS = 40


def verdicts(slower_by: float, rounds_: int = 7) -> list[str]:
    """The verdict on the first of four models in 40 runs whose rounds drift by 5 %; the first is slower by so much."""
    found = []
    for seed in range(SEEDS):
        generator = np.random.default_rng(seed)
        shared = drift(generator, rounds_)
        levels = (1.0 + slower_by, 1.0, 1.3, 0.6)
        cells: list[Rounds] = [rounds(generator, level, shared) for level in levels]
        found.append(ratio_of(cells[0], cells[1], noise_of(cells)).verdict)
    return found


def test_a_model_against_itself_is_within_noise() -> None:
    assert verdicts(0.0).count("within noise") >= 0.95 * SEEDS


def test_five_percent_are_found() -> None:
    assert verdicts(0.05).count("slower") >= 0.8 * SEEDS


def test_unpaired_rounds_would_fail_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: each side drawn with rounds of its own. The drift of the machine then is no longer cancelled."""

    def unpaired(quantities: list[Rounds]) -> np.ndarray:
        draws = [resampled([q])[:, 0] for q in quantities]
        generator = np.random.default_rng(1)
        return np.stack([generator.permutation(d) for d in draws], 1)

    monkeypatch.setattr(module, "noise_of", lambda cells: None)
    monkeypatch.setattr(module, "resampled", unpaired)
    generator = np.random.default_rng(3)
    shared = drift(generator, 7)
    a, b = (rounds(generator, level, shared) for level in (1.05, 1.0))
    assert ratio_of(a, b).verdict == "not decided"
    monkeypatch.undo()
    assert ratio_of(a, b).verdict == "slower"


def coverage(unit: str = "rounds", seeds: int = 60) -> float:
    """Share of intervals over seven rounds that hold the truth; rounds spread by 2 %, windows hardly."""
    held = 0
    for seed in range(seeds):
        generator = np.random.default_rng(seed)
        made = rounds(generator, 1.0, drift(generator, 7, 0.02), own=0.0, windows=0.002, count=30)
        if unit == "windows":  # the planted bug: every window its own unit
            made = dict(enumerate([v] for windows in made.values() for v in windows))
        found = timing_of(made)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1 <= found.high
    return held / seeds


def test_intervals_hold_the_truth() -> None:
    assert coverage() >= 0.92


def test_windows_as_units_would_claim_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdh_bench.results.rounds.RESAMPLES", 300)
    module._drawn_rounds.cache_clear()
    module._median_places.cache_clear()
    assert coverage("windows", 20) < 0.7
    module._drawn_rounds.cache_clear()
    module._median_places.cache_clear()


@pytest.mark.parametrize("w", [1, 4, 5])
def test_medians_of_drawn_windows_have_the_distribution_of_drawing_them(w: int) -> None:
    windows = np.sort(np.random.default_rng(0).normal(10, 1, w))
    quick = np.mean([windows[place] for place in module._median_places(w, 3, 0)], axis=0)
    slow = np.median(windows[np.random.default_rng(2).integers(0, w, (30_000, w))], axis=1)
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert np.quantile(quick, share) == pytest.approx(np.quantile(slow, share), abs=0.12)
    assert quick.mean() == pytest.approx(slow.mean(), abs=0.02)


def test_the_number_of_rounds_decides_what_is_said() -> None:
    generator = np.random.default_rng(0)
    for n, interval, remark in (
        (1, False, "no interval"),
        (2, False, "no interval"),
        (3, True, "few rounds"),
        (5, True, ""),
    ):
        found = timing_of(rounds(generator, 1.0, [0.0] * n, count=3))
        assert (found.low is not None) is interval
        assert found.remark.startswith(remark)
        ratio = ratio_of(rounds(generator, 2.0, [0.0] * n), rounds(generator, 1.0, [0.0] * n))
        assert (ratio.verdict == "slower") is (n >= 5)
        assert n >= 5 or f"{n} round" in ratio.reason


def test_the_point_is_the_median_over_rounds_of_medians() -> None:
    assert timing_of({1: [1.0, 2.0, 99.0], 2: [3.0, 4.0], 3: [10.0]}).value == 3.5


def test_the_same_numbers_always_give_the_same_interval() -> None:
    made = rounds(np.random.default_rng(0), 1.0, [0.0] * 5)
    assert timing_of(made) == timing_of(made)


def test_outliers_are_counted_and_stay() -> None:
    values = [1.0, 1.01, 1.02, 1.03, 1.04, 1.09, 2.0]
    assert (outliers(values).mild, outliers(values).severe) == (0, 1)
    timing = timing_of({i: [v] for i, v in enumerate(values)})
    assert timing.outliers.text == "1 severe outliers of 7 windows"
    assert timing.high == 2.0  # still drawn


def test_noise_grows_with_the_spread_and_not_with_the_shared_drift() -> None:
    def noise(own: float, spread: float) -> float:
        generator = np.random.default_rng(5)
        shared = drift(generator, 7, spread)
        found = noise_of([rounds(generator, 1.0 + i, shared, own=own, windows=own) for i in range(4)])
        assert found is not None
        return found

    assert noise(0.02, 0.0) > 3 * noise(0.002, 0.0)
    assert noise(0.002, 0.2) < 0.02
    assert noise_of([{1: [1.0], 2: [1.0]}]) is None


def test_a_ratio_below_the_least_difference_is_no_winner() -> None:
    steady = {i: [1.0] for i in range(7)}
    apart = ratio_of({i: [1.015] for i in range(7)}, steady)
    assert apart.verdict == "within noise"
    assert math.isclose(apart.value, 1.015)
    with pytest.raises(ValueError, match="no round"):
        ratio_of({1: [1.0]}, {2: [1.0]})
