"""Does a model find what followed a rare symbol, however long ago? Induction heads.

Protocol: random symbols out of sixteen; a trigger comes once, early, and once more as the last token read; the answer is the symbol
that followed the first trigger. Practised at 256 tokens until 0.99 of the validation answers are right or the cap is reached; examined
from 64 tokens up to ``longest``. Chance is 1/16.

Source: the induction-heads task of Gu & Dao, "Mamba" (2023), section 4.1.2.

Legend: B examples, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdh_bench.tasks._exercises import NO_ANSWER, Ids, choices, dataset, fits, generator, symbols, untaught
from bdh_bench.types import Measurement, TaskContext

DEFAULTS = {
    "metric": "induction_accuracy",
    "cell_axes": ("seed",),
    "trains": False,
    "practises": True,
    "reads": False,
}

_FIRST, _SYMBOLS = 80, 16
_PRACTISED = 256
_SHORTEST = 64


@dataclass(frozen=True)
class Config:
    """How much is practised and examined.

    sequences  examined per length
    longest    length that is examined
    cap        practised examples at the most
    batch      examples in a training step
    """

    sequences: int = 200
    longest: int = 4096
    cap: int = 50_000
    batch: int = 16


def examples(model: Any, length: int, count: int, *identity: str | int) -> tuple[Ids, Ids]:
    """Tokens and answers (B, T): the last token is the answer, the trigger stands before it and once in the first half."""
    known = symbols(model, _FIRST, _SYMBOLS + 1)
    ids, trigger = known[:-1], known[-1]
    random = generator("induction", length, *identity)
    tokens = random.choice(ids, (count, length))
    place = random.integers(0, length // 2, count)
    rows = np.arange(count)
    tokens[rows, place] = trigger
    tokens[:, -2] = trigger
    tokens[:, -1] = tokens[rows, place + 1]
    answers = np.full((count, length), NO_ANSWER)
    answers[:, -1] = tokens[:, -1]
    return tokens, answers


class Practice:
    """The practised examples; see ``types.Exercises``."""

    enough, share_of_text, learning_rate = 0.99, 0.0, 1e-3

    def __init__(self, model: Any, config: Config) -> None:
        self.model, self.rows, self.cap = model, config.batch, config.cap
        self.identity = f"induction {config}"

    def batch(self, split: str, index: int) -> tuple[Ids, Ids]:
        return examples(self.model, _PRACTISED, self.rows, split, index)


def exercises(model: Any, config: Config, documents: tuple[Any, ...], longest: int) -> Practice:
    """What a model practises before this task."""
    return Practice(model, config)


def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement]:
    """Accuracy at each length, and the bytes of state there."""
    if reason := untaught(model, context.weights):
        yield Measurement("induction_accuracy", None, 0, status="unsupported", reason=reason)
        return
    lengths = [_SHORTEST << k for k in range(32) if _SHORTEST << k <= config.longest]
    papers = [examples(model, length, config.sequences, "test", 0) for length in lengths]
    same = dataset(context, (part for paper in papers for part in paper))
    for length, (tokens, answers) in zip(lengths, papers, strict=True):
        context.progress("examine", length / config.longest, {"context": length})
        name = f"induction@T={length},symbols={_SYMBOLS}"
        axes: dict[str, Any] = {"chance": 1 / _SYMBOLS, **same}
        if reason := fits(model, length):
            yield Measurement(
                "induction_accuracy", None, length, axes=axes, metric_id=name, status="unsupported", reason=reason
            )
        else:
            right = choices(model, tokens, answers)[:, -1] == answers[:, -1]
            weight = float(config.sequences)
            yield Measurement(
                "induction_accuracy", float(right.mean()), length, axes=axes, weight=weight, metric_id=name
            )
            yield Measurement("state_bytes", model.state_bytes(1, length), length)
