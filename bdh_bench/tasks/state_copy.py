"""What does it cost to keep a stream: to save it to a file, to bring it back, and to fork it at a given depth?

Protocol: one stream reads ``context`` random tokens in pieces; then it is saved, restored and forked, ``repeats`` times each. Before any
number is stored, the last fork and the last restored stream go on beside the original, token by token, and every logit must be equal bit
for bit (gate ``continuation``). Seconds of each repeat are stored, the size of the file, and the bytes that a fork holds.

Caveats: files lie in the system's folder for temporary files and are written without waiting for the disk, so a number is that of the page
cache. Saving and restoring also hash the model's weights, which says whose state a file is; that part does not depend on the state and
is told beside them (``weights_fingerprint_s``). One process on one machine decides no ranking.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdh_bench.errors import LawError
from bdh_bench.measure.clock import now_s
from bdh_bench.session import fingerprint
from bdh_bench.tasks._scoring import PIECE
from bdh_bench.types import Measurement, TaskContext

DEFAULTS = {
    "metric": "state_save_s",
    "cell_axes": ("seed", "context"),
    "trains": False,
    "reads": False,
    "context_factors": (1, 4, 16),
}


@dataclass(frozen=True)
class Config:
    """What is done.

    repeats     of saving, restoring and forking
    steps       tokens that the copies must continue with exactly like the original
    batch_size  streams
    """

    repeats: int = 5
    steps: int = 8
    batch_size: int = 1


@torch.inference_mode()
def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement]:
    """Save, restore and fork at the cell's context; nothing is yielded before the copies have proved equal."""
    length, batch = int(context.context or 0), config.batch_size
    if model.max_positions is not None and length + config.steps > model.max_positions:
        reason = f"{length} + {config.steps} tokens need more than its {model.max_positions} positions"
        yield Measurement("state_save_s", None, length, batch, status="unsupported", reason=reason)
        return
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(context.seed)
    tokens = torch.randint(model.vocab_size, (batch, length + config.steps), generator=generator).to(device)
    session = model.session(batch)
    for piece in tokens[:, :length].split(PIECE, 1):
        session.extend(piece)
    with tempfile.TemporaryDirectory(prefix="bdh-bench-") as folder:
        path = Path(folder) / "stream.safetensors"
        saved, _ = _timed(lambda: session.save(path), config.repeats, device)
        file_bytes = path.stat().st_size
        restored, again = _timed(lambda: model.restore(path), config.repeats, device)
    forked, branch = _timed(session.fork, config.repeats, device)
    fork_bytes = branch.capacity_bytes
    hashed, _ = _timed(lambda: fingerprint(model), config.repeats, device)
    _prove(session, {"restored": again, "forked": branch}, tokens[:, length:])
    context.passed("continuation", 0.0, 0.0)
    for name, seconds in (
        ("state_save_s", saved),
        ("state_restore_s", restored),
        ("state_fork_s", forked),
        ("weights_fingerprint_s", hashed),
    ):
        for repeat, value in enumerate(seconds):
            yield Measurement(name, value, length, batch, repeat=repeat)
    yield Measurement("state_file_bytes", file_bytes, length, batch)
    yield Measurement("state_fork_bytes", fork_bytes, length, batch)


def _timed(action: Callable[[], Any], repeats: int, device: torch.device) -> tuple[list[float], Any]:
    """Seconds of each call, and what the last one gave; results of the others are gone before the next begins."""
    seconds: list[float] = []
    result: Any = None
    for _ in range(repeats):
        result = None
        started = now_s()
        result = action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(now_s() - started)
    return seconds, result


def _prove(session: Any, copies: dict[str, Any], tokens: Tensor) -> None:
    """Raise LawError unless each copy goes on exactly as the original does. All of them are read on."""
    for copy in copies.values():
        if copy.length != session.length:
            raise LawError(f"a copy has {copy.length} tokens · expected {session.length}", gate="continuation")
    for place in range(tokens.shape[1]):
        token = tokens[:, place : place + 1]
        truth = session.extend(token)
        for name, copy in copies.items():
            got = copy.extend(token)
            if not torch.equal(got, truth):
                apart = float((got.double() - truth.double()).abs().max())
                raise LawError(
                    f"logits of the {name} stream are {apart:g} from the original's, {place + 1} tokens on · expected equal bits",
                    "correct the memory's tensors(), load() or fork()",
                    "continuation",
                    apart,
                    0.0,
                )
