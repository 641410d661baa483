"""Does a model know what it has just read? Bits per byte of a random text that is read a second time.

Protocol: a stream reads random bytes, as many as the cell's context, and then the same bytes again. Nothing but memory predicts the
second reading: 8 bits per byte is chance, 0 is a perfect copy. Each of ``texts`` texts is one sample, its bytes are the weight.

Caveat: without weights=PATH the model is not trained, and knows nothing.

Legend: B batch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from bdh_bench.types import Measurement, TaskContext

DEFAULTS = {
    "metric": "echo_bits_per_byte",
    "cell_axes": ("seed", "context"),
    "trains": False,
    "reads": False,
    "context_factors": (0.25, 1),
}


@dataclass(frozen=True)
class Config:
    """``texts`` samples per context."""

    texts: int = 4


@torch.inference_mode()
def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement]:
    """One measurement per text."""
    length = int(context.context or 0)
    if model.max_positions is not None and 2 * length > model.max_positions:
        reason = f"twice {length} tokens need more than its {model.max_positions} positions"
        yield Measurement("echo_bits_per_byte", None, length, status="unsupported", reason=reason)
        return
    generator = torch.Generator().manual_seed(context.seed)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for text in range(config.texts):
        tokens = torch.randint(model.vocab_size, (1, length), generator=generator).to(device)
        session = model.session(1)
        first = session.extend(tokens)
        rest = session.extend(tokens, keep="all")[:, :-1]
        nats = F.cross_entropy(torch.cat((first, rest), 1)[0].double(), tokens[0])
        yield Measurement("echo_bits_per_byte", float(nats) / math.log(2), length, sample=f"text{text}", weight=length)
        context.progress("evaluate", (text + 1) / config.texts, {})
