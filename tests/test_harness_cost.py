"""Does the harness measure what another tool measures, and does it keep out of the way?"""

from __future__ import annotations

import select
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import benchmark

from bdh_bench.measure import timing
from bdh_bench.measure.clock import Clocks, usage
from bdh_bench.models.bdh import Config, Model
from bdh_bench.runner.executor import Local
from bdh_bench.runner.plan import make_plan
from bdh_bench.runner.run import execute, prepare
from bdh_bench.spec import RunSpec
from bdh_bench.tasks.latency import _Decoder

_AGREES, _ATTEMPTS, _ROUNDS, _STEPS = 0.15, 4, 7, 25


def _ratio(ours: Callable[[], float], theirs: Callable[[], float]) -> float:
    """Of the medians over rounds, the two taken in turn so that both meet the same machine."""
    pairs = [(ours(), theirs()) if i % 2 else (theirs(), ours())[::-1] for i in range(_ROUNDS)]
    return statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)


@torch.inference_mode()
def test_the_median_step_is_that_of_torch_utils_benchmark() -> None:
    """Within 15 % in one of four attempts: on a machine with other work, medians of a few milliseconds differ by that much."""
    model = Model(Config(2, 64, 2, 16, mode="recurrent")).eval()
    decoder = _Decoder(model.session(1), torch.zeros(1, 1, dtype=torch.long))
    clocks = Clocks()

    def ours() -> float:
        return statistics.median(timing.timed((decoder.step,), _STEPS, clocks).each_s())

    def theirs() -> float:
        return statistics.median(timer.timeit(1).median for _ in range(_STEPS))

    timer = benchmark.Timer("step()", globals={"step": decoder.step})
    ours(), theirs()  # whatever is loaded at first
    with timing.quiet():
        ratios = [_ratio(ours, theirs)]
        while abs(ratios[-1] - 1) > _AGREES and len(ratios) < _ATTEMPTS:
            ratios.append(_ratio(ours, theirs))
    assert abs(ratios[-1] - 1) <= _AGREES, ratios


class _Watch:
    """What this process uses of a core while a worker measures: from the first report of a phase of its task to the end of its cell."""

    def __init__(self) -> None:
        self.began: tuple[float, int] | None = None
        self.share = 1.0

    def __call__(self, cell: Any, facts: dict[str, Any]) -> None:
        now = (time.perf_counter(), usage().process_ns)
        if facts.get("phase") == "prefill" and self.began is None:
            self.began = now
        if facts.get("phase") == "gates" and self.began is not None:
            self.share = (now[1] - self.began[1]) * 1e-9 / (now[0] - self.began[0])


def _share(root: Path, watch: _Watch) -> float:
    """A worker that sleeps through prefill and decoding, for about two seconds."""
    task = "latency:budget=smoke:steps=8:windows=2:prefills=2"
    plan = make_plan(RunSpec(("toy:sleep:seconds=0.02",), (task,), contexts=(16,), threads=1, rounds=1))
    run = execute(plan, prepare(plan, root, None, False), watch, 60.0)
    assert run.cells[0].kind == "ok"
    return watch.share


def test_the_parent_waits_without_using_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _share(tmp_path / "blocks", _Watch()) < 0.01
    poll, watch = Local.poll, _Watch()

    def spin(self: Local, handle: Any) -> Any:
        """The planted bug: look again and again, once the worker measures."""
        while watch.began and not select.select([handle.process.stdout], [], [], 0)[0]:
            pass
        return poll(self, handle)

    monkeypatch.setattr(Local, "poll", spin)
    assert _share(tmp_path / "spins", watch) > 0.01
