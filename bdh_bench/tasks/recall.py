"""How many key-value pairs can a model keep apart, for how many bytes of state? Multi-query associative recall.

Protocol: an example lists pairs, then asks for each key once among filler; the gap before a question is drawn from a power law, so that
most are asked soon and some late. Loss and score only at answers. Symbols are token ids in three ranges that do not overlap (filler,
keys, values); 64 of each for a byte vocabulary, the published sizes for 1,024 and 8,192 tokens. A model practises a mix of short and
long examples until 0.995 of its validation answers are right or the cap of examples is reached, the same for all; then it is examined on
test examples: more pairs at length max(64, 4 · pairs), and longer texts at 16 pairs. ``forgetting=1``: every key is written twice and
the last value is right; ``recall_stale_share`` counts answers with the first one.

Validity: where no transformer of the run reaches 0.99 at 4 pairs in 64 tokens, nothing was learnt and the run decides nothing.

Source: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (2023), for task and power law.

Legend: B examples, T tokens, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdh_bench.tasks._exercises import NO_ANSWER, Ids, choices, dataset, fits, generator, symbols, untaught
from bdh_bench.types import Measurement, TaskContext

DEFAULTS = {
    "metric": "recall_accuracy",
    "cell_axes": ("seed",),
    "trains": False,
    "practises": True,
    "reads": False,
}

#: (length, pairs, whether every place behind the pairs is a question) and how often each comes in practice.
_MIX = ((64, 4, True), (64, 4, True), (64, 4, False), (64, 8, True), (64, 16, True), (128, 16, False))
_MIX_LARGE = (
    (64, 4, True),
    (64, 4, False),
    (128, 8, True),
    (256, 16, True),
    (64, 4, True),
    (256, 32, True),
    (256, 64, False),
)
_PAIRS = (4, 8, 16, 32, 64, 128, 256)
_LENGTHS = (64, 128, 256, 512, 1024)
_AXIS_PAIRS = 16
_POWER = 0.01


@dataclass(frozen=True)
class Config:
    """How much is practised and examined.

    sequences   per test cell
    cap         practised examples at the most
    batch       examples in a training step
    forgetting  1 writes every key twice
    """

    sequences: int = 200
    cap: int = 300_000
    batch: int = 32
    forgetting: int = 0


@dataclass(frozen=True)
class Symbols:
    """Token ids of each kind."""

    filler: Ids
    keys: Ids
    values: Ids


def symbols_of(model: Any) -> Symbols:
    """The ranges for this model's vocabulary. Raises ValueError for fewer than 208 tokens."""
    sizes = ((8192, (1, 1023), (1024, 3584), (4608, 3584)), (1024, (1, 127), (128, 448), (576, 448)))
    small = ((16, 64), (80, 64), (144, 64))
    kinds: Any = next((rest for least, *rest in sizes if model.vocab_size >= least), small)
    # one id of each range is left free, so that the start symbol can lie in it
    return Symbols(*(symbols(model, first, count - (count > 64)) for first, count in kinds))


def example(
    ids: Symbols, length: int, pairs: int, forgetting: bool, dense: bool, random: np.random.Generator
) -> tuple[Ids, Ids, Ids]:
    """Tokens, answers and stale answers (T,) of one example; NO_ANSWER where there is none. ``dense`` asks at every place."""
    written = 2 if forgetting else 1
    keys = random.permutation(ids.keys)[:pairs]
    first = random.permutation(len(ids.values))[:pairs]
    later = first + random.integers(1, len(ids.values), pairs)  # never the value that it replaces
    values = ids.values[np.stack((first, later % len(ids.values)))[:written]]  # (times written, P)
    tokens = random.choice(ids.filler, length)
    answers, stale = np.full(length, NO_ANSWER), np.full(length, NO_ANSWER)
    at = 0
    for time in range(written):
        for pair in random.permutation(pairs):
            tokens[at : at + 2] = keys[pair], values[time, pair]
            at += 2
    slots = (length - at) // 2
    if slots < pairs:
        raise ValueError(f"{pairs} questions do not fit behind {at} tokens of an example of {length}")
    if dense:
        asked = zip(range(slots), random.integers(pairs, size=slots), strict=True)
    else:
        chance = _POWER * np.arange(1, slots + 1) ** (_POWER - 1)
        chosen = random.choice(slots, pairs, replace=False, p=chance / chance.sum())
        asked = zip(chosen.tolist(), random.permutation(pairs), strict=True)
    for slot, pair in asked:
        place = at + 2 * slot
        tokens[place : place + 2] = keys[pair], values[-1, pair]
        answers[place + 1], stale[place + 1] = values[-1, pair], values[0, pair]
    return tokens, answers, stale if forgetting else np.full(length, NO_ANSWER)


def examples(
    ids: Symbols, length: int, pairs: int, count: int, config: Config, *identity: str | int, dense: bool = False
) -> tuple[Ids, Ids, Ids]:
    """``count`` examples (B, T), made from ``identity`` and what they are."""
    random = generator("recall", config.forgetting, length, pairs, dense, *identity)
    made = [example(ids, length, pairs, bool(config.forgetting), dense, random) for _ in range(count)]
    tokens, answers, stale = (np.stack(part) for part in zip(*made, strict=True))
    return tokens, answers, stale


class Mix:
    """The practised examples; see ``types.Exercises``."""

    enough = 0.995  # above the 0.99 of the validity rule: who just passes one sample may fail the next
    share_of_text, learning_rate = 0.0, 1e-3

    def __init__(self, model: Any, config: Config) -> None:
        self.ids, self.config = symbols_of(model), config
        self.rows, self.cap = config.batch, config.cap
        self.mix = _MIX if model.vocab_size < 1024 else _MIX_LARGE
        self.identity = f"recall {config} {len(self.ids.keys)} keys {self.mix}"

    def batch(self, split: str, index: int) -> tuple[Ids, Ids]:
        length, pairs, dense = self.mix[index % len(self.mix)] if split == "train" else (64, 4, False)
        if self.config.forgetting:  # twice the pairs are written into the same length
            pairs //= 2
        tokens, answers, _ = examples(self.ids, length, pairs, self.rows, self.config, split, index, dense=dense)
        return tokens, answers


def exercises(model: Any, config: Config, documents: tuple[Any, ...], longest: int) -> Mix:
    """What a model practises before this task."""
    return Mix(model, config)


def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement]:
    """Accuracy for each number of pairs and each length, and the bytes of state that the model had for it."""
    if reason := untaught(model, context.weights):
        yield Measurement("recall_accuracy", None, 0, status="unsupported", reason=reason)
        return
    ids = symbols_of(model)
    written = 4 if config.forgetting else 2
    cells = [(max(64, 2 * written * pairs), pairs, "pairs") for pairs in _PAIRS if pairs <= len(ids.keys)]
    cells += [(length, _AXIS_PAIRS, "length") for length in _LENGTHS if length >= 2 * written * _AXIS_PAIRS]
    papers = [examples(ids, length, pairs, config.sequences, config, "test", 0) for length, pairs, _ in cells]
    same = dataset(context, (part for paper in papers for part in paper))
    for done, ((length, pairs, axis), (tokens, answers, stale)) in enumerate(zip(cells, papers, strict=True)):
        context.progress("examine", done / len(cells), {"context": length})
        axes: Mapping[str, Any] = {
            "pairs": pairs,
            "axis": axis,
            "chance": 1 / len(ids.values),
            "vocabulary": len(ids.keys),
            **same,
        }
        name = f"recall@pairs={pairs},T={length},forgetting={config.forgetting},keys={len(ids.keys)}"
        if reason := fits(model, length):
            yield Measurement(
                "recall_accuracy", None, length, axes=axes, metric_id=name, status="unsupported", reason=reason
            )
            continue
        chosen = choices(model, tokens, answers)
        asked = answers != NO_ANSWER
        shares = {"recall_accuracy": (chosen == answers)[asked].mean()}
        if config.forgetting:
            shares["recall_stale_share"] = (chosen == stale)[asked].mean()
        for metric, share in shares.items():
            yield Measurement(metric, float(share), length, axes=axes, weight=float(config.sequences), metric_id=name)
        yield Measurement("state_bytes", model.state_bytes(1, length), length, axes={"pairs": pairs, "axis": axis})
