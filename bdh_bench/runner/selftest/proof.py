"""The whole selftest: run, judge, and leave nothing behind."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from bdh_bench.folders import require_absent
from bdh_bench.runner.local import Report
from bdh_bench.runner.selftest.evidence import REQUESTS, gather
from bdh_bench.runner.selftest.truths import Finding, judged


def cell_count() -> int:
    """Cells that ``find`` runs, not counting those of ``perf``."""
    return sum(request.cells for request in REQUESTS)


def find(folder: Path | None, report: Report, perf: bool = False) -> tuple[Finding, ...]:
    """Run everything and judge it. The rows stay in ``folder``, which must not exist yet; without one they go.

    Raises SpecError for a folder that is there.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bdh-bench-selftest-")))
        else:
            require_absent(folder)
            folder.mkdir(parents=True)
        found = judged(gather(folder, report))
    if not perf:
        return found
    from bdh_bench.runner.selftest import overhead

    return (*found, *overhead.findings())
