"""On which cores does a measuring process run, and where does its parent wait?

With ``--threads k`` a worker gets k distinct physical cores to itself, as far as this process may use them: the last ones, since systems
put their own work on the first. Its parent waits on a core that shares nothing with them, where there is one. Cores are never taken that
this process was not given; where a system does not allow pinning, nothing is pinned and the facts say why. Two runs at once on one
machine would choose the same cores; noise marks show it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bdh_bench.measure.processor import processor_facts

_CPU = Path("sys/devices/system/cpu")


@dataclass(frozen=True)
class Placement:
    """Logical processors of the worker (none: it is not pinned, ``reason`` says why) and of its parent.

    shared   the parent waits on a physical core of the worker: there is no other
    """

    worker: tuple[int, ...]
    parent: tuple[int, ...]
    shared: bool = False
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """JSON values, for ``settled``."""
        return asdict(self)


def allowed() -> frozenset[int]:
    """The logical processors that this process may use; none where the system does not say."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def physical_cores(usable: Collection[int], root: Path = Path("/")) -> list[tuple[int, ...]]:
    """The usable logical processors, by the physical core that they are threads of; each by itself where the system does not say."""
    cores: dict[tuple[str, str], list[int]] = {}
    for number in sorted(usable):
        topology = root / _CPU / f"cpu{number}" / "topology"
        try:
            key = tuple(
                (topology / name).read_text(encoding="ascii").strip() for name in ("physical_package_id", "core_id")
            )
        except (OSError, ValueError):
            key = ("?", str(number))
        cores.setdefault((key[0], key[1]), []).append(number)
    return [tuple(threads) for threads in cores.values()]


def place(threads: int, usable: Collection[int] | None = None, root: Path = Path("/")) -> Placement:
    """Where a worker of so many threads and its parent go. 0 threads: the user did not say, and nothing is pinned."""
    usable = allowed() if usable is None else usable
    everything = tuple(sorted(usable))
    if not threads:
        return Placement((), everything, reason="no --threads")
    if not usable:
        return Placement((), everything, reason="this system does not pin processes")
    cores = physical_cores(usable, root)
    if len(cores) < threads:
        return Placement((), everything, reason=f"{threads} threads on {len(cores)} physical cores")
    taken = cores[len(cores) - threads :]
    others = tuple(number for core in cores[: len(cores) - threads] for number in core)
    worker = tuple(core[0] for core in taken)
    rest = tuple(number for number in everything if number not in worker)
    return Placement(worker, others or rest or everything, not others)


def pin(processors: Collection[int]) -> bool:
    """Keep this process (its threads to come, too) on these logical processors; False where the system does not allow it."""
    if not processors or not hasattr(os, "sched_setaffinity"):
        return False
    try:
        os.sched_setaffinity(0, processors)
    except OSError:
        return False
    return True


def settled(asked: Mapping[str, Any] | None) -> dict[str, Any]:
    """Go where a placement (as JSON) says, before anything starts threads; what a row keeps of it and of the processor's state now."""
    where = Placement(**asked) if asked else Placement((), (), reason="nobody said where")
    pinned = pin(where.worker)
    if where.worker and not pinned:
        where = replace(where, worker=(), reason="this system does not let a process be pinned")
    cores = len(physical_cores(allowed()))
    return {"placement": {**asdict(where), "pinned": pinned}, "physical_cores": cores, **processor_facts()}


@contextmanager
def waiting_on(processors: Collection[int]) -> Iterator[None]:
    """This process on these processors, and where it was before afterwards."""
    before = allowed()
    pin(processors)
    try:
        yield
    finally:
        pin(before)
