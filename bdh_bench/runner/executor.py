"""Who runs the rounds of a run? An engine that starts ``bdh-bench worker``, wherever that is.

An engine never touches measuring code and carries no results: the worker it starts writes into the run's folder, and whoever wants to
know what came out reads that. ``local`` starts one worker as a child process, which ends when this process does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from bdh_bench.errors import SpecError, StoreError
from bdh_bench.runner.local import Limits, Report, work
from bdh_bench.runner.process import GRACE_S
from bdh_bench.types import Cell

State = Literal["running", "ended", "lost"]


class Executor(Protocol):
    """An engine. Rounds are named as in ``local``: KEY-ROUND."""

    def submit(self, rounds: Sequence[str]) -> Any:
        """Start a worker on these rounds; what is returned stands for it."""
        ...

    def poll(self, handle: Any) -> State:
        """How it is going. May wait a while for news. Raises StoreError where the worker could not use the run's folder."""
        ...

    def cancel(self, handle: Any) -> None:
        """Stop it; what it is measuring may save its training. The store stays consistent."""
        ...


def worker_command(folder: Path, rounds: Sequence[str], limits: Limits) -> list[str]:
    """What every engine starts."""
    command = [sys.executable, "-m", "bdh_bench.cli", "worker", "--run", str(folder.resolve())]
    command += ["--cells", ",".join(rounds), "--cell-timeout", f"{limits.cell_timeout_s!r}"]
    command += ["--time-budget", f"{limits.time_budget_s:f}s"] if limits.time_budget_s is not None else []
    return command + (["--fail-fast"] if limits.fail_fast else [])


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    rest: bytes = b""
    trouble: tuple[str, str] | None = None


class Local:
    """One worker on this machine, as a child process; its progress comes through a pipe."""

    def __init__(self, folder: Path, cells: Mapping[str, Cell], limits: Limits, report: Report) -> None:
        self.folder, self.cells, self.limits, self.report = folder, cells, limits, report

    def submit(self, rounds: Sequence[str]) -> _Child:
        """Start the worker; it ends when our end of its stdin is closed."""
        command = [*worker_command(self.folder, rounds, self.limits), "--attached"]
        return _Child(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True))

    def poll(self, handle: _Child) -> State:
        """Wait for the next lines of progress and pass them on."""
        assert handle.process.stdout is not None
        data = os.read(handle.process.stdout.fileno(), 65536)
        *lines, handle.rest = (handle.rest + data).split(b"\n")
        for line in lines:
            self._pass_on(handle, line)
        if data:
            return "running"
        code = self._ended(handle)
        if handle.trouble is not None:
            raise StoreError(*handle.trouble)
        return "ended" if code == 0 else "lost"

    def _pass_on(self, handle: _Child, line: bytes) -> None:
        try:
            said = json.loads(line)
        except ValueError:  # something printed; it is not progress
            return
        if "error" in said:
            handle.trouble = (str(said["error"]), str(said["hint"]))
        elif said.get("cell") in self.cells:
            self.report(self.cells[said.pop("cell")], said)

    def cancel(self, handle: _Child) -> None:
        """Ctrl-C for the worker, then time for it and for what it measures, then the end."""
        handle.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            handle.process.wait(3 * GRACE_S)
        self._ended(handle)

    def _ended(self, handle: _Child) -> int:
        process = handle.process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # a worker that still runs, and the process it watches, end with it
        process.stdout.close()
        try:
            return process.wait(GRACE_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            return process.wait()


def serve(folder: Path, names: Sequence[str], limits: Limits, attached: bool, write: Callable[[str], None]) -> int:
    """The other end of ``submit``: work, and say how it goes, one JSON object a line. Returns the exit code.

    ``attached`` to whoever started it, it ends when that one closes the pipe, and the process it watches ends with it.
    """
    if attached:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(folder, names, limits, lambda cell, facts: write(json.dumps({"cell": cell.key, **facts})))
    except KeyboardInterrupt:
        return 130
    except SpecError as error:
        write(json.dumps({"error": error.message, "hint": error.hint}))
        return error.exit_code
    return 0


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)
