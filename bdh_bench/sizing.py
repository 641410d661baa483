"""How wide must a model be to have so many parameters? One solver for every family.

A model file's ``scaled(target)`` yields Configs near the target, best shape first (the family knows its own aspect
ratios); ``parameters(config)`` is a closed form or, where a file has none, a count on torch's meta device. The solver
picks the first candidate within the tolerance, else the nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from types import ModuleType
from typing import Any

import torch

from bdh_bench.errors import SpecError
from bdh_bench.spec import SIZES

TOLERANCE = 0.02
_GOOD_ENOUGH = 0.005


def solve(module: ModuleType, size: str, pinned: Mapping[str, Any], explicit: bool) -> Any:
    """The Config of this family nearest to ``size``, with the pinned options kept.

    ``explicit`` says that the user wrote the size: then a result outside ±2 % raises SpecError.
    """
    target = SIZES[size]
    best, best_error = None, float("inf")
    seen: set[Any] = set()
    for candidate in module.scaled(target, **pinned):
        config = replace(candidate, **pinned)
        if config in seen:
            continue
        seen.add(config)
        error = abs(count(module, config) - target) / target
        if error < best_error:
            best, best_error = config, error
        if error <= _GOOD_ENOUGH:
            break
    if best is None or (explicit and best_error > TOLERANCE):
        name = module.__name__.rsplit(".", 1)[-1]
        options = "".join(f":{k}={v}" for k, v in pinned.items())
        found = f"{count(module, best):,} parameters" if best is not None else "no shape"
        raise SpecError(
            f"{name}@{size}{options} would have {found} · expected {target:,} ± 2 %",
            "pin fewer options or drop the size",
        )
    return best


def count(module: ModuleType, config: Any) -> int:
    """Parameters of ``Model(config)``, counted on the meta device where the family has no formula."""
    formula = getattr(module, "parameters", None)
    if formula is not None:
        return int(formula(config))
    with torch.device("meta"):
        return int(module.Model(config).parameter_count())


#: How near a state must come to the one that it is matched with.
STATE_TOLERANCE = 0.05
_STATE_STEPS = 40


def solve_state(module: ModuleType, target_bytes: int, context: int, pinned: Mapping[str, Any]) -> Any:
    """The Config of this family whose state after ``context`` tokens is nearest to ``target_bytes``, with the pinned options kept.

    Bisects the parameter target, along which states grow, and takes the best shape seen on the way. Raises SpecError beyond ±5 %.
    """
    best, best_error = None, float("inf")
    low, high = 1e3, 4e9
    for _ in range(_STATE_STEPS):
        middle = (low * high) ** 0.5
        first = None
        for candidate in islice(module.scaled(round(middle), **pinned), 8):
            config = replace(candidate, **pinned)
            found = _state_bytes(module, config, context)
            first = found if first is None else first
            if abs(found / target_bytes - 1) < best_error:
                best, best_error = config, abs(found / target_bytes - 1)
        if first is None or best_error <= _GOOD_ENOUGH:
            break
        low, high = (middle, high) if first < target_bytes else (low, middle)
    if best is None or best_error > STATE_TOLERANCE:
        name = module.__name__.rsplit(".", 1)[-1]
        nearest = f"{_state_bytes(module, best, context):,} bytes" if best is not None else "none"
        raise SpecError(
            f"{name} has no shape with a state of {target_bytes:,} bytes ± 5 % after {context:,} tokens · nearest: {nearest}",
            "pin fewer options, or choose another --match",
        )
    return best


def _state_bytes(module: ModuleType, config: Any, context: int) -> int:
    with torch.device("meta"):
        return int(module.Model(config).state_bytes(1, context))
