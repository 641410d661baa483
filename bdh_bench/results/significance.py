"""How often would chance alone have made a difference at least so large?

* sign flip: under "no difference" each unit's difference could as well have had the other sign. All 2ⁿ signs up to 13 units, be they
  documents, clusters or seeds; 10,000 draws beyond. With n units no p below 2/2ⁿ is possible: that floor is part of the answer,
* McNemar, exact: of the trials on which two models disagree, how many went to one of them (a binomial test),
* Holm: several questions asked of one run, corrected together.

All are two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bdh_bench.results.resampling import RESAMPLES, SEED, Floats

EXACT_UNITS = 13
LEVEL = 0.05
_TOLERANCE = 1e-9  # two sums of the same numbers in another order are equal


@dataclass(frozen=True)
class PValue:
    """A p-value, the least that this test could have given, over how many units, and whether every sign was tried."""

    value: float
    floor: float
    units: int
    exact: bool


def sign_flip(differences: Sequence[float] | Floats) -> PValue:
    """p of the sum of per-unit differences (n,)."""
    own = np.asarray(differences, dtype=np.float64)
    n = len(own)
    if not n:
        raise ValueError("got no units for a sign-flip test · expected at least one")
    exact = n <= EXACT_UNITS
    signs = _all_signs(n) if exact else _drawn_signs(n)
    reached = np.abs(signs @ own) >= abs(own.sum()) - _TOLERANCE * np.abs(own).sum()
    if exact:  # the first unit's sign is fixed: the other half of the signs mirrors this one
        return PValue(float(reached.mean()), 2.0 ** (1 - n), n, True)
    return PValue((int(reached.sum()) + 1) / (RESAMPLES + 1), 1 / (RESAMPLES + 1), n, False)


@lru_cache(maxsize=4)
def _all_signs(n: int) -> Floats:
    """Half of the 2ⁿ signs, (2ⁿ⁻¹, n): those whose first is +1."""
    codes: NDArray[np.int64] = np.arange(2 ** (n - 1), dtype=np.int64)
    return np.where(codes[:, None] >> np.arange(n) & 1, -1.0, 1.0)[:, ::-1]


@lru_cache(maxsize=4)
def _drawn_signs(n: int) -> Floats:
    generator = np.random.default_rng([SEED, 2])
    return generator.integers(0, 2, (RESAMPLES, n)).astype(np.float64) * 2 - 1


def mcnemar(first_only: int, second_only: int) -> PValue:
    """Exact p for paired trials: how many only the first, and only the second model got right. Ties say nothing."""
    if first_only < 0 or second_only < 0:
        raise ValueError(f"got {first_only} and {second_only} trials · expected counts")
    n = first_only + second_only
    tail = sum(math.comb(n, k) for k in range(min(first_only, second_only) + 1))
    return PValue(min(1.0, 2 * tail / 2**n), min(1.0, 2 / 2**n), n, True)


def holm(values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the order given: the k-th smallest of m times m − k + 1, never below a smaller one's."""
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = highest
    return adjusted
