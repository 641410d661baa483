"""How long until the first token, and how long for each one after, at a given depth?

Protocol: a stream reads ``context`` random tokens in pieces (prefill), repeated; then windows of single-token steps start at that depth,
each on a fork of the prefilled stream, argmax included. Raw windows are stored; medians are taken when results are read. One
untimed prefill and one untimed window come first.

Caveats: one process (a round) says little of a machine; five rounds, interleaved over the models, are the default. ``tpot_s`` is the
mean step of a window; forks are made outside the timed part. A model that decodes sparsely says so (axis ``path``), with the share
of rows it touched beside it; on random weights, half of whose keys are active, sparse decoding is not timed unless ``force=1``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdh_bench.errors import LawError
from bdh_bench.measure.clock import now_s
from bdh_bench.tasks._scoring import PIECE
from bdh_bench.types import Arrays, Measurement, TaskContext

DEFAULTS = {
    "metric": "tpot_s",
    "cell_axes": ("seed", "context"),
    "trains": False,
    "reads": False,
    "context_factors": (1, 4, 16),
    "rounds": 5,
}


@dataclass(frozen=True)
class Config:
    """What is timed.

    steps       tokens of a window
    windows     per depth
    prefills    repeats
    batch_size  streams
    force       1 times sparse decoding on random weights too
    """

    steps: int = 32
    windows: int = 5
    prefills: int = 3
    batch_size: int = 1
    force: int = 0


@torch.inference_mode()
def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement | Arrays]:
    """Repeats of prefill and time to first token, then windows of decoding at that depth."""
    length, batch = int(context.context or 0), config.batch_size
    if model.max_positions is not None and length + config.steps > model.max_positions:
        reason = f"{length} + {config.steps} tokens need more than its {model.max_positions} positions"
        for name in ("prefill_s", "ttft_s", "tpot_s"):
            yield Measurement(name, None, length, batch, status="unsupported", reason=reason)
        return
    tokens = torch.randint(model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(context.seed))
    tokens = tokens.to(next((p.device for p in model.parameters()), torch.device("cpu")))
    session, _, _, logits = _prefill(model, tokens)
    if not bool(torch.isfinite(logits).all()):
        raise LawError(
            f"logits after {length:,} tokens are not finite · expected finite logits before anything is timed",
            gate="numerics",
        )
    context.passed("numerics", 0.0, 0.0)
    for repeat in range(config.prefills):
        context.progress("prefill", repeat / config.prefills, {"context": length})
        session, prefill, first, logits = _prefill(model, tokens)
        yield Measurement("prefill_s", prefill, length, batch, repeat=repeat)
        yield Measurement("ttft_s", first, length, batch, repeat=repeat)
    chosen = logits[:, -1:].argmax(-1)
    if _senseless(model, config, context):
        reason = "about half of the keys of random weights are active, and sparse decoding of them says nothing of a trained model"
        hint = "give trained weights, or latency:force=1"
        yield Measurement(
            "tpot_s", None, length, batch, axes={"path": "sparse"}, status="unsupported", reason=f"{reason} · {hint}"
        )
        return
    warm = session.fork()
    _window(warm, chosen, config.steps)
    facts = warm.facts()
    axes = {"path": str(facts["path"])} if "path" in facts else {}
    for layer, share in facts.get("row_density", {}).items():
        yield Measurement("row_density", share, length, batch, axes={"layer": layer})
    stamps: list[list[float]] = []
    for repeat in range(config.windows):
        context.progress("decode", repeat / config.windows, {"context": length})
        steps = _window(session.fork(), chosen, config.steps)
        stamps.append(steps)
        yield Measurement("tpot_s", sum(steps) / len(steps), length, batch, axes=axes, repeat=repeat)
    yield Arrays("steps", {"step_s": np.array(stamps)})


def _senseless(model: Any, config: Config, context: TaskContext) -> bool:
    sparse = getattr(getattr(model, "config", None), "mode", "") == "sparse"
    return sparse and context.weights == "random" and not config.force


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _prefill(model: Any, tokens: Tensor) -> tuple[Any, float, float, Tensor]:
    """A stream that has read the tokens, seconds until its logits, seconds until the first choice, the logits."""
    session = model.session(tokens.shape[0])
    _synchronise(tokens.device)
    started = now_s()
    for piece in tokens.split(PIECE, 1):
        logits = session.extend(piece)
    _synchronise(tokens.device)
    ready = now_s()
    logits[:, -1].argmax(-1).tolist()
    return session, ready - started, now_s() - started, logits


def _window(session: Any, token: Tensor, steps: int) -> list[float]:
    """Seconds of each of ``steps`` greedy steps."""
    _synchronise(token.device)
    taken: list[float] = []
    for _ in range(steps):
        started = now_s()
        token = session.extend(token)[:, -1:].argmax(-1)
        _synchronise(token.device)
        taken.append(now_s() - started)
    return taken
