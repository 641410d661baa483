"""Do the engine's figures say what was measured? The parts of the benchmark that a ratio rests on."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

_PATH = Path(__file__).parents[1] / "benchmarks" / "engine.py"
_SPEC = importlib.util.spec_from_file_location("engine_benchmark", _PATH)
assert _SPEC is not None
engine = importlib.util.module_from_spec(_SPEC)
sys.modules["engine_benchmark"] = engine
_SPEC.loader.exec_module(engine)  # type: ignore[union-attr]


@pytest.mark.parametrize("share", [0.05, 0.27])
def test_the_planted_density_is_the_density_of_the_keys(share: float) -> None:
    net = engine._silenced(engine.model((2, 64, 4, 128)), share)
    seen = net.observe(net.memory(1), 0, engine.text(1, 200))
    for activity in seen:
        assert float((activity.keys != 0).float().mean()) == pytest.approx(share, rel=0.15)


def test_sides_take_turns_and_the_first_round_is_thrown_away() -> None:
    calls: list[str] = []
    found = engine.alternate(2, lambda: calls.append("a") or 1.0, lambda: calls.append("b") or 2.0)
    assert calls == ["a", "b"] * 3
    assert found == [[1.0, 2.0], [1.0, 2.0]]


def test_a_figure_is_the_median_with_its_extremes(tmp_path: Path) -> None:
    one = engine.figure("x", [3.0, 1.0, 2.0], "≥ 2")
    assert (one.value, one.low, one.high, one.rounds) == (2.0, 1.0, 3.0, 3)
    engine.write(tmp_path / "t.csv", [one])
    comment, *table = (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()
    assert comment.startswith("# ")
    assert next(csv.DictReader(table))["value"] == "2"
