"""May a number of this model be stored? Its gates, asked once for the same weights, code, types and device.

    golden       the instruments themselves on models with a known answer: 8 bits per byte, 0 bits, and an error that must be seen
    reference    logits equal stored ones of the published code, where the model's file offers them (``reference_check``)
    phase        the angle of every rotating pair past the last position of the cell, where the model offers it (``phases``)
    numerics     finite logits and a finite state, whose norm is kept
    parity       the whole text at once = every form the model offers = pieces of 1, 7, 64, 777 tokens and of mixed lengths
    census       bytes of the live state = the model's formula, after every piece (after the last of single tokens)
    batch        a stream alone = the same stream among others
    truncation   as many predictions as tokens, and a text past the last position is refused
    splits       no document that is scored was there to train or to choose on

Bounds: where weights and state have at least 32 bits, logits are at most 1e-4 · max(1, their standard deviation) apart. Where they are
narrower (a quantised cache too) the mean Kullback-Leibler divergence from the same model in float32 is at most 1e-3 nats, and at most a
quarter of what forgetting the first half of the text does: logits of small weights hardly depend on the past, and a lost state would
hide below 1e-3.

Hooks of a model, which both may leave out: ``reference_check()`` yields (what it was, logits got, logits expected) for small stored
weights in this model's options, on its device; ``phases(position)`` gives turns per token, cosine and sine of every pair as a stream
uses them at that position, or None. A float32 phase is off by 4e-4 at 8 thousand positions and by 6e-3 at 131 thousand; at most 1e-3.

Lengths: 65 and 777 tokens, with ``--gate full`` 2,049 too, 65 alone for smoke runs; a position limit shortens them. At 65 tokens in
pieces of 7 and 64 only are read: models without weights, whose answers are known, and sessions that say they read the whole text again
with every piece (path ``recompute``), which are exact by construction and cost a square.
Processor time of one core at quick size: 0.4 s (lstm) to 3.2 s (mamba2), 1.8 s for bdh; ``full`` 0.6 s to 11 s; a smoke run at most
0.3 s; the instruments 0.005 s.

The gates run after the task in its process and before anything of it is stored: before it they would change what the task measures (peaks
of memory, warm caches) in the first cell of a model and not in the next, which finds them passed. Rows of gates that were passed are kept
as ``<cache>/gates/<key>.json``; a gate that fails is measured again every time.

Gates that need a task's own text (leak, ledger, the census at its context) are in the task; it tells ``TaskContext.passed``.

Legend: B streams, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdh_bench.errors import LawError, PositionLimitError
from bdh_bench.folders import cache_folder
from bdh_bench.loading import load_model
from bdh_bench.measure.clock import now_s
from bdh_bench.results.store import canonical
from bdh_bench.session import fingerprint
from bdh_bench.sources import source_digest
from bdh_bench.tasks._scoring import score_after, score_document

LENGTHS = {"smoke": (65,), "standard": (65, 777), "full": (65, 777, 2049)}
TOLERANCE = 1e-4
DIVERGENCE = 1e-3
_PIECES = ((1,), (7,), (64,), (777,), (64, 1, 7, 1))
_FEW_PIECES = ((7,), (64,))
_FORMS = ("parallel", "chunked")
_STREAMS = 3
_ROUNDING = (
    1e-5  # nats at logits of deviation 1: what rounding to a narrow type explains, however little the past matters
)
_LARGEST_LIMIT = 2**20
PHASE = 1e-3  # radians


@dataclass(frozen=True)
class Found:
    """One gate on one model: kept where ``error`` is at most ``bound``. ``length`` in tokens, 0 where it has no meaning."""

    gate: str
    error: float
    bound: float
    length: int = 0
    about: str = ""
    state_norm: float | None = None

    @property
    def kept(self) -> bool:
        return self.error <= self.bound  # False for NaN

    def row(self, seconds: float) -> dict[str, Any]:
        """What a cell's facts carry; an error that is no number is None, and ``about`` says so."""
        finite = math.isfinite(self.error)
        about = self.about if finite else f"{self.about or 'measured'}: {self.error}"
        norm = {"state_norm": self.state_norm} if self.state_norm is not None else {}
        return {
            "gate": self.gate,
            "kept": self.kept,
            "error": self.error if finite else None,
            "bound": self.bound,
            "length": self.length,
            "about": about,
            "seconds": round(seconds, 4),
            "cached": False,
            **norm,
        }


def hold(model: Any, module: str, level: str, rows: list[dict[str, Any]]) -> None:
    """Append a row for every gate to ``rows``. Raises LawError at the first one that fails, its row appended too.

    ``module`` is the model's own source file as a module name; ``level`` a key of ``LENGTHS``.
    """
    level = level if _has_weights(model) else "smoke"
    scoring = ("bdh_bench.tasks._scoring", "bdh_bench.models.toy", __name__)
    _once(_key(source_digest(*scoring), ""), golden, rows)
    code = source_digest(module, __name__)
    _once(_key(code, fingerprint(model), _types(model), level), lambda: gates_of(model, LENGTHS[level]), rows)


def splits(documents: Iterable[Any], seen: Iterable[Any]) -> Found:
    """Whether each of ``documents``, about to be scored, is a test document and none of those ``seen`` in training or validation."""
    known = {document.name for document in seen}
    wrong = sum(document.split != "test" or document.name in known for document in documents)
    return Found("splits", float(wrong), 0.0, about="documents that are scored and not kept for it")


def _once(key: str, measure: Callable[[], Iterator[Found]], rows: list[dict[str, Any]]) -> None:
    """The rows kept under ``key``, else those that are measured now."""
    path = cache_folder() / "gates" / f"{key[:32]}.json"
    if (known := _read(path)) is not None:
        rows += [{**row, "cached": True} for row in known]
        return
    fresh: list[dict[str, Any]] = []
    started = now_s()
    for found in measure():
        fresh.append(found.row(now_s() - started))
        rows.append(fresh[-1])
        if not found.kept:
            raise failure(found)
        started = now_s()
    _write(path, fresh)


def failure(found: Found) -> LawError:
    """The error that stores this gate as failed."""
    where = f" at {found.length:,} tokens" if found.length else ""
    about = f" ({found.about})" if found.about else ""
    return LawError(
        f"{found.gate}{where}{about}: measured {found.error:.3g} · expected at most {found.bound:.3g}",
        "bdh-bench check shows every law of a model",
        found.gate,
        found.error,
        found.bound,
    )


def _key(*parts: str) -> str:
    return hashlib.sha256(canonical([*parts, torch.__version__]).encode()).hexdigest()


def _types(model: Any) -> str:
    device = _device(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return " ".join((name, *sorted({str(p.dtype) for p in model.parameters()})))


def _read(path: Path) -> list[dict[str, Any]] | None:
    """Rows of gates that were all kept, else None: a damaged file is as good as none."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        sound = isinstance(rows, list) and bool(rows) and all(row["kept"] is True for row in rows)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return rows if sound else None


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Keep the rows; where the cache cannot be written, they are measured again next time."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        partial.replace(path)


# -- the instruments ---------------------------------------------------------------------------------------------------


def golden() -> Iterator[Found]:
    """Known answers on a text that repeats a block of 64 bytes, scored as every model is."""
    block = np.random.default_rng(0).integers(256, size=64).astype(np.uint8)
    text = np.tile(block, 8)
    contexts, targets = text[None, :256], text[None, 256:384]
    uniform, copyist, late = (load_model(f"toy:{word}") for word in ("uniform", "copy", "copy:period=63"))
    yield Found(
        "golden", float(np.abs(score_after(uniform, contexts, targets) - 8).max()), 0.0, about="uniform: 8 bits"
    )
    yield Found("golden", float(score_after(copyist, contexts, targets).max()), 0.0, about="copy: 0 bits")
    missed = 8 - min(8.0, float(score_after(late, contexts, targets).mean()))
    yield Found("golden", missed, 0.0, about="copy off by one: at least 8 bits")
    units = score_document(uniform, text.tobytes())
    unpaid = abs(units.byte_count - text.size) + abs(len(units.bits) - text.size)
    yield Found("golden", float(unpaid), 0.0, about="scored bytes = bytes of the text")


# -- a model -----------------------------------------------------------------------------------------------------------


def gates_of(model: Any, lengths: tuple[int, ...]) -> Iterator[Found]:
    """Every gate of a model in eval mode, the cheapest first."""
    again = model.session(1).facts().get("path") == "recompute"
    limit = model.max_positions
    chosen = sorted({min(n, limit or n) for n in (lengths[:1] if again else lengths)})
    yield from reference(model)
    yield from _truncation(model, chosen[0])
    for length in chosen:
        yield from _parity(model, length, _FEW_PIECES if again or not _has_weights(model) else _PIECES)
    yield from _batch(model, chosen[-1])


@torch.inference_mode()
def reference(model: Any) -> Iterator[Found]:
    """The published code's logits, as far as this model knows them."""
    for about, got, expected in model.reference_check() if hasattr(model, "reference_check") else ():
        same = got.shape == expected.shape
        error = float((got.double() - expected.to(got.device).double()).abs().max()) if same else math.inf
        bound = TOLERANCE * max(1.0, float(expected.std()))
        yield Found("reference", error, bound, expected.shape[1], f"largest |Δ logit|, {about}")


@torch.inference_mode()
def phase(model: Any, position: int) -> list[Found]:
    """How far cosine and sine at an odd position are from those of the exact angle; nothing of a model without such pairs.

    The exact angle: a float32 frequency times a position below 2^29 has no rounding in float64.
    """
    used = model.phases(position) if hasattr(model, "phases") else None
    if used is None:
        return []
    turns, cos, sin = (t.detach().cpu().double().flatten() for t in used)
    angle = (turns * position).remainder(1.0) * (2 * math.pi)
    error = float(torch.stack((cos - angle.cos(), sin - angle.sin())).abs().max())
    return [Found("phase", error, PHASE, position, "largest error of a cosine or sine")]


@torch.inference_mode()
def _truncation(model: Any, length: int) -> Iterator[Found]:
    tokens = _text(model, 1, length)
    session = model.session(1)
    got = session.extend(tokens, keep="all")
    lost = abs(got.shape[1] - length) + abs(session.length - length) + abs(model.logits(tokens).shape[1] - length)
    accepted = 0
    limit = model.max_positions
    if limit is not None and limit < _LARGEST_LIMIT:
        beyond = _text(model, 1, limit + 1)
        accepted = _accepts(lambda: model.logits(beyond)) + _accepts(lambda: model.session(1).extend(beyond))
    about = "tokens without a prediction, and texts past the last position that were read"
    yield Found("truncation", float(lost + accepted), 0.0, length, about)


def _accepts(read: Callable[[], Any]) -> int:
    try:
        read()
    except PositionLimitError:
        return 0
    return 1


def _parity(model: Any, length: int, pieces: tuple[tuple[int, ...], ...]) -> Iterator[Found]:
    """Numerics, parity and census at one length."""
    with torch.inference_mode():
        tokens = _text(model, 1, length)
        own = model.logits(tokens)
        session = model.session(1)
        streamed = session.extend(tokens, keep="all")
        finite = all(bool(torch.isfinite(x).all()) for x in (own, streamed))
        norm = _norm(session.state())
        sound = 0.0 if finite and math.isfinite(norm) else math.nan
        kept = norm if math.isfinite(norm) else None
    yield Found("numerics", sound, 0.0, length, "logits and state are finite", kept)
    with torch.inference_mode():
        judge = _Judge(model, tokens, own, session.state())
        errors = {f"form {name}": judge.error(form.logits(tokens)) for name, form in _forms(model)}
        errors["whole text in one piece"] = judge.error(streamed)
        if judge.reference is not model:
            errors["whole text against float32"] = judge.error(own)
        apart = 0
        for cuts in pieces:
            got, bytes_apart = _read_in(model, tokens, cuts)
            errors[f"pieces of {', '.join(map(str, cuts))}"] = judge.error(got)
            apart = max(apart, bytes_apart)
    worst = max(errors, key=lambda way: math.inf if math.isnan(errors[way]) else errors[way])
    yield Found("parity", errors[worst], judge.bound, length, f"{judge.measure}, {worst} of {len(errors)} ways")
    yield Found("census", float(apart), 0.0, length, "state bytes − formula")


@torch.inference_mode()
def _batch(model: Any, length: int) -> Iterator[Found]:
    tokens = _text(model, _STREAMS, length)
    session = model.session(_STREAMS)
    ways = (torch.cat([session.extend(piece, keep="all") for piece in tokens.split(64, 1)], 1), model.logits(tokens))
    apart = abs(session.state_bytes - model.state_bytes(_STREAMS, length))
    worst: tuple[float, float, str] = (0.0, TOLERANCE, "")
    for row in range(_STREAMS):
        alone = tokens[row : row + 1]
        judge = _Judge(model, alone, model.logits(alone), session.state())
        for got in ways:
            error = judge.error(got[row : row + 1])
            if not error / judge.bound <= worst[0] / worst[1]:
                worst = error, judge.bound, judge.measure
    yield Found(
        "batch", worst[0], worst[1], length, f"{worst[2] or 'largest |Δ logit|'}, 1 stream − {_STREAMS} streams"
    )
    yield Found("census", float(apart), 0.0, length, f"state bytes − formula, {_STREAMS} streams")


class _Judge:
    """How far logits of one text are from the truth, and how far they may be."""

    def __init__(self, model: Any, tokens: Tensor, own: Tensor, state: list[Tensor]) -> None:
        widths = [p.itemsize for p in model.parameters() if p.is_floating_point()]
        self.exact = all(size >= 4 for size in (*widths, *(t.itemsize for t in state if t.numel())))
        self.reference = model if all(size >= 4 for size in widths) else copy.deepcopy(model).float()
        self.truth = own if self.reference is model else self.reference.logits(tokens)
        self.measure = "largest |Δ logit|" if self.exact else "mean divergence in nats"
        self.bound = TOLERANCE * max(1.0, float(self.truth.float().std())) if self.exact else self._least(tokens)

    def _least(self, tokens: Tensor) -> float:
        half = tokens.shape[1] // 2
        moved = _divergence(self.reference.logits(tokens[:, half:]), self.truth[:, half:]) if half else 0.0
        return min(DIVERGENCE, max(_ROUNDING * max(1.0, float(self.truth.float().var())), moved / 4))

    def error(self, got: Tensor) -> float:
        if got.shape != self.truth.shape:
            return math.inf
        if not self.exact:
            return _divergence(got, self.truth)
        return float((got.double() - self.truth.double()).abs().max())


def _divergence(got: Tensor, truth: Tensor) -> float:
    """Mean KL divergence in nats of the distributions over the next token."""
    p, q = truth.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _forms(model: Any) -> Iterator[tuple[str, Any]]:
    """The same weights in the other forms of the whole text that the model offers by its option ``mode``."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "mode", None) not in ("auto", "parallel", "chunked", "recurrent", "sparse"):
        return
    for form in _FORMS:
        if config.mode != form:
            other = copy.copy(model)  # the parameters are shared
            other.config = replace(config, mode=form)
            yield form, other


def _read_in(model: Any, tokens: Tensor, cuts: tuple[int, ...]) -> tuple[Tensor, int]:
    """Logits of a text in pieces, the cuts repeated; and the largest distance of the census from the formula on the way."""
    session, kept, start, apart = model.session(1), [], 0, 0
    for cut in cycle(cuts):
        kept.append(session.extend(tokens[:, start : start + cut], keep="all"))
        start = min(start + cut, tokens.shape[1])
        if cut > 1 or start == tokens.shape[1]:
            apart = max(apart, abs(session.state_bytes - model.state_bytes(1, start)))
        if start == tokens.shape[1]:
            return torch.cat(kept, 1), apart
    raise AssertionError("a cycle of cuts does not end")


def _text(model: Any, batch: int, length: int) -> Tensor:
    """Random tokens (B, T)."""
    return torch.randint(model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0)).to(
        _device(model)
    )


def _norm(state: list[Tensor]) -> float:
    """Euclidean norm over all floating-point tensors of a state."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in state if t.is_floating_point()))


def _has_weights(model: Any) -> bool:
    return any(t.numel() for t in model.state_dict().values())


def _device(model: Any) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
