"""Which rounds of a run are measured here, one after the other, and what becomes of each? The work behind ``bdh-bench worker``.

Every round has a fresh process; whatever happens to it becomes a row. Rounds that another parent is working on are left until the
end, and then waited for: several of these share one run.

A round is named KEY-ROUND (KEY: the first characters of a cell's key), or KEY-ROUND-ATTEMPT to measure it again although that
attempt is final; KEY alone means all rounds of the cell.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bdh_bench.errors import StoreError, UnknownNameError
from bdh_bench.measure.clock import now_s
from bdh_bench.measure.placement import place, waiting_on
from bdh_bench.results.store import (
    CellOutcome,
    EventWriter,
    Run,
    attempt_folder,
    open_run,
    read_cell,
    wanted_rounds,
)
from bdh_bench.runner.leases import Leases
from bdh_bench.runner.process import Death, left_behind, measure, temporary_folder
from bdh_bench.spec import RunSpec
from bdh_bench.types import Cell

_LOG_TAIL = 4000
#: A round whose process was lost to something outside is started again so many times.
INFRA_RETRIES = 3
#: How often it is asked whether another parent is through with a round.
_LOOK_AGAIN_S = 1.0
_OOM = ("oom_host", "oom_cuda")

#: Called with (cell, facts) for each report of a worker.
Report = Callable[[Cell, dict[str, Any]], None]


@dataclass(frozen=True)
class Limits:
    """How long and how far.

    cell_timeout_s  seconds that one round may take
    time_budget_s   no round starts after so many seconds (None: no limit)
    fail_fast       nothing starts after the first failed round
    """

    cell_timeout_s: float = 7200.0
    time_budget_s: float | None = None
    fail_fast: bool = False


@dataclass(frozen=True)
class _Item:
    """A round to be measured; ``after`` is the final attempt that it is to replace (0: none)."""

    cell: Cell
    round: int
    after: int = 0


def work(folder: Path, names: Sequence[str], limits: Limits, report: Report) -> None:
    """Measure the named rounds that are wanted (none named: all of the run). KeyboardInterrupt passes through, the store consistent."""
    run = open_run(folder)
    shift = _Shift(folder, run, limits, report)
    waiting = list(_items(run, names))
    while waiting and not shift.over:
        held = list(shift.through(waiting))
        if len(held) == len(waiting):
            time.sleep(_LOOK_AGAIN_S)
        waiting = held
    sweep(folder)


def sweep(folder: Path) -> None:
    """Remove the temporary files of attempts whose parent was killed."""
    busy = Leases(folder).busy()
    for path, round_ in left_behind(folder).items():
        if round_ not in busy:
            shutil.rmtree(path, ignore_errors=True)


def cell_of(outcome: CellOutcome) -> Cell:
    """The cell as it was planned."""
    return Cell(outcome.key, outcome.model, outcome.task, outcome.seed, outcome.context, len(outcome.rounds))


def _items(run: Run, names: Sequence[str]) -> Iterator[_Item]:
    cells = [cell_of(outcome) for outcome in run.cells]
    if not names:
        yield from (_Item(cell, number) for cell in cells for number in range(1, cell.rounds + 1))
    for name in names:
        key, *numbers = name.split("-")
        found = [cell for cell in cells if key and cell.key.startswith(key)]
        if len(found) != 1 or len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
            raise UnknownNameError("round", name, [f"{cell.key[:16]}-1" for cell in cells])
        after = int(numbers[1]) if len(numbers) == 2 else 0
        for number in [int(numbers[0])] if numbers else range(1, found[0].rounds + 1):
            yield _Item(found[0], number, after)


class _Shift:
    """One worker at one run: what it has seen so far decides what it does next."""

    def __init__(self, folder: Path, run: Run, limits: Limits, report: Report) -> None:
        self.folder, self.manifest, self.limits, self.report = folder, run.manifest, limits, report
        self.spec = RunSpec.from_mapping({k: v for k, v in run.manifest["spec"].items() if k in _SETTINGS})
        self.leases = Leases(folder)
        self.end = None if limits.time_budget_s is None else now_s() + limits.time_budget_s
        self.failed = False
        self.full: dict[tuple[str, str, int], int] = {}  # (model, task, seed) → smallest context without memory
        for outcome in run.cells:
            self._note(outcome)

    @property
    def over(self) -> bool:
        """Whether nothing more is to be started."""
        return (self.end is not None and now_s() >= self.end) or (self.failed and self.limits.fail_fast)

    def through(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Measure what is free and wanted; what others hold is given back."""
        for item in items:
            if self.over:
                return
            with self.leases.hold(item.cell.key, item.round) as ours:
                if not ours:
                    yield item
                    continue
                before = self._outcome(item.cell)
                self._note(before)
                if self._wanted(item, before):
                    self._measure(item)

    def _outcome(self, cell: Cell) -> CellOutcome:
        return read_cell(self.folder, self.manifest, cell.key)

    def _wanted(self, item: _Item, outcome: CellOutcome) -> bool:
        if item.after:
            return any(one.round == item.round and one.attempt == item.after for one in outcome.rounds)
        return any(one.round == item.round for one in wanted_rounds(outcome.rounds))

    def _note(self, outcome: CellOutcome) -> None:
        if outcome.status in _OOM and outcome.context is not None:
            which = (outcome.model, outcome.task, outcome.seed)
            self.full[which] = min(outcome.context, self.full.get(which, outcome.context))

    def _measure(self, item: _Item) -> None:
        cell, number = item.cell, item.round
        for _ in range(1 + INFRA_RETRIES):
            attempt = _claim_attempt(self.folder, cell.key, number)
            self.report(cell, {"phase": "start", "round": number})
            limit = self.full.get((cell.model, cell.task, cell.seed))
            if limit is not None and cell.context is not None and limit < cell.context and not item.after:
                why = f"larger than oom: there was no memory at context {limit:,}"
                _write(self.folder, item, attempt, Death("skipped", why), "")
            else:
                self._attempt(item, attempt)
            outcome = self._outcome(cell)
            done = outcome.rounds[number - 1]
            about = {
                "status": done.status,
                "reason": done.reason,
                "facts": {k: done.facts[k] for k in _TOLD if k in done.facts},
            }
            self.report(cell, {"phase": "done", "round": number, **about})
            self._note(outcome)
            if done.status != "infra":
                break
        self.failed |= done.kind == "failed"

    def _attempt(self, item: _Item, attempt: int) -> None:
        """One process for one attempt; where it stored no result, a row says why."""
        cell, number = item.cell, item.round
        log = attempt_folder(self.folder, cell.key, number, attempt) / "log.txt"
        request = {
            "run_folder": str(self.folder.resolve()),
            "spec": self.spec.as_json(),
            "cell": asdict(cell),
            "contexts": self.manifest["contexts"][cell.task],
            "round": number,
            "attempt": attempt,
        }
        where = place(self.spec.threads)
        with waiting_on(where.parent):
            death = measure(
                request | {"placement": where.as_json()},
                _environment(self.spec),
                log,
                temporary_folder(self.folder, cell.key, number, attempt),
                lambda said: self.report(cell, {"round": number, **said}),
                self.limits.cell_timeout_s,
            )
        known = self._outcome(cell).rounds[number - 1]
        if known.attempt != attempt or not known.stored:
            _write(self.folder, item, attempt, death, log.read_bytes()[-_LOG_TAIL:].decode("utf-8", "replace"))


_SETTINGS = frozenset(field.name for field in fields(RunSpec))
#: Of a worker's notes, what its parent is told; the rest is in the store.
_TOLD = ("seconds",)


def _claim_attempt(folder: Path, key: str, number: int) -> int:
    """The first attempt number whose folder could be created exclusively."""
    attempt = 1
    while True:
        try:
            attempt_folder(folder, key, number, attempt).mkdir(parents=True)
        except FileExistsError:
            attempt += 1
        except OSError as error:
            raise StoreError(f"cannot write below {folder}: {error.strerror}", "check space and permissions") from error
        else:
            return attempt


def _environment(spec: RunSpec) -> Mapping[str, str]:
    """Thread counts must be known before torch is loaded."""
    environment = dict(os.environ)
    if spec.threads:
        environment |= {"OMP_NUM_THREADS": str(spec.threads), "MKL_NUM_THREADS": str(spec.threads)}
    environment["HF_HUB_OFFLINE"] = environment.get("HF_HUB_OFFLINE", "1")
    return environment


def _write(folder: Path, item: _Item, attempt: int, death: Death, log: str) -> None:
    """Write the row of a process that ended without one, or that was never started."""
    writer = EventWriter(folder, f"{item.cell.key[:16]}-{item.round}-{attempt}-parent")
    who = {"cell": item.cell.key, "round": item.round, "attempt": attempt}
    writer.write("failed", **who, status=death.status, reason=death.reason, log=log)
    writer.close()
