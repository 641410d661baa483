"""From a name to a model: resolve the options, solve the width, build with a seed, load weights.

Everything that makes a model out of a name passes through here, so a model behaves the same in a task, in training and
in a user's own script.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bdh_bench import registry, sizing
from bdh_bench.errors import CheckpointError, SpecError
from bdh_bench.spec import DEFAULT_SIZE, ModelSpec, parse_model

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


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
    if dtype not in _DTYPES:
        raise SpecError(f"got dtype {dtype!r} · expected one of {', '.join(_DTYPES)}")
    spec = parse_model(spec) if isinstance(spec, str) else spec
    module = registry.load("models", registry.check(spec).name)
    path = spec.option("weights")
    tensors = read_weights(path) if path else None
    config = resolve(spec, module, tensors, train_context)
    model = build(module, config, seed)
    if tensors is not None:
        fill(model, tensors, str(path))
    return model.to(device=device, dtype=_DTYPES[dtype]).eval()


def resolve(spec: ModelSpec, module: ModuleType, tensors: dict[str, Tensor] | None, train_context: int) -> Any:
    """The Config that this name stands for. Widths come from the weights where given, else from the size solver."""
    pinned = _parse_options(spec, module)
    if spec.name:
        pinned["name"] = spec.name
    if tensors is not None and hasattr(module, "config_from_weights"):
        try:
            return module.config_from_weights(tensors, pinned)
        except (KeyError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"the weights of {str(spec)!r} are not those of a {spec.family}: {error}",
                "check that the file belongs to this family",
            ) from error
    if pinned.get("max_positions", getattr(module.Config, "max_positions", None)) == 0:
        pinned["max_positions"] = train_context + 128  # 0 means: the training context and one target block beyond it
    if hasattr(module, "scaled"):
        config = sizing.solve(module, spec.size or DEFAULT_SIZE, pinned, explicit=bool(spec.size))
    elif spec.size:
        raise SpecError(f"{spec.family} has no sizes · got @{spec.size}", f"write {spec.family} without a size")
    else:
        config = module.Config(**pinned)
    return config


def _parse_options(spec: ModelSpec, module: ModuleType) -> dict[str, Any]:
    types = {f.name: f.type for f in fields(module.Config)}
    values: dict[str, Any] = {}
    for key, text in spec.architecture().options:
        try:
            values[key] = _PARSERS[str(types[key])](text)
        except (KeyError, ValueError):
            raise SpecError(
                f"got {key}={text} for {spec.family} · expected a value of type {types.get(key, 'unknown')}"
            ) from None
    return values


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


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state_dict from safetensors, or from a ``.pt`` file read with weights_only. Raises CheckpointError."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"no weights at {path} · expected a .safetensors or .pt file")
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(str(path))
            return tensors
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", "copy or train it again") from error
    except Exception as error:  # torch.load raises many types for a damaged or an unsafe pickle
        raise CheckpointError(
            f"{path} cannot be read with weights_only: {type(error).__name__}",
            "save the bare state_dict with safetensors.torch.save_file",
        ) from error
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} holds no state_dict · expected a dictionary of tensors")
    return {str(name).removeprefix("_orig_mod."): tensor for name, tensor in state.items()}


def fill(model: nn.Module, tensors: dict[str, Tensor], origin: str) -> None:
    """Load the tensors; names, shapes and finiteness must be right. Raises CheckpointError."""
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise CheckpointError(f"{origin} has NaN or infinite values in {', '.join(bad[:3])}", "use another checkpoint")
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise CheckpointError(f"{origin} does not fit this model: {detail[:400]}", "check options and sizes") from error


def describe(family: str) -> dict[str, Any]:
    """What a family is at its default size: parameters, operations per token, state bytes, kernels (on the meta device)."""
    module = registry.load("models", family)
    words = registry.find("models", family).defaults.get("words", ())
    if words:
        return {}
    config = resolve(ModelSpec(family), module, None, 256)
    with torch.device("meta"):
        model = module.Model(config)
    return {
        "parameters": model.parameter_count(),
        "flops_per_token_1k": model.flops_per_token(1024),
        "state_bytes_1k": model.state_bytes(1, 1024),
        "state_bytes_64k": model.state_bytes(1, 65_536),
        "kernels": model.kernels() if hasattr(model, "kernels") else "",
    }
