"""Does each gate stop a model that is broken in its way, let a sound one pass, and remember that it did?"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bdh_bench import load_model
from bdh_bench.data.corpus import Document
from bdh_bench.errors import LawError
from bdh_bench.folders import cache_folder
from bdh_bench.kernels import rotary
from bdh_bench.loading import build
from bdh_bench.models import bdh, gpt2, llama, toy
from bdh_bench.results.assessment import assess
from bdh_bench.results.store import Run
from bdh_bench.runner import gates
from bdh_bench.runner.plan import make_plan
from bdh_bench.runner.run import execute, exit_code, prepare
from bdh_bench.session import StreamSession
from bdh_bench.spec import RunSpec

_SMOKE = gates.LENGTHS["smoke"]
_BDH = "bdh:n_layer=2:n_embd=16:n_head=2:mlp_internal_dim_multiplier=8"


class Forgets(llama.Model):
    """Drops what it knows when a piece of more than one token comes."""

    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        if tokens.shape[1] > 1:
            memory.load({})
        return super().advance(memory, position, tokens, keep)


class ForgetsFarIn(llama.Model):
    """Sound up to 700 tokens."""

    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        if position > 700:
            memory.load({name: torch.zeros_like(t) for name, t in memory.tensors().items()})
        return super().advance(memory, position, tokens, keep)


class MixesRows(llama.Model):
    """As if rows were padded to a common length: a stream depends on its neighbours."""

    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        out = super().advance(memory, position, tokens, keep)
        return out + 1e-2 * (out.mean(0, keepdim=True) - out)


class Miscounts(llama.Model):
    def state_bytes(self, batch_size: int, context: int) -> int:
        return super().state_bytes(batch_size, context) + 4 * (context > 64)


class MiscountsStreams(llama.Model):
    def state_bytes(self, batch_size: int, context: int) -> int:
        return super().state_bytes(1, context)


class Overflows(llama.Model):
    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        return super().advance(memory, position, tokens, keep) * math.inf


class HoldsInfinity(toy.Model):
    """Finite logits over a state that is not."""

    def memory(self, batch_size: int) -> Any:
        memory: Any = super().memory(batch_size)
        memory.load({"state": torch.full((batch_size, 4), math.inf)})
        return memory

    def state_bytes(self, batch_size: int, context: int) -> int:
        return 16 * batch_size


class Truncates(gpt2.Model):
    """Drops the oldest tokens where it should refuse."""

    class Session(StreamSession):
        def extend(self, tokens: Tensor, keep: Any = "last") -> Tensor:
            return super().extend(tokens[:, -(self.model.max_positions or 0) :], keep)

    def logits(self, tokens: Tensor) -> Tensor:
        return super().logits(tokens[:, -self.config.positions :])

    def session(self, batch_size: int = 1) -> StreamSession:
        return self.Session(self, batch_size, self.memory(batch_size), 0)


class NotThePublishedForm(bdh.Model):
    """One norm more: every form of it agrees with every other, and none with the published code."""

    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        return 1.01 * super().advance(memory, position, tokens, keep)


class NarrowPhases(bdh.Model):
    """As if the angle were a product in float32."""

    def _turn(self, position: int, length: int, x: Tensor) -> rotary.Turn | None:
        where = torch.arange(position, position + length, dtype=torch.float32)
        angle = torch.outer(where, self.attn.freqs.flatten()[::2]).remainder(1.0) * (2 * math.pi)
        return rotary.Turn(angle.cos(), angle.sin())


class OtherParallelForm(bdh.Model):
    """The quadratic form is not that of the chunks."""

    def _parallel(self, tokens: Tensor) -> Tensor:
        return 1.01 * super()._parallel(tokens)


def _built(kind: type[Any]) -> Any:
    config: Any = llama.Config(16, 1, 2)
    if issubclass(kind, gpt2.Model):
        config = gpt2.Config(16, 1, 2, max_positions=100)
    if issubclass(kind, toy.Model):
        config = toy.Config("uniform")
    if issubclass(kind, bdh.Model):
        config = load_model(_BDH).config
    shell: Any = types.SimpleNamespace(Model=kind)
    return build(shell, config, 0).eval()


BUGS: dict[type[Any], str] = {
    Forgets: "parity",
    MixesRows: "batch",
    Miscounts: "census",
    MiscountsStreams: "census",
    Overflows: "numerics",
    HoldsInfinity: "numerics",
    Truncates: "truncation",
    OtherParallelForm: "parity",
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_broken_model_stops_at_its_gate(bug: type[Any]) -> None:
    failed = [found.gate for found in gates.gates_of(_built(bug), _SMOKE) if not found.kept]
    assert BUGS[bug] in failed


@pytest.mark.parametrize("kind", [llama.Model, gpt2.Model, toy.Model, bdh.Model], ids=lambda kind: kind.__module__)
def test_a_sound_model_passes(kind: type[Any]) -> None:
    found = list(gates.gates_of(_built(kind), _SMOKE))
    assert all(f.kept for f in found)
    hooked = {"reference"} if kind is bdh.Model else set()
    assert {f.gate for f in found} == set(BUGS.values()) | hooked


def test_logits_are_those_of_the_published_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """What agrees with itself in all its forms can still be another model."""
    assert [f.kept for f in gates.reference(_built(bdh.Model))] == [True, True]
    monkeypatch.setattr(bdh, "Model", NotThePublishedForm)
    found = list(gates.reference(_built(NotThePublishedForm)))
    assert not any(f.kept for f in found)
    monkeypatch.undo()
    published = bdh._bdh_reference.CONFIG
    golden = json.loads((Path(__file__).parent / "golden" / "bdh_reference_logits.json").read_text())
    (case,) = (c for c in golden["cases"] if c["config"] == published)
    assert (bdh._bdh_reference.logits()[0] - torch.tensor(case["logits"])).abs().max() == 0
    assert bdh._bdh_reference.tokens()[0].tolist() == case["tokens"]
    for mode in ("parallel", "chunked", "recurrent", "sparse"):
        assert all(f.kept for f in gates.reference(load_model(f"{_BDH}:mode={mode}")))
    assert not list(
        gates.reference(load_model(f"{_BDH}:rope=off"))
    )  # another model, of which the published code says nothing


def test_a_phase_is_judged_at_the_last_odd_position() -> None:
    """Float32 is good enough at first and not far on; a power of two would hide it."""
    sound, narrow = _built(bdh.Model), _built(NarrowPhases)
    for position, kept in ((257, True), (131_073, False)):
        (found,) = gates.phase(narrow, position)
        assert (found.kept, found.length) == (kept, position)
    assert all(f.kept and f.error < 1e-6 for f in gates.phase(sound, 2**20 + 1))
    assert gates.phase(narrow, 2**17)[0].kept
    assert gates.phase(_built(llama.Model), 131_073) == []
    assert gates.phase(load_model(f"{_BDH}:rope=off"), 131_073) == []


def test_a_failed_phase_stores_no_value(books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bdh_bench.runner import worker
    from bdh_bench.types import Cell

    monkeypatch.setattr(bdh.Model, "_turn", NarrowPhases._turn)
    spec = RunSpec((_BDH,), ("memory",), f"path:{books}", (64,), train_context=4096, smoke=True)
    outcome = worker._outcome(Cell("k", _BDH, "memory", 0, 64), spec, (64,), tmp_path)
    assert (outcome["status"], outcome["measurements"]) == ("gate_failed", [])
    assert outcome["reason"].startswith("gate phase: phase at 131,073 tokens")


def test_what_is_lost_past_700_tokens_is_seen_at_777_and_not_at_65() -> None:
    model = _built(ForgetsFarIn)
    assert all(f.kept for f in gates.gates_of(model, (65,)))
    (parity,) = (f for f in gates.gates_of(model, (777,)) if f.gate == "parity")
    assert not parity.kept
    assert parity.error > 10 * parity.bound


def test_a_position_limit_shortens_the_texts() -> None:
    lengths = {f.length for f in gates.gates_of(_built(gpt2.Model), (65, 777, 2049))}
    assert lengths == {65, 100}


def test_narrow_types_are_judged_by_divergence_from_float32() -> None:
    model = load_model(_BDH, dtype="bfloat16")
    found = [f for f in gates.gates_of(model, _SMOKE) if f.gate == "parity"]
    assert all(f.kept and "nats" in f.about and f.error > 0 for f in found)

    class Forgetful(bdh.Model):  # what a plain bound of 1e-3 nats would not see at small weights
        def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
            if position % 8 == 0:
                memory.load({name: torch.zeros_like(t) for name, t in memory.tensors().items()})
            return super().advance(memory, position, tokens, keep)

    (parity,) = (f for f in gates.gates_of(_built(Forgetful).bfloat16(), _SMOKE) if f.gate == "parity")
    assert not parity.kept


def test_a_quantised_cache_is_not_held_to_the_bound_of_float32() -> None:
    model = load_model("llama:d_model=16:n_layer=1:n_head=2:kv_bits=4")
    found = list(gates.gates_of(model, (300,)))
    assert all(f.kept for f in found)
    assert any("nats" in f.about for f in found if f.gate == "parity")


# -- the instruments -------------------------------------------------------------------------------------------------

_SCORE = gates.score_after


@pytest.mark.parametrize(
    "broken",
    [
        lambda model, contexts, targets: _SCORE(model, contexts, np.roll(targets, 1, axis=1)),
        lambda model, contexts, targets: _SCORE(model, contexts[:, :-1], targets),
        lambda model, contexts, targets: _SCORE(model, contexts, targets) * 1.001,
        lambda model, contexts, targets: _SCORE(load_model("toy:copy"), contexts, targets),
    ],
    ids=["labels moved by one", "a context byte lost", "another unit", "an oracle that peeks"],
)
def test_a_broken_scorer_misses_a_known_answer(broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(found.kept for found in gates.golden())
    monkeypatch.setattr(gates, "score_after", broken)
    assert not all(found.kept for found in gates.golden())


def test_a_byte_that_nobody_pays_for_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gates.score_document
    monkeypatch.setattr(gates, "score_document", lambda model, content: whole(model, content[:-1]))
    assert not all(found.kept for found in gates.golden())


# -- once ------------------------------------------------------------------------------------------------------------


def _hold(model: Any, level: str = "smoke") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    gates.hold(model, "bdh_bench.models.llama", level, rows)
    return rows


def test_gates_are_measured_once_for_the_same_weights_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = _hold(_built(llama.Model)), _hold(_built(llama.Model))
    assert not any(row["cached"] for row in first)
    assert [{**row, "cached": True} for row in first] == again
    assert {"golden", "parity", "census", "batch", "numerics", "truncation"} == {row["gate"] for row in first}
    other = _built(llama.Model)
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    fresh = {row["gate"] for row in _hold(other) if not row["cached"]}
    assert fresh == {"parity", "census", "batch", "numerics", "truncation"}  # the instruments are the same
    assert all(row["cached"] == (row["gate"] == "golden") for row in _hold(_built(llama.Model).bfloat16()))
    assert all(row["cached"] == (row["gate"] == "golden") for row in _hold(_built(llama.Model), "standard"))
    monkeypatch.setattr(gates, "source_digest", lambda *modules: "other code")
    assert not any(row["cached"] for row in _hold(_built(llama.Model)))


def test_a_failure_is_a_row_and_is_measured_again() -> None:
    for _ in range(2):
        rows: list[dict[str, Any]] = []
        with pytest.raises(LawError, match="parity at 65 tokens") as raised:
            gates.hold(_built(Forgets), "bdh_bench.models.llama", "smoke", rows)
        assert (raised.value.gate, raised.value.bound) == ("parity", gates.TOLERANCE)
        assert rows[-1]["kept"] is rows[-1]["cached"] is False
        assert rows[-1]["error"] > rows[-1]["bound"]


def test_a_damaged_or_forged_cache_is_no_proof() -> None:
    _hold(_built(llama.Model))
    for text in ("", "[]", "{", '[{"kept": false}]', '[{"gate": "parity"}]'):
        for path in (cache_folder() / "gates").iterdir():
            path.write_text(text)
        assert not any(row["cached"] for row in _hold(_built(llama.Model)))


def test_scored_documents_are_test_documents() -> None:
    train, test = Document("a", Path("a")), Document("b", Path("b"), split="test")
    assert gates.splits((test,), (train,)).kept
    assert not gates.splits((replace(train, name="c"),), (train,)).kept
    assert not gates.splits((replace(train, split="test"),), (train,)).kept


# -- in a run --------------------------------------------------------------------------------------------------------


def _go(spec: RunSpec, root: Path) -> Run:
    plan = make_plan(spec)
    return execute(plan, prepare(plan, root, None, False), lambda *a: None, 120.0)


def test_a_cell_says_which_gates_it_passed(tmp_path: Path, books: Path) -> None:
    run = _go(
        RunSpec((_BDH.replace("=2", "=1", 1), "toy:uniform"), ("long_ppl",), f"path:{books}", (128,), 4096, smoke=True),
        tmp_path,
    )
    assert exit_code(run) == 0
    wanted = {"splits", "leak", "ledger", "golden", "truncation", "numerics", "parity", "census", "batch"}
    for cell in run.cells:
        own = {"reference", "phase"} if cell.family == "bdh" else set()
        assert {row["gate"] for row in cell.facts["gates"]} == wanted | own
        assert all(row["kept"] for row in cell.facts["gates"])
    rows = json.loads(json.dumps(assess(run).as_json(), allow_nan=False))["gates"]
    assert {row["gate"] for row in rows} == wanted | {"reference", "phase"}
    assert all(row["failed"] == 0 and row["error"] <= row["bound"] for row in rows)
    norms = [row["state_norm"] for row in run.cells[0].facts["gates"] if row["gate"] == "numerics"]
    assert norms
    assert all(norm > 0 for norm in norms)


def test_a_failed_gate_stores_its_failure_and_no_value(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was scored before is dropped, arrays too."""
    from bdh_bench.runner import worker
    from bdh_bench.types import Arrays, Cell, Measurement

    spec = RunSpec(("toy:uniform",), ("long_ppl",), f"path:{books}", (128,), smoke=True)

    def results(cell: Any, spec: Any, contexts: Any, facts: dict[str, Any]) -> Any:
        yield Measurement("bits_per_byte", 8.0, 128)
        yield Arrays("bits", {"bits": np.zeros(3)})
        gates.hold(_built(Forgets), "bdh_bench.models.llama", "smoke", facts.setdefault("gates", []))

    monkeypatch.setattr(worker, "_results", results)
    outcome = worker._outcome(Cell("k", "toy:uniform", "long_ppl", 0), spec, (128,), tmp_path)
    assert outcome["status"] == "gate_failed"
    assert outcome["reason"].startswith("gate parity: parity at 65 tokens")
    assert "expected at most 0.0001" in outcome["reason"]
    assert outcome["measurements"] == []
    assert not list(tmp_path.glob("*.npz"))
    assert [row["gate"] for row in outcome["facts"]["gates"] if not row["kept"]] == ["parity"]


def test_a_gate_of_a_task_that_fails_is_a_row_too(tmp_path: Path) -> None:
    run = _go(
        RunSpec(
            ("toy:nan",), ("latency:budget=smoke:steps=2:windows=2:prefills=1", "memory"), contexts=(16,), rounds=1
        ),
        tmp_path,
    )
    assert [cell.status for cell in run.cells] == ["gate_failed", "gate_failed"]
    for cell in run.cells:
        failed = [row for row in cell.facts["gates"] if not row["kept"]]
        assert [row["gate"] for row in failed] == ["numerics"]
        assert cell.reason.startswith("gate numerics")
    assert all(record.value is None for record in run.records)
