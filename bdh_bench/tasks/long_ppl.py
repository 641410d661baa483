"""Does more context help? Bits per byte of the same target bytes after 128, 256, … bytes of context.

Protocol (same-target sweep): K blocks of S bytes per held-out document, each preceded by at least the longest context. For every
context c the model reads the start symbol and the c bytes before the block from an empty state, and the S bytes of the block are
scored. Targets are identical for every context and every model; ``target_hash`` says so. A model with a position limit P is scored
at c ≤ P − S and is drawn as stopped beyond; inputs are never truncated.

Stream score: the first ``stream_bytes`` of each document, read once from an empty state to the end; every byte is scored once. A model
with a position limit that ends before is ``unsupported`` there too.

With a tokenizer of its own a model is scored on the same raw bytes (``_scoring``): a block is encoded apart from its context. A
tokenizer that joins a space to the word behind it pays for a block that begins after a space; the stream score has no such seam.

Caveats: the k-th byte of a block sees c + k bytes. Few documents (fewer than 20) give a smoke result that ranks nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdh_bench.data.targets import Targets, choose_targets
from bdh_bench.errors import PositionLimitError
from bdh_bench.tasks._scoring import score_after, score_document
from bdh_bench.types import Arrays, Measurement, TaskContext

DEFAULTS = {
    "metric": "bits_per_byte",
    "cell_axes": ("seed",),
    "trains": True,
    "reads": True,
    "context_factors": (0.5, 1, 2, 4, 8),
}

_STATE_BUDGET_BYTES = 2**29  # streams are scored together while their states fit into this


@dataclass(frozen=True)
class Config:
    """``block`` is S, ``blocks`` is K; ``stream_bytes`` of each document are scored as a stream."""

    block: int = 128
    blocks: int = 2
    stream_bytes: int = 8192


def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement | Arrays]:
    """One measurement per document and context, and the bits of every scored byte; then the same for the streams."""
    targets = choose_targets(
        context.documents, max(context.contexts), config.block, config.blocks, most=len(context.documents)
    )
    yield from _sweep(model, targets, context)
    yield from _streams(model, targets, config, context)


def _sweep(model: Any, targets: Targets, context: TaskContext) -> Iterator[Measurement | Arrays]:
    owner = np.repeat(np.arange(len(targets.documents)), [len(s) for s in targets.starts])
    arrays: dict[str, NDArray[Any]] = {
        "documents": np.array([d.name for d in targets.documents]),
        "block_document": owner,
        "block_start": np.concatenate([np.array(s) for s in targets.starts]),
    }
    for done, length in enumerate(sorted(context.contexts)):
        context.progress("evaluate", done / len(context.contexts), {"context": length})
        about: dict[str, Any] = {
            "axes": {"target_hash": targets.hash},
            "metric_id": f"bpb@c={length},S={targets.block}",
        }
        try:
            bits = _score(model, targets, length)
        except PositionLimitError as error:
            yield Measurement("bits_per_byte", None, length, status="unsupported", reason=str(error), **about)
            continue
        arrays[f"bits_c{length}"] = bits
        for index, document in enumerate(targets.documents):
            scored = bits[owner == index].astype(np.float64)
            weight = float(scored.size)
            yield Measurement(
                "bits_per_byte", float(scored.mean()), length, sample=document.name, weight=weight, **about
            )
    yield Arrays("bits", arrays)


def _score(model: Any, targets: Targets, length: int) -> NDArray[np.float32]:
    """Bits of every target byte, (blocks, S)."""
    texts = [
        np.frombuffer(d.content[p - length : p + targets.block], dtype=np.uint8)
        for d, starts in zip(targets.documents, targets.starts, strict=True)
        for p in starts
    ]
    data = np.stack(texts)
    per_stream = max(1, model.state_bytes(1, length + targets.block))
    together = max(1, min(len(data), _STATE_BUDGET_BYTES // per_stream))
    parts = [data[i : i + together] for i in range(0, len(data), together)]
    return np.concatenate([score_after(model, part[:, :length], part[:, length:]) for part in parts])


def _streams(model: Any, targets: Targets, config: Config, context: TaskContext) -> Iterator[Measurement | Arrays]:
    name, metric_id = "stream_bits_per_byte", "bpb@stream,state=carry"
    arrays: dict[str, NDArray[Any]] = {}
    for index, document in enumerate(targets.documents):
        context.progress("stream", index / len(targets.documents), {})
        content = document.content[: config.stream_bytes]
        try:
            units = score_document(model, content)
        except PositionLimitError as error:
            yield Measurement(name, None, 0, metric_id=metric_id, status="unsupported", reason=str(error))
            return
        total, paid = float(units.bits.astype(np.float64).sum()), units.byte_count
        if paid:
            yield Measurement(name, total / paid, 0, sample=document.name, weight=float(paid), metric_id=metric_id)
        arrays |= {f"bits_{index}": units.bits, f"ends_{index}": units.ends}
    yield Arrays("stream", {"documents": np.array([d.name for d in targets.documents]), **arrays})
