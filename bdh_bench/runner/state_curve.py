"""At which few contexts must a model's state be known for it to be known at every context?

The formulae of state bytes are straight lines between a few knots: a KV cache grows by the token, a window fills and stays full, a
recurrent state is flat. The knots are stored with a cell, so that what reads it can tell from which context on one model keeps less
than another, exactly, without the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

#: Where a model without a last position is read last.
FARTHEST = 2**24
#: A formula with more knots than this is no line between a few.
MOST_KNOTS = 64


def knots(bytes_at: Callable[[int], int], last: int | None) -> list[list[int]] | None:
    """(context, bytes) at every knot from 1 to ``last`` (None: any context); None where there are too many of them."""
    end = last or FARTHEST
    found = {1: bytes_at(1), end: bytes_at(end)}
    for context in _needed(bytes_at, 1, end):
        found[context] = bytes_at(context)
        if len(found) > MOST_KNOTS:
            return None
    contexts = sorted(found)
    inside = [
        b for (a, b), (_, c) in zip(pairwise(contexts), pairwise(contexts[1:]), strict=False) if _bends(found, a, b, c)
    ]
    return [[c, found[c]] for c in sorted({1, end, *inside})]


def _needed(bytes_at: Callable[[int], int], first: int, last: int) -> Iterator[int]:
    """Contexts at which the curve is cut in two until no piece bends."""
    if last - first < 2:
        return
    middle = (first + last) // 2
    known = {c: bytes_at(c) for c in (first, first + 1, middle, last - 1, last)}
    if any(_bends(known, first, c, last) for c in (first + 1, middle, last - 1)):
        yield from _needed(bytes_at, first, middle)
        yield middle
        yield from _needed(bytes_at, middle, last)


def _bends(at: dict[int, int], a: int, b: int, c: int) -> bool:
    """Whether b lies off the straight line from a to c, in whole numbers."""
    return (at[b] - at[a]) * (c - a) != (at[c] - at[a]) * (b - a)
