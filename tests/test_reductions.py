"""Do stored bits become the right buckets, slices and gains, without a model? Known truths through a whole run first."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_run import write_run

from bdh_bench.results.reductions import (
    Stream,
    burnt_in,
    classes_of,
    derived_records,
    gains,
    per_byte,
    positions,
    recall,
    stream_of,
)
from bdh_bench.results.store import Run, open_run
from bdh_bench.results.tables import Point, points_of
from bdh_bench.runner.plan import make_plan
from bdh_bench.runner.run import execute, prepare
from bdh_bench.spec import RunSpec
from bdh_bench.types import Record

_WRONG = 1e4 / math.log(2)  # bits of a byte that toy:copy was certain not to see


def _go(spec: RunSpec, root: Path) -> Run:
    plan = make_plan(spec)
    return execute(plan, prepare(plan, root, None, False), lambda *a: None, 120.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """toy:copy and toy:uniform on documents of repeated random blocks of 64 bytes; T = 64."""
    folder = tmp_path_factory.mktemp("periodic")
    for i in range(6):
        (folder / f"{i}").write_bytes(os.urandom(64) * 40)
    spec = RunSpec(
        ("toy:copy", "toy:uniform"),
        ("long_ppl:block=64",),
        f"path:{folder}",
        (64, 256),
        4096,
        64,
        threads=1,
        documents=2,
    )
    return _go(spec, tmp_path_factory.mktemp("runs"))


def _points(run: Run, model: str, metric: str) -> dict[str, Point]:
    return {p.metric_id: p for p in points_of(run) if p.model == model and p.metric == metric}


def test_uniform_is_eight_in_every_bucket_and_slice(run: Run) -> None:
    found = {
        **_points(run, "toy:uniform", "position_bits_per_byte"),
        **_points(run, "toy:uniform", "recall_bits_per_byte"),
    }
    edges = [0, 64, 128, 256, 512, 1024]
    assert {f"bpb@pos=[{a},{b})" for a, b in pairwise(edges)} <= set(found)
    assert {"bpb@pos=[0,1T)", "bpb@pos=[1T,2T)", "bpb@pos=[8T,16T)"} <= set(found)
    assert {p.value for p in found.values()} == {8.0}


def test_a_copyist_recalls_at_its_distance_for_nothing(run: Run) -> None:
    found = _points(run, "toy:copy", "recall_bits_per_byte")
    assert set(found) == {"bpb@novel", "bpb@recall,d=[64,128)"}  # bytes 0 … 11 have no key and are in no slice
    assert found["bpb@recall,d=[64,128)"].value == pytest.approx(0.0, abs=1e-9)
    (documents,) = {p.n for p in found.values()}
    assert documents == len({r.sample for r in run.records})
    # bytes 12 … 62 are guessed, 63 is taken for the start symbol 64 places before it, 64 … 75 are known though their key is new
    assert found["bpb@novel"].value == pytest.approx((8 * 51 + _WRONG) / 64, rel=1e-6)


def test_a_copyist_pays_in_the_first_bucket_only(run: Run) -> None:
    found = _points(run, "toy:copy", "position_bits_per_byte")
    for name in ("bpb@pos=[0,64)", "bpb@pos=[0,1T)"):
        assert found.pop(name).value == pytest.approx((8 * 63 + _WRONG) / 64, rel=1e-6)
    assert max(p.value for p in found.values() if p.value is not None) == pytest.approx(0.0, abs=1e-9)


def test_who_ignores_the_context_gains_nothing_and_has_no_slope(run: Run) -> None:
    (gain,) = _points(run, "toy:uniform", "context_gain").values()
    (slope,) = _points(run, "toy:uniform", "context_slope").values()
    assert (gain.value, gain.context, gain.metric_id, gain.unit) == (0.0, 256, "gain@c=256,from=64,S=64", "bit/byte")
    assert slope.value == 0.0


def test_every_streamed_byte_is_in_one_bucket_of_each_kind(run: Run) -> None:
    records = [r for r in derived_records(run) if r.model == "toy:copy" and r.metric == "position_bits_per_byte"]
    stream = stream_of(run, run.cells[0])
    assert stream is not None
    for document, bits in zip(stream.documents, stream.bits, strict=True):
        for edges in ("bytes", "training contexts"):
            own = [r for r in records if r.sample == document and r.axes["edges"] == edges]
            assert sum(r.weight for r in own) == len(bits) == 1024
            assert sum(r.weight * (r.value or 0) for r in own) == pytest.approx(bits.sum(), abs=1e-6)


def test_slices_cover_what_is_not_excluded(run: Run) -> None:
    classes = classes_of(run)
    records = [r for r in derived_records(run) if r.model == "toy:copy" and r.metric == "recall_bits_per_byte"]
    for document, own in classes.items():
        assert own.dtype == np.int32
        assert sum(r.weight for r in records if r.sample == document) == (own != -2).sum() == 1012


def test_a_run_without_stored_arrays_has_its_other_points(run: Run, tmp_path: Path) -> None:
    assert [r for r in derived_records(write_run(tmp_path)) if r.metric.startswith(("position", "recall"))] == []
    (tmp_path / "texts.npz").write_bytes(b"PK damaged")
    assert classes_of(replace(run, path=tmp_path)) == {}


def test_bits_of_tokens_go_to_their_bytes() -> None:
    bits, ends = np.array([1.0, 2.0, 6.0, 5.0], np.float32), np.array([2, 2, 5, 6])
    assert per_byte(bits, ends, 1).tolist() == [1.0, 8 / 3, 8 / 3, 8 / 3, 5.0]
    assert per_byte(bits, ends, 1).sum() == bits.sum()
    late = np.array([1, 2, 2])  # a last token without bytes of its own
    assert per_byte(np.array([1.0, 2.0, 4.0], np.float32), late, 0).tolist() == [1.0, 6.0]


def _plain(**values: Any) -> Record:
    fields = {
        "run": "r", "cell": "c", "attempt": 1, "model": "m", "family": "m", "size": "", "task": "long_ppl", "seed": 0,
        "metric": "bits_per_byte", "metric_id": "bpb@c=1,S=128", "value": 1.0, "context": 0, "batch_size": 1, "axes": {},
        "sample": "d", "weight": 256.0, "repeat": 0, "status": "ok", "reason": "", "weights": "", "facts": {},
    }  # fmt: skip
    return Record(**{**fields, **values})


def test_gain_and_slope_by_hand() -> None:
    rows = [
        _plain(sample=name, context=c, value=base - 0.1 * i, metric_id=f"bpb@c={c},S=128")
        for name, base in (("a", 3.0), ("b", 5.0))
        for i, c in enumerate((128, 256, 512))
    ]
    made = list(gains(rows))
    assert [r.value for r in made if r.metric == "context_slope"] == pytest.approx([-0.1, -0.1])
    assert [(r.context, r.value) for r in made if r.metric == "context_gain" and r.sample == "b"] == [
        (256, pytest.approx(0.1)),
        (512, pytest.approx(0.2)),
    ]
    assert not list(gains(rows[:1]))
    assert {r.sample for r in gains(rows[:-1])} == {"a"}  # b lacks a context


def test_a_skipped_first_byte_and_other_protocols_shift_and_name_the_buckets() -> None:
    stream = Stream(("d",), (np.arange(1.0, 130.0),), (1,), 64, "bpb@stream,state=cold,block=64")
    found = {r.metric_id: (r.value, r.weight) for r in positions(stream, _plain())}
    assert found["bpb@pos=[0,64),state=cold,block=64"] == (32.0, 63.0)
    assert found["bpb@pos=[64,128),state=cold,block=64"] == (95.5, 64.0)
    classes = {"d": np.array([-2, 0, -1, 5, *[-2] * 126], np.int32)}
    got = {r.metric_id: (r.value, r.weight) for r in recall(stream, classes, _plain())}
    assert got == {
        "bpb@novel,state=cold,block=64": (1.0, 1.0),
        "bpb@conflict,state=cold,block=64": (2.0, 1.0),
        "bpb@recall,d=[4,8),state=cold,block=64": (3.0, 1.0),
    }
    assert replace(stream, metric_id="bpb@window=64,stride=16").protocol == ",window=64,stride=16"


def test_a_second_run_changes_nothing_but_times(run: Run, tmp_path: Path) -> None:
    again = _go(RunSpec.from_mapping(dict(run.manifest["spec"])), tmp_path)
    volatile = ("run", "facts", "attempt")
    rows = [[{k: v for k, v in vars(r).items() if k not in volatile} for r in one.records] for one in (run, again)]
    assert rows[0] == rows[1]
    for name in ("texts.npz", *(f"cells/{c.files}/{a}.npz" for c in run.cells for a in ("bits", "stream"))):
        with np.load(run.path / name) as first, np.load(again.path / name) as second:
            assert first.files == second.files
            assert all(first[k].tobytes() == second[k].tobytes() for k in first.files)


def test_reading_is_fast_and_repeatable(run: Run) -> None:
    started = time.perf_counter()
    first = points_of(run)
    assert points_of(open_run(run.path)) == first
    assert time.perf_counter() - started < 10


# -- burn-in -------------------------------------------------------------------------------------------------------------


def test_the_burn_in_variant_is_the_stream_without_its_first_16_bytes(run: Run) -> None:
    """toy:copy pays dearly for the first 64 bytes of a document and nothing after them."""
    plain = next(r for r in run.records if r.metric == "stream_bits_per_byte")
    bits = tuple(np.arange(n, dtype=np.float64) for n in (100, 16, 20))
    stream = Stream(("a", "b", "c"), bits, (0, 0, 4), 64, "bpb@stream,state=carry")
    found = {r.sample: (r.value, r.weight) for r in burnt_in(stream, plain)}
    assert found == {
        "a": (pytest.approx(sum(range(16, 100)) / 84), 84.0),
        "c": (pytest.approx(sum(range(12, 20)) / 8), 8.0),
    }
    assert {r.metric_id for r in burnt_in(stream, plain)} == {"bpb@stream,burn_in=16,state=carry"}
    cold = replace(stream, metric_id="bpb@stream,state=cold,block=64")
    assert {r.metric_id for r in burnt_in(cold, plain)} == {"bpb@stream,burn_in=16,state=cold,block=64"}
    rows = [r for r in derived_records(run) if r.metric == "burn_in_bits_per_byte"]
    assert {r.value for r in rows if r.model.startswith("toy:uniform")} == {8.0}
    whole = {(r.model, r.sample): r for r in run.records if r.metric == "stream_bits_per_byte"}
    for r in rows:
        assert r.weight == whole[r.model, r.sample].weight - 16
