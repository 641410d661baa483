"""How many bytes does a model read in so many seconds of training, here and now?

A few steps are timed on a copy of the model, after a few that are not; the answer is kept beside the checkpoint, so that a training
that is stopped and resumed has the budget that it began with. Wall-clock is what the machine gave at that moment: the seconds that
training then took are in its report, and may differ.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
from dataclasses import replace
from typing import Any

from bdh_bench.data.corpus import Document
from bdh_bench.measure.clock import now_s
from bdh_bench.training.checkpoints import Checkpoint
from bdh_bench.training.loop import begun
from bdh_bench.training.recipe import Recipe

_UNTIMED, _TIMED = 3, 8


def bytes_in(
    seconds: float, model: Any, recipe: Recipe, documents: tuple[Document, ...], checkpoint: Checkpoint
) -> int:
    """Training bytes that fit into ``seconds``; at least one step of them."""
    kept = checkpoint.folder / "pilot.json"
    if kept.is_file():
        return int(json.loads(kept.read_text(encoding="utf-8"))["bytes"])
    training = begun(copy.deepcopy(model), replace(recipe, bytes=2**40), documents)
    taken: list[float] = []
    for _ in range(_UNTIMED + _TIMED):
        started = now_s()
        float(training.one())
        taken.append(now_s() - started)
    per_step = statistics.median(taken[_UNTIMED:])
    found = max(1, round(seconds / per_step)) * training.reader.read(1)
    checkpoint.prepare()
    partial = kept.with_name(f"pilot.json.{os.getpid()}")
    partial.write_text(json.dumps({"bytes": found, "step_s": taken, "seconds": seconds}), encoding="utf-8")
    partial.replace(kept)
    return found
