"""Do records become the right points, and does a gap stay a gap?"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_run import CONTEXTS, write_run

from bdh_bench.errors import UnknownNameError
from bdh_bench.results.export import export, points_as_json, raw_as_json
from bdh_bench.results.store import Run
from bdh_bench.results.tables import Point, frame, pivot, points_of, value_tables

PROMISED = {
    "model", "family", "size", "task", "metric", "metric_id", "unit", "value", "low", "high", "n", "context", "batch_size",
    "seed", "axes", "status", "reason", "weights", "cell",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("run"))


def only(points: tuple[Point, ...], **wanted: object) -> Point:
    found = [p for p in points if all(getattr(p, name) == value for name, value in wanted.items())]
    assert len(found) == 1, found
    return found[0]


def test_uniform_is_exactly_eight(run: Run) -> None:
    point = only(points_of(run), model="toy:uniform", metric="bits_per_byte", context=512)
    assert (point.value, point.low, point.high, point.n) == (8.0, 8.0, 8.0, 10)


def test_exact_bytes_stay_integers_without_interval(run: Run) -> None:
    point = only(points_of(run), model="bdh@1m", metric="state_bytes", context=2048)
    assert point.value == 2**20
    assert isinstance(point.value, int)
    assert (point.low, point.high) == (None, None)


def test_times_are_the_median_of_the_repeats(run: Run) -> None:
    point = only(points_of(run), model="bdh@1m", metric="tpot_s", context=128)
    assert point.value == pytest.approx(0.004 * 1.01)
    assert (point.n, point.low, point.axes) == (1, None, (("mode", "auto"),))  # three windows of one round


def test_a_gap_is_a_gap_and_never_zero(run: Run) -> None:
    point = only(points_of(run), model="gpt2@1m", metric="bits_per_byte", context=512)
    assert (point.value, point.status) == (None, "unsupported")
    assert "position limit" in point.reason
    crashed = only(points_of(run), model="toy:uniform", task="latency")
    assert (crashed.value, crashed.status, crashed.reason, crashed.context) == (
        None,
        "crash",
        "worker ended by signal 11",
        0,
    )
    by_name = {table.title: table for table in value_tables(points_of(run))}
    row = next(row for row in by_name["memory: state bytes"].rows if row[0].text == "gpt2@1m")
    assert [entry.text for entry in row[3:]] == ["unsupported"] * 3


def test_one_document_without_value_makes_no_other_statistic(run: Run) -> None:
    first = next(r for r in run.records if r.metric == "bits_per_byte")
    for bad in (float("nan"), float("inf"), None):
        point = points_of(replace(run, records=(replace(first, value=bad), *run.records[1:])))[0]
        assert (point.value, point.status) == (None, "error")
        assert point.reason


def test_repeats_that_disagree_on_bytes_are_an_error(run: Run) -> None:
    first = next(r for r in run.records if r.metric == "state_bytes")
    point = points_of(replace(run, records=(first, replace(first, value=1, repeat=1))))[0]
    assert (point.value, point.status) == (None, "error")
    assert "disagree" in point.reason


@pytest.mark.parametrize(("sample", "n"), [("", 1), ("doc", 3)])  # windows of one round, or documents
def test_metrics_of_plugins_work(run: Run, sample: str, n: int) -> None:
    base = replace(run.records[0], metric="glow", metric_id="glow")
    rows = tuple(
        replace(base, sample=sample and f"{sample}{i}", repeat=i, value=float(i), weight=1.0) for i in (1, 2, 3)
    )
    point = points_of(replace(run, records=rows))[0]
    assert (point.value, point.unit, point.n) == (2.0, "", n)


def test_several_seeds_add_points_over_seeds(tmp_path: Path) -> None:
    points = points_of(write_run(tmp_path, seeds=3, models=("bdh@1m",)))
    pooled = [p for p in points if p.seed is None]
    assert len(pooled) * 3 == len(points) - len(pooled)
    point = only(tuple(pooled), metric="bits_per_byte", context=2048)
    single = [p.value for p in points if p.seed is not None and (p.metric, p.context) == ("bits_per_byte", 2048)]
    assert point.value == pytest.approx(sum(v for v in single if v is not None) / 3)
    assert point.low is not None
    assert point.low < point.value < (point.high or 0)
    assert (point.n, len(point.cells)) == (3, 3)
    assert isinstance(only(tuple(pooled), metric="state_bytes", context=2048).value, int)


def test_one_seed_has_no_points_over_seeds(run: Run) -> None:
    assert all(p.seed == 0 for p in points_of(run))


def test_json_is_the_promised_shape(run: Run) -> None:
    rows = points_as_json(run)
    assert all(set(row) == PROMISED and isinstance(row["context"], int) for row in rows)
    assert json.loads(export(run, "json")) == rows
    assert [json.loads(line) for line in export(run, "jsonl").splitlines()] == rows
    assert len(raw_as_json(run)) == len(run.records)
    assert {row["context"] for row in rows if row["metric"] == "bits_per_byte"} == set(CONTEXTS)


def test_csv_has_a_row_per_point_and_empty_gaps(run: Run) -> None:
    rows = list(csv.DictReader(io.StringIO(export(run, "csv"))))
    assert len(rows) == len(points_as_json(run))
    gap = next(row for row in rows if row["status"] == "unsupported")
    assert (gap["value"], gap["low"]) == ("", "")
    assert len(list(csv.DictReader(io.StringIO(export(run, "csv", raw=True))))) == len(run.records)


def test_export_says_which_formats_there_are(run: Run) -> None:
    with pytest.raises(UnknownNameError, match="latex"):
        export(run, "xls")
    assert r"\toprule" in export(run, "latex")
    assert "| bdh@1m |" in export(run, "md")


def test_frames_keep_gaps_missing(run: Run) -> None:
    points = points_of(run)
    assert len(frame(points)) == len(points)
    table = pivot(points, "bits_per_byte")
    assert bool(table.isna().loc["gpt2@1m", 2048])
    assert table.loc["toy:uniform", 128] == 8.0
