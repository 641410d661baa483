"""Are workers put on whole physical cores of those that may be used, and is nothing else disturbed by it?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bdh_bench.measure import placement
from bdh_bench.measure.host import environment
from bdh_bench.measure.placement import Placement, allowed, physical_cores, pin, place, settled, waiting_on


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Two packages of two cores of two threads: logical processors 0 to 7, threads of a core four apart."""
    for number in range(8):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        core = number % 4
        (folder / "physical_package_id").write_text(f"{core // 2}\n")
        (folder / "core_id").write_text(f"{core % 2}\n")  # numbered anew in every package
    return tmp_path


def test_threads_of_one_core_are_one_core(machine: Path, tmp_path: Path) -> None:
    assert physical_cores(range(8), machine) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert physical_cores({5, 1, 2}, machine) == [(1, 5), (2,)]
    assert physical_cores({3, 1}, tmp_path / "silent") == [(1,), (3,)]


@pytest.mark.parametrize(
    ("threads", "usable", "expected"),
    [
        (1, range(8), Placement((3,), (0, 4, 1, 5, 2, 6))),
        (2, range(8), Placement((2, 3), (0, 4, 1, 5))),
        (4, range(8), Placement((0, 1, 2, 3), (4, 5, 6, 7), True)),
        (1, {1, 5}, Placement((1,), (5,), True)),
        (2, {4, 2, 6}, Placement((2, 4), (6,), True)),
    ],
)
def test_a_worker_gets_distinct_cores_and_its_parent_others(
    threads: int, usable: set[int], expected: Placement, machine: Path
) -> None:
    assert place(threads, usable, machine) == expected
    assert set(expected.worker) <= set(usable)


def test_where_there_are_too_few_cores_nothing_is_pinned_and_the_reason_is_kept(machine: Path) -> None:
    for threads, usable, why in (
        (5, range(8), "4 physical cores"),
        (0, range(8), "no --threads"),
        (1, (), "does not pin"),
    ):
        found = place(threads, usable, machine)
        assert found.worker == ()
        assert found.parent == tuple(usable)
        assert why in found.reason


def test_a_refused_pin_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("not here")

    before = allowed()
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    assert not pin([0])
    host = settled(Placement((0,), (1,)).as_json())
    assert host["placement"]["pinned"] is False
    assert host["placement"]["worker"] == ()
    assert "pinned" in host["placement"]["reason"]
    with waiting_on([0]):
        assert allowed() == before


def test_a_parent_is_afterwards_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(allowed())
    with waiting_on(before[:1]):
        assert sorted(allowed()) == before[:1]
    assert sorted(allowed()) == before
    with pytest.raises(ZeroDivisionError), waiting_on(before[:1]):
        _ = 1 // 0
    assert sorted(allowed()) == before
    moves: list[object] = []
    monkeypatch.setattr(placement, "pin", lambda to: moves.append(sorted(to)))
    with waiting_on([7]):
        moves.append("waits")
    assert moves == [[7], "waits", before]


def test_what_a_row_keeps_of_its_host() -> None:
    host = settled(place(1).as_json())
    assert set(host) >= {"placement", "physical_cores", "governor", "turbo", "smt", "quota_cores", "load_per_core"}
    if host["placement"]["pinned"]:
        assert len(host["placement"]["worker"]) == 1
        assert host["physical_cores"] == 1
        pin(allowed())
    assert settled(None)["placement"]["pinned"] is False
    assert {"physical_cores", "processor", "load_average"} <= set(environment())
