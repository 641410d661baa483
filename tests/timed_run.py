"""Times of known truth: rounds with an effect that all share, a spread between rounds, a spread between windows, and a run made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bdh_bench.results.store import CellOutcome, Run
from bdh_bench.types import Record

Truth = Mapping[str, Mapping[int, float]]


def rounds(
    generator: np.random.Generator,
    level: float,
    shared: Sequence[float],
    own: float = 0.004,
    windows: float = 0.006,
    count: int = 9,
) -> dict[int, list[float]]:
    """One quantity: ``level`` times what each round did to all, times chance of its own (standard deviations on logarithms)."""
    made = {}
    for number, effect in enumerate(shared, 1):
        place = effect + generator.normal(0, own)
        made[number] = list(level * np.exp(place + generator.normal(0, windows, count)))
    return made


def drift(generator: np.random.Generator, rounds_: int, spread: float = 0.05) -> list[float]:
    """What each round did to everything measured in it."""
    return list(generator.normal(0, spread, rounds_))


def records(
    model: str, context: int, values: Mapping[int, Sequence[float]], metric: str = "tpot_s", **changes: Any
) -> list[Record]:
    """Windows as stored rows."""
    plain = Record(
        run="timed", cell=f"{model}/{context}", attempt=1, model=model, family=model.split("@")[0], size="", task="latency", seed=0,
        metric=metric, metric_id=metric, value=None, context=context, batch_size=1, axes={"runtime": "eager"}, sample="", weight=1.0,
        repeat=0, status="ok", reason="", weights="random", facts={},
    )  # fmt: skip
    return [
        replace(plain, value=float(value), repeat=i, round=number, **changes)
        for number, windows in values.items()
        for i, value in enumerate(windows)
    ]


def run_of(rows: Sequence[Record], name: str = "timed", **manifest: Any) -> Run:
    """A run that holds these rows."""
    from pathlib import Path

    first = {(r.cell, r.task): r for r in reversed(rows)}
    cells = tuple(
        CellOutcome(
            key=r.cell, model=r.model, family=r.family, size="", task=r.task, seed=r.seed, context=r.context, metric=r.metric, status="ok",
            reason="", attempt=1, attempts=1, facts=r.facts, model_kind="transformer" if r.family == "llama" else "recurrent",
        )
        for r in reversed(first.values())
    )  # fmt: skip
    environment = {"cpu": "a processor", "cores": 2, "memory_bytes": 8 * 2**30, "versions": {"torch": "2.9"}}
    known = {"spec": {"device": "cpu", "threads": 1, "tasks": ["latency"]}, "environment": environment, **manifest}
    return Run(name, Path("/nonexistent"), known, cells, tuple(rows), ())


def timed_run(
    truth: Truth, rounds_: int = 7, seed: int = 0, name: str = "timed", spread: float = 0.05, **noise: Any
) -> Run:
    """model → context → seconds, each measured in rounds that are interleaved."""
    generator = np.random.default_rng(seed)
    shared = drift(generator, rounds_, spread)
    rows = [
        row
        for model, curve in truth.items()
        for context, level in curve.items()
        for row in records(model, context, rounds(generator, level, shared, **noise))
    ]
    return run_of(rows, name)
