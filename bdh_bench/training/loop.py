"""How does a model learn? One loop for every architecture: the same bytes in the same order, until the budget is used.

A piece is the start symbol and T bytes, and every byte is a target. A model whose position table is longer than the training
context learns on pieces of its table's length at equal total bytes, so that no position it is later scored at is untrained.

Legend: B pieces per step, T bytes per piece, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bdh_bench.data.corpus import Document
from bdh_bench.data.pieces import TrainingText
from bdh_bench.errors import BenchError
from bdh_bench.measure.clock import now_s
from bdh_bench.training.checkpoints import Checkpoint, optimiser_tensors, restore_optimiser
from bdh_bench.training.recipe import Recipe

_SAVE_EVERY_S = 20.0
_CURVE_POINTS = 50
_VALIDATION_PIECES = 128

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
    if (report := checkpoint.finished()) is not None:
        model.load_state_dict(checkpoint.load_weights())
        model.eval()
        return {**report, "reused": True}
    checkpoint.prepare()
    piece = model.max_positions if model.max_positions and model.max_positions > recipe.context else recipe.context
    run = _Run(model, recipe, TrainingText(documents, piece), checkpoint)
    run.resume()
    try:
        run.finish(progress)
    except KeyboardInterrupt:
        run.save()
        raise
    model.eval()
    bits = validation_bits(model, validation, recipe)
    return {**checkpoint.finish(model.state_dict(), run.report(bits)), "reused": False}


class _Run:
    """One training from its first to its last step; ``step`` counts finished steps."""

    def __init__(self, model: Any, recipe: Recipe, text: TrainingText, checkpoint: Checkpoint) -> None:
        self.model, self.recipe, self.text, self.checkpoint = model, recipe, text, checkpoint
        self.batch, self.steps = recipe.batch(text.length), recipe.steps(text.length)
        self.optimiser = torch.optim.AdamW(
            _groups(model, recipe.weight_decay), lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True
        )
        self.step, self.seconds = 0, 0.0
        self.curve: list[tuple[int, float, float]] = []
        self._pending: list[Tensor] = []

    def finish(self, progress: Progress) -> None:
        """All remaining steps."""
        self.model.train()
        batches = self._batches()
        started = saved = now_s()
        before, first = self.seconds, self.step
        every = max(1, self.steps // _CURVE_POINTS)
        while self.step < self.steps:
            self._pending.append(self._one(next(batches)))
            self.step += 1
            self.seconds = before + now_s() - started
            if self.step % every == 0 or self.step == self.steps:
                bits = self._mark()
                left = (self.steps - self.step) * (self.seconds - before) / (self.step - first)
                progress("train", self.step / self.steps, {"bits_per_byte": bits, "eta_s": left})
            if now_s() - saved > _SAVE_EVERY_S and not self._pending:
                self.save()
                saved = now_s()

    def _one(self, pieces: Tensor) -> Tensor:
        """One optimiser step on pieces (B, T); returns the mean loss in nats, still on the device."""
        rate = self.recipe.rate(self.step, self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with autocast(self.recipe.precision, pieces.device):
            loss = piece_loss(self.model, pieces)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.optimiser.step()
        return loss.detach()

    def _mark(self) -> float:
        """Close a stretch of the curve: bytes so far, mean bits per byte since the last mark, seconds."""
        bits = float(torch.stack(self._pending).mean()) / math.log(2)
        self._pending.clear()
        if not math.isfinite(bits):
            raise BenchError(f"the loss is {bits} after {self.step} steps", "use a smaller --learning-rate")
        self.curve.append((self.step * self.batch * self.text.length, round(bits, 4), round(self.seconds, 2)))
        return bits

    def _batches(self) -> Iterator[Tensor]:
        device = next(self.model.parameters()).device
        pieces = self.text.pieces(self.recipe.seed, skip=self.step * self.batch)
        while True:
            yield torch.from_numpy(np.stack(list(islice(pieces, self.batch)))).to(device).long()

    def save(self) -> None:
        """Keep the state of the last closed stretch (open stretches have no mark yet and are done again)."""
        if self._pending:
            return
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()} | optimiser_tensors(self.optimiser)
        tensors["random_state"] = torch.get_rng_state()
        self.checkpoint.save_partial(tensors, {"step": self.step, "seconds": self.seconds, "curve": self.curve})

    def resume(self) -> None:
        """Go on from a partial checkpoint, if there is one; else start from the recipe's seed."""
        torch.manual_seed(self.recipe.seed)
        kept = self.checkpoint.load_partial()
        if kept is None:
            return
        tensors, facts = kept
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        restore_optimiser(self.optimiser, tensors)
        torch.set_rng_state(tensors["random_state"])
        self.step, self.seconds = facts["step"], facts["seconds"]
        self.curve = [tuple(point) for point in facts["curve"]]

    def report(self, validation: float | None) -> dict[str, Any]:
        """What the fairness card and the training curve need."""
        recipe = self.recipe
        return {
            "bytes": self.steps * self.batch * self.text.length,
            "context": recipe.context,
            "piece_bytes": self.text.length,
            "batch": self.batch,
            "steps": self.steps,
            "learning_rate": recipe.learning_rate,
            "precision": recipe.precision,
            "seed": recipe.seed,
            "seconds": round(self.seconds, 2),
            "final_bits_per_byte": self.curve[-1][1],
            "validation_bits_per_byte": validation,
            "curve": self.curve,
        }


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
    return F.cross_entropy(logits.flatten(0, 1).float(), pieces.flatten())


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Products in bfloat16 where the recipe says so; weights, sums and the optimiser stay float32."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


@torch.inference_mode()
def validation_bits(model: Any, documents: tuple[Document, ...], recipe: Recipe) -> float | None:
    """Bits per byte on fixed validation pieces of the training context; None where no document is long enough."""
    if not any(len(d.content) >= recipe.context for d in documents):
        return None
    text = TrainingText(documents, recipe.context)
    device = next(model.parameters()).device
    pieces = torch.from_numpy(np.stack(list(islice(text.pieces(0), _VALIDATION_PIECES)))).to(device).long()
    losses = [float(piece_loss(model, part)) * len(part) for part in pieces.split(16)]
    return round(sum(losses) / len(pieces) / math.log(2), 5)
