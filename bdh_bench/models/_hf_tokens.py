"""Which raw bytes does each token of a published tokenizer stand for?

The bytes of every token of the vocabulary are read from the tokenizer's own description, and a text is encoded only if the bytes of
its tokens, end to end, are the text: nothing is decoded and encoded again, and nothing can be lost unseen. Two kinds of vocabulary
say their bytes:

    byte-level     256 printable characters stand for the bytes (GPT-2, Llama 3, Qwen, …)
    byte fallback  "▁" stands for a space and <0xNN> for a byte that has no token (SentencePiece as in Llama 2, Mistral, Gemma)

A space that the tokenizer puts before a text belongs to no raw byte: its token has a span without bytes, or shares the span of the word
that it is joined to. Bytes that are not UTF-8 cannot pass through a tokenizer of text; each is one byte token, between the stretches
that can. The strings of special tokens are ordinary text here, and no special token is added. A normaliser that would change a text
(composed characters) is left out for that text where the vocabulary is byte-level; one that changes plain ASCII is refused.

Source: the byte alphabet is that of the GPT-2 encoder: printable Latin-1 characters stand for themselves, the others for U+0100 onwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from bdh_bench.errors import CheckpointError, CorpusError
from bdh_bench.types import Encoding

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_INVALID = re.compile("([\udc80-\udcff])")  # what surrogateescape makes of bytes that are not UTF-8
#: Every printable ASCII character, both cases, runs of spaces and all ends of line.
_PROBES = ("".join(map(chr, range(32, 127))), "The  old House", " a", "a \n b\r\nc\td ", "end\n\n\n")


def byte_alphabet() -> dict[str, int]:
    """Character → byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


class ByteSpans:
    """A ``Tokenizer`` over a fast tokenizer. Raises CheckpointError for one that cannot say the bytes of its tokens."""

    def __init__(self, fast: Any, origin: str) -> None:
        self._origin = origin
        description = json.loads(fast.to_str())
        self._byte_level = "ByteLevel" in _kinds(description.get("decoder"))
        fallback = bool(description["model"].get("byte_fallback"))
        if not self._byte_level and not fallback:
            raise CheckpointError(
                f"{origin}: the tokenizer ({description['model'].get('type')}) has neither a byte alphabet nor byte fallback · expected "
                "one whose tokens stand for raw bytes",
                "bits per byte need byte spans; use a checkpoint with a byte-level or byte-fallback tokenizer",
            )
        self._encoder = _plain(description)
        self._bare = _plain({**description, "normalizer": None}) if self._byte_level else None
        names = [t["content"] for t in description.get("added_tokens", ()) if t["special"] and len(t["content"]) > 1]
        # Splits a text inside of each name, after its first character.
        self._names = re.compile("|".join(f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in names) or r"(?!)")
        self._bytes = self._table(description, fallback)
        self._single = {data[0]: index for index, data in reversed([*enumerate(self._bytes)]) if len(data) == 1}
        if not self._byte_level:  # <0xNN> itself, not the character that has the same byte
            self._single = {b: i for b in range(256) if (i := self._encoder.token_to_id(f"<0x{b:02X}>")) is not None}
        self._probe()

    def __deepcopy__(self, memo: dict[int, Any]) -> ByteSpans:
        return self  # it never changes, and a copy of the library's object forgets its switches

    @property
    def size(self) -> int:
        """One more than the largest id of a token."""
        return len(self._bytes)

    def _table(self, description: dict[str, Any], fallback: bool) -> list[bytes]:
        """The bytes of every id; none for special tokens and for ids without a token."""
        vocabulary: dict[str, int] = self._encoder.get_vocab(with_added_tokens=True)
        added = {t["content"]: bool(t["special"]) for t in description.get("added_tokens", ())}
        alphabet = byte_alphabet()
        table = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, index in vocabulary.items():
            byte = _BYTE_TOKEN.match(token) if fallback else None
            if byte:
                table[index] = bytes([int(byte.group(1), 16)])
            elif added.get(token, False):
                continue
            elif self._byte_level and token not in added:
                if all(c in alphabet for c in token):
                    table[index] = bytes(alphabet[c] for c in token)
            else:
                table[index] = token.replace("\u2581", " ").encode() if fallback else token.encode()
        return table

    def _probe(self) -> None:
        for text in _PROBES:
            try:
                self._stretch(text, (self._encoder,))
            except CorpusError as error:
                raise CheckpointError(
                    f"{self._origin}: the tokenizer changes plain text: {error.message}",
                    "bits per byte need the raw bytes; use a checkpoint whose tokenizer keeps them",
                ) from error

    def encode(self, content: bytes) -> Encoding:
        """Tokens and the ends of their spans. Raises CorpusError for bytes that the vocabulary cannot spell."""
        ids: list[int] = []
        ends: list[int] = []
        for part in _INVALID.split(content.decode("utf-8", errors="surrogateescape")):
            at = ends[-1] if ends else 0
            if _INVALID.match(part):
                ids.append(self._byte(ord(part) - 0xDC00, at))
                ends.append(at + 1)
            elif part:
                found, lengths = self._stretch(part, (self._encoder, self._bare))
                ids += found
                ends += (at + np.cumsum(lengths)).tolist()
        if (ends[-1] if ends else 0) != len(content):
            raise CorpusError(f"{self._origin}: spans cover {ends[-1] if ends else 0} of {len(content)} bytes")
        return Encoding(np.array(ids, dtype=np.int64), np.array(ends, dtype=np.int64))

    def _stretch(self, text: str, encoders: Sequence[Any]) -> tuple[list[int], list[int]]:
        """Ids and byte lengths of the tokens of valid text, from the first encoder that keeps it."""
        raw, joined = text.encode(), b""
        for encoder in encoders:
            if encoder is None:
                continue
            ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
            pieces = [self._bytes[index] for index in ids]
            joined = b"".join(pieces)
            lengths = [len(piece) for piece in pieces]
            if joined == raw:
                return ids, lengths
            if joined == b" " + raw:  # the space that the tokenizer put before the text
                first = next(i for i, length in enumerate(lengths) if length)
                lengths[first] -= 1
                return ids, lengths
        parts = [part for part in self._names.split(text) if part]
        if len(parts) > 1:  # a name of a special token that the vocabulary itself would read as one
            both = [self._stretch(part, encoders) for part in parts]
            return [i for found, _ in both for i in found], [n for _, lengths in both for n in lengths]
        raise CorpusError(f"{self._origin}: {_difference(joined, raw)}", "use text that the vocabulary can spell")

    def _byte(self, value: int, place: int) -> int:
        if value not in self._single:
            raise CorpusError(
                f"{self._origin}: byte {value:#04x} at {place:,} is not UTF-8 and has no token of its own",
                "use valid UTF-8 or a byte-level vocabulary",
            )
        return self._single[value]

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of these tokens; none for special ones. A space before the text, where the tokenizer puts one, is kept."""
        return b"".join(self._bytes[int(i)] if 0 <= int(i) < len(self._bytes) else b"" for i in ids)


def _plain(description: dict[str, Any]) -> Any:
    """A tokenizer that neither cuts, pads nor reads the names of special tokens in a text."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(json.dumps({**description, "truncation": None, "padding": None}))
    made.encode_special_tokens = True
    return made


def _kinds(part: Any) -> set[str]:
    """The types of a decoder and of those inside it."""
    if isinstance(part, dict):
        return {str(part.get("type"))}.union(*(_kinds(item) for item in part.get("decoders", ())))
    return set()


def _difference(joined: bytes, raw: bytes) -> str:
    place = next((i for i, (a, b) in enumerate(zip(joined, raw, strict=False)) if a != b), min(len(joined), len(raw)))
    return f"the tokens of {raw[place : place + 24]!r} stand for {joined[place : place + 24]!r} (byte {place:,})"
