"""Does more context help? Bits per byte of the same target bytes after 128, 256, … bytes of context.

Protocol (same-target sweep): K blocks of S bytes per held-out document, each preceded by at least the longest context. For every
context c the model reads the start symbol and the c bytes before the block from an empty state, and the S bytes of the block are
scored. Targets are identical for every context and every model; ``target_hash`` says so. A model with a position limit P is scored
at c ≤ P − S and is drawn as stopped beyond; inputs are never truncated.

Caveats: the k-th byte of a block sees c + k bytes. Few documents (fewer than 20) give a smoke result that ranks nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdh_bench.data.targets import Targets, choose_targets
from bdh_bench.tasks._scoring import score_after
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
    """``block`` is S, ``blocks`` is K."""

    block: int = 128
    blocks: int = 2


def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement | Arrays]:
    """One measurement per document and context, and the bits of every scored byte."""
    targets = choose_targets(
        context.documents, max(context.contexts), config.block, config.blocks, most=len(context.documents)
    )
    owner = np.repeat(np.arange(len(targets.documents)), [len(s) for s in targets.starts])
    arrays: dict[str, NDArray[Any]] = {
        "documents": np.array([d.name for d in targets.documents]),
        "block_document": owner,
        "block_start": np.concatenate([np.array(s) for s in targets.starts]),
    }
    for done, length in enumerate(sorted(context.contexts)):
        context.progress("evaluate", done / len(context.contexts), {"context": length})
        if model.max_positions is not None and length + config.block > model.max_positions:
            reason = f"{length} bytes of context and {config.block} targets need more than its {model.max_positions} positions"
            yield Measurement(
                "bits_per_byte",
                None,
                length,
                axes={"target_hash": targets.hash},
                metric_id=_metric_id(config, length),
                status="unsupported",
                reason=reason,
            )
            continue
        bits = _score(model, targets, length)
        arrays[f"bits_c{length}"] = bits
        yield from _measurements(bits, owner, targets, config, length)
    yield Arrays("bits", arrays)


def _metric_id(config: Config, length: int) -> str:
    return f"bpb@c={length},S={config.block}"


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


def _measurements(
    bits: NDArray[np.float32], owner: NDArray[Any], targets: Targets, config: Config, length: int
) -> Iterator[Measurement]:
    for index, document in enumerate(targets.documents):
        scored = bits[owner == index].astype(np.float64)
        yield Measurement(
            "bits_per_byte",
            float(scored.mean()),
            length,
            axes={"target_hash": targets.hash},
            sample=document.name,
            weight=float(scored.size),
            metric_id=_metric_id(config, length),
        )
