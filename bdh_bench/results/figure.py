"""What is a picture, as data that no plotting library has touched, and how does a family of models look?

Ticks, colours, markers and dashes are decided here and by the builders, so that every renderer shows the same thing; renderers map and
compute nothing. A gap is a point whose ``y`` is None: the line breaks there.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bdh_bench.results.display import quantity

#: What a line is; a ``reference`` competes with nobody and looks like a reference line.
Kind = Literal["measured", "analytic", "extrapolated", "reference"]
#: ``ordinal``: places at equal distances, named by their ticks.
Scale = Literal["linear", "log", "ordinal"]


#: Units that a number carries itself, with a prefix ("" has none).
PREFIXED = ("", "byte", "s", "FLOP")
#: Status of a dot that only ends a line before the next group of places.
BREAK = "break"


@dataclass(frozen=True)
class Axis:
    """Label, unit and scale; ``ticks`` are (value, text) pairs, empty for the renderer's own, ``span`` the ends where they are fixed."""

    label: str
    unit: str
    scale: Scale
    ticks: tuple[tuple[float, str], ...] = ()
    span: tuple[float, float] | None = None

    @property
    def title(self) -> str:
        """The label, with the unit where neither it nor the ticks say it."""
        return f"{self.label} ({self.unit})" if self.unit not in (*PREFIXED, "bit/byte", "share") else self.label

    def read(self, x: float) -> str:
        """What a place on the axis says."""
        if self.scale == "ordinal":
            return dict(self.ticks).get(x, "")
        return quantity(x, self.unit) if self.unit in PREFIXED and self.unit else f"{x:,.0f}"


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
    """One line. Without ``legend`` it shares the entry of another line of its label (another seed).

    ``model`` is the short name by which a reader shows and hides it.
    A ``ribbon`` is drawn between the ends of the intervals, where a bar at each point would be hard to follow.
    """

    key: str
    label: str
    points: tuple[Dot, ...]
    kind: Kind
    color: str
    marker: str
    dash: str
    legend: bool = True
    model: str = ""
    ribbon: bool = False


@dataclass(frozen=True)
class Reference:
    """A horizontal line, with its label at one end of it."""

    label: str
    value: float
    dash: str
    side: Literal["left", "right"] = "right"


@dataclass(frozen=True)
class Mark:
    """A remark at a place: where a model stopped or a cell failed."""

    x: float
    y: float
    label: str
    kind: str


@dataclass(frozen=True)
class Band:
    """A shaded stretch of the axis below, with what it is written inside its upper left corner."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Cell:
    """One square of a map, one wide and one high: its value as it is written in it, and its ``shade`` from 0 (least) to 1 (most).

    Without a value there is no shade: it is hatched, ``text`` is a word for why, and ``status`` says it all.
    """

    x: float
    y: float
    value: float | None
    text: str
    shade: float | None
    status: str = "ok"


@dataclass(frozen=True)
class Heat:
    """The squares of one model (short name ``model``): a whole rectangle of neighbouring places."""

    key: str
    label: str
    cells: tuple[Cell, ...]
    model: str = ""

    @property
    def columns(self) -> tuple[float, ...]:
        """Places along x, from left to right."""
        return tuple(sorted({cell.x for cell in self.cells}))

    @property
    def rows(self) -> tuple[float, ...]:
        """Places along y, from below."""
        return tuple(sorted({cell.y for cell in self.cells}))

    def shades(self) -> list[list[float | None]]:
        """A row per place along y, a column per place along x."""
        at = {(cell.x, cell.y): cell.shade for cell in self.cells}
        return [[at.get((x, y)) for x in self.columns] for y in self.rows]


@dataclass(frozen=True)
class Figure:
    """One picture. ``alt`` says in words what it shows, ``z`` what a square of a map is; ``height`` is in usual heights."""

    id: str
    title: str
    alt: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    references: tuple[Reference, ...] = ()
    marks: tuple[Mark, ...] = ()
    bands: tuple[Band, ...] = ()
    notes: tuple[str, ...] = ()
    heats: tuple[Heat, ...] = ()
    z: str = ""
    height: float = 1.0

    @property
    def empty(self) -> bool:
        """Whether there is no value to draw."""
        lines = (dot.y for line in self.series for dot in line.points)
        return all(value is None for value in (*lines, *(cell.value for heat in self.heats for cell in heat.cells)))


def to_json(figure: Figure) -> dict[str, Any]:
    """The figure as JSON values."""
    return asdict(figure)


def from_json(values: Mapping[str, Any]) -> Figure:
    """The figure that ``to_json`` wrote."""

    def axis(raw: Mapping[str, Any]) -> Axis:
        ticks = tuple((value, text) for value, text in raw["ticks"])
        return Axis(**{**raw, "ticks": ticks, "span": tuple(raw["span"]) if raw["span"] else None})

    series = tuple(Series(**{**raw, "points": tuple(Dot(**dot) for dot in raw["points"])}) for raw in values["series"])
    return Figure(
        **{
            **values,
            "x": axis(values["x"]),
            "y": axis(values["y"]),
            "series": series,
            "references": tuple(Reference(**raw) for raw in values["references"]),
            "marks": tuple(Mark(**raw) for raw in values["marks"]),
            "bands": tuple(Band(**raw) for raw in values["bands"]),
            "notes": tuple(values["notes"]),
            "heats": tuple(
                Heat(**{**raw, "cells": tuple(Cell(**cell) for cell in raw["cells"])}) for raw in values["heats"]
            ),
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
#: From least to most, for every eye: nine stops of cividis (Nuñez, Anderton and Renslow, 2018).
SHADES = ("#00224e", "#1a386f", "#434e6c", "#61656f", "#7d7c78", "#9b9476", "#bcae6c", "#dec958", "#fee838")
MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "pentagon")
DASHES = ("solid", "dash", "dashdot", "longdash", "dot")
#: How whatever competes with nobody is drawn.
REFERENCE_STYLE = (COLORS["grey"], "circle", "dot")
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


def ink_on(shade: float) -> str:
    """The colour of writing that stands out on a shade."""
    return "#ffffff" if shade < 0.5 else "#000000"


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
