"""Who is working on this round of a cell? A file created exclusively; stale at once where its process is gone on the same boot."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from bdh_bench.errors import StoreError


def boot_id() -> str:
    """A name for this boot of this machine, or "" where the system gives none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


@contextlib.contextmanager
def lease(run_folder: Path, cell: str, round_: int) -> Iterator[None]:
    """Hold the round while the block runs. Raises StoreError where a live process holds it."""
    path = run_folder / "leases" / f"{cell[:16]}-{round_}"
    text = json.dumps({"pid": os.getpid(), "boot": boot_id()})
    try:
        _create(path, text)
    except FileExistsError:
        if not _stale(path):
            raise StoreError(
                f"cell {cell[:12]} of {run_folder.name} is being measured by another process", "wait for it, or stop it"
            ) from None
        path.unlink(missing_ok=True)
        _create(path, text)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _create(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="ascii") as file:
            file.write(text)
    except FileExistsError:
        raise
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}", "check space and permissions") from error


def _stale(path: Path) -> bool:
    try:
        holder = json.loads(path.read_text(encoding="ascii"))
        pid, boot = int(holder["pid"]), str(holder["boot"])
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError):
        return True  # torn while it was written: its writer did not live to use it
    if boot != boot_id():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return pid == os.getpid()
