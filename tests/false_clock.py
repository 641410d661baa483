"""A clock that stands still until it is told that time has passed, so that a test knows every duration beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bdh_bench.measure.clock import Clocks, Usage
from bdh_bench.models import toy


@dataclass
class FalseClock:
    """``reading_ns`` passes with every look at the clock, ``work`` with processor time, ``lose`` without."""

    reading_ns: int = 0
    now: int = 10**15
    used: dict[str, int] = field(default_factory=lambda: dict.fromkeys(Usage._fields, 0))

    def look(self) -> int:
        self.now += self.reading_ns
        return self.now

    def work(self, seconds: float) -> None:
        ns = round(seconds * 1e9)
        self.now += ns
        self.used["process_ns"] += ns
        self.used["thread_ns"] += ns

    def lose(self, seconds: float, involuntary: int = 0, voluntary: int = 0) -> None:
        self.now += round(seconds * 1e9)
        self.used["involuntary"] += involuntary
        self.used["voluntary"] += voluntary

    def clocks(self) -> Clocks:
        return Clocks(self.look, lambda: Usage(**self.used), sleep=self.lose)


class Timed(toy.Model):
    """A uniform guesser that takes a known time: ``token_s`` for each token of a piece, ``step_s`` for a single one."""

    def __init__(self, clock: FalseClock, token_s: float = 1e-4, step_s: float = 2e-3) -> None:
        super().__init__(toy.Config())
        self.clock, self.token_s, self.step_s = clock, token_s, step_s

    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        length = tokens.shape[1]
        self.clock.work(self.step_s if length == 1 else length * self.token_s)
        return super().advance(memory, position, tokens, keep)
