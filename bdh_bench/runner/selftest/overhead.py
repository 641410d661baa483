"""What does measuring cost, and are equal things found equal and unequal ones unequal?

Everything here goes through the task that times decoding, as it is, on a model whose step is a fixed piece of arithmetic of about a
millisecond. The model notes when each of its steps begins; from one beginning to the next is the step with all that the harness does.

    by accounting    every look at a clock or a counter, counted by the interpreter, times its cost, and the progress that is told,
                     as a share of the steps
    by experiment    a plain loop over the same steps against the harness, in ABBA order
    A/A and +5 %     rounds of the same arithmetic twice and of 5 % more of it, interleaved; 40 draws of some rounds each

One process, so what differs from process to process is not in it.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdh_bench import registry
from bdh_bench.measure.clock import now_s
from bdh_bench.models import toy
from bdh_bench.runner.selftest.slopes import Interval, ratio
from bdh_bench.runner.selftest.truths import NOT_DECIDABLE, NOT_RECOVERED, RECOVERED, Finding
from bdh_bench.session import Memory
from bdh_bench.types import Keep, Measurement, TaskContext

LIMIT = 0.01
THRESHOLD = 0.02  # two medians closer than this are equal
MORE = 0.05
PAIRS, ROUNDS, DRAWS, DRAWN = 30, 24, 40, 7
EQUAL_SHARE, FOUND_SHARE = 0.95, 0.80

_SIDE, _STEPS = 64, 16
_CLOCKS: tuple[Callable[..., object], ...] = (
    time.perf_counter,
    time.perf_counter_ns,
    time.process_time_ns,
    time.thread_time_ns,
    resource.getrusage,
)


class Paced(toy.Model):
    """Uniform, with ``products`` of two small matrices per step; notes when each step of one token begins."""

    def __init__(self, products: int) -> None:
        super().__init__(toy.Config())
        self.products = products
        self.matrix = torch.full((_SIDE, _SIDE), 1.0 / _SIDE)
        self.out = torch.empty_like(self.matrix)
        self.began: list[float] = []

    def advance(self, memory: Memory, position: int, tokens: Tensor, keep: Keep) -> Tensor:
        if tokens.shape[1] == 1:
            self.began.append(now_s())
        for _ in range(self.products):
            torch.mm(self.matrix, self.matrix, out=self.out)
        return super().advance(memory, position, tokens, keep)

    def periods(self) -> list[float]:
        """Seconds from the beginning of a step to that of the next, and forget them."""
        found = [later - earlier for earlier, later in pairwise(self.began)]
        self.began.clear()
        return found


def findings() -> tuple[Finding, ...]:
    """All four, on one thread."""
    with _one_thread(), torch.inference_mode():
        products = _products(1e-3)
        return (
            by_accounting(accounted(Paced(products))),
            by_experiment(*alternated(Paced(products))),
            *told_apart(*interleaved(products)),
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _products(seconds: float) -> int:
    """How many products take about so long here."""
    model = Paced(50)
    plain(model)
    return max(1, round(50 * seconds / statistics.median(model.periods())))


def plain(model: Any) -> None:
    """Some windows of steps, with nothing around them."""
    stream, token = model.session(), torch.zeros((1, 1), dtype=torch.long)
    for _ in range(4 * _STEPS):
        token = stream.extend(token)[:, -1:].argmax(-1)


def harnessed(model: Any, progress: Callable[..., None] = lambda *a: None) -> list[Measurement]:
    """The same through the task, as small as it goes."""
    task = registry.load("tasks", "latency")
    config = task.Config(budget="smoke", steps=_STEPS, windows=3, prefills=1)
    context = TaskContext(
        seed=0,
        context=8,
        contexts=(8,),
        train_context=8,
        documents=(),
        weights="random",
        smoke=True,
        progress=progress,
    )
    return [item for item in task.run(model, config, context) if isinstance(item, Measurement)]


# -- by accounting ---------------------------------------------------------------------------------------------------


def accounted(model: Paced) -> float:
    """Share of the time of its steps that goes into clocks, counters and progress."""
    harnessed(model)  # what is loaded or compiled at first is not counted
    model.periods()
    seconds = [0.0]

    def tell(phase: str, share: float, facts: Any) -> None:
        started = time.thread_time()  # processor time: who else had the core meanwhile is not the harness's doing
        print(json.dumps({"phase": phase, "fraction": share, **facts}), file=nowhere, flush=True)
        seconds[0] += time.thread_time() - started

    with open(os.devnull, "w", encoding="utf-8") as nowhere, counted() as looks:
        harnessed(model, tell)
    steps = len(model.began)
    looks[time.perf_counter_ns] -= steps  # the model's own
    spent = seconds[0] + sum(number * cost_s(clock) for clock, number in looks.items())
    model.periods()
    harnessed(model)  # counting slows the steps down; their length comes from a run without it
    return spent / (statistics.median(model.periods()) * steps)


@contextmanager
def counted() -> Iterator[Counter[Callable[..., object]]]:
    """How often each clock and counter is asked inside."""
    looks: Counter[Callable[..., object]] = Counter()

    def see(frame: FrameType, event: str, what: Any) -> None:
        if event == "c_call" and what in _CLOCKS:
            looks[what] += 1

    sys.setprofile(see)
    try:
        yield looks
    finally:
        sys.setprofile(None)


def cost_s(clock: Callable[..., object]) -> float:
    """Seconds that one look takes with what is done around it: the call of a function of ours, an entry in a list."""
    arguments = (resource.RUSAGE_SELF,) if clock is resource.getrusage else ()
    kept: list[object] = []

    def look() -> object:
        return clock(*arguments)

    def many() -> float:
        started = time.perf_counter()
        for _ in range(1000):
            kept.append(look())
        kept.clear()
        return (time.perf_counter() - started) / 1000

    return min(many() for _ in range(5))


def by_accounting(share: float) -> Finding:
    """Below the limit or not: no noise can excuse it."""
    verdict = RECOVERED if share < LIMIT else NOT_RECOVERED
    expected = f"less than {100 * LIMIT:.0f} % of a step of 1 ms"
    return Finding("overhead by accounting", expected, f"{100 * share:.3f} %", verdict)


# -- by experiment ---------------------------------------------------------------------------------------------------


def alternated(model: Paced, pairs: int = PAIRS) -> tuple[list[float], list[float]]:
    """Median periods of a plain loop and of the harness, pair by pair, in ABBA order."""
    sides: tuple[tuple[Callable[[Paced], object], list[float]], ...] = ((plain, []), (harnessed, []))
    for pair in range(pairs):
        for run, taken in sides if pair % 2 == 0 else reversed(sides):
            run(model)
            taken.append(statistics.median(model.periods()))
    return sides[0][1], sides[1][1]


def by_experiment(without: list[float], with_: list[float]) -> Finding:
    """Decided where the whole interval lies on one side of the limit."""
    found = ratio(without, with_)
    verdict = RECOVERED if found.high < 1 + LIMIT else NOT_RECOVERED if found.low >= 1 + LIMIT else NOT_DECIDABLE
    measured = f"{_percent(found)} in {len(without)} pairs"
    return Finding("overhead by experiment", f"upper bound less than {100 * LIMIT:.0f} %", measured, verdict)


def _percent(found: Interval) -> str:
    return f"{100 * (found.value - 1):+.2f} % [{100 * (found.low - 1):+.2f}, {100 * (found.high - 1):+.2f}]"


# -- equal and unequal -----------------------------------------------------------------------------------------------

Rounds = list[list[float]]


def interleaved(products: int, rounds: int = ROUNDS) -> tuple[list[float], list[float], list[float]]:
    """TPOT by round as the task stores it: the arithmetic, the same under another name, and 5 % more of it."""
    models = [Paced(products), Paced(products), Paced(round(products * (1 + MORE)))]
    taken: Rounds = [[], [], []]
    for number in range(rounds):
        for side in ((0, 1, 2), (2, 0, 1), (1, 2, 0))[number % 3]:
            rows = harnessed(models[side])
            taken[side].append(statistics.median(m.value for m in rows if m.metric == "tpot_s" and m.value is not None))
    return taken[0], taken[1], taken[2]


def equal(found: Interval) -> bool:
    """Within noise: the interval lies within the threshold on both sides."""
    return found.low > 1 - THRESHOLD and found.high < 1 + THRESHOLD


def slower(found: Interval) -> bool:
    """The whole interval lies above 1, and it is no mere noise."""
    return found.low > 1 and not equal(found)


def told_apart(first: list[float], same: list[float], more: list[float]) -> tuple[Finding, Finding]:
    """Shares of draws in which A/A is within noise, and 5 % more is slower."""
    chance, equals, founds = np.random.default_rng(0), 0, 0
    for seed in range(DRAWS):
        drawn = chance.choice(len(first), DRAWN, replace=False)
        a, b, c = (np.asarray(side)[drawn].tolist() for side in (first, same, more))
        equals += equal(ratio(a, b, seed))
        founds += slower(ratio(a, c, seed))
    quartiles = statistics.quantiles(first, n=4, method="inclusive")
    quiet = (quartiles[2] - quartiles[0]) / quartiles[1] <= THRESHOLD
    return (
        _share("A/A within noise", equals / DRAWS, EQUAL_SHARE, quiet),
        _share(f"{100 * MORE:.0f} % more time found", founds / DRAWS, FOUND_SHARE, quiet),
    )


def _share(name: str, share: float, least: float, quiet: bool) -> Finding:
    verdict = NOT_DECIDABLE if not quiet else RECOVERED if share >= least else NOT_RECOVERED
    return Finding(name, f"in at least {100 * least:.0f} % of {DRAWS} draws", f"{100 * share:.0f} %", verdict)
