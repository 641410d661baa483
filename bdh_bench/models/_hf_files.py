"""Which checkpoint does a name mean, and may it be used? Everything that is refused is refused here, with its reason.

A name that is a folder (or looks like one: ``./x``, ``/x``, ``~/x``) is read from disk; any other is an ID of the hub, looked up by the
library (from its local cache only where HF_HUB_OFFLINE is set). Only safetensors are read, no code of a checkpoint is run, and no
tensor is ever made up: a checkpoint whose names or shapes do not fit is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR
from pathlib import Path
from typing import Any

import torch

from bdh_bench.errors import BenchError, CheckpointError, SpecError

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "spiece.model",
    "vocab.txt",
)


def folder_of(name: str) -> Path | None:
    """The folder that ``name`` means, or None for an ID of the hub. Raises SpecError for a folder that is not there."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or path.is_file():
        raise SpecError(f"no folder {name} · expected a folder with config.json and safetensors", "check the path")
    return None


def read_config(name: str, revision: str, weights: bool = True) -> dict[str, Any]:
    """The checkpoint's config.json. Raises SpecError or CheckpointError where there is none or it may not be used.

    Without ``weights`` a folder that holds none is good too.
    """
    folder = folder_of(name)
    if folder is not None:
        raw = _read_json(folder / "config.json")
    else:
        from transformers import PreTrainedConfig

        with refusals(name), quiet():
            raw, _ = PreTrainedConfig.get_config_dict(name, revision=revision or None)
        if not raw:
            raise CheckpointError(f"{name}: no config.json", "give a folder as hf:./folder, or an ID of the hub")
    _check_code(name, raw)
    _check_kind(name, raw)
    if folder is not None and weights:
        _check_files(name, folder)
    return raw


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"no config.json in {path.parent}", "give the folder that save_pretrained wrote")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", "copy the checkpoint again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is damaged: expected an object", "copy the checkpoint again")
    return raw


def _check_code(name: str, raw: dict[str, Any]) -> None:
    if raw.get("auto_map"):
        raise CheckpointError(
            f"{name} asks for code of its own (auto_map in config.json) · expected an architecture that transformers has itself",
            "no code of a checkpoint is run here; where transformers knows the architecture, remove auto_map from a copy of the folder",
        )


def _check_kind(name: str, raw: dict[str, Any]) -> None:
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = str(raw.get("model_type", ""))
    if kind not in CONFIG_MAPPING_NAMES:
        raise CheckpointError(
            f"{name}: got model_type {kind or 'missing'!r} · expected one that transformers {__version__} knows",
            "check config.json, or use another version of transformers",
        )
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    causal = {c for entry in classes for c in ([entry] if isinstance(entry, str) else entry)}
    named = [str(a) for a in raw.get("architectures") or ()]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (named and not causal & set(named)):
        raise CheckpointError(
            f"{name}: got {', '.join(named) or kind} · expected a causal language model (one that predicts the next token)",
            "use a checkpoint of a causal architecture",
        )


def _check_files(name: str, folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{name}: got only pickled weights ({', '.join(pickles[:3])}) · expected safetensors; a pickle can run any code",
            "convert it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",
        )
    raise CheckpointError(f"{name}: no weights · expected *.safetensors in the folder", "copy the checkpoint again")


def load_module(name: str, revision: str) -> Any:
    """The transformers module in float32 and eval mode, every tensor from the checkpoint."""
    from transformers import AutoModelForCausalLM

    where = folder_of(name) or name
    with refusals(name), quiet():
        module, info = AutoModelForCausalLM.from_pretrained(
            where,
            revision=revision or None,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    for what, expected in (("missing", "every tensor of the architecture"), ("unexpected", "no other tensors")):
        keys = sorted(map(str, info[f"{what}_keys"]))
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(
                f"{name}: {what} tensors {', '.join(keys[:3])}{more} · expected {expected}",
                "check config.json against the weights",
            )
    if info["mismatched_keys"]:
        raise CheckpointError(
            f"{name}: tensors of other shapes: {sorted(map(str, info['mismatched_keys']))[:3]}",
            "check config.json against the weights",
        )
    bad = [n for n, p in module.named_parameters() if p.is_floating_point() and not p.isfinite().all()]
    if bad:
        raise CheckpointError(f"{name}: NaN or infinite values in {', '.join(bad[:3])}", "use another checkpoint")
    return module.eval()


def load_tokenizer(name: str, revision: str) -> Any:
    """The checkpoint's fast tokenizer. Raises CheckpointError where there is none."""
    from transformers import AutoTokenizer

    folder = folder_of(name)
    hint = "a model whose tokens are the bytes themselves: tokenizer=bytes"
    if folder is not None and not has_tokenizer(name):
        raise CheckpointError(f"{name}: no tokenizer in the folder · expected tokenizer.json", hint)
    with refusals(name), quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            folder or name, revision=revision or None, trust_remote_code=False, use_fast=True
        )
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"{name}: got the slow tokenizer {type(tokenizer).__name__} · expected a fast one (tokenizer.json)",
            "save a fast one into the folder; byte spans need it",
        )
    return tokenizer


def has_tokenizer(name: str) -> bool:
    """Whether the folder holds any file of a tokenizer; an ID of the hub is taken to have one."""
    folder = folder_of(name)
    return folder is None or any((folder / file).is_file() for file in _TOKENIZER_FILES)


def checkpoint_digest(name: str, module: Any) -> str:
    """The commit of a checkpoint of the hub; for a folder the sha256 of its configuration and weights."""
    commit = getattr(module.config, "_commit_hash", None)
    folder = folder_of(name)
    if folder is None:
        return str(commit or "")
    digest = hashlib.sha256()
    for path in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """Whatever the library raises for a checkpoint that it cannot use, as one of ours."""
    try:
        yield
    except BenchError:
        raise
    except ImportError as error:
        raise CheckpointError(
            f"{name} needs another package: {_short(error)}", "install what transformers asks for"
        ) from error
    except Exception as error:  # many types: OSError offline, ValueError for a bad name, RuntimeError for shapes, …
        raise CheckpointError(
            f"cannot load {name}: {_short(error)}",
            "give a folder as hf:./folder; for an ID of the hub check the name, the revision and the network (HF_HUB_OFFLINE)",
        ) from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings, of the hub's retries either: a worker's output is read by a program."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    shown, level, hub_level = logging.is_progress_bar_enabled(), logging.get_verbosity(), hub.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.set_verbosity(hub_level)
        if shown:
            logging.enable_progress_bar()
