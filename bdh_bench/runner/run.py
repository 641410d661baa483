"""From a request to a finished run folder: find or create the run, run what is missing, count what came out."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bdh_bench.errors import SpecError, StoreError
from bdh_bench.measure.host import environment
from bdh_bench.results.store import Run, check_run_id, create_run, list_runs, new_run_id, open_run
from bdh_bench.runner.executor import Executor, Local
from bdh_bench.runner.local import Limits, Report, sweep
from bdh_bench.runner.plan import Plan
from bdh_bench.runner.selection import Selection, choose
from bdh_bench.runner.selftest import outcome as selftest

#: A worker that vanished is started again so many times.
_LOST_RETRIES = 3


def prepare(plan: Plan, root: Path, run_id: str | None, resume: bool, selection: Selection | None = None) -> Path:
    """The run folder for this plan: continued where the contract says so, else created. Raises SpecError, StoreError.

    A finished run is continued where the selection has rounds of it measured again.
    """
    selection = selection or Selection()
    if run_id is None:
        for folder in reversed(list_runs(root)):
            if _continues(folder, plan) and _has_work(folder, plan, selection):
                return folder
        if selection.only_failed:
            raise SpecError(f"got --only-failed without a run of this request in {root} that has failed cells")
        run_id = new_run_id()
    folder = root / check_run_id(run_id)
    if (folder / "run.json").is_file():
        if not resume:
            raise SpecError(
                f"run {run_id!r} exists in {root}", "add --resume to continue it, or choose another --run-id"
            )
        run = open_run(folder)
        if run.manifest.get("spec_digest") != plan.spec.digest():
            raise SpecError(
                f"run {run_id!r} was started as: {run.manifest.get('command')} · got another request",
                "choose another --run-id",
            )
        if not _continues(folder, plan):
            raise SpecError(f"the code or the text has changed since run {run_id!r} was started", "start a new run")
        return folder
    created = datetime.now(UTC).isoformat(timespec="milliseconds")
    known = environment()
    manifest = plan.manifest(run_id, created, {**known, "selftest": selftest.last(known)})
    if plan.texts is not None and plan.corpus is not None:
        shares = plan.texts.overlap()
        rows = [
            row | {"overlap": shares[row["name"]]} if row["name"] in shares else row for row in plan.corpus["documents"]
        ]
        manifest["corpus"] = plan.corpus | {"documents": rows}
    create_run(folder, manifest, plan.texts.arrays() if plan.texts is not None else None)
    return folder


def _continues(folder: Path, plan: Plan) -> bool:
    try:
        run = open_run(folder)
    except StoreError:
        return False
    same = run.manifest.get("spec_digest") == plan.spec.digest()
    return same and {c.key for c in run.cells} == {c.key for c in plan.cells}


def _has_work(folder: Path, plan: Plan, selection: Selection) -> bool:
    run = open_run(folder)
    return not run.finished or bool(selection.again and choose(plan, run, selection))


def execute(
    plan: Plan,
    folder: Path,
    report: Report,
    timeout_s: float,
    limits: Limits | None = None,
    selection: Selection | None = None,
    executor: Executor | None = None,
) -> Run:
    """Run the chosen rounds (without a selection: every one that is missing) and read the run back. Raises StoreError.

    ``timeout_s`` is that of a round where no ``limits`` are given.
    """
    limits = limits or Limits(timeout_s)
    names = choose(plan, open_run(folder), selection or Selection())
    engine = executor or Local(folder, {cell.key: cell for cell in plan.cells}, limits, report)
    for _ in range(1 + _LOST_RETRIES if names else 0):
        handle = engine.submit(names)
        try:
            while (state := engine.poll(handle)) == "running":
                pass
        except KeyboardInterrupt:
            engine.cancel(handle)
            raise
        if state == "ended":
            break
    sweep(folder)  # also where there was nothing to do: the last parent may have been killed after its last row
    return open_run(folder)


def tally(run: Run) -> dict[str, int]:
    """ok, failed and skipped cells, as the command line's contract defines them."""
    kinds = Counter(cell.kind for cell in run.cells)
    return {"ok": kinds["ok"], "failed": kinds["failed"], "skipped": kinds["skipped"]}


def exit_code(run: Run) -> int:
    """0 all cells have a result; 6 a gate failed; 3 some failed or are missing still; 5 nothing was measured."""
    counts: dict[str, Any] = tally(run)
    without = len(run.cells) - counts["ok"] - counts["skipped"]
    if run.cells and without == len(run.cells):
        return 5
    if any(cell.status == "gate_failed" for cell in run.cells):
        return 6
    return 3 if without else 0
