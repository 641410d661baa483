"""Which short stretches of one text occur in another, and where did a stretch occur before?

Every window of n bytes gets a 64-bit hash (a polynomial modulo 2⁶⁴ over random numbers for the bytes), so that texts are compared by
sorting numbers. Two measures of this protocol rest on it:

* overlap: the share of a test document's 50-byte windows that also occur in the training text;
* recall by match distance: what the document itself said before about its next byte. With the key of byte t, the 12 bytes before it:
  *recall* at distance d, where the newest earlier place with the same key and the same next byte is d bytes back; *conflict*, where the
  key occurred, but never with this byte; *novel*, where it did not occur; *excluded*, where there are fewer than 12 bytes before t, or
  the training text has the key more than 100 times, so that knowledge held in weights does not count.

The classes depend on texts only: they are the same for every model, and no model chose them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Hashes = NDArray[np.uint64]

OVERLAP_BYTES = 50
KEY_BYTES = 12
FREQUENT = 100

#: Classes that are no distance.
NOVEL, CONFLICT, EXCLUDED = 0, -1, -2

_BLOCK = 2**20  # windows hashed at a time: bounds what is held
_SIEVE_BITS = 24
_FACTOR = 0x9E3779B97F4A7C15
_NUMBERS: Hashes = np.random.default_rng(0xBD4).integers(0, 2**64, 256, dtype=np.uint64)


def window_hashes(text: Bytes, length: int) -> Hashes:
    """The hash of every window of ``length`` bytes, in order."""
    if len(text) < length:
        return np.empty(0, np.uint64)
    values = _NUMBERS[text]
    hashes, done, power = (
        values,
        1,
        _FACTOR,
    )  # windows of ``done`` bytes; ``power`` is the factor ** done modulo 2 ** 64
    for bit in bin(length)[3:]:  # a window of 2n bytes is made of two of n bytes, one of n + 1 of n bytes and one
        hashes = hashes[:-done] * np.uint64(power) + hashes[done:]
        done, power = 2 * done, power * power % 2**64
        if bit == "1":
            hashes = hashes[:-1] * np.uint64(_FACTOR) + values[done:]
            done, power = done + 1, power * _FACTOR % 2**64
    return hashes


def _blocks(texts: Iterable[Bytes], length: int) -> Iterator[Hashes]:
    """The windows of all texts, a bounded number at a time."""
    for text in texts:
        for start in range(0, max(len(text) - length + 1, 0), _BLOCK):
            yield window_hashes(text[start : start + _BLOCK + length - 1], length)


def counts_in(wanted: Hashes, texts: Iterable[Bytes], length: int) -> NDArray[np.int64]:
    """How often each of the hashes ``wanted`` (sorted, distinct) occurs among the windows of ``texts``."""
    sieve = np.zeros(1 << _SIEVE_BITS, dtype=bool)  # most windows are not wanted, and are told apart by one look
    shift = np.uint64(64 - _SIEVE_BITS)
    sieve[wanted >> shift] = True
    found = np.zeros(len(wanted), dtype=np.int64)
    for hashes in _blocks(texts, length):
        likely = hashes[sieve[hashes >> shift]]
        place = np.searchsorted(wanted, likely)
        place = place[wanted[np.minimum(place, len(wanted) - 1)] == likely] if len(wanted) else place[:0]
        np.add.at(found, place, 1)
    return found


def shared_shares(tested: Sequence[Bytes], training: Iterable[Bytes], length: int = OVERLAP_BYTES) -> list[float]:
    """For each tested text, the share of its windows that occur in the training texts (0 where it is shorter than a window)."""
    hashes = [window_hashes(text, length) for text in tested]
    wanted = np.unique(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)
    known = wanted[counts_in(wanted, training, length) > 0]
    return [float(np.isin(own, known).mean()) if len(own) else 0.0 for own in hashes]


def match_classes(texts: Sequence[Bytes], training: Iterable[Bytes]) -> list[NDArray[np.int32]]:
    """For every byte of each text its match distance, or NOVEL, CONFLICT, EXCLUDED."""
    keys = [window_hashes(text[:-1], KEY_BYTES) for text in texts]
    wanted = np.unique(np.concatenate(keys)) if keys else np.empty(0, np.uint64)
    frequent = wanted[counts_in(wanted, training, KEY_BYTES) > FREQUENT]
    return [_classes(text, own, frequent) for text, own in zip(texts, keys, strict=True)]


def _classes(text: Bytes, keys: Hashes, frequent: Hashes) -> NDArray[np.int32]:
    classes = np.full(len(text), EXCLUDED, dtype=np.int32)
    if len(keys):
        same_byte = _since_last(window_hashes(text, KEY_BYTES + 1))
        kinds = np.where(same_byte, same_byte, np.where(_since_last(keys), CONFLICT, NOVEL))
        classes[KEY_BYTES:] = np.where(np.isin(keys, frequent), EXCLUDED, kinds)
    return classes


def _since_last(hashes: Hashes) -> NDArray[np.int64]:
    """How many places ago each hash occurred last; 0 where never."""
    order = np.argsort(hashes, kind="stable")
    again = hashes[order[1:]] == hashes[order[:-1]]
    result = np.zeros(len(hashes), dtype=np.int64)
    result[order[1:][again]] = (order[1:] - order[:-1])[again]
    return result
