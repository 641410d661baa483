"""How steep, how far apart, and how sure? A least-squares slope and a ratio of medians.

Intervals are percentiles of a bootstrap with a fixed seed. Windows of one depth, or rounds of one pair, are what is drawn again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_DRAWS = 2000
_TAIL = 2.5  # percent on either side


@dataclass(frozen=True)
class Interval:
    """An estimate between its 95 % bounds."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Interval:
        return Interval(self.value * factor, self.low * factor, self.high * factor)


def slope(values: Mapping[int, Sequence[float]], seed: int = 0) -> Interval:
    """Least-squares slope of the values against their depth; the values of each depth are drawn again among themselves."""
    chance = np.random.default_rng(seed)
    drawn = {depth: chance.choice(np.asarray(v), (_DRAWS, len(v))) for depth, v in values.items()}
    depths = np.repeat(list(values), [len(v) for v in values.values()]).astype(float)
    centred = depths - depths.mean()
    per_unit = centred / (centred @ centred)
    known = np.concatenate([np.asarray(v, dtype=float) for v in values.values()])
    return _interval(float(known @ per_unit), np.concatenate(list(drawn.values()), axis=1) @ per_unit)


def ratio(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Interval:
    """Median of ``second`` over median of ``first``; entry i of both was measured in the same round, and rounds are drawn again."""
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    rounds = np.random.default_rng(seed).integers(len(a), size=(_DRAWS, len(a)))
    drawn = np.median(b[rounds], axis=1) / np.median(a[rounds], axis=1)
    return _interval(float(np.median(b) / np.median(a)), drawn)


def _interval(value: float, drawn: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(drawn, [_TAIL, 100 - _TAIL])
    return Interval(value, float(low), float(high))
