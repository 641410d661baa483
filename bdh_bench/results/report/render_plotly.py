"""How does a figure become Plotly data and layout? A plain dict; plotly itself is not imported.

Only scatter traces and heat maps: they are drawn as SVG and need no script built from strings, which the page forbids. Colours of text
and grid are left to the page, which knows whether it is dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from bdh_bench.results.display import GAP, interval, quantity
from bdh_bench.results.escaping import plotly as safe
from bdh_bench.results.figure import (
    PREFIXED,
    SHADES,
    Axis,
    Band,
    Cell,
    Dot,
    Figure,
    Heat,
    Mark,
    Reference,
    Series,
    ink_on,
)

_HEIGHT = 448  # pixels
_MARKERS = {"cross": "x"}
_MARK_SYMBOLS = {
    "stopped": "line-ns-open",
    "failed": "x-thin-open",
    "half": "cross-thin-open",
    "crossing": "diamond-tall-open",
}


def to_plotly(figure: Figure) -> dict[str, Any]:
    """``{"data": …, "layout": …}`` for Plotly.newPlot."""
    data = [_trace(line, figure) for line in figure.series]
    data += [ribbon for line in figure.series if line.ribbon and (ribbon := _ribbon(line))]
    data += [trace for heat in figure.heats for trace in _map(heat, figure)]
    if figure.marks:
        data.append(_mark_trace(figure.marks))
    return {"data": data, "layout": _layout(figure)}


def _trace(line: Series, figure: Figure) -> dict[str, Any]:
    measured = line.kind == "measured"
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "lines+markers" if measured and len(line.points) <= 40 else "lines",
        "name": safe(line.label if line.kind in ("measured", "reference") else f"{line.label} ({line.kind})"),
        "x": [dot.x for dot in line.points],
        "y": [dot.y for dot in line.points],
        "connectgaps": False,
        "meta": safe(line.model),
        "showlegend": line.legend,
        "line": {"color": line.color, "dash": line.dash, "width": 2 if measured else 1.5},
        "marker": {"color": line.color, "symbol": _MARKERS.get(line.marker, line.marker), "size": 8},
        "text": [_hover(dot, figure) for dot in line.points],
        "hovertemplate": "%{text}<extra>%{fullData.name}</extra>",
    }
    if not line.ribbon and any(dot.low is not None for dot in line.points):
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [_reach(dot.high, dot.y) for dot in line.points],
            "arrayminus": [_reach(dot.y, dot.low) for dot in line.points],
            "thickness": 1,
            "width": 3,
        }
    return trace


def _ribbon(line: Series) -> dict[str, Any]:
    """The area between the ends of the intervals, as one closed path; nothing where there are none."""
    ends = [(d.x, d.low, d.high) for d in line.points if d.y is not None and d.low is not None and d.high is not None]
    if not ends:
        return {}
    return {
        "type": "scatter",
        "mode": "lines",
        "name": safe(line.label),
        "showlegend": False,
        "hoverinfo": "skip",
        "x": [x for x, _, _ in ends] + [x for x, _, _ in reversed(ends)],
        "y": [low for _, low, _ in ends] + [high for _, _, high in reversed(ends)],
        "fill": "toself",
        "opacity": 0.2,
        "line": {"color": line.color, "width": 0},
    }


def _map(heat: Heat, figure: Figure) -> Iterator[dict[str, Any]]:
    """The shades, what is written on them, and what is written where there is none (in the ink of the page)."""
    about = {"name": safe(heat.label), "meta": safe(heat.model), "showlegend": False}
    yield {
        "type": "heatmap",
        **about,
        "x": list(heat.columns),
        "y": list(heat.rows),
        "z": heat.shades(),
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[i / (len(SHADES) - 1), color] for i, color in enumerate(SHADES)],
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
        "hoverinfo": "skip",
    }
    for valued in (True, False):
        cells = [cell for cell in heat.cells if (cell.shade is not None) == valued]
        if cells:
            inks = [ink_on(cell.shade) for cell in cells if cell.shade is not None]
            yield {
                "type": "scatter",
                "mode": "text",
                **about,
                "x": [cell.x for cell in cells],
                "y": [cell.y for cell in cells],
                "text": [safe(cell.text) for cell in cells],
                "textfont": {"size": 11, **({"color": inks} if inks else {})},
                "hovertext": [_hover_cell(cell, figure) for cell in cells],
                "hovertemplate": "%{hovertext}<extra>%{fullData.name}</extra>",
            }


def _hover_cell(cell: Cell, figure: Figure) -> str:
    what = f"{figure.z} {cell.text}" if cell.value is not None else cell.status
    return safe(f"{figure.x.label} {figure.x.read(cell.x)}, {figure.y.read(cell.y)}: {what}")


def _reach(upper: float | None, lower: float | None) -> float | None:
    return None if upper is None or lower is None else max(0.0, upper - lower)


def _hover(dot: Dot, figure: Figure) -> str:
    span = interval(dot.low, dot.high, figure.y.unit)
    status = "" if dot.status == "ok" else f" · {dot.status}"
    x = figure.x.read(dot.x) + (f" {figure.x.unit}" if figure.x.unit not in PREFIXED else "")
    y = quantity(dot.y, figure.y.unit) if dot.y is not None else GAP
    return safe(f"{figure.x.label} {x}: {y} {span}{status}")


def _mark_trace(marks: Sequence[Mark]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": "marks",
        "showlegend": False,
        "x": [mark.x for mark in marks],
        "y": [mark.y for mark in marks],
        "text": [safe(mark.label) for mark in marks],
        "textposition": "top right",
        "hoverinfo": "text",
        "marker": {
            "symbol": [_MARK_SYMBOLS.get(mark.kind, "x-thin-open") for mark in marks],
            "size": 16,
            "line": {"width": 2},
        },
    }


def _layout(figure: Figure) -> dict[str, Any]:
    return {
        "xaxis": _axis(figure.x, grid=not figure.heats),
        "yaxis": _axis(figure.y, grid=not figure.heats),
        "shapes": [*map(_line, figure.references), *map(_shade, figure.bands)],
        "annotations": [
            *(_caption(reference, figure.y) for reference in figure.references),
            *(_heading(band, figure.x) for band in figure.bands),
        ],
        "showlegend": bool(figure.series),
        "height": round(_HEIGHT * figure.height),
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        "margin": {"l": 64, "r": 16, "t": 16, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "font": {"family": "system-ui, sans-serif", "size": 13},
    }


def _axis(axis: Axis, grid: bool) -> dict[str, Any]:
    out: dict[str, Any] = {
        "title": {"text": safe(axis.title)},
        "type": "linear" if axis.scale == "ordinal" else axis.scale,
        "automargin": True,
        "zeroline": False,
        "showgrid": grid,
    }
    if axis.span:
        out["range"] = list(axis.span)
    if axis.ticks:
        out |= {
            "tickvals": [v for v, _ in axis.ticks],
            "ticktext": [safe(t) for _, t in axis.ticks],
            "tickmode": "array",
        }
    return out


def _line(reference: Reference) -> dict[str, Any]:
    style = {"color": "#808080", "dash": reference.dash, "width": 1.5}
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": reference.value,
        "y1": reference.value,
        "line": style,
    }


def _shade(band: Band) -> dict[str, Any]:
    """A shape stands at values of a logarithmic axis; only an annotation at their logarithms."""
    whole = {"type": "rect", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    return {**whole, "x0": band.start, "x1": band.end, "fillcolor": "rgba(128,128,128,0.13)", "line": {"width": 0}}


def _heading(band: Band, axis: Axis) -> dict[str, Any]:
    x = math.log10(band.start) if axis.scale == "log" else band.start
    place = {"x": x, "xanchor": "left", "yref": "paper", "y": 1, "yanchor": "top", "showarrow": False}
    return {**place, "text": safe(band.label), "font": {"size": 11}}


def _caption(reference: Reference, axis: Axis) -> dict[str, Any]:
    y = math.log10(reference.value) if axis.scale == "log" and reference.value > 0 else reference.value
    x = 1 if reference.side == "right" else 0.01
    place = {"xref": "paper", "x": x, "xanchor": reference.side, "y": y, "yanchor": "bottom", "showarrow": False}
    return {**place, "text": safe(reference.label), "font": {"size": 11}}
