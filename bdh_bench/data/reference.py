"""What do models without learning score on the same targets? The lines that every quality figure is read against.

Byte models of order 0, 1 and 2: counts from the training bytes, an order mixed with the one below by the weight of its evidence
(n / (n + distinct successors), Witten and Bell's rule). zlib compresses the longest context with and without the target block.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdh_bench.data.targets import Targets

_UNIFORM = 1.0 / 256.0


def reference_lines(train: NDArray[np.uint8], targets: Targets) -> Iterator[dict[str, Any]]:
    """One row per reference: name, bits_per_byte, n_bytes, target_hash, meaning."""
    blocks = [
        _with_context(d.data, p, targets) for d, s in zip(targets.documents, targets.starts, strict=True) for p in s
    ]
    scored = len(blocks) * targets.block
    common = {"n_bytes": scored, "target_hash": targets.hash}
    for order in (0, 1, 2):
        bits = order_bits(train, blocks, order, targets.longest) / scored
        meaning = f"counts of {len(train):,} training bytes, context of {order} bytes"
        yield {"name": f"order-{order} byte model", "bits_per_byte": bits, "meaning": meaning, **common}
    bits = sum(_zlib_bits(block, targets.longest) for block in blocks) / scored
    meaning = f"zlib level 9: bytes that the target adds to {targets.longest:,} bytes of context"
    yield {"name": "zlib", "bits_per_byte": bits, "meaning": meaning, **common}


def _with_context(text: NDArray[np.uint8], start: int, targets: Targets) -> bytes:
    return text[start - targets.longest : start + targets.block].tobytes()


def _zlib_bits(block: bytes, longest: int) -> float:
    return 8.0 * (len(zlib.compress(block, 9)) - len(zlib.compress(block[:longest], 9)))


def order_bits(train: NDArray[np.uint8], blocks: list[bytes], order: int, skip: int) -> float:
    """Σ −log2 p over the bytes of each block after the first ``skip``; p is mixed over orders 0 … ``order``."""
    data = np.frombuffer(b"".join(blocks), dtype=np.uint8).reshape(len(blocks), -1).astype(np.int64)
    probability = np.full((data.shape[0], data.shape[1] - skip), _UNIFORM)
    for k in range(order + 1):
        counts = np.bincount(_codes(train[None, :].astype(np.int64), k, k).ravel(), minlength=256 ** (k + 1))
        counts = counts.reshape(-1, 256)
        total, distinct = counts.sum(1), (counts > 0).sum(1)
        codes = _codes(data, k, skip)
        context, successor = codes // 256, codes % 256
        weight = np.where(total > 0, total / np.maximum(total + distinct, 1), 0.0)[context]
        share = counts[context, successor] / np.maximum(total[context], 1)
        probability = weight * share + (1 - weight) * probability
    return float(-np.log2(probability).sum())


def _codes(data: NDArray[np.int64], order: int, skip: int) -> NDArray[np.int64]:
    """Each byte from position ``skip`` on with the ``order`` bytes before it, as one number."""
    length = data.shape[1]
    code = np.zeros((data.shape[0], length - skip), dtype=np.int64)
    for back in range(order, -1, -1):
        code = code * 256 + data[:, skip - back : length - back]
    return code
