"""What is run for the selftest, and what came out of it?

``REQUESTS`` go through plan, worker processes and store as any run does, below a folder of their own. Beside the rows there is what a row
cannot show: the same steps in a plain loop in this process, just before and after the cells that are timed, and which processes of a
request are alive once it has ended.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bdh_bench import registry
from bdh_bench.measure.clock import now_s
from bdh_bench.results.store import CellOutcome, Run
from bdh_bench.runner.local import Report
from bdh_bench.runner.plan import Plan, make_plan
from bdh_bench.runner.run import execute, prepare
from bdh_bench.spec import RunSpec
from bdh_bench.types import Cell

SLEEP, UNIFORM, COPY = "toy:sleep", "toy:uniform", "toy:copy"
CONSTANT_BYTES, BYTES_PER_TOKEN, ALLOC_BYTES = 786_432, 1024, 104_857_600
CONSTANT = f"toy:const_state:bytes={CONSTANT_BYTES}"
LINEAR = f"toy:linear_kv:bytes_per_token={BYTES_PER_TOKEN}"
SLEEP_S, SLOW_S, STEPS = 0.001, 0.1, 32

_PERIOD = 64  # of copy
_AROUND = ("start", "load", "gates", "done")  # phases of a cell in which nothing is measured
_WATCH_S = 0.1
_TIMEOUT_S = 300.0  # of a cell that is expected to end


@dataclass(frozen=True)
class Request:
    """One run. ``reads``: its task needs text. ``hangs``: it ends by its time limit, and its processes are followed until then."""

    name: str
    models: tuple[str, ...]
    task: str
    contexts: tuple[int, ...]
    reads: bool = False
    hangs: bool = False

    @property
    def cells(self) -> int:
        return len(self.models) * (1 if self.reads else len(self.contexts))


#: Timed as briefly as a warm-up by test allows.
_TIMED = f"latency:budget=quick:steps={STEPS}"
#: The first call of all, one for the pace, and what the warm-up takes at the least.
SLOW_WARMUP = "toy:slow_warmup:slow_calls=4"

REQUESTS = (
    # In this order: what comes after the cell that asks for too much memory must not notice.
    Request("deaths", (UNIFORM, "toy:oom", COPY, "toy:nan", "toy:segfault"), "long_ppl", (128,), reads=True),
    Request("hang", ("toy:hang:children=1",), "memory", (16,), hangs=True),
    Request("state", (LINEAR, CONSTANT), "memory", (512, 1024)),
    Request("alloc", (f"toy:alloc:bytes={ALLOC_BYTES}",), "memory", (512,)),
    Request("slow", (SLEEP, SLOW_WARMUP), _TIMED, (16,)),
    Request("depth", (LINEAR, CONSTANT), _TIMED, (256, 1024, 4096)),
)
#: Steps that are also taken in a plain loop, before and after the request that times them.
PLAIN = {"slow": SLEEP, "depth": CONSTANT}


@dataclass(frozen=True)
class PlainLoop:
    """Mean seconds of a step, by window, before and after the cells of a request."""

    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median((*self.before, *self.after))

    @property
    def spread(self) -> float:
        """How far equal things lie apart here: quartiles of the windows, or the drift from before to after, whichever is more."""
        first, middle, third = statistics.quantiles((*self.before, *self.after), n=4, method="inclusive")
        drift = abs(statistics.median(self.after) - statistics.median(self.before))
        return max(third - first, drift) / middle


@dataclass
class Family:
    """Processes that were seen below this one, and those that are still alive at the end."""

    seen: set[int] = field(default_factory=set)
    alive: int = 0


@dataclass(frozen=True)
class Evidence:
    """Rows, plain loops and processes, each by request; of this process, the seconds that workers measured and what it used of them."""

    runs: Mapping[str, Run]
    plain: Mapping[str, PlainLoop]
    families: Mapping[str, Family]
    parent: tuple[float, float] = (0.0, 0.0)

    def cell(self, request: str, model: str) -> CellOutcome:
        """The cell of this model; for a model with several contexts, the first."""
        return next(c for c in self.runs[request].cells if c.model == model)

    def values(self, request: str, model: str, metric: str, context: int | None = None) -> list[float]:
        """Every stored value, in the order of the store; [] where there is none."""
        return [
            r.value
            for r in self.runs[request].records
            if r.model == model and r.metric == metric and context in (None, r.context) and r.value is not None
        ]


def gather(folder: Path, report: Report, requests: Sequence[Request] = REQUESTS) -> Evidence:
    """Run the requests below ``folder``, which must be there, and collect what came out."""
    texts = _write_texts(folder / "texts")
    runs: dict[str, Run] = {}
    loops: dict[str, PlainLoop] = {}
    families: dict[str, Family] = {}
    watch = _Watch(report)
    for request in requests:
        plan = _plan(request, texts)
        model = PLAIN.get(request.name)
        before = plain_steps(model) if model else ()
        with _following(request.hangs) as family:
            limit_s = round(2.0 + 2.0 * watch.longest_s, 1) if request.hangs else _TIMEOUT_S
            runs[request.name] = execute(plan, prepare(plan, folder, request.name, False), watch, limit_s)
        families[request.name] = family
        if model:
            loops[request.name] = PlainLoop(before, plain_steps(model))
    return Evidence(runs, loops, families, (watch.wall_s, watch.used_s))


class _Watch:
    """Passes reports on, and notes how long a cell takes here and what this process uses of a core while a worker measures.

    ``wall_s`` and ``used_s`` add up over the phases of the tasks; ``longest_s`` is a whole cell with the start of its process.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        self.wall_s = self.used_s = self.longest_s = 0.0
        self._began = 0.0
        self._measuring: tuple[float, float] | None = None

    def __call__(self, cell: Cell, facts: dict[str, Any]) -> None:
        now, used, phase = now_s(), time.process_time(), facts.get("phase")
        if self._measuring is not None:
            self.wall_s += now - self._measuring[0]
            self.used_s += used - self._measuring[1]
        self._measuring = (now, used) if phase not in _AROUND else None
        if phase == "start":
            self._began = now
        elif phase == "done":
            self.longest_s = max(self.longest_s, now - self._began)
        self.report(cell, facts)


def _plan(request: Request, texts: Path) -> Plan:
    repeats = "rounds" in registry.find("tasks", request.task.partition(":")[0]).defaults
    return make_plan(
        RunSpec(
            request.models,
            (request.task,),
            data=f"path:{texts}",
            contexts=request.contexts,
            threads=1,
            smoke=True,
            rounds=1 if repeats else 0,
        )
    )


def _write_texts(folder: Path) -> Path:
    """Documents that repeat after ``_PERIOD`` bytes, each with bytes of its own."""
    folder.mkdir()
    chance = random.Random(0)
    for number in range(8):
        (folder / f"{number}.bin").write_bytes(chance.randbytes(_PERIOD) * 20)
    return folder


def plain_steps(model: str, windows: int = 12, steps: int = STEPS) -> tuple[float, ...]:
    """Mean seconds of a greedy step of this model in a loop that does nothing else, by window; a first window is not counted."""
    import torch

    from bdh_bench.loading import load_model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            stream, token = load_model(model).session(), torch.zeros((1, 1), dtype=torch.long)
            taken = [_plain_window(stream, token, steps) for _ in range(windows + 1)]
    finally:
        torch.set_num_threads(threads)
    return tuple(taken[1:])


def _plain_window(stream: Any, token: Any, steps: int) -> float:
    started = now_s()
    for _ in range(steps):
        token = stream.extend(token)[:, -1:].argmax(-1)
    return (now_s() - started) / steps


@contextlib.contextmanager
def _following(watched: bool) -> Iterator[Family]:
    """Look every tenth of a second which processes there are below this one, and at the end which of them are left."""
    import psutil

    family, ended = Family(), threading.Event()
    known: dict[int, psutil.Process] = {}

    def look() -> None:
        while not ended.wait(_WATCH_S):
            with contextlib.suppress(psutil.Error):
                known.update({p.pid: p for p in psutil.Process().children(recursive=True)})

    thread = threading.Thread(target=look, daemon=True)
    if watched:
        thread.start()
    try:
        yield family
    finally:
        ended.set()
        if watched:
            thread.join()
        family.seen.update(known)
        family.alive = sum(_alive(process) for process in known.values())


def _alive(process: Any) -> bool:
    """A process that has ended and waits to be collected by whoever inherited it is gone."""
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
