"""How far is it? One line while it runs: a live bar on a terminal, plain lines and a heartbeat elsewhere. Always on stderr."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any

from bdh_bench.types import Cell

_HEARTBEAT_S = 15.0


class Progress:
    """Called with (cell, facts) for each report of a worker. Use as a context manager."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._said = 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.fields[cells]}"), BarColumn(24), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=1.0, cells="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, cell: Cell, facts: dict[str, Any]) -> None:
        phase = str(facts.get("phase", ""))
        if phase == "done":
            self.done += 1
            self._line(f"{self._name(cell, facts)}: {_outcome(facts)}")
        elif self._bar is not None:
            text = f"{self._name(cell, facts)} · {_phase(facts)}"
            self._bar.update(
                self._task, completed=float(facts.get("fraction", 0.0)), description=text, cells=self._cells()
            )
        elif phase == "start" or time.monotonic() - self._said > _HEARTBEAT_S:
            self._line(f"{self._name(cell, facts)} · {_phase(facts)}")

    def _cells(self) -> str:
        return f"{self.done}/{self.total}"

    def _name(self, cell: Cell, facts: dict[str, Any]) -> str:
        where = f" at {cell.context:,}" if cell.context is not None else ""
        seed = f" seed {cell.seed}" if cell.seed else ""
        which = f" round {facts['round']} of {cell.rounds}" if cell.rounds > 1 and "round" in facts else ""
        return f"{cell.model} {cell.task}{where}{seed}{which}"

    def _line(self, text: str) -> None:
        self._said = time.monotonic()
        if self._bar is not None:
            self._bar.console.print(f"{self._cells()} {text}", markup=False, highlight=False)
        else:
            print(f"[{self._cells()}] {text}", file=sys.stderr, flush=True)  # noqa: T201


def _phase(facts: dict[str, Any]) -> str:
    parts = [str(facts.get("phase", ""))]
    if facts.get("fraction"):
        parts.append(f"{100 * float(facts['fraction']):.0f} %")
    if facts.get("bits_per_byte") is not None:
        parts.append(f"{float(facts['bits_per_byte']):.3f} bits per byte")
    if facts.get("eta_s") is not None:
        parts.append(f"{float(facts['eta_s']):.0f} s left")
    if facts.get("context") is not None:
        parts.append(f"context {facts['context']:,}")
    return " ".join(parts)


def _outcome(facts: dict[str, Any]) -> str:
    about = facts.get("facts", {})
    seconds = f" in {about['seconds']:.0f} s" if "seconds" in about else ""
    reason = f" · {facts['reason']}" if facts.get("reason") else ""
    return f"{facts.get('status', '')}{seconds}{reason}"
