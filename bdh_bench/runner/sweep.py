"""Which learning rate does each family like? The same grid and the same number of trials for all, chosen on validation text.

A grid has at least four rates, evenly spaced on a log scale. While the best one lies on an edge, the grid grows there, a step at a time,
so that no family is given a rate only because the grid ended. The seeds of a sweep are not those of any comparison. Test documents are
not opened.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bdh_bench.errors import BenchError, SpecError
from bdh_bench.measure.host import environment
from bdh_bench.runner.training import train_model
from bdh_bench.spec import RunSpec

FEWEST_RATES = 4
MOST_EXTENSIONS = 4
#: Seeds of sweeps start here.
SEED = 1000

Train = Callable[[RunSpec], dict[str, Any]]


@dataclass(frozen=True)
class Trial:
    """One training of a sweep. ``bits`` per byte on validation text, infinite where training did not stay finite."""

    model: str
    parameters: int
    learning_rate: float
    seed: int
    bytes: int
    bits: float
    seconds: float
    extended: bool


def check_grid(rates: Sequence[float]) -> tuple[float, ...]:
    """The rates in order. Raises SpecError for fewer than four, or some that are no positive numbers."""
    grid = tuple(sorted(set(rates)))
    if len(grid) < FEWEST_RATES or not grid[0] > 0 or not math.isfinite(grid[-1]):
        raise SpecError(
            f"got the rates {', '.join(f'{r:g}' for r in rates)} · expected at least {FEWEST_RATES} positive numbers",
            "for example --rates 1e-3,2e-3,4e-3,8e-3",
        )
    return grid


def sweep(
    request: RunSpec, rates: Sequence[float], train: Train = lambda spec: train_model(spec, _quiet)
) -> Iterator[Trial]:
    """Every trial of every model, as it ends; the last ones of a model may extend its grid."""
    grid = check_grid(rates)
    for model in request.models:
        own = replace(request, models=(model,), seeds=(SEED,))
        trials = []
        for rate in grid:
            trials.append(_trial(own, rate, train, extended=False))
            yield trials[-1]
        for _ in range(MOST_EXTENSIONS):
            further = _beyond(trials)
            if further is None:
                break
            trials.append(_trial(own, further, train, extended=True))
            yield trials[-1]


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the fewest bits; of equal ones that with the smaller rate. Raises BenchError where none stayed finite."""
    found = min(trials, key=lambda t: (t.bits, t.learning_rate))
    if not math.isfinite(found.bits):
        raise BenchError(f"no rate of the grid trains {found.model}", "use smaller --rates")
    return found


def on_edge(trials: Sequence[Trial]) -> bool:
    """Whether the best rate is the smallest or the largest that was tried."""
    tried = [t.learning_rate for t in trials]
    return best(trials).learning_rate in (min(tried), max(tried))


def choices(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """For each model the rate that won, and what the grid looked like."""
    rows = []
    for model in dict.fromkeys(t.model for t in trials):
        own = [t for t in trials if t.model == model]
        won = best(own)
        rows.append(
            {
                "model": model,
                "learning_rate": won.learning_rate,
                "best": won.bits,
                "median": statistics.median(t.bits for t in own),
                "trials": len(own),
                "on_edge": on_edge(own),
            }
        )
    return rows


def as_rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """The trials under the names of the recorded sweeps; a training that did not stay finite has no bits."""
    return [
        {
            "model": t.model,
            "parameters": t.parameters,
            "learning_rate": t.learning_rate,
            "seed": t.seed,
            "bytes": t.bytes,
            "validation_bits_per_byte": t.bits if math.isfinite(t.bits) else None,
            "seconds": t.seconds,
            "extended": t.extended,
        }
        for t in trials
    ]


def as_csv(trials: Sequence[Trial]) -> str:
    """The same as CSV, after a line that says where it was measured."""
    facts = environment()
    versions = " ".join(f"{name} {value}" for name, value in facts["versions"].items())
    text = io.StringIO()
    text.write(f"# {facts['cpu']}, {facts['cores']} cores, Python {facts['python']}, {versions}\n")
    rows = as_rows(trials)
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _beyond(trials: Sequence[Trial]) -> float | None:
    """The next rate past the edge on which the best one lies; None where it lies inside."""
    tried = sorted(t.learning_rate for t in trials)
    found = best(trials).learning_rate
    if found == tried[0]:
        return tried[0] ** 2 / tried[1]
    if found == tried[-1]:
        return tried[-1] ** 2 / tried[-2]
    return None


def _trial(request: RunSpec, rate: float, train: Train, extended: bool) -> Trial:
    rate = float(f"{rate:.6g}")
    model, seed = request.models[0], request.seeds[0]
    try:
        done = train(replace(request, learning_rate=rate))
    except BenchError as error:
        if "loss is" not in error.message:
            raise
        return Trial(model, 0, rate, seed, request.train_bytes, math.inf, 0.0, extended)
    bits = done["validation_bits_per_byte"]
    if bits is None:
        raise SpecError("no validation document is long enough to choose a rate on", "use longer text")
    return Trial(model, done["parameters"], rate, seed, done["bytes"], bits, done["seconds"], extended)


def _quiet(phase: str, share: float, facts: dict[str, Any]) -> None: ...
