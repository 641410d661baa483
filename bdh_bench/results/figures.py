"""Which pictures does a run make, as data that no plotting library has touched?

Builders are pure: points → Figure. Ticks, colours, markers and dashes are decided here, so that every renderer shows the
same thing; renderers map and compute nothing. A gap is a point whose ``y`` is None: the line breaks there.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bdh_bench.metrics import METRICS
from bdh_bench.results.claims import references_of
from bdh_bench.results.contenders import CONTROLS, QUALITY
from bdh_bench.results.display import quantity, shortened, tick
from bdh_bench.results.escaping import plain
from bdh_bench.results.store import CellOutcome, Run
from bdh_bench.results.tables import Point, best_points, finite, row_names

Kind = Literal["measured", "analytic", "extrapolated"]
Scale = Literal["linear", "log"]


@dataclass(frozen=True)
class Axis:
    """Label, unit and scale; ``ticks`` are (value, text) pairs, empty for the renderer's own."""

    label: str
    unit: str
    scale: Scale
    ticks: tuple[tuple[float, str], ...] = ()

    @property
    def title(self) -> str:
        """The label, with the unit where neither it nor the ticks say it."""
        return f"{self.label} ({self.unit})" if self.unit not in ("", "byte", "s", "bit/byte") else self.label


@dataclass(frozen=True)
class Dot:
    """One drawn point; ``low`` and ``high`` bound its interval where there is one."""

    x: float
    y: float | None
    low: float | None = None
    high: float | None = None
    status: str = "ok"


@dataclass(frozen=True)
class Series:
    """One line."""

    key: str
    label: str
    points: tuple[Dot, ...]
    kind: Kind
    color: str
    marker: str
    dash: str


@dataclass(frozen=True)
class Reference:
    """A horizontal line."""

    label: str
    value: float
    dash: str


@dataclass(frozen=True)
class Mark:
    """A remark at a place: where a model stopped or a cell failed."""

    x: float
    y: float
    label: str
    kind: str


@dataclass(frozen=True)
class Figure:
    """One picture. ``alt`` says in words what it shows."""

    id: str
    title: str
    alt: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    references: tuple[Reference, ...] = ()
    marks: tuple[Mark, ...] = ()
    notes: tuple[str, ...] = ()


def to_json(figure: Figure) -> dict[str, Any]:
    """The figure as JSON values."""
    return asdict(figure)


def from_json(values: Mapping[str, Any]) -> Figure:
    """The figure that ``to_json`` wrote."""

    def axis(raw: Mapping[str, Any]) -> Axis:
        return Axis(**{**raw, "ticks": tuple((value, text) for value, text in raw["ticks"])})

    series = tuple(Series(**{**raw, "points": tuple(Dot(**dot) for dot in raw["points"])}) for raw in values["series"])
    return Figure(
        **{
            **values,
            "x": axis(values["x"]),
            "y": axis(values["y"]),
            "series": series,
            "references": tuple(Reference(**raw) for raw in values["references"]),
            "marks": tuple(Mark(**raw) for raw in values["marks"]),
            "notes": tuple(values["notes"]),
        }
    )


# -- style -----------------------------------------------------------------------------------------------------------

#: Okabe and Ito's colours; black is left out because the page has a dark side too.
COLORS = {
    "vermillion": "#D55E00",
    "blue": "#0072B2",
    "sky": "#56B4E9",
    "green": "#009E73",
    "orange": "#E69F00",
    "purple": "#CC79A7",
    "yellow": "#C9B800",  # darkened: the original vanishes on white
    "grey": "#808080",
}
MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "pentagon")
DASHES = ("solid", "dash", "dashdot", "longdash", "dot")
#: family → colour, marker, dash: the same in every report.
FAMILY_STYLE: dict[str, tuple[str, str, str]] = {
    "bdh": (COLORS["vermillion"], "circle", "solid"),
    "gpt2": (COLORS["blue"], "square", "dash"),
    "llama": (COLORS["sky"], "diamond", "dash"),
    "mamba": (COLORS["green"], "triangle-up", "dashdot"),
    "mamba2": (COLORS["orange"], "triangle-down", "dashdot"),
    "linear_attention": (COLORS["purple"], "cross", "longdash"),
    "lstm": (COLORS["yellow"], "star", "longdash"),
    "toy": (COLORS["grey"], "pentagon", "dot"),
}


def styles_of(names: Iterable[tuple[str, str]]) -> dict[str, tuple[str, str, str]]:
    """(series key, family) → colour, marker, dash; a second series of a family keeps the colour, not the shape."""
    styles: dict[str, tuple[str, str, str]] = {}
    taken: set[tuple[str, str]] = set()
    for key, family in names:
        color, marker, dash = FAMILY_STYLE.get(family) or _hashed_style(family)
        start = MARKERS.index(marker)
        turn = next((i for i in range(len(MARKERS)) if (color, MARKERS[(start + i) % len(MARKERS)]) not in taken), 0)
        marker = MARKERS[(start + turn) % len(MARKERS)]
        taken.add((color, marker))
        styles[key] = (color, marker, DASHES[(DASHES.index(dash) + turn) % len(DASHES)])
    return styles


def _hashed_style(family: str) -> tuple[str, str, str]:
    """A style for a family that nobody gave one: from its name, so that it stays the same from report to report."""
    code = zlib.crc32(family.encode("utf-8", "replace"))
    colors = list(COLORS.values())
    return colors[code % len(colors)], MARKERS[code // 8 % len(MARKERS)], DASHES[code // 64 % len(DASHES)]


# -- builders --------------------------------------------------------------------------------------------------------


def figures_of(run: Run, points: Sequence[Point]) -> tuple[Figure, ...]:
    """The figures for which the run has at least one value."""
    shown = best_points(points)
    built = (
        quality_vs_context(shown, references_of(run), _train_context(run), _carried(run)),
        memory_vs_context(shown),
        peak_vs_context(shown),
        latency_vs_context(shown, "prefill_s"),
        latency_vs_context(shown, "tpot_s"),
        pareto(shown),
        training_curves(run.cells),
    )
    return tuple(figure for figure in built if any(dot.y is not None for s in figure.series for dot in s.points))


def quality_vs_context(
    points: Sequence[Point],
    references: Sequence[tuple[str, float, str]] = (),
    train_context: int | None = None,
    carried: bool = False,
) -> Figure:
    """Bits per byte of the same targets against context; a model with a position limit is drawn as stopped."""
    everyone = [point for point in points if point.metric == QUALITY]
    chosen = [point for point in everyone if point.family not in CONTROLS] or everyone
    hashes = {point.target_hash for point in chosen}
    lines = tuple(
        Reference(plain(shortened(name)), value, "dot") for name, value, target in references if target in hashes | {""}
    )
    notes = ["Every model and every context scores the same bytes; lower is better."]
    if len(chosen) < len(everyone):
        notes.append("Controls are in the tables only: their scores would flatten the picture.")
    if train_context:
        meaning = (
            "with a state carried through documents; no gradient reached further back."
            if carried
            else "what lies right of it is extrapolation."
        )
        notes.append(f"Models trained in this run saw {train_context:,} bytes at a time; {meaning}")
    return _against_context(
        "quality", "Quality against context", chosen, "bits per byte", "bit/byte", "linear", lines, notes
    )


def memory_vs_context(points: Sequence[Point]) -> Figure:
    """State bytes against context, both logarithmic."""
    chosen = [point for point in points if point.metric == "state_bytes"]
    notes = ["The tensors that must survive until the next token, counted; a flat line is a state that never grows."]
    return _against_context("memory", "State against context", chosen, "state", "byte", "log", (), notes)


def peak_vs_context(points: Sequence[Point]) -> Figure:
    """Peak footprint of the process against context."""
    chosen = [point for point in points if point.metric == "peak_footprint_bytes"]
    notes = ["High-water mark of the whole process, weights and program included."]
    return _against_context("peak", "Peak memory against context", chosen, "peak footprint", "byte", "log", (), notes)


def latency_vs_context(points: Sequence[Point], metric: str) -> Figure:
    """One time against context, both logarithmic."""
    label = METRICS[metric].label
    notes = ["Median of the repeats inside one process: a single round decides no ranking."]
    chosen = [point for point in points if point.metric == metric]
    id_ = metric.removesuffix("_s")
    return _against_context(id_, f"{label.capitalize()} against context", chosen, label, "s", "log", (), notes)


def pareto(points: Sequence[Point]) -> Figure:
    """Bits per byte against state bytes: one path per model over the contexts that have both."""
    state = {(p.model, p.context): p for p in reversed(points) if p.metric == "state_bytes" and p.value}
    pairs = [
        (q, float(s.value))
        for q in points
        if q.metric == QUALITY and q.value is not None and (s := state.get((q.model, q.context))) and s.value
    ]
    styles = styles_of(dict.fromkeys((p.model, p.family) for p, _ in pairs))
    series = tuple(
        _series(model, model, styles[model], [_dot(p, x) for p, x in pairs if p.model == model])
        for model in dict.fromkeys(p.model for p, _ in pairs)
    )
    return Figure(
        "pareto",
        "Quality against state",
        _alt("Bits per byte against bytes of state", series, "bit/byte"),
        _value_axis("state per stream", "byte", "log", [x for _, x in pairs]),
        Axis("bits per byte", "bit/byte", "linear"),
        series,
        notes=("Down and to the left is better. Each path goes from short to long contexts.",),
    )


def training_curves(cells: Sequence[CellOutcome]) -> Figure:
    """Bits per byte during training against bytes read."""
    curves: dict[str, tuple[str, list[Dot]]] = {}
    several = len({cell.seed for cell in cells}) > 1
    for cell in cells:
        curve = (cell.facts.get("training") or {}).get("curve") or []
        key = f"{cell.model} · seed {cell.seed}" if several else cell.model
        dots = [dot for row in curve if (dot := _curve_dot(row))]
        if dots:
            curves.setdefault(key, (cell.family, dots))  # cells of one model share one checkpoint
    styles = styles_of((key, family) for key, (family, _) in curves.items())
    series = tuple(_series(key, key, styles[key], dots) for key, (_, dots) in curves.items())
    return Figure(
        "training",
        "Training",
        _alt("Training loss against bytes read", series, "bit/byte"),
        Axis("bytes read", "", "linear"),
        Axis("bits per byte", "bit/byte", "linear"),
        series,
        notes=("Loss on the training text as it was read; validation figures are in the table of models.",),
    )


def _curve_dot(row: Sequence[Any]) -> Dot | None:
    x, y = (finite(row[0]), finite(row[1])) if isinstance(row, list | tuple) and len(row) >= 2 else (None, None)
    return None if x is None else Dot(float(x), None if y is None else float(y))


def _against_context(
    id_: str,
    title: str,
    points: Sequence[Point],
    label: str,
    unit: str,
    scale: Scale,
    references: tuple[Reference, ...],
    notes: Sequence[str],
) -> Figure:
    chosen = [point for point in points if point.context > 0]
    names = row_names(chosen)
    groups: dict[str, list[Point]] = {}
    for point in chosen:
        groups.setdefault(f"{names[point]}|{point.target_hash}|{point.seed or 0}", []).append(point)
    groups = {key: sorted(group, key=lambda p: p.context) for key, group in groups.items()}
    styles = styles_of((key, group[0].family) for key, group in groups.items())
    positive = scale == "log"
    series = tuple(
        _series(key, names[group[0]], styles[key], [_dot(p, p.context, positive) for p in group])
        for key, group in groups.items()
        if any(dot.y is not None for dot in (_dot(p, p.context, positive) for p in group))
    )
    drawn = {s.key for s in series}
    marks = tuple(mark for key, group in groups.items() if key in drawn for mark in _marks(group, positive))
    values = [dot.y for s in series for dot in s.points if dot.y is not None]
    left_out = [names[group[0]] for key, group in groups.items() if key not in drawn]
    extra = (
        [f"Not drawn, no value above 0: {', '.join(plain(shortened(name)) for name in left_out)}."] if left_out else []
    )
    contexts = tuple((float(c), tick(c)) for c in sorted({p.context for p in chosen}))
    return Figure(
        id_,
        title,
        _alt(title, series, unit),
        Axis("context", "bytes", "log", contexts),
        _value_axis(label, unit, scale, values),
        series,
        references,
        marks,
        (*notes, *extra),
    )


def _series(key: str, label: str, style: tuple[str, str, str], dots: Sequence[Dot]) -> Series:
    return Series(plain(key), plain(shortened(label)), tuple(dots), "measured", *style)


def _dot(point: Point, x: float, positive: bool = False) -> Dot:
    """A drawn point; what cannot stand on a logarithmic axis is a gap."""
    if point.value is None or (positive and point.value <= 0):
        return Dot(float(x), None, status=point.status)
    low, high = (None, None) if positive and point.low is not None and point.low <= 0 else (point.low, point.high)
    return Dot(float(x), float(point.value), low, high, point.status)


def _marks(group: Sequence[Point], positive: bool) -> Iterable[Mark]:
    """Where the line of one series ends early, at its last value."""
    drawn = [p for p in group if p.value is not None and (not positive or p.value > 0)]
    if not drawn:
        return
    last = drawn[-1]
    after = [p for p in group if p.context > last.context and p.value is None]
    if after:
        kind = "stopped" if after[0].status == "unsupported" else "failed"
        word = "stopped" if kind == "stopped" else after[0].status
        name = plain(shortened(last.family if last.family not in CONTROLS else last.model, 24))
        yield Mark(float(last.context), float(last.value or 0), f"{name} {word} at {tick(last.context)}", kind)


def _alt(title: str, series: Sequence[Series], unit: str) -> str:
    """A sentence per line, for readers who do not see it."""
    parts = []
    for line in series:
        values = [dot for dot in line.points if dot.y is not None]
        if values:
            ends = f"{quantity(values[0].y, unit)} to {quantity(values[-1].y, unit)}"
            parts.append(f"{line.label} goes from {ends}")
    return f"{title}: {'; '.join(parts) or 'no values'}."


def _value_axis(label: str, unit: str, scale: Scale, values: Iterable[float]) -> Axis:
    """An axis for bytes or seconds with readable ticks; logarithmic only where the values span more than a few doublings."""
    found = sorted(values)
    if unit not in ("byte", "s") or not found:
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


def _train_context(run: Run) -> int | None:
    spec = run.manifest.get("spec") or {}
    value = finite(spec.get("train_context"))
    trained = any(cell.facts.get("weights") == "trained" for cell in run.cells)
    return int(value) if value and trained else None


def _carried(run: Run) -> bool:
    return (run.manifest.get("spec") or {}).get("regime") == "carried"
