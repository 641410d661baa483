"""What do the offline tasks ask? Pieces of the running Python's standard library, from the split that no training may read.

Documents are those of ``data/corpus`` with 16 KiB or more that are UTF-8, in the order of the hash of their names; offsets and the order
of options come from hashes too, so every process asks the same. Keyword arguments are what lm-eval hands on (``--metadata``): ``data`` is
another corpus, ``documents`` the number of them. Every row names its document (``bdh_document``): rows of one are resampled together.

    streams   the beginning of a document                            rolling log-likelihood → bits per byte
    choices   a passage, and four lines, one of which comes next     multiple choice, chance 1/4
    clozes    a passage that ends inside a name used before          generation, exact match of the rest of the name
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Any

from bdh_bench.data.corpus import Document, name_hash, open_corpus
from bdh_bench.errors import CorpusError

_LEAST_BYTES = 16_384
_CONTEXT = 320  # characters before a question; with an option it fits the smallest position table of a default run
_OPTION = 32  # characters of an option
_OPTIONS = 4
_GIVEN = 3  # characters of a name that a cloze shows
_NAME = re.compile(r"[A-Za-z_]{8,32}")


def streams(data: str = "stdlib", documents: int = 40, stream_bytes: int = 8192, **_: Any) -> dict[str, Any]:
    """One row per document: its first ``stream_bytes`` bytes, to the last whole character."""
    found = _documents(data, documents)
    return _dataset([{"bdh_document": d.name, "text": d.content[:stream_bytes].decode(errors="ignore")} for d in found])


def choices(data: str = "stdlib", documents: int = 40, questions: int = 2, **_: Any) -> dict[str, Any]:
    """``questions`` rows per document; the other three options are lines from elsewhere in the same document."""
    rows = [row for d in _documents(data, documents) for row in _choices(d, questions)]
    return _dataset(rows)


def clozes(data: str = "stdlib", documents: int = 40, questions: int = 2, **_: Any) -> dict[str, Any]:
    """``questions`` rows per document, where it holds so many names that are repeated within a passage."""
    rows = [row for d in _documents(data, documents) for row in _clozes(d, questions)]
    return _dataset(rows)


@cache
def _documents(data: str, count: int) -> list[Document]:
    test = sorted(open_corpus(data).part("test"), key=lambda d: name_hash(d.name))
    found = list(islice((d for d in test if len(d.content) >= _LEAST_BYTES and _is_text(d.content)), count))
    if not found:
        raise CorpusError(f"no test document of {data} has {_LEAST_BYTES:,} bytes of UTF-8", "use longer documents")
    return found


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _choices(document: Document, questions: int) -> Iterator[dict[str, Any]]:
    text = document.content.decode()
    starts = [m.end() for m in re.finditer(r"\n(?=[ \t]*\S)", text) if _CONTEXT <= m.end() < len(text) - _OPTION]
    for number in range(questions):
        order = sorted(starts, key=lambda start: name_hash(f"{document.name} {number} {start}"))
        options = dict.fromkeys(text[start : start + _OPTION] for start in order)  # distinct, in this order
        if len(options) < _OPTIONS:
            return
        right, *wrong = list(options)[:_OPTIONS]
        gold = name_hash(f"{document.name} {number}") % _OPTIONS
        context = text[order[0] - _CONTEXT : order[0]]
        yield {
            "bdh_document": document.name,
            "context": context,
            "choices": [*wrong[:gold], right, *wrong[gold:]],
            "gold": gold,
        }


def _clozes(document: Document, questions: int) -> Iterator[dict[str, Any]]:
    text = document.content.decode()
    names = [m for m in _NAME.finditer(text) if m.start() >= _CONTEXT]
    asked = 0
    for match in sorted(names, key=lambda m: name_hash(f"{document.name} {m.start()}")):
        if asked == questions:
            return
        whole = re.search(
            rf"(?<![A-Za-z_0-9]){match.group()}(?![A-Za-z_0-9])", text[match.start() - _CONTEXT : match.start()]
        )
        if whole and re.match(r"[ \n(),.:=\[\]]", text[match.end() :]):
            asked += 1
            shown = match.start() + _GIVEN
            yield {
                "bdh_document": document.name,
                "context": text[match.start() - _CONTEXT : shown],
                "answer": match.group()[_GIVEN:],
            }


def _dataset(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}
