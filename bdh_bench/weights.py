"""What lies in a weights file, and what does the JSON beside it say? Both are checked before they are believed.

    PATH.safetensors | PATH.pt | a folder that holds one of them
    its config, where there is one: PATH.json, PATH.safetensors.json, or config.json in the same folder

A ``.pt`` file is read with weights_only. Nothing here ever runs what a file holds: other pickles and configs that ask for code
are refused. ``inspect`` needs no torch, so that a request is checked before anything heavy is loaded.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh_bench.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

_READABLE = (".safetensors", ".pt", ".pth")
_PICKLES = (".bin", ".pkl", ".pickle", ".ckpt")
_CONVERT = (
    "only if you trust its origin: load it in Python yourself and keep its state_dict with safetensors.torch.save_file"
)
_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class WeightsFile:
    """The file of the tensors, and the content of the config beside it (None where there is none)."""

    path: Path
    config_path: Path | None
    config: Mapping[str, Any] | None

    def digest(self) -> str:
        """sha256 over the bytes of both, whatever they are called."""
        stamps = [(p.stat().st_mtime_ns, p.stat().st_size) if p else None for p in (self.path, self.config_path)]
        return _digest(self.path, self.config_path, tuple(stamps))


def named_digest(name: str) -> str:
    """sha256 over the files of a published model's folder; of an ID, which names a revision, the ID alone."""
    folder = Path(name).expanduser()
    files = sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    digest = hashlib.sha256(name.encode() if not files else b"")
    for path in files:
        stamp = path.stat()
        digest.update(f"{path.name} {_digest(path, None, (stamp.st_mtime_ns, stamp.st_size))}\n".encode())
    return digest.hexdigest()


@cache
def _digest(path: Path, config_path: Path | None, stamps: object) -> str:
    """Read once per process and version of the files: every cell of a run asks."""
    digest = hashlib.sha256(config_path.read_bytes() if config_path else b"")
    with path.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def inspect(path: str | Path) -> WeightsFile:
    """The file that ``path`` names, whole as a container, and its config. Raises CheckpointError."""
    file = _tensors_file(Path(path).expanduser())
    _check_container(file)
    config_path = _config_beside(file)
    return WeightsFile(file, config_path, _read_config(config_path) if config_path else None)


def _tensors_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"no weights at {path} · expected a .safetensors or .pt file", "check weights=PATH")
        return path
    found = sorted(p for p in path.iterdir() if p.suffix in _READABLE)
    if not found:  # the refusal of a pickle says more than "nothing here"
        found = sorted(p for p in path.iterdir() if p.suffix in _PICKLES)
    if len(found) != 1:
        got = f"{len(found)} weights files ({_some(p.name for p in found)})" if found else "no weights file"
        raise CheckpointError(f"{path} holds {got} · expected one .safetensors or .pt", "name the file: weights=FILE")
    return found[0]


def _check_container(path: Path) -> None:
    """Raise CheckpointError for a file that is cut short, or that only unpickling could read."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
        if path.suffix in _PICKLES or (path.suffix in _READABLE[1:] and _is_bare_pickle(path, start)):
            raise CheckpointError(
                f"{path} is a pickle, and reading one runs the code in it · expected a .safetensors or .pt file",
                _CONVERT,
            )
        if path.suffix not in _READABLE:
            raise CheckpointError(f"got weights {path} · expected a .safetensors or .pt file", _CONVERT)
        whole = _whole_safetensors(path) if path.suffix == ".safetensors" else zipfile.is_zipfile(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", "check the file's permissions") from error
    if not whole:
        raise CheckpointError(
            f"{path} is damaged: it is cut short or no such container · expected a whole {path.suffix} file",
            "copy or train it again",
        )


def _is_bare_pickle(path: Path, start: bytes) -> bool:
    return start[:1] == b"\x80" and not zipfile.is_zipfile(path)


def _whole_safetensors(path: Path) -> bool:
    """Whether the header is one and its tensors end where the file does."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [int(t["data_offsets"][1]) for name, t in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, KeyError, IndexError, TypeError):
            return False
    return size == 8 + length + max(ends, default=0)


def _config_beside(path: Path) -> Path | None:
    beside = (path.with_suffix(".json"), path.with_name(path.name + ".json"), path.with_name("config.json"))
    return next((p for p in beside if p.is_file()), None)


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no JSON: {error} · expected a config", "correct or remove it") from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path} holds a {type(config).__name__} · expected a JSON object", "correct or remove it"
        )
    if "auto_map" in config:
        raise CheckpointError(
            f"{path} asks for code from elsewhere (auto_map) · expected a config of numbers and names; nothing was run",
            "write the model as a file of its own ('bdh-bench new model NAME'), or remove auto_map if a family here fits",
        )
    return config


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state_dict from safetensors, or from a ``.pt`` file read with weights_only. Raises CheckpointError."""
    return read_tensors(inspect(path).path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``inspect`` found. Raises CheckpointError."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(str(path))
            return tensors
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}", "copy or train it again") from error
    except Exception as error:  # torch.load raises many types for a damaged or an unsafe pickle
        raise CheckpointError(
            f"{path} holds more than tensors, or is damaged ({type(error).__name__} with weights_only; nothing was run) · "
            "expected a bare state_dict",
            _CONVERT,
        ) from error
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(f"{path} holds no state_dict · expected a dictionary of tensors", _CONVERT)
    return {str(name).removeprefix("_orig_mod."): tensor for name, tensor in state.items()}


def fill(model: nn.Module, tensors: dict[str, Tensor], origin: str) -> None:
    """Load the tensors; names, shapes, kinds and finiteness must be right. Raises CheckpointError."""
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{origin} has NaN or infinite values in {_some(bad)} · expected finite weights", "use another checkpoint"
        )
    own = model.state_dict()
    wrong = [
        f"{name} is {_shape(tensor)}, expected {_shape(own[name])}"
        for name, tensor in tensors.items()
        if name in own
        and (tensor.shape != own[name].shape or tensor.is_floating_point() != own[name].is_floating_point())
    ]
    if wrong:
        raise CheckpointError(f"{origin} does not fit this model: {_some(wrong)}", "check options, sizes and family")
    found = model.load_state_dict(tensors, strict=False)
    both = (("missing", found.missing_keys), ("unexpected", found.unexpected_keys))
    differences = [f"{what} {_some(names)}" for what, names in both if names]
    if differences:
        raise CheckpointError(
            f"{origin} does not fit this model: {'; '.join(differences)} · expected tensors like {_some(own)}",
            "check options, sizes and family",
        )


def _shape(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" of {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"


def _some(names: Iterable[str]) -> str:
    """The first few, and how many more."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
