"""Does a run of many rows stay quick to read? Bounds for 100,000 rows (report 20 s, export 10 s), scaled to a smaller one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import synthetic_run

from bdh_bench.results.export import export
from bdh_bench.results.report.write import write_report
from bdh_bench.results.resampling import _LARGEST_BLOCK, RESAMPLES, SEED, _counts, _draws
from bdh_bench.results.store import open_run

_MODELS = (
    "bdh@1m",
    "gpt2@1m",
    "mamba@1m",
    "bdh@3m",
    "gpt2@3m",
    "mamba@3m",
    "llama@1m",
    "llama@3m",
    "lstm@1m",
    "toy:uniform",
)
#: What a report takes whatever the run holds: figures are drawn and the plotting library is inlined.
_PAGE_S = 4.0


def _seconds(do: Callable[[], object]) -> float:
    """Processor time, which other programs disturb little."""
    before = time.process_time()
    do()
    return time.process_time() - before


def test_many_rows_are_read_reported_and_exported_in_time(tmp_path: Path) -> None:
    folder = synthetic_run.write_run(tmp_path, models=_MODELS, seeds=5, documents=40).path
    share = len(open_run(folder).records) / 100_000
    assert share > 0.1
    assert _seconds(lambda: export(open_run(folder), "json")) < 10 * share + 0.5
    assert _seconds(lambda: write_report(open_run(folder), tmp_path / "report.html")) < 20 * share + _PAGE_S


def test_draws_that_are_kept_are_those_that_are_drawn_anew() -> None:
    """More than 200 units: to draw them for each of hundreds of points took ten times longer than everything else."""
    n = 250
    rows = _LARGEST_BLOCK // n
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    for _ in range(2):
        fresh = np.random.default_rng(SEED)
        assert all((_counts(fresh, n, size) == kept).all() for size, kept in zip(sizes, _draws(n), strict=True))
