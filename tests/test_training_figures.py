"""Do curves stand at the right cost, and shares of activity at the right layer, with gaps instead of zeros?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import write_run

from bdh_bench.results.contenders import Facts
from bdh_bench.results.fairness import card_of
from bdh_bench.results.figure import Figure, Series
from bdh_bench.results.figures import figures_of
from bdh_bench.results.report.render_matplotlib import to_svg
from bdh_bench.results.report.render_plotly import to_plotly
from bdh_bench.results.store import Run
from bdh_bench.results.tables import points_of
from bdh_bench.types import Record


def drawn(run: Run) -> dict[str, Figure]:
    return {figure.id: figure for figure in figures_of(run, points_of(run))}


def line(figure: Figure, label: str) -> Series:
    return next(series for series in figure.series if series.label == label)


def retold(run: Run, change: Callable[[str, dict[str, Any]], None]) -> Run:
    """The run with changed notes on training."""

    def changed(facts: Mapping[str, Any], family: str) -> dict[str, Any]:
        training = dict(facts.get("training") or {})
        if training:
            change(family, training)
        return {**facts, **({"training": training} if training else {})}

    return replace(run, cells=tuple(replace(c, facts=changed(c.facts, c.family)) for c in run.cells))


# -- training ----------------------------------------------------------------------------------------------------------


def test_one_curve_against_three_costs(tmp_path: Path) -> None:
    run = write_run(tmp_path, crash=None)
    figures = drawn(run)
    by_bytes, by_flops, by_time = (
        line(figures[name], "bdh").points for name in ("training", "training-flops", "training-seconds")
    )
    assert [dot.y for dot in by_bytes] == [dot.y for dot in by_flops] == [dot.y for dot in by_time]
    assert [dot.x for dot in by_time] == [1.5 * step for step in range(12)]
    facts = Facts(run, points_of(run))
    card = card_of(facts).values["bdh@1m"]
    for one, other in zip(by_bytes, by_flops, strict=True):
        assert other.x == pytest.approx(one.x / card["training_bytes"] * card["training_flops"])  # type: ignore[operator]
    assert figures["training-flops"].x.read(by_flops[-1].x) == "660 GFLOP"
    assert to_plotly(figures["training-seconds"])["data"][0]["text"][1].startswith("wall-clock 1.5 s:")
    assert "660 GFLOP" in to_plotly(figures["training-flops"])["data"][0]["text"][-1]


def test_a_model_without_the_cost_is_named_and_not_put_at_zero(tmp_path: Path) -> None:
    def forget(family: str, training: dict[str, Any]) -> None:
        if family == "mamba":
            training["flops"] = None
            training["curve"] = [row[:2] for row in training["curve"]]

    figures = drawn(retold(write_run(tmp_path, crash=None), forget))
    assert {series.label for series in figures["training"].series} == {"bdh", "gpt2", "mamba"}
    for name in ("training-flops", "training-seconds"):
        assert {series.label for series in figures[name].series} == {"bdh", "gpt2"}
        assert "not known: mamba" in " ".join(figures[name].notes)


def test_a_missing_loss_is_a_gap_in_all_three(tmp_path: Path) -> None:
    def hole(family: str, training: dict[str, Any]) -> None:
        training["curve"] = [[x, None if i == 3 else y, s] for i, (x, y, s) in enumerate(training["curve"])]

    figures = drawn(retold(write_run(tmp_path, crash=None), hole))
    for name in ("training", "training-flops", "training-seconds"):
        assert [i for i, dot in enumerate(line(figures[name], "bdh").points) if dot.y is None] == [3]


def test_seeds_share_an_entry_where_one_lacks_the_cost(tmp_path: Path) -> None:
    run = write_run(tmp_path, seeds=2, models=("bdh@1m",), crash=None)
    cells = tuple(
        replace(c, facts={**c.facts, "training": {**c.facts["training"], "flops": None}}) if c.seed == 0 else c
        for c in run.cells
    )
    figure = drawn(replace(run, cells=cells))["training-flops"]
    assert [series.legend for series in figure.series] == [True]


# -- activity ----------------------------------------------------------------------------------------------------------


def with_activity(run: Run) -> Run:
    """Two documents of ``sparsity`` for bdh, decoded rows at two depths, and a model that shows nothing."""
    plain = Record(
        run=run.id, cell=run.cells[0].key, attempt=1, model="bdh@1m", family="bdh", size="1m", task="sparsity", seed=0,
        metric="key_density", metric_id="key_density", value=None, context=1024, batch_size=1, axes={}, sample="", weight=1.0, repeat=0,
        status="ok", reason="", weights="trained", facts={},
    )  # fmt: skip
    rows = [
        replace(plain, metric=m, metric_id=m, value=value + 0.01 * layer, axes={"layer": layer}, sample=name, weight=w)
        for layer in (0, 1, 2)
        for m, value in (("key_density", 0.4), ("gated_density", 0.05))
        for name, w, value in (("a", 100.0, value), ("b", 300.0, value + 0.04))
    ]
    rows += [
        replace(plain, task="latency", metric="row_density", metric_id="row_density", value=value, context=context, axes={"layer": 1})
        for context, value in ((128, 0.9), (2048, 0.2))
    ]  # fmt: skip
    other = next(c for c in run.cells if c.family == "mamba")
    silent = replace(
        plain, cell=other.key, model=other.model, family="mamba", metric="gated_density", status="unsupported"
    )
    return replace(run, records=(*run.records, *rows, silent))


def test_shares_stand_at_their_layer_as_the_documents_weigh(tmp_path: Path) -> None:
    figure = drawn(with_activity(write_run(tmp_path, crash=None)))["activity"]
    keys = line(figure, "bdh, active keys at 1k")
    assert [(dot.x, dot.y) for dot in keys.points] == [(i, pytest.approx(0.43 + 0.01 * i)) for i in (0, 1, 2)]
    rows = line(figure, "bdh, active rows of the memory at 2k")
    assert [(dot.x, dot.y) for dot in rows.points] == [(1.0, 0.2)]
    assert "No activity to show: mamba" in " ".join(figure.notes)
    assert not [series for series in figure.series if "mamba" in series.label]
    assert to_svg(figure).count(f'id="{figure.id}-series-') == len(figure.series) == len(to_plotly(figure)["data"]) == 3


def test_without_shares_there_is_no_such_figure(tmp_path: Path) -> None:
    assert "activity" not in drawn(write_run(tmp_path, crash=None))
