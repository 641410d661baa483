"""Are the times those of the definitions, marked where they are not to be believed, and of the runtime that they claim?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from false_clock import FalseClock, Timed
from torch import Tensor

from bdh_bench.errors import LawError, SpecError
from bdh_bench.measure import runtime, timing
from bdh_bench.measure.clock import Clocks
from bdh_bench.models import toy
from bdh_bench.models.bdh import Config as BdhConfig
from bdh_bench.models.bdh import Model as Bdh
from bdh_bench.results.assessment import assess
from bdh_bench.results.reductions import between_tokens, derived_records
from bdh_bench.results.store import Run
from bdh_bench.results.tables import points_of
from bdh_bench.runner.plan import make_plan
from bdh_bench.runner.run import execute, prepare
from bdh_bench.spec import RunSpec
from bdh_bench.tasks import latency
from bdh_bench.types import Arrays, Measurement, TaskContext

_SMOKE = latency.Config("smoke", steps=8, windows=2, prefills=2)


def _context(length: int = 64, facts: dict[str, Any] | None = None) -> TaskContext:
    note = (facts if facts is not None else {}).__setitem__
    return TaskContext(0, length, (length,), 256, (), "random", False, lambda *_: None, note=note)


def _go(
    model: Any, config: latency.Config = _SMOKE, clocks: Clocks | None = None, **how: Any
) -> dict[str, list[Measurement]]:
    rows: dict[str, list[Measurement]] = {}
    for item in latency.timed_with(clocks or Clocks(), model, config, _context(**how)):
        if isinstance(item, Measurement):
            rows.setdefault(item.metric, []).append(item)
    return rows


def _values(rows: list[Measurement]) -> list[float]:
    return [float(row.value) for row in rows if row.value is not None]


# -- definitions -------------------------------------------------------------------------------------------------------


def test_prefill_and_steps_have_the_times_of_a_known_model() -> None:
    clock, facts = FalseClock(), dict[str, Any]()
    found = _go(Timed(clock, 1e-3, 0.02), replace(_SMOKE, budget="full", prefills=20), clock.clocks(), facts=facts)
    assert _values(found["prefill_s"]) == pytest.approx([0.064] * len(found["prefill_s"]))
    assert _values(found["ttft_s"]) == pytest.approx(_values(found["prefill_s"]))
    assert _values(found["tpot_s"]) == pytest.approx([0.02] * len(found["tpot_s"]))
    assert _values(found["tpot_by_difference_s"]) == pytest.approx([0.02])
    assert {row.status for rows in found.values() for row in rows if row.value is not None} == {"ok"}
    assert {row.context for rows in found.values() for row in rows} == {64}
    kept = facts["timing"]
    assert (kept["budget"], kept["warm_up_s"], kept["measure_s"]) == ("full", 3.0, 5.0)
    for phase, call_s in (("prefill", 0.064), ("decode", 0.02)):
        assert kept[phase]["steady"]
        assert kept[phase]["calls"] * call_s >= 5.0
        assert kept[phase]["warm_up_s"] >= 3.0
    assert kept["prefill"]["calls"] >= 20


def test_raw_stamps_of_every_step_and_of_the_warm_up_are_kept() -> None:
    clock = FalseClock()
    kept = {
        a.name: a.arrays
        for a in latency.timed_with(clock.clocks(), Timed(clock), _SMOKE, _context())
        if isinstance(a, Arrays)
    }
    steps = np.diff(kept["decode"]["stamps_ns"], axis=2)
    assert steps.shape[1:] == (8, 1)
    assert (steps == 2_000_000).all()
    assert kept["decode"]["warm_up_stamps_ns"].shape[1:] == (8, 2)
    assert kept["prefill"]["stamps_ns"].shape[2] == 3  # start, logits, choice


def test_the_first_call_is_apart() -> None:
    class Cold(Timed):
        cold = True

        def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
            if self.cold:
                self.clock.work(7.0)
                self.cold = False
            return super().advance(memory, position, tokens, keep)

    clock = FalseClock()
    found = _go(Cold(clock), clocks=clock.clocks())
    assert {row.axes["phase"]: row.value for row in found["first_call_s"]} == pytest.approx(
        {"prefill": 7.0064, "decode": 0.002}
    )
    assert max(_values(found["prefill_s"])) < 0.007


def test_both_formulas_of_the_time_per_token_agree() -> None:
    """Over one generation of n tokens: mean step = (end to end − time to first token) / (n − 1), whatever each step takes."""

    class Growing(Timed):
        def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
            self.clock.work(position * 1e-6)
            return super().advance(memory, position, tokens, keep)

    clock, n = FalseClock(), 33
    model, clocks = Growing(clock), clock.clocks()
    reader = latency._Reader(model, torch.zeros(1, 600, dtype=torch.long))
    first = timing.timed((reader.read, reader.choose), 1, clocks, before=reader.begin)
    decoder = latency._Decoder(reader.session, reader.logits[:, -1:].argmax(-1))
    rest = timing.timed((decoder.step,), n - 1, clocks)
    end_to_end = int(rest.stamps[-1, -1] - first.stamps[0, 0]) * 1e-9
    direct = rest.wall_s / rest.calls
    assert direct == pytest.approx((end_to_end - float(first.each_s()[0])) / (n - 1))
    assert direct == pytest.approx(0.002 + 1e-6 * (600 + (n - 2) / 2))  # positions 600 to 600 + n − 2
    assert direct == pytest.approx(float(rest.each_s().mean()))


def test_every_window_starts_at_the_same_depth_of_the_same_stream() -> None:
    starts: list[tuple[int, Tensor]] = []

    class Watched(latency._Decoder):
        def __init__(self, session: Any, token: Tensor) -> None:
            starts.append((session.length, session.memory.tensors()["layer0.state"].clone()))
            super().__init__(session, token)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "_Decoder", Watched)
        _go(Bdh(BdhConfig(1, 16, 2, 8)).eval(), length=40)
    assert len(starts) > 6
    assert all(length == 40 and torch.equal(state, starts[0][1]) for length, state in starts)


# -- what is marked ----------------------------------------------------------------------------------------------------


class _PutsOff(Timed):
    """Lazy: the work of the prompt is done with the first step after it."""

    def memory(self, batch_size: int) -> Any:
        return _Owing()

    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        if tokens.shape[1] > 1:
            memory.owed = True
            self.clock.work(1e-4)
            return super(Timed, self).advance(memory, position, tokens, keep)
        if memory.owed:
            self.clock.work(0.05)
            memory.owed = False
        return super().advance(memory, position, tokens, keep)


class _Owing(toy.TensorMemory):
    owed = False

    def fork(self) -> Any:
        copy = _Owing()
        copy.owed = self.owed
        return copy


def test_work_that_is_put_off_into_the_first_step_is_noticed() -> None:
    clock = FalseClock()
    found = _go(_PutsOff(clock), clocks=clock.clocks())
    assert _values(found["tpot_by_difference_s"]) == pytest.approx([0.002])
    assert _values(found["tpot_s"])[0] == pytest.approx(0.002 + 0.05 / 8)
    assert {row.status for row in found["tpot_s"]} == {"unsteady"}
    assert "t(2g) − t(g)" in found["tpot_s"][0].reason


def test_steps_past_the_last_position_are_not_subtracted_and_mark_nothing() -> None:
    clock = FalseClock()
    model = Timed(clock)
    model.max_positions = 64 + 12
    found = _go(model, clocks=clock.clocks())
    assert found["tpot_by_difference_s"][0].status == "unsupported"
    assert {row.status for row in found["tpot_s"]} == {"ok"}
    model.max_positions = 64 + 7
    assert {row.status for rows in _go(model, clocks=clock.clocks()).values() for row in rows} == {"unsupported"}


def test_windows_that_lost_the_core_are_noisy_kept_and_counted() -> None:
    class Displaced(Timed):
        def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
            if tokens.shape[1] == 1 and position == 66:
                self.clock.lose(0.004, involuntary=1)
            return super().advance(memory, position, tokens, keep)

    clock, facts = FalseClock(), dict[str, Any]()
    found = _go(Displaced(clock), clocks=clock.clocks(), facts=facts)
    assert {row.status for row in found["tpot_s"]} == {"noisy"}
    assert _values(found["tpot_s"])[0] == pytest.approx(0.0025)
    assert {row.status for row in found["prefill_s"]} == {"ok"}
    assert facts["timing"]["decode"]["noisy_windows"] == len(found["tpot_s"])


def test_a_model_that_never_settles_is_unsteady() -> None:
    class Restless(Timed):
        turn = 0

        def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
            self.turn += tokens.shape[1] > 1
            self.clock.work(0.001 * (self.turn % 7))
            return super().advance(memory, position, tokens, keep)

    clock = FalseClock()
    found = _go(Restless(clock), replace(_SMOKE, prefills=100), clocks=clock.clocks())
    assert {row.status for row in found["prefill_s"]} == {"unsteady"}
    assert "2 %" in found["prefill_s"][0].reason


def test_a_clock_that_is_slow_to_read_fails_the_cell() -> None:
    clock = FalseClock(reading_ns=20_000)
    with pytest.raises(LawError) as raised:
        _go(Timed(clock), clocks=clock.clocks())
    assert raised.value.gate == "overhead"
    quick = FalseClock(reading_ns=100)
    shares = _go(Timed(quick), clocks=quick.clocks())["harness_overhead_share"]
    assert {row.axes["phase"] for row in shares} == {"prefill", "decode"}
    assert max(_values(shares)) < 0.001


def test_an_unknown_budget_or_runtime_is_a_usage_error() -> None:
    with pytest.raises(SpecError, match="budget"):
        _go(toy.Model(toy.Config()), replace(_SMOKE, budget="forever"))
    with pytest.raises(SpecError, match="runtime"):
        _go(toy.Model(toy.Config()), replace(_SMOKE, runtime="fast"))


# -- runtimes ----------------------------------------------------------------------------------------------------------


class _Small(toy.Model):
    """Something to compile: one matrix."""

    def __init__(self) -> None:
        super().__init__(toy.Config())
        self.matrix = torch.nn.Parameter(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)))

    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        out = self.matrix[tokens].relu() * 2
        return out if keep == "all" else out[:, -1:]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A backend that runs what was traced, and torch's counters as in a new process."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    def forget() -> None:
        torch._dynamo.reset()
        counters.clear()

    forget()
    monkeypatch.setattr(runtime, "BACKEND", "eager")
    yield monkeypatch
    forget()


_COMPILE = replace(_SMOKE, runtime="compile")


def _runtimes(found: dict[str, list[Measurement]], *metrics: str) -> set[Any]:
    return {row.axes["runtime"] for name in metrics for row in found[name]}


def test_compiling_is_apart_and_an_axis_of_the_rows(compiler: pytest.MonkeyPatch) -> None:
    facts: dict[str, Any] = {}
    model = _Small()
    found = _go(model, _COMPILE, facts=facts)
    assert _runtimes(found, "prefill_s", "ttft_s", "tpot_s", "compile_s") == {"compile"}
    assert _values(found["compile_s"])[0] > 5 * max(_values(found["prefill_s"]))
    assert facts["runtime"] == "compile"
    assert facts["timing"]["compiled"]["graphs"] >= 1
    assert "advance" not in model.__dict__  # as it was
    assert not [row for row in found["tpot_s"] if row.status == "unsteady" and "compiled inside" in row.reason]


def test_a_compiler_that_changes_the_answers_is_no_runtime(compiler: pytest.MonkeyPatch) -> None:
    def wrong(graph: Any, inputs: Any) -> Any:
        return lambda *values: tuple(out + 1e-2 if out.is_floating_point() else out for out in graph(*values))

    compiler.setattr(runtime, "BACKEND", wrong)
    found = _go(_Small(), _COMPILE)
    assert {row.status for rows in found.values() for row in rows} == {"unsupported"}
    assert "changed the logits by 0.01" in found["tpot_s"][0].reason
    assert not [row for rows in found.values() for row in rows if row.value is not None]


def test_what_cannot_be_compiled_is_unsupported_with_its_reason(compiler: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such instruction")

    compiler.setattr(runtime, "BACKEND", broken)
    assert "no such instruction" in _go(_Small(), _COMPILE)["tpot_s"][0].reason

    class Opaque(_Small):
        @torch._dynamo.disable  # type: ignore[misc]
        def advance(self, *args: Any) -> Tensor:
            return super().advance(*args)

    compiler.setattr(runtime, "BACKEND", "eager")
    assert "nothing to compile" in _go(Opaque(), _COMPILE)["tpot_s"][0].reason
    captured = _go(_Small(), replace(_SMOKE, runtime="cudagraph"))["tpot_s"]
    assert [(row.status, row.value) for row in captured] == [("unsupported", None)]
    assert "CUDA graph" in captured[0].reason


def _decorated(model: _Small) -> None:
    model.advance = torch.compile(model.advance, backend="eager")  # type: ignore[method-assign]


def _hidden(model: _Small) -> None:
    """Compiled where nobody can look at it: only the count of graphs gives it away."""
    table = {"advance": torch.compile(model.advance, backend="eager")}
    model.advance = lambda *args: table["advance"](*args)  # type: ignore[method-assign]


def _in_place(model: _Small) -> None:
    model.head = torch.nn.Linear(2, 2)
    model.head.compile(backend="eager")


def _scripted(model: _Small) -> None:
    model.head = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("sneak", [_decorated, _hidden, _in_place, _scripted])
def test_a_model_that_compiles_itself_is_not_eager(sneak: Any, compiler: pytest.MonkeyPatch) -> None:
    facts, model = dict[str, Any](), _Small()
    sneak(model)
    found = _go(model, facts=facts)
    assert _runtimes(found, "prefill_s", "ttft_s", "tpot_s") == {"own compile"}
    assert facts["runtime"] == "own compile"
    assert facts["timing"]["own_compilation"]


def test_a_model_of_this_package_is_eager(compiler: pytest.MonkeyPatch) -> None:
    assert runtime._artefact(("x", torch.nn.Linear(1, 1))) == ""
    model = Bdh(BdhConfig(1, 16, 2, 8))
    assert not [found for named in runtime._reachable(model) if (found := runtime._artefact(named))]
    clock = FalseClock()
    assert _runtimes(_go(Timed(clock), clocks=clock.clocks()), "prefill_s", "tpot_s") == {"eager"}


# -- through a whole run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Both ways of decoding one and the same small BDH, two rounds of one and one of each."""
    small = "n_embd=16:n_head=2:n_layer=2"
    models = tuple(f"bdh:mlp_internal_dim_multiplier=8:mode={mode}:{small}" for mode in ("recurrent", "sparse"))
    task = "latency:budget=smoke:force=1:steps=24:windows=5"
    plan = make_plan(RunSpec(models, (task,), contexts=(32,), threads=1, rounds=2))
    return execute(plan, prepare(plan, tmp_path_factory.mktemp("runs"), None, False), lambda *a: None, 120.0)


def test_both_ways_of_decoding_make_rows_that_can_be_compared(run: Run) -> None:
    assert [cell.kind for cell in run.cells] == ["ok", "ok"]  # a busy machine marks them
    points = [p for p in points_of(run) if p.metric == "tpot_s"]
    assert len({p.model for p in points}) == 2
    assert [dict(p.axes)["path"] for p in points] == ["dense", "sparse"]
    one, two = points
    found = [s for s in assess(run).speeds if s.first.metric == "tpot_s"]
    assert [(s.first.model, s.second.model, s.runtime) for s in found] == [(one.model, two.model, "eager")]
    assert {dict(p.axes)["layer"] for p in points_of(run) if p.metric == "row_density" and p.model == one.model} == {
        0,
        1,
    }
    assert {dict(p.axes)["layer"] for p in points_of(run) if p.metric == "row_density" and p.model == two.model} == {
        0,
        1,
    }
    for cell in run.cells:
        assert cell.facts["runtime"] == "eager"
        assert cell.facts["timing"]["budget"] == "smoke"
        assert [row["gate"] for row in cell.facts["gates"][:1]] == ["numerics"]


def test_a_time_is_never_compared_with_that_of_another_runtime(run: Run) -> None:
    model = run.cells[1].model
    moved = tuple(replace(r, axes={**r.axes, "runtime": "compile"}) if r.model == model else r for r in run.records)
    assert assess(run).speeds
    assert [s for s in assess(replace(run, records=moved)).speeds if not s.best_of_each] == []


def test_quantiles_are_those_of_the_stored_steps_by_round(run: Run) -> None:
    cell = run.cells[0]
    assert len(cell.rounds) == 2
    found = [r for r in derived_records(run) if r.metric == "itl_s" and r.cell == cell.key]
    for one in cell.rounds:
        with np.load(run.path / "cells" / one.files / "decode.npz") as kept:
            assert int(kept["block"]) == 1
            steps = np.diff(kept["stamps_ns"], axis=2).ravel() * 1e-9
        own = {r.axes["quantile"]: r.value for r in found if r.round == one.round}
        assert own == pytest.approx(
            {n: float(np.quantile(steps, q)) for n, q in {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}.items()}
        )
    points = {dict(p.axes)["quantile"]: p for p in points_of(run) if p.metric == "itl_s" and p.model == cell.model}
    assert list(points) == ["p50", "p95", "p99", "max"]
    assert {dict(p.axes)["path"] for p in points.values()} == {"dense"}


def test_steps_that_were_not_told_apart_or_are_too_few_have_no_quantiles(run: Run) -> None:
    row = replace(next(r for r in run.records if r.metric == "tpot_s"), status="ok", reason="")
    stamps = np.cumsum(np.full((1, 30, 2), 1_000_000).ravel()).reshape(1, 30, 2)
    few = {r.axes["quantile"]: r for r in between_tokens({"stamps_ns": stamps, "block": np.array(1)}, [row])}
    assert few["p95"].value == pytest.approx(1e-3)
    assert (few["p99"].value, few["p99"].status) == (None, "unsupported")
    blocks = list(between_tokens({"stamps_ns": stamps, "block": np.array(8)}, [row]))
    assert {(r.value, "blocks of 8" in r.reason) for r in blocks} == {(None, True)}
    noisy = list(
        between_tokens({"stamps_ns": stamps, "block": np.array(1)}, [row, replace(row, status="noisy", reason="why")])
    )
    assert {(r.status, r.reason) for r in noisy if r.value is not None} == {("noisy", "why")}
    single = {
        "stamps_ns": stamps[:, :1],
        "block": np.array(30),
        "single_stamps_ns": stamps,
        "single_block": np.array(1),
    }
    assert next(iter(between_tokens(single, [row]))).value == pytest.approx(1e-3)
