"""With fewer than five documents, are blocks resampled, said to be so, and never counted as documents?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import CONTEXTS, T, cell, usual_manifest

from bdh_bench.results import statistics
from bdh_bench.results.assessment import assess
from bdh_bench.results.blocks import blocks_of
from bdh_bench.results.decisions import Why
from bdh_bench.results.figures import figures_of
from bdh_bench.results.statistics import bootstrap_ratio, paired_difference
from bdh_bench.results.store import EventWriter, Run, attempt_folder, create_run, measurement_body, open_run
from bdh_bench.results.tables import points_of
from bdh_bench.types import Measurement

S, K = 64, 8
MODELS = ("bdh@1m", "mamba@1m")


def write(root: Path, documents: int, keep: Callable[[str], bool] = lambda model: True) -> Run:
    """Two models, each with the bits of its blocks and streams beside the rows; bdh is 0.05 bits better in every byte."""
    planned = [cell(model, "long_ppl", 0, "bits_per_byte") for model in MODELS]
    create_run(root / "run", {**usual_manifest(MODELS, 1, documents), "cells": planned})
    writer = EventWriter(root / "run", "w0")
    for one in planned:
        generator = np.random.default_rng(0)  # the same text for both
        sweep = generator.gamma(4, 0.6, (documents * K, S)).astype(np.float32)
        sweep -= np.float32(0.05 if one["family"] == "bdh" else 0)
        owner, starts = np.repeat(np.arange(documents), K), np.tile(np.arange(K) * 1000 + 4096, documents)
        names = np.array([f"doc{i}.txt" for i in range(documents)])
        streams = [generator.gamma(4, 0.6, 10 * T - 30 * i - 1).astype(np.float32) for i in range(documents)]
        folder = attempt_folder(root / "run", one["key"], 1, 1)
        folder.mkdir(parents=True, exist_ok=True)
        if keep(one["model"]):
            arrays = {"documents": names, "block_document": owner, "block_start": starts}
            np.savez(folder / "bits.npz", **arrays, **{f"bits_c{c}": sweep for c in CONTEXTS})
            bits = {f"bits_{i}": own for i, own in enumerate(streams)}
            ends = {f"ends_{i}": np.arange(len(own)) + 2 for i, own in enumerate(streams)}
            start = {f"start_{i}": np.array(1) for i in range(documents)}  # one byte was skipped
            about = {"documents": names, "train_context": np.array(T), "metric_id": np.array("bpb@stream,state=carry")}
            np.savez(folder / "stream.npz", **about, **bits, **ends, **start)
        rows = [
            Measurement("bits_per_byte", float(sweep[owner == i].astype(float).mean()), c, axes={"target_hash": "t"},
                        sample=f"doc{i}.txt", weight=float(K * S), metric_id=f"bpb@c={c},S={S}")
            for c in CONTEXTS for i in range(documents)
        ]  # fmt: skip
        rows += [
            Measurement("stream_bits_per_byte", float(own.astype(float).mean()), 0, sample=f"doc{i}.txt",
                        weight=float(len(own)), metric_id="bpb@stream,state=carry")
            for i, own in enumerate(streams)
        ]  # fmt: skip
        known = {"weights": "trained", "parameters": 1000, "training": {"regime": "crop", "context": T}}
        body = [measurement_body(row) for row in rows]
        writer.write("result", cell=one["key"], round=1, attempt=1, status="ok", facts=known, measurements=body)
    writer.close()
    return open_run(root / "run")


def test_three_documents_become_blocks_with_the_same_sums(tmp_path: Path) -> None:
    run = write(tmp_path, 3)
    blocks = blocks_of(run, {})
    assert len([r for r in blocks.run.records if r.metric == "bits_per_byte"]) == 2 * len(CONTEXTS) * 3 * K
    assert set(blocks.documents.values()) == {"doc0.txt", "doc1.txt", "doc2.txt"}
    streams = [r for r in blocks.run.records if r.metric == "stream_bits_per_byte" and r.family == "bdh"]
    own = [r for r in streams if r.sample.startswith("doc1.txt")]
    assert [r.sample.partition("@")[2] for r in own] == [str(i * T) for i in range(10)]
    assert [r.weight for r in own] == [T - 1, *[T] * 8, T - 30]  # the skipped byte, and a short last stretch
    before = {(p.metric, p.context, p.model): p.value for p in points_of(replace(run, path=tmp_path / "no arrays"))}
    for point in points_of(run):
        if point.metric in ("bits_per_byte", "stream_bits_per_byte"):
            assert point.value == pytest.approx(before[point.metric, point.context, point.model], abs=1e-9)
            assert point.low is not None
            assert point.reason.startswith("blocks: 95 % over ")


@pytest.mark.parametrize(("documents", "changed"), [(4, True), (5, False)])
def test_five_documents_are_enough(tmp_path: Path, documents: int, changed: bool) -> None:
    run = write(tmp_path, documents)
    assert bool(blocks_of(run, {}).documents) == changed
    assert ("blocks" in assess(run).labels) == changed


def test_five_documents_of_two_books_are_not(tmp_path: Path) -> None:
    assert blocks_of(write(tmp_path, 5), {f"doc{i}.txt": f"book{i % 2}" for i in range(5)}).documents


def test_without_the_bits_of_one_model_nothing_is_changed(tmp_path: Path) -> None:
    run = write(tmp_path, 3, keep=lambda model: model != "mamba@1m")
    assert blocks_of(run, {}).run is run
    assert all(point.low is None for point in points_of(run) if point.metric == "bits_per_byte")


def test_blocks_are_paired_and_never_counted_as_documents(tmp_path: Path) -> None:
    """24 blocks of 3 documents: an interval, but no ranking, and the page, the rows and the picture say why."""
    run = write(tmp_path, 3)
    known = assess(run)
    compared = [c for c in known.comparisons if c.point.metric == "bits_per_byte"]
    assert compared
    for c in compared:
        assert c.difference is not None
        assert (c.difference.units, c.documents, c.evidence.documents) == (3 * K, 3, 3)
        assert c.difference.high == pytest.approx(-0.05, abs=1e-6)  # paired: what the blocks share cancels
        assert c.decision.has(Why.FEW_DOCUMENTS)
        assert c.decision.verdict == "undecided"
    assert known.as_json()["comparisons"][0]["resampled"] == "blocks"
    quality = next(figure for figure in figures_of(run, points_of(run)) if figure.id == "quality")
    assert any("over blocks" in note for note in quality.notes)


def coverage(units: int, clusters: bool) -> float:
    """Share of 120 texts of ``units`` blocks in three documents, without any difference between documents, whose 95 % interval
    holds the true mean."""
    generator, held = np.random.default_rng(7), 0
    for _ in range(120):
        values = generator.gamma(4, 0.25, units)
        samples = {f"doc{i % 3}@{i}": (float(v), 64.0) for i, v in enumerate(values)}
        found = bootstrap_ratio(samples, {name: name.partition("@")[0] for name in samples} if clusters else None)
        held += found.low is not None and found.high is not None and found.low <= 1.0 <= found.high
    return held / 120


def test_intervals_over_blocks_hold_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    assert coverage(24, clusters=False) >= 0.88
    monkeypatch.setattr(statistics, "FEWEST_DOCUMENTS", 2)
    assert coverage(24, clusters=True) < 0.85  # the bug: three documents are resampled


def test_paired_blocks_without_difference_have_no_width() -> None:
    same = {f"d@{i}": (float(i % 5), 64.0) for i in range(12)}
    found = paired_difference(same, dict(same))
    assert (found.low, found.high) == (0.0, 0.0)
