"""What machine is this? Facts by an allow-list, stored beside every run; no names of hosts or users."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bdh_bench.measure.placement import allowed, physical_cores
from bdh_bench.measure.processor import processor_facts

_NO_LIMIT = 2**60  # the first version of control groups writes a number close to 2⁶³
_PACKAGES = (
    "bdh-bench",
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "pandas",
    "matplotlib",
    "plotly",
    "mamba-ssm",
)


def environment() -> dict[str, Any]:
    """Hardware and versions, without importing torch."""
    import psutil

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "physical_cores": len(physical_cores(allowed())) or None,
        "processor": processor_facts(),
        "native_bfloat16": native_bfloat16(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "executable": "python" + ".".join(map(str, sys.version_info[:2])),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def _cpu_flags() -> tuple[str, frozenset[str]]:
    name, flags = platform.processor() or "unknown", frozenset[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return name, flags
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            flags = frozenset(value.split())
            break
    return name, flags


def _cpu_name() -> str:
    return _cpu_flags()[0]


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX or AVX-512)."""
    return bool({"amx_bf16", "avx512_bf16"} & _cpu_flags()[1])


def fingerprint(known: Mapping[str, Any]) -> str:
    """A short name for the machine that ``environment`` described: processor, cores, memory and system, nobody's host name."""
    parts = [str(known.get(name)) for name in ("platform", "cpu", "cores", "memory_bytes")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def group_memory_left(root: Path = Path("/")) -> int | None:
    """Bytes that the control group of this process may still take; None without a limit. Both versions of control groups are read."""
    group = root / "sys/fs/cgroup"
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most = (group / limit).read_text(encoding="ascii").strip()
            held = (group / used).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if most.isdigit() and held.isdigit() and int(most) < _NO_LIMIT:
            return max(0, int(most) - int(held))
    return None
