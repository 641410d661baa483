"""Is everything that is damaged found and copied, and nothing that is sound touched?"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from test_store import _result, _run

from bdh_bench.errors import StoreError
from bdh_bench.results.store import EventWriter, open_run
from bdh_bench.runner.leases import Leases, boot_id, host
from bdh_bench.runner.repair import repair


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "quarantine" not in path.parts
    }


def test_a_sound_run_is_left_alone(tmp_path: Path) -> None:
    folder = _run(tmp_path / "r")
    _result(EventWriter(folder, "w"), 1)
    before = _files(folder)
    assert (repair(folder).findings, repair(folder).sound) == ((), True)
    assert _files(folder) == before
    assert not (folder / "quarantine").exists()


def test_damage_is_copied_and_what_was_left_behind_is_cleared(tmp_path: Path) -> None:
    folder = _run(tmp_path / "r")
    writer = EventWriter(folder, "w")
    for attempt in (1, 2):
        _result(writer, 7, attempt=attempt)
    lines = writer.path.read_bytes().splitlines(keepends=True)
    bad, torn = lines[0].replace(b'"value":7', b'"value":8'), lines[1][:40]
    writer.path.write_bytes(bad + lines[1] + torn)
    gone = subprocess.Popen(["true"])
    gone.wait()
    stale = folder / "leases" / "stale-1"
    stale.write_text(json.dumps({"host": host(), "boot": boot_id(), "pid": gone.pid, "born": 1}))
    partial = folder / f".run.json.{gone.pid}.partial"
    partial.write_bytes(b"{")
    alive = folder / f".run.json.{os.getpid()}.partial"
    alive.write_bytes(b"{")
    files = folder / "cells" / ("a" * 16) / "1-3"
    files.mkdir(parents=True)
    (files / ".bits.npz.partial").write_bytes(b"PK")
    before = _files(folder)
    with Leases(folder).hold("a" * 64, 1):  # somebody is measuring: what he writes is no stray
        found = repair(folder)
        assert [f.kind for f in found.findings] == ["line", "line", "partial", "lease"]
    again = repair(folder)
    assert [f.kind for f in again.findings] == ["line", "line", "partial"]
    copies = [(folder / f.copy).read_bytes() for f in (*found.findings, again.findings[2])]
    assert copies[:3] == [bad, torn, b"{"]
    assert copies[4] == b"PK"
    assert not found.sound
    gone_now = {f".run.json.{gone.pid}.partial", "leases/stale-1", f"cells/{'a' * 16}/1-3/.bits.npz.partial"}
    assert {name: text for name, text in before.items() if name not in gone_now} == _files(folder)
    assert [r.value for r in open_run(folder).records] == [7]
    assert len(list((folder / "quarantine").iterdir())) == 5


def test_a_damaged_manifest_is_copied(tmp_path: Path) -> None:
    folder = _run(tmp_path / "r")
    (folder / "run.json").write_bytes(b"{")
    (finding,) = repair(folder).findings
    assert (finding.kind, (folder / finding.copy).read_bytes()) == ("manifest", b"{")


def test_no_link_is_followed(tmp_path: Path) -> None:
    folder = _run(tmp_path / "r")
    writer = EventWriter(folder, "w")
    writer.path.write_bytes(b"damaged\n")
    (tmp_path / "elsewhere").mkdir()
    (folder / "quarantine").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is a link"):
        repair(folder)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_command_says_what_it_found(tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    folder = _run(tmp_path / "r")
    writer = EventWriter(folder, "w")
    _result(writer, 7)
    code, out, _ = cli("doctor", "--store", "r", "--runs", str(tmp_path), "--json")
    assert (code, json.loads(out)["data"]["sound"]) == (0, True)
    writer.path.write_bytes(b"damaged\n")
    code, out, _ = cli("doctor", "--store", "--runs", str(tmp_path), "--json")
    assert (code, json.loads(out)["errors"][0]["message"]) == (3, "events/w.jsonl:1: damaged")
    assert cli("doctor", "r", "--runs", str(tmp_path))[0] == 2
