"""One round of a cell in a process of its own: build the model, train it if the task wants that, run the task, write what came out.

The request comes as one JSON line on stdin; progress goes out as JSON lines on stdout; the result goes into this worker's own shard
of the store, as one event. When the parent's end of stdin closes, the worker ends: no orphan goes on measuring.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bdh_bench import registry
from bdh_bench.data.corpus import Corpus, open_corpus
from bdh_bench.errors import BenchError, LawError, PositionLimitError, StoreError
from bdh_bench.measure.clock import now_s
from bdh_bench.measure.placement import settled
from bdh_bench.results.store import EventWriter, attempt_folder, measurement_body
from bdh_bench.runner.state_curve import knots
from bdh_bench.spec import ModelSpec, RunSpec, parse_model
from bdh_bench.types import MEASURED_STATUSES, NOT_STORED_EXIT, Arrays, Cell, Measurement, Scalar, TaskContext


def main() -> int:
    """Read the request, run the cell, store the result. Exit status 0 once a result is stored, whatever it says."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(request["run_folder"])
    cell, spec = Cell(**request["cell"]), RunSpec.from_mapping(request["spec"])
    who: dict[str, Any] = {"cell": cell.key, "round": int(request["round"]), "attempt": int(request["attempt"])}
    try:
        writer = EventWriter(folder, f"{cell.key[:16]}-{who['round']}-{who['attempt']}")
        writer.write("started", **who)
        files = attempt_folder(folder, cell.key, who["round"], who["attempt"])
        outcome = _outcome(cell, spec, tuple(request["contexts"]), files, settled(request.get("placement")))
        writer.write("result", **who, **outcome)
        writer.close()
    except StoreError:  # a full disk is no property of the cell
        traceback.print_exc()
        return NOT_STORED_EXIT
    return 0


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _say(phase: str, fraction: float, facts: Mapping[str, Scalar]) -> None:
    clean = {k: v for k, v in facts.items() if not isinstance(v, float) or math.isfinite(v)}
    print(json.dumps({"phase": phase, "fraction": fraction, **clean}), file=sys.__stdout__, flush=True)


def _outcome(
    cell: Cell, spec: RunSpec, contexts: tuple[int, ...], files: Path, host: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Status, reason, facts and measurements of the cell; every way it can end becomes a row with a reason."""
    import torch

    facts: dict[str, Any] = {"host": dict(host)} if host else {}
    measurements: list[Measurement] = []
    status, reason = "ok", ""
    started = now_s()
    try:
        for item in _results(cell, spec, contexts, facts):
            if isinstance(item, Arrays):
                _keep(item, files)
            else:
                measurements.append(_finite(item))
    except KeyboardInterrupt:
        status, reason, measurements = "interrupted", "stopped by the user", []
    except PositionLimitError as error:
        status, reason = "unsupported", str(error)
    except LawError as error:
        status, reason, measurements = "gate_failed", _reason(error), []
        _note(facts, error)
        for path in files.glob("*.npz"):  # what was scored before the gate failed is no result either
            path.unlink()
    except torch.OutOfMemoryError as error:
        status, reason = "oom_cuda", _first_line(error)
    except MemoryError as error:
        status, reason = "oom_host", f"allocator: {_first_line(error)}"
    except StoreError:
        raise
    except BenchError as error:
        status, reason = "error", str(error)
    except Exception as error:  # whatever a model or task raises is a row, and its traceback is in the log
        traceback.print_exc()
        out_of_memory = isinstance(error, RuntimeError) and "allocate memory" in str(error)
        status = "oom_host" if out_of_memory else "error"
        reason = ("allocator: " if out_of_memory else "") + f"{type(error).__name__}: {_first_line(error)}"
    if status == "ok":
        status, reason = _overall(measurements)
    facts["seconds"] = round(now_s() - started, 3)
    rows = [measurement_body(m) for m in measurements]
    return {"status": status, "reason": reason, "facts": facts, "measurements": rows}


def _reason(error: LawError) -> str:
    return f"gate {error.gate}: {error}" if error.gate else str(error)


def _note(facts: dict[str, Any], error: LawError) -> None:
    """Keep the row of a gate that failed in the task; those of ``gates.hold`` have theirs."""
    rows = facts.setdefault("gates", [])
    if rows and not rows[-1]["kept"]:
        return
    measured = error.error if error.error is not None and math.isfinite(error.error) else None
    name = error.gate or "law"
    rows.append({"gate": name, "kept": False, "error": measured, "bound": error.bound, "about": str(error)})


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:500]


def _finite(m: Measurement) -> Measurement:
    """A value that is no number is a failure with a reason, never a stored value."""
    if m.value is not None and not math.isfinite(m.value):
        return replace(m, value=None, status="nan", reason=f"the measured value was {m.value}")
    return m


def _overall(measurements: list[Measurement]) -> tuple[str, str]:
    if not measurements:
        return "error", "the task yielded no measurement"
    for wanted in ("nan", "gate_failed"):
        for m in measurements:
            if m.status == wanted:
                return wanted, m.reason
    measured = [m for m in measurements if m.status in MEASURED_STATUSES]
    for m in measured:  # a mark on one number is a mark on its cell
        if m.status != "ok":
            return m.status, m.reason
    if measured:
        return "ok", ""
    return measurements[0].status, measurements[0].reason


def _keep(item: Arrays, files: Path) -> None:
    import numpy as np

    partial = files / f".{item.name}.npz.partial"
    try:
        with partial.open("xb") as file:
            arrays: dict[str, Any] = dict(item.arrays)
            np.savez_compressed(file, **arrays)
        partial.replace(files / f"{item.name}.npz")
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StoreError(
            f"cannot write below {files}: {error.strerror or error}", "check the space on the disk"
        ) from error


def _results(
    cell: Cell, spec: RunSpec, contexts: tuple[int, ...], facts: dict[str, Any]
) -> Iterator[Measurement | Arrays]:
    """Load, train, measure; ``facts`` is filled on the way so that a failed cell keeps what was known."""
    import torch

    from bdh_bench.loading import load_model
    from bdh_bench.runner.apart import apart_for
    from bdh_bench.runner.gates import failure, hold, phase, splits
    from bdh_bench.runner.matching import matched_model, training_flops_per_byte
    from bdh_bench.runner.recipes import rate_source
    from bdh_bench.runner.training import fit, halfway_of, practise_or_load, train_or_load

    if spec.threads:
        torch.set_num_threads(spec.threads)
        with suppress(RuntimeError):  # too late in a process that has run something in parallel already
            torch.set_num_interop_threads(1)
    model_spec, task_spec = parse_model(cell.model), parse_model(cell.task)
    task = registry.load("tasks", task_spec.family)
    config = task.Config(**registry.task_values(task_spec))
    about = registry.find("tasks", task_spec.family).defaults
    _say("load", 0.0, {})
    built = matched_model(spec, model_spec)
    model = load_model(built, device=spec.device, seed=cell.seed, train_context=spec.train_context)
    facts |= _model_facts(model, model_spec, spec.train_context)
    facts["threads"] = torch.get_num_threads()
    corpus = open_corpus(spec.data, spec.split_documents) if about.get("reads") or about.get("trains") else None
    if (
        about.get("trains")
        and corpus is not None
        and getattr(model, "trainable", True)
        and not model_spec.option("weights")
    ):
        report = train_or_load(model, model_spec, spec, cell.seed, corpus, _say)
        facts["training"] = {**report, "flops": training_flops_per_byte(model, spec.train_context) * report["bytes"]}
        facts["learning_rate"] = rate_source(model_spec, spec)
        facts["weights"] = "trained"
        facts["checkpoint"] = facts["training"]["sha256"]
    elif about.get("trains") and corpus is not None and hasattr(model, "fit"):  # statistics, without gradient
        facts["training"] = fit(model, spec, cell.seed, corpus)
        facts["weights"] = "fitted"
        facts["checkpoint"] = facts["training"]["sha256"]
    if _practises(about, asdict(config)) and getattr(model, "trainable", True) and not model_spec.option("weights"):
        documents = corpus.part("train") if corpus is not None else ()
        drills = task.exercises(model, config, documents, spec.train_context)
        facts["practice"] = practise_or_load(model, model_spec, spec, cell.seed, corpus, drills, _say)
        facts["weights"] = "trained"
        facts["checkpoint"] = facts["practice"]["sha256"]
    rows: list[dict[str, Any]] = facts.setdefault("gates", [])
    documents = _documents(corpus if about.get("reads") else None, contexts, asdict(config), spec)
    if corpus is not None and documents:
        apart = splits(documents, (*corpus.part("train"), *corpus.part("validation")))
        rows.append(apart.row(0.0))
        if not apart.kept:
            raise failure(apart)
    context = TaskContext(
        seed=cell.seed,
        context=cell.context,
        contexts=contexts,
        train_context=spec.train_context,
        documents=documents,
        weights=str(facts["weights"]),
        smoke=spec.smoke,
        progress=_say,
        state_protocol=spec.state_protocol,
        passed=lambda gate, error, bound: rows.append({"gate": gate, "kept": True, "error": error, "bound": bound}),
        note=facts.__setitem__,
        halfway=lambda: halfway_of(model, facts.get("training", {})),
        apart=apart_for(cell, spec, contexts),
    )
    evaluated = now_s()
    yield from task.run(model, config, context)
    facts["evaluation_seconds"] = round(now_s() - evaluated, 3)
    _say("gates", 0.0, {})
    hold(model, registry.find("models", model_spec.family).module, "smoke" if spec.smoke else spec.gate, rows)
    beyond = phase(model, _past(contexts, spec.train_context, asdict(config)))
    rows += [found.row(0.0) for found in beyond]
    for found in beyond:
        if not found.kept:
            raise failure(found)


def _past(contexts: tuple[int, ...], train_context: int, config: dict[str, Any]) -> int:
    """An odd position past all that the cell reads (phases of powers of two are exact by chance)."""
    asked = (int(config.get(name, 0)) for name in ("longest", "stream_bytes"))
    return 2 * max(*contexts, 16 * train_context, *asked) + 1


def _practises(about: Mapping[str, Any], config: dict[str, Any]) -> bool:
    """Always, never, or where the option of that name is set."""
    when = about.get("practises", False)
    return bool(config[when]) if isinstance(when, str) else bool(when)


def _documents(
    corpus: Corpus | None, contexts: tuple[int, ...], config: dict[str, Any], spec: RunSpec
) -> tuple[Any, ...]:
    from bdh_bench.runner.plan import test_documents

    return () if corpus is None else test_documents(corpus, contexts, config, spec.documents)


def _model_facts(model: Any, spec: ModelSpec, train_context: int) -> dict[str, Any]:
    """What the fairness card and the tables need to know of a model; None where the model does not say."""
    config = getattr(model, "config", None)
    parameter = next(iter(model.parameters()), None)
    known = spec.option("weights")
    unrolled = getattr(model, "unrolled_parameter_count", model.parameter_count)
    return {
        "parameters": model.parameter_count(),
        "non_embedding_parameters": model.parameter_count() - _embedding_parameters(model),
        "unrolled_parameters": unrolled(),
        "state_bytes": {str(k * train_context): _state_bytes(model, k * train_context) for k in (1, 4, 16)},
        "state_curve": knots(lambda context: int(model.state_bytes(1, context)), model.max_positions),
        "flops_per_token": _flops_per_token(model, train_context),
        "vocab_size": model.vocab_size,
        "start_symbol": model.start_symbol,
        "architecture": str(registry.find("models", spec.family).defaults.get("architecture", "")),
        "config": asdict(config) if config is not None and hasattr(config, "__dataclass_fields__") else {},
        "weights": "loaded" if known else model.origin if hasattr(model, "origin") else "random",
        "contamination": "unknown" if known else "",  # what published weights were trained on is not told
        "kernels": model.kernels() if hasattr(model, "kernels") else "",
        "mode": str(getattr(config, "mode", "")),
        "dtype": str(parameter.dtype).removeprefix("torch.") if parameter is not None else "",
        "max_positions": model.max_positions,
        **(model.facts() if hasattr(model, "facts") else {}),
    }


def _embedding_parameters(model: Any) -> int:
    """Parameters of every embedding table, tokens and positions; a table that is also the output head counts as one."""
    from torch import nn

    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(tables.values())


def _state_bytes(model: Any, context: int) -> int | None:
    """The formula's bytes at this context; None past the last position."""
    if model.max_positions is not None and context > model.max_positions:
        return None
    return int(model.state_bytes(1, context))


def _flops_per_token(model: Any, context: int) -> float | None:
    try:
        return float(model.flops_per_token(context))
    except NotImplementedError:  # a model of someone else's that has no formula: the card shows a gap
        return None


if __name__ == "__main__":
    sys.exit(main())
