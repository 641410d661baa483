"""A measuring process without torch, for tests of what stands around it: it does what the model's name says, and stores a row.

``toy:uniform`` stores the integers of its cell; ``toy:segfault``, ``toy:hang``, ``toy:oom``, ``toy:sleep`` (a moment), ``toy:term``
(ends as a preempted process does), ``toy:kill`` (as one that SIGKILL met), ``toy:child`` (leaves a process behind), ``toy:noisy``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from bdh_bench.results.store import EventWriter

_STATUS = {"toy:oom": "oom_host", "toy:noisy": "noisy", "toy:unsupported": "unsupported"}
_SIGNALS = {"toy:segfault": signal.SIGSEGV, "toy:term": signal.SIGTERM, "toy:kill": signal.SIGKILL}


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def main() -> None:
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cell, round_, attempt = request["cell"], request["round"], request["attempt"]
    writer = EventWriter(Path(request["run_folder"]), f"{cell['key'][:16]}-{round_}-{attempt}")
    who = {"cell": cell["key"], "round": round_, "attempt": attempt}
    writer.write("started", **who)
    print("a library prints something")
    print(json.dumps({"phase": "measure", "fraction": 0.5}), flush=True)
    Path(os.environ["TMPDIR"], "left").write_text("behind", encoding="utf-8")
    model = cell["model"].partition(":seconds=")[0]
    if model in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[model])
    if model == "toy:child":
        child = subprocess.Popen(["sleep", "60"])
        Path(request["run_folder"], "child").write_text(str(child.pid), encoding="utf-8")
    if model == "toy:hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if model == "toy:sleep":
        time.sleep(0.02)
    status = _STATUS.get(model, "ok")
    value = cell["seed"] * 1000 + (cell["context"] or 0)
    rows = [{"metric": "state_bytes", "value": value, "context": cell["context"] or 0}]
    measured = status in ("ok", "noisy")
    writer.write("result", **who, status=status, reason="", facts={}, measurements=rows if measured else [])


if __name__ == "__main__":
    main()
