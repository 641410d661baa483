"""What is a sentence of a report? Its words, the cells behind it, what it speaks about, and whether it decides anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["measured", "not decided"]


@dataclass(frozen=True)
class Claim:
    """One sentence. ``evidence`` holds keys of cells; ``command`` is what would decide it, where it is open."""

    text: str
    evidence: tuple[str, ...]
    scope: str
    kind: Kind
    topic: str = ""
    short: str = ""
    context: int = 0
    command: str = ""
