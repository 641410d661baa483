"""What does a run say in a terminal? The answer, then what stays open, then verdicts with the fairness card, then the values.

Text of a run is stripped of control characters and never read as markup.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bdh_bench.results.claims import answer_of
from bdh_bench.results.escaping import plain
from bdh_bench.results.store import Run
from bdh_bench.results.tables import EXPLAINED, Entry, Table, points_of, value_tables

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table as RichTable


def show(run: Run) -> None:
    """Print the run to standard output; without colours where that is no terminal or NO_COLOR is set."""
    from rich.console import Console

    Console(highlight=False).print(renderable(run))


def renderable(run: Run) -> Group:
    """The run as something that rich can print."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    points = points_of(run)
    answer = answer_of(run, points)
    labels = " ".join(f"[{plain(label)}]" for label in answer.assessment.labels)
    parts: list[Text | Padding | RichTable] = [Text(f"Run {plain(run.id)} {labels}".rstrip(), style="bold"), Text("")]
    parts += [Padding(Text(f"• {plain(claim.text)}"), (0, 0, 0, 1)) for claim in answer.claims]
    parts += [Text(""), Text("Not decided", style="bold")]
    parts += [Padding(Text(f"• {plain(claim.text)}"), (0, 0, 0, 1)) for claim in answer.open]
    parts += [_table(table) for table in (*answer.assessment.tables(), *value_tables(points))]
    return Group(*parts)


def with_note(entry: Entry) -> str:
    """The text, and why, where it is a verdict."""
    return f"{entry.text}: {entry.note}" if entry.note and entry.text.startswith(EXPLAINED) else entry.text


def _table(table: Table) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=Text(plain(table.title)), title_justify="left", box=box.SIMPLE, caption_justify="left")
    drawn.caption = Text(plain(table.note)) if table.note else None
    for number, column in enumerate(table.columns):
        drawn.add_column(Text(plain(column)), justify="right" if number else "left")
    for row in table.rows:
        drawn.add_row(*(Text(plain(with_note(entry))) for entry in row))
    return drawn
