"""What is known of a run's texts before any model reads them? Overlap with the training text, and what each byte's past says of it.

Both depend on texts only: they are made once, when a run is created, and are the same for every model (``data.windows``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bdh_bench.data.corpus import Document

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Texts:
    """``scored`` test documents, of which the first ``length`` bytes are scored as a stream, and the ``training`` documents."""

    scored: tuple[Document, ...]
    training: tuple[Document, ...]
    length: int

    def _trained(self) -> Iterator[NDArray[np.uint8]]:
        return (document.data for document in self.training)

    def overlap(self) -> dict[str, float]:
        """By document, the share of its 50-byte windows that the training text has too."""
        from bdh_bench.data.windows import shared_shares

        shares = shared_shares([document.data for document in self.scored], self._trained())
        return {document.name: round(share, 6) for document, share in zip(self.scored, shares, strict=True)}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Names of the scored documents and the classes (int32) of every byte of their streams."""
        import numpy as np

        from bdh_bench.data.windows import match_classes

        classes = match_classes([document.data[: self.length] for document in self.scored], self._trained())
        names = np.array([document.name for document in self.scored])
        return {"documents": names, **{f"classes_{i}": own for i, own in enumerate(classes)}}
