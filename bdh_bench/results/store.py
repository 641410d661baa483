"""What is on disk, and how is it written so that nothing is lost?

    runs/<run_id>/run.json                       manifest: request, cells, corpus, environment; written once, atomically
    runs/<run_id>/texts.npz                      what depends on the texts alone: classes of every scored byte; written once
    runs/<run_id>/events/<writer>.jsonl          append-only; one writer per file; one event = one line = one write + fsync
    runs/<run_id>/cells/<cell>/<round>-<attempt>/   log and arrays of one attempt; created exclusively
    runs/<run_id>/leases/<cell>-<round>          who is working on a round of a cell

A *round* is one fresh process that measures a cell once; a row is (cell, round, attempt). A line holds ``v`` (schema version),
``crc`` (crc32 of the canonical body) and ``body``. The reader merges all shards, tolerates a torn last line, skips other damaged
lines and reports them; what the version before wrote it reads through ``migrations``. Event types: started, result, failed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bdh_bench.errors import SpecError, StoreError, UnknownRunError
from bdh_bench.results.migrations import SCHEMA_VERSION, Unreadable, current_event, current_manifest
from bdh_bench.types import MEASURED_STATUSES, RESULT_STATUSES, UNFINISHED_STATUSES, Measurement, Record

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{p}{i}" for p in ("com", "lpt") for i in range(1, 10))}
_LARGEST_JSON_BYTES = 64 * 2**20
_MOST_ROUNDS, _MOST_ATTEMPTS = 10_000, 1_000_000  # a store that says more is damaged, or means harm
_EVENT_TYPES = frozenset({"started", "result", "failed"})
_EVENT_FIELDS = frozenset(
    {"type", "time", "cell", "round", "attempt", "status", "reason", "facts", "log", "files", "measurements"}
)
_FILES = re.compile(r"[A-Za-z0-9]{1,16}/[0-9]{1,9}(-[0-9]{1,9})?\Z")
#: Field of a measurement → what it may hold.
_MEASURED: dict[str, Any] = {
    **dict.fromkeys(("metric", "sample", "metric_id", "status", "reason"), str),
    **dict.fromkeys(("context", "batch_size", "repeat"), int),
    **dict.fromkeys(("value", "weight"), (int, float)),
    "axes": dict,
}


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
        before = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, line) != len(line):
                raise OSError("the disk took part of a line only")
            os.fsync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):  # what comes next must not continue a torn line
                os.ftruncate(self._descriptor, before)
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


def attempt_folder(run_folder: Path, cell: str, round_: int, attempt: int) -> Path:
    """The folder of one attempt at one round of a cell."""
    return run_folder / "cells" / cell[:16] / f"{round_}-{attempt}"


# -- reading ---------------------------------------------------------------------------------------------------------


def kind_of(status: str) -> str:
    """ok (measured, perhaps marked), skipped (a result without a value), failed, or pending."""
    if status in MEASURED_STATUSES:
        return "ok"
    if status in RESULT_STATUSES:
        return "skipped"
    if status in UNFINISHED_STATUSES or status == "planned":
        return "pending"
    return "failed"


@dataclass(frozen=True)
class RoundOutcome:
    """What became of one round of a cell: its newest final attempt, or "planned" / "interrupted" where there is none.

    ``attempts`` counts starts; ``files`` is the attempt's folder below ``cells/``, or ""; ``stored`` is whether the attempt has a row
    and was not only started; ``more`` has what was stored with it and is not known here.
    """

    round: int
    status: str
    reason: str
    attempt: int
    attempts: int
    facts: Mapping[str, Any]
    log: str = ""
    files: str = ""
    stored: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """As ``kind_of`` its status."""
        return kind_of(self.status)


@dataclass(frozen=True)
class CellOutcome:
    """What became of one planned cell: of all its rounds the one that decides, and the rounds.

    A cell failed if one of its rounds did; it is pending while a round is missing that could still change that. Status, reason,
    attempt, facts (the worker's notes: parameters, kernels, training, environment) and log are those of the round that decides.
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
    rounds: tuple[RoundOutcome, ...] = ()
    files: str = ""

    @property
    def kind(self) -> str:
        """As ``kind_of`` its status."""
        return kind_of(self.status)


def wanted_rounds(rounds: Sequence[RoundOutcome]) -> list[RoundOutcome]:
    """The rounds that are still to be measured: the pending ones, but none once a round ended without a value.

    What crashed, timed out, had no memory or is not supported would do so again, and no number of further rounds makes it measured.
    """
    if any(one.kind in ("failed", "skipped") for one in rounds):
        return []
    return [one for one in rounds if one.kind == "pending"]


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
        """Every planned cell has its final rows."""
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
    except (OSError, ValueError, RecursionError) as error:
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
    try:
        manifest = _checked_manifest(current_manifest(manifest))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{folder / 'run.json'} is damaged: {error!r} · expected a list of planned cells") from error
    except Unreadable as error:
        newer = "upgrade bdh-bench, or read it with the one that wrote it"
        raise StoreError(f"got {error} in {folder} · expected one that is", newer) from error
    problems: list[str] = []
    by_cell: dict[str, list[dict[str, Any]]] = {}
    for shard in sorted((folder / "events").glob("*.jsonl")):
        for body in read_events(shard, problems):
            by_cell.setdefault(body["cell"], []).append(body)
    cells: list[CellOutcome] = []
    records: list[Record] = []
    for planned in manifest["cells"]:
        outcome, events = _outcome(planned, by_cell.get(planned["key"], []), problems)
        cells.append(outcome)
        for one in outcome.rounds:
            records.extend(_records(folder.name, outcome, one, events.get(one.round, {})))
    return Run(folder.name, folder, manifest, tuple(cells), tuple(records), tuple(problems))


def read_cell(folder: Path, manifest: Mapping[str, Any], key: str) -> CellOutcome:
    """What became of one cell, from the shards that the runner named after it."""
    planned = next(cell for cell in manifest["cells"] if cell["key"] == key)
    shards = [path for path in sorted((folder / "events").glob("*.jsonl")) if path.name.startswith(f"{key[:16]}-")]
    events = [body for shard in shards for body in read_events(shard, []) if body["cell"] == key]
    return _outcome(planned, events, [])[0]


def _checked_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with its cells as they must be. Raises KeyError, TypeError, AttributeError or ValueError."""
    cells = manifest.setdefault("cells", [])
    for cell in cells:
        if not all(isinstance(cell[name], str) for name in ("key", "model", "family", "size", "task")):
            raise TypeError("a name in a planned cell")
        rounds, context = cell.get("rounds", 1), cell.get("context")
        if type(cell["seed"]) is not int or type(rounds) is not int or not 1 <= rounds <= _MOST_ROUNDS:
            raise ValueError("seed or rounds of a planned cell")
        if context is not None and type(context) is not int:
            raise TypeError("the context of a planned cell")
    return manifest


def read_events(shard: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The sound events of one shard; what is damaged is described in ``problems``. A torn last line is tolerated."""
    try:
        for number, line, body in scan(shard):
            if body is not None:
                yield body
            elif line.endswith(b"\n") or len(line) == _LARGEST_JSON_BYTES:
                problems.append(f"{shard.name}:{number}: damaged line skipped")
            else:
                problems.append(f"{shard.name}: last line is torn (a writer was stopped); it was ignored")
    except OSError as error:
        problems.append(f"{shard.name}: cannot be read: {error.strerror or error}")


def scan(shard: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """(number, line, event) of each line that is not empty; None for the event of a damaged one. A line has at most 64 MiB."""
    with shard.open("rb") as file:
        number = 0
        while line := file.readline(_LARGEST_JSON_BYTES):
            number += 1
            if line != b"\n":
                yield number, line, _sound_body(line)


def _sound_body(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
        body = event["body"]
        if zlib.crc32(canonical(body).encode()) != event["crc"]:
            return None
        return _checked(current_event(event["v"], body))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, Unreadable):
        return None


def _checked(body: dict[str, Any]) -> dict[str, Any]:
    """The event with its fields as they must be. Raises ValueError, KeyError or TypeError; what is not known is kept."""
    if body["type"] not in _EVENT_TYPES or not isinstance(body["cell"], str):
        raise ValueError(f"event {body['type']!r}")
    for name, most in (("round", _MOST_ROUNDS), ("attempt", _MOST_ATTEMPTS)):
        if type(body[name]) is not int or not 1 <= body[name] <= most:
            raise ValueError(f"{name} {body[name]!r}")
    if body["type"] != "started" and not isinstance(body["status"], str):
        raise TypeError(f"status {body['status']!r}")
    if not isinstance(body.get("facts", {}), dict):
        raise TypeError("facts")
    for name in ("reason", "log"):
        if not isinstance(body.get(name, ""), str):
            raise TypeError(name)
    if "measurements" in body:
        body["measurements"] = [_measurement(raw) for raw in body["measurements"]]
    return body


def _measurement(raw: Mapping[str, Any]) -> Measurement:
    """A stored measurement; fields that a later version added are left aside. Raises TypeError or ValueError for one that is none."""
    for name, value in raw.items():
        if name not in _MEASURED:
            continue
        if name == "value" and value is None:
            continue
        if not isinstance(value, _MEASURED[name]) or isinstance(value, bool):
            raise TypeError(f"{name} {value!r}")
        if name in ("value", "weight") and not math.isfinite(value):
            raise ValueError(f"{name} {value!r}")
    return Measurement(**{name: value for name, value in raw.items() if name in _MEASURED})


def _outcome(
    planned: Mapping[str, Any], events: list[dict[str, Any]], problems: list[str]
) -> tuple[CellOutcome, dict[int, dict[str, Any]]]:
    """What became of the cell, and the event behind each of its rounds."""
    wanted = max([int(planned.get("rounds", 1)), *(e["round"] for e in events)])
    by_round: dict[int, list[dict[str, Any]]] = {number: [] for number in range(1, wanted + 1)}
    for event in events:
        by_round[event["round"]].append(event)
    found = [_round(str(planned["key"]), number, own, problems) for number, own in by_round.items()]
    rounds = tuple(one for one, _ in found)
    decides = _deciding(rounds)
    several = f"round {decides.round} of {wanted}: " if wanted > 1 and decides.kind == "failed" else ""
    outcome = CellOutcome(
        key=planned["key"],
        model=planned["model"],
        family=planned["family"],
        size=planned["size"],
        task=planned["task"],
        seed=planned["seed"],
        context=planned.get("context"),
        metric=str(planned.get("metric", "")),
        status=decides.status,
        reason=several + decides.reason,
        attempt=decides.attempt,
        attempts=sum(one.attempts for one in rounds),
        facts=decides.facts,
        log=decides.log,
        model_kind=str(planned.get("kind", "")),
        rounds=rounds,
        files=decides.files,
    )
    return outcome, {one.round: event for one, event in found}


def _deciding(rounds: Sequence[RoundOutcome]) -> RoundOutcome:
    """The round that says what the cell is: a failed one, else a missing one, else a measured one (marked before ok), else any."""
    missing = wanted_rounds(rounds)
    for choice in (
        [one for one in rounds if one.kind == "failed"],
        missing,
        [one for one in rounds if one.kind == "ok" and one.status != "ok"],
        [one for one in rounds if one.kind == "ok"],
        [one for one in rounds if one.kind == "skipped"],
    ):
        if choice:
            return choice[0]
    return rounds[0]


def _round(
    key: str, number: int, events: list[dict[str, Any]], problems: list[str]
) -> tuple[RoundOutcome, dict[str, Any]]:
    started = {e["attempt"] for e in events if e["type"] == "started"}
    final: dict[int, dict[str, Any]] = {}
    for event in (e for e in events if e["type"] != "started"):
        attempt = event["attempt"]
        if attempt in final:
            if final[attempt] != event:
                where = f"cell {key[:12]} round {number} attempt {attempt}"
                problems.append(f"{where} has two final rows; the first is kept")
            continue
        final[attempt] = event
    lasting = [n for n, e in final.items() if e["status"] not in UNFINISHED_STATUSES]
    if lasting:
        event = final[max(lasting)]
    elif final or started:
        newest = max({*final, *started})
        known = final.get(newest, {})
        event = {
            "status": known.get("status", "interrupted"),
            "reason": known.get("reason", "stopped before it was finished"),
            "attempt": newest,
        }
    else:
        event = {"status": "planned", "reason": "", "attempt": 0}
    attempt = event["attempt"]
    outcome = RoundOutcome(
        round=number,
        status=event["status"],
        reason=event.get("reason", ""),
        attempt=attempt,
        attempts=len({*started, *final}),
        facts=event.get("facts", {}),
        log=event.get("log", ""),
        files=_files(event, f"{key[:16]}/{number}-{attempt}") if attempt else "",
        stored=attempt in final,
        more={name: value for name, value in event.items() if name not in _EVENT_FIELDS},
    )
    return outcome, event


def _files(event: Mapping[str, Any], usual: str) -> str:
    """Where the event says that its files are, if that is a folder below ``cells/`` (what a store says is not trusted)."""
    said = str(event.get("files", ""))
    return said if _FILES.match(said) else usual


def _records(run: str, cell: CellOutcome, one: RoundOutcome, event: Mapping[str, Any]) -> Iterator[Record]:
    if one.kind == "pending":
        return
    measurements = event.get("measurements", [])
    if not measurements:  # a round without values is still a row, with its reason
        measurements = [Measurement(cell.metric, None, cell.context or 0, status=one.status, reason=one.reason)]
    for m in measurements:
        yield Record(
            run=run,
            cell=cell.key,
            attempt=one.attempt,
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
            status=m.status if m.status != "ok" or m.value is not None else one.status,
            reason=m.reason,
            weights=str(one.facts.get("weights", "")),
            facts=one.facts,
            round=one.round,
        )
