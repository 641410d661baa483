"""What may change the speed of this machine's processor while something is measured? Read from the system; None where it does not say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_CPU = Path("sys/devices/system/cpu")


def processor_facts(root: Path = Path("/")) -> dict[str, Any]:
    """Governor, turbo, SMT, quota in cores, load per core this process may use; ``root`` is where /sys and /proc are."""
    return {
        "governor": _text(root / _CPU / "cpu0/cpufreq/scaling_governor"),
        "turbo": _turbo(root),
        "smt": _flag(root / _CPU / "smt/active"),
        "quota_cores": quota_cores(root),
        "usable_cores": usable_cores(),
        "load_per_core": _load(),
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota_cores(root: Path = Path("/")) -> float | None:
    """Processor time that the control group allows, in cores; None without a limit. Both versions of control groups are read."""
    words = (_text(root / "sys/fs/cgroup/cpu.max") or "").split()  # "QUOTA PERIOD", or "max PERIOD"
    if len(words) == 2:
        return None if words[0] == "max" else int(words[0]) / int(words[1])
    first = root / "sys/fs/cgroup/cpu"
    quota, period = _text(first / "cpu.cfs_quota_us"), _text(first / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def _turbo(root: Path) -> bool | None:
    stopped = _flag(root / _CPU / "intel_pstate/no_turbo")
    return _flag(root / _CPU / "cpufreq/boost") if stopped is None else not stopped


def _flag(path: Path) -> bool | None:
    text = _text(path)
    return None if text is None else text == "1"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None


def _load() -> float | None:
    """Of the last minute."""
    return round(os.getloadavg()[0] / usable_cores(), 2) if hasattr(os, "getloadavg") else None
