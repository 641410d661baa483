"""Is T* of footprints that of the measured marks, said as surely as one round allows, and drawn where it lies?"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_run import write_run

from bdh_bench.results.contenders import Facts
from bdh_bench.results.figure import Figure
from bdh_bench.results.figures import figures_of
from bdh_bench.results.footprint_crossover import footprint_crossovers
from bdh_bench.results.report.page import content_of
from bdh_bench.results.store import Run
from bdh_bench.results.tables import points_of


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Footprints of 300 MB + 3 states + 100 bytes a token: bdh 1 MiB of state, gpt2 6,144 bytes a token up to 256."""
    return write_run(tmp_path, models=("bdh@1m", "gpt2@1m", "mamba@1m"), crash=None)


def _figures(run: Run) -> dict[str, Figure]:
    return {figure.id: figure for figure in figures_of(run, points_of(run))}


def _line(left: float, right: float) -> float:
    """Where log ratios of these signs cross between 128 and 256, in log context."""
    return math.exp(math.log(128) + left / (left - right) * math.log(2))


def test_footprints_cross_where_they_were_measured_to(run: Run) -> None:
    found = {c.second: c.found for c in footprint_crossovers(Facts(run, points_of(run)))}

    def bytes_of(state: float, context: int) -> float:
        return 300_000_000 + 3 * state + 100 * context

    ratios = [math.log(bytes_of(2**20, c) / bytes_of(6144 * c, c)) for c in (128, 256)]
    gpt2 = found["gpt2@1m"]
    assert gpt2.at == pytest.approx((_line(*ratios),))
    assert (gpt2.kind, gpt2.lower, gpt2.decided) == ("measured", "first", False)
    assert "single round" in gpt2.text
    assert found["mamba@1m"].at == ()


def test_a_footprint_with_another_batch_is_another_curve(run: Run) -> None:
    others = tuple(
        replace(r, batch_size=4) if (r.model, r.metric) == ("gpt2@1m", "peak_footprint_bytes") else r
        for r in run.records
    )
    changed = replace(run, records=others)
    assert {c.second for c in footprint_crossovers(Facts(changed, points_of(changed)))} == {"mamba@1m"}


def test_the_page_has_the_table(run: Run) -> None:
    table = next(t for t in content_of(run).tables if t.id == "table-footprint-crossover")
    rows = {row[0].text: row[1].text for row in table.rows}
    assert set(rows) == {"bdh and gpt2", "bdh and mamba"}
    assert "not decided: a single round" in rows["bdh and gpt2"]


def test_both_crossings_are_marked_where_they_lie(run: Run) -> None:
    figures = _figures(run)
    (state,) = [mark for mark in figures["memory"].marks if mark.kind == "crossing"]
    ratios = [math.log(2**20 / (6144 * c)) for c in (128, 256)]
    assert state.x == pytest.approx(_line(*ratios), rel=1e-6)  # 2**20 / 6144 = 170.67
    assert state.y == pytest.approx(2**20)
    assert "171" in state.label
    (peak,) = [mark for mark in figures["peak"].marks if mark.kind == "crossing"]
    assert 128 < peak.x < 256
    assert peak.y == pytest.approx(300_000_000 + 3 * 2**20 + 100 * peak.x, rel=1e-4)
