"""Does a model obey the contract that every number rests on? Each law is a measurement with a tolerance.

A law takes a model and returns its measured error; None means that the law has nothing to say about this model (a position
limit where there is none, gradients where nothing is trained). ``check`` runs all of them; a broken law is an answer, not an
exception, and an exception inside a law is an infinite error with its message as detail.

The truth is always ``logits`` on the whole text. Tolerances are in logits and the same for every model whose logits spread by
at most 1, as those of random weights do (about 0.2): text read in another order differs by some 1e-6 in float32, and a forgotten
state by 1e-2. Trained logits are larger and round in proportion: where the tolerance is rounding, ``check`` multiplies it by
their standard deviation. Only copies are trained; the model is as it was afterwards.

Legend: B batch, T tokens, V vocabulary, P position limit.
"""

from __future__ import annotations

import copy
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bdh_bench.errors import PositionLimitError, SessionError
from bdh_bench.loading import build
from bdh_bench.session import storage_bytes

#: Absolute difference of logits that rounding explains.
ROUNDING = 2e-5
EXACT = 0.0

_LONGEST = 8192


@dataclass(frozen=True)
class Law:
    """``measure`` returns the error of a model, or None where the law does not apply."""

    name: str
    measure: Callable[[Any], float | None]
    tolerance: float


@dataclass(frozen=True)
class Finding:
    """One law on one model. ``error`` is None where the law does not apply; that counts as kept."""

    law: str
    error: float | None
    tolerance: float
    detail: str = ""

    @property
    def applies(self) -> bool:
        return self.error is not None

    @property
    def kept(self) -> bool:
        return self.error is None or self.error <= self.tolerance  # False for NaN


def check(model: Any) -> Iterator[Finding]:
    """Every law on this model (in eval mode), one finding at a time."""
    scale = max(1.0, spread(model))
    for law in LAWS:
        yield find(law, model, scale)


def find(law: Law, model: Any, scale: float = 1.0) -> Finding:
    """One law on this model; ``scale`` widens tolerances of rounding."""
    tolerance = law.tolerance * scale if law.tolerance == ROUNDING else law.tolerance
    try:
        return Finding(law.name, law.measure(model), tolerance)
    except Exception as error:  # whatever a stranger's model raises is the finding
        return Finding(law.name, math.inf, tolerance, f"{type(error).__name__}: {error}")


@torch.inference_mode()
def spread(model: Any) -> float:
    """Standard deviation of the logits on random text; 0 where there is none (the laws then say why)."""
    try:
        found = float(model.logits(_text(model, 2, 64)).float().std())
    except Exception:  # the first law meets the same error and shows it
        return 0.0
    return found if math.isfinite(found) else 0.0


# -- what the laws share ----------------------------------------------------------------------------------------------


def _text(model: Any, batch: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens (B, T), no longer than the model's last position."""
    length = min(length, model.max_positions or length)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.randint(0, model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        raise ValueError(f"got logits of shape {tuple(a.shape)} · expected {tuple(b.shape)}")
    return float((a.float() - b.float()).abs().max()) if a.numel() else 0.0


def _read(session: Any, tokens: Tensor, cuts: list[int]) -> Tensor:
    """All logits of a text read in pieces; the list of cuts is repeated until the text ends."""
    kept, start = [], 0
    for cut in islice(cycle(cuts), tokens.shape[1]):
        kept.append(session.extend(tokens[:, start : start + cut], keep="all"))
        start += cut
        if start >= tokens.shape[1]:
            break
    return torch.cat(kept, 1)


def _trainable(model: Any) -> bool:
    return bool(getattr(model, "trainable", True)) and any(p.requires_grad for p in model.parameters())


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


def _gradients(model: Any, loss: Tensor) -> Tensor:
    """The gradient of every parameter, end to end; zeros where the loss does not depend on one."""
    weights = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(weights, found, strict=True)])


# -- pieces ------------------------------------------------------------------------------------------------------------


def _pieces(length: int, *cuts: int) -> Callable[[Any], float]:
    @torch.inference_mode()
    def measure(model: Any) -> float:
        tokens = _text(model, 2, length)
        return _distance(_read(model.session(2), tokens, list(cuts)), model.logits(tokens))

    return measure


def _pieces_with_gradients(model: Any) -> float:
    tokens = _text(model, 2, 24)
    with torch.enable_grad():
        got = _read(model.session(2), tokens, [5, 1])
    return _distance(got.detach(), model.logits(tokens).detach())


@torch.inference_mode()
def _last_of_all(model: Any) -> float:
    tokens = _text(model, 2, 70)
    whole = model.logits(tokens)
    if whole.shape != (*tokens.shape, model.vocab_size):
        raise ValueError(f"got logits of shape {tuple(whole.shape)} · expected {(*tokens.shape, model.vocab_size)}")
    session = model.session(2)
    first = session.extend(tokens[:, :66])
    second = session.extend(tokens[:, 66:69])
    third = session.extend(tokens[:, 69:])
    return _distance(torch.cat((first, second, third), 1), whole[:, [65, 68, 69]])


# -- independence ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _causality(model: Any) -> float:
    tokens = _text(model, 2, 80)
    other = _text(model, 2, 80, seed=1)
    worst = 0.0
    for cut in (1, 40, 67):
        changed = torch.cat((tokens[:, :cut], other[:, cut:]), 1)
        for read in (model.logits, lambda text: model.session(2).extend(text, keep="all")):
            worst = max(worst, _distance(read(changed)[:, :cut], read(tokens)[:, :cut]))
    return worst


@torch.inference_mode()
def _rows(model: Any) -> float:
    tokens = _text(model, 3, 40)
    together = model.session(3)
    worst = 0.0
    got = _read(together, tokens, [33, 1])
    whole = model.logits(tokens)
    for row in range(3):
        alone = tokens[row : row + 1]
        truth = model.logits(alone)
        worst = max(worst, _distance(whole[row : row + 1], truth), _distance(got[row : row + 1], truth))
    return worst


@torch.inference_mode()
def _fork(model: Any) -> float:
    tokens, other = _text(model, 2, 40), _text(model, 2, 40, seed=1)
    session = model.session(2)
    session.extend(tokens[:, :20])
    branch = session.fork()
    storages = [{t.untyped_storage().data_ptr() for t in s.state() if t.numel()} for s in (session, branch)]
    if storages[0] & storages[1]:
        raise ValueError("the fork shares memory with its origin")
    mixed = torch.cat((tokens[:, :20], other[:, 20:]), 1)
    kept: list[tuple[Tensor, Tensor]] = []
    for place in range(20, 40):  # in turns, so that each could disturb the other
        kept.append((branch.extend(other[:, place : place + 1]), session.extend(tokens[:, place : place + 1])))
    branched, went_on = (torch.cat(parts, 1) for parts in zip(*kept, strict=True))
    return max(_distance(branched, model.logits(mixed)[:, 20:]), _distance(went_on, model.logits(tokens)[:, 20:]))


@torch.inference_mode()
def _restore(model: Any) -> float:
    tokens = _text(model, 2, 40)
    session = model.session(2)
    session.extend(tokens[:, :25])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session.safetensors"
        session.save(path)
        expected = _read(session, tokens[:, 25:], [1, 3])
        again = model.restore(path)
    if again.length != 25:
        raise ValueError(f"got a restored session of length {again.length} · expected 25")
    return _distance(_read(again, tokens[:, 25:], [1, 3]), expected)


def _restore_elsewhere(model: Any) -> float | None:
    if not any(p.numel() for p in model.parameters()):
        return None
    other = copy.deepcopy(model)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        next(p for p in other.parameters() if p.numel()).add_(1e-3)
        path = Path(folder) / "session.safetensors"
        session = model.session(1)
        session.extend(_text(model, 1, 3))
        session.save(path)
        return _refused(lambda: other.restore(path), SessionError)


def _refused(action: Callable[[], Any], error: type[Exception]) -> float:
    """0 where ``action`` raises this error, 1 where it goes through."""
    try:
        action()
    except error:
        return 0.0
    return 1.0


# -- bytes -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _census(model: Any) -> float:
    """Bytes between the live state and the formula, over batches and contexts."""
    worst = 0
    for batch in (1, 3):
        tokens = _text(model, batch, 160)
        session = model.session(batch)
        for stop in (0, 1, 2, 63, 64, 65, 130, 160):
            stop = min(stop, tokens.shape[1])
            if stop > session.length:
                session.extend(tokens[:, session.length : stop])
            worst = max(worst, abs(session.state_bytes - model.state_bytes(batch, stop)))
    return float(worst)


@torch.inference_mode()
def _constant(model: Any) -> float | None:
    """Bytes by which the storage behind a state grows that is said to be constant."""
    if model.state_bytes(1, 1) != model.state_bytes(1, 100_000):
        return None
    tokens = _text(model, 1, 130)
    session = model.session(1)
    session.extend(tokens[:, :1])
    before = storage_bytes(session.state())
    _read(session, tokens[:, 1:], [64, 1])
    return float(abs(storage_bytes(session.state()) - before))


# -- refusals ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _position_limit(model: Any) -> float | None:
    """Refusals that are missing, and what a refused call changed in the stream; for limits that a text can reach here."""
    limit = model.max_positions
    if limit is None or limit > _LONGEST:
        return None
    tokens = _text(model, 1, limit)
    beyond = torch.cat((tokens, tokens[:, :1]), 1)
    session = model.session(1)
    session.extend(tokens[:, :-1])
    before = [tensor.clone() for tensor in session.state()]
    missing = _refused(lambda: model.logits(beyond), PositionLimitError)
    missing += _refused(lambda: session.extend(beyond[:, -2:]), PositionLimitError)
    changed = session.length != limit - 1
    changed |= not all(torch.equal(a, b) for a, b in zip(before, session.state(), strict=True))
    truth = model.logits(tokens)
    return missing + float(changed) + _distance(session.extend(tokens[:, -1:]), truth[:, -1:])


def _refusals(model: Any) -> float:
    session = model.session(2)
    nothing, wrong = _text(model, 2, 4)[:, :0], _text(model, 3, 4)
    missing = _refused(lambda: session.extend(nothing), SessionError)
    missing += _refused(lambda: session.extend(wrong), SessionError)
    return missing + float(session.length != 0)


# -- gradients and seeds -----------------------------------------------------------------------------------------------


def _carried_gradient(model: Any) -> float | None:
    """Relative difference between gradients through a carried state and through the whole text."""
    if not _trainable(model):
        return None
    tokens = _text(model, 2, 32)
    with torch.enable_grad():
        truth = _gradients(model, _loss(model.logits(tokens[:, :-1])[:, 16:], tokens[:, 17:]))
        session = model.session(2)
        session.extend(tokens[:, :7])
        session.extend(tokens[:, 7:16])
        got = _gradients(model, _loss(session.extend(tokens[:, 16:-1], keep="all"), tokens[:, 17:]))
    return float((got - truth).norm() / truth.norm())


def _detach(model: Any) -> float | None:
    """State tensors that still hold a graph after ``detach``; and numbers that it changed."""
    if not _trainable(model):
        return None
    tokens = _text(model, 2, 24)
    with torch.enable_grad():
        session = model.session(2)
        _gradients(model, _loss(session.extend(tokens[:, :12], keep="all"), tokens[:, 1:13]))
        session.detach()
        held = sum(t.requires_grad or t.grad_fn is not None for t in session.state())
        rest = session.extend(tokens[:, 12:23], keep="all")
        _gradients(model, _loss(rest, tokens[:, 13:24]))  # raises where the freed graph of the first piece is behind it
    with torch.inference_mode():
        return float(held) + _distance(rest.detach(), model.logits(tokens[:, :23])[:, 12:])


def _seed(model: Any) -> float | None:
    """Difference of logits between two builds from one seed, plus 1 where another seed gives the same weights."""
    module = sys.modules[type(model).__module__]
    if not hasattr(module, "Config") or not hasattr(model, "config"):
        return None
    first, second, other = (build(module, model.config, seed).eval() for seed in (7, 7, 8))
    tokens = _text(first, 2, 16)
    weights = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    differ = any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    with torch.inference_mode():
        error = _distance(first.logits(tokens), second.logits(tokens))  # type: ignore[operator]
    return error + float(not all(weights)) + float(_trainable(model) and not differ)


def _learning(model: Any) -> float | None:
    """Change of the loss on a fixed batch by one step of AdamW; must be below zero."""
    if not _trainable(model):
        return None
    learner = copy.deepcopy(model).train()
    tokens = _text(model, 4, 33)
    with torch.enable_grad():
        optimiser = torch.optim.AdamW(learner.parameters(), lr=1e-3)
        before = _loss(learner.logits(tokens[:, :-1]), tokens[:, 1:])
        before.backward()
        optimiser.step()
        after = _loss(learner.logits(tokens[:, :-1]), tokens[:, 1:])
    return float((after - before).detach())


def _parameter_formula(model: Any) -> float | None:
    """Parameters between the family's closed form and the real ones."""
    formula = getattr(sys.modules[type(model).__module__], "parameters", None)
    real = sum(p.numel() for p in model.parameters())
    counted = model.parameter_count()
    return float(abs(counted - real) + (abs(int(formula(model.config)) - real) if formula else 0))


LAWS: tuple[Law, ...] = (
    Law("stepwise = whole text", _pieces(48, 1), ROUNDING),
    Law("pieces of 7, 1, 16 = whole text", _pieces(150, 7, 1, 16), ROUNDING),
    Law("pieces past a chunk edge = whole text", _pieces(327, 65, 130, 1, 64, 67), ROUNDING),
    Law("with gradients = without", _pieces_with_gradients, ROUNDING),
    Law("the last logits = the last of all", _last_of_all, ROUNDING),
    Law("the future never changes the past", _causality, ROUNDING),
    Law("rows of a batch do not touch", _rows, ROUNDING),
    Law("a fork is independent", _fork, ROUNDING),
    Law("save and restore continue identically", _restore, ROUNDING),
    Law("another model's session is refused", _restore_elsewhere, EXACT),
    Law("state bytes = formula", _census, EXACT),
    Law("a constant state stays in its storage", _constant, EXACT),
    Law("the position limit is refused", _position_limit, ROUNDING),
    Law("empty and misshapen input is refused", _refusals, EXACT),
    Law("gradients reach earlier pieces", _carried_gradient, 1e-3),
    Law("detach cuts the graph", _detach, ROUNDING),
    Law("a seed fixes weights and logits", _seed, EXACT),
    Law("one optimiser step lowers the loss", _learning, -1e-4),
    Law("parameters = formula", _parameter_formula, EXACT),
)
