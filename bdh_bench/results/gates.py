"""Which correctness gates did each model of a run pass, and how near to their bounds did it come?

Read from the facts of the cells, where the worker keeps a row per gate; a run recorded before that has none.
"""

from __future__ import annotations

from typing import Any

from bdh_bench.results.store import Run
from bdh_bench.results.tables import finite


def gates_of(run: Run) -> list[dict[str, Any]]:
    """One row per model, gate and length: cells that ran it, cells where it failed, the worst error and its bound."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for cell in run.cells:
        for row in cell.facts.get("gates") or ():
            key = (cell.model, str(row.get("gate")), int(row.get("length") or 0))
            new = {
                "model": key[0],
                "gate": key[1],
                "length": key[2],
                "cells": 0,
                "failed": 0,
                "error": None,
                "bound": None,
            }
            known = found.setdefault(key, new)
            known["cells"] += 1
            known["failed"] += row.get("kept") is not True
            error = finite(row.get("error"))
            if error is not None and (known["error"] is None or error > known["error"]):
                known["error"], known["bound"] = error, finite(row.get("bound"))
    return list(found.values())
