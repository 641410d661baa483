"""How many bits does a model need for a text, read through a live stream, and which bytes does each bit belong to?

One code path scores every architecture: tokens go in through ``extend`` in pieces and nothing is padded. The log-softmax is taken in
float64, so that a uniform guess is 8 bits exactly; bits are kept as float32.

Byte ledger: a *unit* is a token with its span in the raw bytes. The spans of a text lie end to end, so bits are summed over tokens and
divided by raw bytes, whatever the tokenizer. A model without a start symbol cannot predict its first token: that unit is skipped.

Legend: B streams, S scored bytes, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdh_bench.errors import LawError, PositionLimitError
from bdh_bench.types import Encoding

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


@dataclass(frozen=True)
class Reading:
    """Where the state of a stream is emptied: before every ``stride`` bytes, of which up to ``before`` bytes are read again.

    ``stride`` 0 is ``carry``: never inside a text. ``before`` 0 is ``cold``, else ``window`` of ``before + stride`` bytes.
    """

    stride: int = 0
    before: int = 0

    @property
    def metric_id(self) -> str:
        """The protocol as part of a metric's identity."""
        if not self.stride:
            return "bpb@stream,state=carry"
        if not self.before:
            return f"bpb@stream,state=cold,block={self.stride}"
        return f"bpb@window={self.before + self.stride},stride={self.stride}"


CARRY = Reading()


@torch.inference_mode()
def score_stream(model: Any, content: bytes, reading: Reading = CARRY) -> Iterator[Units]:
    """Bits of every token of a text, in order; at most ``PIECE`` units at a time.

    What is held depends on the model's state and the raw text alone. Raises PositionLimitError before anything is read where a
    stretch is longer than the model's positions.
    """
    encoding = model.tokenizer.encode(content) if model.tokenizer is not None else None
    ids = np.frombuffer(content, dtype=np.uint8) if encoding is None else encoding.ids
    segments = list(_segments(ids, encoding, reading)) if len(ids) else []
    skipped = int(model.start_symbol is None)  # a model without start symbol starts from a token of the text
    limit, longest = model.max_positions, max((last - max(read, skipped) for read, _, last in segments), default=0)
    if limit is not None and longest > limit:
        raise PositionLimitError(f"a text of {longest:,} tokens needs more than its {limit:,} positions")
    for read, first, last in segments:
        session = model.session(1)
        for a, scored in _score_segment(model, session, ids, (max(read, skipped), max(first, skipped), last)):
            b = a + len(scored)
            if encoding is None:
                yield Units(scored, np.arange(a + 1, b + 1), a)
            else:
                yield Units(scored, encoding.ends[a:b], int(encoding.ends[a - 1]) if a else 0)


def _segments(ids: NDArray[Any], encoding: Encoding | None, reading: Reading) -> Iterator[tuple[int, int, int]]:
    """(first token read, first token scored, end) of each stretch that begins with an empty state."""
    if not reading.stride:
        yield 0, 0, len(ids)
        return
    starts = np.arange(len(ids)) if encoding is None else np.concatenate(([0], encoding.ends[:-1]))
    block = starts // reading.stride
    edges = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(starts)]
    for first, last in pairwise(edges):
        reach = int(block[first]) * reading.stride - reading.before
        yield min(int(np.searchsorted(starts, reach)), first) if reading.before else first, first, last


def _score_segment(
    model: Any, session: Any, ids: NDArray[Any], segment: tuple[int, int, int]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(number of the first token, bits) of the scored tokens of a segment, read by ``session`` on from what it knows."""
    read, first, last = segment
    device = _device(model)

    def known(a: int, b: int) -> Tensor:
        """What is read before each of the tokens a … b − 1, (1, b − a)."""
        starts = a == read and model.start_symbol is not None
        before = np.array([model.start_symbol]) if starts else ids[a - 1 : a]
        return torch.from_numpy(np.concatenate((before, ids[a : b - 1])).astype(np.int64))[None].to(device)

    for a in range(read, first, PIECE):
        session.extend(known(a, min(a + PIECE, first)), keep="last")
    for a in range(first, last, PIECE):
        b = min(a + PIECE, last)
        logits = session.extend(known(a, b), keep="all")
        yield a, bits(logits, torch.from_numpy(ids[a:b].astype(np.int64))[None].to(device))[0]


@torch.inference_mode()
def score_following(model: Any, before: bytes, content: bytes) -> NDArray[np.float32]:
    """Bits per token of a text that is read with its start symbol after another one, the state not emptied in between."""
    first, second = (
        np.frombuffer(text, dtype=np.uint8) if model.tokenizer is None else model.tokenizer.encode(text).ids
        for text in (before, content)
    )
    start = [model.start_symbol] if model.start_symbol is not None else []
    session, known = model.session(1), np.concatenate((start, first)).astype(np.int64)
    for a in range(0, len(known), PIECE):
        session.extend(torch.from_numpy(known[a : a + PIECE])[None].to(_device(model)), keep="last")
    skipped = 1 - len(start)
    return np.concatenate([s for _, s in _score_segment(model, session, second, (skipped, skipped, len(second)))])


def start_symbol_effect(model: Any, texts: Sequence[bytes]) -> dict[str, float] | None:
    """Bits per byte of these texts with and without the start symbol, over the same bytes; None for a model that has none.

    Without it a text's first token cannot be predicted: it is left out on both sides.
    """
    if model.start_symbol is None:
        return None
    silent = copy.copy(model)  # the parameters are shared
    silent.start_symbol = None
    paid, sums = 0, np.zeros(2)
    for text in texts:
        off = score_document(silent, text)
        on = score_document(model, text).bits[-len(off.bits) :] if len(off.bits) else off.bits
        sums += on.astype(np.float64).sum(), off.bits.astype(np.float64).sum()
        paid += off.byte_count
    if not paid:
        return None
    with_it, without = (sums / paid).tolist()
    return {"on": with_it, "off": without, "difference": without - with_it, "documents": len(texts), "bytes": paid}


def check_reset(model: Any, first: bytes, second: bytes) -> None:
    """Gate: a text scores the same, bit for bit, whatever was scored before it. Raises LawError."""
    alone = np.concatenate([units.bits for units in score_stream(model, first)])
    for _ in score_stream(model, second):
        pass
    again = np.concatenate([units.bits for units in score_stream(model, first)])
    if not np.array_equal(alone, again, equal_nan=True):
        apart = float(np.abs(alone - again).max())
        raise LawError(
            f"a state leaks between documents: the same {len(first):,} bytes score up to {apart:.3g} bits "
            "apart before and after another text",
            "let session() begin with an empty memory of its own",
            "leak",
            apart,
            0.0,
        )


def score_document(model: Any, content: bytes, reading: Reading = CARRY) -> Units:
    """All units of a text as one, after the ledger was closed: every raw byte is paid for once, but those of a skipped unit.

    Raises LawError for a ledger that does not close, PositionLimitError for a model that is too short.
    """
    parts = list(score_stream(model, content, reading))
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
            "ledger",
        )
    return joined


def _device(model: Any) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
