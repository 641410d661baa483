"""How does a model of ours leave in a layout that others read?

A family offers a layout by a function in its file, ``to_published(model)`` or ``to_transformers(model)``, which returns the config
and the state_dict. What is written is a folder, config.json beside the tensors, and ``weights=FOLDER`` reads it back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bdh_bench import registry
from bdh_bench.errors import SpecError, UnknownNameError
from bdh_bench.folders import new_folder, require_absent
from bdh_bench.loading import load_model
from bdh_bench.spec import parse_model

LAYOUTS = ("published", "transformers")
FORMATS = ("safetensors", "pt")

Writer = Callable[[Any], tuple[Mapping[str, Any], Mapping[str, Tensor]]]


def convert(text: str, to: str, output: Path, format_: str = "safetensors") -> dict[str, Any]:
    """Write the model that ``text`` names to the new folder ``output``; return its files. Raises SpecError for what cannot be.

    ``random`` in the result says that the name had no weights, so that what was written is a drawn initial state.
    """
    if to not in LAYOUTS:
        raise UnknownNameError("layout", to, LAYOUTS)
    if format_ not in FORMATS:
        raise UnknownNameError("format", format_, FORMATS)
    if (to, format_) == ("transformers", "pt"):
        raise SpecError("got --format pt for transformers · expected safetensors", "leave --format out")
    require_absent(output)
    spec = parse_model(text)
    write = _writer(registry.load("models", registry.check(spec).name), spec.family, to)
    model = load_model(spec)
    config, tensors = write(model)
    file = f"model.{format_}"
    with new_folder(output) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, folder / file)
    return {
        "model": str(spec),
        "to": to,
        "weights": str(output / file),
        "config": str(output / "config.json"),
        "parameters": model.parameter_count(),
        "random": spec.option("weights") is None and bool(getattr(model, "trainable", True)),
    }


def _writer(module: ModuleType, family: str, to: str) -> Writer:
    write: Writer | None = getattr(module, f"to_{to}", None)
    if write is None:
        offered = [name for name in LAYOUTS if hasattr(module, f"to_{name}")]
        raise SpecError(
            f"{family} cannot be written as {to} · expected {' or '.join(offered) or 'no layout: its file offers none'}",
            f"a family offers it by a function to_{to}(model) in its file",
        )
    return write


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            save_file(tensors, str(path), metadata={"format": "pt"})
        else:
            torch.save(tensors, path)
    except (SafetensorError, RuntimeError) as error:  # torch.save and safetensors wrap a full disk in their own
        raise SpecError(f"cannot write {path.name}: {error}", "check the space on the disk") from error
