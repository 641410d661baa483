"""Would the laws notice? Each planted bug must break the laws that are there for it, and every law catches something."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bdh_bench import laws
from bdh_bench.loading import build
from bdh_bench.models import gpt2, llama, toy
from bdh_bench.session import StreamSession, TensorMemory

_SMALL = llama.Config(32, 2, 2)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class ForgetsInPrefill(llama.Model):
    """A second piece of text starts from nothing, as some selective scans do."""

    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        if tokens.shape[1] > 1:
            memory.load({})
        return super().advance(memory, position, tokens, keep)


class ForgetsInDecode(llama.Model):
    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        if tokens.shape[1] == 1:
            memory.load({})
        return super().advance(memory, position, tokens, keep)


class ForgetsAtAChunkEdge(llama.Model):
    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        if position and position % 65 == 0:
            memory.load({})
        return super().advance(memory, position, tokens, keep)


class OtherArithmeticWithGradients(llama.Model):
    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        out = super().advance(memory, position, tokens, keep)
        return out * 1.01 if torch.is_grad_enabled() else out


class KeepsTheFirst(llama.Model):
    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        out = super().advance(memory, position, tokens, "all")
        return out if keep == "all" else out[:, :1]


class PeeksInLogits(llama.Model):
    def logits(self, tokens: Tensor) -> Tensor:
        out = super().logits(tokens).clone()
        out[:, :-1] += 0.01 * self.model.model.embed_tokens(tokens[:, 1:]).sum(-1, keepdim=True)
        return out


class PeeksInSession(llama.Model):
    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        return super().advance(memory, position, tokens, keep) + 1e-6 * tokens.sum(1).view(-1, 1, 1)


class MixesRows(llama.Model):
    def logits(self, tokens: Tensor) -> Tensor:
        out = super().logits(tokens)
        return out + 1e-3 * out.mean(0, keepdim=True)


class MixesRowsInSession(llama.Model):
    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        out = super().advance(memory, position, tokens, keep)
        memory.load({n: t + 1e-2 * (t.mean(0, keepdim=True) - t) for n, t in memory.tensors().items()})
        return out


class SharedFork(llama.Model):
    class Session(StreamSession):
        def fork(self) -> StreamSession:
            return type(self)(self.model, self.batch_size, self.memory, self.length)

    def session(self, batch_size: int = 1) -> StreamSession:
        return self.Session(self, batch_size, self.memory(batch_size), 0)


class OneMemoryForAll(llama.Model):
    def memory(self, batch_size: int) -> Any:
        if not hasattr(self, "_only"):
            self._only = super().memory(batch_size)
        return self._only


class HidesALayer(llama.Model):
    """What is not among the named tensors is neither saved nor counted."""

    def memory(self, batch_size: int) -> Any:
        memory = super().memory(batch_size)
        everything = memory.tensors
        memory.tensors = lambda: {n: t for n, t in everything().items() if n.startswith("layer0")}  # type: ignore[method-assign]
        return memory


class RestoresAnything(llama.Model):
    def restore(self, path: str | Path) -> StreamSession:
        return self.session()


class WrongFormula(llama.Model):
    def state_bytes(self, batch_size: int, context: int) -> int:
        return super().state_bytes(batch_size, context) + (8 if context > 64 else 0)


class FormulaForgetsTheBatch(llama.Model):
    def state_bytes(self, batch_size: int, context: int) -> int:
        return super().state_bytes(1, context)


class GrowsBehindItsView(toy.Model):
    """The state keeps its size as a view of a storage that does not."""

    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        out = super().advance(memory, position, tokens, keep)
        memory.load({"state": torch.ones(1, 16 + position, dtype=torch.uint8)[:, :16]})
        return out

    def memory(self, batch_size: int) -> TensorMemory:
        return TensorMemory({"state": torch.ones(batch_size, 16, dtype=torch.uint8)})


class TruncatesInput(gpt2.Model):
    def logits(self, tokens: Tensor) -> Tensor:
        return super().logits(tokens[:, -self.config.positions :])


class ReadsEmptyText(llama.Model):
    class Session(StreamSession):
        def extend(self, tokens: Tensor, keep: Any = "last") -> Tensor:
            return torch.zeros(1) if tokens.shape[1] == 0 else super().extend(tokens, keep)

    def session(self, batch_size: int = 1) -> StreamSession:
        return self.Session(self, batch_size, self.memory(batch_size), 0)


class CutsTheGraph(llama.Model):
    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        out = super().advance(memory, position, tokens, keep)
        memory.load({name: tensor.detach() for name, tensor in memory.tensors().items()})
        return out


class NeverDetaches(llama.Model):
    class Session(StreamSession):
        def detach(self) -> None:
            pass

    def session(self, batch_size: int = 1) -> StreamSession:
        return self.Session(self, batch_size, self.memory(batch_size), 0)


class Unseeded(llama.Model):
    __module__ = "a_family_without_seed"  # the law builds the model anew from the module that its class names

    def __init__(self, config: llama.Config) -> None:
        super().__init__(config)
        with torch.no_grad():
            self.model.lm_head.weight.normal_(std=0.02, generator=_forgotten)


_forgotten = torch.Generator().manual_seed(0)
_family: Any = types.ModuleType("a_family_without_seed")
_family.Config, _family.Model = llama.Config, Unseeded


class LearnsBackwards(llama.Model):
    def logits(self, tokens: Tensor) -> Tensor:
        out = super().logits(tokens)
        if self.training:
            out.register_hook(lambda gradient: -gradient)
        return out


class Miscounts(llama.Model):
    def parameter_count(self) -> int:
        return super().parameter_count() + 1


class NotANumber(llama.Model):
    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        return super().advance(memory, position, tokens, keep) * float("nan")


class Raises(llama.Model):
    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        raise RuntimeError("no kernel for this shape")


_STEPS, _SMALL_PIECES, _LONG_PIECES = (law.name for law in laws.LAWS[:3])
_GRADIENTS, _LAST, _FUTURE, _ROWS = (law.name for law in laws.LAWS[3:7])
_FORK, _RESTORE, _ELSEWHERE, _CENSUS = (law.name for law in laws.LAWS[7:11])
_CONSTANT, _LIMIT, _REFUSALS, _CARRIED = (law.name for law in laws.LAWS[11:15])
_DETACH, _SEED, _LEARNING, _PARAMETERS = (law.name for law in laws.LAWS[15:])

BUGS: dict[type[Any], set[str]] = {
    ForgetsInPrefill: {_SMALL_PIECES, _LONG_PIECES, _LAST, _CENSUS, _CARRIED},
    ForgetsInDecode: {_STEPS, _SMALL_PIECES, _FORK, _CENSUS},
    ForgetsAtAChunkEdge: {_LONG_PIECES, _CENSUS},
    OtherArithmeticWithGradients: {_GRADIENTS},
    KeepsTheFirst: {_LAST},
    PeeksInLogits: {_FUTURE},
    PeeksInSession: {_FUTURE},
    MixesRows: {_ROWS},
    MixesRowsInSession: {_ROWS},
    SharedFork: {_FORK},
    OneMemoryForAll: {_CENSUS},
    HidesALayer: {_FORK, _RESTORE, _CENSUS},
    RestoresAnything: {_RESTORE, _ELSEWHERE},
    WrongFormula: {_CENSUS},
    FormulaForgetsTheBatch: {_CENSUS},
    GrowsBehindItsView: {_CONSTANT},
    TruncatesInput: {_LIMIT},
    ReadsEmptyText: {_REFUSALS},
    CutsTheGraph: {_CARRIED},
    NeverDetaches: {_DETACH},
    Unseeded: {_SEED},
    LearnsBackwards: {_LEARNING},
    Miscounts: {_PARAMETERS},
    NotANumber: {_STEPS, _RESTORE},
    Raises: {_STEPS},
}


def _built(kind: type[Any]) -> Any:
    if issubclass(kind, toy.Model):
        config: Any = toy.Config("const_state", bytes=16)
    else:
        config = gpt2.Config(32, 2, 2, max_positions=100) if issubclass(kind, gpt2.Model) else _SMALL
    shell: Any = types.SimpleNamespace(Model=kind)
    return build(shell, config, 0).eval()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_planted_bug_is_caught(bug: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "a_family_without_seed", _family)
    missed = [law.name for law in laws.LAWS if law.name in BUGS[bug] and laws.find(law, _built(bug)).kept]
    assert not missed


@pytest.mark.parametrize("healthy", [llama.Model, gpt2.Model], ids=["llama", "gpt2"])
def test_the_same_models_without_the_bug_keep_every_law(healthy: type[Any]) -> None:
    assert all(finding.kept for finding in laws.check(_built(healthy)))


def test_every_law_catches_something() -> None:
    assert {law.name for law in laws.LAWS} == set().union(*BUGS.values())


def test_an_exception_is_a_finding_with_its_message() -> None:
    finding = laws.find(laws.LAWS[0], _built(Raises))
    assert not finding.kept
    assert finding.detail == "RuntimeError: no kernel for this shape"
