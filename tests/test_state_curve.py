"""Do the stored knots give a model's state at every context, and with them the T* of the formulae?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bdh_bench import load_model
from bdh_bench.models import bdh, llama, toy
from bdh_bench.results.crossover import analytic
from bdh_bench.runner.state_curve import FARTHEST, MOST_KNOTS, knots
from bdh_bench.runner.worker import _model_facts
from bdh_bench.spec import parse_model

FORMULAE: dict[str, tuple[Callable[[int], int], list[int]]] = {
    "constant": (lambda c: 4096, [1, FARTHEST]),
    "cache": (lambda c: 100 + 24 * c, [1, FARTHEST]),
    "window": (lambda c: 24 * min(c, 259), [1, 259, FARTHEST]),
    "two windows": (lambda c: 24 * min(c, 259) + 7 * min(c, 1_000_003) + c, [1, 259, 1_000_003, FARTHEST]),
    "late": (lambda c: max(0, c - 77), [1, 77, FARTHEST]),
}


@pytest.mark.parametrize("name", FORMULAE)
def test_the_knots_are_where_the_formula_bends(name: str) -> None:
    formula, places = FORMULAE[name]
    assert knots(formula, None) == [[c, formula(c)] for c in places]


def test_the_last_position_is_the_last_knot() -> None:
    assert knots(lambda c: 8 * c, 384) == [[1, 8], [384, 3072]]


def test_a_staircase_has_no_few_knots() -> None:
    asked: list[int] = []

    def stairs(context: int) -> int:
        asked.append(context)
        return 64 * -(-context // 64)

    assert knots(stairs, None) is None
    assert len(asked) < 20 * MOST_KNOTS


def of(model: str) -> list[list[int]]:
    found = _model_facts(load_model(model), parse_model(model), 16)["state_curve"]
    assert isinstance(found, list)
    return found


def at(curve: list[list[int]]) -> tuple[float, ...]:
    crossed = analytic(dict(map(tuple, of("toy:const_state:bytes=96000"))), dict(map(tuple, curve)))  # type: ignore[arg-type]
    assert crossed is not None
    return crossed.at


def test_a_cell_holds_them_and_they_give_the_known_crossing() -> None:
    """toy:const_state and toy:linear_kv, whose T* is size / bytes per token."""
    assert at(of("toy:linear_kv:bytes_per_token=96")) == pytest.approx((1000,), rel=1e-14)
    assert at(of("toy:linear_kv:bytes_per_token=7")) == pytest.approx((96000 / 7,), rel=1e-14)


def test_the_formula_of_the_default_bdh_against_llama_of_its_shape() -> None:
    """T* = L·mult·D²·b_state / (2·L_kv·d_kv·b_kv): 16,384 with equal types, and twice that with a cache of half as many heads."""
    with torch.device("meta"):
        ours = bdh.Model(bdh.Config())
        theirs = llama.Model(llama.Config(n_layer=6, d_model=256, n_head=4))
        half = llama.Model(llama.Config(n_layer=6, d_model=256, n_head=4, kv_heads=2))
    curves = [dict(map(tuple, knots(lambda c, m=m: m.state_bytes(1, c), None) or [])) for m in (ours, theirs, half)]  # type: ignore[misc, arg-type]
    for curve, expected in ((curves[1], 16_384.0), (curves[2], 32_768.0)):
        crossed = analytic(curves[0], curve)
        assert crossed is not None
        assert crossed.at == pytest.approx((expected,), rel=1e-14)


def test_toy_models_are_what_this_file_thinks() -> None:
    model = toy.Model(toy.Config("linear_kv"))
    assert model.state_bytes(1, 10) == 10 * model.config.bytes_per_token
