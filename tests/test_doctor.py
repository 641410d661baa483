"""Does the examination of a machine find what is wrong with it, and grade its noise by the numbers?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bdh_bench.measure import host, noise, processor
from bdh_bench.runner import doctor

Cli = Callable[..., tuple[int, str, str]]


def _seconds(spread: float, interrupted: float = 0.0) -> list[float]:
    """A thousand repeats around 1 ms whose quartiles lie ``spread`` apart; a share of them takes twice as long."""
    slow = round(1000 * interrupted)
    steady = [1e-3 * (1 + spread * (2 * i / (999 - slow) - 1)) for i in range(1000 - slow)]
    return [*steady, *[2e-3] * slow]


@pytest.mark.parametrize(
    ("spread", "interrupted", "grade"),
    [(0.01, 0.0, "quiet"), (0.05, 0.0, "usable"), (0.2, 0.0, "noisy"), (0.0, 0.05, "usable"), (0.0, 0.2, "noisy")],
)
def test_the_grade_follows_from_spread_and_interruptions(spread: float, interrupted: float, grade: str) -> None:
    found = noise.steadiness(_seconds(spread, interrupted))
    assert found.grade == grade
    assert found.interrupted == pytest.approx(interrupted, abs=1e-3)
    if not interrupted:
        assert found.spread == pytest.approx(spread, rel=1e-2)


def test_the_grade_of_a_machine_is_the_worse_of_both() -> None:
    quiet, noisy = noise.steadiness(_seconds(0.0)), noise.steadiness(_seconds(0.5))
    assert noise.Noise(quiet, noisy).grade == noise.Noise(noisy, quiet).grade == "noisy"
    assert noise.Noise(quiet, quiet).grade == "quiet"


def test_few_repeats_have_no_grade() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        noise.steadiness([1.0, 1.0, 1.0])


def test_noise_of_this_machine_is_measured_on_real_work() -> None:
    found = noise.measure_noise(0.05)
    assert found.sleep.median_s >= noise.SLEEP_S
    assert found.arithmetic.median_s > 0
    assert found.arithmetic.repeats == found.sleep.repeats >= 4


def _write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


def test_the_processor_is_read_from_the_system(tmp_path: Path) -> None:
    nothing = processor.processor_facts(tmp_path)
    assert {nothing[name] for name in ("governor", "turbo", "smt", "quota_cores")} == {None}
    cpu = "sys/devices/system/cpu"
    _write(tmp_path, f"{cpu}/cpu0/cpufreq/scaling_governor", "powersave")
    _write(tmp_path, f"{cpu}/intel_pstate/no_turbo", "0")
    _write(tmp_path, f"{cpu}/smt/active", "1")
    _write(tmp_path, "sys/fs/cgroup/cpu.max", "150000 100000")
    known = processor.processor_facts(tmp_path)
    assert (known["governor"], known["turbo"], known["smt"], known["quota_cores"]) == ("powersave", True, True, 1.5)
    _write(tmp_path, "sys/fs/cgroup/cpu.max", "max 100000")
    assert processor.quota_cores(tmp_path) is None


def test_the_quota_of_the_first_version_of_control_groups_is_read_too(tmp_path: Path) -> None:
    _write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "50000")
    _write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert processor.quota_cores(tmp_path) == 0.5
    _write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1")
    assert processor.quota_cores(tmp_path) is None


def test_what_a_control_group_leaves_of_the_memory(tmp_path: Path) -> None:
    assert host.group_memory_left(tmp_path) is None
    _write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", str(2**63 - 4096))
    _write(tmp_path, "sys/fs/cgroup/memory/memory.usage_in_bytes", "5")
    assert host.group_memory_left(tmp_path) is None
    _write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "3000")
    assert host.group_memory_left(tmp_path) == 2995
    _write(tmp_path, "sys/fs/cgroup/memory.max", "max")
    _write(tmp_path, "sys/fs/cgroup/memory.current", "7")
    assert host.group_memory_left(tmp_path) == 2995
    _write(tmp_path, "sys/fs/cgroup/memory.max", "1000")
    assert host.group_memory_left(tmp_path) == 993


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Noise by decree instead of two seconds of measuring."""

    def decree(spread: float) -> None:
        found = noise.steadiness(_seconds(spread))
        monkeypatch.setattr(noise, "measure_noise", lambda duration_s: noise.Noise(found, found))

    decree(0.0)
    return decree


def _named(name: str) -> doctor.Finding:
    return next(f for f in doctor.examine().findings if f.name == name)


def test_a_noisy_machine_is_unfit_and_says_so_only_where_asked(cli: Cli, quick: Callable[[float], None]) -> None:
    quick(0.5)
    code, out, _ = cli("doctor", "--json")
    answer = json.loads(out)
    assert (code, answer["schema"], answer["data"]["fit"]) == (0, "bdh-bench/doctor/1", False)
    assert answer["data"]["noise"]["grade"] == "noisy"
    assert cli("doctor", "--strict-host")[0] == 7
    quick(0.0)
    code, out, _ = cli("doctor", "--strict-host")
    assert code == 0
    assert "quiet" in out


def test_a_cache_that_cannot_be_written_is_found(quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _named("cache folder").verdict == doctor.FINE
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("BDH_BENCH_CACHE", str(tmp_path / "file" / "cache"))
    found = _named("cache folder")
    assert found.verdict == doctor.UNFIT
    assert "BDH_BENCH_CACHE" in found.do


def test_what_is_missing_comes_with_its_command(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy", "no-such-core>=1", "no-such-extra<2; extra == 'hf'", "no-such-tool; extra == 'dev'"]
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    found = {f.name: f for f in doctor.examine().findings}
    assert (found["no-such-core"].verdict, found["no-such-core"].do) == (doctor.MISSING, "pip install no-such-core")
    assert (found["extra hf"].verdict, found["extra hf"].do) == (doctor.MISSING, "pip install 'bdh-bench[hf]'")
    assert "numpy" not in found
    assert "extra dev" not in found


def test_little_memory_is_noted_and_hardly_any_is_unfit(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    for available, verdict in ((2**35, doctor.FINE), (2**31, doctor.NOTE), (2**28, doctor.UNFIT)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda a=available: SimpleNamespace(available=a, total=2**36))
        assert _named("memory").verdict == verdict
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**35, total=2**36))
    monkeypatch.setattr(host, "group_memory_left", lambda: 2**28)
    assert _named("memory").verdict == doctor.UNFIT


def test_a_governor_that_saves_power_a_quota_and_a_load_are_noted(quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    facts: dict[str, Any] = {"governor": "powersave", "turbo": True, "smt": True, "quota_cores": 1.5}
    facts |= {"usable_cores": 4, "load_per_core": 0.9}
    monkeypatch.setattr(processor, "processor_facts", lambda: facts)
    found = {f.name: f for f in doctor.examine().findings}
    assert "--threads 1" in found["processor quota"].do
    for name in ("processor quota", "governor", "turbo", "SMT", "load of a minute"):
        assert found[name].verdict == doctor.NOTE, name


def test_every_check_says_what_to_do_about_what_is_not_fine(quick: Any) -> None:
    def all_findings() -> Iterator[doctor.Finding]:
        yield from doctor.examine().findings

    for finding in all_findings():
        assert finding.verdict == doctor.FINE or finding.do or finding.name == "turbo", finding
