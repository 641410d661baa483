"""What time is it, and what has this process had of it? The one place of this package that reads a clock.

``Clocks`` bundles them, so that a test can bring false ones and know the answer beforehand.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


def now_s() -> float:
    """Seconds on a monotonic clock; only differences have a meaning."""
    return time.perf_counter_ns() * 1e-9


class Usage(NamedTuple):
    """What a process has used since it began. Only differences have a meaning.

    process_ns   processor time of all its threads
    thread_ns    of the calling thread alone
    involuntary  times that one of its threads was put off a core
    voluntary    times that the calling thread gave its core up to wait for something
    """

    process_ns: int
    thread_ns: int
    involuntary: int
    voluntary: int

    def since(self, before: Usage) -> Usage:
        """What was used in between."""
        return Usage(*(now - then for now, then in zip(self, before, strict=True)))


def usage() -> Usage:
    """Of this process and this thread."""
    whole = resource.getrusage(resource.RUSAGE_SELF)
    own = resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF))  # Linux only
    return Usage(time.process_time_ns(), time.thread_time_ns(), whole.ru_nivcsw, own.ru_nvcsw)


@dataclass(frozen=True)
class Clocks:
    """Monotonic nanoseconds, what the process has used, and two ways to wait: ``settle`` until the device has done what it was told."""

    now_ns: Callable[[], int] = time.perf_counter_ns
    usage: Callable[[], Usage] = usage
    settle: Callable[[], object] = lambda: None
    sleep: Callable[[float], object] = time.sleep
