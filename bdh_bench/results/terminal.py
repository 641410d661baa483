"""What does a run say in a terminal? Labels and the answer, the headline tables, a verdict per pair, and what stays open.

Written for 80 columns. Everything else (single comparisons, derived tables, the fairness card) is printed on request. Text of a run is
stripped of control characters and never read as markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from bdh_bench.results.answer import BACKGROUND, QUESTION
from bdh_bench.results.claim import Claim
from bdh_bench.results.claims import VERDICTS_MEAN, Answer, answer_of, references_of
from bdh_bench.results.display import GAP, number, shortened, tick
from bdh_bench.results.escaping import plain
from bdh_bench.results.store import Run
from bdh_bench.results.tables import EXPLAINED, Entry, Table, headlines_of, points_of, value_tables
from bdh_bench.results.validity import without_signal

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table as RichTable

WIDTH = 80
_CONTEXT = re.compile(r"c = ([\d,]+)\Z")
#: Statuses in the width of a number.
_SHORT = {"unsupported": "stopped", "oom_host": "no memory", "oom_cuda": "no memory", "interrupted": "open"}


def show(run: Run, everything: bool = False) -> None:
    """Print the run to standard output; without colours where that is no terminal or NO_COLOR is set."""
    from rich.console import Console

    Console(highlight=False).print(renderable(run, everything))


def renderable(run: Run, everything: bool = False) -> Group:
    """The run as something that rich can print: the headline, or all there is."""
    from rich.console import Group
    from rich.text import Text

    points = points_of(run)
    answer = answer_of(run, points)
    tables = value_tables(
        points, answer.assessment.facts.titles, headlines_of(run), without_signal(answer.assessment.signals)
    )
    parts = [*_head(run, answer)]
    for table in (table for table in tables if not table.detail):
        for part in _narrow(table):
            parts += [Text(""), Text(plain(part.title), style="bold"), _block(part)]
    parts += [Text(""), *_references(run)]
    parts += _section("Verdicts", answer.verdicts, VERDICTS_MEAN)
    if everything:
        parts += _section("In detail", answer.details)
    parts += _section("Not decided", answer.open)
    if everything:
        parts += [_table(table) for table in (*answer.assessment.tables(), *(t for t in tables if t.detail))]
    else:
        rest = f"{len(answer.assessment.tables()) + sum(t.detail for t in tables)} more tables"
        parts += [Text(f"{rest} and {len(answer.details)} sentences: bdh-bench show --all; figures: bdh-bench report")]
    return Group(*parts)


def _head(run: Run, answer: Answer) -> Iterator[RenderableType]:
    from rich.padding import Padding
    from rich.text import Text

    labels = " ".join(f"[{plain(label)}]" for label in answer.assessment.labels)
    yield Text(f"Run {plain(run.id)} {labels}".rstrip(), style="bold")
    yield Text(QUESTION, style="bold")
    yield Text(BACKGROUND, style="dim")
    yield Text("")
    for line in answer.lines:
        text = Text.assemble((f"{line.topic}  ", "bold"), plain(line.text), (f" ({plain(line.scope)})", "dim"))
        yield Padding(text, (0, 0, 0, 1))


def _section(title: str, claims: Iterable[Claim], note: str = "") -> list[RenderableType]:
    from rich.padding import Padding
    from rich.text import Text

    lines: list[RenderableType] = []
    for claim in claims:
        lines.append(Padding(Text(f"• {plain(claim.text)}"), (0, 0, 0, 1)))
        if claim.command:
            lines.append(Padding(Text(plain(claim.command), style="dim"), (0, 0, 0, 5)))
    head = [Text(title, style="bold"), *([Text(note, style="dim")] if note else [])]
    return [*head, *lines, Text("")] if lines else []


def _references(run: Run) -> list[RenderableType]:
    """What needs no training, on one line."""
    from rich.text import Text

    each = [f"{shortened(plain(name), 24)} {number(value)}" for name, value, _ in references_of(run)]
    return [Text(f"Without a network, bits per byte: {', '.join(each)}."), Text("")] if each else []


def _narrow(table: Table) -> Iterator[Table]:
    """The table with short heads and texts, in as many parts as 80 columns need."""
    first = max((len(plain(row[0].text)) for row in table.rows), default=0)
    heads = [_head_of(column) for column in table.columns[1:]]
    texts = [[_short(entry) for entry in row[1:]] for row in table.rows]
    widths = [max([len(head), *(len(row[i]) for row in texts)]) + 2 for i, head in enumerate(heads)]
    parts: list[list[int]] = [[]]
    for i, width in enumerate(widths):
        if parts[-1] and min(first, 30) + sum(widths[j] for j in parts[-1]) + width > WIDTH - 2:
            parts.append([])
        parts[-1].append(i)
    contexts = any(_CONTEXT.match(column) for column in table.columns)
    title = table.title + (", by context" if contexts else "")
    for chosen in parts:
        rows = tuple(
            (Entry(shortened(plain(row[0].text), 30)), *(Entry(text[i]) for i in chosen))
            for row, text in zip(table.rows, texts, strict=True)
        )
        yield Table(table.id, title, "", (table.columns[0], *(heads[i] for i in chosen)), rows)
        title = f"{table.title}, continued"


def _head_of(column: str) -> str:
    found = _CONTEXT.match(column)
    return tick(int(found[1].replace(",", ""))) if found else shortened(plain(column).removeprefix("any c"), 20)


def _short(entry: Entry) -> str:
    return GAP if entry.note == "not planned" else _SHORT.get(entry.text, shortened(plain(entry.text), 20))


def _block(table: Table) -> RichTable:
    """A table without rules: heads and rows."""
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number_, column in enumerate(table.columns):
        drawn.add_column(Text(column, style="dim"), justify="right" if number_ else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*(Text(entry.text) for entry in row))
    return drawn


def with_note(entry: Entry) -> str:
    """The text, and why, where it is a verdict."""
    return f"{entry.text}: {entry.note}" if entry.note and entry.text.startswith(EXPLAINED) else entry.text


def _table(table: Table) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=Text(plain(table.title)), title_justify="left", box=box.SIMPLE, caption_justify="left")
    drawn.caption = Text(plain(table.note)) if table.note else None
    for number_, column in enumerate(table.columns):
        drawn.add_column(Text(plain(column)), justify="right" if number_ else "left")
    for row in table.rows:
        drawn.add_row(*(Text(plain(with_note(entry))) for entry in row))
    return drawn
