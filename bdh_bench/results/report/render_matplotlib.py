"""How does a figure become a static picture? SVG text: for paper, for print, and for a page without scripts.

The same figure gives the same bytes: ids are salted by the figure's id, no date is written, text stays text. Ink and grid
are CSS variables, so that the picture follows the page into the dark.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from typing import Any
from xml.sax.saxutils import quoteattr

from bdh_bench.results.escaping import plain
from bdh_bench.results.figure import SHADES, Axis, Figure, Heat, Series, ink_on

_INK, _GRID = "#333333", "#dddddd"
_MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
    "cross": "x",
    "star": "*",
    "pentagon": "p",
}
_DASHES: dict[str, Any] = {"solid": "-", "dash": "--", "dashdot": "-.", "dot": ":", "longdash": (0, (8, 3))}
_MARK_SYMBOLS = {"stopped": "|", "failed": "x", "half": "+", "crossing": "d"}
#: A hundredth of a point is finer than any screen; the rest is weight.
_DECIMALS = re.compile(r"(\d\.\d\d)\d+")
_FONT = "'DejaVu Sans', sans-serif"  # of the whole picture
#: Ids by which series, references and marks are found.
_OURS = re.compile(r"(?:series|ribbon|band|reference|mark|heat|gap)-\d")
_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "hatch.linewidth": 0.4,
}


#: Formats for papers and slides.
PICTURES = ("svg", "pdf", "png")


def to_picture(figure: Figure, format_: str) -> bytes:
    """The figure as a file of its own in one of PICTURES, black on white; the same figure gives the same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    dates = {"svg": ("Date",), "pdf": ("CreationDate", "ModDate")}.get(format_, ())
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": figure.id, "pdf.fonttype": 42}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        canvas = Canvas(figsize=(7.2, 4.4 * figure.height), layout="constrained")
        _draw(canvas.subplots(), figure)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format=format_, dpi=200, metadata=dict.fromkeys(dates))
    return buffer.getvalue()


def to_svg(figure: Figure) -> str:
    """The figure as one ``<svg>`` element; every series, reference and mark carries its key as group id."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": figure.id}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # text stays text: the reader's fonts draw it
        canvas = Canvas(figsize=(7.2, 4.4 * figure.height), layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.subplots()
        _draw(axes, figure)
        buffer = io.StringIO()
        canvas.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _cleaned(buffer.getvalue(), figure)


def _draw(axes: Any, figure: Figure) -> None:
    for axis, set_scale in ((figure.x, axes.set_xscale), (figure.y, axes.set_yscale)):
        set_scale("linear" if axis.scale == "ordinal" else axis.scale)
    for number, band in enumerate(figure.bands):
        axes.axvspan(band.start, band.end, color="#808080", alpha=0.13, linewidth=0, zorder=0, gid=f"band-{number}")
        place, offset = (band.start, 1), {"xytext": (3, -3), "textcoords": "offset points"}
        axes.annotate(band.label, place, xycoords=("data", "axes fraction"), va="top", fontsize=7.5, **offset)
    for number, line in enumerate(figure.series):
        _draw_series(axes, line, number)
    for number, heat in enumerate(figure.heats):
        _draw_heat(axes, heat, number)
    for number, reference in enumerate(figure.references):
        axes.axhline(
            reference.value, color="#808080", linestyle=_DASHES[reference.dash], linewidth=1, gid=f"reference-{number}"
        )
        axes.annotate(
            reference.label,
            (1 if reference.side == "right" else 0.01, reference.value),
            xycoords=("axes fraction", "data"),
            ha=reference.side,
            va="bottom",
            fontsize=7.5,
        )
    for number, mark in enumerate(figure.marks):
        symbol = _MARK_SYMBOLS.get(mark.kind, "x")
        axes.plot(
            [mark.x],
            [mark.y],
            symbol,
            color=_INK,
            markerfacecolor="none",
            markersize=12,
            markeredgewidth=1.5,
            gid=f"mark-{number}",
        )
        axes.annotate(mark.label, (mark.x, mark.y), xytext=(6, 6), textcoords="offset points", fontsize=7.5)
    _set_axis(axes.xaxis, axes.set_xlabel, figure.x)
    _set_axis(axes.yaxis, axes.set_ylabel, figure.y)
    if not figure.heats:
        axes.grid(True, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if figure.series:
        axes.figure.legend(
            *axes.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=3,
            frameon=False,
            fontsize=8,
            handlelength=4,
        )


def _draw_series(axes: Any, line: Series, number: int) -> None:
    measured = line.kind == "measured"
    xs = [dot.x for dot in line.points]
    ys = [math.nan if dot.y is None else dot.y for dot in line.points]
    axes.plot(
        xs,
        ys,
        color=line.color,
        marker=_MARKERS[line.marker] if measured and len(xs) <= 40 else "",
        linestyle=_DASHES[line.dash],
        linewidth=1.6 if measured else 1.2,
        markersize=5,
        label=_legend(line) if line.legend else None,
        gid=f"series-{number}",
    )
    bars = [
        (d.x, d.y, d.low, d.high) for d in line.points if d.y is not None and d.low is not None and d.high is not None
    ]
    if bars and line.ribbon:
        ends = ([b[0] for b in bars], [b[2] for b in bars], [b[3] for b in bars])
        axes.fill_between(*ends, color=line.color, alpha=0.15, linewidth=0, gid=f"ribbon-{number}")
    elif bars:
        axes.vlines([b[0] for b in bars], [b[2] for b in bars], [b[3] for b in bars], color=line.color, linewidth=0.8)


def _draw_heat(axes: Any, heat: Heat, number: int) -> None:
    """Squares one wide and one high; those without a value are hatched."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    edges = [[places[0] - 0.5, *(place + 0.5 for place in places)] for places in (heat.columns, heat.rows)]
    shades = [[math.nan if shade is None else shade for shade in row] for row in heat.shades()]
    colors = LinearSegmentedColormap.from_list("shades", SHADES)
    axes.pcolormesh(*edges, shades, cmap=colors, vmin=0, vmax=1, edgecolors="none", clip_on=False, gid=f"heat-{number}")
    for at, cell in enumerate(heat.cells):
        if cell.shade is None:
            square: dict[str, Any] = {"fill": False, "edgecolor": "#999999", "linewidth": 0, "hatch": "////"}
            axes.add_patch(Rectangle((cell.x - 0.5, cell.y - 0.5), 1, 1, gid=f"gap-{number}-{at}", **square))
        ink = _INK if cell.shade is None else ink_on(cell.shade)
        axes.text(cell.x, cell.y, cell.text, color=ink, fontsize=7.5, ha="center", va="center")


def _legend(line: Series) -> str:
    # matplotlib leaves out of the legend what begins with an underscore
    label = line.label if line.kind in ("measured", "reference") else f"{line.label} ({line.kind})"
    return f"\u200b{label}" if label.startswith("_") else label or "(no name)"


def _set_axis(axis: Any, set_label: Any, description: Axis) -> None:
    set_label(description.title)
    if description.span:
        axis.set_view_interval(*description.span, ignore=True)
    if description.ticks:
        low, high = axis.get_view_interval()
        inside = [(v, t) for v, t in description.ticks if low <= v <= high]
        axis.set_ticks([v for v, _ in inside], labels=[t for _, t in inside])
        axis.set_minor_locator(_no_ticks())


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _cleaned(text: str, figure: Figure) -> str:
    """The element alone: no prolog, ids of its own, colours as variables, fluid width."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    named = f'width="100%" font-family="{_FONT}" role="img" aria-label={quoteattr(plain(figure.alt))}'
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', lambda found: f"{found[1]} {named}", text, count=1)
    text = re.sub(r' (?:d|x|y|transform|style)="[^"]*"', lambda found: _DECIMALS.sub(r"\1", found[0]), text)
    text = _thinned(text)
    text = re.sub(r'\bid="', f'id="{figure.id}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{figure.id}-", text)
    return text.replace(_INK, f"var(--ink, {_INK})").replace(_GRID, f"var(--grid, {_GRID})").strip()


def _thinned(text: str) -> str:
    """Without what no reader sees: comments, white space between elements, names that nothing refers to, the font at every text."""
    text = re.sub(r">\s+<", "><", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    text = re.sub(r"\s*\n\s*", " ", text)
    text = re.sub(r'(<text style="[^"]*?)font-family: [^;"]*(?:; )?', r"\1", text)
    text = re.sub(r'(<text [^>]*?) transform="rotate\(-0 [^"]*"', r"\1", text)
    text = re.sub(r'<g( clip-path="[^"]*")?>((?:<use [^>]*/>)+)</g>', _styled_once, text)
    text = re.sub(r' style="[^"]*"', lambda found: re.sub(r"([:;]) ", r"\1", found[0]), text)
    kept = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    return re.sub(r'(<\w+) id="([^"]*)"', lambda f: f[0] if f[2] in kept or _OURS.match(f[2]) else f[1], text)


def _styled_once(group: re.Match[str]) -> str:
    """Markers of one style, with the style at their group."""
    styles = set(re.findall(r' style="[^"]*"', group[2]))
    if len(styles) != 1 or group[2].count(" style=") != group[2].count("<use "):
        return group[0]
    (style,) = styles
    return f"<g{group[1] or ''}{style}>{group[2].replace(style, '')}</g>"
