"""How many bits does a model need for a text, read through a live stream, and which bytes does each bit belong to?

One code path scores every architecture: tokens go in through ``extend`` in pieces and nothing is padded. The log-softmax is taken in
float64, so that a uniform guess is 8 bits exactly; bits are kept as float32.

Byte ledger: a *unit* is a token with its span in the raw bytes. The spans of a text lie end to end, so bits are summed over tokens and
divided by raw bytes, whatever the tokenizer. A model without a start symbol cannot predict its first token: that unit is skipped.

Legend: B streams, S scored bytes, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdh_bench.errors import LawError, PositionLimitError

PIECE = 512  # tokens per extend: bounds what is held, changes no score


@dataclass(frozen=True)
class Units:
    """Consecutive scored tokens: ``bits`` (N,) float32; ``ends`` (N,), byte offsets; the first span begins at ``start``."""

    bits: NDArray[np.float32]
    ends: NDArray[np.int64]
    start: int

    @property
    def byte_count(self) -> int:
        """Raw bytes that these bits pay for."""
        return int(self.ends[-1]) - self.start if len(self.ends) else 0


def bits(logits: Tensor, targets: Tensor) -> NDArray[np.float32]:
    """−log2 p of targets (B, N) under logits (B, N, V), float32 (B, N)."""
    picked = logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    result: NDArray[np.float32] = (picked / -math.log(2)).float().cpu().numpy()
    return result


@torch.inference_mode()
def score_after(model: Any, contexts: NDArray[np.uint8], targets: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bits (B, S) of target bytes (B, S) after the start symbol and context bytes (B, c), from an empty state.

    The last context token is read together with the targets, whose own last token is never an input. With a tokenizer, context
    and targets are encoded apart, so that every context sees the same target tokens and the sum is the code length of exactly
    these bytes; the bits of a token are spread evenly over its span. Raises PositionLimitError where the model is too short.
    """
    if model.tokenizer is None:
        return _score_rows(model, contexts, targets)
    return np.stack([_score_encoded(model, c.tobytes(), t.tobytes()) for c, t in zip(contexts, targets, strict=True)])


def _score_encoded(model: Any, context: bytes, target: bytes) -> NDArray[np.float32]:
    before, encoded = model.tokenizer.encode(context), model.tokenizer.encode(target)
    scored = _score_rows(model, before.ids[None], encoded.ids[None])[0]
    return spread(Units(scored, encoded.ends, 0))


def spread(units: Units) -> NDArray[np.float32]:
    """Bits per byte (S,): each token's bits evenly over its span; those of a token without bytes go to the next byte."""
    starts = np.concatenate(([units.start], units.ends[:-1]))
    widths = units.ends - starts
    owed = units.bits.astype(np.float64)
    for index in np.flatnonzero(widths == 0):  # tokens that share one byte: the last of them owns it
        owed[index + 1] += owed[index]
    kept = widths > 0
    return np.repeat(owed[kept] / widths[kept], widths[kept]).astype(np.float32)


def _score_rows(model: Any, contexts: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float32]:
    """Bits (B, N) of target tokens (B, N) after the start symbol and context tokens (B, C)."""
    start = np.full((len(contexts), int(model.start_symbol is not None)), model.start_symbol or 0)
    read = np.concatenate((start, contexts, targets[:, :-1]), axis=1).astype(np.int64)
    limit = model.max_positions
    if limit is not None and read.shape[1] > limit:
        raise PositionLimitError(
            f"{contexts.shape[1]:,} tokens of context and {targets.shape[1]} targets need more than its {limit:,} positions"
        )
    tokens = torch.from_numpy(read).to(_device(model))
    split = read.shape[1] - targets.shape[1]  # tokens before the one that predicts the first target
    session = model.session(len(contexts))
    for piece in tokens[:, :split].split(PIECE, 1):
        if piece.shape[1]:
            session.extend(piece, keep="last")
    logits = session.extend(tokens[:, split:], keep="all")
    return bits(logits, torch.from_numpy(targets.astype(np.int64)).to(logits.device))


@torch.inference_mode()
def score_stream(model: Any, content: bytes) -> Iterator[Units]:
    """Bits of every token of a text, in order, from an empty state; at most ``PIECE`` units at a time.

    What is held depends on the model's state and the raw text alone. Raises PositionLimitError before anything is read where the
    text is longer than the model's positions.
    """
    encoding = model.tokenizer.encode(content) if model.tokenizer is not None else None
    ids = np.frombuffer(content, dtype=np.uint8) if encoding is None else encoding.ids
    skipped = int(model.start_symbol is None)
    limit = model.max_positions
    if limit is not None and len(ids) - skipped > limit:
        raise PositionLimitError(f"a text of {len(ids):,} tokens needs more than its {limit:,} positions")
    session, device = model.session(1), _device(model)
    for first in range(skipped, len(ids), PIECE):
        last = min(first + PIECE, len(ids))
        before = ids[first - 1 : first] if first else np.array([model.start_symbol])
        read = np.concatenate((before, ids[first : last - 1])).astype(np.int64)
        logits = session.extend(torch.from_numpy(read)[None].to(device), keep="all")
        scored = bits(logits, torch.from_numpy(ids[first:last].astype(np.int64))[None].to(device))[0]
        if encoding is None:
            yield Units(scored, np.arange(first + 1, last + 1), first)
        else:
            yield Units(scored, encoding.ends[first:last], int(encoding.ends[first - 1]) if first else 0)


def score_document(model: Any, content: bytes) -> Units:
    """All units of a text as one, after the ledger was closed: every raw byte is paid for once, but those of a skipped unit.

    Raises LawError for a ledger that does not close, PositionLimitError for a model that is too short.
    """
    parts = list(score_stream(model, content))
    if not parts:
        return Units(np.empty(0, np.float32), np.empty(0, np.int64), len(content))
    joined = Units(np.concatenate([p.bits for p in parts]), np.concatenate([p.ends for p in parts]), parts[0].start)
    gaps = any(int(a.ends[-1]) != b.start for a, b in pairwise(parts))
    falls = (np.diff(joined.ends, prepend=joined.start) < 0).any()
    starts_late = model.start_symbol is not None and joined.start != 0
    if gaps or falls or starts_late or joined.start + joined.byte_count != len(content):
        raise LawError(
            f"the byte ledger does not close: spans from {joined.start:,} to {int(joined.ends[-1]):,} for a text of {len(content):,} bytes",
            "correct the spans of the model's tokenizer",
        )
    return joined


def _device(model: Any) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
