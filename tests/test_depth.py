"""Do slopes, crossovers and distributions of steps say the truth that rounds were made from, and how sure are they?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from timed_run import drift, rounds, timed_run

from bdh_bench.results.claims import answer_of
from bdh_bench.results.contenders import Facts
from bdh_bench.results.depth import crossing_of, crossings_of, curves_of, slope_of
from bdh_bench.results.figures import figures_of
from bdh_bench.results.report.render_matplotlib import to_svg
from bdh_bench.results.report.render_plotly import to_plotly
from bdh_bench.results.speed import timed_of
from bdh_bench.results.tables import points_of

GRID = (1024, 2048, 4096, 8192)


def curve(level: float, per_token: float, n: int = 7, seed: int = 0) -> dict[int, dict[int, list[float]]]:
    generator = np.random.default_rng(seed)
    shared = drift(generator, n, 0.02)
    return {c: rounds(generator, level + per_token * c, shared, own=0.001, windows=0.004) for c in GRID}


def test_the_slope_of_a_growing_step_is_found() -> None:
    slope = slope_of(curve(0.003, 1e-6))
    assert slope is not None
    assert slope.low is not None
    assert slope.high is not None
    assert slope.low <= 1e-6 <= slope.high
    assert slope.value == pytest.approx(1e-6, rel=0.05)
    assert slope.verdict == "grows"
    assert slope.label.endswith("µs per 1k")
    assert float(slope.label[1:5]) == pytest.approx(1000, rel=0.05)


def test_flat_needs_both_conditions() -> None:
    steady = slope_of(curve(0.003, 0.0))
    assert steady is not None
    assert steady.verdict == "flat"
    rough = np.random.default_rng(0)
    noisy = slope_of({c: rounds(rough, 0.003, [0.0] * 7, own=0.2, windows=0.1) for c in GRID})
    assert noisy is not None
    assert noisy.low is not None
    assert noisy.high is not None
    assert noisy.low <= 0 <= noisy.high
    assert noisy.share > 0.02
    assert noisy.verdict == "not decided"


@pytest.mark.parametrize(("n", "verdict"), [(1, "not decided"), (4, "not decided"), (5, "grows")])
def test_a_slope_needs_five_rounds(n: int, verdict: str) -> None:
    slope = slope_of(curve(0.003, 1e-6, n))
    assert slope is not None
    assert slope.verdict == verdict


def test_the_slope_draws_the_same_rounds_at_every_depth() -> None:
    """The planted bug: rounds drawn apart at each depth would let what a round does to all of them pass for a slope."""
    generator = np.random.default_rng(1)
    shared = drift(generator, 7, 0.10)
    own = {c: rounds(generator, 0.003, shared, own=0.0005, windows=0.001) for c in GRID}
    apart = {c: {r + 10 * i: v for r, v in own[c].items()} for i, c in enumerate(GRID)}
    slope = slope_of(own)
    assert slope is not None
    assert slope.low is not None
    assert slope.high is not None
    assert (slope.high - slope.low) * (GRID[-1] - GRID[0]) < 0.03 * 0.003
    assert slope_of(apart) is None  # no round in common: nothing is said


def test_a_crossing_is_found_with_its_interval() -> None:
    found = crossing_of(curve(0.006, 0.0, seed=1), curve(0.003, 1e-6, seed=1))
    assert found is not None
    assert found.decided
    assert found.first == pytest.approx(3000, rel=0.05)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 2911 < found.high  # 3,000 read off a line that is straight in log-log between 2,048 and 4,096
    assert found.lower == "first"


def test_curves_that_do_not_part_decide_no_crossing() -> None:
    found = crossing_of(curve(0.003, 0.0, seed=1), curve(0.003, 0.0, seed=2))
    assert found is not None
    assert not found.decided


def test_only_the_same_runtime_and_vocabulary_cross() -> None:
    truth = {"bdh": dict.fromkeys(GRID, 0.006), "llama": {c: 0.003 + 1e-6 * c for c in GRID}}
    run = timed_run(truth, own=0.001, windows=0.002, spread=0.01)
    facts = Facts(run, points_of(run))
    assert len(crossings_of(facts, curves_of(timed_of(run)))) == 1
    sizes = {"bdh": 256, "llama": 32_000}
    cells = tuple(replace(cell, facts={"vocab_size": sizes[cell.model]}) for cell in run.cells)
    assert crossings_of(Facts(replace(run, cells=cells), points_of(run)), curves_of(timed_of(run))) == ()
    rows = tuple(replace(r, axes={"runtime": "compile"}) if r.model == "llama" else r for r in run.records)
    other = replace(run, records=rows)
    assert crossings_of(Facts(other, points_of(other)), curves_of(timed_of(other))) == ()


def test_pictures_have_slopes_ribbons_and_speeds() -> None:
    truth = {"bdh": dict.fromkeys(GRID, 0.006), "llama": {c: 0.003 + 1e-6 * c for c in GRID}}
    run = timed_run(truth, own=0.001, windows=0.002, spread=0.01)
    prefill = [replace(r, metric="prefill_s", metric_id="prefill_s", value=r.context / 2e4) for r in run.records]
    run = replace(run, records=(*run.records, *prefill))
    figures = {figure.id: figure for figure in figures_of(run, points_of(run))}
    tpot = figures["tpot"]
    assert [line.label.split(": ")[0] for line in tpot.series] == ["bdh", "llama"]
    assert tpot.series[0].label == "bdh: flat"
    assert tpot.series[1].label.endswith("µs per 1k")
    assert {dot.y for dot in figures["prefill"].series[0].points} == {2e4}
    svg, traces = to_svg(tpot), to_plotly(tpot)["data"]
    assert all(f"ribbon-{i}" in svg for i in range(2))
    filled = [trace for trace in traces if trace.get("fill") == "toself"]
    assert len(filled) == 2
    assert len(filled[0]["x"]) == 2 * len(GRID)
    dots = tpot.series[0].points
    assert filled[0]["y"] == [d.low for d in dots] + [d.high for d in reversed(dots)]
    crossing = [claim for claim in answer_of(run).claims if "equally long" in claim.text]
    assert crossing
    assert crossing[0].kind == "measured"
    assert "beyond it bdh is faster" in crossing[0].text
