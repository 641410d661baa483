"""From a name to a model: resolve the options, solve the width, build with a seed, load weights.

Everything that makes a model out of a name passes through here, so a model behaves the same in a task, in training and
in a user's own script.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bdh_bench import registry, sizing
from bdh_bench.errors import CheckpointError, SpecError
from bdh_bench.spec import DEFAULT_SIZE, ModelSpec, parse_model
from bdh_bench.weights import WeightsFile, fill, inspect, read_tensors

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def load_model(
    spec: str | ModelSpec,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    train_context: int = 256,
) -> Any:
    """The LanguageModel called ``spec`` in eval mode; parameters keep ``requires_grad``.

    Without ``weights=PATH`` the weights are random, drawn from ``seed``. ``train_context`` (tokens) sets the position
    table of a model whose table follows the training context. Raises SpecError, UnknownNameError, CheckpointError.
    """
    if dtype not in DTYPES:
        raise SpecError(f"got dtype {dtype!r} · expected one of {', '.join(DTYPES)}")
    spec = parse_model(spec) if isinstance(spec, str) else spec
    entry = registry.check(spec)
    module = registry.load("models", entry.name)
    path = spec.option("weights")
    file = inspect(path) if path else None
    tensors = read_tensors(file.path) if file else None
    with registry.blame(entry, "be built"):
        config = resolve(spec, module, tensors, train_context, _stated(module, file))
        model = build(module, config, seed)
    if tensors is not None:
        fill(model, tensors, str(path))
    return model.to(device=device, dtype=DTYPES[dtype]).eval()


def resolve(
    spec: ModelSpec,
    module: ModuleType,
    tensors: dict[str, Tensor] | None,
    train_context: int,
    stated: Mapping[str, Any] | None = None,
) -> Any:
    """The Config that this name stands for. Widths come from the weights where given, else from the size solver.

    ``stated`` is what a config beside the weights says; options in the name win over it, the tensors over neither: where
    they do not agree, CheckpointError is raised.
    """
    pinned = {**(stated or {}), **_parse_options(spec, module)}
    if spec.name:
        pinned["name"] = spec.name
    takes_revision = "revision" in module.Config.__dataclass_fields__
    if takes_revision and spec.size:  # what follows the @ of a published model
        pinned["revision"] = spec.size
    if tensors is not None and hasattr(module, "config_from_weights"):
        try:
            return module.config_from_weights(tensors, pinned)
        except (KeyError, IndexError, ValueError) as error:
            said = " and its config" if stated else ""
            reason = f"no tensor {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"the weights of {str(spec)!r}{said} are not those of a {spec.family}: {reason} · "
                f"got {', '.join(list(tensors)[:3]) or 'no tensors'}, …",
                "check that file and options belong to this family",
            ) from error
    if pinned.get("max_positions", getattr(module.Config, "max_positions", None)) == 0:
        pinned["max_positions"] = train_context + 128  # 0 means: the training context and one target block beyond it
    if hasattr(module, "scaled") and not stated:
        config = sizing.solve(module, spec.size or DEFAULT_SIZE, pinned, explicit=bool(spec.size))
    elif spec.size and not (stated or takes_revision):
        raise SpecError(f"{spec.family} has no sizes · got @{spec.size}", f"write {spec.family} without a size")
    else:
        config = module.Config(**pinned)
    return config


def _stated(module: ModuleType, file: WeightsFile | None) -> dict[str, Any]:
    """The options that the config beside the weights states: in transformers' names where the family reads those, else in ours.

    Raises CheckpointError for a value of another type. Names that are no options (dates, authors) say nothing about the model.
    """
    if file is None or file.config is None:
        return {}
    if "model_type" in file.config and hasattr(module, "config_from_transformers"):
        try:
            config = module.config_from_transformers(dict(file.config))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"{file.config_path} is not the config of such a model: {reason}",
                "check that the folder is this family's",
            ) from error
        return {f.name: getattr(config, f.name) for f in fields(config)}
    stated = {}
    for option in fields(module.Config):
        if option.name in file.config:
            value, kind = file.config[option.name], _type_name(option)
            if type(value).__name__ != kind and (type(value), kind) != (int, "float"):
                raise CheckpointError(
                    f"{file.config_path} says {option.name} is {value!r} · expected a value of type {kind}",
                    "correct it",
                )
            stated[option.name] = value
    return stated


def _parse_options(spec: ModelSpec, module: ModuleType) -> dict[str, Any]:
    types = {f.name: _type_name(f) for f in fields(module.Config)}
    values: dict[str, Any] = {}
    for key, text in spec.architecture().options:
        try:
            values[key] = _PARSERS[types[key]](text)
        except (KeyError, ValueError):
            raise SpecError(
                f"got {key}={text} for {spec.family} · expected a value of type {types.get(key, 'unknown')}"
            ) from None
    return values


def _type_name(option: Field[Any]) -> str:
    """``int`` for the annotation int, whether or not the file postpones its annotations."""
    return option.type if isinstance(option.type, str) else getattr(option.type, "__name__", str(option.type))


def _parse_bool(text: str) -> bool:
    if text.lower() in ("on", "true", "1", "yes"):
        return True
    if text.lower() in ("off", "false", "0", "no"):
        return False
    raise ValueError(text)


_PARSERS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "bool": _parse_bool}


def build(module: ModuleType, config: Any, seed: int) -> nn.Module:
    """``module.Model(config)`` with weights drawn from ``seed``; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = module.Model(config)
    return model
