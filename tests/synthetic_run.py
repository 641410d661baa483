"""A small stored run, written through the store's own writer: what the tests of the reading half read.

bdh keeps a constant state, gpt2 stops at 256 bytes of context, mamba goes all the way, toy:uniform is exactly 8 bits per
byte, and one cell crashed. ``yardstick`` is a model without learning, where a test asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bdh_bench.results.store import EventWriter, Run, create_run, measurement_body, open_run
from bdh_bench.types import Measurement

CONTEXTS = (128, 256, 512, 1024, 2048)
TARGETS = "9f2c41d0"
MODELS = ("bdh@1m", "gpt2@1m", "mamba@1m", "toy:uniform")
STOPPED = {"gpt2": 256}
WEIGHT = 1024.0
T = 256
KINDS = {
    "bdh": "recurrent",
    "gpt2": "transformer",
    "llama": "transformer",
    "mamba": "recurrent",
    "toy": "control",
    "yardstick": "yardstick",
}

Losses = Callable[[str, int, int, int], float]


def usual_loss(family: str, document: int, context: int, seed: int) -> float:
    """Bits per byte of one document: documents differ more than models do."""
    if family == "toy":
        return 8.0
    base = {"bdh": 2.30, "gpt2": 2.36, "mamba": 2.33}.get(family, 2.4)
    own = 0.3 * math.sin(1.7 * document) + 0.01 * math.sin(5.1 * document + len(family) + seed)
    return base + own - 0.02 * math.log2(context / 128)


def cell(model: str, task: str, seed: int, metric: str, family: str | None = None) -> dict[str, Any]:
    """A planned cell of the manifest."""
    name, _, size = model.partition("@")
    key = f"{abs(hash_of(model + task + str(seed))):016x}"
    family = family or name.split(":")[0]
    return {
        "key": key, "model": model, "family": family, "kind": KINDS.get(family, ""), "size": size, "task": task, "seed": seed,
        "context": None, "rounds": 1, "metric": metric,
    }  # fmt: skip


def hash_of(text: str) -> int:
    """A stable number for a text (the built-in hash differs between processes)."""
    value = 1469598103934665603
    for byte in text.encode("utf-8", "surrogatepass"):
        value = (value ^ byte) * 1099511628211 % 2**64
    return value


def facts(family: str, seed: int) -> dict[str, Any]:
    """The worker's notes on a cell."""
    curve = [[step * 10_000, 8 * math.exp(-step / 4) + 2.4, step * 1.5] for step in range(12)]
    training = {
        "bytes": 120_000, "context": T, "learning_rate": 0.001, "regime": "crop",
        "flops": 7.2e11, "steps": 117, "seconds": 18.0, "seed": seed,
        "final_bits_per_byte": 2.5, "validation_bits_per_byte": 2.6, "curve": curve,
    }  # fmt: skip
    plain = {
        "parameters": {"bdh": 1_000_000, "gpt2": 1_020_000, "mamba": 980_000, "toy": 0}.get(family, 1_000_000),
        "non_embedding_parameters": 900_000,
        "unrolled_parameters": 1_500_000,
        "state_bytes": {str(k * T): 4 * 2**18 if k * T <= STOPPED.get(family, 10**9) else None for k in (1, 4, 16)},
        "flops_per_token": 2e6,
        "vocab_size": 256,
        "start_symbol": 10,
        "config": {"n_layer": 4, "n_embd": 128, "dropout": 0.0},
        "weights": "random" if family in ("toy", "yardstick") else "trained",
        "kernels": "torch",
        "mode": "auto",
        "dtype": "float32",
        "threads": 2,
        "max_positions": 384 if family == "gpt2" else None,
        "checkpoint": "ab" * 8,
        "seconds": 21.5,
    }
    return plain if family in ("toy", "yardstick") else {**plain, "training": training}


def quality(family: str, seed: int, documents: int, losses: Losses) -> Iterator[Measurement]:
    """The same-target sweep of one model."""
    for context in CONTEXTS:
        name = f"bpb@c={context},S=128"
        if context > STOPPED.get(family, 10**9):
            reason = "position limit 384: context + 128 targets do not fit"
            yield Measurement(
                "bits_per_byte", None, context, axes={"target_hash": TARGETS}, metric_id=name,
                status="unsupported", reason=reason,
            )  # fmt: skip
            continue
        for i in range(documents):
            yield Measurement(
                "bits_per_byte", losses(family, i, context, seed), context, axes={"target_hash": TARGETS},
                sample=f"doc{i}.txt", weight=WEIGHT, metric_id=name,
            )  # fmt: skip


def memory(family: str) -> Iterator[Measurement]:
    """State and peaks by context."""
    for context in CONTEXTS:
        if context > STOPPED.get(family, 10**9):
            yield Measurement("state_bytes", None, context, status="unsupported", reason="position limit 384")
            continue
        state = {"bdh": 4 * 2**18, "gpt2": 6144 * context, "mamba": 90_112, "toy": 0}.get(family, 1000)
        yield Measurement("state_bytes", state, context)
        yield Measurement("capacity_bytes", state, context)
        yield Measurement("weights_bytes", 4_000_000, context)
        yield Measurement("peak_footprint_bytes", 300_000_000 + state * 3 + context * 100, context)


def latency(family: str) -> Iterator[Measurement]:
    """Times by context, three repeats each."""
    for context in CONTEXTS:
        if context > STOPPED.get(family, 10**9):
            yield Measurement("tpot_s", None, context, status="unsupported", reason="position limit 384")
            continue
        for repeat in range(3):
            noise = 1 + 0.01 * repeat
            step = {"bdh": 0.004, "gpt2": 0.003 + context * 1e-6, "mamba": 0.0025}.get(family, 0.0001)
            yield Measurement("tpot_s", step * noise, context, repeat=repeat, axes={"mode": "auto"})
            yield Measurement("prefill_s", step * context / 40 * noise, context, repeat=repeat, axes={"mode": "auto"})


TASKS = {"long_ppl": "bits_per_byte", "memory": "state_bytes", "latency": "tpot_s"}


def write_run(
    root: Path,
    *,
    models: Sequence[str] = MODELS,
    seeds: int = 1,
    documents: int = 10,
    losses: Losses = usual_loss,
    crash: str | None = "latency/toy:uniform",
    tasks: Sequence[str] = tuple(TASKS),
    rename: Callable[[str], str] = str,
    manifest: dict[str, Any] | None = None,
) -> Run:
    """Write a run below ``root`` and read it back. ``crash`` names cells as task/model, or "all"."""
    folder = root / "synthetic"
    planned = [cell(model, task, seed, TASKS[task]) for seed in range(seeds) for model in models for task in tasks]
    named = [{**one, "model": rename(one["model"]), "family": rename(one["family"])} for one in planned]
    create_run(folder, {**usual_manifest(models, seeds, documents), "cells": named, **(manifest or {})})
    writer = EventWriter(folder, "w0")
    for one in planned:
        _write_cell(writer, one, documents, losses, crash, rename)
    writer.close()
    return open_run(folder)


def _write_cell(
    writer: EventWriter,
    one: dict[str, Any],
    documents: int,
    losses: Losses,
    crash: str | None,
    rename: Callable[[str], str],
) -> None:
    family, key = one["family"], one["key"]
    writer.write("started", cell=key, round=1, attempt=1)
    if crash in ("all", f"{one['task']}/{one['model']}"):
        log = rename("Traceback (most recent call last):\n  …\nRuntimeError: boom\x1b[31m <b>red</b>")
        reason = rename("worker ended by signal 11")
        writer.write("failed", cell=key, round=1, attempt=1, status="crash", reason=reason, facts={}, log=log)
        return
    made = {
        "long_ppl": lambda: quality(family, one["seed"], documents, losses),
        "memory": lambda: memory(family),
        "latency": lambda: latency(family),
    }[one["task"]]()
    rows = [measurement_body(measurement) for measurement in made]
    known = facts(family, one["seed"])
    writer.write("result", cell=key, round=1, attempt=1, status="ok", facts=known, measurements=rows)


def usual_manifest(models: Sequence[str], seeds: int, documents: int) -> dict[str, Any]:
    """Everything of run.json but the cells."""
    names = [{"name": f"doc{i}.txt", "bytes": 40_000, "sha256": f"{i:064x}", "split": "test"} for i in range(documents)]
    reference = {"n_bytes": 10_240, "target_hash": TARGETS}
    return {
        "run": "synthetic",
        "created": "2026-01-02T03:04:05+00:00",
        "command": "bdh-bench run --models bdh,gpt2,mamba,toy:uniform --task long_ppl,memory,latency --smoke",
        "spec": {"models": list(models), "train_bytes": 120_000, "train_context": T, "seeds": seeds, "smoke": True,
                 "regime": "crop", "equivalence_margin": 0.02, "match": "params"},
        "spec_digest": "0123abcd",
        "labels": ["smoke"],
        "environment": {
            "python": "3.11.7", "platform": "Linux", "cpu": "a processor", "cores": 2, "threads": 2,
            "memory_bytes": 8 * 2**30, "versions": {"torch": "2.9", "numpy": "2.4"}, "git": "abc1234",
        },
        "corpus": {"name": "stdlib", "digest": "d1ce" * 16, "documents": names,
                   "python": "3.11.7", "notes": "text of the standard library"},
        "references": [
            {"name": "order-0 byte model", "bits_per_byte": 4.7, "meaning": "byte frequencies", **reference},
            {"name": "order-2 byte model", "bits_per_byte": 2.9, "meaning": "two bytes before", **reference},
            {"name": "zlib", "bits_per_byte": 2.6, "meaning": "compressor", **reference},
        ],
    }  # fmt: skip
