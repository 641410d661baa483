"""Which cells does a request stand for, and what text do they read? Decided before anything heavy is loaded.

A cell is model × task × seed, and × context where the task says so. Its key covers everything that could change its numbers: the
request, the text, and the source of the model, the task and whatever they import. How often it is measured is not in it: a task
declares ``rounds`` in its DEFAULTS, and one that repeats in rounds follows ``--rounds``.
"""

from __future__ import annotations

import hashlib
import random
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh_bench import registry
from bdh_bench.data.corpus import Corpus, Document, open_corpus
from bdh_bench.data.targets import choose_longest, choose_targets, needed_bytes, stream_bytes
from bdh_bench.errors import CheckpointError, CorpusError, SpecError, UnknownNameError
from bdh_bench.results.store import canonical
from bdh_bench.runner.recipes import check_training
from bdh_bench.runner.texts import Texts
from bdh_bench.sources import source_digest
from bdh_bench.spec import GATES, STATE_PROTOCOLS, ModelSpec, RunSpec, parse_model
from bdh_bench.training.recipe import Recipe
from bdh_bench.types import Cell
from bdh_bench.weights import inspect, named_digest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FULL_DOCUMENTS = 20  # fewer test documents give a smoke result


@dataclass(frozen=True)
class Plan:
    """Everything a run needs to know before it starts. ``contexts`` by task name; ``references`` for quality figures."""

    spec: RunSpec
    cells: tuple[Cell, ...]
    contexts: dict[str, tuple[int, ...]]
    corpus: dict[str, Any] | None
    references: tuple[dict[str, Any], ...]
    labels: tuple[str, ...]
    texts: Texts | None = None

    @property
    def rounds(self) -> tuple[tuple[Cell, int], ...]:
        """Every (cell, round) in the order in which they are measured.

        What is measured once comes first, as planned. Then round 1 of all cells that repeat, in an order drawn for this round, then
        round 2, …: what changes on the machine while it measures meets every model alike.
        """
        once = [(cell, 1) for cell in self.cells if cell.rounds == 1]
        repeated = [cell for cell in self.cells if cell.rounds > 1]
        drawn: list[tuple[Cell, int]] = []
        for number in range(1, max((cell.rounds for cell in repeated), default=0) + 1):
            own = [cell for cell in repeated if number <= cell.rounds]
            random.Random(f"round {number} of seed {self.spec.seeds[0]}").shuffle(own)
            drawn += [(cell, number) for cell in own]
        return (*once, *drawn)

    def manifest(self, run_id: str, created: str, environment: dict[str, Any]) -> dict[str, Any]:
        """The content of run.json."""
        return {
            "run": run_id,
            "created": created,
            "command": command_line(self.spec),
            "spec": self.spec.as_json(),
            "spec_digest": self.spec.digest(),
            "labels": list(self.labels),
            "contexts": {name: list(values) for name, values in self.contexts.items()},
            "environment": environment,
            "corpus": self.corpus,
            "references": list(self.references),
            "cells": [cell_json(cell) for cell in self.cells],
        }


def cell_json(cell: Cell) -> dict[str, Any]:
    """A planned cell as it stands in run.json."""
    model, task = parse_model(cell.model), parse_model(cell.task)
    entry = registry.find("models", model.family)
    kind = str(entry.defaults.get("kind", ""))  # "yardstick": read beside the models, never ranked among them
    unsized = entry.defaults.get("words") or entry.defaults.get("needs_name") or kind == "yardstick"
    return {
        "key": cell.key,
        "model": cell.model,
        "family": model.family,
        "kind": kind,
        "size": "" if unsized else (model.size or "quick"),
        "task": cell.task,
        "seed": cell.seed,
        "context": cell.context,
        "rounds": cell.rounds,
        "metric": registry.find("tasks", task.family).defaults.get("metric", ""),
    }


def command_line(spec: RunSpec) -> str:
    """A command that asks for the same run."""
    parts = ["bdh-bench", "run", "--models", ",".join(spec.models), "--task", ",".join(spec.tasks)]
    plain = RunSpec((), ())
    for flag, name in (("--data", "data"), ("--train-bytes", "train_bytes"), ("--train-context", "train_context")):
        if getattr(spec, name) != getattr(plain, name):
            parts += [flag, str(getattr(spec, name))]
    if spec.contexts:
        parts += ["--contexts", ",".join(map(str, spec.contexts))]
    if spec.seeds == tuple(range(len(spec.seeds))):
        parts += ["--seeds", str(len(spec.seeds))] if len(spec.seeds) > 1 else []
    else:
        parts += ["--seed", str(spec.seeds[0])]
    for flag, name in (
        ("--device", "device"),
        ("--threads", "threads"),
        ("--documents", "documents"),
        ("--state", "state_protocol"),
        ("--split-documents", "split_documents"),
        ("--rounds", "rounds"),
    ):
        if getattr(spec, name) != getattr(plain, name):
            parts += [flag, str(getattr(spec, name))]
    for flag, name in (("--regime", "regime"), ("--match", "match"), ("--gate", "gate")):
        if getattr(spec, name) != getattr(plain, name):
            parts += [flag, getattr(spec, name)]
    if spec.train_seconds:
        parts += ["--train-seconds", f"{spec.train_seconds:g}"]
    if spec.equivalence_margin != plain.equivalence_margin:
        parts += ["--equivalence-margin", f"{spec.equivalence_margin:g}"]
    if spec.learning_rate:
        parts += ["--learning-rate", f"{spec.learning_rate:g}"]
    return shlex.join(parts + (["--smoke"] if spec.smoke else []))


def make_plan(spec: RunSpec) -> Plan:
    """Check the whole request and lay out its cells. Raises SpecError (or a kind of it) for whatever cannot be done."""
    models = [parse_model(name) for name in spec.models]
    tasks = [parse_model(name) for name in spec.tasks]
    for model in models:
        entry = registry.check(model)
        _check_plugin(entry)
        _check_name(model, entry)
        _check_weights(model, spec.train_context)
    for task in tasks:
        _check_plugin(registry.find("tasks", task.family))
        registry.task_values(task)
    _check_device(spec.device)
    if spec.state_protocol not in STATE_PROTOCOLS:
        raise UnknownNameError("state protocol", spec.state_protocol, STATE_PROTOCOLS)
    if spec.gate not in GATES:
        raise UnknownNameError("gate", spec.gate, GATES)
    check_training(spec, models)
    if spec.rounds and not any(_repeats(t) for t in tasks):
        names = ", ".join(map(str, tasks))
        raise SpecError(
            f"got --rounds {spec.rounds} for {names} · expected a task that repeats in rounds", "leave it out"
        )
    outside = {str(t): _outside(t) for t in tasks}
    reading = [t for t in tasks if _facts(t).get("reads")]
    corpus = (
        open_corpus(spec.data, spec.split_documents) if reading or any(_facts(t).get("trains") for t in tasks) else None
    )
    contexts = {str(t): _contexts(t, spec, corpus) for t in tasks}
    labels = list(corpus.labels) if corpus else []
    references: tuple[dict[str, Any], ...] = ()
    manifest = corpus.manifest() if corpus else None
    if corpus is not None and reading:
        references, few = _references(spec, corpus, contexts[str(reading[0])], _config(reading[0]))
        labels += ["smoke"] if (spec.smoke or few) and "smoke" not in labels else []
    elif spec.smoke and corpus is not None:
        labels += ["smoke"] if "smoke" not in labels else []
    cells = tuple(_cells(spec, models, tasks, contexts, manifest["digest"] if manifest else "", outside))
    texts = _texts(spec, corpus, [(contexts[str(t)], _config(t)) for t in reading]) if corpus is not None else None
    return Plan(spec, cells, contexts, manifest, references, tuple(labels), texts)


def _facts(task: ModelSpec) -> dict[str, Any]:
    return dict(registry.find("tasks", task.family).defaults)


def _repeats(task: ModelSpec) -> bool:
    """Whether the task is measured in rounds."""
    return _declared_rounds(task) > 1


def _declared_rounds(task: ModelSpec) -> int:
    declared = _facts(task).get("rounds", 1)
    if type(declared) is not int or declared < 1:
        raise SpecError(
            f"got rounds {declared!r} in the DEFAULTS of task {task.family} · expected a whole number from 1"
        )
    return declared


def _outside(task: ModelSpec) -> dict[str, Any]:
    """What a task with ``checked`` in its DEFAULTS needs from outside this package, found before anything runs.

    Its ``check(config)`` raises SpecError (or a kind of it) for what is missing, and gives what must be part of the cell's key.
    """
    if not _facts(task).get("checked"):
        return {}
    module = registry.load("tasks", task.family)
    return dict(module.check(module.Config(**registry.task_values(task))))


def _check_plugin(entry: registry.Entry) -> None:
    """Import what another package brings once before the run: that it cannot be imported is a usage error too."""
    if entry.origin != registry.BUILT_IN:
        registry.load(entry.kind, entry.name)


def _check_name(model: ModelSpec, entry: registry.Entry) -> None:
    """A published model needs its name, and a name that looks like a folder must be one."""
    if not entry.defaults.get("needs_name"):
        return
    if not model.name:
        raise SpecError(
            f"got {model.family} without a checkpoint · expected {model.family}:ID[@REVISION] or {model.family}:./folder"
        )
    folder = Path(model.name).expanduser()
    if model.name.startswith((".", "/", "~")) and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"no config.json in {model.name} · expected a folder that save_pretrained wrote", "check the path"
        )


def _check_weights(model: ModelSpec, train_context: int) -> None:
    """Load what ``weights=`` names once before the run: what cannot be used is a usage error, not a row of failed cells."""
    if path := model.option("weights"):
        inspect(path)
        from bdh_bench.loading import load_model

        load_model(model, train_context=train_context)


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise UnknownNameError("device", device, ("cpu", "cuda"))
    if device == "cuda" and not Path("/dev/nvidia0").exists():
        raise SpecError("got --device cuda · this machine shows no NVIDIA device", "use --device cpu")


def _config(task: ModelSpec) -> dict[str, Any]:
    return {**registry.find("tasks", task.family).options, **registry.task_values(task)}


def _contexts(task: ModelSpec, spec: RunSpec, corpus: Corpus | None) -> tuple[int, ...]:
    """The contexts of one task: those asked for, else the task's own; a reading task drops those that no text can fill."""
    config = _config(task)
    wanted = spec.contexts or _default_contexts(task, config, spec.train_context)
    if corpus is None or not _facts(task).get("reads"):
        return wanted
    block = int(config.get("block", 0))
    test = corpus.part("test")
    if spec.contexts:  # asked for: none is dropped silently
        longest = max(d.size for d in test)
        if needed_bytes(max(wanted), block) > longest:
            raise CorpusError(
                f"a context of {max(wanted):,} needs a document of {needed_bytes(max(wanted), block):,} bytes · the longest test "
                f"document has {longest:,}",
                "use a shorter --contexts or longer text",
            )
        if block > min(wanted):
            raise SpecError(
                f"got a context of {min(wanted)} · expected at least the {block} bytes of a target block",
                "use a longer context or a shorter block, for example --task long_ppl:block=64",
            )
        return wanted
    return choose_longest(test, wanted, block, min(spec.documents, _FULL_DOCUMENTS))


def _default_contexts(task: ModelSpec, config: dict[str, Any], train_context: int) -> tuple[int, ...]:
    """The task's own multiples of the training context; a context shorter than a target block is left out."""
    factors = _facts(task).get("context_factors", (1,))
    contexts = sorted({int(factor * train_context) for factor in factors})
    return tuple(c for c in contexts if c >= int(config.get("block", 1))) or (int(config["block"]),)


def _references(
    spec: RunSpec, corpus: Corpus, contexts: Sequence[int], config: dict[str, Any]
) -> tuple[tuple[dict[str, Any], ...], bool]:
    """The lines of models without learning, and whether there are too few documents to rank anything."""
    from bdh_bench.data.reference import reference_lines

    targets = choose_targets(corpus.part("test"), max(contexts), config["block"], config["blocks"], spec.documents)
    train = _training_bytes(spec, corpus.part("train"))
    return tuple(reference_lines(train, targets)), len(targets.documents) < _FULL_DOCUMENTS


def _texts(spec: RunSpec, corpus: Corpus, asked: Sequence[tuple[tuple[int, ...], dict[str, Any]]]) -> Texts | None:
    """The documents that any task scores as a stream, and how much of them; None where no task does."""
    streams = [(own, config) for own, config in asked if "stream_bytes" in config]
    if not streams:
        return None
    chosen = {d.name: d for own, config in streams for d in test_documents(corpus, own, config, spec.documents)}
    lengths = [stream_bytes(config["stream_bytes"], spec.train_context) for _, config in streams]
    scored = tuple(chosen[name] for name in sorted(chosen))
    return Texts(scored, corpus.part("train"), max(lengths))


def _training_bytes(spec: RunSpec, documents: tuple[Document, ...]) -> NDArray[np.uint8]:
    """What a model without a position limit reads in training, in that order."""
    import numpy as np

    return np.concatenate(list(training_rows(spec, documents, spec.seeds[0])))


def training_rows(spec: RunSpec, documents: tuple[Document, ...], seed: int) -> Iterator[NDArray[np.uint8]]:
    """The budget of training bytes in rows of consecutive bytes, as a model without a position limit reads them."""
    from bdh_bench.data.pieces import CarriedText, TrainingText

    length = spec.train_context
    recipe = Recipe(spec.train_bytes, length, 0.0, seed)
    rows, steps = recipe.batch(length), recipe.steps(length)
    if spec.regime == "carried":
        for piece in islice(CarriedText(documents, rows, length).pieces(seed), steps):
            yield from piece.targets
    else:
        yield from islice(TrainingText(documents, length).pieces(seed), rows * steps)


def test_documents(corpus: Corpus, contexts: Sequence[int], config: dict[str, Any], most: int) -> tuple[Document, ...]:
    """The held-out documents that the evaluation opens."""
    return choose_targets(corpus.part("test"), max(contexts), config["block"], config["blocks"], most).documents


def _cells(
    spec: RunSpec,
    models: Sequence[ModelSpec],
    tasks: Sequence[ModelSpec],
    contexts: dict[str, tuple[int, ...]],
    data_digest: str,
    outside: dict[str, dict[str, Any]],
) -> Iterator[Cell]:
    for task in tasks:
        facts = _facts(task) | {"outside": outside[str(task)]}
        own = contexts[str(task)] if "context" in facts.get("cell_axes", ()) else (None,)
        for seed in spec.seeds:
            for model in models:
                for context in own:
                    yield _cell(spec, model, task, seed, context, contexts[str(task)], facts, data_digest)


def _cell(
    spec: RunSpec,
    model: ModelSpec,
    task: ModelSpec,
    seed: int,
    context: int | None,
    contexts: tuple[int, ...],
    facts: dict[str, Any],
    data_digest: str,
) -> Cell:
    inputs: dict[str, Any] = {
        "model": str(model),
        "task": str(task),
        "seed": seed,
        "context": context,
        "device": spec.device,
        "threads": spec.threads,
        "train_context": spec.train_context,
        "code": source_digest(
            registry.find("models", model.family).module,
            registry.find("tasks", task.family).module,
            "bdh_bench.runner.worker",
        ),
    }
    if path := model.option("weights"):
        inputs["weights"] = inspect(path).digest()
    if facts.get("reads"):
        inputs |= {"contexts": contexts, "data": data_digest, "documents": spec.documents, "state": spec.state_protocol}
    if registry.find("models", model.family).defaults.get("needs_name"):
        inputs["checkpoint"] = named_digest(model.name)
    if facts.get("trains") or facts.get("practises"):
        inputs |= {"data": data_digest}
        inputs |= {"train_bytes": spec.train_bytes, "learning_rate": spec.learning_rate, "regime": spec.regime}
    if spec.match not in ("params", "bytes"):  # what the model gets follows from the others
        inputs |= {"match": spec.match, "reference": spec.models, "train_seconds": spec.train_seconds}
    if spec.gate == "full":  # what it finds is a failure in place of a number
        inputs |= {"gate": spec.gate}
    if facts["outside"]:
        inputs |= {"outside": facts["outside"]}
    key = hashlib.sha256(canonical(inputs).encode()).hexdigest()
    rounds = (spec.rounds or (1 if spec.smoke else _declared_rounds(task))) if _repeats(task) else 1
    return Cell(key, str(model), str(task), seed, context, rounds)
