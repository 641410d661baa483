"""Does the calculator know what the rows say, and nothing beyond them?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_run import write_run

from bdh_bench.results.capacity_calculator import Known, known_of, without_script
from bdh_bench.results.capacity_planning import Grids, Wish
from bdh_bench.results.contenders import Facts
from bdh_bench.results.report.page import content_of, render
from bdh_bench.results.store import Run
from bdh_bench.results.tables import points_of

_BATCHES, _CONTEXTS = (1, 8, 64), (128, 512, 2048)


def with_probes(run: Run) -> Run:
    """Probes of bdh and mamba: 300 MB and a share per stream; a step of 2 ms and some per stream."""

    def rows() -> Iterator[object]:
        for name, each, extra in (("bdh@1m", 2e6, 1e-4), ("mamba@1m", 3e5, 5e-5)):
            template = next(r for r in run.records if r.model == name and r.metric == "state_bytes")
            for batch in _BATCHES:
                for context in _CONTEXTS:
                    own = replace(template, task="capacity", batch_size=batch, context=context, axes={"budget": 2**30})
                    for metric, value in (
                        ("probe_footprint_bytes", 3e8 + batch * (each + 100 * context)),
                        ("probe_step_s", 0.002 + batch * extra),
                    ):
                        yield replace(own, metric=metric, metric_id=metric, value=value)

    return replace(run, records=(*run.records, *rows()))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return with_probes(write_run(tmp_path_factory.mktemp("run"), crash=None))


def known(run: Run) -> dict[str, Known]:
    return {one.label: one for one in known_of(Facts(run, points_of(run)))}


def test_the_formula_rests_on_the_counted_rows(run: Run) -> None:
    gpt2 = known(run)["gpt2"]
    assert (gpt2.weights, gpt2.max_positions) == (4_000_000, 384)
    assert gpt2.state_at(200) == 6144 * 200
    found = gpt2.capacity(Wish(2**30, 200))
    assert (found.streams, found.streams_by) == ((2**30 - 4_000_000) // (6144 * 200), "formula")
    late = gpt2.capacity(Wish(2**30, 385))
    assert (late.streams, late.limit) == (0, "position limit: 384 tokens")
    assert gpt2.capacity(Wish(2**30, 300)).streams is None  # two unequal states make no line


def test_beyond_the_counted_contexts_only_a_line_speaks() -> None:
    nothing = Grids({}, {}, {})
    line = Known("m", "m", 1, {1: 110, 2: 120, 4: 140}, None, nothing)
    assert [line.state_at(at) for at in (3, 100, 2)] == [130, 1100, 120]
    window = Known("m", "m", 1, {1: 110, 2: 120, 4: 120}, None, nothing)
    assert [window.state_at(at) for at in (3, 100)] == [120, None]
    assert Known("m", "m", 1, {1: 50, 2: 50}, None, nothing).state_at(10**6) == 50
    assert (
        Known("m", "m", None, {1: 50}, None, nothing).capacity(Wish(2**30, 1)).limit.startswith("unknown: its weights")
    )


def test_probes_are_a_grid_and_one_batch_is_none(run: Run, tmp_path: Path) -> None:
    found = known(run)["bdh"].capacity(Wish(400_000_000, 512, price=3.6))
    # 45 streams need less: chords in log-log err low
    assert found.streams_by == found.tokens_by == "measured"
    assert 38 <= (found.streams or 0) <= 45
    assert found.tokens_per_s == pytest.approx(found.streams / (0.002 + found.streams * 1e-4), rel=0.12)  # type: ignore[operator]
    assert found.cost_per_million == pytest.approx(1000 / found.tokens_per_s)  # type: ignore[operator]
    alone = known(write_run(tmp_path, crash=None))["bdh"]
    assert alone.grids.footprints == {}
    assert alone.capacity(Wish(2**30, 512)).streams_by == "formula"


def test_the_table_without_a_script(run: Run, tmp_path: Path) -> None:
    facts = Facts(run, points_of(run))
    fixed = without_script(facts, known_of(facts))
    assert fixed.context == 2048
    rows = {(row[0].text, row[1].text): row for row in fixed.table.rows}
    assert set(rows) == {(m, b) for m in ("bdh", "gpt2", "mamba") for b in ("16 GiB", "80 GiB")}
    assert rows["bdh", "16 GiB"][2].text == "64 (measured)"
    assert rows["bdh", "16 GiB"][3].text.endswith("(measured)")
    assert rows["gpt2", "80 GiB"][2].text == "0 (formula)"
    page = render(content_of(run))
    assert 'id="capacity-table"' in page
    none = write_run(tmp_path, tasks=("long_ppl",), crash=None)
    assert 'id="capacity-table"' not in render(content_of(none))
