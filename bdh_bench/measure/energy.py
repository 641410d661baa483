"""How much energy does a token cost? The difference of a counter that the hardware keeps, over at least ten seconds; None without one.

    RAPL   Linux, /sys/class/powercap: each processor package, in microjoules, wrapping round at a stated end; often readable by root alone
    NVML   an NVIDIA device's total since its driver was loaded, in millijoules (nvidia-ml-py). Never run: no device was there

The counters see the whole package or device, other programs too, so the power of the idle machine is taken beside it and nothing is
subtracted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from bdh_bench.measure.clock import Clocks

LEAST_S, IDLE_S = 10.0, 2.0
_POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """``read`` gives joules; it starts again from 0 at ``end_j`` (None: never)."""

    name: str
    read: Callable[[], float]
    end_j: float | None = None

    def since(self, before: float) -> float:
        """Joules since ``before``; one turn past the end is seen, more are not (at 100 W they are half an hour apart)."""
        used = self.read() - before
        return used + self.end_j if used < 0 and self.end_j is not None else used


@dataclass(frozen=True)
class Energy:
    """Joules of some calls, over so many seconds, with the power of the idle machine (watts) beside them."""

    joules: float
    seconds: float
    calls: int
    idle_w: float
    source: str

    @property
    def per_call_j(self) -> float:
        return self.joules / self.calls


def counters(device: str, root: Path = _POWERCAP) -> tuple[Counter, ...]:
    """Those of the device that runs the model; none where it has none that may be read."""
    return _nvml(device) if device.startswith("cuda") else tuple(_rapl(root))


def why_none(device: str) -> str:
    """The reason for a row without a value."""
    if device.startswith("cuda"):
        return "no energy counter: nvidia-ml-py is not installed, or the device keeps none"
    return "no energy counter: this machine shows none below /sys/class/powercap that may be read"


def _rapl(root: Path) -> Sequence[Counter]:
    found = []
    for zone in sorted(root.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:  # a part of a package, counted in it already
            continue
        try:
            end = int((zone / "max_energy_range_uj").read_text(encoding="ascii")) * 1e-6
            _microjoules(zone / "energy_uj")
        except (OSError, ValueError):
            continue
        found.append(Counter(f"RAPL {zone.name}", lambda path=zone / "energy_uj": _microjoules(path), end))  # type: ignore[misc]
    return found


def _microjoules(path: Path) -> float:
    return int(path.read_text(encoding="ascii")) * 1e-6


def _nvml(device: str) -> tuple[Counter, ...]:
    try:
        pynvml = import_module("pynvml")  # what the package nvidia-ml-py installs
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(device.partition(":")[2] or 0))
        _millijoules(pynvml, handle)
    except Exception:  # not installed, no driver, or a device without the counter: each is "none"
        return ()
    return (Counter("NVML", lambda: _millijoules(pynvml, handle)),)


def _millijoules(pynvml: Any, handle: Any) -> float:
    return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) * 1e-3


def spent(
    work: Callable[[], int],
    sources: Sequence[Counter],
    clocks: Clocks,
    least_s: float = LEAST_S,
) -> Energy:
    """``work`` again and again for ``least_s`` (it returns how many calls it made), after a while of doing nothing."""
    clocks.settle()
    idle, _ = _while(lambda: int(bool(clocks.sleep(IDLE_S))), sources, clocks, IDLE_S)
    used, calls = _while(work, sources, clocks, least_s)
    return Energy(used[0], used[1], calls, idle[0] / idle[1], ", ".join(c.name for c in sources))


def _while(
    work: Callable[[], int], sources: Sequence[Counter], clocks: Clocks, least_s: float
) -> tuple[tuple[float, float], int]:
    before, began, calls = [c.read() for c in sources], clocks.now_ns(), 0
    while True:
        calls += work()
        clocks.settle()
        seconds = (clocks.now_ns() - began) * 1e-9
        if seconds >= least_s:
            break
    return (sum(c.since(then) for c, then in zip(sources, before, strict=True)), seconds), calls
