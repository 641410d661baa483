"""In which order do training bytes come? The same for every model: one seeded sequence of random crops.

A piece is the start symbol followed by T bytes; all T bytes are targets, so what goes in is the start symbol and the first T − 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bdh_bench.data.corpus import Document
from bdh_bench.errors import CorpusError


class TrainingText:
    """The training documents joined end to end, with crops that never cross a document's edge."""

    def __init__(self, documents: Sequence[Document], length: int) -> None:
        contents = [d.content for d in documents if len(d.content) >= length]
        if not contents:
            raise CorpusError(
                f"no training document holds a piece of {length:,} bytes",
                "use longer documents or a shorter --train-context",
            )
        self.length = length
        self.text = np.frombuffer(b"".join(contents), dtype=np.uint8)
        sizes = np.array([len(c) for c in contents])
        self._starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        self._crops = np.cumsum(sizes - length + 1)  # how many crops begin in documents up to this one

    def pieces(self, seed: int, skip: int = 0) -> Iterator[NDArray[np.uint8]]:
        """An endless sequence of crops (T,); every crop is as likely as any other. ``skip`` crops are passed over."""
        generator = np.random.default_rng([seed, 0x7EB7])
        while True:
            for number in generator.integers(self._crops[-1], size=4096):
                if skip:
                    skip -= 1
                    continue
                document = int(np.searchsorted(self._crops, number, side="right"))
                before = self._crops[document - 1] if document else 0
                start = self._starts[document] + number - before
                yield self.text[start : start + self.length]
