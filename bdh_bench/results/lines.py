"""How do points become lines: one per model and setting, with dots, gaps, ticks and remarks where a line ends early?

The yardstick (a model without learning) is a line in the style of the reference lines, whatever is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from bdh_bench.results.contenders import YARDSTICK, Facts
from bdh_bench.results.display import quantity, shortened, tick
from bdh_bench.results.escaping import plain
from bdh_bench.results.figure import REFERENCE_STYLE, Axis, Dot, Figure, Mark, Reference, Scale, Series, styles_of
from bdh_bench.results.tables import Point, row_names

#: Label, unit and scale of what is drawn upwards.
Upwards = tuple[str, str, Scale]
#: Ticks of an axis of shares.
SHARES = tuple((i / 5, f"{i / 5:g}") for i in range(6))


def against_context(
    facts: Facts,
    id_: str,
    title: str,
    points: Sequence[Point],
    y: Upwards,
    references: tuple[Reference, ...] = (),
    notes: Sequence[str] = (),
    x: tuple[str, str] = ("context", "bytes"),
) -> Figure:
    """One line per model and setting against a logarithmic context; ``y`` is label, unit and scale, ``x`` label and unit."""
    label, unit, scale = y
    chosen = [point for point in points if point.context > 0]
    names = row_names(chosen, facts.names)
    groups: dict[str, list[Point]] = {}
    for point in chosen:
        groups.setdefault(f"{names[point]}|{point.target_hash}|{point.seed or 0}", []).append(point)
    groups = {key: sorted(group, key=lambda p: p.context) for key, group in groups.items()}
    styles = styles_of((key, group[0].family) for key, group in groups.items())
    positive = scale == "log"
    series = tuple(
        line_of(facts, group[0].model, key, names[group[0]], styles[key], dots)
        for key, group in groups.items()
        for dots in [[dot_of(p, p.context, positive) for p in group]]
        if any(dot.y is not None for dot in dots)
    )
    drawn = {s.key for s in series}
    marks = tuple(
        mark for key, group in groups.items() if plain(key) in drawn for mark in _ends(facts, group, positive)
    )
    values = [dot.y for s in series for dot in s.points if dot.y is not None]
    left_out = [names[group[0]] for key, group in groups.items() if plain(key) not in drawn]
    extra = (
        [f"Not drawn, no value above 0: {', '.join(plain(shortened(name)) for name in left_out)}."] if left_out else []
    )
    contexts = tuple((float(c), tick(c)) for c in sorted({p.context for p in chosen}))
    return Figure(
        id_,
        title,
        alt_of(title, series, unit),
        Axis(*x, "log", contexts),
        value_axis(label, unit, scale, values),
        series,
        apart(references, values),
        marks,
        notes=(*notes, *extra),
    )


def apart(references: Sequence[Reference], values: Sequence[float]) -> tuple[Reference, ...]:
    """The references from low to high, with labels of near neighbours at opposite ends."""
    placed: list[Reference] = []
    heights = [*values, *(reference.value for reference in references)]
    near = 0.06 * (max(heights) - min(heights)) if heights else 0.0
    for reference in sorted(references, key=lambda r: r.value):
        crowded = placed and reference.value - placed[-1].value < near and placed[-1].side == "right"
        placed.append(replace(reference, side="left" if crowded else "right"))
    return tuple(placed)


def line_of(
    facts: Facts,
    model: str,
    key: str,
    label: str,
    style: tuple[str, str, str],
    dots: Sequence[Dot],
    legend: bool = True,
) -> Series:
    """A line; that of a yardstick looks like a reference."""
    owner = plain(facts.label(model))
    if facts.kind.get(model) == YARDSTICK:
        name = plain(shortened(f"{label} (no learning)"))
        return Series(plain(key), name, tuple(dots), "reference", *REFERENCE_STYLE, legend, owner)
    return Series(plain(key), plain(shortened(label)), tuple(dots), "measured", *style, legend, owner)


def share_axis(label: str) -> Axis:
    """From nothing to everything, with room for marks at both ends."""
    return Axis(label, "share", "linear", SHARES, (-0.03, 1.05))


def dot_of(point: Point, x: float, positive: bool = False) -> Dot:
    """A drawn point; what cannot stand on a logarithmic axis is a gap."""
    if point.value is None or (positive and point.value <= 0):
        return Dot(float(x), None, status=point.status)
    low, high = (None, None) if positive and point.low is not None and point.low <= 0 else (point.low, point.high)
    return Dot(float(x), float(point.value), low, high, point.status)


def _ends(facts: Facts, group: Sequence[Point], positive: bool) -> Iterable[Mark]:
    """Where the line of one series ends early, at its last value."""
    drawn = [p for p in group if p.value is not None and (not positive or p.value > 0)]
    if not drawn:
        return
    last = drawn[-1]
    after = [p for p in group if p.context > last.context and p.value is None]
    if after:
        kind = "stopped" if after[0].status == "unsupported" else "failed"
        word = "stopped" if kind == "stopped" else after[0].status
        name = plain(shortened(facts.label(last.model), 24))
        yield Mark(float(last.context), float(last.value or 0), f"{name} {word} at {tick(last.context)}", kind)


def alt_of(title: str, series: Sequence[Series], unit: str) -> str:
    """A sentence per line, for readers who do not see it."""
    parts = []
    for line in series:
        values = [dot for dot in line.points if dot.y is not None]
        if values:
            ends = f"{quantity(values[0].y, unit)} to {quantity(values[-1].y, unit)}"
            parts.append(f"{line.label} goes from {ends}")
    return f"{title}: {'; '.join(parts) or 'no values'}."


def value_axis(label: str, unit: str, scale: Scale, values: Iterable[float]) -> Axis:
    """An axis for bytes or seconds with readable ticks; logarithmic only where the values span more than a few doublings."""
    found = sorted(values)
    if unit == "share":
        return share_axis(label)
    if unit not in ("byte", "s", "FLOP") or not found:
        return Axis(label, unit, scale)
    if scale == "log" and found[-1] > 4 * found[0] > 0:
        return Axis(label, unit, "log", _power_ticks(found, unit))
    return Axis(label, unit, "linear", _even_ticks(found, unit))


def _power_ticks(found: Sequence[float], unit: str) -> tuple[tuple[float, str], ...]:
    """Powers of two for bytes, 1 2 5 for seconds, thinned to nine at most."""
    steps = [2.0**i for i in range(51)] if unit == "byte" else [m * 10.0**i for i in range(-9, 5) for m in (1, 2, 5)]
    inside = [step for step in steps if found[0] / 2 <= step <= found[-1] * 2]
    return tuple((value, quantity(value, unit)) for value in inside[:: -(-len(inside) // 9) or 1])


def _even_ticks(found: Sequence[float], unit: str) -> tuple[tuple[float, str], ...]:
    """Even steps that are round in the unit the reader sees."""
    base = 1024.0 if unit == "byte" else 1000.0
    rough = (found[-1] - found[0]) / 4
    if rough <= 0:
        return ((found[0], quantity(found[0], unit)),)
    prefix = base ** math.floor(math.log(rough, base))
    decade = 10 ** math.floor(math.log10(rough / prefix))
    step = next((m * decade * prefix for m in (1, 2, 5, 10) if m * decade * prefix >= rough), rough)
    first = math.floor(found[0] / step)
    ticks = [step * (first + i) for i in range(8) if step * (first + i) <= found[-1] + step]
    return tuple((value, quantity(value, unit)) for value in ticks)
