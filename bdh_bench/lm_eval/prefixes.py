"""How are many continuations scored when their contexts begin alike, every distinct token read once?

Requests sorted by their tokens are a walk through a trie. Where a later request turns off, the stream is forked and kept; the later
request goes on from there. What a request needs before the turning is known already: the scores along the walk are kept too. Four
choices over one context read that context once; a few-shot header is one shared node.

Kept states are bounded by a byte budget. The least recently used one goes first, and what it held is read again: the budget changes
the tokens read, never a score.

Legend: N tokens of a request (context and continuation), V vocabulary.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdh_bench.errors import PositionLimitError, SpecError
from bdh_bench.session import storage_bytes
from bdh_bench.tasks._scoring import PIECE, bits

DEFAULT_BUDGET_BYTES = 192 * 2**20  # one state of BDH at its published size


@dataclass(frozen=True)
class Request:
    """Token ids (N,): context, then continuation, which begins at ``first`` ≥ 1 (something must come before it)."""

    ids: NDArray[np.int64]
    first: int


@dataclass(frozen=True)
class Scored:
    """Natural log-likelihoods of the continuation's tokens, float64, and whether each was the model's first choice."""

    nats: NDArray[np.float64]
    greedy: NDArray[np.bool_]


class StateStore:
    """Forked streams by depth along the walk, with the logits behind each, within a budget of bytes."""

    def __init__(self, budget: int) -> None:
        if budget < 0:
            raise SpecError(f"got a state budget of {budget} bytes · expected 0 or more")
        self.budget = budget
        self.held = 0
        self.peak = 0
        self._kept: OrderedDict[int, tuple[Any, Tensor, int]] = OrderedDict()

    def keep(self, depth: int, session: Any, logits: Tensor) -> None:
        """Fork ``session`` and keep it, if the budget allows one such state at all; the least recently used make room."""
        expected = storage_bytes([*session.state(), logits])
        if depth in self._kept or expected > self.budget:
            return
        self._make_room(expected)
        fork, copied = session.fork(), logits.clone()
        size = storage_bytes([*fork.state(), copied])
        self._make_room(size)
        if self.held + size > self.budget:  # a fork may be larger than what it was made from
            return
        self._kept[depth] = (fork, copied, size)
        self.held += size
        self.peak = max(self.peak, self.held)

    def nearest(self, depth: int, again: Collection[int]) -> tuple[int, Any, Tensor] | None:
        """The deepest kept stream at most at ``depth``, with its depth and logits; None without one.

        A stream whose depth will be needed ``again`` stays, and a fork of it is given.
        """
        found = max((d for d in self._kept if d <= depth), default=0)
        if not found:
            return None
        session, logits, _ = self._kept[found]
        if found in again:
            self._kept.move_to_end(found)
            return found, session.fork(), logits
        self.drop(found)
        return found, session, logits

    def drop(self, depth: int) -> None:
        """Forget the stream at this depth."""
        self.held -= self._kept.pop(depth)[2]

    def cut(self, depth: int) -> None:
        """Forget every stream deeper than ``depth``: the walk has turned off before it."""
        for deeper in [d for d in self._kept if d > depth]:
            self.drop(deeper)

    def _make_room(self, size: int) -> None:
        while self._kept and self.held + size > self.budget:
            self.drop(next(iter(self._kept)))


class PrefixScorer:
    """Scores requests for one model; ``tokens_read`` counts what went through it, ``tokens_alone`` what would have, one by one."""

    def __init__(self, model: Any, budget: int = DEFAULT_BUDGET_BYTES, reuse: bool = True) -> None:
        self.model = model
        self.store = StateStore(budget)
        self.reuse = reuse
        self.tokens_read = 0
        self.tokens_alone = 0
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Scored]]:
        """(index of the request, its scores), in the order of the walk.

        Raises PositionLimitError before anything is read where a request is longer than the model's positions.
        """
        self._check(requests)
        self.tokens_alone += sum(max(0, len(r.ids) - 1) for r in requests)
        order = sorted(range(len(requests)), key=lambda i: requests[i].ids.astype(">u4").tobytes())
        walk = [requests[i] for i in order]
        shared = _shared(walk) if self.reuse else [0] * len(walk)
        ahead = _ahead(walk, shared)
        path = _Path(0)
        for index, request, turned, (turns, first) in zip(order, walk, shared, ahead, strict=True):
            self.store.cut(turned)
            path = path.up_to(turned, len(request.ids))
            if not path.known(request.first):
                self._read(request.ids, turned, turns, first, path)
            yield index, path.scored(request.first)
        self.store.cut(0)

    def _read(self, ids: NDArray[np.int64], turned: int, turns: tuple[int, ...], first: int, path: _Path) -> None:
        """Put this request's tokens through the model from where the walk turned; note the scores from position ``first`` on."""
        last = len(ids) - 1  # the last token is a target only
        kept = self.store.nearest(min(turned, last), turns)
        depth, session, logits = kept or (0, self.model.session(1), None)
        if logits is not None:
            path.note(depth, logits, ids)
        for start, stop in _pieces(depth, last, (*turns, first - 1)):
            wanted = stop >= first
            tokens = torch.from_numpy(ids[start:stop])[None].to(self._device)
            logits = session.extend(tokens, keep="all" if wanted else "last")
            self.tokens_read += stop - start
            if wanted:
                path.note(start + 1, logits, ids)
            if stop in turns:
                self.store.keep(stop, session, logits[:, -1:])

    def _check(self, requests: Sequence[Request]) -> None:
        limit = self.model.max_positions
        for request in requests:
            if request.first < 1:
                raise SpecError("got a continuation with nothing before it · expected at least one token of context")
            if limit is not None and len(request.ids) - 1 > limit:
                raise PositionLimitError(
                    f"a context and its continuation have {len(request.ids) - 1:,} tokens to read · this model has {limit:,} positions",
                    "use a model with more positions; inputs are never truncated",
                )


class _Path:
    """The walk's scores by position: natural log-likelihood of each token after those before it; NaN where not known."""

    def __init__(self, length: int) -> None:
        self.nats = np.full(length, np.nan)
        self.greedy = np.zeros(length, dtype=bool)

    def up_to(self, shared: int, length: int) -> _Path:
        """A path of ``length`` tokens that knows of this one what lies before ``shared``."""
        path = _Path(length)
        path.nats[:shared], path.greedy[:shared] = self.nats[:shared], self.greedy[:shared]
        return path

    def known(self, first: int) -> bool:
        return not np.isnan(self.nats[first:]).any()

    def note(self, position: int, logits: Tensor, ids: NDArray[np.int64]) -> None:
        """Logits (1, N, V) predict the tokens from ``position`` on."""
        targets = torch.from_numpy(ids[position : position + logits.shape[1]])[None].to(logits.device)
        span = slice(position, position + targets.shape[1])
        self.nats[span] = bits(logits, targets)[0].astype(np.float64) * -math.log(2)
        self.greedy[span] = (logits.argmax(-1) == targets)[0].cpu().numpy()

    def scored(self, first: int) -> Scored:
        assert self.known(first), "a score was asked for that no request on the walk computed"
        return Scored(self.nats[first:].copy(), self.greedy[first:].copy())


def _shared(walk: Sequence[Request]) -> list[int]:
    """By place in the walk: how many tokens the request shares with the one before it; a start symbol alone is not worth a state."""
    common = [_common(a.ids, b.ids) for a, b in pairwise(walk)]
    return [0, *(c if c > 1 else 0 for c in common)][: len(walk)]


def _common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def _ahead(walk: Sequence[Request], shared: Sequence[int]) -> list[tuple[tuple[int, ...], int]]:
    """By place: depths at which later requests turn off, and the first position whose score it or a request that shares it needs.

    From the last place to the first; ``turns`` are (depth, smallest ``first`` of the requests behind it), depths rising.
    """
    result: list[tuple[tuple[int, ...], int]] = []
    turns: list[tuple[int, int]] = []
    for place in range(len(walk) - 1, -1, -1):
        request = walk[place]
        depths = {min(depth, len(request.ids) - 1) for depth, _ in turns}
        firsts = [first for depth, first in turns if first < depth]
        result.append((tuple(sorted(depths)), min([request.first, *firsts])))
        behind = [request.first, *(first for depth, first in turns if depth >= shared[place])]
        turns = [turn for turn in turns if turn[0] < shared[place]]
        turns += [(shared[place], min(behind))] if shared[place] else []
    return result[::-1]


def _pieces(start: int, stop: int, cuts: Collection[int]) -> Iterator[tuple[int, int]]:
    """Pieces of at most PIECE tokens that end at every cut."""
    edges = sorted({c for c in cuts if start < c < stop} | {stop})
    for edge in edges:
        while start < edge:
            end = min(start + PIECE, edge)
            yield start, end
            start = end
