"""Which pictures does a memory budget make: what all streams that fit decode per second, how many they are, and what one of them takes?

Whether the KV cache is the bottleneck is read here: its streams take more at every longer context, so fewer of them share a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bdh_bench.results.capacity import ALONE, FOOTPRINT, STREAMS, TOGETHER
from bdh_bench.results.contenders import Facts
from bdh_bench.results.display import count, quantity, shortened, tick
from bdh_bench.results.escaping import plain
from bdh_bench.results.figure import Figure, Mark, Reference
from bdh_bench.results.heat_maps import Row, Scored, heat_map
from bdh_bench.results.lines import Upwards, against_context
from bdh_bench.results.tables import Point, finite, row_names

_ROUND = "Each batch was timed in one process: no ranking follows."


def capacity_figures(facts: Facts, points: Sequence[Point]) -> tuple[Figure, ...]:
    """Throughput, streams and the footprint of one stream against context; without points, figures without lines."""
    return throughput(facts, points), streams(facts, points), streams_map(facts, points), one_stream(facts, points)


def throughput(facts: Facts, points: Sequence[Point]) -> Figure:
    """Tokens per second of all streams that fit, and of a single one, against context."""
    names = {TOGETHER: "all that fit", ALONE: "one"}
    chosen = [_named(p, "streams", names[p.metric]) for p in points if p.metric in names]
    notes = [f"Decoding, with as many streams as fit {_budget(points)}, and with one stream. {_ROUND}"]
    y: Upwards = ("tokens per second", "token/s", "log")
    return against_context(facts, "throughput", "Throughput within a memory budget", chosen, y, (), notes)


def streams(facts: Facts, points: Sequence[Point]) -> Figure:
    """How many streams fit, against context."""
    chosen = [point for point in points if point.metric == STREAMS]
    notes = [f"The largest batch whose process stayed within {_budget(points)}; which ones did not is in the tables."]
    y: Upwards = ("streams", "stream", "log")
    return against_context(facts, "streams", "Streams within a memory budget", chosen, y, (), notes)


def streams_map(facts: Facts, points: Sequence[Point]) -> Figure:
    """The same streams as a map: a row per model and budget, a column per context."""
    chosen = [point for point in points if point.metric == STREAMS]
    names = row_names(chosen, facts.names)
    notes = (
        f"The largest batch within {_budget(points)}. Yellow is more, blue is fewer; hatched is no value, with why.",
    )
    z = Scored("streams", count, "log")
    rows = [Row(p.model, names[p], p.task, "", p) for p in chosen]
    return heat_map(facts, "streams-map", "Largest batch by model and context", rows, z, "model", notes)


def one_stream(facts: Facts, points: Sequence[Point]) -> Figure:
    """The footprint of a process with one stream against context, and × on the budget where it does not fit."""
    chosen = [point for point in points if point.metric == FOOTPRINT and point.batch_size == 1]
    budgets = sorted({float(b) for p in chosen if (b := finite(dict(p.axes).get("budget"))) is not None})
    lines = tuple(Reference(f"budget {quantity(budget, 'byte')}", budget, "dot") for budget in budgets)
    notes = ["Program, weights, state and workspace of one process with one stream."]
    y: Upwards = ("footprint of one stream", "byte", "log")
    drawn = against_context(facts, "one-stream", "Memory of one stream", chosen, y, lines, notes)
    failed = tuple(_failed(facts, p) for p in chosen if p.value is None and p.status.startswith("oom"))
    return replace(drawn, marks=(*(mark for mark in drawn.marks if mark.kind == "stopped"), *failed))


def _failed(facts: Facts, point: Point) -> Mark:
    name = plain(shortened(facts.label(point.model), 24))
    at = float(finite(dict(point.axes).get("budget")) or 0)
    return Mark(float(point.context), at, f"{name}: one stream does not fit at {tick(point.context)}", "failed")


def _named(point: Point, axis: str, value: str) -> Point:
    """The point with what tells its line apart, and without the size of its batch, which changes along it."""
    return replace(point, batch_size=1, axes=(*point.axes, (axis, value)))


def _budget(points: Sequence[Point]) -> str:
    found = {dict(point.axes).get("budget") for point in points if point.metric == STREAMS}
    sizes = sorted(float(b) for value in found if (b := finite(value)) is not None)
    return " and ".join(quantity(size, "byte") for size in sizes) or "the budget"
