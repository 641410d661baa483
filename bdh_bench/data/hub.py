"""How does a data set of the ``datasets`` library become documents? One document per row, the text column as UTF-8 bytes.

``NAME[:SPLIT][:column=COLUMN]``: NAME is what ``datasets.load_dataset`` takes (a folder of files works without a network) or a
folder written by ``save_to_disk``; SPLIT defaults to ``train``, COLUMN to ``text``. Rows stay in the library's own memory-mapped table
and are decoded when they are used. Our own split by document (train, validation, test) is made inside SPLIT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdh_bench.data.corpus import Document
from bdh_bench.errors import CorpusError, MissingExtraError


@dataclass(frozen=True)
class RowDocument(Document):
    """A document whose bytes are one cell of a table, from ``start`` to ``stop``."""

    table: Any = field(default=None, compare=False, repr=False)
    row: int = 0
    column: str = "text"

    @cached_property
    def size(self) -> int:
        return len(self._bytes())

    @cached_property
    def data(self) -> NDArray[np.uint8]:
        return np.frombuffer(self._bytes(), dtype=np.uint8)

    def _bytes(self) -> bytes:
        text = self.table[self.row][self.column]
        if not isinstance(text, str):
            raise CorpusError(
                f"column {self.column!r} holds {type(text).__name__} in row {self.row} · expected text",
                "name another one with :column=NAME",
            )
        return text.encode("utf-8", "surrogatepass")[self.start : self.stop]

    def _parts(self) -> Iterator[bytes]:
        yield self._bytes()


def rows_of(spec: str) -> list[Document]:
    """The rows of the data set that are not empty. Raises MissingExtraError, CorpusError."""
    name, split, column = _parsed(spec)
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"--data hf:{spec} needs the package {error.name}", "pip install 'bdh-bench[hf]'"
        ) from error
    table = _table(datasets, name, split)
    if column not in table.column_names:
        raise CorpusError(
            f"{name} has no column {column!r} · it has {', '.join(table.column_names)}", "name one with :column=NAME"
        )
    digits = len(str(max(len(table) - 1, 0)))
    rows = [
        RowDocument(f"{split}-{row:0{digits}}", Path(name), table=table, row=row, column=column)
        for row in range(len(table))
    ]
    found: list[Document] = [row for row in rows if row.size]
    if not found:
        raise CorpusError(f"{name} ({split}) has no text in column {column!r}", "choose another split or column")
    return found


def _parsed(spec: str) -> tuple[str, str, str]:
    parts = spec.split(":")
    columns = [part.removeprefix("column=") for part in parts[1:] if part.startswith("column=")]
    splits = [part for part in parts[1:] if not part.startswith("column=")]
    if not parts[0] or len(columns) > 1 or len(splits) > 1 or not all((*columns, *splits)):
        raise CorpusError(f"got hf:{spec} · expected hf:NAME[:SPLIT][:column=COLUMN]")
    return parts[0], (splits or ["train"])[0], (columns or ["text"])[0]


def _table(datasets: Any, name: str, split: str) -> Any:
    saved = Path(name).expanduser()
    try:
        if any((saved / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            table = datasets.load_from_disk(str(saved))
            return table[split] if hasattr(table, "keys") else table
        return datasets.load_dataset(str(saved) if saved.exists() else name, split=split)
    except (
        OSError,
        ValueError,
        KeyError,
    ) as error:  # what the library raises for a name, a split or a file that is not there
        reason = " ".join(str(error).split())[:300]
        raise CorpusError(
            f"cannot open the data set {name} ({split}): {reason}", "check the name and the split"
        ) from error
