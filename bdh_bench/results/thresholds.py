"""Where does a falling curve cross a level? Accuracy that drops below 0.9 over pairs or lengths, a gain of which half is lost over a gap.

Between two measured places the curve is taken as straight over log2 of the place (over the place itself where the left one is 0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

#: Below this share of right answers a task counts as no longer solved.
SOLVED = 0.9


@dataclass(frozen=True)
class Crossing:
    """``at`` is where the level is crossed first, between ``left`` and ``right``; ``share`` of the way in the picture."""

    at: float
    left: float
    right: float
    share: float


def first_below(curve: Sequence[tuple[float, float]], level: float) -> Crossing | None:
    """The first place where (place, value) falls from ``level`` or above to below it; None where it never does."""
    for (left, high), (right, low) in pairwise(sorted(curve)):
        if high >= level > low:
            share = (high - level) / (high - low)
            if left > 0:
                return Crossing(left * (right / left) ** share, left, right, share)
            return Crossing(right * share, left, right, share)
    return None


def half_lost(curve: Sequence[tuple[float, float]]) -> Crossing | None:
    """Where half of the first value is lost; None where it is not, or where there is nothing to lose."""
    if not curve or (first := min(curve)[1]) <= 0 or not math.isfinite(first):
        return None
    return first_below(curve, first / 2)
