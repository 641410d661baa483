"""What does a stream cost in bytes? State by census of its tensors, and the peaks of the process.

Protocol: one stream reads ``context`` random tokens in pieces, then decodes a few. ``state_bytes`` counts the tensors that must survive
until the next token and must equal the model's own formula exactly, else nothing is stored (gate_failed). Peaks are high-water
marks kept by the operating system, prefill and decoding apart, each above what the process held before; ``peak_footprint_bytes`` is the
absolute mark, which decides whether a machine is large enough.

Caveats: peaks include the allocator's slack; a model's weights are the same in both phases and are reported apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bdh_bench.errors import LawError
from bdh_bench.measure import memory
from bdh_bench.session import storage_bytes
from bdh_bench.tasks._scoring import PIECE
from bdh_bench.types import Measurement, TaskContext

DEFAULTS = {
    "metric": "state_bytes",
    "cell_axes": ("seed", "context"),
    "trains": False,
    "reads": False,
    "context_factors": (1, 4, 16),
}


@dataclass(frozen=True)
class Config:
    """What is read.

    steps       decoded tokens after the prompt
    batch_size  streams
    """

    steps: int = 16
    batch_size: int = 1


@torch.inference_mode()
def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement]:
    """State, capacity, weights, and the peaks of prefill and decoding at the cell's context."""
    length, batch = int(context.context or 0), config.batch_size
    if model.max_positions is not None and length + config.steps > model.max_positions:
        reason = f"{length} + {config.steps} tokens need more than its {model.max_positions} positions"
        yield Measurement("state_bytes", None, length, batch, status="unsupported", reason=reason)
        return
    tokens = torch.randint(model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(context.seed))
    tokens = tokens.to(next((p.device for p in model.parameters()), torch.device("cpu")))
    _warm_up(model, batch)
    memory.settle()
    before, resettable = memory.resident_bytes(), memory.reset_peak()
    session = model.session(batch)
    for piece in tokens.split(PIECE, 1):
        session.extend(piece)
    prefill_peak = memory.peak_resident_bytes()
    state, capacity = session.state_bytes, session.capacity_bytes
    if state != model.state_bytes(batch, length):
        raise LawError(
            f"the census found {state:,} state bytes after {length:,} tokens · the formula says "
            f"{model.state_bytes(batch, length):,}",
            "correct state() or state_bytes() of the model",
            "census",
            float(abs(state - model.state_bytes(batch, length))),
            0.0,
        )
    context.passed("census", 0.0, 0.0)
    settled, _ = memory.resident_bytes(), memory.reset_peak()
    for _ in range(config.steps):
        session.extend(tokens[:, :1])
    decode_peak = memory.peak_resident_bytes()
    weights = storage_bytes([*model.parameters(), *model.buffers()])
    for name, value in (("state_bytes", state), ("capacity_bytes", capacity), ("weights_bytes", weights)):
        yield Measurement(name, value, length, batch)
    yield Measurement("peak_footprint_bytes", max(prefill_peak, decode_peak), length, batch)
    phases = (("prefill_peak_live_bytes", prefill_peak, before), ("decode_peak_live_bytes", decode_peak, settled))
    for name, peak, base in phases:
        if resettable and base is not None:
            yield Measurement(name, max(0, peak - base), length, batch)
        else:
            reason = "this system does not let a process reset its high-water mark"
            yield Measurement(name, None, length, batch, status="unsupported", reason=reason)


def _warm_up(model: Any, batch: int) -> None:
    """Let libraries allocate their workspaces before the first mark."""
    session = model.session(batch)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    session.extend(torch.zeros(batch, 8, dtype=torch.long, device=device))
    session.extend(torch.zeros(batch, 1, dtype=torch.long, device=device))
