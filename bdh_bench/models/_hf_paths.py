"""Which way of reading a published model in pieces gives the numbers of the whole text, and how many bytes does it keep?

The truth is one forward pass without a cache. Four ways are tried in this order, and the first exact one is used:

    cached      pieces of any length over the model's own cache
    stepwise    the same cache, one token at a time (some models drop their state in a longer piece)
    rowwise     pieces of any length, one stream at a time (some models mix the rows of a batch)
    recompute   the token ids are kept, and every piece reads the whole text again: always exact, never cheap

Exact: at most 1e-4 · max(1, deviation of the logits) apart in float32 and float64; in a narrower type a mean Kullback-Leibler
divergence of at most 1e-3. A way within that bound, yet far from what rounding does to the truth itself (the same text alone, in a
batch, or cut short), is in doubt: small weights hide a state that is dropped, since their logits hardly depend on the past. It is
used only if no other way is sixteen times as exact. ``moved`` is how far the logits move when the first half of the text is
forgotten; where that is not far above the bound, no measurement here could have seen a lost state.

State bytes: every tensor must follow ``fixed + per_token · min(context, window)`` at all lengths that were read, else the cache is
not used.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bdh_bench.models._hf_state import CacheMemory, Reader, RowsMemory, UnknownStateError, memory_for

#: Ways of reading over a cache, the best first.
CACHED = ("cached", "stepwise", "rowwise")
TOLERANCE = 1e-4
DIVERGENCE = 1e-3
_ROUNDINGS = 64
_LEAST = 2e-6  # where rounding happens to cancel
_BETTER = 16
_LENGTH = 150
_PIECES = (64, 1, 7, 1, 16, 60, 1)  # prefill, single tokens after long pieces, long pieces on a filled state
_ALONE = (1, 1, 1, 13)  # a single stream, from its first token on
_EXACT = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Growth:
    """Bytes per stream of one state tensor: ``fixed + per_token · min(context, window)``."""

    fixed: int = 0
    per_token: int = 0
    window: int | None = None

    def at(self, context: int) -> int:
        if context == 0:
            return 0
        return self.fixed + self.per_token * (context if self.window is None else min(context, self.window))


@dataclass(frozen=True)
class Verification:
    """What was measured. ``errors`` by way of reading (a way that could not be tried is missing, and in ``reasons``)."""

    path: str
    limit: float
    moved: float = 0.0
    errors: Mapping[str, float] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    growth: Mapping[str, Growth] = field(default_factory=dict)

    def bytes_per_stream(self, context: int) -> int:
        """State bytes of one stream after ``context`` tokens."""
        if self.path == "recompute":
            return 8 * context
        return sum(growth.at(context) for growth in self.growth.values())

    def told(self) -> str:
        """The way of reading, with the reason where it is not the best one."""
        if self.path == "cached":
            return "cached"
        why = [f"{way}: {self._why(way)}" for way in CACHED if way != self.path and self._why(way)]
        return self.path + (f" ({'; '.join(why)})" if why else "")

    def _why(self, way: str) -> str:
        if way in self.reasons:
            return self.reasons[way]
        if way not in self.errors:
            return ""
        if self.errors[way] <= self.limit and self.path in self.errors:
            return f"off by {self.errors[way]:.2g}, {self.path} by {self.errors[self.path]:.2g}"
        return f"off by {self.errors[way]:.2g}, at most {self.limit:.2g}"


@torch.inference_mode()
def verify(reader: Reader, vocab_size: int, limit: int | None, wanted: str) -> Verification:
    """Measure the ways of reading until one is exact; only that one where ``wanted`` names it."""
    if wanted == "recompute":
        return Verification("recompute", 0.0)
    weight = next(reader.module.parameters())
    length = min(_LENGTH, limit or _LENGTH)
    tokens = torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(0)).to(weight.device)
    truth = reader.whole(tokens)
    exact = weight.dtype in _EXACT
    bound, sure = _bounds(reader, tokens, truth) if exact else (DIVERGENCE, DIVERGENCE)
    half = length // 2
    moved = _distance(reader.whole(tokens[:, half:]), truth[:, half:]) if half else 0.0
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    try:
        reader.learn(weight.device)
    except UnknownStateError as error:
        return Verification("recompute", bound, moved, {}, {"cached": str(error)})
    except Exception as error:  # whatever transformers raises with a cache: it has no cached path then
        return Verification("recompute", bound, moved, {}, {"cached": _first_line(error)})
    growth: dict[str, dict[str, Growth]] = {}
    for path in CACHED if wanted == "auto" else (wanted,):
        try:
            got, census = _read(reader, tokens, path)
            both = torch.cat((truth, truth[:1]))
            errors[path] = _distance(got, both) if exact else _divergence(got, both)
            if errors[path] <= bound:
                growth[path] = _fit(census)
                if errors[path] <= sure:
                    break
        except UnknownStateError as error:
            reasons[path] = str(error)
        except Exception as error:  # as above
            reasons[path] = _first_line(error)
    best = min((errors[path] for path in growth), default=0.0)
    chosen = next((path for path in growth if errors[path] <= max(sure, _BETTER * best)), "recompute")
    return Verification(chosen, bound, moved, errors, reasons, growth.get(chosen, {}))


def _bounds(reader: Reader, tokens: Tensor, truth: Tensor) -> tuple[float, float]:
    """How far apart the logits of the right way of reading may be, and up to where that needs no second look."""
    scale = max(1.0, float(truth.std()))
    shorter = [max(1, tokens.shape[1] * part // 6) for part in (4, 1)]
    again = [(reader.whole(tokens[:, :n]), truth[:, :n]) for n in shorter]
    again.append((reader.whole(tokens[:1]), truth[:1]))
    rounding = max(_distance(a, b) for a, b in again)
    return TOLERANCE * scale, min(TOLERANCE * scale, max(_ROUNDINGS * rounding, _LEAST * scale))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"


def _read(reader: Reader, tokens: Tensor, path: str) -> tuple[Tensor, dict[int, dict[str, Any]]]:
    """Logits (B + 1, T, V) of a batch read in pieces, its first row again alone, and the sizes of the state on the way."""
    census: dict[int, dict[str, Any]] = {}
    kept = [_read_pieces(reader, tokens[:1], path, _ALONE, census), _read_pieces(reader, tokens, path, _PIECES, census)]
    return torch.cat(kept[::-1]), census


def _read_pieces(
    reader: Reader, tokens: Tensor, path: str, pieces: Sequence[int], census: dict[int, dict[str, Any]]
) -> Tensor:
    memory, kept = memory_for(path, reader, tokens.shape[0], tokens.device), []
    for start, stop in _cuts(tokens.shape[1], pieces):
        kept.append(memory.read(start, tokens[:, start:stop], "all"))
        if kept[-1].shape[1] != stop - start:
            streams, got = tokens.shape[0], kept[-1].shape[1]
            raise UnknownStateError(f"a piece of {stop - start} in {streams} streams gives {got} predictions each")
        census[stop] = _sizes(memory, tokens.shape[0])
    return torch.cat(kept, 1)


def _cuts(length: int, pieces: Sequence[int]) -> Iterator[tuple[int, int]]:
    ends = [0]
    for piece in (*pieces, length):
        ends.append(min(ends[-1] + piece, length))
    return ((a, b) for a, b in pairwise(ends) if b > a)


def _sizes(memory: CacheMemory | RowsMemory, batch: int) -> dict[str, tuple[int, int | None]]:
    """Bytes per stream of every state tensor, and the window of its layer."""
    if isinstance(memory, RowsMemory):
        memory, batch = memory.rows[0], 1
    found: dict[str, tuple[int, int | None]] = {}
    for path, tensor in memory.reader.state(memory.content).items():
        size, rest = divmod(tensor.numel() * tensor.itemsize, batch)
        if rest:
            raise UnknownStateError(f"{'.'.join(map(str, path))} of its cache is not a multiple of the batch")
        found[".".join(map(str, path))] = size, _window(memory.content, path)
    return found


def _window(content: Any, path: tuple[Any, ...]) -> int | None:
    """Tokens that a layer with a sliding window keeps: all that the next token may see besides itself."""
    for step in path[:-1]:
        content = content[step] if isinstance(content, dict | list | tuple) else getattr(content, step)
    window = getattr(content, "sliding_window", None)
    return int(window) - 1 if isinstance(window, int) else None


def _fit(census: Mapping[int, Mapping[str, tuple[int, int | None]]]) -> dict[str, Growth]:
    """The law of growth of every tensor, exact at every length of the census."""
    names = {name for sizes in census.values() for name in sizes}
    found: dict[str, Growth] = {}
    for name in sorted(names):
        sizes = {n: census[n].get(name, (0, None))[0] for n in census}
        window = next(entry[name][1] for entry in census.values() if name in entry)
        (n1, s1), (n2, s2) = (min(sizes.items()), max(sizes.items()))
        slope = (s2 - s1) // (n2 - n1) if n2 > n1 else 0
        candidates = [Growth(fixed=s1), Growth(fixed=s1 - slope * n1, per_token=slope)]
        if window:
            candidates.append(Growth(per_token=s1 // min(n1, window), window=window))
        fitting = [g for g in candidates if all(g.at(n) == size for n, size in sizes.items())]
        if not fitting:
            raise UnknownStateError(f"the bytes of {name} follow no law of growth")
        windowed = [g for g in fitting if g.window is not None and name.endswith((".keys", ".values"))]
        found[name] = (windowed or fitting)[0]  # a window longer than the text looks like no window
    return found


def _distance(got: Tensor, truth: Tensor) -> float:
    return float((got.float() - truth.float()).abs().max())


def _divergence(got: Tensor, truth: Tensor) -> float:
    """Mean KL divergence in nats of the distributions over the next token."""
    p, q = truth.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
