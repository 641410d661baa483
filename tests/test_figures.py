"""Do figures hold what the points say, and do both renderers draw all of it?"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import write_run

from bdh_bench.results.contenders import Facts
from bdh_bench.results.figure import (
    FAMILY_STYLE,
    SHADES,
    Axis,
    Band,
    Cell,
    Dot,
    Figure,
    Heat,
    Mark,
    Reference,
    Series,
    from_json,
    ink_on,
    styles_of,
    to_json,
)
from bdh_bench.results.figures import figures_of
from bdh_bench.results.reach import BEYOND, shaded_places
from bdh_bench.results.report.page import figure_table
from bdh_bench.results.report.render_matplotlib import to_svg
from bdh_bench.results.report.render_plotly import to_plotly
from bdh_bench.results.store import Run
from bdh_bench.results.tables import points_of


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Figure]:
    run = write_run(tmp_path_factory.mktemp("run"))
    return {figure.id: figure for figure in figures_of(run, points_of(run))}


def test_the_expected_figures_exist(figures: dict[str, Figure]) -> None:
    assert set(figures) == {
        "quality",
        "memory",
        "peak",
        "prefill",
        "tpot",
        "pareto",
        "training",
        "training-flops",
        "training-seconds",
    }


def test_json_round_trip(figures: dict[str, Figure]) -> None:
    for figure in figures.values():
        assert from_json(json.loads(json.dumps(to_json(figure), allow_nan=False))) == figure


def test_gpt2_is_drawn_as_stopped(figures: dict[str, Figure]) -> None:
    quality = figures["quality"]
    assert [(mark.x, mark.kind) for mark in quality.marks] == [(256, "stopped")]
    gpt2 = next(line for line in quality.series if line.label == "gpt2")
    assert [dot.y is None for dot in gpt2.points] == [False, False, True, True, True]
    assert {reference.label for reference in quality.references} == {"order-0 byte model", "order-2 byte model", "zlib"}


def test_what_cannot_stand_on_a_log_axis_is_a_gap(figures: dict[str, Figure]) -> None:
    assert "toy:uniform" in " ".join(figures["memory"].notes)
    assert all(dot.y is None or dot.y > 0 for line in figures["memory"].series for dot in line.points)


def test_styles_are_stable_and_distinct() -> None:
    alone = styles_of([("bdh", "bdh")])["bdh"]
    crowd = styles_of([("a", "gpt2"), ("b", "bdh"), ("c", "bdh"), ("d", "someone's"), ("e", "other")])
    assert crowd["b"] == alone == FAMILY_STYLE["bdh"]
    assert crowd["c"][0] == crowd["b"][0]
    assert len({(color, marker) for color, marker, _ in crowd.values()}) == 5


def whole() -> Figure:
    dots = (Dot(1, 1.0, 0.9, 1.1), Dot(2, None, status="crash"), Dot(4, 3.0))
    series = (
        Series("m", "_measured $x_1$", dots, "measured", "#D55E00", "cross", "solid"),
        Series("a", "theory", dots, "analytic", "#0072B2", "square", "dot"),
        Series("e", "beyond", dots, "extrapolated", "#009E73", "star", "longdash"),
    )
    ticks = ((1.0, "1"), (4.0, "4"))
    return Figure(
        "whole", "Whole", "everything", Axis("x", "bytes", "log", ticks), Axis("y", "", "linear"), series,
        (Reference("line", 2.0, "dash"),), (Mark(4, 3, "ended", "stopped"), Mark(1, 1, "broke", "failed")), (Band(2, 4, "a region"),),
    )  # fmt: skip


def mapped() -> Figure:
    """Two models on one map; one square has no value, one is truly 0."""
    cells = (
        Cell(0, 2, 40.0, "forty", 1.0),
        Cell(1, 2, 0.0, "zero", 0.0),
        Cell(0, 1, None, "crash", None, "crash: why"),
        Cell(1, 1, 5.0, "five", 0.4),
    )
    heats = (Heat("m", "model", cells, "model"), Heat("o", "other", (Cell(0, 0, 7.0, "seven", 0.5),), "other"))
    x, y = (Axis(name, "", "ordinal", ((0.0, f"{name}0"), (1.0, f"{name}1"), (2.0, f"{name}2"))) for name in "xy")
    return Figure("mapped", "Mapped", "squares", x, y, (), heats=heats, z="streams", height=0.5)


def test_both_renderers_draw_every_square() -> None:
    figure = mapped()
    svg, plot = to_svg(figure), to_plotly(figure)
    maps = [trace for trace in plot["data"] if trace["type"] == "heatmap"]
    assert [(m["x"], m["y"], m["z"]) for m in maps] == [
        ([0, 1], [1, 2], [[None, 0.4], [1.0, 0.0]]),
        ([0], [0], [[0.5]]),
    ]
    written = {
        (x, y): t
        for s in plot["data"]
        if s["type"] == "scatter"
        for x, y, t in zip(s["x"], s["y"], s["text"], strict=True)
    }
    assert written == {(cell.x, cell.y): cell.text for heat in figure.heats for cell in heat.cells}
    hover = [text for trace in plot["data"] for text in trace.get("hovertext", ())]
    assert "x x0, y1: crash: why" in hover
    assert "x x0, y2: streams forty" in hover
    assert {trace["meta"] for trace in plot["data"]} == {"model", "other"}
    assert [svg.count(f'id="mapped-heat-{i}"') for i in range(3)] == [1, 1, 0]
    assert svg.count('id="mapped-gap-') == 1
    assert 'id="mapped-gap-0-2"' in svg
    assert all(f">{cell.text}<" in svg for heat in figure.heats for cell in heat.cells)
    assert svg.count("fill:#fee838") == 1  # the most
    assert "<image" not in svg


def test_maps_survive_json_and_stand_in_their_table() -> None:
    figure = mapped()
    assert from_json(json.loads(json.dumps(to_json(figure), allow_nan=False))) == figure
    table = figure_table(figure)
    assert table.columns == ("series", "y", "x", "streams", "status")
    assert [tuple(entry.text for entry in row) for row in table.rows] == [
        ("model", "y2", "x0", "forty", "ok"),
        ("model", "y2", "x1", "zero", "ok"),
        ("model", "y1", "x0", "—", "crash: why"),
        ("model", "y1", "x1", "five", "ok"),
        ("other", "y0", "x0", "seven", "ok"),
    ]


def test_writing_stands_out_on_every_shade() -> None:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for i, shade in enumerate(SHADES):
        low, high = sorted(map(luminance, (shade, ink_on(i / (len(SHADES) - 1)))))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_both_renderers_draw_everything(figures: dict[str, Figure]) -> None:
    for figure in (*figures.values(), whole()):
        svg, plot = to_svg(figure), to_plotly(figure)
        lines = [trace for trace in plot["data"] if trace["name"] != "marks"]
        assert len(lines) == len(figure.series)
        assert len(plot["layout"]["shapes"]) == len(figure.references) + len(figure.bands)
        assert [(s["x0"], s["x1"]) for s in plot["layout"]["shapes"] if s["type"] == "rect"] == [
            (band.start, band.end) for band in figure.bands
        ]
        captions = (
            [(a["x"], a["text"]) for a in plot["layout"]["annotations"] if a.get("yref") == "paper"]
            if figure.bands
            else []
        )
        assert captions == [
            (math.log10(b.start) if figure.x.scale == "log" else b.start, b.label) for b in figure.bands
        ]
        assert svg.count(f'id="{figure.id}-band-') == len(figure.bands)
        assert all(band.label in svg for band in figure.bands)
        assert sum(len(trace["x"]) for trace in plot["data"] if trace["name"] == "marks") == len(figure.marks)
        for number, line in enumerate(figure.series):
            assert f'id="{figure.id}-series-{number}"' in svg
            assert line.label in svg
            assert lines[number]["y"] == [dot.y for dot in line.points]
            assert not lines[number]["connectgaps"]
        assert svg.count(f'id="{figure.id}-reference-') == len(figure.references)
        assert svg.count(f'id="{figure.id}-mark-') == len(figure.marks)
        assert all(mark.label in svg for mark in figure.marks)
        assert {trace["type"] for trace in plot["data"]} <= {"scatter", "bar", "heatmap"}
        json.dumps(plot, allow_nan=False)


def test_plotly_accepts_the_dict(figures: dict[str, Figure]) -> None:
    from plotly.graph_objects import Figure as PlotlyFigure

    for figure in (*figures.values(), mapped()):
        PlotlyFigure(to_plotly(figure))


def test_the_static_picture_is_the_same_twice(figures: dict[str, Figure]) -> None:
    svg = to_svg(figures["quality"])
    assert svg == to_svg(figures["quality"])
    assert "<metadata" not in svg
    assert "<text" in svg
    assert svg.startswith("<svg")


def test_seeds_and_missing_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path, seeds=2, models=("bdh@1m",), crash=None)
    figures = {figure.id: figure for figure in figures_of(run, points_of(run))}
    assert len(figures["training"].series) == 2
    assert len(figures["quality"].series) == 1


# -- beyond the training context -------------------------------------------------------------------------------------


def quality_of(run: Run) -> Figure:
    return next(figure for figure in figures_of(run, points_of(run)) if figure.id == "quality")


def test_quality_beyond_the_training_context_is_shaded(figures: dict[str, Figure]) -> None:
    """P23."""
    assert [(band.start, band.end, band.label) for band in figures["quality"].bands] == [(256, 2048, BEYOND)]
    assert figures["quality"].x.title == "context (bytes; T = 256)"
    assert all(not figures[name].bands for name in ("memory", "peak", "tpot", "prefill", "pareto", "training"))


def trained_with(run: Run, **lengths: int) -> Run:
    def changed(facts: Mapping[str, Any], family: str) -> dict[str, Any]:
        training = {**facts.get("training", {}), "piece_bytes": lengths.get(family, 256)}
        return {**facts, "training": training} if "training" in facts else dict(facts)

    return replace(run, cells=tuple(replace(c, facts=changed(c.facts, c.family)) for c in run.cells))


def test_longer_training_pieces_of_one_model_are_named(tmp_path: Path) -> None:
    """P23: gpt2 learns on pieces of its whole table; the region begins at the shortest T."""
    run = trained_with(write_run(tmp_path, crash=None), gpt2=384)
    assert quality_of(run).x.title == "context (bytes; T = 256; gpt2: 384)"
    assert [band.start for band in quality_of(run).bands] == [256]
    longest = trained_with(run, bdh=4096, mamba=4096, gpt2=4096)
    assert quality_of(longest).bands == ()
    assert quality_of(longest).x.title == "context (bytes; T = 4,096)"


def test_nothing_is_shaded_where_nobody_was_trained(tmp_path: Path) -> None:
    run = write_run(tmp_path, models=("toy:uniform",), crash=None)
    assert quality_of(run).bands == ()
    assert "T =" not in quality_of(run).x.title


def test_places_of_a_stream_are_shaded_from_the_first_that_begins_at_t(tmp_path: Path) -> None:
    run = write_run(tmp_path, crash=None)
    bare = replace(figures_of(run, points_of(run))[0], bands=())
    facts = Facts(run, points_of(run))
    (band,) = shaded_places(facts, bare, facts.models, (0, 64, 128, 256, 512)).bands
    assert (band.start, band.end, band.label) == (2.5, 4.5, f"{BEYOND}, T = 256")
    assert shaded_places(facts, bare, facts.models, (0, 64, 128)).bands == ()
