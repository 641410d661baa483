"""Kill workers and parents at random moments, resume each time, and see that nothing is lost and nothing counted twice.

    python tests/torture.py            whole runs of toys through the command line: ``make torture``
    python tests/torture.py --quick    the same with measuring processes that load no torch (tests/quick_worker.py)

TORTURE_SECONDS bounds the time (default 600), TORTURE_KILLS the kills (default 200), TORTURE_SEED the moments. It prints one JSON
object and ends with 1 where the store is not what an uninterrupted run leaves.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdh_bench.measure.kills import oom_kills
from bdh_bench.results.store import Run, open_run
from bdh_bench.runner.plan import make_plan
from bdh_bench.runner.process import left_behind
from bdh_bench.runner.run import prepare
from bdh_bench.spec import RunSpec

_QUICK = "--quick" in sys.argv
_SPEC = RunSpec(("toy:uniform", "toy:linear_kv", "toy:sleep"), ("memory",), contexts=(16, 32, 64), seeds=(0, 1))
_EXACT = ("state_bytes", "capacity_bytes", "weights_bytes")


@dataclass
class Outcome:
    """What a torture came to; ``wrong`` is empty where nothing was lost."""

    kills: dict[str, int]
    resumes: int
    rows: int
    attempts: int
    wrong: list[str]


def parent(root: Path, run_id: str) -> subprocess.Popen[bytes]:
    """Start, or go on with, the run; a process group of its own, so that nothing else is hit."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[3])\n"
        "from bdh_bench.runner import process, local\n"
        "process.GRACE_S = local._LOOK_AGAIN_S = 0.2\n"
        "process.COMMAND = (sys.executable, sys.argv[3] + '/quick_worker.py')\n"
        "local.work(__import__('pathlib').Path(sys.argv[1]) / sys.argv[2], (), local.Limits(60.0), lambda *a: None)\n"
    )
    quick = [sys.executable, "-c", code, str(root), run_id, str(Path(__file__).parent)]
    whole = [sys.executable, "-m", "bdh_bench.cli", "run", "--models", ",".join(_SPEC.models), "--task", "memory"]
    whole += ["--contexts", "16,32,64", "--seeds", "2", "--runs", str(root), "--run-id", run_id, "--resume"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(quick if _QUICK else whole, start_new_session=True, **quiet)  # type: ignore[call-overload,no-any-return]


def torture(root: Path, most_kills: int, seconds: float, seed: int) -> Outcome:
    """Kill until there were enough kills or the time is over, then let a run end in peace and compare it with one that was let alone."""
    chance = random.Random(seed)
    end = time.monotonic() + seconds
    plan = make_plan(_SPEC)
    kills = {"parent": 0, "worker": 0}
    resumes = rows = attempts = 0
    pause = 0.0
    wrong: list[str] = []
    for name in ("peace", *(f"war{i}" for i in range(most_kills))):
        folder = prepare(plan, root, name, True)
        finished, began = False, time.monotonic()
        while not finished:
            running = parent(root, name)
            resumes += 1
            while (
                name != "peace"
                and running.poll() is None
                and sum(kills.values()) < most_kills
                and time.monotonic() < end
            ):
                time.sleep(chance.expovariate(1 / pause))
                hit = _kill(running, chance)
                if hit:
                    kills[hit] += 1
            running.wait()
            finished = open_run(folder).finished
        if name == "peace":  # a kill for every second cell, however fast this machine is
            pause = 2 * (time.monotonic() - began) / len(plan.cells)
        parent(
            root, name
        ).wait()  # the last one may have been killed after its last row: nothing is to do but to tidy up
        run = open_run(folder)
        rows, attempts = rows + len(run.records), attempts + sum(cell.attempts for cell in run.cells)
        wrong += _wrong(run, open_run(root / "peace"))
        wrong += [f"{name}: left behind {path}" for path in left_behind(folder)]
        if name != "peace" and (sum(kills.values()) >= most_kills or time.monotonic() >= end):
            break
    return Outcome(kills, resumes, rows, attempts, wrong)


def _kill(running: subprocess.Popen[bytes], chance: random.Random) -> str:
    """SIGKILL to the parent or to a process below it; "" where there was nothing to hit."""
    victim = chance.choice([running.pid, *_below(running.pid)])
    if running.poll() is not None:
        return ""
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        return ""
    if victim != running.pid:
        return "worker"
    running.wait()
    return "parent"


def _below(pid: int) -> list[int]:
    """Children of a process, and theirs."""
    try:
        own = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]
    except OSError:
        return []
    return [*own, *(deeper for one in own for deeper in _below(one))]


def _exact(run: Run) -> list[tuple[Any, ...]]:
    rows = [(r.model, r.seed, r.context, r.metric, r.repeat, r.value) for r in run.records if r.metric in _EXACT]
    return sorted(rows, key=repr)


def _wrong(run: Run, peace: Run) -> list[str]:
    """How a run differs from one that nobody disturbed."""
    found = [
        f"{cell.model} at {cell.context} is {cell.status}: {cell.reason}" for cell in run.cells if cell.kind != "ok"
    ]
    if _exact(run) != _exact(peace):
        found.append(f"rows differ: {set(_exact(run)) ^ set(_exact(peace))}")
    found += [problem for problem in run.problems if "torn" not in problem]
    return [f"{run.id}: {text}" for text in found]


def main() -> int:
    """Torture within the bounds of the environment and say what came of it."""
    seconds, most = float(os.environ.get("TORTURE_SECONDS", "600")), int(os.environ.get("TORTURE_KILLS", "200"))
    with tempfile.TemporaryDirectory() as root:
        done = torture(Path(root), most, seconds, int(os.environ.get("TORTURE_SEED", "0")))
    print(json.dumps({**vars(done), "oom_kills_counted": oom_kills()}))
    return 1 if done.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
