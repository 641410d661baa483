"""How long does one changed byte matter? (This line is what `bdh-bench list tasks` shows.)

Protocol: two streams read the same random bytes but for the first one. After 1, 2, 4, … further bytes, up to the cell's context,
the predictions of the two are compared by total variation: half the sum of absolute differences of probability, 0 where the byte is
forgotten and 1 where they exclude each other. Each of ``texts`` texts is one sample.

Caveats: random bytes are no text, and without weights=PATH the model is not trained. A task that sets ``trains`` and ``reads`` to
True gets a trained model and held-out documents (see long_ppl).

Legend: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdh_bench.types import Measurement, TaskContext

#: The headline metric, what makes a cell of its own, and what the runner must bring. Contexts are factors of the training context.
DEFAULTS = {
    "metric": "influence",
    "cell_axes": ("seed", "context"),
    "trains": False,
    "reads": False,
    "context_factors": (1, 4),
}


@dataclass(frozen=True)
class Config:
    """The options on the command line, NAME:texts=16; whole numbers of at least 1.

    texts  pairs of texts that differ in one byte
    """

    texts: int = 8


@torch.inference_mode()
def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement]:
    """Yield raw measurements, one per text and distance; means and intervals are made when results are read."""
    length = int(context.context or 0)
    if model.max_positions is not None and length + 1 > model.max_positions:
        reason = f"{length} + 1 tokens need more than its {model.max_positions} positions"
        yield Measurement("influence", None, length, status="unsupported", reason=reason)
        return
    generator = torch.Generator().manual_seed(context.seed)  # a task never seeds globally
    for text in range(config.texts):
        tokens = torch.randint(model.vocab_size, (1, length + 1), generator=generator)
        for distance, value in _influence(model, tokens):
            yield Measurement("influence", value, length, axes={"distance": distance}, sample=f"text{text}")
        context.progress("evaluate", (text + 1) / config.texts, {})


def _influence(model: Any, tokens: Tensor) -> Iterator[tuple[int, float]]:
    """(distance, total variation) for distances 1, 2, 4, … up to what the text (1, T) holds."""
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % model.vocab_size
    both = torch.cat((tokens, changed))  # (2, T)
    both = both.to(next((p.device for p in model.parameters()), torch.device("cpu")))
    session = model.session(2)
    session.extend(both[:, :1])
    distance = 1
    while distance < tokens.shape[1]:
        one, other = session.extend(both[:, session.length : distance + 1])[:, -1].softmax(-1)
        yield distance, float((one - other).abs().sum() / 2)
        distance *= 2
