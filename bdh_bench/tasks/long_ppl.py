"""Does more context help? Bits per byte of the same target bytes after 128, 256, … bytes of context.

Protocol (same-target sweep): K blocks of S bytes per held-out document, each preceded by at least the longest context. For every
context c the model reads the start symbol and the c bytes before the block from an empty state, and the S bytes of the block are
scored. Targets are identical for every context and every model; ``target_hash`` says so. A model with a position limit P is scored
at c ≤ P − S and is drawn as stopped beyond; inputs are never truncated.

Stream score: the first ``stream_bytes`` of each document (default: 16 training contexts), every byte scored once. ``--state`` says
where the state is emptied: ``carry`` never, ``cold`` every training context, ``window`` before each ``stride`` bytes, after a second
reading of the bytes before them (``window`` in all, default: the training context). A model with a position limit that ends before
is ``unsupported`` there too. The bits of every byte are kept: position buckets and recall slices are made of them at reading time.

Boundary probe (``boundary=1``): what a document costs more when another one was read before it and the state was not emptied.

Half of the training (``halfway``): the same targets are scored with the weights that the model had after half of its training bytes, at
T and at the longest context beyond it that keeps this below 35 % of the rest (2: at every context from T on; 0: not at all). More training
can make a model reach less far; the verdict beyond T says whether it did. Weights from elsewhere have no such half.

Start symbol: three documents are scored with and without it, T bytes each; both numbers are facts of the cell.

Cost per document: K · (2·C_max + |C|·S) bytes for the sweep over powers of two, and the stream. The defaults (K = 2) suit two cores; for
a ranking take ``long_ppl:blocks=8`` and at least 20 documents.

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

from bdh_bench.data.targets import Targets, choose_targets, stream_bytes
from bdh_bench.errors import PositionLimitError, SpecError
from bdh_bench.tasks._scoring import (
    CARRY,
    Reading,
    check_reset,
    score_after,
    score_document,
    score_following,
    start_symbol_effect,
)
from bdh_bench.types import Arrays, Measurement, TaskContext

DEFAULTS = {
    "metric": "bits_per_byte",
    "cell_axes": ("seed",),
    "trains": True,
    "reads": True,
    "context_factors": (0.5, 1, 2, 4, 8, 16),
}

_STATE_BUDGET_BYTES = 2**29  # streams are scored together while their states fit into this
_START_DOCUMENTS = 3
_HALFWAY_SHARE = 0.35  # of what all else costs, in bytes that are read
_GATE_BYTES = 256  # of each of two texts, to see whether a state leaks from one to the next


@dataclass(frozen=True)
class Config:
    """What is scored.

    block         S, bytes of a target block
    blocks        K, target blocks per document
    stream_bytes  of a document in the stream score; 0: 16 training contexts
    window        bytes in all with ``--state window``; 0: the training context
    stride        bytes that are scored per window
    boundary      1 adds the boundary probe
    halfway       scores the weights of half the training too: 0 never, 1 at T and one longer context, 2 from T on
    """

    block: int = 128
    blocks: int = 2
    stream_bytes: int = 0
    window: int = 0
    stride: int = 64
    boundary: int = 0
    halfway: int = 1


def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement | Arrays]:
    """One measurement per document and context, and the bits of every scored byte; then the same for the streams."""
    targets = choose_targets(
        context.documents, max(context.contexts), config.block, config.blocks, most=len(context.documents)
    )
    reading = _reading(config, context)
    length = stream_bytes(config.stream_bytes, context.train_context)
    texts = [d.data[:length].tobytes() for d in targets.documents]
    check_reset(
        model, *(text[: min(_GATE_BYTES, model.max_positions or _GATE_BYTES)] for text in (texts[0], texts[-1]))
    )
    context.passed("leak", 0.0, 0.0)
    short = min(context.train_context, model.max_positions or context.train_context)
    context.note("start_symbol_check", start_symbol_effect(model, [text[:short] for text in texts[:_START_DOCUMENTS]]))
    yield from _sweep(model, targets, context)
    yield from _streams(model, targets, texts, reading, context)
    if config.boundary:
        yield from _boundary(model, targets, texts, context)
    if contexts := halfway_contexts(config.halfway, targets, context, length, model.max_positions):
        yield from _halfway(context.halfway(), targets, contexts, context)


def _reading(config: Config, context: TaskContext) -> Reading:
    """Where the state of a stream is emptied. Raises SpecError for a stride longer than its window."""
    if context.state_protocol == "cold":
        return Reading(context.train_context)
    if context.state_protocol == "carry":
        return CARRY
    window = config.window or context.train_context
    if config.stride >= window:
        raise SpecError(f"got stride={config.stride} · expected less than the window of {window} bytes")
    return Reading(config.stride, window - config.stride)


def _sweep(model: Any, targets: Targets, context: TaskContext) -> Iterator[Measurement | Arrays]:
    owner = _owners(targets)
    arrays: dict[str, NDArray[Any]] = {
        "documents": np.array([d.name for d in targets.documents]),
        "block_document": owner,
        "block_start": np.concatenate([np.array(s) for s in targets.starts]),
    }
    for done, length in enumerate(sorted(context.contexts)):
        context.progress("evaluate", done / len(context.contexts), {"context": length})
        metric_id = f"bpb@c={length},S={targets.block}"
        try:
            bits = _score(model, targets, length)
        except PositionLimitError as error:
            axes = {"target_hash": targets.hash}
            yield Measurement(
                "bits_per_byte", None, length, axes=axes, metric_id=metric_id, status="unsupported", reason=str(error)
            )
            continue
        arrays[f"bits_c{length}"] = bits
        yield from _by_document("bits_per_byte", metric_id, length, bits, owner, targets)
    yield Arrays("bits", arrays)


def _score(model: Any, targets: Targets, length: int) -> NDArray[np.float32]:
    """Bits of every target byte, (blocks, S)."""
    texts = [
        d.data[p - length : p + targets.block]
        for d, starts in zip(targets.documents, targets.starts, strict=True)
        for p in starts
    ]
    data = np.stack(texts)
    per_stream = max(1, model.state_bytes(1, length + targets.block))
    together = max(1, min(len(data), _STATE_BUDGET_BYTES // per_stream))
    parts = [data[i : i + together] for i in range(0, len(data), together)]
    return np.concatenate([score_after(model, part[:, :length], part[:, length:]) for part in parts])


def _streams(
    model: Any, targets: Targets, texts: list[bytes], reading: Reading, context: TaskContext
) -> Iterator[Measurement | Arrays]:
    name, metric_id = "stream_bits_per_byte", reading.metric_id
    arrays: dict[str, NDArray[Any]] = {}
    for index, (document, content) in enumerate(zip(targets.documents, texts, strict=True)):
        context.progress("stream", index / len(texts), {})
        try:
            units = score_document(model, content, reading)
        except PositionLimitError as error:
            yield Measurement(name, None, 0, metric_id=metric_id, status="unsupported", reason=str(error))
            return
        total, paid = float(units.bits.astype(np.float64).sum()), units.byte_count
        if paid:
            yield Measurement(name, total / paid, 0, sample=document.name, weight=float(paid), metric_id=metric_id)
        arrays |= {f"bits_{index}": units.bits, f"ends_{index}": units.ends}
        arrays[f"start_{index}"] = np.array(units.start)
    context.passed("ledger", 0.0, 0.0)  # of every document: score_document raises where one does not close
    yield Arrays(
        "stream",
        {
            "documents": np.array([d.name for d in targets.documents]),
            "train_context": np.array(context.train_context),
            "metric_id": np.array(metric_id),
            **arrays,
        },
    )


def halfway_contexts(
    wanted: int, targets: Targets, context: TaskContext, streamed: int, limit: int | None
) -> tuple[int, ...]:
    """T, and the contexts beyond it at which half of the training is scored; () where there are none of both."""
    fitting = [c for c in sorted(context.contexts) if limit is None or c + targets.block <= limit]
    base, beyond = context.train_context, [c for c in fitting if c > context.train_context]
    if not wanted or base not in fitting or not beyond:
        return ()
    if wanted > 1:
        return (base, *beyond)
    blocks = sum(map(len, targets.starts)) / len(targets.documents)
    budget = _HALFWAY_SHARE * (blocks * sum(c + targets.block for c in fitting) + streamed)
    cheap = [c for c in beyond if blocks * (base + c + 2 * targets.block) <= budget]
    return (base, cheap[-1]) if cheap else ()


def _halfway(
    earlier: Any, targets: Targets, contexts: tuple[int, ...], context: TaskContext
) -> Iterator[Measurement | Arrays]:
    """The sweep with the weights of half the training, under a name of its own."""
    if earlier is None:
        return
    arrays: dict[str, NDArray[Any]] = {"documents": np.array([d.name for d in targets.documents])}
    arrays["block_document"] = owner = _owners(targets)
    for done, length in enumerate(contexts):
        context.progress("halfway", done / len(contexts), {"context": length})
        arrays[f"bits_c{length}"] = bits = _score(earlier, targets, length)
        metric_id = f"bpb@halfway,c={length},S={targets.block}"
        yield from _by_document("halfway_bits_per_byte", metric_id, length, bits, owner, targets)
    yield Arrays("halfway", arrays)


def _owners(targets: Targets) -> NDArray[np.int64]:
    """The number of the document of each block."""
    return np.repeat(np.arange(len(targets.documents)), [len(s) for s in targets.starts])


def _by_document(
    metric: str, metric_id: str, length: int, bits: NDArray[np.float32], owner: NDArray[np.int64], targets: Targets
) -> Iterator[Measurement]:
    axes = {"target_hash": targets.hash}
    for index, document in enumerate(targets.documents):
        scored = bits[owner == index].astype(np.float64)
        value, weight = float(scored.mean()), float(scored.size)
        yield Measurement(metric, value, length, axes=axes, sample=document.name, weight=weight, metric_id=metric_id)


def _boundary(model: Any, targets: Targets, texts: list[bytes], context: TaskContext) -> Iterator[Measurement]:
    """Bits per byte of each document after another one without a reset, less those of the document alone."""
    name, metric_id = "boundary_bits_per_byte", "bpb@boundary,state=carry"
    for index, (document, content) in enumerate(zip(targets.documents, texts, strict=True)):
        context.progress("boundary", index / len(texts), {})
        try:
            alone = score_document(model, content)
            after = score_following(model, texts[index - 1], content)
        except PositionLimitError as error:
            yield Measurement(name, None, 0, metric_id=metric_id, status="unsupported", reason=str(error))
            return
        worse = float(after.astype(np.float64).sum() - alone.bits.astype(np.float64).sum())
        paid = alone.byte_count
        yield Measurement(name, worse / paid, 0, sample=document.name, weight=float(paid), metric_id=metric_id)
