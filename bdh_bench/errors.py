"""What can go wrong, as one tree; every message says what was got, what was expected and what to do.

    BenchError                  exit code
    ├── SpecError                   2   a request that cannot be carried out as written
    │   ├── UnknownNameError        2   no such model, task, size, option, metric
    │   ├── UnknownRunError         2   no such run in the runs folder
    │   ├── CorpusError             2   text that is missing, empty or too short
    │   ├── CheckpointError         2   weights that cannot be used with this model
    │   ├── StoreError              2   a runs folder that cannot be read or written
    │   ├── PluginError             2   a model or task of another package that is broken, or a name two packages claim
    │   └── MissingExtraError       2   an optional package is needed
    ├── PositionLimitError          2   a model was asked to go past its last position
    ├── SessionError                2   a stream was used wrongly
    └── LawError                    6   a correctness gate failed

The difference between an unknown name, a missing package and a broken file is kept: none is ever
reported as another.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BenchError(Exception):
    """Root of every error this package raises on purpose. ``hint`` is the 'what to do' part, if any."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} · {hint}" if hint else message)
        self.message = message
        self.hint = hint


class SpecError(BenchError):
    """A request that cannot be carried out as written."""

    exit_code = 2


class UnknownNameError(SpecError):
    """A name outside a known list; the message offers the nearest ones."""

    def __init__(self, kind: str, got: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(got, names, n=3, cutoff=0.5)
        meant = f"did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
        super().__init__(f"no {kind} called {got!r} · known: {', '.join(names) or 'none'}", meant)
        self.close = close


class UnknownRunError(SpecError):
    """No such run in the runs folder."""


class CorpusError(SpecError):
    """Text that is missing, empty or too short for what was asked."""


class CheckpointError(SpecError):
    """Weights that are damaged or belong to another model."""


class StoreError(SpecError):
    """A runs folder that cannot be read or written, or a run in use."""


class PluginError(SpecError):
    """A model or task that another package brings is broken, or its name is not its own."""


class MissingExtraError(SpecError):
    """An optional package is needed; the hint is the command that adds it."""


class PositionLimitError(BenchError):
    """A model with a position limit was asked to read past it. Inputs are never truncated."""

    exit_code = 2


class SessionError(BenchError):
    """A stream was used wrongly: empty input, wrong batch, a file of another model."""

    exit_code = 2


class LawError(BenchError):
    """A law that every model must obey was broken; no number is stored for it.

    ``gate`` names the gate that found it, with what it measured and what it allows, where it has such numbers.
    """

    exit_code = 6

    def __init__(
        self, message: str, hint: str = "", gate: str = "", error: float | None = None, bound: float | None = None
    ) -> None:
        super().__init__(message, hint)
        self.gate, self.error, self.bound = gate, error, bound
