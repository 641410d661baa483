"""Do the pictures of memory show the numbers of the run, against the right reference, with chance drawn and the yardstick no contender?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import write_run

from bdh_bench.results.claims import answer_of
from bdh_bench.results.decisions import Why
from bdh_bench.results.figure import Figure, Series, from_json, to_json
from bdh_bench.results.figures import figures_of
from bdh_bench.results.report.page import content_of, first_table, render
from bdh_bench.results.report.render_matplotlib import to_svg
from bdh_bench.results.report.render_plotly import to_plotly
from bdh_bench.results.store import Run
from bdh_bench.results.tables import headlines_of, points_of, value_tables
from bdh_bench.results.thresholds import first_below, half_lost
from bdh_bench.types import Measurement, Record

MODELS = ("bdh@1m", "llama@1m", "mamba@1m", "yardstick")
CHANCE = 1 / 64
#: What each family knows of 4, 16 and 64 pairs; a transformer that solves the easiest cell.
KNOWN = {"bdh": (1.0, 0.8, 0.1), "llama": (0.995, 0.99, 0.9), "mamba": (1.0, 0.5, 0.05)}
LENGTHS = {4: 64, 16: 64, 64: 256}

Rows = Callable[[str], Iterator[Measurement]]


def recall(known: dict[str, tuple[float, ...]] = KNOWN) -> Rows:
    def rows(family: str) -> Iterator[Measurement]:
        for pairs, share in zip(LENGTHS, known[family], strict=True):
            about = {"pairs": pairs, "axis": "pairs"}
            length = LENGTHS[pairs]
            yield Measurement(
                "recall_accuracy", share, length, axes={**about, "chance": CHANCE}, weight=200, metric_id=f"recall@{pairs}"
            )  # fmt: skip
            yield Measurement("state_bytes", 1000 * length if family == "llama" else 4096, length, axes=about)
        for length in (64, 128):
            about = {"pairs": 16, "axis": "length", "chance": CHANCE}
            yield Measurement(
                "recall_accuracy", known[family][1], length, axes=about, weight=200, metric_id=f"r@{length}"
            )

    return rows


def induction(share: float) -> Rows:
    def rows(family: str) -> Iterator[Measurement]:
        for length in (64, 128, 256):
            yield Measurement(
                "induction_accuracy", share if length < 256 else 0.1, length, axes={"chance": 1 / 16}, weight=200,
                metric_id=f"i{length}",
            )  # fmt: skip

    return rows


def repeated(family: str) -> Iterator[Measurement]:
    for gap, gain in ((0, 2.0), (64, 1.5), (128, 0.5)):
        for i in range(6):
            yield Measurement("repeat_gain_bits_per_byte", gain, gap, sample=f"p{i}", weight=256, metric_id=f"g{gap}")


def made(root: Path, seeds: int = 1, **tasks: Rows) -> Run:
    """The synthetic run with more tasks, whose cells take the notes of the model's quality cell."""
    run = write_run(root, models=MODELS, tasks=("long_ppl",), seeds=seeds, crash=None, manifest={"labels": []})
    cells, records = list(run.cells), list(run.records)
    for task, rows in tasks.items():
        for cell in run.cells:
            if cell.family == "yardstick" and task in ("recall", "induction"):
                continue
            found = list(rows(cell.family))
            own = replace(cell, key=f"{task}{cell.key}", task=task, metric=found[0].metric)
            cells.append(own)
            template = next(r for r in run.records if r.cell == cell.key)
            records += [record(template, own.key, task, m) for m in found]
    return replace(run, cells=tuple(cells), records=tuple(records))


def record(template: Record, key: str, task: str, m: Measurement) -> Record:
    return replace(
        template, cell=key, task=task, metric=m.metric, metric_id=m.metric_id or m.metric, value=m.value, context=m.context,
        axes=m.axes, sample=m.sample, weight=m.weight, status=m.status, reason=m.reason,
    )  # fmt: skip


def with_streams(run: Run, bits: dict[str, float], documents: int = 6, size: int = 200) -> Run:
    """Streams of constant bits per byte and family; the text of document i adds i/100, and its second bucket 1 bit, for everyone."""
    records = list(run.records)
    names = [f"doc{i}.txt" for i in range(documents)]
    classes = np.array(([12] * 40 + [-1] * 10 + [0] * 14) * 4)[:size]
    np.savez(run.path / "texts.npz", documents=names, **{f"classes_{i}": classes for i in range(documents)})
    for cell in (c for c in run.cells if c.task == "long_ppl"):
        folder = run.path / "cells" / cell.files
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, object] = {
            "documents": names, "train_context": 256, "metric_id": "bpb@stream,state=carry"
        }  # fmt: skip
        template = next(r for r in run.records if r.cell == cell.key)
        for i in range(documents):
            own = np.full(size, bits[cell.family] + i / 100)
            own[64:128] += 1
            arrays |= {f"bits_{i}": own, f"ends_{i}": np.arange(1, size + 1), f"start_{i}": 0}
            m = Measurement("stream_bits_per_byte", float(own.mean()), 0, sample=names[i], weight=float(size))
            records.append(record(template, cell.key, cell.task, replace(m, metric_id="bpb@stream,state=carry")))
        np.savez(folder / "stream.npz", **arrays)
    return replace(run, records=tuple(records))


def drawn(run: Run) -> dict[str, Figure]:
    return {figure.id: figure for figure in figures_of(run, points_of(run))}


def line(figure: Figure, label: str) -> Series:
    (found,) = (s for s in figure.series if s.label == label)
    return found


def values(series: Series) -> list[float | None]:
    return [None if dot.y is None else round(dot.y, 6) for dot in series.points]


def both_draw(figures: Sequence[Figure]) -> None:
    for figure in figures:
        assert from_json(json.loads(json.dumps(to_json(figure), allow_nan=False))) == figure
        svg, plot = to_svg(figure), to_plotly(figure)
        assert svg.count(f'id="{figure.id}-series-') == len(figure.series) == len(plot["data"]) - bool(figure.marks)
        assert svg.count(f'id="{figure.id}-reference-') == len(figure.references) == len(plot["layout"]["shapes"])
        assert svg.count(f'id="{figure.id}-mark-') == len(figure.marks)
        assert {plot["layout"][axis]["type"] for axis in ("xaxis", "yaxis")} <= {"linear", "log"}
        if figure.y.span:
            assert plot["layout"]["yaxis"]["range"] == list(figure.y.span)


# -- the stream --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 2])
def test_positions_are_differences_to_a_transformer_in_the_same_bucket(tmp_path: Path, seeds: int) -> None:
    run = with_streams(made(tmp_path, seeds), {"bdh": 2.5, "llama": 2.0, "mamba": 1.75, "yardstick": 3.0})
    figure = drawn(run)["positions"]
    both_draw([figure])
    assert [text for _, text in figure.x.ticks] == ["0–64", "64–128", "128–256"]
    assert [s.label for s in figure.series] == ["bdh", "mamba", "yardstick (no learning)"]  # llama is the line at 0
    assert values(line(figure, "bdh")) == [0.5, 0.5, 0.5]  # the harder bucket cancels
    assert values(line(figure, "mamba")) == [-0.25, -0.25, -0.25]
    assert [(r.label, r.value) for r in figure.references] == [("llama", 0.0)]


def test_a_match_is_drawn_by_distance_and_conflicts_stand_apart(tmp_path: Path) -> None:
    run = with_streams(made(tmp_path), {"bdh": 2.5, "llama": 2.0, "mamba": 1.75, "yardstick": 3.0})
    figure = drawn(run)["match-distance"]
    both_draw([figure])
    assert [text for _, text in figure.x.ticks] == ["8", "conflict", "novel"]
    bdh = line(figure, "bdh")
    assert [dot.y is None for dot in bdh.points] == [False, True, False, True, False]  # no line across kinds of bytes
    assert bdh.points[0].y == pytest.approx(
        next(p.value for p in points_of(run) if p.metric_id.startswith("bpb@recall,d=[8"))
    )


def test_the_yardstick_looks_like_a_reference_line_everywhere(tmp_path: Path) -> None:
    run = with_streams(
        made(tmp_path, repeated_segment=repeated), dict.fromkeys(("bdh", "llama", "mamba", "yardstick"), 2.0)
    )
    found = [s for f in drawn(run).values() for s in f.series if s.label.startswith("yardstick")]
    assert len(found) >= 4
    assert {(s.kind, s.dash) for s in found} == {("reference", "dot")}
    plot = to_plotly(drawn(run)["quality"])
    (trace,) = (t for t in plot["data"] if t["name"].startswith("yardstick"))
    assert trace["mode"] == "lines"


# -- practised tasks ---------------------------------------------------------------------------------------------------


def test_recall_is_drawn_against_the_bytes_of_its_own_cell(tmp_path: Path) -> None:
    figures = drawn(made(tmp_path, recall=recall()))
    both_draw([figures[name] for name in ("recall-state", "recall-pairs", "recall-length")])
    state = figures["recall-state"]
    assert [(dot.x, dot.y) for dot in line(state, "llama").points] == [(64_000, 0.995), (64_000, 0.99), (256_000, 0.9)]
    assert {dot.x for dot in line(state, "bdh").points} == {4096}
    assert [dot.x for dot in line(figures["recall-pairs"], "bdh").points] == [4, 16, 64]
    assert [dot.x for dot in line(figures["recall-length"], "bdh").points] == [64, 128]
    for name in ("recall-state", "recall-pairs", "recall-length"):
        assert ("chance 0.016", CHANCE) in {(r.label, r.value) for r in figures[name].references}
    assert "memory" not in figures  # what recall needed is no curve over contexts


def test_a_solved_task_says_how_far_each_model_gets(tmp_path: Path) -> None:
    run = made(tmp_path, recall=recall())
    answer = answer_of(run)
    (claim,) = (c for c in answer.claims if c.topic == "validity")
    assert claim in answer.verdicts
    crossing = first_below([(4, 1.0), (16, 0.8), (64, 0.1)], 0.9)
    assert crossing is not None
    assert crossing.at == pytest.approx(8)  # half of the way in log2
    assert "bdh up to about 8 pairs" in claim.text
    assert "llama everywhere up to 64 pairs" in claim.text
    assert not [label for label in answer.assessment.labels if "signal" in label]
    assert not any(c.decision.has(Why.NO_SIGNAL) for c in answer.assessment.comparisons)


@pytest.mark.parametrize("share", [0.989, 0.1])
def test_recall_without_a_transformer_that_learned_it_is_invalid(tmp_path: Path, share: float) -> None:
    run = made(tmp_path, recall=recall({**KNOWN, "llama": (share, 0.1, 0.1)}))
    answer = answer_of(run)
    assert "recall: no signal" in answer.assessment.labels
    (claim,) = (c for c in answer.verdicts if c.topic == "validity")
    assert "recall is invalid, no signal: no transformer reaches 0.99 at 4 pairs in 64 tokens" in claim.text
    assert "recall: invalid, no signal" in answer.lines[-1].text
    compared = [c for c in answer.assessment.comparisons if c.point.task == "recall"]
    assert compared
    assert {c.decision.verdict for c in compared} == {"undecided"}
    assert all(c.decision.has(Why.NO_SIGNAL) and c.decision.unranked for c in compared)
    assert not any(c.decision.has(Why.NO_SIGNAL) for c in answer.assessment.comparisons if c.point.task == "long_ppl")
    assert drawn(run)["recall-pairs"].notes[0].startswith("Invalid, no signal")
    titles = [table.title for table in content_of(run).tables if table.title.startswith("recall")]
    assert titles
    assert all(title.endswith("(invalid: no signal)") for title in titles)


def test_recall_without_any_transformer_is_invalid(tmp_path: Path) -> None:
    run = made(tmp_path, recall=recall())
    alone = replace(
        run,
        cells=tuple(c for c in run.cells if c.family != "llama"),
        records=tuple(r for r in run.records if r.family != "llama"),
    )
    assert "no transformer was examined" in next(c.text for c in answer_of(alone).claims if c.topic == "validity")


def test_one_seed_that_learned_it_is_enough(tmp_path: Path) -> None:
    run = made(tmp_path, seeds=2, recall=recall())
    second = [c.key for c in run.cells if c.seed == 1 and c.task == "recall"]
    worse = tuple(
        replace(r, value=0.2) if r.cell in second and r.metric == "recall_accuracy" else r for r in run.records
    )
    assert "recall: no signal" not in answer_of(replace(run, records=worse)).assessment.labels


@pytest.mark.parametrize(("share", "valid"), [(0.95, True), (0.89, False)])
def test_induction_needs_somebody_who_learned_it(tmp_path: Path, share: float, valid: bool) -> None:
    run = made(tmp_path, induction=induction(share))
    answer = answer_of(run)
    assert ("induction: no signal" not in answer.assessment.labels) == valid
    figure = drawn(run)["induction-length"]
    both_draw([figure])
    assert values(line(figure, "bdh")) == [share, share, 0.1]
    assert [r.label for r in figure.references] == ["chance 0.062", "solved: 0.9"]


# -- a passage over a gap ----------------------------------------------------------------------------------------------


def test_half_of_the_gain_is_lost_where_the_curve_says_so(tmp_path: Path) -> None:
    half = half_lost([(0, 2.0), (64, 1.5), (128, 0.5)])
    assert half is not None
    assert half.at == pytest.approx(64 * 2**0.5)
    assert half_lost([(0, -0.1), (64, -0.2)]) is None  # nothing to lose
    assert half_lost([(0, 2.0), (64, 1.9)]) is None
    figure = drawn(made(tmp_path, repeated_segment=repeated))["repeat-gain"]
    both_draw([figure])
    assert [(mark.x, mark.y) for mark in figure.marks] == [(1.5, 1.0)] * 4
    assert "bdh after 91 bytes" in figure.notes[0]


# -- the page ----------------------------------------------------------------------------------------------------------


def test_headline_tables_come_first_and_derived_ones_are_folded(tmp_path: Path) -> None:
    run = with_streams(made(tmp_path, recall=recall()), dict.fromkeys(("bdh", "llama", "mamba", "yardstick"), 2.0))
    tables = value_tables(points_of(run), headlines=headlines_of(run))
    shown = {t.title for t in tables if not t.detail}
    assert shown == {
        "long_ppl: bits per byte (same targets)", "long_ppl: bits per byte (stream)",
        "recall: recall accuracy, by pairs", "recall: recall accuracy, by length",
    }  # fmt: skip
    pairs = next(t for t in tables if t.title.endswith("by pairs"))
    assert pairs.columns == ("model", "pairs 4", "pairs 16", "pairs 64")
    assert [e.text for e in pairs.rows[0]] == ["bdh@1m", "1.000", "0.800", "0.100"]
    slices = next(t for t in tables if "match distance" in t.title)
    assert slices.detail
    assert len(slices.rows) == len(MODELS)  # one row per model, not one per slice
    page = render(content_of(run))
    assert page.index("bits per byte (same targets)</h2>") < page.index("What this run says") < page.index("<svg")
    folded = page.index("bits per byte by match distance")
    assert page.rfind("<details>", 0, folded) > page.rfind("</details>", 0, folded)


def test_the_first_table_is_that_of_quality(tmp_path: Path) -> None:
    run = made(tmp_path, recall=recall())
    table = first_table(content_of(run).tables)
    assert table is not None
    assert table.title == "long_ppl: bits per byte (same targets)"
    assert [row[0].text for row in table.rows] == ["bdh", "llama", "mamba", "yardstick (yardstick)"]
    assert first_table(()) is None


@pytest.mark.parametrize(
    "name", ["<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", "\u202egnp\x1b[31m"]
)
def test_hostile_tasks_and_axes_are_inert(tmp_path: Path, name: str) -> None:
    run = with_streams(
        made(tmp_path, recall=recall(), repeated_segment=repeated),
        dict.fromkeys(("bdh", "llama", "mamba", "yardstick"), 2.0),
    )
    cells = tuple(
        replace(c, task=c.task + name, model=f"{c.model}:rope={name}", family=c.family + name) for c in run.cells
    )
    records = tuple(
        replace(
            r, task=r.task + name, model=f"{r.model}:rope={name}", family=r.family + name, axes={**r.axes, "what": name}
        )
        for r in run.records
    )
    content = content_of(replace(run, cells=cells, records=records))
    assert {"positions", "recall-pairs", "repeat-gain"} <= {figure.id for figure in content.figures}
    page = render(content)
    assert "<img" not in page
    assert "<script>alert" not in page
    assert not set("\u202e\x1b") & set(page)


def test_a_page_of_many_tasks_stays_small(tmp_path: Path) -> None:
    run = made(tmp_path, seeds=3, recall=recall(), induction=induction(0.95), repeated_segment=repeated)
    run = with_streams(run, dict.fromkeys(("bdh", "llama", "mamba", "yardstick"), 2.0))
    assert len(render(content_of(run)).encode()) < 800_000  # four models; ten have 1.2 MB


# -- needles -----------------------------------------------------------------------------------------------------------


def needle(family: str) -> Iterator[Measurement]:
    """Shares of depth and length that differ everywhere; one family stops at the longer text."""
    for length in (256, 1024):
        if family == "llama" and length == 1024:
            yield Measurement("needle_rank_accuracy", None, length, status="unsupported", reason="position limit")
            continue
        for depth in (0, 50, 100):
            share = depth / 200 + (0.25 if length == 256 else 0.0) + (0.125 if family == "bdh" else 0.0)
            axes = {"depth_percent": depth}
            yield Measurement(
                "needle_rank_accuracy", share, length, axes=axes, weight=40, metric_id=f"n{length},{depth}"
            )


def test_the_map_of_needles_holds_every_depth_and_length(tmp_path: Path) -> None:
    run = made(tmp_path, needle=needle)
    figure = next(f for f in figures_of(run, points_of(run)) if f.id == "needle-map")
    for heat in figure.heats:
        seen = {(figure.y.read(cell.y), figure.x.read(cell.x)): cell for cell in heat.cells}
        family = heat.label
        assert set(seen) == {(f"{family} · {d} %", x) for d in (0, 50, 100) for x in ("256", "1k")}
        for (row, x), cell in seen.items():
            depth = int(row.split("· ")[1].split()[0])
            if family == "llama" and x == "1k":
                assert (cell.value, cell.shade, cell.text) == (None, None, "stopped")
                assert cell.status == "unsupported: position limit"
            else:
                share = depth / 200 + (0.25 if x == "256" else 0.0) + (0.125 if family == "bdh" else 0.0)
                assert cell.value == pytest.approx(share)
                assert cell.shade == pytest.approx(share, abs=1e-3)
                assert cell.text == f"{share:.2f}"
    assert [heat.model for heat in figure.heats][:3] == ["bdh", "llama", "mamba"]
    assert from_json(json.loads(json.dumps(to_json(figure), allow_nan=False))) == figure
    places = [cell.y for heat in figure.heats for cell in heat.cells if cell.x == 0]
    assert places == sorted(places, reverse=True)
    assert len(set(places)) == len(places)
