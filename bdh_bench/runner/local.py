"""Run cells on this machine, one after the other, each in a fresh process; whatever happens to it becomes a row.

The parent blocks on the worker's pipe and never spins: it takes no time from what is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from bdh_bench.errors import StoreError
from bdh_bench.measure.clock import now_s
from bdh_bench.measure.placement import Placement, place, waiting_on
from bdh_bench.results.store import CellOutcome, EventWriter, attempt_folder, open_run, wanted_rounds
from bdh_bench.runner.leases import lease
from bdh_bench.spec import RunSpec
from bdh_bench.types import Cell

_LOG_TAIL = 4000
_GRACE_S = 10.0

Report = Callable[[Cell, dict[str, Any]], None]


def run_cells(
    folder: Path,
    spec: RunSpec,
    rounds: Iterable[tuple[Cell, int, tuple[int, ...]]],
    report: Report,
    timeout_s: float,
) -> None:
    """Run each (cell, round, contexts) that is still wanted. KeyboardInterrupt passes through, the store consistent."""
    for cell, number, contexts in rounds:
        with lease(folder, cell.key, number):
            if any(one.round == number for one in wanted_rounds(_outcome(folder, cell).rounds)):
                where = place(spec.threads)
                with waiting_on(where.parent):
                    _run_round(folder, spec, cell, number, contexts, report, timeout_s, where)


def _outcome(folder: Path, cell: Cell) -> CellOutcome:
    return next(c for c in open_run(folder).cells if c.key == cell.key)


def _run_round(
    folder: Path,
    spec: RunSpec,
    cell: Cell,
    number: int,
    contexts: tuple[int, ...],
    report: Report,
    timeout_s: float,
    where: Placement,
) -> None:
    attempt = _claim_attempt(folder, cell.key, number)
    files = attempt_folder(folder, cell.key, number, attempt)
    request = {
        "run_folder": str(folder.resolve()),
        "spec": spec.as_json(),
        "cell": asdict(cell),
        "contexts": contexts,
        "round": number,
        "attempt": attempt,
        "placement": where.as_json(),
    }
    report(cell, {"phase": "start", "round": number})
    with (files / "log.txt").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "bdh_bench.runner.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(spec),
            start_new_session=True,
        )
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(json.dumps(request).encode() + b"\n")
            worker.stdin.flush()
            timed_out = not _follow(worker.stdout, cell, report, timeout_s)
            if timed_out:
                _end(worker)
        except BrokenPipeError:
            timed_out = False
        except KeyboardInterrupt:
            _interrupt(worker)
            raise
        finally:
            if worker.poll() is None and sys.exc_info()[0] is not None:
                _end(worker)
        code = worker.wait()
        worker.stdin.close()
        worker.stdout.close()
    _settle(folder, cell, number, attempt, code, timed_out, timeout_s, files / "log.txt")
    done = _outcome(folder, cell).rounds[number - 1]
    about = {"status": done.status, "reason": done.reason, "facts": dict(done.facts)}
    report(cell, {"phase": "done", "round": number, **about})


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


def _environment(spec: RunSpec) -> dict[str, str]:
    """Thread counts must be known before torch is loaded."""
    environment = dict(os.environ)
    if spec.threads:
        environment |= {"OMP_NUM_THREADS": str(spec.threads), "MKL_NUM_THREADS": str(spec.threads)}
    environment["HF_HUB_OFFLINE"] = environment.get("HF_HUB_OFFLINE", "1")
    return environment


def _follow(pipe: IO[bytes], cell: Cell, report: Report, timeout_s: float) -> bool:
    """Pass progress lines on until the worker closes its pipe; False where the time ran out."""
    deadline = now_s() + timeout_s
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - now_s())):
                return False
            data = os.read(pipe.fileno(), 65536)
            if not data:
                return True
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                try:
                    report(cell, dict(json.loads(line)))
                except ValueError:  # a library printed something; it is not progress
                    continue


def _interrupt(worker: subprocess.Popen[bytes]) -> None:
    """Ctrl-C: let the worker save its training, then make sure that it is gone."""
    worker.send_signal(signal.SIGINT)
    try:
        worker.wait(_GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        _end(worker)


def _end(worker: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the whole process group, then SIGKILL."""
    for sign, wait_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, sign)
        try:
            worker.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
        return


def _settle(
    folder: Path, cell: Cell, number: int, attempt: int, code: int, timed_out: bool, timeout_s: float, log: Path
) -> None:
    """Write the row of a worker that died without one."""
    known = _outcome(folder, cell).rounds[number - 1]
    if known.attempt == attempt and known.kind != "pending":
        return
    if timed_out:
        status, reason = "timeout", f"no result after {timeout_s:g} s"
    elif code == -signal.SIGKILL:
        status, reason = "oom_host", "probable: the system killed the process (SIGKILL)"
    elif code < 0:
        status, reason = "crash", f"the process ended with {signal.Signals(-code).name}"
    else:
        status, reason = "error", f"the process ended with exit status {code} and no result"
    tail = log.read_bytes()[-_LOG_TAIL:].decode("utf-8", "replace")
    writer = EventWriter(folder, f"{cell.key[:16]}-{number}-{attempt}-parent")
    who = {"cell": cell.key, "round": number, "attempt": attempt}
    writer.write("failed", **who, status=status, reason=reason, log=tail)
    writer.close()
