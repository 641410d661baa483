"""How do results leave for other programs: JSON, JSON lines, CSV, Markdown, LaTeX?

The JSON shape is a promise to programs: one object per point, gaps as null with status and reason, no NaN. ``assessment`` is what
the rules make of the points, as one JSON object: comparisons with their reasons and fairness cards, and what contexts are worth.
Markdown and LaTeX hold the tables of both.
"""

from __future__ import annotations

import csv as csv_module
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from bdh_bench.errors import UnknownNameError
from bdh_bench.results import escaping
from bdh_bench.results.assessment import assess
from bdh_bench.results.store import Run
from bdh_bench.results.tables import EXPLAINED, FIELDS, Point, Table, finite, points_of, value_tables
from bdh_bench.types import Record

FORMATS = ("json", "jsonl", "csv", "md", "latex")
_RAW_FIELDS = tuple(field.name for field in fields(Record) if field.name != "facts")


def export(run: Run, format_: str = "json", raw: bool = False) -> str:
    """The run as text in one of FORMATS; ``raw`` gives every measurement (as csv where the format has tables only)."""
    if format_ not in FORMATS:
        raise UnknownNameError("export format", format_, FORMATS)
    rows = raw_as_json(run) if raw else points_as_json(run)
    if format_ == "json":
        return json.dumps(rows, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    if format_ == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    if format_ == "csv" or raw:
        return as_csv(rows, _RAW_FIELDS if raw else FIELDS)
    points = points_of(run)
    tables = [*value_tables(points), *assess(run, points).tables()]
    return as_markdown(tables) if format_ == "md" else as_latex(tables)


def assessment(run: Run) -> str:
    """Comparisons, extrapolation and the fairness card of a run, as one JSON object."""
    return json.dumps(assess(run).as_json(), ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def points_as_json(run: Run) -> list[dict[str, Any]]:
    """One object per point, fields as in ``tables.Point``."""
    return [point_as_json(point) for point in points_of(run)]


def point_as_json(point: Point) -> dict[str, Any]:
    """One point as JSON values."""
    values = {name: getattr(point, name) for name in FIELDS}
    return values | {"axes": {name: _json_scalar(value) for name, value in point.axes}}


def raw_as_json(run: Run) -> list[dict[str, Any]]:
    """Every stored measurement of the final attempts, unreduced."""
    return [_raw(record) for record in run.records]


def _raw(record: Record) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in _RAW_FIELDS}
    axes = {str(name): _json_scalar(value) for name, value in record.axes.items()}
    return values | {"axes": axes, "value": finite(record.value), "weight": finite(record.weight)}


def _json_scalar(value: object) -> object:
    return finite(value) if isinstance(value, float) else value


def as_csv(rows: Iterable[Mapping[str, Any]], names: Sequence[str] = FIELDS) -> str:
    """CSV with a header; gaps are empty, axes are JSON, and text that a spreadsheet would run is quoted."""
    buffer = io.StringIO()
    writer = csv_module.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([_csv_cell(row.get(name)) for name in names])
    return buffer.getvalue()


def _csv_cell(value: object) -> object:
    if value is None or isinstance(value, int | float):
        return "" if value is None else value
    return escaping.csv(json.dumps(value, ensure_ascii=False, sort_keys=True) if isinstance(value, dict) else value)


def as_markdown(tables: Sequence[Table]) -> str:
    """Markdown tables, one after the other."""
    return "\n".join(markdown_table(table) for table in tables)


def markdown_table(table: Table) -> str:
    """One Markdown table with its title; intervals stand behind their values."""
    lines = [f"### {escaping.markdown(table.title)}", ""]
    lines.append(_markdown_row(table.columns))
    lines.append("|".join(["", " --- ", *[" ---: "] * (len(table.columns) - 1), ""]))
    lines += [_markdown_row([_with_interval(entry.text, entry.note) for entry in row]) for row in table.rows]
    lines += ["", escaping.markdown(table.note)] if table.note else []
    return "\n".join([*lines, ""])


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(escaping.markdown(cell) for cell in cells)} |"


def _with_interval(text: str, note: str) -> str:
    return f"{text} {note}" if note.startswith("[") or text.startswith(EXPLAINED) else text


def as_latex(tables: Sequence[Table]) -> str:
    """LaTeX tables for the booktabs package."""
    return "\n".join(latex_table(table) for table in tables)


def latex_table(table: Table) -> str:
    """One LaTeX table."""
    rows = [" & ".join(escaping.latex(_with_interval(e.text, e.note)) for e in row) for row in table.rows]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{escaping.latex(table.title)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
            r"\toprule",
            " & ".join(escaping.latex(column) for column in table.columns) + r" \\",
            r"\midrule",
            *(rf"{row} \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            *([rf"\par {escaping.latex(table.note)}"] if table.note else []),
            r"\end{table}",
            "",
        ]
    )
