"""What is on disk, and how is it written so that nothing is lost?

    runs/<run_id>/run.json                       manifest: request, cells, corpus, environment; written once, atomically
    runs/<run_id>/texts.npz                      what depends on the texts alone: classes of every scored byte; written once
    runs/<run_id>/events/<writer>.jsonl          append-only; one writer per file; one event = one line = one write + fsync
    runs/<run_id>/cells/<cell>/<attempt>/        log and arrays of one attempt; created exclusively
    runs/<run_id>/leases/<cell>                  who is working on a cell

A line holds ``v`` (schema version), ``crc`` (crc32 of the canonical body) and ``body``. The reader merges all shards, tolerates
a torn last line, skips other damaged lines and reports them. Event types: started, result, failed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bdh_bench.errors import SpecError, StoreError, UnknownRunError
from bdh_bench.types import MEASURED_STATUSES, RESULT_STATUSES, UNFINISHED_STATUSES, Measurement, Record

SCHEMA_VERSION = 1
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{p}{i}" for p in ("com", "lpt") for i in range(1, 10))}
_LARGEST_JSON_BYTES = 64 * 2**20


# -- names -----------------------------------------------------------------------------------------------------------


def new_run_id() -> str:
    """``YYYYMMDD-HHMMSS-<6 hex>`` in UTC."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def check_run_id(run_id: str) -> str:
    """The id itself. Raises SpecError where it could not be a folder name everywhere."""
    if not _RUN_ID.match(run_id) or run_id.split(".")[0].lower() in _RESERVED or run_id.endswith("."):
        raise SpecError(f"got run id {run_id!r} · expected [A-Za-z0-9][A-Za-z0-9._-]{{0,63}}, no reserved device name")
    return run_id


# -- writing ---------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing: temporary file, fsync, rename, fsync of the folder."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _fsync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StoreError(f"cannot write {path}: {error.strerror or error}", "check space and permissions") from error


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create_run(folder: Path, manifest: Mapping[str, Any], texts: Mapping[str, Any] | None = None) -> None:
    """Create ``folder`` with its run.json, and the arrays ``texts`` before it.

    Raises StoreError, leaving nothing behind, where that is not possible.
    """
    existed = folder.exists()
    try:
        (folder / "events").mkdir(parents=True, exist_ok=True)
        (folder / "cells").mkdir(exist_ok=True)
        (folder / "leases").mkdir(exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"cannot create {folder}: {error.strerror or error}", "choose a writable folder with --runs"
        ) from error
    try:
        if texts is not None:
            _write_arrays(folder / "texts.npz", texts)
        write_atomically(folder / "run.json", canonical({"v": SCHEMA_VERSION, **manifest}, indent=1))
    except StoreError:
        if not existed:
            (folder / "texts.npz").unlink(missing_ok=True)
            for name in ("events", "cells", "leases"):
                (folder / name).rmdir()
            folder.rmdir()
        raise


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    import numpy as np

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StoreError(f"cannot write {path}: {error.strerror or error}", "check space and permissions") from error


def canonical(value: Any, indent: int | None = None) -> str:
    """JSON with sorted keys, UTF-8 and no NaN or infinity."""
    separators = (",", ":") if indent is None else None
    return json.dumps(value, sort_keys=True, separators=separators, ensure_ascii=False, allow_nan=False, indent=indent)


class EventWriter:
    """The one writer of one shard. Each event is one ``write`` on an append-mode descriptor, then fsync."""

    def __init__(self, run_folder: Path, name: str) -> None:
        self.path = run_folder / "events" / f"{name}.jsonl"
        try:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError as error:
            raise StoreError(f"cannot create {self.path}: {error.strerror or error}") from error

    def write(self, type_: str, **body: Any) -> None:
        """Append one event. Raises StoreError if the line did not reach the disk whole."""
        text = canonical({"type": type_, "time": datetime.now(UTC).isoformat(timespec="seconds"), **body})
        line = f'{{"v":{SCHEMA_VERSION},"crc":{zlib.crc32(text.encode())},"body":{text}}}\n'.encode()
        try:
            if os.write(self._descriptor, line) != len(line):
                raise OSError("the disk took part of a line only")
            os.fsync(self._descriptor)
        except OSError as error:
            raise StoreError(f"cannot append to {self.path}: {error}", "check the space on the disk") from error

    def close(self) -> None:
        os.close(self._descriptor)


def measurement_body(measurement: Measurement) -> dict[str, Any]:
    """A measurement as JSON values; fields at their defaults are left out."""
    plain = Measurement(measurement.metric, None, measurement.context)
    values = asdict(measurement)
    kept = {k: v for k, v in values.items() if v != getattr(plain, k) or k in ("metric", "value", "context")}
    if "axes" in kept:
        kept["axes"] = dict(kept["axes"])
    return kept


def attempt_folder(run_folder: Path, cell: str, attempt: int) -> Path:
    """The folder of one attempt at one cell."""
    return run_folder / "cells" / cell[:16] / str(attempt)


# -- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CellOutcome:
    """What became of one planned cell: the newest final attempt, or "planned" / "interrupted" where there is none.

    ``facts`` are the worker's notes on the cell (parameters, kernels, training, environment); ``attempts`` counts starts.
    ``model_kind`` is what the model's file says it is (transformer, recurrent, control, yardstick), or "".
    """

    key: str
    model: str
    family: str
    size: str
    task: str
    seed: int
    context: int | None
    metric: str
    status: str
    reason: str
    attempt: int
    attempts: int
    facts: Mapping[str, Any]
    log: str = ""
    model_kind: str = ""

    @property
    def kind(self) -> str:
        """ok (measured, perhaps marked), skipped (a result without a value), failed, or pending."""
        if self.status in MEASURED_STATUSES:
            return "ok"
        if self.status in RESULT_STATUSES:
            return "skipped"
        if self.status in UNFINISHED_STATUSES or self.status == "planned":
            return "pending"
        return "failed"


@dataclass(frozen=True)
class Run:
    """One stored run: manifest, what became of every cell, every raw record, and what was damaged."""

    id: str
    path: Path
    manifest: Mapping[str, Any]
    cells: tuple[CellOutcome, ...]
    records: tuple[Record, ...]
    problems: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Every planned cell has a final row."""
        return all(cell.kind != "pending" for cell in self.cells)


def list_runs(root: Path) -> list[Path]:
    """Folders below ``root`` that hold a run.json, oldest first by creation time in the manifest, then by name."""
    if not root.is_dir():
        return []
    found = [path.parent for path in root.glob("*/run.json")]
    return sorted(found, key=lambda folder: (_created(folder), folder.name))


def _created(folder: Path) -> str:
    try:
        return str(_read_json(folder / "run.json").get("created", ""))
    except StoreError:
        return ""


def find_run(root: Path, name: str | None) -> Path:
    """The folder of run ``name`` below ``root`` (a path works too); the newest where name is None."""
    if name is None:
        runs = list_runs(root)
        if not runs:
            raise UnknownRunError(f"no runs in {root} · expected at least one", "start one with 'bdh-bench run'")
        return runs[-1]
    for folder in (root / name, Path(name)):
        if (folder / "run.json").is_file():
            return folder
    known = ", ".join(path.name for path in list_runs(root)[-5:]) or "none"
    raise UnknownRunError(f"no run called {name!r} in {root} · newest: {known}", "see 'bdh-bench list runs'")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_JSON_BYTES:
            raise StoreError(f"{path} is larger than 64 MiB · expected a manifest")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise StoreError(f"{path} holds no JSON object · expected a run manifest")
    return value


def open_run(path: str | Path) -> Run:
    """Read a run. Raises UnknownRunError where there is none and StoreError where its manifest is damaged or newer."""
    folder = Path(path)
    if not (folder / "run.json").is_file():
        raise UnknownRunError(f"no run at {folder} · expected a folder with run.json", "see 'bdh-bench list runs'")
    manifest = _read_json(folder / "run.json")
    if manifest.get("v") != SCHEMA_VERSION:
        raise StoreError(
            f"{folder} has schema version {manifest.get('v')} · this bdh-bench reads {SCHEMA_VERSION}",
            "upgrade bdh-bench",
        )
    problems: list[str] = []
    by_cell: dict[str, list[dict[str, Any]]] = {}
    for shard in sorted((folder / "events").glob("*.jsonl")):
        for body in read_events(shard, problems):
            by_cell.setdefault(str(body.get("cell")), []).append(body)
    cells: list[CellOutcome] = []
    records: list[Record] = []
    for planned in manifest.get("cells", []):
        outcome, event = _outcome(planned, by_cell.get(planned["key"], []), problems)
        cells.append(outcome)
        records.extend(_records(folder.name, outcome, event))
    return Run(folder.name, folder, manifest, tuple(cells), tuple(records), tuple(problems))


def read_events(shard: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The sound events of one shard; what is damaged is described in ``problems``. A torn last line is tolerated."""
    data = shard.read_bytes()
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        torn = number == len(lines)
        body = _sound_body(line)
        if body is not None:
            yield body
        elif torn:
            problems.append(f"{shard.name}: last line is torn (a writer was stopped); it was ignored")
        else:
            problems.append(f"{shard.name}:{number}: damaged line skipped")


def _sound_body(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
        body = event["body"]
        if event["v"] != SCHEMA_VERSION or zlib.crc32(canonical(body).encode()) != event["crc"]:
            return None
    except (ValueError, KeyError, TypeError):
        return None
    return body if isinstance(body, dict) else None


def _outcome(
    planned: Mapping[str, Any], events: list[dict[str, Any]], problems: list[str]
) -> tuple[CellOutcome, dict[str, Any]]:
    started = {int(e["attempt"]) for e in events if e["type"] == "started"}
    final: dict[int, dict[str, Any]] = {}
    for event in (e for e in events if e["type"] in ("result", "failed")):
        attempt = int(event["attempt"])
        if attempt in final:
            if final[attempt] != event:
                problems.append(f"cell {planned['key'][:12]} attempt {attempt} has two final rows; the first is kept")
            continue
        final[attempt] = event
    lasting = [n for n, e in final.items() if e["status"] not in UNFINISHED_STATUSES]
    if lasting:
        event = final[max(lasting)]
    elif final or started:
        event = {
            "status": "interrupted",
            "reason": "stopped before it was finished",
            "attempt": max({*final, *started}),
        }
    else:
        event = {"status": "planned", "reason": "", "attempt": 0}
    outcome = CellOutcome(
        key=planned["key"],
        model=planned["model"],
        family=planned["family"],
        size=planned["size"],
        task=planned["task"],
        seed=planned["seed"],
        context=planned.get("context"),
        metric=planned.get("metric", ""),
        status=event["status"],
        reason=event.get("reason", ""),
        attempt=event["attempt"],
        attempts=len({*started, *final}),
        facts=event.get("facts", {}),
        log=event.get("log", ""),
        model_kind=str(planned.get("kind", "")),
    )
    return outcome, event


def _records(run: str, cell: CellOutcome, event: Mapping[str, Any]) -> Iterator[Record]:
    if cell.kind == "pending":
        return
    measurements = event.get("measurements", [])
    if not measurements:  # a cell without values is still a row, with its reason
        measurements = [
            {
                "metric": cell.metric,
                "value": None,
                "context": cell.context or 0,
                "status": cell.status,
                "reason": cell.reason,
            }
        ]
    for raw in measurements:
        m = Measurement(**raw)
        yield Record(
            run=run,
            cell=cell.key,
            attempt=cell.attempt,
            model=cell.model,
            family=cell.family,
            size=cell.size,
            task=cell.task,
            seed=cell.seed,
            metric=m.metric,
            metric_id=m.metric_id or m.metric,
            value=m.value,
            context=m.context,
            batch_size=m.batch_size,
            axes=m.axes,
            sample=m.sample,
            weight=m.weight,
            repeat=m.repeat,
            status=m.status if m.status != "ok" or m.value is not None else cell.status,
            reason=m.reason,
            weights=str(cell.facts.get("weights", "")),
            facts=cell.facts,
        )
