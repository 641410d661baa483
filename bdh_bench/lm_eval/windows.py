"""How many bits does a whole document cost, also where it is longer than the model's positions?

A model without a last position reads every document as one stream with carried state: no windows, no limit. One with a last position
stops there (``stop``, the default: PositionLimitError) unless windows are asked for: ``sliding:STRIDE`` scores the first P tokens in one
piece, then STRIDE tokens at a time, each after re-reading the tokens before them, P tokens in all, from an empty state. Windows are
part of the metric's name; the two are never compared.

Legend: P positions of the model, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bdh_bench.errors import LawError, PositionLimitError, SpecError
from bdh_bench.tasks._scoring import PIECE, Units, bits, score_document


@dataclass(frozen=True)
class Windowing:
    """``stride`` 0 is ``stop``."""

    stride: int = 0

    @classmethod
    def parse(cls, text: str) -> Windowing:
        """``stop`` or ``sliding:STRIDE``. Raises SpecError."""
        name, _, stride = text.partition(":")
        if text == "stop":
            return cls()
        if name == "sliding" and stride.isascii() and stride.isdigit() and int(stride) > 0:
            return cls(int(stride))
        raise SpecError(f"got windowing {text!r} · expected stop or sliding:STRIDE", "for example sliding:64")

    def label(self, model: Any) -> str:
        """What a metric's name says of it: nothing where no window is ever needed."""
        if self.stride and model.max_positions is not None:
            return f"window={model.max_positions},stride={self.stride}"
        return "stream,state=carry"


def score_rolling(model: Any, content: bytes, windowing: Windowing) -> Units:
    """All units of a document, each scored once. Raises PositionLimitError with ``stop``, SpecError for a stride over P."""
    try:
        return score_document(model, content)
    except PositionLimitError as error:
        if not windowing.stride:
            raise PositionLimitError(
                error.message, "score with windowing=sliding:STRIDE, which is another metric, or use shorter documents"
            ) from error
    return _score_windows(model, content, windowing.stride)


@torch.inference_mode()
def _score_windows(model: Any, content: bytes, stride: int) -> Units:
    limit = int(model.max_positions)
    if stride > limit:
        raise SpecError(f"got a stride of {stride} · expected at most the model's {limit} positions")
    encoding = model.tokenizer.encode(content) if model.tokenizer is not None else None
    ids = (np.frombuffer(content, np.uint8) if encoding is None else encoding.ids).astype(np.int64)
    ends = np.arange(1, len(ids) + 1) if encoding is None else encoding.ends
    skipped = int(model.start_symbol is None)
    read = (
        ids if skipped else np.concatenate(([model.start_symbol], ids))
    )  # read[i] is followed by its target read[i + 1]
    scored: list[NDArray[np.float32]] = []
    done = 1  # the next target, as an index into read
    while done < len(read):
        stop = min(len(read), done + (stride if scored else limit))
        scored.append(_last(model, read[max(0, stop - 1 - limit) : stop], stop - done))
        done = stop
    units = Units(np.concatenate(scored), ends[skipped:], int(ends[0]) if skipped else 0)
    if units.start + units.byte_count != len(content) or len(units.bits) != len(units.ends):
        raise LawError(f"the byte ledger does not close for a text of {len(content):,} bytes", "correct the tokenizer")
    return units


def _last(model: Any, window: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """Bits of the last ``count`` tokens of a window, from an empty state."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tokens = torch.from_numpy(window)[None].to(device)
    session, split = model.session(1), len(window) - count - 1
    for piece in tokens[:, :split].split(PIECE, 1):
        if piece.shape[1]:
            session.extend(piece)
    logits = session.extend(tokens[:, split:-1], keep="all")
    scored: NDArray[np.float32] = bits(logits, tokens[:, -count:])[0]
    return scored
