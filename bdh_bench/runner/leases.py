"""Who is working on this round of a cell? A file with a heartbeat; several parents on one run share its rounds through these files.

A lease is *stale* at once where its process is gone from the same boot of the same machine, and everywhere after three missed
heartbeats. Missed is what an observer has seen to be missing on its own monotonic clock, so neither a clock that jumps nor two
machines that disagree about the time make a lease stale. Taking a lease, giving it back and taking over a stale one happen while
holding one lock of the folder, which the system frees when its holder dies: of two that find the same stale lease one gets it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from bdh_bench.errors import StoreError
from bdh_bench.measure.clock import now_s

HEARTBEAT_S = 10.0
MISSED = 3


class Leases:
    """The leases of one run, as one parent sees them. ``heartbeat_s`` is shorter in tests only."""

    def __init__(self, run_folder: Path, heartbeat_s: float = HEARTBEAT_S) -> None:
        self.folder, self.heartbeat_s = run_folder / "leases", heartbeat_s
        self._seen: dict[str, tuple[object, float]] = {}  # name → what it looked like, and since when

    @contextlib.contextmanager
    def hold(self, cell: str, round_: int) -> Iterator[bool]:
        """Whether the round is ours while the block runs; False where another process is working on it. Raises StoreError."""
        name = f"{cell[:16]}-{round_}"
        mine = json.dumps({**_who(), "thread": threading.get_ident()})
        with self._guard():
            taken = self._take(self.folder / name, mine)
        if not taken:
            yield False
            return
        stop = threading.Event()
        beating = threading.Thread(target=self._beat, args=(self.folder / name, mine, stop), daemon=True)
        beating.start()
        try:
            yield True
        finally:
            stop.set()
            beating.join()
            with self._guard(), contextlib.suppress(FileNotFoundError):
                if _text(self.folder / name) == mine:  # it may have been taken over
                    (self.folder / name).unlink()

    def busy(self) -> frozenset[str]:
        """Rounds (KEY-ROUND) that somebody may be working on."""
        gone = {path.name for path in self.stale()}
        return frozenset(path.name for path in self.folder.glob("[!.]*") if path.name not in gone)

    def stale(self) -> list[Path]:
        """Leases whose holder is known to be gone; of other machines none is, as one look does not tell."""
        with self._guard():
            return [path for path in sorted(self.folder.glob("[!.]*")) if _gone(_text(path))]

    def clear(self, keep: Callable[[str, str], object]) -> list[tuple[str, str]]:
        """Delete the leases whose holder is known to be gone, each after ``keep(name, text)``; return them."""
        cleared = []
        for path in self.stale():
            with self._guard():
                text = _text(path)
                if path.exists() and _gone(text):
                    keep(path.name, text)
                    path.unlink()
                    cleared.append((path.name, text))
        return cleared

    def _take(self, path: Path, mine: str) -> bool:
        if path.exists():
            if not (_gone(_text(path)) or self._missed(path)):
                return False
            path.unlink()
        try:
            with path.open("x", encoding="ascii") as file:
                file.write(mine)
        except FileExistsError:
            return False
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror}", "check space and permissions") from error
        self._seen.pop(path.name, None)
        return True

    def _missed(self, path: Path) -> bool:
        """Whether the lease has looked the same for three heartbeats of our own clock."""
        looks = (_text(path), path.stat().st_mtime_ns)
        before, since = self._seen.get(path.name, (None, 0.0))
        if before != looks:
            self._seen[path.name] = (looks, now_s())
            return False
        return now_s() - since > MISSED * self.heartbeat_s

    def _beat(self, path: Path, mine: str, stop: threading.Event) -> None:
        while not stop.wait(self.heartbeat_s):
            with contextlib.suppress(OSError, StoreError), self._guard():
                if _text(path) == mine:
                    os.utime(path)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """One process at a time. Where the system has no such locks, creating files exclusively has to do."""
        try:
            import fcntl
        except ImportError:
            yield
            return
        try:
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)  # the folder itself: no file is left behind
        except OSError as error:
            raise StoreError(f"cannot use {self.folder}: {error.strerror}", "check permissions") from error
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _who() -> dict[str, Any]:
    return {"host": host(), "pid": os.getpid(), "born": _born(os.getpid()), "boot": boot_id()}


def _gone(text: str) -> bool:
    """Whether the holder is known to have ended: a process of this machine and boot that is no more, or one that died while writing."""
    try:
        holder = json.loads(text)
        where, pid, born = (str(holder["host"]), str(holder["boot"])), int(holder["pid"]), holder["born"]
    except (ValueError, KeyError, TypeError):
        return True  # torn: it was written under the lock, so its writer died
    if where[0] != host():
        return False
    if where[1] != boot_id():
        return True
    return not process_lives(pid) or bool(_born(pid) != born)  # the number of a process is used again


def process_lives(pid: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _born(pid: int) -> int | None:
    """When the process started, in ticks since boot; None where the system does not say, and for a zombie 0."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return 0 if fields[0] == "Z" else int(fields[19])


@cache
def host() -> str:
    """A name for this machine, or container, that does not tell its name."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:16]


@cache
def boot_id() -> str:
    """A name for this boot of this machine, or "" where the system gives none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
