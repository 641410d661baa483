"""Where trained weights are kept, and how are they found again?

    <cache>/checkpoints/<key>/weights.safetensors   final weights
    <cache>/checkpoints/<key>/halfway.safetensors    weights after half of the byte budget, on the way of the whole training
    <cache>/checkpoints/<key>/training.json          recipe, curve, sha256 of the weights; written last: it says 'complete'
    <cache>/checkpoints/<key>/partial.safetensors   weights, optimiser and step of a training that was stopped

The key covers everything that determines the weights, so nothing here is ever out of date.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bdh_bench.errors import CheckpointError, StoreError
from bdh_bench.folders import cache_folder


class Checkpoint:
    """The folder of one key."""

    def __init__(self, key: str) -> None:
        self.folder = cache_folder() / "checkpoints" / key[:32]

    @property
    def weights(self) -> Path:
        return self.folder / "weights.safetensors"

    @property
    def halfway(self) -> Path:
        return self.folder / "halfway.safetensors"

    def prepare(self) -> None:
        """Create the folder. Raises StoreError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot create {self.folder}: {error.strerror}", "set BDH_BENCH_CACHE to a writable folder"
            ) from error

    def finished(self) -> dict[str, Any] | None:
        """The training report of a complete checkpoint, else None. Raises CheckpointError where the weights are damaged."""
        try:
            report: dict[str, Any] = json.loads((self.folder / "training.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise self._damaged(f"training.json: {error}") from error
        if not self.weights.is_file() or sha256_of(self.weights) != report.get("sha256"):
            raise self._damaged("the weights do not match their sha256")
        return report

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"the cached checkpoint {self.folder} is damaged ({what})", "delete that folder to train again"
        )

    def load_weights(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = load_file(str(self.weights))
        return tensors

    def keep_halfway(self, tensors: dict[str, Tensor]) -> None:
        """Store the weights of half the budget."""
        self._write_tensors(self.halfway, tensors, {})

    def load_halfway(self, sha256: str) -> dict[str, Tensor]:
        """Those weights. Raises CheckpointError where they are not the ones with this sha256."""
        if not self.halfway.is_file() or sha256_of(self.halfway) != sha256:
            raise self._damaged("the weights of half the training do not match their sha256")
        tensors: dict[str, Tensor] = load_file(str(self.halfway))
        return tensors

    def finish(self, tensors: dict[str, Tensor], report: dict[str, Any]) -> dict[str, Any]:
        """Store final weights and report; the partial state is removed."""
        self._write_tensors(self.weights, tensors, {})
        report = {**report, "sha256": sha256_of(self.weights)}
        partial = self.folder / f"training.json.{os.getpid()}"
        partial.write_text(json.dumps(report, sort_keys=True, indent=1), encoding="utf-8")
        partial.replace(self.folder / "training.json")
        (self.folder / "partial.safetensors").unlink(missing_ok=True)
        return report

    def save_partial(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Keep a training that may be stopped at any moment."""
        self._write_tensors(self.folder / "partial.safetensors", tensors, {"facts": json.dumps(facts)})

    def load_partial(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What ``save_partial`` kept; None where there is nothing usable (training then starts again)."""
        try:
            with safe_open(str(self.folder / "partial.safetensors"), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, json.loads((file.metadata() or {})["facts"])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def _write_tensors(self, path: Path, tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            save_file(
                {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, str(partial), metadata=meta
            )
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise StoreError(f"cannot write {path}: {error}", "check the space on the disk") from error


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments by parameter index, flat."""
    return {
        f"optimiser.{index}.{name}": torch.as_tensor(value)
        for index, moments in optimiser.state_dict()["state"].items()
        for name, value in moments.items()
    }


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the moments of ``optimiser_tensors`` back."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, index, moment = name.split(".", 2)
            state.setdefault(int(index), {})[moment] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
