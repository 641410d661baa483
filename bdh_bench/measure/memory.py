"""How many bytes does a process hold, and how many at its worst moment? High-water marks kept by the kernel, never a sampler.

A sampler misses short peaks; the kernel's own mark (VmHWM) does not, and it can be set back between phases by writing ``5`` to
``/proc/self/clear_refs``. Where that is not possible the mark since the start of the process is reported and the caller is told.
Setting it back also lowers what ``getrusage`` and ``wait4`` tell of the process later. On CUDA the allocator keeps the marks.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path
from typing import Protocol


class Marks(Protocol):
    """The marks of one kind of memory: what is held now, and the most that was held since ``reset``."""

    remark: str

    def held(self) -> int | None:
        """Bytes in use now, or None where the system does not say."""
        ...

    def reset(self) -> bool:
        """Set the mark back to what is held now; False where that is not allowed."""
        ...

    def peak(self) -> int:
        """The most bytes in use since the last reset."""
        ...

    def footprint(self) -> int:
        """The same with what the allocator kept in reserve: what must fit the machine."""
        ...

    def unused(self, before: int | None) -> int | None:
        """Bytes kept that nothing uses; ``before`` is what was held before the work whose results are gone."""
        ...

    def settle(self) -> None:
        """Give back what is free, so that a peak is not hidden by memory freed before."""
        ...


class Resident:
    """Memory of this process in RAM."""

    remark = ""

    def held(self) -> int | None:
        return resident_bytes()

    def reset(self) -> bool:
        return reset_peak()

    def peak(self) -> int:
        return peak_resident_bytes()

    def footprint(self) -> int:
        return peak_resident_bytes()

    def unused(self, before: int | None) -> int | None:
        now = resident_bytes()
        return None if now is None or before is None else now - before

    def settle(self) -> None:
        settle()


class OnCuda:
    """Memory of torch's allocator on the current CUDA device. Written from the documentation; it has never run."""

    remark = "without the context of the device, which only its driver counts; this path has never been tried"

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda

    def held(self) -> int | None:
        return self._cuda.memory_allocated()

    def reset(self) -> bool:
        self._cuda.reset_peak_memory_stats()
        return True

    def peak(self) -> int:
        return self._cuda.max_memory_allocated()

    def footprint(self) -> int:
        return self._cuda.max_memory_reserved()

    def unused(self, before: int | None) -> int | None:
        return self._cuda.memory_reserved() - self._cuda.memory_allocated()

    def settle(self) -> None:
        gc.collect()
        self._cuda.synchronize()
        self._cuda.empty_cache()


def marks_of(device: str) -> Marks:
    """The marks of this kind of device ("cpu", "cuda")."""
    return OnCuda() if device == "cuda" else Resident()


def resident_bytes(process: int | str = "self") -> int | None:
    """Resident memory now, or None where the system does not say."""
    return _field("VmRSS", process)


def peak_resident_bytes() -> int:
    """High-water mark of resident memory since the last reset (or since the process began)."""
    mark = _field("VmHWM")
    if mark is not None:
        return mark
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_of(process: int) -> int | None:
    """The mark of another process; where the system keeps none, what it holds now; None once it is gone."""
    mark = _field("VmHWM", process)
    if mark is not None or Path("/proc/self/status").exists():
        return mark
    import psutil

    try:
        return int(psutil.Process(process).memory_info().rss)
    except psutil.Error:
        return None


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
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # absent in musl
    if trim is not None:
        trim(0)


def _field(name: str, process: int | str = "self") -> int | None:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None
