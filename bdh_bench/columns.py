"""How do rows of text stand below each other: as a drawn table in a terminal, as plain aligned columns in a pipe?"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence

Row = Mapping[str, str]


def show(rows: Sequence[Row], right: Collection[str] = ()) -> None:
    """Print rows that share their keys, which are the heads; the columns in ``right`` hold numbers."""
    if not rows:
        return
    if sys.stdout.isatty():
        _draw(rows, right)
    else:
        sys.stdout.write(plain(rows, right))


def plain(rows: Sequence[Row], right: Collection[str] = ()) -> str:
    """Columns of equal width, two spaces apart."""
    lines = [{head: head for head in rows[0]}, *rows]
    widths = {head: max(len(line[head]) for line in lines) for head in rows[0]}
    text = ""
    for line in lines:
        cells = (line[h].rjust(w) if h in right else line[h].ljust(w) for h, w in widths.items())
        text += "  ".join(cells).rstrip() + "\n"
    return text


def _draw(rows: Sequence[Row], right: Collection[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    for head in rows[0]:
        table.add_column(Text(head), justify="right" if head in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(value) for value in row.values()))
    Console(highlight=False).print(table)
