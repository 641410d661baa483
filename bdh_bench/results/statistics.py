"""How sure can one be of a number, and of a difference between two?

* documents: the statistic is Σ value·weight / Σ weight; documents are drawn with replacement (they are the independent
  units, bytes are not), percentile 95 %. Two models on the same documents are resampled with the same draws, so what the
  documents have in common cancels,
* seeds: Student's t over the values of the seeds,
* repeats inside one process: the median, without an interval (the unit of replication would be the process).

The seed of the draws is a constant of this file: the same run always gives the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEED = 20_260_101
RESAMPLES = 10_000
LEVEL = 0.95
#: Below this many documents a percentile interval says more about the method than about the data.
FEWEST_DOCUMENTS = 5
#: Two-sided test at 5 % with 80 % power: 1.96 + 0.84.
MDE_FACTOR = 2.8
_LARGEST_BLOCK = 2_000_000  # draws held in memory at once
_T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip

Floats = NDArray[np.float64]
#: sample → (value, weight)
Samples = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval (None where there is none), its standard error and how many units it rests on."""

    value: float
    low: float | None
    high: float | None
    se: float | None
    n: int

    @property
    def mde(self) -> float | None:
        """Smallest difference that would have been found four times out of five."""
        return None if self.se is None else MDE_FACTOR * self.se

    @property
    def contains_zero(self) -> bool:
        """True also where there is no interval: nothing is then excluded."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def merge_samples(rows: Iterable[tuple[str, float, float]]) -> dict[str, tuple[float, float]]:
    """Rows (sample, value, weight) → one (value, weight) per sample; several rows of one document stay together."""
    sums: dict[str, list[tuple[float, float]]] = {}
    for sample, value, weight in rows:
        sums.setdefault(sample, []).append((value, weight))
    return {sample: (_ratio(parts), math.fsum(w for _, w in parts)) for sample, parts in sums.items()}


def _ratio(parts: Sequence[tuple[float, float]]) -> float:
    if len(parts) == 1:
        return parts[0][0]
    total = math.fsum(w for _, w in parts)
    return math.fsum(v * w for v, w in parts) / total if total > 0 else math.nan


def weighted_ratio(samples: Samples) -> float:
    """Σ value·weight / Σ weight. Raises ValueError where nothing was weighed."""
    total = math.fsum(w for _, w in samples.values())
    if not samples or total <= 0:
        raise ValueError(f"got {len(samples)} samples of total weight {total} · expected a positive weight")
    return math.fsum(v * w for v, w in samples.values()) / total


def bootstrap_ratio(samples: Samples) -> Estimate:
    """The ratio with the interval over its samples; no interval below five of them."""
    value = weighted_ratio(samples)
    if len(samples) < FEWEST_DOCUMENTS:
        return Estimate(value, None, None, None, len(samples))
    # Resampling deviations from the estimate, not the values: equal documents then give exactly no width.
    return _percentile(value, _resampled(_centred(samples, value, sorted(samples))), len(samples))


def paired_difference(first: Samples, second: Samples) -> Estimate:
    """ratio(first) - ratio(second) over the samples that both have, with the same draws for both."""
    names = sorted(set(first) & set(second))
    if not names:
        raise ValueError("got no sample that both have · expected the same documents")
    one, two = {n: first[n] for n in names}, {n: second[n] for n in names}
    left, right = weighted_ratio(one), weighted_ratio(two)
    if len(names) < FEWEST_DOCUMENTS:
        return Estimate(left - right, None, None, None, len(names))
    draws = _resampled(_centred(one, left, names)) - _resampled(_centred(two, right, names))
    return _percentile(left - right, draws, len(names))


def t_interval(values: Sequence[float]) -> Estimate:
    """Mean over seeds with Student's t; no interval below three."""
    n = len(values)
    if not n:
        raise ValueError("got no values · expected at least one seed")
    mean = math.fsum(values) / n
    if n < 3:
        return Estimate(mean, None, None, None, n)
    se = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = t_quantile(n - 1) * se
    return Estimate(mean, mean - half, mean + half, se, n)


def t_quantile(df: int) -> float:
    """The 97.5 % point of Student's t: a table to 30 degrees of freedom, then Cornish and Fisher's expansion."""
    if df <= len(_T_975):
        return _T_975[df - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)


def median(values: Sequence[float]) -> float:
    """The middle value; the mean of the two in the middle for an even count."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _centred(samples: Samples, value: float, names: Sequence[str]) -> tuple[Floats, Floats]:
    weights = np.array([samples[name][1] for name in names], dtype=np.float64)
    return np.array([samples[name][0] - value for name in names], dtype=np.float64) * weights, weights


def _resampled(deviations: tuple[Floats, Floats]) -> Floats:
    """RESAMPLES ratios as deviations from the estimate; resamples without any weight are left at nan."""
    above, weights = deviations
    out = np.full(RESAMPLES, np.nan)
    start = 0
    for counts in _draws(len(weights)):
        below = counts @ weights
        np.divide(counts @ above, below, out=out[start : start + len(counts)], where=below > 0)
        start += len(counts)
    return out


def _draws(n: int) -> Iterable[Floats]:
    """How often each of n documents is drawn, (RESAMPLES, n) in blocks; the same for every call with the same n."""
    if n * RESAMPLES <= _LARGEST_BLOCK:
        return (_drawn_once(n),)
    generator, rows = np.random.default_rng(SEED), max(1, _LARGEST_BLOCK // n)
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    return (_counts(generator, n, size) for size in sizes)


@lru_cache(maxsize=4)
def _drawn_once(n: int) -> Floats:
    return _counts(np.random.default_rng(SEED), n, RESAMPLES)


def _counts(generator: np.random.Generator, n: int, rows: int) -> Floats:
    return generator.multinomial(n, [1 / n] * n, size=rows).astype(np.float64)


def _percentile(value: float, deviations: NDArray[Any], n: int) -> Estimate:
    sound = deviations[np.isfinite(deviations)]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(sound, [tail, 1 - tail])
    return Estimate(value, value + float(low), value + float(high), float(np.std(sound, ddof=1)), n)
