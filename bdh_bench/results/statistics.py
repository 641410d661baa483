"""How sure can one be of a number, and of a difference between two?

* documents: the statistic is Σ value·weight / Σ weight; clusters of documents are drawn with replacement (``resampling``). Two
  models on the same documents are resampled with the same draws, so what the documents have in common cancels,
* seeds: Student's t over the values of the seeds; differences are paired by seed first,
* seeds and documents: seeds are drawn, then documents (the same ones for every seed, because every seed is scored on them),
* trials that succeed or fail: Wilson's interval,
* repeats inside one process: the median, without an interval (the unit of replication would be the process).

Each estimate has a 95 % interval, and a 90 % one for the two one-sided tests of equivalence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from bdh_bench.results.resampling import (
    PERCENTILE_FROM,
    Clusters,
    Floats,
    Samples,
    counts_once,
    intervals,
    left_out,
    resampled,
    sums_of,
)

LEVEL = 0.95
INNER_LEVEL = 0.90  # two one-sided tests at 5 %
#: Below this many independent documents an interval says more about the method than about the data.
FEWEST_DOCUMENTS = 5
FEWEST_SEEDS = 3
#: Two-sided test at 5 % with 80 % power: 1.96 + 0.84.
MDE_FACTOR = 2.8


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval (None where there is none), its standard error and how many samples it rests on.

    units    how many of them are independent (clusters, seeds)
    inner    the 90 % interval
    method   how the interval came about: bca, percentile, t, wilson, or nothing
    """

    value: float
    low: float | None
    high: float | None
    se: float | None
    n: int
    units: int = 0
    inner: tuple[float, float] | None = None
    method: str = ""

    @property
    def mde(self) -> float | None:
        """Smallest difference that would have been found four times out of five."""
        return None if self.se is None else MDE_FACTOR * self.se

    @property
    def contains_zero(self) -> bool:
        """True also where there is no interval: nothing is then excluded."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high

    def within(self, margin: float) -> bool:
        """Whether the 90 % interval lies inside ±margin: both one-sided tests at 5 % reject a larger difference."""
        return self.inner is not None and -margin < self.inner[0] and self.inner[1] < margin


# -- documents -------------------------------------------------------------------------------------------------------


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


def bootstrap_ratio(samples: Samples, clusters: Clusters | None = None) -> Estimate:
    """The ratio with the interval over its samples; no interval below five clusters."""
    value = weighted_ratio(samples)
    return _contrast([(samples, value)], [1.0], sorted(samples), clusters, value)


def paired_difference(first: Samples, second: Samples, clusters: Clusters | None = None) -> Estimate:
    """ratio(first) − ratio(second) over the samples that both have, with the same draws for both."""
    return mean_difference([(first, second)], clusters)


def mean_difference(pairs: Sequence[tuple[Samples, Samples]], clusters: Clusters | None = None) -> Estimate:
    """The mean over pairs (one per seed) of ratio(first) − ratio(second), over the samples that all have; documents are drawn."""
    names, ratios = _aligned(pairs)
    signs = [1 / len(pairs), -1 / len(pairs)] * len(pairs)
    value = math.fsum(sign * ratio for sign, (_, ratio) in zip(signs, ratios, strict=True))
    return _contrast(ratios, signs, names, clusters, value)


def two_level_difference(pairs: Sequence[tuple[Samples, Samples]], clusters: Clusters | None = None) -> Estimate:
    """The same mean with seeds drawn first, then documents: what both kinds of chance leave open."""
    names, ratios = _aligned(pairs)
    sums = sums_of(ratios, names, clusters)
    own = np.array([a - b for (_, a), (_, b) in zip(ratios[::2], ratios[1::2], strict=True)])  # (S,)
    value = float(own.mean())
    if len(sums.above) < FEWEST_DOCUMENTS or len(pairs) < FEWEST_SEEDS:
        return Estimate(value, None, None, None, len(names), len(sums.above))
    draws = resampled(sums)
    each = own + draws[:, ::2] - draws[:, 1::2]  # (R, S)
    total = (counts_once(len(pairs), stream=1) * each).sum(1) / len(pairs) - value
    return _from_draws(value, total, np.zeros(PERCENTILE_FROM), len(names), len(sums.above))  # percentile: no jackknife


def cluster_differences(pairs: Sequence[tuple[Samples, Samples]], clusters: Clusters | None = None) -> Floats:
    """What each cluster adds to the mean difference, (C,): they sum to it. What a sign-flip test flips."""
    names, ratios = _aligned(pairs)
    sums = sums_of([(samples, 0.0) for samples, _ in ratios], names, clusters)
    shares = sums.above / sums.below.sum(0)
    mean: Floats = (shares[:, ::2] - shares[:, 1::2]).mean(1)
    return mean


def _aligned(pairs: Sequence[tuple[Samples, Samples]]) -> tuple[list[str], list[tuple[Samples, float]]]:
    """The samples that all have, and (samples, ratio) of first, second, first, second, …"""
    both = [samples for pair in pairs for samples in pair]
    names = sorted(set(both[0]).intersection(*both[1:])) if both else []
    if not names:
        raise ValueError("got no sample that both have · expected the same documents")
    kept = [{name: samples[name] for name in names} for samples in both]
    return names, [(samples, weighted_ratio(samples)) for samples in kept]


def _contrast(
    ratios: Sequence[tuple[Samples, float]],
    signs: Sequence[float],
    names: Sequence[str],
    clusters: Clusters | None,
    value: float,
) -> Estimate:
    """Σ sign · ratio with its interval over clusters."""
    sums = sums_of(ratios, names, clusters)
    if len(sums.above) < FEWEST_DOCUMENTS:
        return Estimate(value, None, None, None, len(names), len(sums.above))
    weights = np.array(signs)
    return _from_draws(value, resampled(sums) @ weights, left_out(sums) @ weights, len(names), len(sums.above))


def _from_draws(value: float, deviations: Floats, jackknife: Floats, n: int, units: int) -> Estimate:
    sound = deviations[np.isfinite(deviations)]
    (low, high), inner = intervals(sound, jackknife, (LEVEL, INNER_LEVEL))
    method = "bca" if len(jackknife) < PERCENTILE_FROM else "percentile"
    se = float(np.std(sound, ddof=1))
    return Estimate(value, value + low, value + high, se, n, units, (value + inner[0], value + inner[1]), method)


# -- seeds -----------------------------------------------------------------------------------------------------------


def t_interval(values: Sequence[float]) -> Estimate:
    """Mean over seeds with Student's t; no interval below three."""
    n = len(values)
    if not n:
        raise ValueError("got no values · expected at least one seed")
    mean = math.fsum(values) / n
    if n < FEWEST_SEEDS:
        return Estimate(mean, None, None, None, n, n)
    se = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half, inner = t_quantile(n - 1) * se, t_quantile(n - 1, INNER_LEVEL) * se
    return Estimate(mean, mean - half, mean + half, se, n, n, (mean - inner, mean + inner), "t")


@lru_cache(maxsize=256)
def t_quantile(df: int, level: float = LEVEL) -> float:
    """t such that |T| < t with probability ``level``, by bisection of ``t_inside``."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, df) < level else (low, middle)
    return (low + high) / 2


def t_inside(t: float, df: int) -> float:
    """P(|T| < t) for whole degrees of freedom: a finite series in cos θ, tan θ = t/√df (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if df % 2 else (1.0, 0.0)
    for k in range(1 + df % 2, df, 2):  # odd: cos, 2/3 cos³, …; even: 1, 1/2 cos², …
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if df % 2 else sine * total


def t_p_value(values: Sequence[float]) -> float:
    """Two-sided p of the mean being 0. Values without any spread decide nothing that is 0, and everything else."""
    estimate = t_interval(values)
    if estimate.se is None:
        return 1.0
    if estimate.se == 0:
        return 1.0 if estimate.value == 0 else 0.0
    return 1 - t_inside(estimate.value / estimate.se, len(values) - 1)


# -- trials and repeats ----------------------------------------------------------------------------------------------


def wilson(successes: float, trials: float, level: float = LEVEL) -> Estimate:
    """The share of successes with Wilson's score interval. Raises ValueError for a count that is none."""
    if not (trials > 0 and 0 <= successes <= trials):
        raise ValueError(f"got {successes} successes of {trials} trials · expected between 0 and all of at least one")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    se = math.sqrt(share * (1 - share) / trials)
    low = 0.0 if successes == 0 else middle - half  # the ends are exact there; rounding would leave −1e-18
    high = 1.0 if successes == trials else middle + half
    return Estimate(share, low, high, se, round(trials), round(trials), None, "wilson")


def median(values: Sequence[float]) -> float:
    """The middle value; the mean of the two in the middle for an even count."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def cluster_count(names: Iterable[str], clusters: Mapping[str, str] | None = None) -> int:
    """How many independent units these samples are."""
    of = clusters or {}
    return len({(name not in of, of.get(name, name)) for name in names})
