"""How does a model learn? One loop for every architecture: the same bytes in the same order, until the budget is used.

A piece is the start symbol and T bytes, and every byte is a target. A model whose position table is longer than the training
context learns on pieces of its table's length at equal total bytes, so that no position it is later scored at is untrained.

In the regime ``carried`` B rows read a document side by side, piece after piece: the state goes on, the gradient does not. A carry
ends at the document's edge. It ends earlier (``carry_limit``, bytes) at the last position of a model that has one, whose pieces are
then equal parts of its table, and after 16 training contexts in a model whose state grows with every byte.

The weights after half of the steps are kept beside the last ones: a second checkpoint of the same training, whose learning rate was
on the schedule of the whole.

Legend: B pieces per step, T bytes per piece, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from bdh_bench.data.corpus import Document
from bdh_bench.data.pieces import CarriedText, TrainingText
from bdh_bench.errors import BenchError
from bdh_bench.measure.allocator import keep_freed_memory
from bdh_bench.measure.clock import now_s
from bdh_bench.training.checkpoints import Checkpoint, optimiser_tensors, restore_optimiser, sha256_of
from bdh_bench.training.recipe import Recipe

_SAVE_EVERY_S = 20.0
_CURVE_POINTS = 50
_BETAS = (0.9, 0.95)
_VALIDATION_PIECES = 128
#: Training contexts after which a state that grows with every byte is emptied, so that memory does not follow the longest document.
GROWING_CARRY = 16

Progress = Callable[[str, float, dict[str, Any]], None]


def train(
    model: Any,
    recipe: Recipe,
    documents: tuple[Document, ...],
    validation: tuple[Document, ...],
    checkpoint: Checkpoint,
    progress: Progress,
) -> dict[str, Any]:
    """Train ``model`` in place, or take its weights from a finished checkpoint; return the training report.

    Interrupted at any moment, the next call goes on from the last saved step. Raises BenchError for a loss that is not finite.
    """
    return fit(
        model,
        recipe,
        lambda: _reader(model, recipe, documents),
        lambda: validation_bits(model, validation, recipe),
        checkpoint,
        progress,
    )


def fit(
    model: Any,
    recipe: Recipe,
    reader: Callable[[], Reader],
    grade: Callable[[], float | None],
    checkpoint: Checkpoint,
    progress: Progress,
) -> dict[str, Any]:
    """The same for whatever ``reader`` reads; ``grade`` gives bits per token on validation material, in eval mode."""
    if (report := checkpoint.finished()) is not None:
        model.load_state_dict(checkpoint.load_weights())
        model.eval()
        return {**report, "reused": True}
    checkpoint.prepare()
    keep_freed_memory()
    run = Training(model, recipe, reader(), checkpoint)
    run.resume()
    try:
        run.finish(progress)
    except KeyboardInterrupt:
        run.save()
        raise
    model.eval()
    return {**checkpoint.finish(model.state_dict(), run.report(grade())), "reused": False}


def begun(model: Any, recipe: Recipe, documents: tuple[Document, ...]) -> Training:
    """A training before its first step that keeps nothing on disk: for those who time its steps (``one``)."""
    keep_freed_memory()
    training = Training(model.train(), recipe, _reader(model, recipe, documents), None)
    training.reader.begin(0)
    return training


def _reader(model: Any, recipe: Recipe, documents: tuple[Document, ...]) -> Reader:
    return Carried(model, recipe, documents) if recipe.regime == "carried" else Crops(model, recipe, documents)


class Training:
    """One training from its first to its last step; ``step`` counts finished steps."""

    def __init__(self, model: Any, recipe: Recipe, reader: Reader, checkpoint: Checkpoint | None) -> None:
        self.model, self.recipe, self.reader, self.checkpoint = model, recipe, reader, checkpoint
        self.steps = reader.steps(recipe)
        self.half = reader.halfway(self.steps)
        self.optimiser = torch.optim.AdamW(
            _groups(model, recipe.weight_decay), lr=recipe.learning_rate, betas=_BETAS, fused=True
        )
        self.step, self.seconds, self.mastered = 0, 0.0, False
        self.curve: list[tuple[int, float, float]] = []
        self._pending: list[Tensor] = []
        self._inside = False  # a step is under way: weights, state and random numbers do not belong together

    def finish(self, progress: Progress) -> None:
        """All remaining steps."""
        self.model.train()
        started = saved = now_s()
        before, first = self.seconds, self.step
        every = self.reader.mark_every or max(1, self.steps // _CURVE_POINTS)
        while self.step < self.steps and not self.mastered:
            self._inside = True
            self._pending.append(self.one())
            self.step += 1
            if self.step == self.half and self.checkpoint is not None:
                self.checkpoint.keep_halfway(self.model.state_dict())
            self._inside = False
            self.seconds = before + now_s() - started
            if self.step % every == 0 or self.step == self.steps:
                bits = self._mark()
                self.mastered = self.reader.mastered()
                left = (self.steps - self.step) * (self.seconds - before) / (self.step - first)
                progress("train", self.step / self.steps, {"bits_per_byte": bits, "eta_s": left})
            if now_s() - saved > _SAVE_EVERY_S and not self._pending:
                self.save()
                saved = now_s()

    def one(self) -> Tensor:
        """One optimiser step on the next pieces; returns the mean loss in nats, still on the device."""
        rate = self.recipe.rate(self.step, self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with autocast(self.recipe.precision, _device(self.model)):
            loss = self.reader.loss()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.reader.cut()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimiser.step()
        return loss.detach()

    def _mark(self) -> float:
        """Close a stretch of the curve: bytes so far, mean bits per byte since the last mark, seconds."""
        bits = float(torch.stack(self._pending).mean()) / math.log(2)
        self._pending.clear()
        if not math.isfinite(bits):
            raise BenchError(f"the loss is {bits} after {self.step} steps", "use a smaller --learning-rate")
        read = self.reader.read(self.step)
        self.curve.append((read, round(bits, 4), round(self.seconds, 2)))
        return bits

    def save(self) -> None:
        """Keep the state of the last closed stretch (open stretches have no mark yet and are done again)."""
        if self._pending or self._inside or self.checkpoint is None:
            return
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()} | optimiser_tensors(self.optimiser)
        tensors |= {f"state.{k}": v for k, v in self.reader.state().items()}
        tensors["random_state"] = torch.get_rng_state()
        facts = {"step": self.step, "seconds": self.seconds, "curve": self.curve, "position": self.reader.position}
        self.checkpoint.save_partial(tensors, facts)

    def resume(self) -> None:
        """Go on from a partial checkpoint, if there is one; else start from the recipe's seed."""
        torch.manual_seed(self.recipe.seed)
        kept = self.checkpoint.load_partial() if self.checkpoint is not None else None
        if kept is None:
            self.reader.begin(0)
            return
        tensors, facts = kept
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        restore_optimiser(self.optimiser, tensors)
        torch.set_rng_state(tensors["random_state"])
        self.step, self.seconds = facts["step"], facts["seconds"]
        self.curve = [tuple(point) for point in facts["curve"]]
        carried = {k[6:]: v for k, v in tensors.items() if k.startswith("state.")}
        self.reader.begin(self.step, carried, facts["position"])

    def report(self, validation: float | None) -> dict[str, Any]:
        """What the fairness card and the training curve need."""
        recipe, reader = self.recipe, self.reader
        return {
            "bytes": reader.read(self.step),
            "context": recipe.context,
            "regime": recipe.regime,
            "reset": reader.reset,
            "carry_limit": reader.carry_limit,
            "piece_bytes": reader.length,
            "batch": reader.rows,
            "steps": self.step,
            "mastered": self.mastered,
            "halfway": self._halfway(),
            "learning_rate": recipe.learning_rate,
            "optimiser": f"AdamW{_BETAS}",
            "schedule": f"linear warm-up, cosine to {recipe.final_share:g}",
            "warm_up": recipe.warm_up,
            "clip_norm": recipe.clip_norm,
            "weight_decay": recipe.weight_decay,
            "precision": recipe.precision,
            "seed": recipe.seed,
            "seconds": round(self.seconds, 2),
            "final_bits_per_byte": self.curve[-1][1],
            "validation_bits_per_byte": validation,
            "curve": self.curve,
        }

    def _halfway(self) -> dict[str, Any] | None:
        """What is known of the weights of half the budget."""
        if not self.half or self.checkpoint is None or not self.checkpoint.halfway.is_file():
            return None
        read, rate = self.reader.read(self.half), self.recipe.rate(self.half - 1, self.steps)
        about = {"steps": self.half, "bytes": read, "learning_rate": rate, "schedule": "that of the whole training"}
        return {**about, "sha256": sha256_of(self.checkpoint.halfway)}


class Reader(Protocol):
    """What a step reads: ``rows`` pieces of ``length`` bytes, and what the model remembers when it reads them.

    ``position`` counts the bytes per row since the last empty state; ``reset`` and ``carry_limit`` say when it is emptied. A point of
    the curve is set every ``mark_every`` steps (0: fifty in all), and there training ends early once ``mastered``.
    """

    rows: int
    length: int
    reset: str
    mark_every: int

    def steps(self, recipe: Recipe) -> int:
        """Steps at the most."""

    def halfway(self, steps: int) -> int:
        """After which of so many steps the weights are kept as those of half the training; 0: never."""

    def read(self, steps: int) -> int:
        """Target bytes (or tokens) of this many steps."""

    def mastered(self) -> bool:
        """Whether nothing is left to learn."""

    @property
    def position(self) -> int: ...

    @property
    def carry_limit(self) -> int | None: ...

    def begin(self, step: int, carried: dict[str, Tensor] | None = None, position: int = 0) -> None:
        """Start before ``step``; ``carried`` and ``position`` are what ``state`` and ``position`` were there."""

    def loss(self) -> Tensor:
        """Mean loss in nats of the next pieces, differentiable."""

    def cut(self) -> None:
        """End the gradient here."""

    def state(self) -> dict[str, Tensor]:
        """What must be kept for the next piece."""


class _Text:
    """What both ways to read a text have in common: equal pieces, and no end before the budget's."""

    rows: int
    length: int
    mark_every = 0

    def steps(self, recipe: Recipe) -> int:
        return recipe.steps(self.length, self.rows)

    def halfway(self, steps: int) -> int:
        return steps // 2

    def read(self, steps: int) -> int:
        return steps * self.rows * self.length

    def mastered(self) -> bool:
        return False


class Crops(_Text):
    """Independent random pieces, each from an empty state."""

    position, reset, carry_limit = 0, "piece", None

    def __init__(self, model: Any, recipe: Recipe, documents: tuple[Document, ...]) -> None:
        self.model, self.seed = model, recipe.seed
        self.length = _crop_length(model, recipe.context)
        self.rows = recipe.batch(self.length)
        self._text = TrainingText(documents, self.length)

    def begin(self, step: int, carried: dict[str, Tensor] | None = None, position: int = 0) -> None:
        self._pieces = self._text.pieces(self.seed, skip=step * self.rows)

    def loss(self) -> Tensor:
        return piece_loss(self.model, _tokens(np.stack(list(islice(self._pieces, self.rows))), self.model))

    def cut(self) -> None: ...

    def state(self) -> dict[str, Tensor]:
        return {}


class Carried(_Text):
    """Consecutive pieces of one document per row, through a session that goes on from piece to piece."""

    reset = "document"

    def __init__(self, model: Any, recipe: Recipe, documents: tuple[Document, ...]) -> None:
        self.model, self.seed = model, recipe.seed
        self.length, self.carry_limit = _carry(model, recipe.context)
        crop = _crop_length(model, recipe.context)
        self.rows = max(1, round(recipe.batch(crop) * crop / self.length))  # as many bytes per step as in crops
        self._text = CarriedText(documents, self.rows, self.length, self.carry_limit)
        self._session: Any = None

    @property
    def position(self) -> int:
        return self._session.length if self._session is not None else 0

    def begin(self, step: int, carried: dict[str, Tensor] | None = None, position: int = 0) -> None:
        self._pieces = self._text.pieces(self.seed, skip=step)
        self._session = None
        if carried:
            self._session = self.model.session(self.rows)
            self._session.memory.load({k: v.to(_device(self.model)) for k, v in carried.items()})
            self._session.length = position

    def loss(self) -> Tensor:
        piece = next(self._pieces)
        targets = _tokens(piece.targets, self.model)
        if piece.before is None:
            self._session = self.model.session(self.rows)
            before = targets.new_full((self.rows,), self.model.start_symbol)
        else:
            before = _tokens(piece.before, self.model)
        logits = self._session.extend(torch.cat((before[:, None], targets[:, :-1]), 1), keep="all")  # (B, T, V)
        return _mean_loss(logits, targets)

    def cut(self) -> None:
        self._session.detach()

    def state(self) -> dict[str, Tensor]:
        return self._session.memory.tensors() if self._session is not None else {}


def _crop_length(model: Any, context: int) -> int:
    """The bytes of a crop: the training context, or all of a longer position table."""
    return max(model.max_positions or 0, context)


def _carry(model: Any, context: int) -> tuple[int, int | None]:
    """The bytes of a piece, and those after which a carry ends inside a document (None: never)."""
    positions = model.max_positions
    if positions is None:
        grows = model.state_bytes(1, 2 * context) > model.state_bytes(1, context)
        return context, GROWING_CARRY * context if grows else None
    if positions <= context:
        return context, context
    parts = math.ceil(positions / context)
    return positions // parts, positions // parts * parts


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def _tokens(text: NDArray[np.uint8], model: Any) -> Tensor:
    """The same numbers on the model's device."""
    return torch.from_numpy(text.astype(np.int64)).to(_device(model))


def _groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Decay on matrices and larger; none on vectors (norms, biases) nor where a tensor says so (``_no_weight_decay``)."""
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for parameter in model.parameters():
        matrix = parameter.ndim >= 2 and not getattr(parameter, "_no_weight_decay", False)
        (decayed if matrix else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def piece_loss(model: Any, pieces: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats of every byte of pieces (B, T) after the start symbol."""
    start = pieces.new_full((pieces.shape[0], 1), model.start_symbol)
    logits = model.logits(torch.cat((start, pieces[:, :-1]), 1))  # (B, T, V)
    return _mean_loss(logits, pieces)


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)  # float64 stays what it is
    return F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten())


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Products in bfloat16 where the recipe says so; weights, sums and the optimiser stay float32."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@torch.inference_mode()
def validation_bits(model: Any, documents: tuple[Document, ...], recipe: Recipe) -> float | None:
    """Bits per byte on fixed validation pieces of the training context, each from an empty state in either regime.

    None where no document is long enough.
    """
    if not any(d.size >= recipe.context for d in documents):
        return None
    text = TrainingText(documents, recipe.context)
    device = next(model.parameters()).device
    pieces = torch.from_numpy(np.stack(list(islice(text.pieces(0), _VALIDATION_PIECES)))).to(device).long()
    losses = [float(piece_loss(model, part)) * len(part) for part in pieces.split(16)]
    return round(sum(losses) / len(pieces) / math.log(2), 5)
