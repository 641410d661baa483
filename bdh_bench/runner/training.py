"""Which checkpoint does a request imply, and how does one come by it? Trained once, found again ever after."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bdh_bench import registry
from bdh_bench.data.corpus import Corpus, open_corpus
from bdh_bench.errors import SpecError
from bdh_bench.loading import load_model
from bdh_bench.measure.clock import now_s
from bdh_bench.measure.host import native_bfloat16
from bdh_bench.runner.matching import matched_bytes, matched_model
from bdh_bench.runner.plan import training_rows
from bdh_bench.runner.recipes import check_training, rate_of, regime_of
from bdh_bench.session import fingerprint
from bdh_bench.sources import source_digest
from bdh_bench.spec import ModelSpec, RunSpec, parse_model
from bdh_bench.training.checkpoints import Checkpoint
from bdh_bench.training.loop import train
from bdh_bench.training.pilot import bytes_in
from bdh_bench.training.practice import practise
from bdh_bench.training.recipe import Recipe, checkpoint_key, continued
from bdh_bench.types import Exercises

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Progress = Callable[[str, float, dict[str, Any]], None]


def train_or_load(
    model: Any, model_spec: ModelSpec, spec: RunSpec, seed: int, corpus: Corpus, progress: Progress
) -> dict[str, Any]:
    """Give ``model`` the weights that this request implies; return the training report, which names their checkpoint's folder."""
    regime = regime_of(model_spec, spec)
    first = "crop" if regime == "crop+carried" else regime
    recipe = _recipe(model_spec, spec, seed, matched_bytes(model, spec), first)
    job = _Job(model, model_spec, corpus, progress)
    if spec.match == "wallclock":
        timed = Checkpoint(job.key(recipe, f"{spec.train_seconds:g} s"))
        recipe = replace(recipe, bytes=bytes_in(spec.train_seconds, model, recipe, corpus.part("train"), timed))
    report = job.train(recipe)
    if regime == "crop+carried":
        report = _joined(report, job.train(continued(recipe, report["sha256"])))
    return report


def practise_or_load(
    model: Any,
    model_spec: ModelSpec,
    spec: RunSpec,
    seed: int,
    corpus: Corpus | None,
    exercises: Exercises,
    progress: Progress,
) -> dict[str, Any]:
    """Let ``model`` practise for a task, going on from the weights that it has; return the report."""
    recipe = _recipe(model_spec, spec, seed, exercises.cap, "crop")
    recipe = replace(recipe, start=fingerprint(model), learning_rate=rate_of(model_spec, spec, exercises.learning_rate))
    documents = corpus.part("train") if corpus is not None else ()
    code = source_digest(
        registry.find("models", model_spec.family).module, "bdh_bench.training.practice", type(exercises).__module__
    )
    key = checkpoint_key(recipe, str(model_spec.architecture()), repr(model.config), exercises.identity, code)
    return practise(model, recipe, exercises, documents, Checkpoint(key), progress)


def _recipe(model_spec: ModelSpec, spec: RunSpec, seed: int, budget: int, regime: str) -> Recipe:
    exact = native_bfloat16() if spec.device == "cpu" else True
    precision = "bfloat16" if exact else "float32"
    return Recipe(budget, spec.train_context, rate_of(model_spec, spec), seed, precision=precision, regime=regime)


class _Job:
    """One model on one corpus, whatever the recipe."""

    def __init__(self, model: Any, model_spec: ModelSpec, corpus: Corpus, progress: Progress) -> None:
        self.model, self.name, self.corpus, self.progress = model, str(model_spec.architecture()), corpus, progress
        self.code = source_digest(registry.find("models", model_spec.family).module, "bdh_bench.training.loop")

    def key(self, recipe: Recipe, *more: str) -> str:
        config = " ".join((repr(self.model.config), *more))
        return checkpoint_key(recipe, self.name, config, self.corpus.manifest()["digest"], self.code)

    def train(self, recipe: Recipe) -> dict[str, Any]:
        checkpoint = Checkpoint(self.key(recipe))
        parts = self.corpus.part("train"), self.corpus.part("validation")
        report = train(self.model, recipe, *parts, checkpoint, self.progress)
        return {**report, "checkpoint": checkpoint.folder.name}  # no path: rows may leave this machine


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The report of two stages as that of one training; both are kept in it."""
    bytes_, seconds = first["bytes"], first["seconds"]
    curve = [*first["curve"], *([bytes_ + read, bits, seconds + s] for read, bits, s in second["curve"])]
    return {
        **second,
        "regime": "crop+carried",
        "halfway": None,  # half of the first stage would be another regime
        "bytes": bytes_ + second["bytes"],
        "steps": first["steps"] + second["steps"],
        "seconds": round(seconds + second["seconds"], 2),
        "learning_rate": first["learning_rate"],
        "reused": first["reused"] and second["reused"],
        "curve": curve,
        "stages": [first, second],
    }


def halfway_of(model: Any, report: dict[str, Any]) -> Any:
    """A copy of ``model`` with the weights that it had at half of its training; None where none were kept."""
    kept = report.get("halfway")
    if not kept:
        return None
    earlier = copy.deepcopy(model)
    earlier.load_state_dict(Checkpoint(report["checkpoint"]).load_halfway(kept["sha256"]))
    return earlier.eval()


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
    model_spec = parse_model(spec.models[0])
    registry.check(model_spec)
    check_training(spec, (model_spec,))
    corpus = open_corpus(spec.data, spec.split_documents)
    built = matched_model(spec, model_spec)
    model = load_model(built, device=spec.device, seed=spec.seeds[0], train_context=spec.train_context)
    if not getattr(model, "trainable", True):
        raise SpecError(f"{str(model_spec)!r} has nothing to learn", "choose a model that is trained")
    report = train_or_load(model, model_spec, spec, spec.seeds[0], corpus, progress)
    weights = str(Checkpoint(report.pop("checkpoint")).weights)
    return {"model": str(model_spec), "parameters": model.parameter_count(), "weights": weights, **report}
