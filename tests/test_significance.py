"""Are p-values what a hand with pencil and paper would find?"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from bdh_bench.results.significance import EXACT_UNITS, holm, mcnemar, sign_flip


def test_sign_flip_is_the_share_of_all_signs() -> None:
    own = [0.3, -0.1, 0.4, 0.2, -0.05]
    signs = list(product((-1, 1), repeat=len(own)))
    reached = sum(abs(sum(s * d for s, d in zip(one, own, strict=True))) >= abs(sum(own)) - 1e-12 for one in signs)
    found = sign_flip(own)
    assert found.value == pytest.approx(reached / len(signs))
    assert (found.floor, found.units, found.exact) == (2 / 2**5, 5, True)


@pytest.mark.parametrize(("n", "floor"), [(3, 0.25), (5, 0.0625), (6, 0.03125), (EXACT_UNITS, 2**-12)])
def test_the_floor_is_reached_where_all_agree(n: int, floor: float) -> None:
    assert sign_flip([0.01 * (i + 1) for i in range(n)]).value == floor == sign_flip([-1.0] * n).floor


def test_many_units_are_drawn_and_never_give_zero() -> None:
    found = sign_flip(np.full(40, 0.1))
    assert (found.value, found.exact) == (1 / 10_001, False)
    assert found.value == found.floor
    assert sign_flip([0.0] * 20).value == 1.0
    assert sign_flip([0.0] * 5).value == 1.0
    generator = np.random.default_rng(3)
    assert 0.3 < np.mean([sign_flip(generator.normal(size=20)).value < 0.5 for _ in range(60)]) < 0.7


def test_drawn_and_exact_agree() -> None:
    own = np.random.default_rng(1).normal(0.3, 1.0, EXACT_UNITS)
    padded = sign_flip([*own, 0.0])  # a unit without difference changes no sum, but is one too many for the exact test
    assert not padded.exact
    assert padded.value == pytest.approx(sign_flip(own).value, abs=0.015)


def test_mcnemar_is_the_binomial_tail() -> None:
    assert mcnemar(1, 7).value == pytest.approx(2 * (1 + 8) / 2**8)
    assert mcnemar(7, 1) == mcnemar(1, 7)
    assert mcnemar(4, 4).value == 1.0
    assert mcnemar(0, 0).value == 1.0
    assert mcnemar(0, 5).value == mcnemar(0, 5).floor == 2 / 2**5
    with pytest.raises(ValueError, match="counts"):
        mcnemar(-1, 2)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )  # 4·.005, 3·.01, 2·.03, then no less
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
