"""Whatever happens to the disk, the clock, a writer or the bytes: is nothing lost, and no wrong number read?"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import _CELL, _result, _run
from test_workers import go, start

from bdh_bench.errors import SpecError, StoreError
from bdh_bench.results import store
from bdh_bench.results.migrations import Unreadable, current_event, current_manifest
from bdh_bench.results.store import EventWriter, check_run_id, create_run, open_run, write_atomically
from bdh_bench.runner import process
from bdh_bench.runner.leases import Leases
from bdh_bench.runner.local import Limits
from bdh_bench.spec import parse_model, parse_models
from bdh_bench.types import Record

_GOLDEN = Path(__file__).parent / "golden" / "store-2"
_KEY = str(_CELL["key"])


# -- disk and clock ----------------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_the_next_line_stands_on_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _run(tmp_path / "r")
    writer = EventWriter(folder, "w")
    _result(writer, 1)
    real = os.write
    with monkeypatch.context() as full:
        full.setattr(store.os, "write", lambda descriptor, data: real(descriptor, data[: len(data) // 2]))
        with pytest.raises(StoreError, match="space on the disk"):
            _result(writer, 2, attempt=2)
    assert ([r.value for r in open_run(folder).records], open_run(folder).problems) == ([1], ())
    _result(writer, 3, attempt=3)
    assert ([r.value for r in open_run(folder).records], open_run(folder).problems) == ([3], ())


def test_a_file_that_may_not_grow_keeps_what_it_has(tmp_path: Path) -> None:
    """The system itself refuses: a limit on the size of files, in a process of its own."""
    folder = _run(tmp_path / "r")
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from bdh_bench.results.store import EventWriter\n"
        "from bdh_bench.errors import StoreError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "writer, written = EventWriter(Path(sys.argv[1]), 'w'), 0\n"
        "try:\n"
        "    while True:\n"
        "        written += 1\n"
        "        writer.write('started', cell='a' * 64, round=1, attempt=written)\n"
        "except StoreError: print(written - 1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    run = open_run(folder)
    assert (run.cells[0].attempts, run.problems) == (int(done.stdout), ())
    assert run.cells[0].attempts > 5


def test_a_manifest_is_written_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        write_atomically(path, "new")
    with pytest.raises(StoreError):
        create_run(tmp_path / "r", {"cells": []})
    assert ([p.name for p in tmp_path.iterdir()], path.read_text()) == (["x.json"], "old")


@contextlib.contextmanager
def _nobody(folder: Path) -> Iterator[None]:
    """As a user who may read below ``folder`` and not write: the superuser becomes another one for a moment."""
    for name in ("events", "leases", "cells"):
        (folder / name).chmod(0o555)
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if was == 0:
            os.seteuid(0)
        for name in ("events", "leases", "cells"):
            (folder / name).chmod(0o755)


def test_a_read_only_folder_is_said() -> None:
    with TemporaryDirectory() as root:
        Path(root).chmod(0o755)
        start(Path(root), ("toy:uniform",))
        with Leases(Path(root, "r")).hold("x", 1):  # what Python imports late it may not find as another user
            pass
        with _nobody(Path(root, "r")):
            with pytest.raises(StoreError, match="Permission denied"):
                EventWriter(Path(root, "r"), "w")
            with pytest.raises(StoreError, match="Permission denied"):
                go(Path(root))
            assert open_run(Path(root, "r")).cells[0].status == "planned"
        assert go(Path(root), limits=Limits(9.0, 0.0)).problems == ()


def test_a_clock_that_jumps_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Falling(datetime):
        at = datetime(2026, 1, 1, tzinfo=UTC)

        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            cls.at -= timedelta(days=400)
            return cls.at

    monkeypatch.setattr(store, "datetime", Falling)
    folder = _run(tmp_path / "r")
    writer = EventWriter(folder, "w")
    for attempt in (1, 2, 3):
        writer.write("started", cell=_KEY, round=1, attempt=attempt)
        _result(writer, attempt, attempt=attempt)
    run = open_run(folder)
    assert ([r.value for r in run.records], run.cells[0].attempts) == ([3], 3)


# -- writers -----------------------------------------------------------------------------------------------------------


def test_six_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    folder = _run(tmp_path / "r", rounds=6)
    code = (
        "import sys; from pathlib import Path\n"
        "from bdh_bench.results.store import EventWriter\n"
        "writer = EventWriter(Path(sys.argv[1]), sys.argv[2])\n"
        "row = {'metric': 'state_bytes', 'context': 8}\n"
        "for n in range(1, 41):\n"
        "    who = {'cell': 'a' * 64, 'round': int(sys.argv[2]), 'attempt': n}\n"
        "    rows = [{**row, 'value': 100 * int(sys.argv[2]) + n, 'repeat': i} for i in range(20)]\n"
        "    writer.write('result', **who, status='ok', measurements=rows)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(folder), str(n)]) for n in range(1, 7)]
    while any(writer.poll() is None for writer in writers):  # a reader beside them sees whole rows only
        assert all("torn" in problem for problem in open_run(folder).problems)
    run = open_run(folder)
    assert [writer.returncode for writer in writers] == [0] * 6
    assert sorted(r.value or 0 for r in run.records) == sorted([100 * n + 40 for n in range(1, 7)] * 20)
    assert ([one.attempts for one in run.cells[0].rounds], run.problems) == ([40] * 6, ())


def test_a_kill_at_every_event_boundary_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = (sys.executable, str(Path(__file__).with_name("quick_worker.py")))
    monkeypatch.setattr(process, "COMMAND", quick)
    start(tmp_path / "whole", ("toy:uniform", "toy:sleep"))
    whole = go(tmp_path / "whole")
    truth = [(r.cell, r.value) for r in whole.records]
    events = [
        (path.name, line)
        for path in sorted((whole.path / "events").iterdir())
        for line in path.read_bytes().splitlines(True)
    ]
    for cut in range(len(events) + 1):
        for torn in (b"", events[min(cut, len(events) - 1)][1][:50]):
            root = tmp_path / f"{cut}-{len(torn)}"
            shutil.copytree(whole.path, root / "r")
            for path in (root / "r" / "events").iterdir():
                path.unlink()
            for name, line in events[:cut]:
                with (root / "r" / "events" / name).open("ab") as shard:
                    shard.write(line)
            if torn and cut < len(events):
                with (root / "r" / "events" / events[cut][0]).open("ab") as shard:
                    shard.write(torn)
            elif torn:
                continue
            run = go(root)
            assert [(r.cell, r.value) for r in run.records] == truth
            assert len(run.problems) == bool(torn)


# -- bytes -------------------------------------------------------------------------------------------------------------

_SHARD = (_GOLDEN / "events" / "w0.jsonl").read_bytes()
_TRUTH = open_run(_GOLDEN)


def _with_shard(folder: Path, content: bytes) -> store.Run:
    (folder / "events").mkdir(exist_ok=True)
    shutil.copy(_GOLDEN / "run.json", folder / "run.json")
    (folder / "events" / "w0.jsonl").write_bytes(content)
    return open_run(folder)


def _plain(record: Record) -> Record:
    return replace(record, run="")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(_SHARD) - 1), st.integers(0, 255))
def test_one_byte_of_a_shard_changed_is_reported_or_harmless(at: int, byte: int) -> None:
    with TemporaryDirectory() as folder:
        run = _with_shard(Path(folder), _SHARD[:at] + bytes([byte]) + _SHARD[at + 1 :])
    true = [_plain(record) for record in _TRUTH.records]
    found = [_plain(record) for record in run.records]
    assert all(record in true for record in found)  # never a wrong value
    assert run.problems or found == true


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(_SHARD)), st.binary(max_size=40))
def test_a_shard_cut_anywhere_with_anything_behind_it_is_read(at: int, tail: bytes) -> None:
    with TemporaryDirectory() as folder:
        run = _with_shard(Path(folder), _SHARD[:at] + tail)
    true = [_plain(record) for record in _TRUTH.records]
    assert all(_plain(record) in true for record in run.records)


_NAMES = (
    *("type", "cell", "round", "attempt", "status", "reason", "facts", "log", "files", "measurements", "key", "cells"),
    *("metric", "value", "context", "axes", "sample", "weight", "repeat", "model", "seed", "rounds", "x"),
)
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.just(_KEY)
    | st.just(1)
    | st.just("ok"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_NAMES), inner, max_size=6),
    max_leaves=12,
)
_EVENTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["started", "result", "failed"]), "cell": st.just(_KEY), "attempt": st.integers(-1, 3)},
    optional={name: _JSON for name in ("round", "status", "reason", "facts", "log", "files", "measurements")},
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, "2", None]), _EVENTS | _JSON), max_size=4), st.binary(max_size=30)
)
def test_the_reader_never_falls_over_what_it_reads(events: list[tuple[Any, Any]], tail: bytes) -> None:
    """Lines with a right checksum and anything in them: what no writer of ours writes, and someone else may."""
    lines = []
    for version, body in events:
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        crc = zlib.crc32(text.encode("utf-8", "replace"))
        lines.append(f'{{"v":{json.dumps(version)},"crc":{crc},"body":{text}}}\n'.encode("utf-8", "replace"))
    with TemporaryDirectory() as name:
        folder = _run(Path(name) / "r", rounds=2)
        (folder / "events" / "w.jsonl").write_bytes(b"".join(lines) + tail)
        run = open_run(folder)
    assert all(isinstance(record.axes, dict) and isinstance(record.status, str) for record in run.records)
    json.dumps([record.value for record in run.records], allow_nan=False)


@settings(max_examples=150, deadline=None)
@given(_JSON | st.fixed_dictionaries({"v": st.sampled_from([1, 2, 3, "2"]), "cells": _JSON | st.lists(_JSON)}))
def test_a_manifest_with_anything_in_it_is_read_or_refused(manifest: Any) -> None:
    with TemporaryDirectory() as folder:
        Path(folder, "run.json").write_text(json.dumps(manifest), encoding="utf-8")
        with contextlib.suppress(StoreError):
            open_run(folder)


@given(st.dictionaries(st.text(max_size=8), st.integers()), st.integers(-3, 5))
def test_a_migration_keeps_what_it_does_not_know_and_leaves_its_argument(more: dict[str, int], version: int) -> None:
    body = {**more, "cell": "c" * 64, "attempt": 1}
    body.pop("round", None)
    before = json.dumps(body)
    try:
        migrated = current_event(version, body)
    except Unreadable:
        assert version not in (1, 2)
        return
    assert json.dumps(body) == before
    assert {name: value for name, value in migrated.items() if name in body and name != "files"} | {
        name: body[name] for name in body if name == "files"
    } == body
    assert current_event(2, migrated) == migrated
    manifest = current_manifest({**more, "v": version, "cells": []})
    assert manifest == {**more, "v": 2, "cells": []}


# -- names -------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=70))
def test_a_run_id_is_a_folder_name_everywhere_or_refused(name: str) -> None:
    try:
        assert check_run_id(name) == name
    except SpecError:
        return
    with TemporaryDirectory() as root:
        path = Path(root, name)
        assert path.resolve().parent == Path(root).resolve()
        path.mkdir()
        assert [p.name for p in Path(root).iterdir()] == [name]


_GRAMMAR = st.lists(
    st.sampled_from(
        ["bdh", "gpt2", "toy", "hf", ":", "@", ",", "=", '"', "1m", "quick", "copy", "period", "./x", "a b", "é", "-"]
    ),
    max_size=9,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(_GRAMMAR | st.text(max_size=20))
def test_a_model_name_is_read_into_what_prints_itself_or_refused(text: str) -> None:
    try:
        models = parse_models(text)
    except SpecError:
        return
    assert [str(parse_model(str(model))) for model in models] == [str(model) for model in models]
    assert [parse_model(str(model)).options for model in models] == [model.options for model in models]
