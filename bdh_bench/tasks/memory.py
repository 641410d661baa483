"""What does a stream cost in bytes? State by census of its tensors, and the peaks of the process.

Protocol: one stream reads ``context`` random tokens in pieces, then decodes a few. ``state_bytes`` counts the tensors that must survive
until the next token and must equal the model's own formula exactly, else nothing is stored (gate_failed). Peaks are high-water
marks kept by the operating system (on CUDA by the allocator), prefill and decoding apart, each above what the process held before;
``peak_footprint_bytes`` is the absolute mark of both, which decides whether a machine is large enough. ``fragmentation_bytes`` is what
the process still holds more than before once the streams are gone and the heap is trimmed.

Logits are told apart from activations: prefill is measured twice, asked for the last logits of each piece (as a server would) and for all
of them (as training and scoring do), and ``logits_bytes`` is the largest storage that one call handed out. With ``keep=last`` that must be
one position; a model that computes them all shows it in the peak, one that hands out a view of them in ``logits_bytes``.

Caveats: peaks include the allocator's slack, and the marks of the kernel move in pages and small batches of them; loading and warm-up
are in no peak; a model's weights are the same in both phases and are reported apart. Where the system does not let a process set its mark
back there are no peaks by phase, and the footprint says that it counts from the start of the process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdh_bench.errors import LawError
from bdh_bench.measure.memory import Marks, marks_of
from bdh_bench.session import storage_bytes
from bdh_bench.tasks._scoring import PIECE
from bdh_bench.types import Keep, Measurement, TaskContext

DEFAULTS = {
    "metric": "state_bytes",
    "cell_axes": ("seed", "context"),
    "trains": False,
    "reads": False,
    "context_factors": (1, 4, 16),
}

_NO_RESET = "this system does not let a process reset its high-water mark"


@dataclass(frozen=True)
class Config:
    """What is read.

    steps       decoded tokens after the prompt
    batch_size  streams
    """

    steps: int = 16
    batch_size: int = 1


@dataclass(frozen=True)
class _Phase:
    """Bytes held before a phase, the marks at its end, and the largest storage of logits that a call handed out."""

    before: int | None
    resettable: bool
    peak: int
    footprint: int
    logits: int


@torch.inference_mode()
def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement]:
    """State, capacity, weights, logits, and the peaks of prefill and decoding at the cell's context."""
    length, batch = int(context.context or 0), config.batch_size
    if model.max_positions is not None and length + config.steps > model.max_positions:
        reason = f"{length} + {config.steps} tokens need more than its {model.max_positions} positions"
        yield Measurement("state_bytes", None, length, batch, status="unsupported", reason=reason)
        return
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tokens = torch.randint(model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(context.seed))
    tokens, marks = tokens.to(device), marks_of(device.type)
    _warm_up(model, batch, device)
    marks.settle()
    start = marks.held()
    pieces = tokens.split(PIECE, 1)
    session, prefill = _phase(marks, model, pieces, "last")
    yield from _census(model, session, length, batch, context)
    session, decode = _phase(marks, model, [tokens[:, :1]] * config.steps, "last", session)
    del session
    every = _phase(marks, model, pieces, "all")[1]  # its stream ends here
    marks.settle()
    unused = marks.unused(start)
    weights = storage_bytes([*model.parameters(), *model.buffers()])
    yield Measurement("weights_bytes", weights, length, batch)
    for keep, phase in (("last", prefill), ("all", every)):
        yield Measurement("logits_bytes", phase.logits, length, batch, axes={"keep": keep})
        yield _live("prefill_peak_live_bytes", phase, length, batch, {"keep": keep})
    yield _live("decode_peak_live_bytes", decode, length, batch, {})
    reason = marks.remark if prefill.resettable else f"mark since the start of the process: {_NO_RESET}"
    footprint = max(prefill.footprint, decode.footprint)
    yield Measurement("peak_footprint_bytes", footprint, length, batch, reason=reason)
    if unused is not None:
        yield Measurement("fragmentation_bytes", unused, length, batch)


def _phase(marks: Marks, model: Any, pieces: Sequence[Tensor], keep: Keep, session: Any = None) -> tuple[Any, _Phase]:
    """Read the pieces between two marks, on a new stream unless one is given; logits are gone before the next piece is read."""
    marks.settle()  # else what the last phase has freed would serve this one, and hide it
    before, resettable = marks.held(), marks.reset()
    session, largest = session or model.session(len(pieces[0])), 0
    for piece in pieces:
        largest = max(largest, storage_bytes([session.extend(piece, keep)]))
    return session, _Phase(before, resettable, marks.peak(), marks.footprint(), largest)


def _census(model: Any, session: Any, length: int, batch: int, context: TaskContext) -> Iterator[Measurement]:
    """State and capacity; the first must be what the formula says."""
    state, formula = session.state_bytes, model.state_bytes(batch, length)
    if state != formula:
        raise LawError(
            f"the census found {state:,} state bytes after {length:,} tokens · the formula says {formula:,}",
            "correct state() or state_bytes() of the model",
            "census",
            float(abs(state - formula)),
            0.0,
        )
    context.passed("census", 0.0, 0.0)
    yield Measurement("state_bytes", state, length, batch)
    yield Measurement("capacity_bytes", session.capacity_bytes, length, batch)


def _live(name: str, phase: _Phase, length: int, batch: int, axes: dict[str, str]) -> Measurement:
    """The peak above what was held before, where the mark could be set back."""
    if phase.resettable and phase.before is not None:
        return Measurement(name, max(0, phase.peak - phase.before), length, batch, axes=axes)
    return Measurement(name, None, length, batch, axes=axes, status="unsupported", reason=_NO_RESET)


def _warm_up(model: Any, batch: int, device: torch.device) -> None:
    """Let libraries allocate their workspaces before the first mark."""
    session = model.session(batch)
    session.extend(torch.zeros(batch, 8, dtype=torch.long, device=device))
    session.extend(torch.zeros(batch, 1, dtype=torch.long, device=device), "all")
