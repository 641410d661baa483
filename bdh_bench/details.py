"""What is each family at a size: parameters, operations, state, the kernels that would run here, and what better ones need?

Models are built on torch's meta device, so that a billion parameters cost nothing. A family that cannot be built is a row that says
why. A model's own ``kernels()`` and ``missing()`` tell what runs and what is missing; both are optional.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bdh_bench import registry
from bdh_bench.loading import resolve
from bdh_bench.registry import Entry
from bdh_bench.spec import DEFAULT_SIZE, ModelSpec

_CONTEXTS = {"1k": 1024, "64k": 65_536}
NUMBERS = ("parameters", "FLOPs/token at 1k", "state at 1k", "state at 64k")


def describe(entry: Entry, size: str = "") -> dict[str, Any]:
    """The facts of one family at ``size`` (its own default without one); of a model that cannot be built, ``problem``."""
    if entry.problem:
        return {}
    if entry.defaults.get("needs_name"):
        return {"missing": f"an ID: {entry.name}:ID"}
    if entry.defaults.get("words"):
        return {"missing": f"a word: {entry.name}:{next(iter(entry.defaults['words']))}, …"}
    try:
        return _facts(entry, size)
    except (Exception, SystemExit) as error:  # one broken model must not break the table
        return {"problem": " ".join(f"{type(error).__name__}: {error}".split())}


def _facts(entry: Entry, size: str) -> dict[str, Any]:
    module = registry.load("models", entry.name)
    sized = hasattr(module, "scaled")
    config = resolve(ModelSpec(entry.name, size=size if sized else ""), module, None, train_context=256)
    with torch.device("meta"):
        model = module.Model(config)
    limit = model.max_positions

    def within(context: int, value: float) -> float | None:
        return value if limit is None or context <= limit else None

    missing = getattr(model, "missing", None) or getattr(module, "missing", None)
    return {
        "size": (size or DEFAULT_SIZE) if sized else "",
        "parameters": model.parameter_count(),
        "flops_per_token_1k": within(1024, model.flops_per_token(min(1024, limit or 1024))),
        **{f"state_bytes_{name}": within(c, model.state_bytes(1, c)) for name, c in _CONTEXTS.items()},
        "max_positions": limit,
        "kernels": model.kernels() if hasattr(model, "kernels") else "",
        "missing": missing() if missing else "",
    }


def as_row(row: Mapping[str, Any]) -> dict[str, str]:
    """One family as text for a table; a dash where the model cannot go."""
    built = "parameters" in row
    names = dict(zip(("parameters", "flops_per_token_1k", "state_bytes_1k", "state_bytes_64k"), NUMBERS, strict=True))
    numbers = {head: _number(row[key]) if built else "" for key, head in names.items()}
    return {
        "model": row["name"] + (f"@{row['size']}" if row.get("size") else ""),
        "origin": row["origin"],
        **numbers,
        "positions": _positions(row) if built else "",
        "kernels here": row.get("kernels", ""),
        "missing": f"problem: {row['problem']}" if row.get("problem") else row.get("missing", ""),
    }


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _positions(row: Mapping[str, Any]) -> str:
    limit = row.get("max_positions")
    return "no limit" if limit is None else f"{limit:,}"
