"""Is a stored run sound, and what of it is not? What is damaged is copied to ``quarantine/`` in the run; nothing sound is touched.

    line       of a shard that is damaged or torn: copied, and left where it is (readers skip it)
    manifest   a run.json that cannot be read: copied, and left
    partial    a file that a stopped writer left unfinished: copied, then deleted
    lease      of a process that is gone: copied, then deleted

Copies are named after their content, so looking twice adds nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bdh_bench.errors import StoreError, UnknownRunError
from bdh_bench.results.store import open_run, scan
from bdh_bench.runner.leases import Leases, process_lives

DAMAGE = ("line", "manifest")
_WRITER = re.compile(r"\.(\d+)\.partial\Z")


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be. ``where`` and ``copy`` are paths below the run; ``deleted`` where it is now gone."""

    kind: str
    where: str
    about: str
    copy: str
    deleted: bool = False


@dataclass(frozen=True)
class Repair:
    """What was found in one run."""

    run: str
    findings: tuple[Finding, ...]

    @property
    def damage(self) -> tuple[Finding, ...]:
        """What was stored and is damaged; what stopped writers left behind is none of it."""
        return tuple(finding for finding in self.findings if finding.kind in DAMAGE)

    @property
    def sound(self) -> bool:
        """Nothing is damaged."""
        return not self.damage

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"run": self.run, "sound": self.sound, "findings": [asdict(finding) for finding in self.findings]}


def repair(run_folder: Path) -> Repair:
    """Look through a run, copy what is damaged and clear what was left behind. Raises StoreError where that cannot be written."""
    if not (run_folder / "run.json").exists():
        raise UnknownRunError(f"no run at {run_folder} · expected a folder with run.json", "see 'bdh-bench list runs'")
    try:
        found = (*_manifest(run_folder), *_lines(run_folder), *_partials(run_folder), *_leases(run_folder))
    except OSError as error:
        raise StoreError(f"cannot write below {run_folder}: {error}", "check space and permissions") from error
    return Repair(run_folder.name, found)


def _manifest(folder: Path) -> Iterator[Finding]:
    try:
        open_run(folder)
    except StoreError as error:
        copy = _quarantine(folder, "run.json", (folder / "run.json").read_bytes())
        yield Finding("manifest", "run.json", error.message, copy)


def _lines(folder: Path) -> Iterator[Finding]:
    for shard in sorted((folder / "events").glob("*.jsonl")):
        for number, line, body in scan(shard):
            if body is None:
                about = "damaged" if line.endswith(b"\n") else "torn: its writer was stopped"
                where = f"events/{shard.name}:{number}"
                yield Finding("line", where, about, _quarantine(folder, f"{shard.name}-{number}", line))


def _partials(folder: Path) -> Iterator[Finding]:
    busy = Leases(folder).busy()
    for path in sorted(folder.rglob(".*.partial")):
        below = path.relative_to(folder)
        if path.is_symlink() or not path.is_file() or below.parts[0] == "quarantine":
            continue
        writer = _WRITER.search(path.name)
        if process_lives(int(writer[1])) if writer else _attempt_of(below) in busy:
            continue
        copy = _quarantine(folder, path.name.lstrip("."), path.read_bytes())
        path.unlink()
        yield Finding("partial", str(below), "its writer was stopped", copy, deleted=True)


def _leases(folder: Path) -> Iterator[Finding]:
    def kept(name: str, text: str) -> str:
        return _quarantine(folder, f"lease-{name}", text.encode())

    for name, text in Leases(folder).clear(kept):
        copy = kept(name, text)
        yield Finding("lease", f"leases/{name}", "its process is gone", copy, deleted=True)


def _attempt_of(below: Path) -> str:
    """cells/KEY/ROUND-ATTEMPT/… → KEY-ROUND, the name of its lease."""
    return f"{below.parts[1]}-{below.parts[2].partition('-')[0]}" if len(below.parts) > 3 else ""


def _quarantine(folder: Path, name: str, content: bytes) -> str:
    """Copy ``content`` and give the copy's path below the run."""
    place = folder / "quarantine"
    if place.is_symlink():
        raise StoreError(f"{place} is a link · expected a folder", "remove it")
    place.mkdir(exist_ok=True)
    copy = place / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"
    if not copy.exists():
        descriptor = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    return str(copy.relative_to(folder))
