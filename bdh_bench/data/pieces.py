"""In which order do training bytes come? The same for every model: one seeded sequence.

``TrainingText``: random crops. A piece is the start symbol followed by T bytes; all T bytes are targets, so what goes in is the
start symbol and the first T − 1.

``CarriedText``: whole documents. The B rows of a batch read B equal stretches of one document side by side, T bytes at a time;
what goes in is each target's previous byte, and the start symbol where a row starts with an empty state.

Both refuse a test document, whoever gives it to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from bdh_bench.data.corpus import Document, refuse_test
from bdh_bench.errors import CorpusError


class TrainingText:
    """The training documents, with crops that never cross a document's edge. Nothing is copied or read before it is a piece."""

    def __init__(self, documents: Sequence[Document], length: int) -> None:
        refuse_test(documents)
        self._documents = [d for d in documents if d.size >= length]
        if not self._documents:
            raise CorpusError(
                f"no training document holds a piece of {length:,} bytes",
                "use longer documents or a shorter --train-context",
            )
        self.length = length
        self._crops = np.cumsum(
            [d.size - length + 1 for d in self._documents]
        )  # crops that begin in documents up to this one

    def pieces(self, seed: int, skip: int = 0) -> Iterator[NDArray[np.uint8]]:
        """An endless sequence of crops (T,); every crop is as likely as any other. ``skip`` crops are passed over."""
        generator = np.random.default_rng([seed, 0x7EB7])
        while True:
            for number in generator.integers(self._crops[-1], size=4096):
                if skip:
                    skip -= 1
                    continue
                document = int(np.searchsorted(self._crops, number, side="right"))
                start = int(number - self._crops[document - 1]) if document else int(number)
                yield self._documents[document].data[start : start + self.length]


@dataclass(frozen=True)
class CarriedPiece:
    """``targets`` (B, T); ``before`` (B,), the byte in front of each row, or None where all rows start with an empty state."""

    targets: NDArray[np.uint8]
    before: NDArray[np.uint8] | None


class CarriedText:
    """Training documents cut into ``rows`` equal stretches, read side by side in pieces of ``length`` bytes per row.

    Rows start with an empty state when the document changes and, with a ``limit``, before a piece that would pass ``limit`` bytes
    since the last empty state. Documents shorter than rows · length are skipped; a tail that fills no piece is dropped.
    """

    def __init__(self, documents: Sequence[Document], rows: int, length: int, limit: int | None = None) -> None:
        refuse_test(documents)
        step = rows * length
        contents = [d for d in documents if d.size >= step]
        if not contents:
            raise CorpusError(
                f"no training document holds {rows} rows of {length:,} bytes",
                "use longer documents, a shorter --train-context or --regime crop",
            )
        self.rows, self.length = rows, length
        self._pieces = [d.size // step for d in contents]
        self._tables = [  # (B, bytes of a stretch)
            d.data[: n * step].reshape(rows, n * length) for d, n in zip(contents, self._pieces, strict=True)
        ]
        self._carried = (
            max(1, limit // length) if limit else max(self._pieces)
        )  # pieces from one empty state to the next

    def pieces(self, seed: int, skip: int = 0) -> Iterator[CarriedPiece]:
        """An endless sequence; every epoch reads every document once, in an order of its own. ``skip`` pieces are passed over."""
        first, skip = divmod(skip, sum(self._pieces))
        for epoch in count(first):
            for number in np.random.default_rng([seed, 0xCA44, epoch]).permutation(len(self._tables)):
                for index in range(skip, self._pieces[number]):
                    yield self._piece(self._tables[number], index)
                skip = max(0, skip - self._pieces[number])

    def _piece(self, table: NDArray[np.uint8], index: int) -> CarriedPiece:
        start = index * self.length
        before = table[:, start - 1] if index % self._carried else None
        return CarriedPiece(table[:, start : start + self.length], before)
