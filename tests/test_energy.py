"""Is energy the difference of a counter, over long enough, divided by what was done?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from false_clock import FalseClock, Timed

from bdh_bench.measure import energy
from bdh_bench.measure.energy import Counter
from bdh_bench.tasks import latency
from bdh_bench.types import Measurement, TaskContext

_IDLE_W, _STEP_J, _END_J = 3.0, 0.5, 100.0


class _Meter:
    """Joules of a machine that draws 3 W and spends 0.5 J more for every step; it starts again from 0 at 100 J."""

    def __init__(self, clock: FalseClock, start_j: float = 0.0) -> None:
        self.clock, self.began, self.extra = clock, clock.now, start_j

    def read(self) -> float:
        return ((self.clock.now - self.began) * 1e-9 * _IDLE_W + self.extra) % _END_J

    def step(self) -> int:
        self.clock.work(0.25)
        self.extra += _STEP_J
        return 1


@pytest.mark.parametrize("start_j", [0.0, 90.0])
def test_joules_per_call_over_ten_seconds_with_idle_power_beside(start_j: float) -> None:
    """Also where the counter passes its end on the way."""
    clock = FalseClock()
    meter = _Meter(clock, start_j)
    found = energy.spent(meter.step, [Counter("meter", meter.read, _END_J)], clock.clocks())
    assert (found.calls, found.seconds) == (40, pytest.approx(10.0))
    assert found.joules == pytest.approx(10 * _IDLE_W + 40 * _STEP_J)
    assert found.per_call_j == pytest.approx(found.joules / 40)
    assert found.idle_w == pytest.approx(_IDLE_W)
    assert found.source == "meter"


def _zone(root: Path, name: str, microjoules: str, end: str = "262143328850") -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "energy_uj").write_text(microjoules)
    (folder / "max_energy_range_uj").write_text(end)
    return folder


def test_packages_are_added_up_and_their_parts_are_not(tmp_path: Path) -> None:
    first = _zone(tmp_path, "intel-rapl:0", "5000000\n")
    _zone(tmp_path, "intel-rapl:1", "7000000\n", "8000000\n")
    _zone(tmp_path, "intel-rapl:0:0", "4000000\n")  # the cores of package 0
    _zone(tmp_path, "intel-rapl-mmio:0", "5000000\n")  # the same package, read in another way
    _zone(tmp_path, "intel-rapl:2", "a secret")
    found = energy.counters("cpu", tmp_path)
    assert [c.name for c in found] == ["RAPL intel-rapl:0", "RAPL intel-rapl:1"]
    before = [c.read() for c in found]
    assert before == pytest.approx([5.0, 7.0])
    (first / "energy_uj").write_text("6500000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("250000\n")  # past its end of 8 J
    assert [c.since(b) for c, b in zip(found, before, strict=True)] == pytest.approx([1.5, 1.25])


def test_without_a_counter_there_is_none(tmp_path: Path) -> None:
    assert energy.counters("cpu", tmp_path) == ()
    assert "powercap" in energy.why_none("cpu")
    assert "nvidia-ml-py" in energy.why_none("cuda")


def _row(clock: FalseClock, config: latency.Config, facts: dict[str, Any]) -> Measurement:
    context = TaskContext(0, 16, (16,), 256, (), "random", False, lambda *_: None, note=facts.__setitem__)
    found = latency.timed_with(clock.clocks(), Timed(clock, 1e-2, 0.05), config, context)
    return next(m for m in found if isinstance(m, Measurement) and m.metric == "energy_per_token_j")


def test_the_task_has_joules_per_token_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, facts = FalseClock(), dict[str, Any]()
    config = latency.Config("full", steps=8, batch_size=4)
    monkeypatch.setattr(energy, "counters", lambda device: ())
    row = _row(clock, config, facts)
    assert (row.value, row.status) == (None, "unsupported")
    assert "powercap" in row.reason
    meter = _Meter(clock)
    monkeypatch.setattr(energy, "counters", lambda device: (Counter("meter", meter.read, _END_J),))
    quick = _row(clock, replace(config, budget="quick"), facts)
    assert (quick.value, quick.status) == (None, "unsupported")
    assert "10 s" in quick.reason
    found = _row(clock, config, facts)
    assert found.value == pytest.approx(_IDLE_W * 0.05 / 4)  # watts × seconds of a step, four streams
    assert facts["timing"]["energy"]["idle_w"] == pytest.approx(_IDLE_W)
