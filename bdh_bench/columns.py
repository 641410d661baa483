"""How do rows of text stand below each other: as wide as they are in a pipe, and so that nothing is cut in a terminal?

In a terminal the widest column is folded; where even that leaves too little room, each row becomes a list of its own.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence

Row = Mapping[str, str]

_LEAST = 24  # characters of a folded column; narrower, a table is harder to read than a list


def show(rows: Sequence[Row], right: Collection[str] = ()) -> None:
    """Print rows that share their keys, which are the heads; the columns in ``right`` hold numbers."""
    if rows:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        sys.stdout.write(plain(rows, right) if width is None else fitted(rows, right, width))


def plain(rows: Sequence[Row], right: Collection[str] = ()) -> str:
    """Columns of equal width, two spaces apart."""
    return "".join(_line(row, _widths(rows), right) for row in [_head(rows), *rows])


def fitted(rows: Sequence[Row], right: Collection[str], width: int) -> str:
    """The same within ``width`` characters, heads underlined; or a list per row, without what is empty."""
    widths = _widths(rows)
    widest = max(widths, key=lambda head: widths[head])
    room = width - sum(w + 2 for head, w in widths.items() if head != widest)
    if room < min(_LEAST, widths[widest]):
        return "\n".join(_listed(row, width) for row in rows)
    widths[widest] = min(room, widths[widest])
    text = _line(_head(rows), widths, right) + _line({head: "─" * w for head, w in widths.items()}, widths, right)
    for row in rows:
        for number, part in enumerate(textwrap.wrap(row[widest], widths[widest]) or [""]):
            text += _line({**(row if not number else dict.fromkeys(row, "")), widest: part}, widths, right)
    return text


def _head(rows: Sequence[Row]) -> Row:
    return {head: head for head in rows[0]}


def _widths(rows: Sequence[Row]) -> dict[str, int]:
    return {head: max(len(line[head]) for line in [_head(rows), *rows]) for head in rows[0]}


def _line(row: Row, widths: Mapping[str, int], right: Collection[str]) -> str:
    cells = (row[h].rjust(w) if h in right else row[h].ljust(w) for h, w in widths.items())
    return "  ".join(cells).rstrip() + "\n"


def _listed(row: Row, width: int) -> str:
    """The first cell as a title, below it every other with its head."""
    (_, title), *others = row.items()
    margin = max((len(head) for head, _ in others), default=0) + 4
    text = f"{title}\n"
    for head, value in others:
        lead = f"  {head}".ljust(margin)
        text += "".join(
            line + "\n"
            for line in textwrap.wrap(
                value, max(width, margin + 8), initial_indent=lead, subsequent_indent=" " * margin
            )
        )
    return text
