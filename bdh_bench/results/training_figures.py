"""Which pictures does training make: bits per byte against bytes read, operations spent and seconds gone?

A curve is stored as rows of bytes, bits per byte and seconds. Operations are bytes times the operations per byte of the training
that the fairness card shows. A model without that count (or a curve without times) is left out of that picture, which names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bdh_bench.results.contenders import Facts
from bdh_bench.results.display import shortened
from bdh_bench.results.escaping import plain
from bdh_bench.results.figure import Axis, Dot, Figure, styles_of
from bdh_bench.results.lines import alt_of, line_of, value_axis
from bdh_bench.results.tables import finite

#: Dots of a curve, at the most.
_MOST = 48


@dataclass(frozen=True)
class Step:
    """One stored row of a curve; what it does not hold is None."""

    bytes: float
    bits: float | None
    flops: float | None
    seconds: float | None


#: (model, seed) → its curve
Curves = Mapping[tuple[str, int], tuple[Step, ...]]


def training_figures(facts: Facts) -> Iterator[Figure]:
    """The same curves against three costs; without curves, figures without lines."""
    curves = curves_of(facts)
    note = "Loss on the training text as it was read; validation figures are in the table of models."
    counted = "Operations are bytes read times the operations per byte of the fairness card (3 × forward at T/2)."
    timed = "Wall-clock of this machine, with whatever else it did: no ranking follows."
    yield _figure(facts, curves, "training", ("bytes read", ""), lambda step: step.bytes, (note,))
    yield _figure(facts, curves, "training-flops", ("operations", "FLOP"), lambda step: step.flops, (note, counted))
    yield _figure(facts, curves, "training-seconds", ("wall-clock", "s"), lambda step: step.seconds, (note, timed))


def curves_of(facts: Facts) -> Curves:
    """The curve of every model and seed, from the first cell that has one: cells of one model share a checkpoint."""
    found: dict[tuple[str, int], tuple[Step, ...]] = {}
    for cell in facts.run.cells:
        training = cell.facts.get("training")
        steps = _steps(training) if isinstance(training, Mapping) else ()
        if steps:
            found.setdefault((cell.model, cell.seed), steps)
    return found


def _steps(training: Mapping[str, Any]) -> tuple[Step, ...]:
    curve, per_byte = training.get("curve"), flops_per_byte(training)
    steps = []
    for row in curve if isinstance(curve, list | tuple) else ():
        known = [finite(value) for value in row] if isinstance(row, list | tuple) else []
        read, bits, seconds = (*known, None, None, None)[:3]
        if read is not None:
            flops = None if per_byte is None else read * per_byte
            steps.append(Step(float(read), bits, flops, seconds))
    every = -(-len(steps) // _MOST)
    return tuple(steps if every < 2 else [*steps[:-1:every], steps[-1]])


def flops_per_byte(training: Mapping[str, Any]) -> float | None:
    """Operations of the whole training over its bytes; None where either is missing."""
    flops, read = finite(training.get("flops")), finite(training.get("bytes"))
    return flops / read if flops and read else None


def _figure(
    facts: Facts,
    curves: Curves,
    id_: str,
    x: tuple[str, str],
    cost: Callable[[Step], float | None],
    notes: tuple[str, ...],
) -> Figure:
    label, unit = x
    lines = {
        key: [Dot(at, step.bits) for step in curve if (at := cost(step)) is not None] for key, curve in curves.items()
    }
    styles = styles_of((model, facts.family[model]) for model in dict.fromkeys(model for model, _ in curves))
    drawn = {key: dots for key, dots in lines.items() if dots}
    first = {model: seed for model, seed in reversed(drawn)}  # the seeds of a model share its style and one entry
    series = tuple(
        line_of(facts, model, f"{model}|{seed}", facts.label(model), styles[model], dots, first[model] == seed)
        for (model, seed), dots in drawn.items()
    )
    missing = [
        plain(shortened(facts.label(model))) for model in dict.fromkeys(m for m, _ in curves) if model not in first
    ]
    extra = (f"Not drawn, {label} not known: {', '.join(missing)}.",) if missing else ()
    return Figure(
        id_,
        "Training" if id_ == "training" else f"Training against {label}",
        alt_of(f"Training loss against {label}", series, "bit/byte"),
        value_axis(label, unit, "linear", [dot.x for dots in drawn.values() for dot in dots]),
        Axis("bits per byte", "bit/byte", "linear"),
        series,
        notes=(*notes, *extra),
    )
