"""What is context worth to counting alone? A byte model without learning: n-grams of the training text and of the context itself.

For every order k the successors s of the last k bytes are counted: in the training text for k = 0 … 5, in the context for k = 2 … 5,
where a count weighs w. Orders are joined from the lowest up as Witten and Bell (1991) do, with an escape e for each distinct successor:

    p_k(s) = (n_k(s) + e · D_k · p_{k−1}(s)) / (N_k + e · D_k),      p_{−1} = 1/256,   N_k = Σ n_k,   D_k distinct successors

Then a match model (Mahoney's lpaq): the newest earlier place in the context whose last L ≥ 8 bytes are the same (L is followed up to
32) names its successor, believed by 0.8 − 4/L. w, e and the belief were chosen on validation text of the standard library.

The state is the bytes read so far, one byte per token; every count of the context is made from them anew in each call, with sorted
tables on the CPU. This is a yardstick and no contender: what a learned model gains from context is read against it.

Legend: B streams, T tokens of a call, N known tokens, Q places to predict; a place is the number of tokens before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bdh_bench.errors import SpecError
from bdh_bench.models._growing import GrowingMemory
from bdh_bench.session import Streaming
from bdh_bench.types import Keep

DEFAULTS = {
    "kind": "yardstick",
    "architecture": "counts of the training text and of the context, and the longest match; nothing is learnt by gradient",
    "learning_rate": 0.0,
    "position_limit": "none",
}

_REACH = 8  # bytes of context in a sortable key; a match is at least as long
_LONGEST_MATCH = 32
_LOWEST_CACHED = 2  # below it the training text knows as much, and the places of one byte are many
_TOGETHER = 512  # places answered from one sorted index; bounds what is held, changes no number

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Config:
    """How counts become probabilities.

    orders  longest counted context
    weight  w, what a count from the context weighs
    escape  e, what each distinct successor leaves for shorter contexts
    """

    orders: int = 5
    weight: float = 8.0
    escape: float = 4.0


class Model(Streaming, nn.Module):
    """Counts of the training text (buffers, empty before ``fit``) and of the stream's own bytes."""

    vocab_size = 256
    trainable = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        if not 0 <= config.orders < _REACH - 1 or config.weight < 0 or config.escape <= 0:
            raise SpecError(f"got {config} · expected 0 to {_REACH - 2} orders, weight at least 0, escape above 0")
        self.config = config
        # No elements: it only carries the device and dtype that the model was moved to.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        for order in range(config.orders + 1):
            self.register_buffer(f"grams_{order}", torch.empty(0, dtype=torch.long))
            self.register_buffer(f"counts_{order}", torch.empty(0, dtype=torch.long))

    def fit(self, rows: Iterable[Bytes]) -> None:
        """Count the training text, given in rows of consecutive bytes; no n-gram reaches over the edge of a row."""
        parts = list(rows)
        text = np.concatenate(parts).astype(np.int64)
        inside = np.concatenate([np.arange(len(part)) for part in parts])  # place in the own row
        gram = np.zeros(len(text), dtype=np.int64)  # a byte with the bytes before it, the byte itself lowest
        for order in range(self.config.orders + 1):
            gram[order:] += text[: max(len(text) - order, 0)] << 8 * order
            grams, counts = np.unique(gram[inside >= order], return_counts=True)
            self.register_buffer(f"grams_{order}", torch.from_numpy(grams).to(self.place.device))
            self.register_buffer(f"counts_{order}", torch.from_numpy(counts).to(self.place.device))

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, V)."""
        return self._answers(tokens, tokens.shape[1])

    forward = logits

    def memory(self, batch_size: int) -> GrowingMemory:
        """No bytes yet."""
        return GrowingMemory({"text": 1})

    def advance(self, memory: GrowingMemory, position: int, tokens: Tensor, keep: Keep) -> Tensor:
        """Remember the tokens; answer after each of them, or after the last."""
        text = memory.parts["text"].append(tokens.to(torch.uint8))  # (B, N)
        return self._answers(text, tokens.shape[1] if keep == "all" else 1)

    def _answers(self, text: Tensor, last: int) -> Tensor:
        """Log-probabilities (B, last, V) after each of the last tokens of text (B, N)."""
        rows = text.to("cpu", torch.uint8).numpy()
        end = rows.shape[1] + 1
        pieces = [(q, min(q + _TOGETHER, end)) for q in range(end - last, end, _TOGETHER)]
        answers = np.stack(
            [np.concatenate([self._row(row[: b - 1], np.arange(a, b)) for a, b in pieces]) for row in rows]
        )
        return torch.from_numpy(answers).to(self.place)

    def _row(self, text: Bytes, places: Integers) -> Floats:
        """Log-probabilities (Q, V) of the byte at each place, from the bytes of ``text`` before that place."""
        index = _Index(text, places)
        p = np.full((len(places), 256), 1 / 256)
        for order in range(self.config.orders + 1):
            counts = self._trained(text, places, order)
            if order >= _LOWEST_CACHED:
                counts += self.config.weight * index.counts(order)
            distinct = np.maximum((counts > 0).sum(1, keepdims=True), 1)
            escape = self.config.escape * distinct  # where nothing is known, any escape leaves p as it is
            p = (counts + escape * p) / (counts.sum(1, keepdims=True) + escape)
        where, length = index.match()
        belief = np.where(length, 0.8 - 4 / np.maximum(length, 1), 0.0)
        p *= 1 - belief[:, None]
        p[np.arange(len(p)), text[where]] += belief
        logarithms: Floats = np.log(p)
        return logarithms

    def state_bytes(self, batch_size: int, context: int) -> int:
        """One byte per token."""
        return batch_size * context

    def flops_per_token(self, context: int, mode: str = "recurrent") -> float:
        """Comparisons and additions of counts, no products of weights."""
        return 0.0

    def kernels(self) -> str:
        """What runs here."""
        return "numpy tables"

    def _trained(self, text: Bytes, places: Integers, order: int) -> Floats:
        """How often each byte followed the last ``order`` bytes in the training text, (Q, V)."""
        grams, counts = (getattr(self, f"{name}_{order}").cpu().numpy() for name in ("grams", "counts"))
        context = sum((text[np.maximum(places - 1 - i, 0)].astype(np.int64) << 8 * i for i in range(order)), 0 * places)
        first, stop = (np.searchsorted(grams, (context + i) << 8) for i in (0, 1))
        query, entry = _expand(first, np.where(places >= order, stop, first))
        return _table(query, grams[entry] & 255, len(places), counts[entry])


class _Index:
    """The places of a text, sorted by the bytes before them, newest first: places with the same last k bytes lie together."""

    def __init__(self, text: Bytes, places: Integers) -> None:
        self.text, self.places = text, places
        padded = np.concatenate((np.zeros(_REACH, np.uint8), text)).astype(np.uint64)
        keys = np.zeros(len(text) + 1, np.uint64)  # the last _REACH bytes before each place
        for back in range(_REACH):
            keys |= padded[_REACH - 1 - back :][: len(keys)] << np.uint64(8 * (_REACH - 1 - back))
        self.wanted = keys[places]
        self.sorted_places = np.argsort(keys[:-1], kind="stable")
        self.sorted_keys = keys[self.sorted_places]

    def _earlier(self, order: int) -> tuple[Integers, Integers]:
        """Pairs (number of the query, earlier place) that have the last ``order`` bytes in common."""
        free = np.uint64((1 << 8 * (_REACH - order)) - 1)
        first = np.searchsorted(self.sorted_keys, self.wanted & ~free, "left")
        stop = np.searchsorted(self.sorted_keys, self.wanted | free, "right")
        query, entry = _expand(first, stop)
        place = self.sorted_places[entry]
        kept = (order <= place) & (
            place < self.places[query]
        )  # a later byte is the future; an early one has no such context
        return query[kept], place[kept]

    def counts(self, order: int) -> Floats:
        """How often each byte followed the last ``order`` bytes earlier in this text, (Q, V)."""
        query, place = self._earlier(order)
        return _table(query, self.text[place], len(self.places))

    def match(self) -> tuple[Integers, Integers]:
        """The newest earlier place with the same last bytes, and how many they are (0: none, and the place means nothing)."""
        query, place = self._earlier(_REACH)
        where = np.zeros(len(self.places), dtype=np.int64)
        np.maximum.at(where, query, place)
        alive = where > 0
        length = np.where(alive, _REACH, 0)
        for back in range(_REACH + 1, _LONGEST_MATCH + 1):
            alive = alive & (where >= back)
            alive[alive] = self.text[where[alive] - back] == self.text[self.places[alive] - back]
            length[alive] = back
        return where, length


def _expand(first: Integers, stop: Integers) -> tuple[Integers, Integers]:
    """Every index of the ranges [first, stop), with the number of its range."""
    sizes = stop - first
    number = np.repeat(np.arange(len(first)), sizes)
    return number, np.arange(len(number)) - np.repeat(np.cumsum(sizes) - sizes - first, sizes)


def _table(query: Integers, byte: NDArray[Any], queries: int, weights: Integers | None = None) -> Floats:
    """Sums by query and byte, (Q, V)."""
    sums = np.bincount(query * 256 + byte, weights=weights, minlength=queries * 256)
    return sums.reshape(queries, 256).astype(np.float64)
