"""Which bytes are scored, so that every context and every model scores the same ones?

The same-target sweep (protocol-quality §3.4): K blocks of S bytes per document, each far enough from the start that the longest
context fits before it. Nothing here is random.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bdh_bench.data.corpus import Document, name_hash
from bdh_bench.errors import CorpusError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ALIGNMENT_REACH = 64
_STREAM_CONTEXTS = 16
_WHITESPACE = b" \t\n\r\v\f"


@dataclass(frozen=True)
class Targets:
    """Target blocks of some documents. ``starts[d]`` are the offsets p_j in document d; each block has ``block`` bytes."""

    documents: tuple[Document, ...]
    starts: tuple[tuple[int, ...], ...]
    block: int
    longest: int
    unaligned: int

    @property
    def hash(self) -> str:
        """Over (document sha, p_j, S): points with equal hashes scored identical bytes."""
        digest = hashlib.sha256()
        for document, starts in zip(self.documents, self.starts, strict=True):
            for start in starts:
                digest.update(f"{document.sha256} {start} {self.block}\n".encode())
        return digest.hexdigest()[:16]


def needed_bytes(longest: int, block: int) -> int:
    """Shortest document that can hold a block after ``longest`` bytes of context."""
    return longest + block + _ALIGNMENT_REACH


def stream_bytes(asked: int, train_context: int) -> int:
    """How many bytes of a document are scored as a stream: those asked for (0: 16 training contexts)."""
    return asked or _STREAM_CONTEXTS * train_context


def choose_longest(documents: Sequence[Document], contexts: Sequence[int], block: int, wanted: int) -> tuple[int, ...]:
    """The contexts for which at least ``wanted`` documents are long enough (or one, where the text has no more).

    Raises CorpusError where even the shortest context does not fit into any document.
    """
    sizes = sorted((d.size for d in documents), reverse=True)
    enough = sizes[min(wanted, len(sizes)) - 1]
    kept = tuple(c for c in contexts if needed_bytes(c, block) <= enough)
    kept = kept or tuple(c for c in contexts[:1] if needed_bytes(c, block) <= sizes[0])
    if not kept:
        raise CorpusError(
            f"the longest test document has {sizes[0]:,} bytes · expected at least {needed_bytes(contexts[0], block):,} for a "
            f"context of {contexts[0]:,}",
            "use longer documents or a shorter --contexts",
        )
    return kept


def choose_targets(documents: Sequence[Document], longest: int, block: int, blocks: int, most: int) -> Targets:
    """Blocks in up to ``most`` documents that are long enough, chosen by the hash of their name."""
    fitting = [d for d in documents if d.size >= needed_bytes(longest, block)]
    if not fitting:
        raise CorpusError(f"no document holds {needed_bytes(longest, block):,} bytes", "use a shorter --contexts")
    chosen = tuple(sorted(sorted(fitting, key=lambda d: name_hash(d.name))[:most], key=lambda d: d.name))
    unaligned = 0
    all_starts: list[tuple[int, ...]] = []
    for document in chosen:
        starts: list[int] = []
        for j in range(blocks):
            room = document.size - longest - block - _ALIGNMENT_REACH
            start, aligned = _after_whitespace(document.data, longest + j * room // blocks)
            unaligned += not aligned
            if start not in starts:  # a document with little room would score a block twice
                starts.append(start)
        all_starts.append(tuple(starts))
    return Targets(chosen, tuple(all_starts), block, longest, unaligned)


def _after_whitespace(text: NDArray[np.uint8], start: int) -> tuple[int, bool]:
    before = text[start - 1 : start + _ALIGNMENT_REACH].tobytes()
    for offset, byte in enumerate(before):
        if byte in _WHITESPACE:
            return start + offset, True
    return start, False
