"""Does a model find five digits that it read once, at any depth of a longer text?

Protocol: a sentence with a key of five digits is hidden in a haystack at a depth from its start (0) to its end (100 %); behind the
haystack the sentence is begun again and the key is asked for. Three scores, none of which needs free generation: ``needle_accuracy``,
every digit is the likeliest byte given those before it; ``needle_rank_accuracy``, the key is the likeliest of ten candidates (chance
10 %), among them the keys of distractor sentences; ``needle_bits_per_byte``, bits per digit. Prompts are bytes, the same for every model.
One prefill per prompt; candidates branch from forks of that stream.

``haystack`` 1 is one sentence over and over, 2 held-out text, 3 held-out text with nine distractor sentences. ``tuned=1`` lets each model
practise first, on a fixed budget of prompts no longer than the training context mixed into its text; tests go beyond that.

Source: the needle test of Kamradt (2023) for the idea; scores by teacher forcing follow from what small models can do.

Legend: B prompts, T bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bdh_bench.data.corpus import refuse_test
from bdh_bench.tasks._exercises import NO_ANSWER, Ids, dataset, fits, generator
from bdh_bench.tasks._scoring import PIECE, bits
from bdh_bench.types import Measurement, TaskContext

DEFAULTS = {
    "metric": "needle_rank_accuracy",
    "cell_axes": ("seed", "context"),
    "trains": True,
    "reads": True,
    "practises": "tuned",
    "context_factors": (1, 4),
}

_DEPTHS = (0, 25, 50, 75, 100)
_CANDIDATES, _DIGITS = 10, 5
_NEEDLE, _QUESTION = "The secret number of {who} is {key}. ", "\nThe secret number of {who} is "
_NAMES = ("Anna", "Boris", "Clara", "David", "Emil", "Flora", "Georg", "Hilda", "Ivan", "Jane")
_FILLER = "The grass is green, the sky is blue, the sun is yellow and the road goes on and on. "
#: Bytes of a prompt that are no haystack, at the most.
_OVERHEAD = 512


@dataclass(frozen=True)
class Config:
    """What is asked.

    prompts   per depth
    haystack  1 is one sentence over and over, 2 held-out text, 3 the same with nine distractors
    tuned     1 practises first
    cap       practised prompts at the most
    batch     prompts in a training step
    block     chooses the documents, with blocks, as long_ppl does
    blocks    see block
    """

    prompts: int = 50
    haystack: int = 2
    tuned: int = 0
    cap: int = 20_000
    batch: int = 8
    block: int = 128
    blocks: int = 1


@dataclass(frozen=True)
class Prompt:
    """``text`` ends where the key is asked for; ``candidates`` are ten keys, the first of them the right one."""

    text: bytes
    candidates: tuple[bytes, ...]


def prompt(length: int, depth: int, haystack: int, documents: tuple[Any, ...], *identity: str | int) -> Prompt:
    """A prompt of exactly ``length`` bytes, made from its identity alone. Raises ValueError for one that is too short."""
    random = generator("needle", length, depth, haystack, *identity)
    keys = [f"{int(n):05}".encode() for n in random.choice(100_000, _CANDIDATES, replace=False)]
    names = [str(n) for n in random.permutation(_NAMES)]
    said = [_NEEDLE.format(who=who, key=key.decode()).encode() for who, key in zip(names, keys, strict=True)]
    question = _QUESTION.format(who=names[0]).encode()
    hidden = said if haystack == 3 else said[:1]
    room = length - len(question) - sum(map(len, hidden))
    if room < 0:
        raise ValueError(f"a prompt of {length} bytes has no room for the needle and its question")
    hay = _hay(room, haystack, documents, random)
    places = [room * depth // 100, *sorted(int(p) for p in random.integers(0, room + 1, len(hidden) - 1))]
    text = hay
    for place, needle in sorted(zip(places, hidden, strict=True), reverse=True):
        text = text[:place] + needle + text[place:]
    return Prompt(text + question, tuple(keys))


def _hay(room: int, haystack: int, documents: tuple[Any, ...], random: np.random.Generator) -> bytes:
    if haystack == 1:
        return (_FILLER.encode() * (room // len(_FILLER) + 1))[:room]
    content: bytes = documents[int(random.integers(len(documents)))].content
    while len(content) < room:
        content += documents[int(random.integers(len(documents)))].content
    start = int(random.integers(len(content) - room + 1))
    return content[start : start + room]


class Practice:
    """Short prompts mixed into text, one step in ten; see ``types.Exercises``."""

    enough, share_of_text, learning_rate = 0.95, 0.9, 1e-3

    def __init__(self, config: Config, documents: tuple[Any, ...], longest: int) -> None:
        refuse_test(documents)
        self.config, self.documents, self.longest = config, documents, longest
        self.rows, self.cap = config.batch, config.cap
        self.identity = f"needle {config} up to {longest}"

    def batch(self, split: str, index: int) -> tuple[Ids, Ids]:
        random = generator("needle practice", split, index)
        depth = int(random.integers(0, 101))
        made = []
        for row in range(self.rows):
            one = prompt(self.longest - _DIGITS, depth, min(self.config.haystack, 2), self.documents, split, index, row)
            made.append(np.frombuffer(one.text + one.candidates[0], dtype=np.uint8).astype(np.int64))
        tokens = np.stack(made)
        answers = np.full(tokens.shape, NO_ANSWER)
        answers[:, -_DIGITS:] = tokens[:, -_DIGITS:]
        return tokens, answers


def exercises(model: Any, config: Config, documents: tuple[Any, ...], longest: int) -> Practice:
    """What a model practises before this task, with ``tuned=1``; ``documents`` are training documents."""
    return Practice(config, documents, longest)


def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement]:
    """The three scores at every depth of the cell's context."""
    length = int(context.context or 0)
    impossible = _impossible(model, length)
    everything = (_bytes_of(one) for depth in _DEPTHS for one in _prompts(length, depth, config, context))
    same = dataset(context, everything) if not impossible else {}
    for done, depth in enumerate(_DEPTHS):
        context.progress("evaluate", done / len(_DEPTHS), {"context": length})
        axes: dict[str, Any] = {"depth_percent": depth, "haystack": config.haystack, "tuned": config.tuned, **same}
        name = f"needle@T={length},depth={depth},haystack={config.haystack},tuned={config.tuned}"
        if impossible:
            yield Measurement(
                "needle_rank_accuracy", None, length, axes=axes, metric_id=name, status="unsupported", reason=impossible
            )
            continue
        scored = np.stack([_scores(model, one) for one in _prompts(length, depth, config, context)])  # (B, 3)
        for metric, column in (("needle_accuracy", 0), ("needle_rank_accuracy", 1)):
            share, weight = float(scored[:, column].mean()), float(config.prompts)
            yield Measurement(metric, share, length, axes=axes, weight=weight, metric_id=name)
        for index, value in enumerate(scored[:, 2]):
            sample, weight = f"prompt{index:03}", float(_DIGITS)
            yield Measurement(
                "needle_bits_per_byte", float(value), length, axes=axes, sample=sample, weight=weight, metric_id=name
            )


def _prompts(length: int, depth: int, config: Config, context: TaskContext) -> Iterator[Prompt]:
    """The same ones every time, made one by one: long prompts would fill the memory."""
    for index in range(config.prompts):
        yield prompt(length, depth, config.haystack, context.documents, "test", index)


def _bytes_of(one: Prompt) -> NDArray[np.uint8]:
    return np.frombuffer(one.text + b"".join(one.candidates), dtype=np.uint8)


def _impossible(model: Any, length: int) -> str:
    if model.tokenizer is not None:
        return "its tokens are not bytes, and digits of a key may share one"
    if length < _OVERHEAD // 2:
        return f"a prompt of {length} bytes has no room for a haystack"
    return fits(model, length + _DIGITS)


@torch.inference_mode()
def _scores(model: Any, one: Prompt) -> NDArray[np.float64]:
    """Exact (0 or 1), ranked first (0 or 1), bits per digit of the key."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    start = b"" if model.start_symbol is None else bytes([model.start_symbol])
    tokens = torch.tensor([list(start + one.text)], device=device)
    session = model.session(1)
    for piece in tokens[:, :-1].split(PIECE, 1):
        session.extend(piece)
    per_candidate: list[NDArray[np.float32]] = []
    exact = False
    for number, key in enumerate(one.candidates):
        digits = torch.tensor([list(key)], device=device)
        read = torch.cat((tokens[:, -1:], digits[:, :-1]), 1)
        logits = session.fork().extend(read, keep="all")
        if number == 0:
            exact = bool((logits.argmax(-1) == digits).all())
        per_candidate.append(bits(logits, digits)[0])
    sums = [float(part.astype(np.float64).sum()) for part in per_candidate]
    first = all(sums[0] < other for other in sums[1:])  # a tie is no success: a uniform model must not win
    return np.array([float(exact), float(first), sums[0] / _DIGITS])
