"""Which checkpoint does a request imply, and how does one come by it? Trained once, found again ever after."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from bdh_bench import registry
from bdh_bench.data.corpus import Corpus, open_corpus
from bdh_bench.errors import SpecError
from bdh_bench.loading import load_model
from bdh_bench.measure.clock import now_s
from bdh_bench.measure.host import native_bfloat16
from bdh_bench.runner.plan import training_rows
from bdh_bench.session import fingerprint
from bdh_bench.sources import source_digest
from bdh_bench.spec import ModelSpec, RunSpec, parse_model
from bdh_bench.training.checkpoints import Checkpoint
from bdh_bench.training.loop import train
from bdh_bench.training.recipe import Recipe, check_regime, checkpoint_key

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Progress = Callable[[str, float, dict[str, Any]], None]


def train_or_load(
    model: Any, model_spec: ModelSpec, spec: RunSpec, seed: int, corpus: Corpus, progress: Progress
) -> dict[str, Any]:
    """Give ``model`` the weights that this request implies; return the training report with the checkpoint's folder."""
    recipe, key = _identity(model, model_spec, spec, seed, corpus)
    return train(model, recipe, corpus.part("train"), corpus.part("validation"), Checkpoint(key), progress)


def fit(model: Any, spec: RunSpec, seed: int, corpus: Corpus) -> dict[str, Any]:
    """Let a model that learns without gradient read the bytes that the others are trained on; return what it read."""
    started, read = now_s(), hashlib.sha256()
    count = 0

    def rows() -> Iterator[NDArray[np.uint8]]:
        nonlocal count
        for row in training_rows(spec, corpus.part("train"), seed):
            count += len(row)
            read.update(row.tobytes())
            yield row

    model.fit(rows())
    return {
        "bytes": count,
        "context": spec.train_context,
        "regime": spec.regime,
        "seed": seed,
        "seconds": round(now_s() - started, 3),
        "read_sha256": read.hexdigest(),
        "sha256": fingerprint(model),
    }


def train_model(spec: RunSpec, progress: Progress) -> dict[str, Any]:
    """Train the one model of a request on its own, outside any run. Returns report, parameters and the weights' path."""
    import torch

    if spec.threads:
        torch.set_num_threads(spec.threads)
    check_regime(spec.regime)
    model_spec = parse_model(spec.models[0])
    registry.check(model_spec)
    corpus = open_corpus(spec.data, spec.split_documents)
    model = load_model(model_spec, device=spec.device, seed=spec.seeds[0], train_context=spec.train_context)
    if not getattr(model, "trainable", True):
        raise SpecError(f"{str(model_spec)!r} has nothing to learn", "choose a model that is trained")
    recipe, key = _identity(model, model_spec, spec, spec.seeds[0], corpus)
    checkpoint = Checkpoint(key)
    report = train(model, recipe, corpus.part("train"), corpus.part("validation"), checkpoint, progress)
    return {
        "model": str(model_spec),
        "parameters": model.parameter_count(),
        "weights": str(checkpoint.weights),
        **report,
    }


def _identity(model: Any, model_spec: ModelSpec, spec: RunSpec, seed: int, corpus: Corpus) -> tuple[Recipe, str]:
    entry = registry.find("models", model_spec.family)
    rate = spec.learning_rate or float(entry.defaults.get("learning_rate", 0.0))
    if not rate > 0:
        raise SpecError(f"{model_spec.family} has no default learning rate", "give --learning-rate")
    exact = native_bfloat16() if spec.device == "cpu" else True
    precision = "bfloat16" if exact else "float32"
    recipe = Recipe(spec.train_bytes, spec.train_context, rate, seed, precision=precision, regime=spec.regime)
    code = source_digest(entry.module, "bdh_bench.training.loop")
    return recipe, checkpoint_key(recipe, str(model_spec), repr(model.config), corpus.manifest()["digest"], code)
