"""What does a task of EleutherAI's lm-evaluation-harness say of a model, scored through its live stream?

``lm_eval:NAME``, or several: ``lm_eval:NAME,NAME``. Offline there are ``bdh_stdlib_bpb``, ``bdh_stdlib_choice`` and ``bdh_stdlib_cloze``;
``include=FOLDER`` adds tasks in YAML files, ``stock=on`` those of the package, most of which download their data.

Protocol: lm-eval builds the prompts and judges the answers; every likelihood comes from ``bdh_bench.lm_eval`` (contexts that begin alike
are read once; documents are streams with carried state; nothing is truncated). Kept is one value per document and metric, so that
intervals resample documents, which lm-eval does not give for bits per byte. Bits per byte are the ratio of sums over the logged
(log-likelihood, bytes) pairs. What we reduce must be what lm-eval reports, else nothing is stored (gate_failed).

Models are trained on the run's text first, as for ``long_ppl``; published weights and ``weights=PATH`` are taken as they are.

Caveats: a metric counts only within one task, version, number of shots and windowing; all are in its name. Word and byte perplexity are
left out (other names of the same sum), and so is what is no mean over documents (F1, BLEU): its row says so. Chance of
``bdh_stdlib_choice`` is 1/4.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bdh_bench.errors import LawError, PositionLimitError, SpecError
from bdh_bench.lm_eval.catalogue import check_names, manager
from bdh_bench.types import Arrays, Measurement, TaskContext

DEFAULTS = {
    "metric": "lm_eval_score",
    "cell_axes": ("seed",),
    "trains": True,
    "reads": False,
    "checked": True,
    "word": "names",
    "context_factors": (1,),
}

_METRICS = {
    "acc": "lm_eval_accuracy",
    "acc_norm": "lm_eval_accuracy_norm",
    "acc_bytes": "lm_eval_accuracy_bytes",
    "exact_match": "lm_eval_exact_match",
}
_ROLLING = ("bits_per_byte", "byte_perplexity", "word_perplexity")
_SHOT_SEED = 1234  # of the examples in a prompt: the same for every model and every seed
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Config:
    """What lm-eval is asked for.

    names         the word of the task: its name in lm-eval, or several
    limit         documents per task; 0: all
    shots         examples per prompt; 0: as the task says
    include       a folder with tasks of your own in YAML files
    stock         on adds the tasks of the package, most of which download their data
    windowing     of documents longer than a model's positions: stop (unsupported) or sliding:STRIDE, another metric
    start         where the start symbol stands: empty (before an empty context alone) or always
    state_budget  bytes of state that may be kept to branch from
    """

    names: str = ""
    limit: int = 0
    shots: int = 0
    include: str = ""
    stock: str = "off"
    windowing: str = "stop"
    start: str = "empty"
    state_budget: int = 192 * 2**20


def check(config: Config) -> Mapping[str, str]:
    """What the numbers depend on outside this package. Raises MissingExtraError, UnknownNameError, SpecError before anything runs."""
    known = check_names(_names(config), config.include, _stock(config))
    from bdh_bench.lm_eval.adapter import settings_of

    settings_of(config.windowing, config.state_budget, config.start)
    files = [Path(p) for name in _names(config) if (p := getattr(known.task_index[name], "yaml_path", None))]
    text = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return {"lm_eval": version("lm_eval"), "datasets": version("datasets"), "tasks": text}


def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement | Arrays]:
    """Every named task, one after the other; a group is its members."""
    from bdh_bench.lm_eval.adapter import settings_of, wrap

    settings = settings_of(config.windowing, config.state_budget, config.start)
    known = manager(config.include, _stock(config))
    names = _names(config)
    for done, name in enumerate(names):
        context.progress("lm_eval", done / len(names), {"name": name})
        with redirect_stdout(sys.stderr):  # the library prints; stdout is ours
            tasks = known.load([name])["tasks"]
        for leaf, task in sorted(tasks.items()):
            yield from _task(wrap(model, settings), known, leaf, task, config)


def _names(config: Config) -> list[str]:
    names = [name.strip() for name in config.names.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise SpecError(f"got lm_eval:{config.names} · expected distinct names, for example lm_eval:bdh_stdlib_bpb")
    return names


def _stock(config: Config) -> bool:
    if config.stock not in ("on", "off"):
        raise SpecError(f"got stock={config.stock} · expected on or off")
    return config.stock == "on"


def _task(lm: Any, known: Any, name: str, task: Any, config: Config) -> Iterator[Measurement | Arrays]:
    shots = config.shots or int(task.get_config("num_fewshot") or 0)
    metric_id = f"lm-eval={version('lm_eval')},task={name},v={task.VERSION},shots={shots}"
    metric_id += (f",limit={config.limit}" if config.limit else "") + f",{lm.scoring}"
    about: dict[str, Any] = {"context": 0}
    try:
        with redirect_stdout(sys.stderr):
            found = _evaluate(lm, known, task, config)
    except PositionLimitError as error:
        for metric in dict.fromkeys(_stored(m) for m in task.aggregation()):
            if metric:
                axes = {"lm_eval_task": name}
                yield Measurement(
                    metric,
                    None,
                    0,
                    axes=axes,
                    metric_id=f"{metric}@{metric_id}",
                    status="unsupported",
                    reason=str(error),
                )
        return
    samples = found["samples"][name]
    axes = {"lm_eval_task": name, "target_hash": _hash(samples)}
    for metric, key in _columns(samples):
        chosen = [s for s in samples if s["filter"] == key]
        reported = found["results"][name].get(f"{metric},{key}")
        means = task.aggregation().get(metric)
        about = {"axes": axes | ({"filter": key} if key != "none" else {})}
        yield from _measurements(metric, chosen, reported, getattr(means, "__name__", ""), about, metric_id)
    yield Arrays(f"lm_eval_{name}".replace("/", "_"), _arrays(lm, samples))


def _evaluate(lm: Any, known: Any, task: Any, config: Config) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    found: dict[str, Any] = simple_evaluate(
        model=lm,
        tasks=[task],
        task_manager=known,
        limit=config.limit or None,
        num_fewshot=config.shots or None,
        bootstrap_iters=0,
        log_samples=True,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
        fewshot_random_seed=_SHOT_SEED,
    )
    return found


def _stored(metric: str) -> str:
    """Our name of a metric of lm-eval; "" for those that are not kept."""
    if metric in _ROLLING:
        return "lm_eval_bits_per_byte" if metric != "word_perplexity" else ""
    return "lm_eval_target_bits" if metric == "perplexity" else _METRICS.get(metric, "lm_eval_score")


def _columns(samples: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(metric, filter) of what was judged; of the rolling metrics the first that counts bytes, for they are one number."""
    pairs = dict.fromkeys((metric, sample["filter"]) for sample in samples for metric in sample["metrics"])
    kept: dict[tuple[str, str, str], tuple[str, str]] = {}
    for metric, key in sorted(pairs, key=lambda pair: _ROLLING.index(pair[0]) if pair[0] in _ROLLING else -1):
        stored = _stored(metric)
        if stored:
            kept.setdefault((stored, key, metric if stored == "lm_eval_score" else ""), (metric, key))
    return list(kept.values())


def _measurements(
    metric: str, samples: list[dict[str, Any]], reported: Any, means: str, about: dict[str, Any], metric_id: str
) -> Iterator[Measurement]:
    stored = _stored(metric)
    if stored == "lm_eval_score":
        about = {"axes": about["axes"] | {"lm_eval_metric": metric}}
    about |= {"metric_id": f"{metric}@{metric_id}"}
    values = [s[metric] for s in samples]
    if metric in _ROLLING:
        rows = [(-nats / math.log(2) / size, float(size)) for nats, size in values]
        ours = -sum(nats for nats, _ in values) / math.log(2) / sum(size for _, size in values)
        theirs = math.log2(reported) if metric == "byte_perplexity" else reported
    elif metric == "perplexity":
        rows = [(-nats / math.log(2), 1.0) for nats in values]
        ours, theirs = sum(value for value, _ in rows) / len(rows), math.log2(reported)
    elif means == "mean" and all(isinstance(value, int | float | np.number) for value in values):
        rows = [(float(value), 1.0) for value in values]
        ours, theirs = sum(value for value, _ in rows) / len(rows), reported
    else:
        reason = f"lm-eval reduces {metric} with {means or 'a function of its own'}, not with a mean over documents"
        yield Measurement(stored, None, 0, status="unsupported", reason=reason, **about)
        return
    if abs(ours - float(theirs)) > _TOLERANCE * max(1.0, abs(ours)):
        raise LawError(f"{metric} is {ours!r} from its documents · lm-eval reports {theirs!r}", "report this")
    for sample, (value, weight) in zip(samples, rows, strict=True):
        yield Measurement(stored, value, 0, sample=_sample(sample), weight=weight, **about)


def _sample(sample: Mapping[str, Any]) -> str:
    """What is resampled: the document that a row was cut from, where it says so, else the row."""
    return str(sample["doc"].get("bdh_document") or sample["doc_id"])


def _hash(samples: list[dict[str, Any]]) -> str:
    """Over documents, prompts and answers: points with equal hashes answered identical questions."""
    parts = sorted(f"{s['doc_hash']} {s['prompt_hash']} {s['target_hash']}" for s in samples)
    return hashlib.sha256("\n".join(dict.fromkeys(parts)).encode()).hexdigest()[:16]


def _arrays(lm: Any, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What lm-eval's reductions lose: the answer to every request, and the bits of every position of a rolled document."""
    first = [s for s in samples if s["filter"] == samples[0]["filter"]]
    answers = [(s["doc_id"], answer[0]) for s in first for answer in s["resps"]]
    arrays: dict[str, Any] = {"doc_id": np.array([doc for doc, _ in answers])}
    if all(isinstance(answer, tuple) for _, answer in answers):
        arrays["nats"] = np.array([answer[0] for _, answer in answers])
        arrays["greedy"] = np.array([answer[1] for _, answer in answers])
    elif all(isinstance(answer, str) for _, answer in answers):
        arrays["text"] = np.array([answer for _, answer in answers])
    else:
        arrays["nats"] = np.array([float(answer) for _, answer in answers])
    for sha, units in lm.positions.items():
        arrays |= {f"bits_{sha}": units.bits, f"ends_{sha}": units.ends}
    return arrays
