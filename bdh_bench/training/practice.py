"""How does a model practise for a task? On generated examples, with the loop of all training, until it is good
enough or the cap is reached.

Only answers count in the loss. Every model sees the same examples in the same order. On validation examples, which are never practised,
accuracy decides when practice ends; it is not a result. Who looks often enough is lucky once, so that practice ends only where as many
other examples confirm it. Where a task asks for it, some of the steps go on with the text that the model
was trained on, so that practice does not cost it its language.

Legend: B examples per step, T tokens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from bdh_bench.data.corpus import Document
from bdh_bench.training.checkpoints import Checkpoint
from bdh_bench.training.loop import Crops, Progress, fit
from bdh_bench.training.recipe import Recipe
from bdh_bench.types import Exercises

_LOOK_EVERY = 100  # steps between two looks at the validation examples
_VALIDATION_BATCHES = 4
_NO_ANSWER = -1


def practise(
    model: Any,
    recipe: Recipe,
    exercises: Exercises,
    documents: tuple[Document, ...],
    checkpoint: Checkpoint,
    progress: Progress,
) -> dict[str, Any]:
    """Practise in place, or take the weights from a finished checkpoint; the report of training, with ``accuracy`` of validation."""
    drill = Drill(model, recipe, exercises, documents)
    report = fit(model, recipe, lambda: drill, lambda: drill.grade()[1], checkpoint, progress)
    return {**report, "exercises": exercises.identity}


class Drill:
    """Generated examples, each from an empty state; every so many steps a piece of text instead."""

    position, reset, carry_limit, mark_every = 0, "example", None, _LOOK_EVERY

    def __init__(self, model: Any, recipe: Recipe, exercises: Exercises, documents: tuple[Document, ...]) -> None:
        self.model, self.exercises, self.rows = model, exercises, exercises.rows
        self.length = recipe.context
        self._period = (
            round(1 / (1 - exercises.share_of_text)) if exercises.share_of_text else 1
        )  # one drill in so many steps
        self._text = Crops(model, recipe, documents) if exercises.share_of_text else None
        self._step, self._lengths = 0, [0]

    def steps(self, recipe: Recipe) -> int:
        """All examples, and the text between them."""
        return max(1, self.exercises.cap // self.rows) * self._period

    def halfway(self, steps: int) -> int:
        """Never: practice ends when it is enough, and nobody knows half of that beforehand."""
        return 0

    def read(self, steps: int) -> int:
        """Tokens of this many steps; counted as they were read."""
        return self._lengths[min(steps, len(self._lengths) - 1)]

    def begin(self, step: int, carried: dict[str, Tensor] | None = None, position: int = 0) -> None:
        self._step, self._lengths = 0, [0]
        for done in range(step):  # lengths alone: a batch is generated anew from its index
            self._note(self._tokens_at(done))
        self._step = step
        if self._text is not None:
            self._text.begin(step - math.ceil(step / self._period))

    def loss(self) -> Tensor:
        step = self._step
        self._step += 1
        if self._text is not None and step % self._period:
            self._note(self._text.rows * self._text.length)
            return self._text.loss()
        tokens, answers = self.exercises.batch("train", step // self._period)
        self._note(tokens.size)
        return answer_loss(self.model, tokens, answers)

    def cut(self) -> None: ...

    def state(self) -> dict[str, Tensor]:
        return {}

    def mastered(self) -> bool:
        self.model.eval()
        confirmed = all(self.grade(first)[0] >= self.exercises.enough for first in (0, _VALIDATION_BATCHES))
        self.model.train()
        return confirmed

    @torch.inference_mode()
    def grade(self, first: int = 0) -> tuple[float, float]:
        """Accuracy and bits per answer on the validation examples from batch ``first`` on."""
        right = asked = 0
        nats = 0.0
        for index in range(first, first + _VALIDATION_BATCHES):
            tokens, answers = self.exercises.batch("validation", index)
            logits, wanted = _answered(self.model, tokens, answers)
            right += int((logits.argmax(-1) == wanted).sum())
            asked += wanted.numel()
            nats += float(F.cross_entropy(logits.float(), wanted, reduction="sum"))
        return right / asked, round(nats / asked / math.log(2), 5)

    def _tokens_at(self, step: int) -> int:
        if self._text is not None and step % self._period:
            return self._text.rows * self._text.length
        return int(self.exercises.batch("train", step // self._period)[0].size)

    def _note(self, tokens: int) -> None:
        self._lengths.append(self._lengths[-1] + tokens)


def answer_loss(model: Any, tokens: NDArray[np.int64], answers: NDArray[np.int64]) -> Tensor:
    """Mean negative log-likelihood in nats of the answers alone."""
    logits, wanted = _answered(model, tokens, answers)
    return F.cross_entropy(logits.float(), wanted)


def _answered(model: Any, tokens: NDArray[np.int64], answers: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Logits (answers, V) of the tokens that are answers, and those tokens."""
    device = next(model.parameters()).device
    text, wanted = torch.from_numpy(tokens).to(device), torch.from_numpy(answers).to(device)
    start = text.new_full((len(text), 1), model.start_symbol)
    logits = model.logits(torch.cat((start, text[:, :-1]), 1))  # (B, T, V)
    asked = wanted != _NO_ANSWER
    return logits[asked], wanted[asked]
