"""How long does a memory last? The gain from having read the same passage before, over a growing gap.

Protocol: a passage of random words is read twice with a gap of real text between; the bits per byte of the first reading minus those
of the second are what memory saved. The same passages and the same gap text for every model and, nested, for every gap. No practice:
any model of text can be asked. A model without memory gains 0.

Caveats: the second reading has more text before it, which alone helps a little; gap 0 is not yet memory over a distance.

Legend: B passages, G bytes of gap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bdh_bench.errors import PositionLimitError
from bdh_bench.tasks._exercises import dataset, generator
from bdh_bench.tasks._scoring import score_after
from bdh_bench.types import Measurement, TaskContext

DEFAULTS = {
    "metric": "repeat_gain_bits_per_byte",
    "cell_axes": ("seed",),
    "trains": True,
    "reads": True,
    "context_factors": (2,),
}

_GAPS = (0, 64, 128, 256, 512, 1024, 2048, 4096)
_WORDS, _LETTERS = 400, b"abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Config:
    """What is read twice.

    passages  how many
    block     bytes of a passage
    blocks    chooses the documents, with block, as long_ppl does
    longest   gap in bytes
    """

    passages: int = 50
    block: int = 256
    blocks: int = 1
    longest: int = 2048


def passages(count: int, size: int) -> NDArray[np.uint8]:
    """(B, size) bytes: words of three to eight random letters from a list that no text has, with spaces between."""
    words = generator("words")
    known = [bytes(words.choice(list(_LETTERS), words.integers(3, 9)).tolist()) for _ in range(_WORDS)]
    made = []
    for index in range(count):
        random, text = generator("passage", index), b""
        while len(text) < size:
            text += known[int(random.integers(_WORDS))] + b" "
        made.append(np.frombuffer(text[:size], dtype=np.uint8))
    return np.stack(made)


def gaps(documents: tuple[Any, ...], count: int, size: int) -> NDArray[np.uint8]:
    """(B, size) bytes of held-out text, each from one document; a shorter gap is the end of a longer one."""
    long_enough = [d.content for d in documents if len(d.content) >= size]
    made = []
    for index in range(count):
        random = generator("gap", index)
        content = long_enough[int(random.integers(len(long_enough)))]
        start = int(random.integers(len(content) - size + 1))
        made.append(np.frombuffer(content[start : start + size], dtype=np.uint8))
    return np.stack(made)


def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement]:
    """One measurement per passage and gap, and the bytes of state at the second reading."""
    texts = passages(config.passages, config.block)
    longest = max((len(d.content) for d in context.documents), default=0)
    wanted = [gap for gap in _GAPS if gap <= min(config.longest, longest)]
    between = gaps(context.documents, config.passages, wanted[-1]) if wanted[-1:] != [0] else texts[:, :0]
    lead = (
        between[:, :64] if between.shape[1] >= 64 else texts[:, :0]
    )  # the first reading follows text, as the second does
    same = dataset(context, (lead, texts, between))
    first = score_after(model, lead, texts).mean(1)
    for done, gap in enumerate(wanted):
        context.progress("evaluate", done / len(wanted), {"context": gap})
        before = np.concatenate((lead, texts, between[:, between.shape[1] - gap :]), 1)
        about: dict[str, Any] = {"metric_id": f"repeat@gap={gap},S={config.block}", "axes": same}
        try:
            second = score_after(model, before, texts).mean(1)
        except PositionLimitError as error:
            yield Measurement("repeat_gain_bits_per_byte", None, gap, status="unsupported", reason=str(error), **about)
            continue
        for index, gain in enumerate(first - second):
            weight, sample = float(config.block), f"passage{index:03}"
            yield Measurement("repeat_gain_bits_per_byte", float(gain), gap, sample=sample, weight=weight, **about)
        yield Measurement("state_bytes", model.state_bytes(1, before.shape[1]), before.shape[1])
