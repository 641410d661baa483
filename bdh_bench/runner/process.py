"""One measuring process: how is it started, followed and ended, and how did it end?

It runs in a process group of its own with a folder of its own for temporary files; when it is over, both are gone. Its parent blocks
on its pipe and never spins: it takes no time from what is measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bdh_bench.measure.clock import now_s
from bdh_bench.measure.kills import oom_kills, why_killed
from bdh_bench.types import NOT_STORED_EXIT

GRACE_S = 10.0
#: A longer line than this is no progress but what a library prints.
_LONGEST_LINE = 2**20

#: Seconds that a phase may take, where that is less than what a whole round may. Training and measuring take what they take.
PHASE_LIMITS = {"load": 1800.0, "gates": 3600.0, "warm-up": 600.0}

#: Reads one request from stdin, says how it goes on stdout and writes into the store.
COMMAND = (sys.executable, "-m", "bdh_bench.runner.worker")

Say = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Death:
    """How a process without a result ended, as a row says it."""

    status: str
    reason: str


@dataclass(frozen=True)
class _Overdue:
    """A limit that was passed."""

    phase: str
    limit_s: float
    whole: bool

    @property
    def reason(self) -> str:
        what = f"no result after {self.limit_s:g} s" if self.whole else f"not over after {self.limit_s:g} s"
        return f"phase {self.phase}: {what}"


def measure(
    request: Mapping[str, Any],
    environment: Mapping[str, str],
    log: Path,
    temporary: Path,
    say: Say,
    timeout_s: float,
    limits: Mapping[str, float] = PHASE_LIMITS,
) -> Death:
    """Start a process for this request and stay with it to its end. What it returns holds where the process stored no result.

    Ctrl-C goes to the process first, which may save its training, and then passes through.
    """
    killed_before = oom_kills()
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        with log.open("wb") as file:
            process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**environment, "TMPDIR": str(temporary)},
                start_new_session=True,
            )
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        return Death("infra", f"no process could be started: {error.strerror or error}")
    assert process.stdin is not None
    assert process.stdout is not None
    overdue: _Overdue | None = None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        overdue = _follow(process.stdout, say, timeout_s, limits)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        _wait(process)
        raise
    finally:
        if overdue is not None or sys.exc_info()[0] is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGTERM)
        _wait(process)
        code, peak = _reap(process)
        process.stdin.close()
        process.stdout.close()
        shutil.rmtree(temporary, ignore_errors=True)
    return Death("timeout", overdue.reason) if overdue else _death(code, peak, killed_before)


def temporary_folder(run_folder: Path, cell: str, round_: int, attempt: int) -> Path:
    """Where an attempt may leave what it likes. Its name is known, so that what a killed parent left is found again."""
    return Path(tempfile.gettempdir(), f"{_prefix(run_folder)}{cell[:16]}-{round_}-{attempt}")


def left_behind(run_folder: Path) -> dict[Path, str]:
    """Such folders of this run that exist, with the round of each as a lease names it (KEY-ROUND)."""
    prefix = _prefix(run_folder)
    found = sorted(Path(tempfile.gettempdir()).glob(f"{prefix}*-*-*"))
    return {path: path.name.removeprefix(prefix).rpartition("-")[0] for path in found}


def _prefix(run_folder: Path) -> str:
    which = hashlib.sha256(str(run_folder.resolve()).encode()).hexdigest()[:12]
    return f"bdh-bench-{os.getuid()}-{which}-"


def _death(code: int, peak: int, killed_before: int | None) -> Death:
    if code == -signal.SIGKILL:
        why = why_killed(killed_before, peak)
        return Death("oom_host", why) if why else Death("infra", "killed from outside (SIGKILL)")
    if code in (-signal.SIGTERM, -signal.SIGHUP):
        return Death("infra", f"ended from outside ({signal.Signals(-code).name})")
    if code == NOT_STORED_EXIT:
        return Death("infra", "the result could not be stored")
    if code < 0:
        return Death("crash", f"the process ended with {signal.Signals(-code).name}")
    return Death("error", f"the process ended with exit status {code} and no result")


def _follow(pipe: IO[bytes], say: Say, timeout_s: float, limits: Mapping[str, float]) -> _Overdue | None:
    """Pass progress on until the process closes its pipe; the limit that was passed, where one was."""
    started = entered = now_s()
    phase, rest = "load", b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            ends = [(started + timeout_s, _Overdue(phase, timeout_s, True))]
            if phase in limits:
                ends.append((entered + limits[phase], _Overdue(phase, limits[phase], False)))
            end, overdue = min(ends, key=lambda one: one[0])
            if not selector.select(max(0.0, end - now_s())):
                return overdue
            data = os.read(pipe.fileno(), 65536)
            if not data:
                return None
            *lines, rest = (rest + data).split(b"\n")
            rest = rest if len(rest) <= _LONGEST_LINE else b""
            for line in lines:
                said = _progress(line)
                if said is None:
                    continue
                if said["phase"] != phase:
                    phase, entered = said["phase"], now_s()
                say(said)


def _progress(line: bytes) -> dict[str, Any] | None:
    """What a line says; None where a library printed something."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) and isinstance(said.get("phase"), str) else None


def _wait(process: subprocess.Popen[bytes]) -> None:
    """Until the process has ended, which leaves it to be reaped, or its time of grace is over. A second Ctrl-C ends the waiting."""
    end = now_s() + GRACE_S
    with contextlib.suppress(KeyboardInterrupt):
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None and now_s() < end:
            time.sleep(0.01)


def _reap(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Exit code and the most bytes it held. What is left of its group is killed while its number cannot be used again."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
