"""What would a ratio have been on other documents? The bootstrap, vectorised: counts of how often each unit is drawn, times sums.

The unit is the *cluster*: documents that share an author, a book or a package are drawn together; a document that shares nothing is
a cluster of its own. Ratios that rest on the same clusters are drawn with the same counts, so what they have in common cancels in
their difference.

Intervals are percentiles of the draws from 30 clusters on, and BCa (bias-corrected, accelerated; Efron 1987) below: with few units a
skewed statistic leans, and the percentile interval leans with it.

The seed of the draws is a constant of this file: the same run always gives the same interval.

Legend: R resamples, C clusters, K ratios.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

SEED = 20_260_101
RESAMPLES = 10_000
#: Below this many clusters the interval is BCa.
PERCENTILE_FROM = 30
_LARGEST_BLOCK = 2_000_000  # draws computed with at once
_LARGEST_KEPT = 20_000_000  # draws kept for the next call, two bytes each: to draw takes longer than to count

Floats = NDArray[np.float64]
#: sample → (value, weight)
Samples = Mapping[str, tuple[float, float]]
#: sample → cluster; a sample that is missing is a cluster of its own
Clusters = Mapping[str, str]
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Sums:
    """K ratios over the same clusters: ``above`` (C, K) is Σ (value − estimate)·weight, ``below`` (C, K) is Σ weight.

    Deviations and not values are resampled: equal documents then give exactly no width.
    """

    above: Floats
    below: Floats


def sums_of(ratios: Sequence[tuple[Samples, float]], names: Sequence[str], clusters: Clusters | None = None) -> Sums:
    """The sums of (samples, estimate) pairs over the samples called ``names``, by cluster in the order of the names."""
    where: dict[tuple[bool, str], int] = {}
    rows = []
    for name in names:
        shared = (clusters or {}).get(name)
        rows.append(where.setdefault((shared is None, name if shared is None else shared), len(where)))
    above, below = np.zeros((len(where), len(ratios))), np.zeros((len(where), len(ratios)))
    for column, (samples, estimate) in enumerate(ratios):
        weights = np.array([samples[name][1] for name in names], dtype=np.float64)
        values = np.array([samples[name][0] - estimate for name in names], dtype=np.float64)
        np.add.at(above[:, column], rows, values * weights)
        np.add.at(below[:, column], rows, weights)
    return Sums(above, below)


def resampled(sums: Sums) -> Floats:
    """The ratios of every resample as deviations from their estimates, (R, K); nan where a resample has no weight."""
    out = np.full((RESAMPLES, sums.above.shape[1]), np.nan)
    whole: Floats = sums.below.sum(0)
    even = bool((sums.below == sums.below[0]).all())  # then every resample weighs the same: one product less
    start = 0
    for counts in _draws(len(sums.above)):
        below = np.broadcast_to(whole, (len(counts), len(whole))) if even else counts @ sums.below
        np.divide(counts @ sums.above, below, out=out[start : start + len(counts)], where=below > 0)
        start += len(counts)
    return out


def left_out(sums: Sums) -> Floats:
    """The same with one cluster left out at a time, (C, K): the jackknife."""
    below: Floats = sums.below.sum(0) - sums.below
    out: Floats = np.zeros(below.shape)
    np.divide(sums.above.sum(0) - sums.above, below, out=out, where=below > 0)
    return out


def intervals(draws: Floats, jackknife: Floats, levels: Sequence[float]) -> list[tuple[float, float]]:
    """The intervals that hold these shares of draws (R,); BCa where the jackknife (C,) has few rows."""
    shares = [side for level in levels for side in ((1 - level) / 2, (1 + level) / 2)]
    if len(jackknife) < PERCENTILE_FROM:
        shares = _bca(draws, jackknife, shares)
    ends = [float(end) for end in np.quantile(draws, shares)]
    return list(zip(ends[::2], ends[1::2], strict=True))


def _bca(draws: Floats, jackknife: Floats, shares: Sequence[float]) -> list[float]:
    """The quantiles to read instead of ``shares``: corrected for bias z0 and acceleration a (draws are deviations from 0)."""
    below = float(np.mean(draws < 0) + 0.5 * np.mean(draws == 0))
    if not 0 < below < 1:
        return list(shares)
    z0 = _NORMAL.inv_cdf(below)
    apart = jackknife.mean() - jackknife
    spread = float((apart**2).sum()) ** 1.5
    a = float((apart**3).sum()) / (6 * spread) if spread > 0 else 0.0
    tilted = [z0 + _NORMAL.inv_cdf(share) for share in shares]
    if any(a * z >= 1 for z in tilted):
        return list(shares)
    return [_NORMAL.cdf(z0 + z / (1 - a * z)) for z in tilted]


def _draws(n: int) -> Iterable[Floats]:
    """How often each of n units is drawn, (R, n) in blocks; the same for every call with the same n."""
    if n * RESAMPLES <= _LARGEST_BLOCK:
        return (_drawn_once(n),)
    rows = max(1, _LARGEST_BLOCK // n)
    starts = range(0, RESAMPLES, rows)
    if n * RESAMPLES <= _LARGEST_KEPT:
        kept = _kept_small(n)
        return (kept[start : start + rows].astype(np.float64) for start in starts)
    generator = np.random.default_rng(SEED)
    return (_counts(generator, n, min(rows, RESAMPLES - start)) for start in starts)


@lru_cache(maxsize=4)
def counts_once(n: int, stream: int) -> Floats:
    """(R, n) counts from a stream of their own, independent of those of the documents: for seeds."""
    return _counts(np.random.default_rng([SEED, stream]), n, RESAMPLES)


@lru_cache(maxsize=4)
def _drawn_once(n: int) -> Floats:
    return _counts(np.random.default_rng(SEED), n, RESAMPLES)


@lru_cache(maxsize=4)
def _kept_small(n: int) -> NDArray[np.uint16]:
    return _counts(np.random.default_rng(SEED), n, RESAMPLES).astype(np.uint16)


def _counts(generator: np.random.Generator, n: int, rows: int) -> Floats:
    return generator.multinomial(n, [1 / n] * n, size=rows).astype(np.float64)
