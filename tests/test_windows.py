"""Are windows found where they are, and is every byte put into the class that the protocol gives it?"""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdh_bench.data import windows
from bdh_bench.data.windows import CONFLICT, EXCLUDED, NOVEL, counts_in, match_classes, shared_shares, window_hashes


def _array(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8)


@settings(max_examples=60)
@given(st.binary(max_size=80), st.integers(1, 50))
def test_equal_windows_have_equal_hashes_and_no_others(text: bytes, length: int) -> None:
    hashes = window_hashes(_array(text), length).tolist()
    pieces = [text[i : i + length] for i in range(len(text) - length + 1)]
    assert len(hashes) == len(pieces)
    assert len(set(hashes)) == len(set(pieces)) == len(set(zip(hashes, pieces, strict=True)))


def test_windows_are_counted_over_texts_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_BLOCK", 7)
    texts = [_array(b"abcabcabcab"), _array(b"xxabcx"), _array(b"ab")]
    wanted = np.sort(window_hashes(_array(b"abcq"), 3))
    counts = dict(zip(wanted.tolist(), counts_in(wanted, texts, 3).tolist(), strict=True))
    assert counts[window_hashes(_array(b"abc"), 3)[0].item()] == 4
    assert counts[window_hashes(_array(b"bcq"), 3)[0].item()] == 0


def test_a_planted_overlap_is_found_in_full() -> None:
    train, clean = os.urandom(5000), os.urandom(1000)
    mixed = clean[:500] + train[700:1200]
    shares = shared_shares([_array(clean), _array(mixed), _array(train[10:300]), _array(b"short")], [_array(train)])
    assert shares[0] == 0.0
    assert shares[1] == pytest.approx(451 / 951)
    assert shares[2:] == [1.0, 0.0]


def _by_hand(text: bytes, training: bytes) -> list[int]:
    classes = []
    for t in range(len(text)):
        key = text[t - 12 : t]
        count = sum(training[i : i + 12] == key for i in range(len(training) - 11))
        if t < 12 or count > 100:
            classes.append(EXCLUDED)
            continue
        places = [j for j in range(12, t) if text[j - 12 : j] == key]
        same = [j for j in places if text[j] == text[t]]
        classes.append(t - max(same) if same else CONFLICT if places else NOVEL)
    return classes


@settings(max_examples=25, deadline=None)
@given(st.text("ab", min_size=0, max_size=90), st.integers(0, 130))
def test_classes_are_those_of_the_definition(text: str, times: int) -> None:
    content, training = text.encode(), b"a" * (12 + times)
    (got,) = match_classes([_array(content)], [_array(training)])
    assert got.dtype == np.int32
    assert got.tolist() == _by_hand(content, training)


def test_repeated_blocks_are_recalled_at_their_period() -> None:
    block = os.urandom(64)
    (classes,) = match_classes([_array(block * 5)], [])
    assert classes[:12].tolist() == [EXCLUDED] * 12
    assert classes[12:76].tolist() == [NOVEL] * 64
    assert classes[76:].tolist() == [64] * (64 * 4 - 12)


@pytest.mark.parametrize(("times", "kind"), [(100, 1), (101, EXCLUDED)])
def test_keys_are_excluded_from_the_101st_time_on(times: int, kind: int) -> None:
    training = b"a" * (12 + times - 1)  # the key "a" · 12 occurs ``times`` times
    (classes,) = match_classes([_array(b"a" * 14)], [_array(training[:60]), _array(training[49:])])
    assert classes[13] == kind
