"""Do tables and figures of a memory budget say what its probes say?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import synthetic_run

from bdh_bench.registry import give_bytes
from bdh_bench.results.contenders import Facts
from bdh_bench.results.figure import Figure
from bdh_bench.results.figures import figures_of
from bdh_bench.results.report.render_matplotlib import to_svg
from bdh_bench.results.report.render_plotly import to_plotly
from bdh_bench.results.store import EventWriter, Run, create_run, measurement_body, open_run
from bdh_bench.results.tables import Point, headlines_of, points_of, value_tables
from bdh_bench.spec import parse_models
from bdh_bench.types import Measurement

_BUDGET = 2**30
_TASK = "capacity:budget=1GiB"


def _probes(context: int, fits: Sequence[int], fails: Sequence[int], step: Callable[[int], float]) -> list[Measurement]:
    axes = {"budget": _BUDGET}
    rows = [Measurement("capacity_predicted_streams", 50.0, context, axes=axes)]
    for batch in fits:
        rows.append(Measurement("probe_footprint_bytes", 3e8 + batch * context * 1e3, context, batch, axes=axes))
        for repeat in range(3):
            seconds = step(batch) * (1 + 0.1 * repeat)
            rows.append(Measurement("probe_step_s", seconds, context, batch, axes=axes, repeat=repeat))
    for batch in fails:
        rows.append(
            Measurement(
                "probe_footprint_bytes", None, context, batch, axes=axes, status="oom_host", reason=f"{batch} too many"
            )
        )
    return rows


def _run(root: Path, found: dict[tuple[str, int], tuple[Sequence[int], Sequence[int]]]) -> Run:
    folder = root / "budget"
    cells = [
        {**synthetic_run.cell(model, _TASK, 0, "capacity_streams"), "context": context, "key": f"{i:064x}"}
        for i, (model, context) in enumerate(found)
    ]
    models = tuple(dict.fromkeys(model for model, _ in found))
    create_run(folder, {**synthetic_run.usual_manifest(models, 1, 1), "cells": cells})
    writer = EventWriter(folder, "w0")
    for one, ((_, context), (fits, fails)) in zip(cells, found.items(), strict=True):
        rows = [measurement_body(m) for m in _probes(context, fits, fails, lambda batch: 0.01 + 0.001 * batch)]
        writer.write("started", cell=one["key"], round=1, attempt=1)
        writer.write("result", cell=one["key"], round=1, attempt=1, status="ok", facts={}, measurements=rows)
    writer.close()
    return open_run(folder)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return _run(
        tmp_path,
        {
            ("bdh@1m", 256): ((1, 8, 40), (42,)),
            ("bdh@1m", 4096): ((1, 8, 40), (42, 80)),
            ("gpt2@1m", 256): ((1, 8, 600), (640, 700)),
            ("gpt2@1m", 4096): ((), (1,)),
        },
    )


def _point(points: Sequence[Point], model: str, metric: str, context: int) -> Point:
    (found,) = [p for p in points if (p.model, p.metric, p.context) == (model, metric, context)]
    return found


def test_both_sides_of_the_edge_are_told(run: Run) -> None:
    points = points_of(run)
    for model, context, fits, fails in (("bdh@1m", 4096, 40, 42), ("gpt2@1m", 256, 600, 640), ("gpt2@1m", 4096, 0, 1)):
        streams = _point(points, model, "capacity_streams", context)
        assert streams.value == fits
        assert f"{fails} did not fit" in streams.reason
        assert _point(points, model, "capacity_refused_streams", context).value == fails


def test_throughput_is_streams_over_the_median_step(run: Run) -> None:
    points = points_of(run)
    together = _point(points, "gpt2@1m", "capacity_tokens_per_s", 256)
    assert (together.batch_size, together.n) == (600, 1)
    assert together.value == pytest.approx(600 / (0.61 * 1.1))
    assert _point(points, "gpt2@1m", "stream_tokens_per_s", 256).value == pytest.approx(1 / (0.011 * 1.1))
    gone = _point(points, "gpt2@1m", "capacity_tokens_per_s", 4096)
    assert (gone.value, gone.status) == (None, "oom_host")


def test_a_batch_that_was_not_refused_says_so(tmp_path: Path) -> None:
    points = points_of(_run(tmp_path, {("bdh@1m", 256): ((1, 8, 4096), ())}))
    assert "no larger batch was tried" in _point(points, "bdh@1m", "capacity_streams", 256).reason
    assert not [p for p in points if p.metric == "capacity_refused_streams"]


def test_the_edge_and_both_speeds_are_shown_first_and_probes_on_request(run: Run) -> None:
    tables = value_tables(points_of(run), Facts(run, ()).titles, headlines_of(run))
    first = {table.title.partition(": ")[2] for table in tables if not table.detail}
    assert first == {
        "streams within the budget",
        "decoded tokens per second, all streams that fit",
        "decoded tokens per second, one stream",
    }
    details = {table.title.partition(": ")[2]: table for table in tables if table.detail}
    assert {"footprint of a probe", "fewest streams past the budget"} <= details.keys()
    assert "gpt2 · batch=640" in " ".join(row[0].text for row in details["footprint of a probe"].rows)


def test_figures_show_throughput_and_where_one_stream_fails(run: Run) -> None:
    figures: dict[str, Figure] = {figure.id: figure for figure in figures_of(run, points_of(run))}
    assert {"throughput", "streams", "one-stream"} <= figures.keys()
    lines = {line.label: line for line in figures["throughput"].series}
    assert set(lines) == {f"{m} · streams={s}" for m in ("bdh", "gpt2") for s in ("all that fit", "one")}
    bdh = lines["bdh · streams=all that fit"]
    assert [dot.y for dot in bdh.points] == [pytest.approx(40 / 0.055)] * 2
    assert [(m.x, m.kind) for m in figures["throughput"].marks] == [(256, "failed")] * 2
    memory = figures["one-stream"]
    assert [(m.x, m.y, m.kind) for m in memory.marks] == [(4096, _BUDGET, "failed")]
    assert [reference.value for reference in memory.references] == [_BUDGET]
    for name in ("throughput", "streams", "one-stream"):
        svg, plot = to_svg(figures[name]), to_plotly(figures[name])
        assert all(mark.label in svg for mark in figures[name].marks)
        assert sum(len(t["x"]) for t in plot["data"] if t["name"] == "marks") == len(figures[name].marks)


def test_the_map_holds_the_largest_batches_and_why_there_is_none(tmp_path: Path) -> None:
    found = {
        ("bdh@1m", 256): ((1, 8, 40), (42,)),
        ("bdh@1m", 4096): ((1, 8), (9,)),
        ("gpt2@1m", 256): ((1, 8, 600), (640,)),
        ("gpt2@1m", 4096): ((), (1,)),
        ("mamba@1m", 256): ((1, 8), (9,)),
    }
    run = _run(tmp_path, found)
    figure = next(figure for figure in figures_of(run, points_of(run)) if figure.id == "streams-map")
    said = {
        (heat.label, figure.x.read(cell.x)): (cell.value, cell.text) for heat in figure.heats for cell in heat.cells
    }
    assert said == {
        ("bdh", "256"): (40, "40"),
        ("bdh", "4k"): (8, "8"),
        ("gpt2", "256"): (600, "600"),
        ("gpt2", "4k"): (0, "0"),  # measured: not even one
        ("mamba", "256"): (8, "8"),
        ("mamba", "4k"): (None, "not run"),
    }
    shades = {cell.value: cell.shade for heat in figure.heats for cell in heat.cells}
    assert (shades[600], shades[0], shades[None]) == (1, 0, None)
    assert 0 < float(shades[8] or 0) < float(shades[40] or 0) < 1


def test_the_short_form_of_the_budget(cli: Callable[..., tuple[int, str, str]]) -> None:
    tasks = parse_models("capacity,memory,latency:steps=3")
    assert [str(t) for t in give_bytes(tasks, "budget", "2GiB")] == [
        "capacity:budget=2GiB",
        "memory",
        "latency:steps=3",
    ]
    assert str(give_bytes(parse_models("capacity:budget=1GiB"), "budget", "2GiB")[0]) == "capacity:budget=1GiB"
    request: list[Any] = ["run", "--models", "toy:uniform", "--contexts", "16", "--dry-run"]
    code, out, _ = cli(*request, "--task", "capacity:most=4", "--budget", "300MiB")
    assert (code, "capacity:budget=300MiB:most=4" in out) == (0, True)
    code, _, said = cli(*request, "--task", "memory", "--budget", "300MiB")
    assert (code, "capacity" in said) == (2, True)
    assert cli(*request, "--task", "capacity", "--budget", "much")[0] == 2
