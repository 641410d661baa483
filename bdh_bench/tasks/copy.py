"""Can a model repeat what it has just read, and texts longer than those that it practised?

Protocol: s, a separator, s again; loss and score on the second s. Practised with up to 64 symbols until 0.99 of the validation answers
are right or the cap is reached; examined at 64, 128, 256 and 512. The symbols are drawn at random out of 128, or, with ``unique=1``,
never the same twice (64 and 128 symbols only). ``copy_exact`` is the share of texts without a mistake. Chance is 1/128 per symbol.

Source: Jelassi et al., "Repeat After Me: Transformers are Better than State Space Models at Copying" (2024).

Legend: B examples, T tokens, S symbols to repeat.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdh_bench.tasks._exercises import NO_ANSWER, Ids, choices, dataset, fits, generator, symbols, untaught
from bdh_bench.types import Measurement, TaskContext

DEFAULTS = {
    "metric": "copy_accuracy",
    "cell_axes": ("seed",),
    "trains": False,
    "practises": True,
    "reads": False,
}

_FIRST, _SYMBOLS = 80, 128
_PRACTISED = (64, 16, 32, 48)
_EXAMINED = (64, 128, 256, 512)


@dataclass(frozen=True)
class Config:
    """How much is practised and examined.

    sequences  examined per length
    cap        practised examples at the most
    batch      examples in a training step
    unique     1 draws no symbol twice in a text
    """

    sequences: int = 100
    cap: int = 50_000
    batch: int = 32
    unique: int = 0


def examples(model: Any, size: int, count: int, config: Config, *identity: str | int) -> tuple[Ids, Ids]:
    """Tokens and answers (B, 2·S + 1)."""
    known = symbols(model, _FIRST, _SYMBOLS + 1)
    ids, separator = known[:-1], known[-1]
    random = generator("copy", config.unique, size, *identity)
    once = [random.permutation(ids)[:size] for _ in range(count)] if config.unique else []
    text = np.stack(once) if once else random.choice(ids, (count, size))
    between = np.full((count, 1), separator)
    tokens = np.concatenate((text, between, text), 1)
    answers = np.concatenate((np.full((count, size + 1), NO_ANSWER), text), 1)
    return tokens, answers


class Practice:
    """The practised examples; see ``types.Exercises``."""

    enough, share_of_text, learning_rate = 0.99, 0.0, 1e-3

    def __init__(self, model: Any, config: Config) -> None:
        self.model, self.config, self.rows, self.cap = model, config, config.batch, config.cap
        self.identity = f"copy {config}"

    def batch(self, split: str, index: int) -> tuple[Ids, Ids]:
        size = _PRACTISED[index % len(_PRACTISED)] if split == "train" else _PRACTISED[0]
        return examples(self.model, size, self.rows, self.config, split, index)


def exercises(model: Any, config: Config, documents: tuple[Any, ...], longest: int) -> Practice:
    """What a model practises before this task."""
    return Practice(model, config)


def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement]:
    """Accuracy per symbol and per text at each length, and the bytes of state at its end."""
    if reason := untaught(model, context.weights):
        yield Measurement("copy_accuracy", None, 0, status="unsupported", reason=reason)
        return
    sizes = [size for size in _EXAMINED if not config.unique or size <= _SYMBOLS]
    papers = [examples(model, size, config.sequences, config, "test", 0) for size in sizes]
    same = dataset(context, (part for paper in papers for part in paper))
    for done, (size, (tokens, answers)) in enumerate(zip(sizes, papers, strict=True)):
        length = 2 * size + 1
        context.progress("examine", done / len(sizes), {"context": length})
        name = f"copy@S={size},unique={config.unique}"
        axes: dict[str, Any] = {"copied": size, "chance": 1 / _SYMBOLS, **same}
        if reason := fits(model, length):
            yield Measurement(
                "copy_accuracy", None, length, axes=axes, metric_id=name, status="unsupported", reason=reason
            )
            continue
        right = (choices(model, tokens, answers) == answers)[:, size + 1 :]  # (B, S)
        for metric, share in (("copy_accuracy", right.mean()), ("copy_exact", right.all(1).mean())):
            weight = float(config.sequences)
            yield Measurement(metric, float(share), length, axes=axes, weight=weight, metric_id=name)
        yield Measurement("state_bytes", model.state_bytes(1, length), length)
