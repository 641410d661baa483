"""How are single decoding steps distributed? From the raw stamps of every step that a cell has stored (``decode.npz``).

The mean of a window hides what a reader of a stream waits for: p50, p95, p99 and the longest step over all windows of all rounds. Steps
that were too short to be stamped one by one were timed in blocks, and have no distribution of their own; warm-up and the first token are
not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bdh_bench.results.display import GAP, count, quantity
from bdh_bench.results.reductions import arrays_at
from bdh_bench.results.store import CellOutcome, Run
from bdh_bench.results.tables import Entry, Table

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHARES = (0.50, 0.95, 0.99)


@dataclass(frozen=True)
class Steps:
    """The distribution of one cell's steps, in seconds; ``block`` steps share a stamp (then there is no distribution)."""

    cell: CellOutcome
    quantiles: tuple[float, ...]
    longest: float
    steps: int
    rounds: int
    block: int


def steps_of(run: Run) -> Iterator[Steps]:
    """Of every cell that has stored stamps of its steps."""
    for cell in run.cells:
        files = [one.files for one in cell.rounds if one.kind == "ok" and one.files]
        found = [step for name in files if (step := _steps(arrays_at(run.path / "cells" / name / "decode.npz")))]
        if found:
            seconds = np.concatenate([s for s, _ in found])
            quantiles = tuple(float(q) for q in np.quantile(seconds, _SHARES))
            block = max(b for _, b in found)
            yield Steps(cell, quantiles, float(seconds.max()), len(seconds), len(found), block)


def _steps(arrays: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float64], int] | None:
    """Seconds of every step, and how many steps share a stamp; windows of single steps where there are some."""
    prefix = "single_" if "single_stamps_ns" in arrays else ""
    stamps, block = arrays.get(f"{prefix}stamps_ns"), arrays.get(f"{prefix}block")
    if stamps is None or stamps.ndim != 3 or stamps.shape[2] < 2 or not stamps.size:
        return None
    spent = (stamps[:, :, -1] - stamps[:, :, 0]).astype(np.float64).ravel() * 1e-9
    return spent, int(block) if block is not None and block.ndim == 0 else 1


def steps_table(run: Run, labels: Mapping[str, str]) -> Table:
    """A row per model and context."""
    rows = tuple(_row(s, labels) for s in steps_of(run))
    meaning = (
        "Wall time of single decoding steps, over all measured windows of all rounds; the first token is not in it."
    )
    columns = ("model", "task", "context", "p50", "p95", "p99", "max", "steps", "rounds")
    return Table("table-steps", "Distribution of steps (ITL)", meaning, columns, rows, detail=True)


def _row(s: Steps, labels: Mapping[str, str]) -> tuple[Entry, ...]:
    values = [quantity(q, "s") for q in (*s.quantiles, s.longest)]
    note = "" if s.cell.status == "ok" else s.cell.status
    if s.block > 1:
        values, note = [GAP] * len(values), f"steps were timed in blocks of {s.block}"
    return (
        Entry(labels.get(s.cell.model, s.cell.model)),
        Entry(s.cell.task),
        Entry(count(s.cell.context or 0)),
        *(Entry(value, note) for value in values),
        Entry(count(s.steps * s.block)),
        Entry(count(s.rounds)),
    )
