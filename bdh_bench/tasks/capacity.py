"""How many streams of a given context fit a memory budget, and how many tokens per second do they give together?

Protocol: every probe is a fresh process that reads ``context`` random tokens as one stream, multiplies its state to a batch of streams
with room for the tokens that will be decoded and no more, and decodes windows of steps with all of them. It fits where the high-water
mark of the whole process (program, weights, states, workspace) stays within ``budget``. The first guess comes from the census: what one
stream leaves of the budget, divided by its state and the workspace of a stream, which is fitted on batches of 1 and 8. From there the
batch is searched by doubling and bisection until the largest that fits and the smallest that does not are ``precision`` percent apart.
Every probe is stored with its status; which one is the largest, and what it gives, is read from them.

Caveats: streams are filled by multiplying one, which costs what a cache in use costs, and less than reading all of them would at once. The
program itself (some hundred MiB) is inside the budget. Times are windows of one process per batch, on one machine: they rank nothing by
themselves. On CUDA nothing of this has been run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bdh_bench.errors import LawError, SpecError
from bdh_bench.measure.clock import now_s
from bdh_bench.spec import parse_bytes
from bdh_bench.tasks._scoring import PIECE
from bdh_bench.types import Apart, Measurement, Scalar, TaskContext

DEFAULTS = {
    "metric": "capacity_streams",
    "cell_axes": ("seed", "context"),
    "trains": False,
    "reads": False,
    "checked": True,
    "context_factors": (1, 4, 16),
}

#: Batches from which the workspace of a stream is fitted.
_SMALL = (1, 8)
_NO_ROOM = ("oom_host", "oom_cuda")


@dataclass(frozen=True)
class Config:
    """What is searched.

    budget     bytes of the whole process, for example 2GiB or 512MiB
    most       streams at the most
    precision  percent between the largest batch that fits and the smallest that does not
    steps      tokens of a window
    windows    per probe, after one that is not kept
    """

    budget: str = "2GiB"
    most: int = 4096
    precision: int = 5
    steps: int = 4
    windows: int = 3


def check(config: Config) -> Mapping[str, Any]:
    """Raise SpecError for a budget that is none, before anything runs."""
    if parse_bytes(config.budget) < 1:
        raise SpecError(f"got budget={config.budget} · expected a number of bytes above 0", "for example budget=2GiB")
    return {}


def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement]:
    """Every probe: its footprint or why there is none, and its windows; and the batch that the census predicts."""
    length, budget = int(context.context or 0), parse_bytes(config.budget)
    axes = {"budget": budget}
    if model.max_positions is not None and length + _decoded(config) > model.max_positions:
        reason = f"{length} + {_decoded(config)} tokens need more than its {model.max_positions} positions"
        yield Measurement("capacity_streams", None, length, axes=axes, status="unsupported", reason=reason)
        return
    footprints: dict[int, int] = {}
    tried: dict[int, bool] = {}
    guess: int | None = None
    while (batch := proposal(tried, guess, config.most, config.precision)) is not None:
        context.progress("probe", 0.0, {"context": length, "streams": batch})
        outcome = context.apart({"streams": batch}, budget)
        yield from _rows(outcome, length, batch, axes)
        if outcome.status == "gate_failed":
            raise LawError(outcome.reason, gate="census")
        if outcome.status not in ("ok", *_NO_ROOM):
            return
        tried[batch], footprints[batch] = outcome.status == "ok", outcome.peak_bytes
        if guess is None and (len(tried) == len(_SMALL) or not tried[batch]):
            guess = predicted(footprints, tried, model.state_bytes(1, length), budget)
            yield Measurement("capacity_predicted_streams", guess, length, axes=axes)


def _rows(outcome: Apart, length: int, batch: int, axes: Mapping[str, Scalar]) -> Iterator[Measurement]:
    if outcome.status != "ok":
        status, reason = outcome.status, outcome.reason
        yield Measurement("probe_footprint_bytes", None, length, batch, axes=axes, status=status, reason=reason)
        return
    yield Measurement("probe_footprint_bytes", outcome.peak_bytes, length, batch, axes=axes)
    for repeat, seconds in enumerate(outcome.values["windows"]):
        yield Measurement("probe_step_s", seconds, length, batch, axes=axes, repeat=repeat)


# -- the search --------------------------------------------------------------------------------------------------------


def predicted(footprints: Mapping[int, int], tried: Mapping[int, bool], state: int, budget: int) -> int:
    """Streams that fit by the census: what one stream leaves, over its state and the workspace fitted on small batches."""
    first, last = _SMALL
    if not tried.get(first):
        return 0
    workspace = 0.0
    if tried.get(last):
        workspace = max(0.0, (footprints[last] - footprints[first]) / (last - first) - state)
    return first + int((budget - footprints[first]) // max(1.0, state + workspace))


def proposal(tried: Mapping[int, bool], guess: int | None, most: int, precision: int) -> int | None:
    """The next batch to try, or None when enough is known: small ones, the guess, then away from it in doubling steps, then between.

    ``tried`` tells of each batch whether it fitted.
    """
    fits = max((batch for batch, fitted in tried.items() if fitted), default=0)
    fails = min((batch for batch, fitted in tried.items() if not fitted), default=None)
    if fails is not None and fails - fits <= max(1.0, fits * precision / 100):
        return None
    if fits >= most:
        return None
    for batch in _SMALL:
        if batch not in tried and batch <= most and (fails is None or batch < fails):
            return batch
    guess = max(1, min(guess or 1, most))
    if fits < guess and (fails is None or guess < fails):
        return guess
    step = max(1, guess * precision // 100)
    if fails is None:
        return min(most, fits + max(step, fits - guess))
    down = fails - max(step, guess - fails) if fails <= guess else 0
    return down if down > fits else (fits + fails) // 2


# -- one probe, in a process of its own --------------------------------------------------------------------------------


@torch.inference_mode()
def part(model: Any, config: Config, context: TaskContext, request: Mapping[str, Scalar]) -> dict[str, Any]:
    """Fill the batch, check its bytes, decode; seconds of the mean step of each window."""
    length, streams = int(context.context or 0), int(request["streams"] or 1)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tokens = torch.randint(model.vocab_size, (1, length), generator=torch.Generator().manual_seed(context.seed))
    session = model.session(1)
    for piece in tokens.to(device).split(PIECE, 1):
        logits = session.extend(piece)
    if streams > 1:
        session.multiply(streams, _decoded(config))
    if session.state_bytes != model.state_bytes(streams, length):
        raise LawError(
            f"the census found {session.state_bytes:,} bytes of {streams:,} streams · the formula says "
            f"{model.state_bytes(streams, length):,}"
        )
    token = logits[:, -1:].argmax(-1).expand(streams, 1)
    windows: list[float] = []
    for _ in range(config.windows + 1):
        started = now_s()
        for _ in range(config.steps):
            token = session.extend(token)[:, -1:].argmax(-1)
        token.sum().item()  # waits for a device, too
        windows.append((now_s() - started) / config.steps)
    return {"windows": windows[1:]}


def _decoded(config: Config) -> int:
    return config.steps * (config.windows + 1)
