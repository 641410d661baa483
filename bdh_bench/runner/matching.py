"""What is made equal between the models of a run, and what does each get for it?

    params      sizes: every model has the parameters that its name asks for (the same for all, unless the names say otherwise)
    bytes       the same, and training bytes are the declared axis
    flops       training bytes: each model reads as many as cost what the first model's cost
    wallclock   training bytes: as many as each model reads in ``train_seconds`` on this machine (``training/pilot.py``)
    state       sizes: each model has the width at which its state after 4 training contexts weighs what the first model's does

The winner may change with the axis; which one is primary is declared before training (protocol: four matchings). The reference is
the first model of the run that learns.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch

from bdh_bench import registry, sizing
from bdh_bench.errors import SpecError
from bdh_bench.loading import resolve
from bdh_bench.spec import ModelSpec, RunSpec, parse_model

#: Training contexts after which states are compared.
STATE_CONTEXTS = 4
#: Backward costs about twice the forward pass.
_TRAINING_PASSES = 3


def training_flops_per_byte(model: Any, context: int) -> float:
    """Forward and backward operations per trained byte, at the mean context of a piece."""
    mode = "parallel" if getattr(model.config, "mode", "") == "parallel" else "chunked"
    return float(_TRAINING_PASSES * model.flops_per_token(max(1, context // 2), mode))


def matched_bytes(model: Any, spec: RunSpec) -> int:
    """Training bytes of ``model``; with ``wallclock`` a provisional number that the pilot replaces."""
    if spec.match != "flops":
        return spec.train_bytes
    reference = _on_meta(_reference(spec), spec.train_context)
    context = spec.train_context
    ratio = training_flops_per_byte(reference, context) / training_flops_per_byte(model, context)
    return max(1, round(spec.train_bytes * ratio))


def matched_model(spec: RunSpec, model: ModelSpec) -> ModelSpec:
    """``model`` as it is built: itself, or with ``state`` one whose every option is pinned. Raises SpecError beyond ±5 %."""
    if spec.match != "state" or model.option("weights") or not hasattr(_module(model), "scaled"):
        return model
    reference = _reference(spec)
    if str(model.architecture()) == str(reference.architecture()):
        return model
    context = STATE_CONTEXTS * spec.train_context
    target = _on_meta(reference, spec.train_context).state_bytes(1, context)
    pinned = {key: getattr(resolve(model, _module(model), None, spec.train_context), key) for key, _ in _own(model)}
    config = sizing.solve_state(_module(model), target, context, pinned)
    options = {field.name: str(getattr(config, field.name)) for field in fields(config)} | dict(model.options)
    return ModelSpec(model.family, model.name, "", tuple(sorted(options.items())))


def _own(model: ModelSpec) -> tuple[tuple[str, str], ...]:
    return model.architecture().options


def _module(model: ModelSpec) -> Any:
    return registry.load("models", model.family)


def _reference(spec: RunSpec) -> ModelSpec:
    for name in spec.models:
        model = parse_model(name)
        if hasattr(_module(model), "scaled"):
            return model
    raise SpecError(f"got --match {spec.match} without a model that learns · expected at least one", "add one")


@lru_cache(maxsize=32)
def _on_meta(model: ModelSpec, train_context: int) -> Any:
    """The model without its weights: enough for its formulae."""
    config = resolve(model, _module(model), None, train_context)
    with torch.device("meta"):
        return _module(model).Model(config)
