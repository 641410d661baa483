"""Do workers share a run, end every process they started, and turn each way to end into one row?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bdh_bench.errors import SpecError, StoreError, UnknownNameError
from bdh_bench.measure import kills
from bdh_bench.results.store import Run, create_run, open_run
from bdh_bench.runner import leases, process
from bdh_bench.runner.leases import Leases, boot_id, host
from bdh_bench.runner.local import Limits, work
from bdh_bench.runner.plan import Plan
from bdh_bench.runner.run import exit_code
from bdh_bench.runner.selection import Selection, choose
from bdh_bench.spec import RunSpec, parse_seconds
from bdh_bench.types import Cell

_QUICK = (sys.executable, str(Path(__file__).with_name("quick_worker.py")))
_KEY = "c" * 64


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "COMMAND", _QUICK)
    monkeypatch.setattr(process, "GRACE_S", 0.5)


def start(root: Path, models: tuple[str, ...], contexts: tuple[int | None, ...] = (16,), rounds: int = 1) -> Plan:
    """A run of these cells below ``root``/r, as the plan would write it."""
    cells = [
        Cell(f"{i:02}{j:02}".ljust(64, "0"), model, "memory", 0, context, rounds)
        for i, model in enumerate(models)
        for j, context in enumerate(contexts)
    ]
    plan = Plan(RunSpec(models, ("memory",)), tuple(cells), {"memory": (16,)}, None, (), ())
    create_run(root / "r", plan.manifest("r", "2026-01-01", {}))
    return plan


def go(root: Path, names: tuple[str, ...] = (), limits: Limits | None = None) -> Run:
    work(root / "r", names, limits or Limits(60.0), lambda cell, facts: None)
    return open_run(root / "r")


def test_each_way_to_end_is_a_row_and_the_others_finish(tmp_path: Path) -> None:
    start(tmp_path, ("toy:uniform", "toy:segfault", "toy:oom", "toy:noisy", "toy:sleep"))
    run = go(tmp_path)
    assert [c.status for c in run.cells] == ["ok", "crash", "oom_host", "noisy", "ok"]
    assert "SIGSEGV" in run.cells[1].reason
    assert (run.problems, exit_code(run), run.finished) == ((), 3, True)
    assert not list((tmp_path / "r" / "leases").iterdir())
    assert not process.left_behind(tmp_path / "r")


def test_what_a_killed_parent_left_is_removed(tmp_path: Path) -> None:
    plan = start(tmp_path, ("toy:uniform",))
    left = process.temporary_folder(tmp_path / "r", plan.cells[0].key, 1, 7)
    left.mkdir()
    other = process.temporary_folder(tmp_path / "another", plan.cells[0].key, 1, 7)
    other.mkdir()
    go(tmp_path)
    assert (left.exists(), other.exists()) == (False, True)
    other.rmdir()


def test_what_hangs_is_ended_with_its_phase_and_its_whole_group(tmp_path: Path) -> None:
    start(tmp_path, ("toy:hang", "toy:child", "toy:uniform"))
    run = go(tmp_path, limits=Limits(1.5))
    assert [c.status for c in run.cells] == ["timeout", "ok", "ok"]
    assert run.cells[0].reason == "phase measure: no result after 1.5 s"
    left = int((tmp_path / "r" / "child").read_text())
    status = Path(f"/proc/{left}/stat")  # adopted by init, which may leave it as a zombie for a moment
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] in "ZX"
    with pytest.raises(ChildProcessError):  # no zombie of ours
        os.waitpid(-1, os.WNOHANG)


def test_a_phase_has_a_limit_of_its_own(tmp_path: Path) -> None:
    def measured(limits: dict[str, float]) -> process.Death:
        start(tmp_path / str(len(limits)), ("toy:hang",))
        folder = tmp_path / str(len(limits)) / "r"
        cell = {"key": _KEY, "model": "toy:hang", "seed": 0, "context": 1}
        request = {"run_folder": str(folder), "cell": cell, "round": 1, "attempt": 1}
        log, temporary = folder / "log", folder / "tmp"
        return process.measure(request, dict(os.environ), log, temporary, lambda said: None, 2.0, limits)

    assert measured({"measure": 0.2}).reason == "phase measure: not over after 0.2 s"
    assert measured({"gates": 0.0, "warm-up": 0.0}).reason == "phase measure: no result after 2 s"


def test_what_ended_from_outside_is_tried_three_times_more_and_is_not_final(tmp_path: Path) -> None:
    start(tmp_path, ("toy:term", "toy:uniform"))
    run = go(tmp_path)
    assert [(c.status, c.attempts) for c in run.cells] == [("infra", 4), ("ok", 1)]
    assert not run.finished
    assert run.cells[0].reason == "ended from outside (SIGTERM)"


def test_a_kill_is_out_of_memory_only_where_something_speaks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = iter([3, 4, 4, None])
    monkeypatch.setattr(kills, "oom_kills", lambda: next(counted))
    assert kills.why_killed(3, 10) == ""
    assert "counted" in kills.why_killed(3, 10)
    assert "probable" in kills.why_killed(4, kills.memory_bytes())
    assert "probable" in kills.why_killed(None, 10)


def test_larger_contexts_than_one_without_memory_are_skipped(tmp_path: Path) -> None:
    start(tmp_path, ("toy:oom", "toy:uniform"), (8, 16, 32))
    run = go(tmp_path)
    assert [c.status for c in run.cells] == ["oom_host", "skipped", "skipped", "ok", "ok", "ok"]
    assert run.cells[2].reason == "larger than oom: there was no memory at context 8"


def test_rounds_are_named_and_only_wanted_ones_are_run(tmp_path: Path) -> None:
    start(tmp_path, ("toy:uniform", "toy:segfault"), rounds=3)
    first, second = (cell.key[:16] for cell in open_run(tmp_path / "r").cells)
    run = go(tmp_path, (f"{first}-2",))
    assert [one.status for one in run.cells[0].rounds] == ["planned", "ok", "planned"]
    run = go(tmp_path)
    assert [one.attempt for one in run.cells[0].rounds] == [1, 1, 1]
    assert [one.status for one in run.cells[1].rounds] == ["crash", "planned", "planned"]
    run = go(tmp_path, (f"{second}-1-1", f"{first}-1-7"))  # again after attempt 1; attempt 7 is none
    assert [one.attempts for cell in run.cells for one in cell.rounds] == [1, 1, 1, 2, 0, 0]
    for wrong in ("zz-1", "0", f"{first}-x", f"{first}-1-1-1", ""):
        with pytest.raises(UnknownNameError):
            go(tmp_path, (wrong,))


def test_limits_end_the_work_between_rounds(tmp_path: Path) -> None:
    start(tmp_path, ("toy:segfault", "toy:uniform"))
    assert [c.status for c in go(tmp_path, limits=Limits(9.0, None, True)).cells] == ["crash", "planned"]
    run = go(tmp_path, limits=Limits(9.0, 0.0))
    assert [c.status for c in run.cells] == ["crash", "planned"]
    assert exit_code(run) == 5
    assert [parse_seconds(text) for text in ("90", "90s", "1.5m", "2h")] == [90, 90, 90, 7200]
    for wrong in ("", "0", "-1s", "2d", "h"):
        with pytest.raises(SpecError):
            parse_seconds(wrong)


def test_what_is_chosen(tmp_path: Path) -> None:
    plan = start(tmp_path, ("toy:segfault", "toy:noisy", "toy:uniform"), rounds=2)
    run = go(tmp_path, (plan.cells[0].key, plan.cells[1].key))
    key = [cell.key[:16] for cell in plan.cells]

    def chosen(**how: Any) -> set[str]:
        return set(choose(plan, run, Selection(**how)))

    missing = {f"{key[2]}-1", f"{key[2]}-2"}
    assert chosen() == missing
    failed = {f"{key[0]}-1-1", f"{key[0]}-2"}  # its second round is wanted once the first is measured
    assert chosen(only_failed=True) == failed
    assert chosen(retry=frozenset({"crash"})) == missing | failed
    assert chosen(retry=frozenset({"timeout"})) == missing
    assert chosen(retry=frozenset({"noisy"})) == missing | {f"{key[1]}-1-1", f"{key[1]}-2-1"}
    assert len(chosen(max_cells=1, retry=frozenset({"crash", "noisy"}))) == 2
    for wrong in ({"retry": frozenset({"ok"})}, {"max_cells": 0}):
        with pytest.raises(SpecError):
            Selection(**wrong)


# -- leases ------------------------------------------------------------------------------------------------------------


def _lease(folder: Path, **changes: Any) -> Path:
    (folder / "leases").mkdir(exist_ok=True)
    path = folder / "leases" / f"{_KEY[:16]}-1"
    holder = {"host": host(), "pid": os.getpid(), "born": leases._born(os.getpid()), "boot": boot_id()}
    path.write_text(json.dumps({**holder, **changes}))
    return path


def _held(of: Leases) -> bool:
    with of.hold(_KEY, 1) as ours:
        return not ours


def test_a_lease_is_stale_at_once_where_its_process_is_gone(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    _lease(tmp_path)
    assert _held(Leases(tmp_path))  # of this living process, however it came by it
    for changes in ({"pid": gone.pid}, {"boot": "another"}, {"born": 1}):
        path = _lease(tmp_path, **changes)
        assert not _held(Leases(tmp_path))
        assert not path.exists()
    path.write_text('{"pid":')  # torn
    assert not _held(Leases(tmp_path))


def test_a_lease_of_another_machine_is_stale_after_three_missed_heartbeats(tmp_path: Path) -> None:
    path = _lease(tmp_path, host="another", boot="another")
    mine = Leases(tmp_path, heartbeat_s=0.05)
    for _ in range(6):  # while it beats, it is held, whatever its clock says
        assert _held(mine)
        os.utime(path, (0, path.stat().st_mtime - 3600))
        time.sleep(0.06)
    assert _held(mine)
    time.sleep(0.2)
    assert not _held(mine)
    assert Leases(tmp_path).stale() == []


def test_a_holder_beats_and_gives_back_only_what_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "leases").mkdir()
    path = tmp_path / "leases" / f"{_KEY[:16]}-1"
    with Leases(tmp_path, heartbeat_s=0.02).hold(_KEY, 1) as ours:
        assert ours
        first = path.stat().st_mtime_ns
        deadline = time.monotonic() + 5
        while path.stat().st_mtime_ns == first and time.monotonic() < deadline:
            time.sleep(0.02)
        assert path.stat().st_mtime_ns != first
        path.write_text("taken over by another")
    assert path.read_text() == "taken over by another"


def test_of_many_that_find_one_stale_lease_one_gets_it(tmp_path: Path) -> None:
    for _ in range(20):
        _lease(tmp_path, boot="another")
        inside: list[int] = []
        barrier = threading.Barrier(6)

        def race(inside: list[int] = inside, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            with Leases(tmp_path).hold(_KEY, 1) as ours:
                inside.append(ours)
                barrier.wait()  # nobody has given it back before all have tried

        threads = [threading.Thread(target=race) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(inside) == 1


def test_two_parents_share_a_run(tmp_path: Path) -> None:
    start(tmp_path, ("toy:sleep", *(f"toy:sleep:seconds={i}" for i in range(5))))
    others = [threading.Thread(target=go, args=(tmp_path,)) for _ in range(2)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    run = open_run(tmp_path / "r")
    assert [(c.status, c.attempts) for c in run.cells] == [("ok", 1)] * 6
    assert run.problems == ()


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    start(tmp_path, ("toy:uniform",))
    (tmp_path / "r" / "cells").rmdir()
    (tmp_path / "r" / "cells").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write below"):
        go(tmp_path)


def test_ten_kills_lose_nothing_and_count_nothing_twice(tmp_path: Path) -> None:
    """``make torture`` kills two hundred times, with whole workers."""
    script = Path(__file__).with_name("torture.py")
    bounds = {"TORTURE_KILLS": "10", "TORTURE_SECONDS": "60", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script, "--quick"], env=os.environ | bounds, capture_output=True, check=False
    )
    assert (done.returncode, json.loads(done.stdout)["wrong"]) == (0, []), done.stderr
