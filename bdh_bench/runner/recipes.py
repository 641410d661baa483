"""How does a request say that each model is trained? Regime, learning rate and matching, checked before anything heavy is loaded."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from bdh_bench import registry
from bdh_bench.errors import SpecError, UnknownNameError
from bdh_bench.spec import ModelSpec, RunSpec
from bdh_bench.training.recipe import check_regime

#: The axes on which models can be made equal; ``matching`` says what each does.
MATCHES = ("params", "bytes", "flops", "wallclock", "state")

#: The sweep behind the families' default learning rates.
RECORDED = "results/learning-rate-sweep-quick.csv"


def regime_of(model: ModelSpec, spec: RunSpec) -> str:
    """The regime of one model: its own option, else that of the run. Raises UnknownNameError."""
    regime = model.option("regime") or spec.regime
    check_regime(regime)
    return regime


def rate_of(model: ModelSpec, spec: RunSpec, usual: float = 0.0) -> float:
    """The peak learning rate of one model: its own option, that of the run, ``usual``, or the family's default. Raises SpecError."""
    own = model.option("learning_rate")
    rate = _number(own) if own else spec.learning_rate
    rate = rate or usual or float(registry.find("models", model.family).defaults.get("learning_rate", 0.0))
    if not rate > 0:
        got = f"got learning_rate={own}" if own else f"{model.family} has no default learning rate"
        raise SpecError(f"{got} · expected a number greater than 0", "give learning_rate=… or --learning-rate")
    return rate


def rate_source(model: ModelSpec, spec: RunSpec) -> dict[str, Any]:
    """Where the learning rate of a model comes from, for the fairness card: ``source``, and of a sweep its ``grid``.

    The sweep behind a family's default is known where its record is beside the package, as in a checkout.
    """
    if model.option("learning_rate"):
        return {"source": "given with the model", "grid": []}
    if spec.learning_rate:
        return {"source": "given for the run", "grid": []}
    grid, sizes = _swept(model.family)
    where = f" ({RECORDED}, at {sizes} parameters)" if grid else ""
    return {"source": f"default of the family{where}", "grid": list(grid)}


@lru_cache
def _swept(family: str) -> tuple[tuple[float, ...], str]:
    """The rates that were tried for a family's default, and at how many parameters; nothing where no record is found."""
    try:
        lines = (Path(__file__).parents[2] / RECORDED).read_text(encoding="utf-8").splitlines()
    except OSError:
        return (), ""
    rows = [row for row in csv.DictReader(line for line in lines if not line.startswith("#")) if row["model"] == family]
    rates = sorted({float(row["learning_rate"]) for row in rows})
    return tuple(rates), " and ".join(sorted({f"{int(row['parameters']):,}" for row in rows}))


def _number(text: str) -> float:
    try:
        return float(text) or -1.0
    except ValueError:
        return -1.0


def check_training(spec: RunSpec, models: Iterable[ModelSpec]) -> None:
    """Raise SpecError or UnknownNameError for a training that cannot be carried out as written."""
    check_regime(spec.regime)
    for model in models:
        regime_of(model, spec)
        if model.option("learning_rate"):
            rate_of(model, spec)
    if spec.match not in MATCHES:
        raise UnknownNameError("matching", spec.match, MATCHES)
    if (spec.match == "wallclock") != (spec.train_seconds > 0):
        raise SpecError(
            f"got --match {spec.match} and --train-seconds {spec.train_seconds:g} · expected both for wallclock, else neither",
            "for example --match wallclock --train-seconds 120",
        )
