"""Did the system kill a process for lack of memory? Its own counters say so; where they are silent, the size of the process tells.

Sources: ``memory.events`` (cgroup v2), ``memory.oom_control`` (v1), ``/proc/vmstat``, each with a line ``oom_kill N``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

#: A process below this share of the memory was hardly the reason why there was none.
_SMALL = 0.5


def oom_kills() -> int | None:
    """Kills for lack of memory so far, over all counters that can be read; None where none can."""
    found = [_count(path) for path in _counters()]
    known = [count for count in found if count is not None]
    return sum(known) if known else None


def why_killed(before: int | None, peak_bytes: int) -> str:
    """Why a process that got SIGKILL counts as out of memory, or "" where nothing speaks for it.

    ``before`` is what ``oom_kills`` said before it started, ``peak_bytes`` the most that it held.
    """
    now = oom_kills()
    if before is not None and now is not None and now > before:
        return "the system counted a kill for lack of memory"
    large = peak_bytes >= _SMALL * memory_bytes()
    if large or now is None:
        return "probable: the system killed the process (SIGKILL)"
    return ""


def memory_bytes() -> int:
    """Memory of this machine, or of the control group where that has less."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder, name in ((_group(""), "memory.max"), (_group("memory"), "memory.limit_in_bytes")):
        try:
            sizes.append(int((folder / name).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(sizes)


def _counters() -> list[Path]:
    return [_group("") / "memory.events", _group("memory") / "memory.oom_control", Path("/proc/vmstat")]


def _group(controller: str) -> Path:
    """The folder of this process's control group; "" is the unified hierarchy."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller in names.split(","):
            return Path("/sys/fs/cgroup", controller, path.lstrip("/"))
    return Path("/sys/fs/cgroup", controller)


def _count(path: Path) -> int | None:
    try:
        found = re.search(r"^oom_kill (\d+)$", path.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return int(found[1]) if found else None
