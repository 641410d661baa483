"""What time is it? The one clock of this package: monotonic, nanosecond resolution, in seconds."""

from __future__ import annotations

import time


def now_s() -> float:
    """Seconds on a monotonic clock; only differences have a meaning."""
    return time.perf_counter_ns() * 1e-9
