"""Is nothing lost, and is damage told from truth?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bdh_bench.errors import SpecError, StoreError, UnknownRunError
from bdh_bench.results.migrations import Unreadable, current_event, current_manifest
from bdh_bench.results.store import (
    EventWriter,
    check_run_id,
    create_run,
    find_run,
    measurement_body,
    new_run_id,
    open_run,
    wanted_rounds,
)
from bdh_bench.types import Measurement

_CELL = {
    "key": "a" * 64,
    "model": "m",
    "family": "m",
    "size": "",
    "task": "memory",
    "seed": 0,
    "context": 8,
    "metric": "state_bytes",
}


def _run(folder: Path, rounds: int = 1) -> Path:
    create_run(folder, {"run": folder.name, "created": "2026-01-01", "cells": [{**_CELL, "rounds": rounds}]})
    return folder


def _result(writer: EventWriter, value: float, attempt: int = 1, status: str = "ok", round_: int = 1) -> None:
    rows = [measurement_body(Measurement("state_bytes", value, 8))]
    who = {"cell": _CELL["key"], "round": round_, "attempt": attempt}
    writer.write("result", **who, status=status, reason="", facts={}, measurements=rows)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = _run(tmp_path / "r")
    writer = EventWriter(folder, "w")
    measurement = Measurement("x_s", 1.5, 8, 2, {"mode": "a"}, "döc", 3.0, 4, "x@1", "noisy", "why")
    writer.write("started", cell=_CELL["key"], round=1, attempt=1)
    writer.write(
        "result",
        cell=_CELL["key"],
        round=1,
        attempt=1,
        status="ok",
        facts={},
        measurements=[measurement_body(measurement)],
    )
    (record,) = open_run(folder).records
    for name in (
        "metric",
        "value",
        "context",
        "batch_size",
        "axes",
        "sample",
        "weight",
        "repeat",
        "metric_id",
        "status",
        "reason",
    ):
        assert getattr(record, name) == getattr(measurement, name)
    assert open_run(folder).finished


def test_a_torn_last_line_is_tolerated_and_reported(tmp_path: Path) -> None:
    folder = _run(tmp_path / "r")
    writer = EventWriter(folder, "w")
    _result(writer, 1)
    whole = writer.path.read_bytes()
    for cut in range(1, len(whole)):
        writer.path.write_bytes(whole[:cut])
        run = open_run(folder)
        if cut < len(whole) - 1:
            assert run.records == ()
            assert len(run.problems) == 1


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    folder = _run(tmp_path / "r")
    writer = EventWriter(folder, "w")
    _result(writer, 1234)
    _result(writer, 1234, attempt=2)
    whole = writer.path.read_bytes()
    first = whole.index(b"\n")
    for at in range(0, first, 3):
        writer.path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        run = open_run(folder)
        assert [r.value for r in run.records] == [1234]  # the second line still stands
        assert run.problems or whole[at : at + 1] in b" "


def test_the_newest_final_attempt_counts_and_interrupted_ones_do_not(tmp_path: Path) -> None:
    folder = _run(tmp_path / "r")
    writer = EventWriter(folder, "w")
    assert open_run(folder).cells[0].kind == "pending"
    _result(writer, 1, attempt=1, status="interrupted")
    assert open_run(folder).cells[0].kind == "pending"
    assert open_run(folder).records == ()
    _result(writer, 2, attempt=2)
    writer.write("started", cell=_CELL["key"], round=1, attempt=3)
    assert [r.value for r in open_run(folder).records] == [2]


def test_two_final_rows_of_one_attempt_are_reported(tmp_path: Path) -> None:
    folder = _run(tmp_path / "r")
    _result(EventWriter(folder, "a"), 1)
    _result(EventWriter(folder, "b"), 2)
    run = open_run(folder)
    assert [r.value for r in run.records] == [1]
    assert "two final rows" in run.problems[0]


def test_a_cell_without_values_is_still_a_row(tmp_path: Path) -> None:
    folder = _run(tmp_path / "r")
    EventWriter(folder, "w").write(
        "failed", cell=_CELL["key"], round=1, attempt=1, status="crash", reason="SIGSEGV", log="tail"
    )
    (record,) = open_run(folder).records
    assert (record.value, record.status, record.reason, record.metric) == (None, "crash", "SIGSEGV", "state_bytes")


def test_a_shard_has_one_writer(tmp_path: Path) -> None:
    folder = _run(tmp_path / "r")
    EventWriter(folder, "w")
    with pytest.raises(StoreError):
        EventWriter(folder, "w")


def test_no_nan_reaches_the_disk(tmp_path: Path) -> None:
    folder = _run(tmp_path / "r")
    writer = EventWriter(folder, "w")
    with pytest.raises(ValueError, match="not JSON compliant"):
        _result(writer, float("nan"))
    assert writer.path.read_bytes() == b""


def test_newer_schemas_and_damaged_manifests_are_refused(tmp_path: Path) -> None:
    folder = _run(tmp_path / "r")
    manifest: dict[str, Any] = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**manifest, "v": 99}))
    with pytest.raises(StoreError, match="upgrade"):
        open_run(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(StoreError):
        open_run(folder)
    with pytest.raises(UnknownRunError):
        open_run(tmp_path / "nothing")
    with pytest.raises(UnknownRunError, match="newest: r"):
        find_run(tmp_path, "q")


def test_a_cell_is_what_its_rounds_are(tmp_path: Path) -> None:
    folder = _run(tmp_path / "r", rounds=3)
    writer = EventWriter(folder, "w")

    def read() -> tuple[str, list[int], bool]:
        run = open_run(folder)
        (cell,) = run.cells
        return cell.kind, [one.round for one in wanted_rounds(cell.rounds)], run.finished

    assert read() == ("pending", [1, 2, 3], False)
    _result(writer, 1, round_=2)
    assert read() == ("pending", [1, 3], False)
    _result(writer, 1, round_=1, status="interrupted")
    assert read() == ("pending", [1, 3], False)
    _result(writer, 2, round_=1, attempt=2, status="noisy")
    _result(writer, 3, round_=3)
    assert read() == ("ok", [], True)
    run = open_run(folder)
    assert run.cells[0].status == "noisy"
    assert [(r.round, r.attempt, r.value) for r in run.records] == [(1, 2, 2), (2, 1, 1), (3, 1, 3)]
    writer.write("failed", cell=_CELL["key"], round=2, attempt=2, status="crash", reason="SIGSEGV")
    assert read() == ("failed", [], True)
    assert open_run(folder).cells[0].reason == "round 2 of 3: SIGSEGV"


@pytest.mark.parametrize("status", ["unsupported", "oom_host", "crash", "timeout"])
def test_a_round_without_a_value_ends_its_cell(tmp_path: Path, status: str) -> None:
    folder = _run(tmp_path / "r", rounds=5)
    EventWriter(folder, "w").write("failed", cell=_CELL["key"], round=1, attempt=1, status=status, reason="why")
    run = open_run(folder)
    assert run.finished
    assert run.cells[0].status == status
    assert wanted_rounds(run.cells[0].rounds) == []


_GOLDEN = Path(__file__).parent / "golden"


def test_each_version_that_was_written_is_read() -> None:
    """Both golden runs hold the same cells; that of version 2 has a second round of one."""
    old, new = open_run(_GOLDEN / "store-1"), open_run(_GOLDEN / "store-2")
    assert old.problems == new.problems == ()
    assert [c.status for c in old.cells] == [c.status for c in new.cells] == ["ok", "ok", "crash"]
    assert [len(c.rounds) for c in old.cells] == [1, 1, 1]
    assert [len(c.rounds) for c in new.cells] == [1, 2, 1]
    assert [replace(r, run="") for r in old.records] == [replace(r, run="") for r in new.records if r.round == 1]
    assert [r.value for r in new.records if r.round == 2] == [0.002, 0.0021]
    assert (old.cells[0].files, new.cells[0].files) == (f"{'a' * 16}/2", f"{'a' * 16}/1-2")
    assert all(run.manifest["note"] == run.manifest["cells"][2]["note"] == "kept" for run in (old, new))
    assert old.cells[0].attempts == new.cells[0].attempts == 2


def test_migrations_are_pure_and_refuse_what_they_do_not_know() -> None:
    manifest = {"v": 1, "cells": [{"key": "a", "new": 1}], "new": [2]}
    before = json.dumps(manifest)
    assert current_manifest(manifest) == {"v": 2, "cells": [{"key": "a", "new": 1, "rounds": 1}], "new": [2]}
    body = {"type": "started", "cell": "b" * 64, "attempt": 3, "new": 4}
    assert current_event(1, body) == {**body, "round": 1, "files": f"{'b' * 16}/3"}
    assert (json.dumps(manifest), "round" in body) == (before, False)
    assert current_event(2, {"round": 7}) == {"round": 7}
    for version in (0, 3, "1", None, True, 1.0):
        with pytest.raises(Unreadable):
            current_event(version, body)
        with pytest.raises(Unreadable):
            current_manifest({"v": version})
    with pytest.raises(Unreadable):  # its version number was damaged
        current_event(1, {**body, "round": 1})


def test_what_a_later_minor_version_adds_is_kept(tmp_path: Path) -> None:
    folder = _run(tmp_path / "r")
    row = {**measurement_body(Measurement("state_bytes", 5, 8)), "new": 1}
    who = {"cell": _CELL["key"], "round": 1, "attempt": 1}
    EventWriter(folder, "w").write("result", **who, status="ok", facts={"new": 2}, measurements=[row], new=3)
    run = open_run(folder)
    assert ([r.value for r in run.records], run.problems) == ([5], ())
    assert (run.cells[0].facts["new"], run.cells[0].rounds[0].more) == (2, {"new": 3})


def test_files_of_an_attempt_lie_below_the_run(tmp_path: Path) -> None:
    folder = _run(tmp_path / "r")
    EventWriter(folder, "w").write("failed", cell=_CELL["key"], round=1, attempt=1, status="nan", files="../../x")
    assert open_run(folder).cells[0].files == f"{'a' * 16}/1-1"


def test_an_unwritable_folder_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError):
        create_run(tmp_path / "file" / "r", {"cells": []})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden", "con", "nul.txt", "x" * 65, "a\n", "dot."])
def test_run_ids_that_are_no_folder_names_are_refused(name: str) -> None:
    with pytest.raises(SpecError):
        check_run_id(name)
    assert check_run_id(new_run_id())
