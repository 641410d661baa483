"""How many bytes does a process hold, and how many at its worst moment? High-water marks kept by the kernel, never a sampler.

A sampler misses short peaks; the kernel's own mark (VmHWM) does not, and it can be set back between phases by writing ``5`` to
``/proc/self/clear_refs``. Where that is not possible the mark since the start of the process is reported and the caller is told.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int | None:
    """Resident memory now, or None where the system does not say."""
    return _field("VmRSS")


def peak_resident_bytes() -> int:
    """High-water mark of resident memory since the last reset (or since the process began)."""
    mark = _field("VmHWM")
    if mark is not None:
        return mark
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak() -> bool:
    """Set the high-water mark back to what is resident now; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def settle() -> None:
    """Collect garbage and give freed heap pages back, so that a peak is not hidden by memory freed before."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _field(name: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None
