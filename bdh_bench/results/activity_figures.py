"""Which picture shows how sparse a model is: the share of its activations (or rows of its memory) that are not zero, pass by pass?

From the task ``sparsity`` (a whole text, 95 % intervals over documents) and from ``latency`` (rows that the last decoded token
touched), each at its longest context. Layers are passes, from 0. Whoever shows no activity is named, not drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from bdh_bench.metrics import METRICS
from bdh_bench.results.contenders import Facts
from bdh_bench.results.display import shortened, tick
from bdh_bench.results.escaping import plain
from bdh_bench.results.figure import Axis, Figure, styles_of
from bdh_bench.results.lines import alt_of, dot_of, line_of, share_axis
from bdh_bench.results.tables import Point, row_names

_SHARES = ("key_density", "gate_density", "gated_density", "row_density")


def activity_figures(facts: Facts, points: Sequence[Point]) -> Iterator[Figure]:
    """One figure; without points, one without lines."""
    own = [p for p in points if p.metric in _SHARES]
    placed = [(layer, _bare(p)) for p in own if (layer := _layer(p)) is not None]
    longest: dict[tuple[str, str, str], int] = {}
    for _, p in placed:
        longest[p.model, p.task, p.metric] = max(p.context, longest.get((p.model, p.task, p.metric), 0))
    chosen = [(layer, p) for layer, p in placed if p.context == longest[p.model, p.task, p.metric]]
    names = row_names([p for _, p in chosen], facts.names)
    lines: dict[str, list[tuple[int, Point]]] = {}
    for layer, p in chosen:
        name = f"{names[p]}, {METRICS[p.metric].label} at {tick(p.context)}"
        lines.setdefault(f"{name}|{p.seed or 0}", []).append((layer, p))
    styles = styles_of((key, line[0][1].family) for key, line in lines.items())
    series = tuple(
        line_of(
            facts,
            line[0][1].model,
            key,
            key.rpartition("|")[0],
            styles[key],
            [dot_of(p, float(layer)) for layer, p in sorted(line, key=lambda one: one[0])],
        )
        for key, line in lines.items()
    )
    shown = {p.model for _, p in chosen}
    silent = dict.fromkeys(facts.label(p.model) for p in own if p.model not in shown)
    left_out = f"No activity to show: {', '.join(plain(shortened(name)) for name in silent)}." if silent else ""
    layers = sorted({layer for layer, _ in chosen})
    yield Figure(
        "activity",
        "Active share per layer",
        alt_of("Share of activations that are not zero, by layer", series, "share"),
        Axis("layer (pass)", "", "ordinal", tuple((float(layer), str(layer)) for layer in layers)),
        share_axis("share that is not zero"),
        series,
        notes=tuple(
            filter(
                None,
                (
                    "Keys, gates and their products over whole texts; rows of the memory as the last decoded token touched them. "
                    "Lower is sparser, which is neither better nor worse.",
                    left_out,
                ),
            )
        ),
    )


def _layer(point: Point) -> int | None:
    value = dict(point.axes).get("layer")
    return value if isinstance(value, int) else None


def _bare(point: Point) -> Point:
    """Without the layer, which changes along a line."""
    return replace(point, axes=tuple((name, value) for name, value in point.axes if name != "layer"))
