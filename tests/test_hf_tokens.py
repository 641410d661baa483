"""Do the spans of a published tokenizer tile the raw bytes, whatever the text, and is every tokenizer refused that loses some?"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import hf_zoo
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdh_bench.errors import CheckpointError, CorpusError
from bdh_bench.models._hf_tokens import ByteSpans, byte_alphabet

_KINDS = ("byte-level", "byte-level, space before", "fallback bpe", "fallback unigram")


@cache
def _spans(kind: str) -> ByteSpans:
    made = {
        "byte-level": hf_zoo.byte_level,
        "byte-level, space before": lambda: hf_zoo.byte_level(prefix_space=True),
        "fallback bpe": hf_zoo.sentencepiece_like,
        "fallback unigram": lambda: hf_zoo.sentencepiece_like("unigram"),
    }[kind]()
    return ByteSpans(made, kind)


_TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=8).map(str.encode),
        st.binary(max_size=4),
        st.sampled_from(
            [
                b" ",
                b"  ",
                b"\r\n",
                b"\t",
                b"the old house",
                " 👩\u200d👩\u200d👧 ".encode(),
                "e\u0301 Å".encode(),
                b"\xff",
                b"\xc3",
                b"<s>",
                b"<|endoftext|>",
            ]
        ),
    ),
    max_size=6,
).map(b"".join)


@pytest.mark.parametrize("kind", _KINDS)
@settings(max_examples=150, deadline=None)
@given(content=_TEXTS)
def test_spans_tile_the_raw_bytes(kind: str, content: bytes) -> None:
    spans = _spans(kind)
    encoding = spans.encode(content)
    assert encoding.ids.dtype == encoding.ends.dtype == np.int64
    assert encoding.ids.shape == encoding.ends.shape
    starts = np.concatenate(([0], encoding.ends))[:-1]
    assert (encoding.ends >= starts).all()
    assert (encoding.ends[-1] if content else 0) == len(content)
    put_before = set()
    for index, start, stop in zip(encoding.ids, starts, encoding.ends, strict=True):
        own, raw = spans.decode([index]), content[start:stop]
        if own != raw:  # only a space that the tokenizer put before a stretch of text has no raw byte
            assert own == b" " + raw
            put_before.add(start)
    assert not put_before or kind != "byte-level"
    assert all(place == 0 or _begins_a_stretch(content, int(place)) for place in put_before)


def _begins_a_stretch(content: bytes, place: int) -> bool:
    """Whether the byte before is not UTF-8, or the name of a special token is cut here."""
    before = content[:place].decode("utf-8", errors="surrogateescape")[-1]
    return "\udc80" <= before <= "\udcff" or before == "<"


@pytest.mark.parametrize("kind", _KINDS)
def test_an_emoji_split_over_tokens_has_one_byte_each(kind: str) -> None:
    encoding = _spans(kind).encode("😀".encode())
    assert encoding.ends.tolist()[-4:] == [1, 2, 3, 4]


def test_the_space_before_a_text_has_no_byte() -> None:
    encoding = _spans("fallback bpe").encode(b"\nx")
    assert encoding.ends.tolist() == [0, 1, 2]  # "▁", newline, x
    joined = _spans("fallback bpe").encode(b"the old")
    first = _spans("fallback bpe").decode(joined.ids[:1])
    assert first.startswith(b" t")
    assert joined.ends[0] == len(first) - 1  # the word and the space before it share the span of the word
    assert _spans("fallback bpe").encode(b" the").ends[-1] == 4


def test_names_of_special_tokens_are_text() -> None:
    spans = _spans("byte-level")
    encoding = spans.encode(b"<|endoftext|>")
    assert len(encoding.ids) > 1
    assert 0 not in encoding.ids
    assert spans.decode([0]) == b""
    assert 0 not in copy.deepcopy(spans).encode(b"<|endoftext|>").ids


def test_a_vocabulary_that_would_read_a_name_as_a_special_token_does_not() -> None:
    spans = _spans("fallback unigram")
    encoding = spans.encode(b"a <s> b</s>")
    assert not {0, 1, 2} & set(encoding.ids.tolist())
    assert encoding.ends[-1] == 11


def test_invalid_bytes_are_single_tokens() -> None:
    for kind in _KINDS:
        encoding = _spans(kind).encode(b"a\xff\xfe")
        assert encoding.ends.tolist()[-3:] == [1, 2, 3]
        assert _spans(kind).decode(encoding.ids[-2:]) == b"\xff\xfe"


def test_the_byte_alphabet_is_that_of_the_library() -> None:
    from tokenizers import pre_tokenizers

    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == [*range(256)]
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ((shown, _),) = split.pre_tokenize_str("é\n \t~\u0100")
    assert bytes(alphabet[c] for c in shown) == "é\n \t~\u0100".encode()


def test_composed_characters_keep_their_bytes() -> None:
    """A normaliser that composes characters is left out for a text that it would change, and for no other."""
    from tokenizers import normalizers

    spans = ByteSpans(hf_zoo.byte_level(normalizer=normalizers.NFC()), "nfc")
    for text in ("e\u0301", "é", "the old e\u0301"):
        encoding = spans.encode(text.encode())
        assert spans.decode(encoding.ids) == text.encode()


def _lowercase() -> Any:
    from tokenizers import normalizers

    return hf_zoo.byte_level(normalizer=normalizers.Lowercase())


def _strip() -> Any:
    from tokenizers import normalizers

    made = hf_zoo.sentencepiece_like()
    made.normalizer = normalizers.Sequence([normalizers.Strip(), made.normalizer])
    return made


def _word_pieces() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##e": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    return made


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_strip, "changes plain text"),
        (_word_pieces, "neither a byte alphabet nor byte fallback"),
        (lambda: hf_zoo.sentencepiece_like(fallback=False), "neither a byte alphabet nor byte fallback"),
        (_lowercase, "changes plain text"),
    ],
)
def test_a_tokenizer_that_loses_bytes_is_refused(make: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        ByteSpans(make(), "tiny")


def test_a_byte_without_a_token_is_named() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {c: i for i, c in enumerate(sorted(c for c, b in byte_alphabet().items() if b < 128))}
    made = Tokenizer(models.BPE(alphabet, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    spans = ByteSpans(made, "ascii")
    with pytest.raises(CorpusError, match="byte 0xff at 1 is not UTF-8"):
        spans.encode(b"a\xff")
    with pytest.raises(CorpusError, match=r"stand for b'' \(byte 1\)"):
        spans.encode("aé".encode())


def test_a_sign_that_stands_for_a_space_is_refused_in_a_text() -> None:
    with pytest.raises(CorpusError, match="stand for"):
        _spans("fallback bpe").encode("a\u2581b".encode())
