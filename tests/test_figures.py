"""Do figures hold what the points say, and do both renderers draw all of it?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_run import write_run

from bdh_bench.results.figure import (
    FAMILY_STYLE,
    Axis,
    Dot,
    Figure,
    Mark,
    Reference,
    Series,
    from_json,
    styles_of,
    to_json,
)
from bdh_bench.results.figures import figures_of
from bdh_bench.results.report.render_matplotlib import to_svg
from bdh_bench.results.report.render_plotly import to_plotly
from bdh_bench.results.tables import points_of


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Figure]:
    run = write_run(tmp_path_factory.mktemp("run"))
    return {figure.id: figure for figure in figures_of(run, points_of(run))}


def test_the_expected_figures_exist(figures: dict[str, Figure]) -> None:
    assert set(figures) == {"quality", "memory", "peak", "prefill", "tpot", "pareto", "training"}


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
        (Reference("line", 2.0, "dash"),), (Mark(4, 3, "ended", "stopped"), Mark(1, 1, "broke", "failed")),
    )  # fmt: skip


def test_both_renderers_draw_everything(figures: dict[str, Figure]) -> None:
    for figure in (*figures.values(), whole()):
        svg, plot = to_svg(figure), to_plotly(figure)
        lines = [trace for trace in plot["data"] if trace["name"] != "marks"]
        assert len(lines) == len(figure.series)
        assert len(plot["layout"]["shapes"]) == len(figure.references)
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

    for figure in figures.values():
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
