"""Which rounds of a run does this call measure: what is missing, what failed before, and no more than so many cells?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bdh_bench.errors import SpecError, UnknownNameError
from bdh_bench.results.store import CellOutcome, Run, wanted_rounds
from bdh_bench.runner.plan import Plan
from bdh_bench.types import MEASURED_STATUSES, RESULT_STATUSES, UNFINISHED_STATUSES

FAILURES = frozenset({"nan", "gate_failed", "timeout", "crash", "error"})
#: What may be measured again on request. ``ok`` may not: that would select for luck.
AGAIN = FAILURES | RESULT_STATUSES | UNFINISHED_STATUSES | (MEASURED_STATUSES - {"ok"})


@dataclass(frozen=True)
class Selection:
    """What is asked for beside what is missing.

    retry        statuses whose rounds are measured again
    only_failed  cells that failed, and nothing else
    max_cells    at most so many cells (None: all)
    """

    retry: frozenset[str] = frozenset()
    only_failed: bool = False
    max_cells: int | None = None

    def __post_init__(self) -> None:
        for status in self.retry - AGAIN:
            raise UnknownNameError("status", status, AGAIN)
        if self.max_cells is not None and self.max_cells < 1:
            raise SpecError(f"got --max-cells {self.max_cells} · expected a number greater than 0")

    @property
    def statuses(self) -> frozenset[str]:
        """Statuses whose rounds are measured again."""
        return self.retry | (FAILURES if self.only_failed and not self.retry else frozenset())

    @property
    def again(self) -> bool:
        """Whether a finished run may have something to do."""
        return bool(self.statuses)


def parse_statuses(text: str) -> frozenset[str]:
    """``timeout,crash``. Raises UnknownNameError through Selection."""
    return frozenset(part.strip() for part in text.split(",") if part.strip())


def choose(plan: Plan, run: Run, selection: Selection) -> list[str]:
    """The names of the chosen rounds, in the order of the plan."""
    outcomes = {cell.key: cell for cell in run.cells}
    chosen = {key: dict(_rounds(outcome, selection)) for key, outcome in outcomes.items()}
    cells = [key for key in dict.fromkeys(cell.key for cell, _ in plan.rounds) if chosen.get(key)]
    kept = frozenset(cells[: selection.max_cells])
    ordered = ((cell.key, number) for cell, number in plan.rounds if cell.key in kept)
    return list(_names((key, number, chosen[key][number]) for key, number in ordered if number in chosen[key]))


def _rounds(outcome: CellOutcome, selection: Selection) -> Iterator[tuple[int, int]]:
    """(round, the attempt that is to be replaced or 0)."""
    again = {
        one.round: one.attempt for one in outcome.rounds if one.status in selection.statuses and one.kind != "pending"
    }
    yield from again.items()
    if again:
        missing = [one for one in outcome.rounds if one.kind == "pending"]
    else:
        missing = [] if selection.only_failed else wanted_rounds(outcome.rounds)
    yield from ((one.round, 0) for one in missing)


def _names(rounds: Iterable[tuple[str, int, int]]) -> Iterator[str]:
    for key, number, after in rounds:
        yield f"{key[:16]}-{number}" + (f"-{after}" if after else "")
