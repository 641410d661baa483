"""How do points become a map: a block of rows per model, a column per context, the value written in its square?

Models stand from above in the order of the run, and each block is a whole rectangle: where a row has no value at a context, its square says
in a word why there is none (the point's status, else that of the cell that should have measured it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bdh_bench.results.contenders import Facts
from bdh_bench.results.display import shortened, tick
from bdh_bench.results.escaping import plain
from bdh_bench.results.figure import Axis, Cell, Figure, Heat
from bdh_bench.results.tables import Point


@dataclass(frozen=True)
class Row:
    """A point and its row: of a model (``block`` is its name) and, within it, ``name``; without a name it speaks of all rows."""

    model: str
    block: str
    task: str
    name: str
    point: Point


@dataclass(frozen=True)
class Scored:
    """What a square is: a label, how its value is written, and how it is shaded (shares from 0 to 1, or logarithmic up to the most)."""

    label: str
    written: Callable[[float], str]
    scale: Literal["share", "log"]


def heat_map(
    facts: Facts, id_: str, title: str, rows: Sequence[Row], z: Scored, y: str, notes: Sequence[str]
) -> Figure:
    """The map of these rows; without points, a figure without squares."""
    contexts = sorted({row.point.context for row in rows if row.point.context > 0})
    lines = _lines(rows)
    values = [float(row.point.value) for row in rows if row.point.value is not None]
    places = {line: len(lines) - 1 - i for i, line in enumerate(lines)}
    blocks: dict[tuple[str, str, str], list[Cell]] = {}
    for (model, block, task, name), found in lines.items():
        cells = blocks.setdefault((model, block, task), [])
        for column, context in enumerate(contexts):
            where = float(column), float(places[model, block, task, name])
            cells.append(_cell(facts, where, found.get(context), z, max(values, default=0.0), (model, task, context)))
    heats = tuple(
        Heat(plain(f"{block}|{task}"), plain(shortened(block)), tuple(cells), plain(facts.label(model)))
        for (model, block, task), cells in blocks.items()
    )
    ticks = tuple(
        (float(place), plain(shortened(f"{block} · {name}" if name else block)))
        for (_, block, _, name), place in places.items()
    )
    return Figure(
        id_,
        title,
        _alt(title, heats, z),
        Axis("context, bytes", "", "ordinal", tuple((float(i), tick(c)) for i, c in enumerate(contexts))),
        Axis(y, "", "ordinal", ticks),
        (),
        notes=tuple(notes),
        heats=heats,
        z=z.label,
        height=round(0.3 + 0.055 * len(lines), 3),
    )


_Line = tuple[str, str, str, str]


def _lines(rows: Sequence[Row]) -> Mapping[_Line, Mapping[int, Point]]:
    """Row → context → point, a model's rows together; a point without a row of its own speaks for all rows of its block."""
    order = list(dict.fromkeys((row.model, row.block, row.task) for row in rows))
    names = list(dict.fromkeys(row.name for row in rows if row.name)) or [""]
    lines: dict[_Line, dict[int, Point]] = {}
    for block in order:
        for name in names:
            own = [r for r in rows if (r.model, r.block, r.task) == block and r.name in ("", name)]
            lines[(*block, name)] = {r.point.context: r.point for r in sorted(own, key=lambda r: bool(r.name))}
    return lines


def _cell(
    facts: Facts, where: tuple[float, float], point: Point | None, z: Scored, most: float, of: tuple[str, str, int]
) -> Cell:
    if point is not None and point.value is not None:
        value = float(point.value)
        return Cell(*where, value, z.written(value), _shade(value, most, z), point.status)
    status, reason = (point.status, point.reason) if point is not None else _why(facts, *of)
    word = {"unsupported": "stopped", "ok": "no value"}.get(status, status)
    return Cell(*where, None, plain(shortened(word, 12)), None, plain(": ".join(filter(None, (status, reason)))))


def _shade(value: float, most: float, z: Scored) -> float:
    share = value if z.scale == "share" else math.log1p(max(0.0, value)) / math.log1p(most) if most > 0 else 0.0
    return round(min(1.0, max(0.0, share)), 3)


def _why(facts: Facts, model: str, task: str, context: int) -> tuple[str, str]:
    """What the cell of a missing point says."""
    for cell in facts.run.cells:
        if cell.model == model and cell.task == task and cell.context in (context, None) and cell.status != "ok":
            return cell.status, str(cell.reason)
    return "not run", ""


def _alt(title: str, heats: Sequence[Heat], z: Scored) -> str:
    parts = []
    for heat in heats:
        values = [cell.value for cell in heat.cells if cell.value is not None]
        if values:
            parts.append(f"{heat.label} from {z.written(min(values))} to {z.written(max(values))}")
    return f"{title}: {z.label}; {'; '.join(parts) or 'no values'}."
