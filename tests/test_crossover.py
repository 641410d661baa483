"""Is T* where two curves cross, exactly for formulae, and is it told only as surely as the rounds allow?"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from bdh_bench.results.crossover import FARTHEST, ROUNDS_TO_DECIDE, Crossover, Rounds, analytic, measured, over_rounds

FAR = 2**24
GRID = (512, 1024, 2048, 4096, 8192)


def constant(size: int, end: int = FAR) -> dict[int, int]:
    return {1: size, end: size}


def growing(per_token: int, end: int = FAR, base: int = 0) -> dict[int, int]:
    return {1: base + per_token, end: base + per_token * end}


def on_grid(of: Callable[[int], float]) -> dict[int, float]:
    return {c: of(c) for c in GRID}


def found(crossover: Crossover | None) -> Crossover:
    assert crossover is not None
    return crossover


# -- formulae --------------------------------------------------------------------------------------------------------

#: (layers, width) of a KV model with a 16-bit cache → T* of the default BDH with a 16-bit and a 32-bit state (6 layers, width 256,
#: 128 neurons per channel), to the nearest byte.
DEFAULT_BDH = {
    (6, 256): (16_384, 32_768),
    (8, 512): (6_144, 12_288),
    (12, 1024): (2_048, 4_096),
    (12, 768): (2_731, 5_461),
}


@pytest.mark.parametrize(("layers", "width"), DEFAULT_BDH)
@pytest.mark.parametrize("narrow", [True, False])
def test_default_bdh_against_four_kv_models(layers: int, width: int, narrow: bool) -> None:
    state, token = 6 * 128 * 256**2 * (2 if narrow else 4), 2 * layers * width * 2
    crossed = found(analytic(constant(state), growing(token)))
    assert crossed.at == pytest.approx((state / token,), rel=1e-12)
    assert round(crossed.at[0]) == DEFAULT_BDH[layers, width][0 if narrow else 1]
    assert (crossed.kind, crossed.lower, crossed.decided) == ("analytic", "first", True)


def test_const_state_against_linear_kv_is_exact() -> None:
    for size, token in ((1_000_000, 100), (4096, 8), (999, 7)):
        assert found(analytic(constant(size), growing(token))).at == pytest.approx((size / token,), rel=1e-14)
        assert found(analytic(growing(token), constant(size))).at == found(analytic(constant(size), growing(token))).at


def test_a_cache_with_a_fixed_part_and_one_with_a_window() -> None:
    assert found(analytic(constant(10_000), growing(8, base=2_000))).at == pytest.approx((1000,))
    window = {1: 64, 260: 64 * 260, FAR: 64 * 260}  # full after 260 tokens
    assert found(analytic(constant(64 * 250), window)).at == pytest.approx((250,))
    never = found(analytic(constant(64 * 261), window))
    assert (never.at, never.kind, never.text, never.decided) == ((), "none", f"none up to {FAR:,}", True)


def test_there_is_no_crossing_past_the_last_position() -> None:
    assert found(analytic(constant(1024 * 400), growing(1024, end=384))).text == "none up to 384"
    assert found(analytic(constant(1024 * 384), growing(1024, end=384))).at == (384.0,)
    assert analytic(constant(8), {512: 4096}) is None
    assert analytic({}, constant(8)) is None


def test_every_crossing_is_listed_and_touching_is_none() -> None:
    up_and_down = {1: 1, 100: 100, 200: 10, FAR: 10}
    several = found(analytic(up_and_down, constant(50)))
    assert several.at == pytest.approx((50, 100 + 100 * 50 / 90))
    assert several.several
    assert several.text == "50 and 156 (analytic, several)"
    assert found(analytic({1: 1, 100: 50, 200: 1}, constant(50, 200))).at == ()
    assert found(analytic(constant(50), constant(50))).at == ()
    assert found(analytic(constant(50), constant(50))).lower == ""
    flat = {1: 1, 100: 50, 200: 50, 300: 99}  # equal for a while: from the first place on
    assert found(analytic(flat, constant(50, 300))).at == (100.0,)


# -- measurements ----------------------------------------------------------------------------------------------------


def test_power_laws_are_straight_in_log_log() -> None:
    crossed = found(measured(on_grid(lambda c: 3000.0), on_grid(lambda c: c)))
    assert crossed.at == pytest.approx((3000,), rel=1e-12)
    assert crossed.kind == "measured"
    one, two = on_grid(lambda c: 7 * c**0.5), on_grid(lambda c: 0.1 * c)
    assert found(measured(one, two)).at == pytest.approx((4900,), rel=1e-12)


def test_outside_the_grid_it_is_extrapolated_and_not_far() -> None:
    for at in (100.0, 20_000.0):
        crossed = found(measured(on_grid(lambda c, at=at: at), on_grid(lambda c: c)))  # type: ignore[misc]
        assert crossed.at == pytest.approx((at,), rel=1e-12)
        assert crossed.kind == "extrapolated"
        assert not crossed.decided
        assert "extrapolated" in crossed.text
    far = found(measured(on_grid(lambda c: GRID[-1] * FARTHEST * 1.01), on_grid(lambda c: c)))
    assert (far.kind, far.at, far.reach) == ("none", (), 8192)
    apart = found(measured(on_grid(lambda c: c), on_grid(lambda c: 2.0 * c)))  # parallel lines
    assert (apart.kind, apart.lower) == ("none", "first")


def test_only_contexts_that_both_have_and_that_are_above_nothing() -> None:
    assert measured({512: 1.0}, {512: 2.0, 1024: 3.0}) is None
    assert measured({512: 0.0, 1024: 1.0}, {512: 2.0, 1024: 3.0}) is None
    assert found(measured({512: 3.0, 1024: 3.0, 2048: 3.0}, {512: 2.0, 2048: 4.0})).reach == 2048


# -- rounds ----------------------------------------------------------------------------------------------------------


def rounds_of(base: Callable[[int], float], n: int, noise: float, seed: int, shared: bool = True) -> Rounds:
    """n rounds, each slower or faster as a whole; the same for both curves where the noise is shared."""
    generator = np.random.default_rng(0 if shared else seed)
    levels = np.exp(noise * generator.normal(size=n))
    own = np.random.default_rng(seed)
    return {c: {r: base(c) * levels[r] * math.exp(0.001 * own.normal()) for r in range(n)} for c in GRID}


def test_rounds_are_drawn_together_so_what_they_share_cancels() -> None:
    flat, line = (lambda c: 3000.0), (lambda c: float(c))
    paired = found(over_rounds(rounds_of(flat, 9, 0.3, 1), rounds_of(line, 9, 0.3, 2)))
    alone = found(over_rounds(rounds_of(flat, 9, 0.3, 1, shared=False), rounds_of(line, 9, 0.3, 2, shared=False)))
    assert paired.low is not None
    assert paired.high is not None
    assert alone.low is not None
    assert alone.high is not None
    assert paired.low <= 3000 * 1.01
    assert paired.high >= 3000 * 0.99
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)
    assert (paired.decided, paired.rounds, paired.dissent) == (True, 9, 0.0)


def test_resamples_that_do_not_cross_are_told_and_decide_nothing() -> None:
    close = found(
        over_rounds(
            rounds_of(lambda c: 0.985 * 8192, 9, 0.1, 1, shared=False), rounds_of(float, 9, 0.1, 2, shared=False)
        )
    )
    assert close.dissent is not None
    assert close.dissent > 0.05
    assert not close.decided
    assert "of the resamples" in close.text
    assert "not decided" in close.text


def test_few_rounds_decide_nothing() -> None:
    flat, line = (lambda c: 3000.0), (lambda c: float(c))
    for n in (1, 2):
        few = found(over_rounds(rounds_of(flat, n, 0.1, 1), rounds_of(line, n, 0.1, 2)))
        assert (few.low, few.dissent, few.decided, few.rounds) == (None, None, False, n)
    for n in (3, 4, 5):
        some = found(over_rounds(rounds_of(flat, n, 0.1, 1), rounds_of(line, n, 0.1, 2)))
        assert some.low is not None
        assert some.decided == (n >= ROUNDS_TO_DECIDE)


def test_a_round_that_one_cell_lacks_is_left_out() -> None:
    one, two = rounds_of(lambda c: 3000.0, 6, 0.1, 1), rounds_of(float, 6, 0.1, 2)
    torn = {c: {r: v for r, v in own.items() if (c, r) != (1024, 5)} for c, own in one.items()}
    assert found(over_rounds(torn, two)).rounds == 5
    assert over_rounds({c: {} for c in GRID}, two) is None


def test_the_interval_holds_the_truth() -> None:
    """Coverage: 95 % intervals of independent noisy rounds hold the true T* in most of 60 trials; a planted bug (too narrow) would not."""
    held = 0
    for trial in range(60):
        one = rounds_of(lambda c: 3000.0, 9, 0.1, 2 * trial + 1, shared=False)
        two = rounds_of(float, 9, 0.1, 2 * trial + 2, shared=False)
        crossed = found(over_rounds(one, two))
        assert crossed.low is not None
        assert crossed.high is not None
        held += crossed.low <= 3000 <= crossed.high
    assert held >= 51
