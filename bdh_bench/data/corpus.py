"""Which documents are there, which may be trained on, and how is that known to be the same text elsewhere?

Bytes are the unit. A corpus is a list of documents, split by a hash of the document's name, so that a file lands in the same
split under every Python version. ``stdlib`` is the source text of the running Python's standard library (tests, encodings tables
and installed packages left out); ``path:`` is a folder or a file; ``hf:`` a data set of the ``datasets`` library (``hub``). Long
files are mapped, not read, so that a corpus may be larger than memory. ``split_bytes`` cuts documents into pieces ``file#0001`` that
stay in the split of their file. Documents that share a file or a top-level package share a ``cluster``: they are not independent. The
manifest (names, bytes, sha256, split, cluster) goes into every run.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bdh_bench.errors import CorpusError, LawError, UnknownNameError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__", "lib2to3"}
_MAPPED = 2**20  # bytes from which on a file is mapped: a mapping takes a file handle, and there are not many
_GAP = 1024  # bytes between two pieces of one file, so that a sentence is not in two splits


@dataclass(frozen=True)
class Document:
    """A name and where its bytes are: ``path`` from ``start`` to ``stop`` (None: to the end). ``cluster`` "" is the name itself."""

    name: str
    path: Path
    start: int = 0
    stop: int | None = None
    split: Split = "train"
    cluster: str = ""

    @cached_property
    def size(self) -> int:
        """Bytes, without reading them. Raises CorpusError."""
        return len(range(self._file_size())[self.start : self.stop])

    @cached_property
    def data(self) -> NDArray[np.uint8]:
        """The raw bytes, read-only; those of a long file are mapped and stay on disk until they are used. Raises CorpusError."""
        import numpy as np  # here, so that a listing starts without it

        stop = self.start + self.size
        if self._file_size() >= _MAPPED:
            with suppress(OSError):  # no file handle is left: read instead
                whole = np.memmap(self.path, dtype=np.uint8, mode="r")
                return whole[self.start : stop].view(np.ndarray)
        return np.frombuffer(b"".join(self._parts()), dtype=np.uint8)

    @property
    def content(self) -> bytes:
        """A copy of the raw bytes. Raises CorpusError."""
        return self.data.tobytes()

    @cached_property
    def sha256(self) -> str:
        """Of the raw bytes, read a part at a time. Raises CorpusError."""
        digest = hashlib.sha256()
        for part in self._parts():
            digest.update(part)
        return digest.hexdigest()

    def _file_size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise CorpusError(f"cannot read {self.path}: {error.strerror}", "check the --data path") from error

    def _parts(self) -> Iterator[bytes]:
        left = self.size
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                while left and (part := file.read(min(left, _MAPPED))):
                    left -= len(part)
                    yield part
        except OSError as error:
            raise CorpusError(f"cannot read {self.path}: {error.strerror}", "check the --data path") from error


@dataclass(frozen=True)
class Corpus:
    """Documents with their split. ``labels`` says what a reader must know (``smoke``); ``notes`` why."""

    name: str
    documents: tuple[Document, ...]
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def part(self, split: Split) -> tuple[Document, ...]:
        """The documents of one split, sorted by name."""
        return tuple(d for d in self.documents if d.split == split)

    def manifest(self) -> dict[str, Any]:
        """Everything needed to tell whether two runs read the same text; ``digest`` sums it up."""
        documents = [
            {
                "name": d.name,
                "bytes": d.size,
                "sha256": d.sha256,
                "split": d.split,
                "cluster": d.cluster or d.name,
            }
            for d in self.documents
        ]
        rows = "\n".join(f"{d['name']} {d['sha256']} {d['split']}" for d in documents)
        return {
            "name": self.name,
            "documents": documents,
            "digest": hashlib.sha256(rows.encode()).hexdigest(),
            "python": platform.python_version(),
            "notes": list(self.notes),
            "labels": list(self.labels),
        }


def refuse_test(documents: Iterable[Document]) -> None:
    """For all that learns or chooses: raise LawError where one of ``documents`` is kept for the test."""
    kept = [document.name for document in documents if document.split == "test"]
    if kept:
        raise LawError(
            f"{len(kept)} test documents were about to be learned from, {kept[0]!r} the first · expected training or "
            "validation documents",
            "take Corpus.part('train') or part('validation')",
            "splits",
            float(len(kept)),
            0.0,
        )


def open_corpus(spec: str, split_bytes: int = 0) -> Corpus:
    """The corpus that ``spec`` names: ``stdlib``, ``path:DIR|FILE`` or ``hf:NAME[:SPLIT]``.

    Documents longer than ``split_bytes`` come in pieces (0: whole). Raises CorpusError, MissingExtraError, UnknownNameError.
    """
    kind, _, rest = spec.partition(":")
    if spec == "stdlib":
        corpus = _split("stdlib", _stdlib_files(), (60, 10, 30))
    elif kind == "path" and rest:
        corpus = _split(spec, _files_below(Path(rest).expanduser()), (80, 10, 10))
    elif kind == "hf" and rest:
        from bdh_bench.data.hub import rows_of

        corpus = _split(spec, rows_of(rest), (80, 10, 10))
    else:
        raise UnknownNameError("corpus", spec, ("stdlib", "path:DIR", "path:FILE", "hf:NAME"))
    return _in_pieces(corpus, split_bytes) if split_bytes else corpus


def _in_pieces(corpus: Corpus, size: int) -> Corpus:
    """The same text with every longer document cut into pieces of ``size`` bytes (the last one shorter)."""
    pieces: list[Document] = []
    for d in corpus.documents:
        if d.size <= size:
            pieces.append(d)
            continue
        for number, start in enumerate(range(0, d.size, size), 1):
            stop = d.start + min(start + size, d.size)
            cut = replace(
                d, name=f"{d.name}#{number:04}", start=d.start + start, stop=stop, cluster=d.cluster or d.name
            )
            pieces.append(cut)
    note = f"documents longer than {size:,} bytes are cut into pieces of that length"
    return replace(corpus, documents=tuple(pieces), notes=(*corpus.notes, note))


def _stdlib_files() -> list[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not _LEFT_OUT & set(p.relative_to(root).parts))
    found = [(p.relative_to(root), p) for p in files if p.stat().st_size]
    return [Document(r.as_posix(), p, cluster=r.parts[0].removesuffix(".py")) for r, p in found]


def _files_below(path: Path) -> list[Document]:
    if path.is_file():
        found = [Document(path.name, path)]
    elif path.is_dir():
        files = sorted(
            p for p in path.rglob("*") if p.is_file() and not any(s.startswith(".") for s in p.relative_to(path).parts)
        )
        found = [Document(p.relative_to(path).as_posix(), p) for p in files]
    else:
        raise CorpusError(f"no file or folder at {path} · expected text", "check the --data path")
    try:
        found = [d for d in found if d.path.stat().st_size]
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}", "check permissions") from error
    if not found:
        raise CorpusError(f"no bytes in {path} · expected at least one file that is not empty", "check the --data path")
    return found


def _split(name: str, documents: list[Document], percent: tuple[int, int, int]) -> Corpus:
    if len(documents) < 3:
        pieces = [piece for document in documents for piece in _cut(document)]
        note = "fewer than 3 documents: each is cut once into contiguous pieces with a gap of 1 KiB"
        return Corpus(name, tuple(pieces), ("smoke",), (note,))
    placed = [replace(d, split=_split_of(d.name, percent)) for d in documents]
    notes: list[str] = []
    for split in SPLITS:
        if not any(d.split == split for d in placed):
            placed, note = _move_one_into(split, placed)
            notes.append(note)
    return Corpus(name, tuple(placed), (), tuple(notes))


def name_hash(name: str) -> int:
    """A stable 64-bit number for a document's name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def _split_of(name: str, percent: tuple[int, int, int]) -> Split:
    bucket = name_hash(name) % 100
    if bucket < percent[0]:
        return "train"
    return "validation" if bucket < percent[0] + percent[1] else "test"


def _move_one_into(split: Split, documents: list[Document]) -> tuple[list[Document], str]:
    """Take the first document by hash from the split that has most, so that no split is emptied."""
    sizes = {s: sum(d.split == s for d in documents) for s in SPLITS}
    donor = max(SPLITS, key=lambda s: sizes[s])
    moved = min((d for d in documents if d.split == donor), key=lambda d: name_hash(d.name))
    changed = [replace(d, split=split) if d is moved else d for d in documents]
    return changed, f"split {split} was empty: {moved.name} was moved into it from {donor}"


def _cut(document: Document) -> Iterable[Document]:
    """80/10/10 of one file as ``file#part``. Raises CorpusError where it is too short to be cut."""
    size = document.size
    if size < 20 * _GAP:
        raise CorpusError(
            f"{document.path} has {size:,} bytes · expected at least {20 * _GAP:,} where there are fewer than 3 documents",
            "give more text",
        )
    edges = (0, size * 80 // 100, size * 90 // 100, size)
    for split, start, stop in zip(SPLITS, edges, edges[1:], strict=False):
        stop = stop if stop == size else stop - _GAP
        yield replace(
            document, name=f"{document.name}#{split}", start=start, stop=stop, split=split, cluster=document.name
        )
