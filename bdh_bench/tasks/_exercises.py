"""Where do the symbols and the chance of a generated example come from, and how are its answers read?

An example is made from a hash of (task, split, index) alone, so that it does not depend on what was made before it, on the model or on
the seed of the weights: every model meets the same ones, and the sha256 of all that a cell examines (``dataset``) goes into its rows:
results on examples that are not the same are not compared. Symbols are token ids in ranges that do not overlap, none of which is the start
symbol; how many there are follows from the vocabulary.

Legend: B examples, T tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdh_bench.tasks._scoring import PIECE
from bdh_bench.types import TaskContext

NO_ANSWER = -1
#: Elements of logits that are held at once.
_LOGITS = 2**25

Ids = NDArray[np.int64]


def generator(*identity: str | int) -> np.random.Generator:
    """A generator that depends on these words and numbers alone."""
    digest = hashlib.sha256("/".join(map(str, identity)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def dataset(context: TaskContext, arrays: Iterable[NDArray[Any]]) -> dict[str, str]:
    """The axis that names everything a cell examines, short; the whole sha256 is noted in its facts.

    One name for the cell and not one per point: points that are joined by a line are of one data set.
    """
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}\n".encode() + array.tobytes())
    context.note("data_sha256", digest.hexdigest())
    return {"target_hash": digest.hexdigest()[:16]}


def symbols(model: Any, first: int, count: int) -> Ids:
    """``count`` token ids from ``first`` on, the start symbol left out. Raises ValueError for a vocabulary that is too small."""
    ids = [i for i in range(first, first + count + 1) if i != model.start_symbol][:count]
    if ids[-1] >= model.vocab_size:
        raise ValueError(f"{model.vocab_size} tokens are too few for ids up to {ids[-1]}")
    return np.array(ids, dtype=np.int64)


@torch.inference_mode()
def choices(model: Any, tokens: Ids, answers: Ids) -> Ids:
    """The likeliest token at every answer of a batch (B, T), NO_ANSWER elsewhere; read through a stream in pieces."""
    chosen = np.full(answers.shape, NO_ANSWER, dtype=np.int64)
    together = max(1, _LOGITS // (min(PIECE, tokens.shape[1]) * model.vocab_size))
    for start in range(0, len(tokens), together):
        rows = slice(start, start + together)
        chosen[rows] = _read(model, tokens[rows], answers[rows])
    return chosen


def _read(model: Any, tokens: Ids, answers: Ids) -> Ids:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    text = torch.from_numpy(tokens).to(device)
    start = text.new_full((len(text), 1), model.start_symbol or 0)
    read = torch.cat((start, text[:, :-1]), 1)
    session = model.session(len(text))
    parts: list[Tensor] = [session.extend(piece, keep="all").argmax(-1) for piece in read.split(PIECE, 1)]
    found: Ids = torch.cat(parts, 1).cpu().numpy()
    return np.where(answers == NO_ANSWER, NO_ANSWER, found)


def fits(model: Any, length: int) -> str:
    """Why an example of ``length`` tokens cannot be read by this model, or ""."""
    limit = model.max_positions
    return f"{length:,} tokens need more than its {limit:,} positions" if limit is not None and length > limit else ""


def untaught(model: Any, weights: str) -> str:
    """Why this model cannot be examined on generated examples, or ""."""
    if weights == "random" and getattr(model, "trainable", True):
        return "these weights are random: nothing was practised"
    return ""
