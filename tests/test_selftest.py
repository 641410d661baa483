"""Does the selftest find a harness that is wrong? A sound outcome is bent in one place at a time, and its truth must notice."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from synthetic_run import usual_manifest, write_run

from bdh_bench import load_model
from bdh_bench.errors import SpecError
from bdh_bench.measure import host
from bdh_bench.results.report.page import provenance_of
from bdh_bench.runner.plan import make_plan
from bdh_bench.runner.run import prepare
from bdh_bench.runner.selftest import evidence as known
from bdh_bench.runner.selftest import outcome, overhead, proof, slopes, truths
from bdh_bench.runner.selftest.truths import NOT_DECIDABLE, NOT_RECOVERED, RECOVERED, Finding
from bdh_bench.spec import RunSpec

Cli = Callable[..., tuple[int, str, str]]
_ALLOC = f"toy:alloc:bytes={known.ALLOC_BYTES}"
_HANG = "toy:hang:children=1"


def _sound() -> SimpleNamespace:
    """What a sound harness on a quiet machine gives: statuses and values by (request, model), to be bent by a test."""
    steady = known.PlainLoop((1e-3, 1.001e-3, 0.999e-3), (1e-3, 1.001e-3, 0.999e-3))
    statuses = {
        ("deaths", known.UNIFORM): ("ok", ""),
        ("deaths", "toy:oom"): ("oom_host", "allocator: RuntimeError: no"),
        ("deaths", known.COPY): ("ok", ""),
        ("deaths", "toy:nan"): ("gate_failed", "gate numerics: measured nan"),
        ("deaths", "toy:segfault"): ("crash", "the process ended with SIGSEGV"),
        ("hang", _HANG): ("timeout", "no result after 9 s"),
        ("alloc", _ALLOC): ("ok", ""),
        ("slow", known.SLEEP): ("ok", ""),
        ("slow", known.SLOW_WARMUP): ("ok", ""),
    }
    values: dict[tuple[str, str, str, int], list[float]] = {
        ("deaths", known.UNIFORM, "bits_per_byte", 128): [8.0, 8.0],
        ("deaths", known.COPY, "bits_per_byte", 128): [0.0, 0.0],
        ("alloc", _ALLOC, "prefill_peak_live_bytes", 512): [known.ALLOC_BYTES * 1.005],
        ("alloc", _ALLOC, "decode_peak_live_bytes", 512): [known.ALLOC_BYTES * 0.999],
        ("slow", known.SLEEP, "tpot_s", 16): [1.001e-3, 1.002e-3, 1.003e-3],
        ("slow", known.SLOW_WARMUP, "prefill_s", 16): [1e-4, 1e-4],
        ("slow", known.SLOW_WARMUP, "tpot_s", 16): [1e-5, 1e-5],
    }
    for context in (512, 1024):
        values["state", known.LINEAR, "state_bytes", context] = [known.BYTES_PER_TOKEN * context]
        values["state", known.CONSTANT, "state_bytes", context] = [known.CONSTANT_BYTES]
    for context in (256, 1024, 4096):
        values["depth", known.LINEAR, "tpot_s", context] = [1e-4 + 1e-7 * context * x for x in (0.99, 1.0, 1.01)]
        values["depth", known.CONSTANT, "tpot_s", context] = [1e-4 * x for x in (0.99, 1.0, 1.01)]
    return SimpleNamespace(
        statuses=statuses,
        values=values,
        plain={"slow": steady, "depth": steady},
        families={"hang": known.Family({1, 2}, 0)},
        problems=(),
        parent=(2.0, 0.001),
    )


def _evidence(facts: SimpleNamespace) -> known.Evidence:
    runs = {}
    for request in known.REQUESTS:
        cells = [
            SimpleNamespace(key=model, model=model, status=status, reason=reason)
            for (name, model), (status, reason) in facts.statuses.items()
            if name == request.name
        ]
        records = [
            SimpleNamespace(cell=model, model=model, metric=metric, context=context, value=value)
            for (name, model, metric, context), found in facts.values.items()
            if name == request.name
            for value in found
        ]
        runs[request.name] = SimpleNamespace(cells=cells, records=records, problems=facts.problems)
    return known.Evidence(runs, facts.plain, facts.families, facts.parent)  # type: ignore[arg-type]


def _verdicts(facts: SimpleNamespace) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in truths.judged(_evidence(facts))}


def test_a_sound_harness_recovers_every_truth() -> None:
    assert set(_verdicts(_sound()).values()) == {RECOVERED}


def _value(request: str, model: str, metric: str, context: int, *found: float) -> Callable[[Any], None]:
    return lambda facts: facts.values.update({(request, model, metric, context): list(found)})


def _status(request: str, model: str, status: str, reason: str = "") -> Callable[[Any], None]:
    return lambda facts: facts.statuses.update({(request, model): (status, reason)})


_HALF = known.CONSTANT_BYTES // 2
_BENT: list[tuple[str, Callable[[Any], None]]] = [
    ("uniform", _value("deaths", known.UNIFORM, "bits_per_byte", 128, 8.0, 8.0000001)),
    ("uniform", _value("deaths", known.UNIFORM, "bits_per_byte", 128)),
    ("copy", _value("deaths", known.COPY, "bits_per_byte", 128, 1e-9)),
    ("oom", _status("deaths", "toy:oom", "error", "allocator")),
    ("oom", _status("deaths", "toy:oom", "oom_host", "probable: the system killed the process")),
    ("oom: the next cell", _status("deaths", known.COPY, "oom_host")),
    ("nan", _status("deaths", "toy:nan", "ok")),
    ("nan", _status("deaths", "toy:nan", "gate_failed", "gate batch: rows differ")),
    ("nan", _value("deaths", "toy:nan", "bits_per_byte", 128, 8.0)),
    ("segfault", _status("deaths", "toy:segfault", "crash", "the process ended with SIGKILL")),
    ("segfault", _status("deaths", "toy:segfault", "ok", "SIGSEGV")),
    ("cells beside them", _status("deaths", known.UNIFORM, "interrupted")),
    ("cells beside them", lambda facts: setattr(facts, "problems", ("damaged line",))),
    ("hang", _status("hang", _HANG, "crash", "SIGTERM")),
    ("hang: its processes", lambda facts: facts.families.update(hang=known.Family({1, 2}, 1))),
    ("hang: its processes", lambda facts: facts.families.update(hang=known.Family({1}, 0))),
    ("linear_kv: state bytes", _value("state", known.LINEAR, "state_bytes", 512, 512 * 1024 + 1)),
    ("const_state: state bytes", _value("state", known.CONSTANT, "state_bytes", 1024, _HALF)),
    ("T* of the two", _value("state", known.LINEAR, "state_bytes", 1024, _HALF)),
    ("alloc: peak live", _value("alloc", _ALLOC, "decode_peak_live_bytes", 512, known.ALLOC_BYTES * 1.021)),
    ("alloc: peak live", _value("alloc", _ALLOC, "prefill_peak_live_bytes", 512, known.ALLOC_BYTES * 0.979)),
    ("sleep: TPOT", _value("slow", known.SLEEP, "tpot_s", 16, 0.9999e-3, 1.2e-3)),
    ("sleep: against a plain loop", _value("slow", known.SLEEP, "tpot_s", 16, 1.011e-3)),
    ("slow_warmup: slow calls", _value("slow", known.SLOW_WARMUP, "prefill_s", 16, 1e-4, 0.1)),
    ("slow_warmup: slow calls", _value("slow", known.SLOW_WARMUP, "tpot_s", 16, 1e-5, 0.1 / known.STEPS)),
    ("slow_warmup: slow calls", _value("slow", known.SLOW_WARMUP, "first_call_s", 16, 1e-3)),
    ("the parent meanwhile", lambda facts: setattr(facts, "parent", (2.0, 0.02))),
    ("the parent meanwhile", lambda facts: setattr(facts, "parent", (0.0, 0.0))),
    ("linear_kv: cost slope", _value("depth", known.LINEAR, "tpot_s", 4096, 1e-4)),
    ("linear_kv: cost slope", _value("depth", known.LINEAR, "tpot_s", 4096)),
    ("const_state: cost slope", _value("depth", known.CONSTANT, "tpot_s", 4096, 1.03e-4, 1.03e-4)),
]


@pytest.mark.parametrize(("truth", "bend"), _BENT, ids=[f"{i} {name}" for i, (name, _) in enumerate(_BENT)])
def test_one_wrong_number_or_status_is_noticed(truth: str, bend: Callable[[Any], None]) -> None:
    facts = _sound()
    bend(facts)
    assert _verdicts(facts)[truth] == NOT_RECOVERED


def test_every_truth_is_bent_at_least_once() -> None:
    assert {name for name, _ in _BENT} == {truth.name for truth in truths.TRUTHS}


def test_words_of_later_statuses_are_understood() -> None:
    facts = _sound()
    for bend in (
        _status("deaths", "toy:segfault", "crash(SIGSEGV)"),
        _status("hang", _HANG, "timeout(measure)"),
        _status("deaths", "toy:nan", "nan", "the measured value was nan"),
    ):
        bend(facts)
    assert set(_verdicts(facts).values()) == {RECOVERED}


@pytest.mark.parametrize("right", [True, False])
def test_on_a_noisy_machine_a_timing_truth_is_neither_recovered_nor_refuted(right: bool) -> None:
    facts = _sound()
    noisy = known.PlainLoop((1e-3, 1.1e-3, 0.9e-3), (1e-3, 1.1e-3, 0.9e-3))
    facts.plain = {"slow": noisy, "depth": noisy}
    if not right:
        _value("slow", known.SLEEP, "tpot_s", 16, 1.5e-3)(facts)
        _value("depth", known.CONSTANT, "tpot_s", 4096, 1.2e-4, 1.2e-4)(facts)
    found = _verdicts(facts)
    assert found["sleep: against a plain loop"] == found["const_state: cost slope"] == NOT_DECIDABLE
    assert found["linear_kv: cost slope"] == RECOVERED  # far outside of any noise
    assert found["sleep: TPOT"] == RECOVERED  # a sleep is never too short


def test_what_the_parent_uses_is_counted_while_a_worker_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, used = iter(range(0, 100, 10)), iter([0.0, 1.0, 2.0, 2.5, 3.5, 9.0])
    monkeypatch.setattr(known, "now_s", lambda: float(next(clock)))
    monkeypatch.setattr(known.time, "process_time", lambda: next(used))
    watch = known._Watch(lambda *a: None)
    for phase in ("start", "load", "prefill", "decode", "gates", "done"):
        watch(SimpleNamespace(), {"phase": phase})  # type: ignore[arg-type]
    assert (watch.wall_s, watch.used_s, watch.longest_s) == (20.0, 1.5, 50.0)


def test_a_drift_from_before_to_after_is_noise_too() -> None:
    assert known.PlainLoop((1e-3,) * 4, (1.05e-3,) * 4).spread == pytest.approx(0.05, rel=0.1)
    assert known.PlainLoop((1e-3,) * 4, (1e-3,) * 4).spread == 0


def test_a_mark_that_cannot_be_reset_decides_nothing() -> None:
    facts = _sound()
    for metric in ("prefill_peak_live_bytes", "decode_peak_live_bytes"):
        _value("alloc", _ALLOC, metric, 512)(facts)
    assert _verdicts(facts)["alloc: peak live"] == NOT_DECIDABLE
    _status("alloc", _ALLOC, "error")(facts)
    assert _verdicts(facts)["alloc: peak live"] == NOT_RECOVERED


# -- slopes ----------------------------------------------------------------------------------------------------------


def test_a_slope_is_found_with_its_interval() -> None:
    chance = np.random.default_rng(1)
    values = {d: (3.0 + 0.002 * d + chance.normal(0, 0.05, 20)).tolist() for d in (100, 400, 1600)}
    found = slopes.slope(values)
    assert found.low < 0.002 < found.high
    assert found.value == pytest.approx(np.polyfit(np.repeat([100, 400, 1600], 20), np.ravel([*values.values()]), 1)[0])
    exact = slopes.slope({d: [5.0 - 0.25 * d] * 3 for d in (1, 2, 4)})
    assert (exact.value, exact.low, exact.high) == pytest.approx((-0.25, -0.25, -0.25))


def test_a_ratio_is_that_of_the_medians() -> None:
    found = slopes.ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))  # rounds are drawn as pairs


# -- what measuring costs --------------------------------------------------------------------------------------------


def test_looks_at_clocks_are_counted() -> None:
    import time

    with overhead.counted() as looks:
        for _ in range(7):
            time.perf_counter_ns()
        time.process_time_ns()
    assert looks[time.perf_counter_ns] == 7
    assert looks[time.process_time_ns] == 1
    assert 0 < overhead.cost_s(time.perf_counter_ns) < 1e-4


def test_a_harness_that_looks_too_often_is_heavy() -> None:
    assert overhead.by_accounting(0.0099).verdict == RECOVERED
    assert overhead.by_accounting(0.01).verdict == NOT_RECOVERED


def test_accounting_sees_what_a_task_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand looks in one harness run of short steps are a share that is seen."""
    real, model = overhead.harnessed, overhead.Paced(20)
    with torch.inference_mode():
        usual = overhead.accounted(model)

        def heavy(model: Any, *rest: Any) -> Any:
            [overhead.time.perf_counter_ns() for _ in range(10_000)]
            return real(model, *rest)

        monkeypatch.setattr(overhead, "harnessed", heavy)
        assert overhead.accounted(model) > usual + 0.01


def test_pairs_alternate_in_abba_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def side(name: str, period: float) -> Callable[[Any], None]:
        def run(model: Any) -> None:
            order.append(name)
            model.began.extend([0.0, period, 2 * period])

        return run

    monkeypatch.setattr(overhead, "plain", side("A", 1.0))
    monkeypatch.setattr(overhead, "harnessed", side("B", 1.5))
    without, with_ = overhead.alternated(overhead.Paced(1), pairs=4)
    assert "".join(order) == "ABBAABBA"
    assert (without, with_) == ([1.0] * 4, [1.5] * 4)


@pytest.mark.parametrize(
    ("factor", "scatter", "verdict"),
    [(1.002, 0.0, RECOVERED), (1.03, 0.0, NOT_RECOVERED), (1.002, 0.2, NOT_DECIDABLE), (1.012, 0.05, NOT_DECIDABLE)],
)
def test_an_overhead_is_decided_by_its_whole_interval(factor: float, scatter: float, verdict: str) -> None:
    chance = np.random.default_rng(3)
    without = 1e-3 * (1 + scatter * chance.random(30))
    with_ = 1e-3 * factor * (1 + scatter * chance.random(30))
    assert overhead.by_experiment(without.tolist(), with_.tolist()).verdict == verdict


def _sides(scatter: float, more: float, same: float = 0.0) -> tuple[list[float], list[float], list[float]]:
    chance = np.random.default_rng(5)
    sides = [1e-3 * (1 + up + scatter * chance.standard_normal(30)) for up in (0.0, same, more)]
    return sides[0].tolist(), sides[1].tolist(), sides[2].tolist()


def test_equal_things_are_equal_and_unequal_ones_are_found() -> None:
    assert [f.verdict for f in overhead.told_apart(*_sides(0.003, 0.05))] == [RECOVERED, RECOVERED]
    assert [f.verdict for f in overhead.told_apart(*_sides(0.003, 0.0))] == [RECOVERED, NOT_RECOVERED]
    assert [f.verdict for f in overhead.told_apart(*_sides(0.003, 0.05, same=0.03))] == [NOT_RECOVERED, RECOVERED]
    assert [f.verdict for f in overhead.told_apart(*_sides(0.1, 0.05))] == [NOT_DECIDABLE, NOT_DECIDABLE]


def test_the_real_task_runs_on_the_paced_model() -> None:
    model = overhead.Paced(5)
    with torch.inference_mode():
        rows = overhead.harnessed(model)
        periods = model.periods()
    steps = [row.value for row in rows if row.metric == "tpot_s" and row.value is not None]
    assert steps
    # From one beginning to the next is never less than the step between its stamps, but for what scatters.
    assert statistics.median(periods) > 0.8 * min(steps)
    assert model.periods() == []


# -- the toys --------------------------------------------------------------------------------------------------------


def test_a_slow_start_is_slow_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from bdh_bench.models import toy

    slept: list[float] = []
    monkeypatch.setattr(toy.time, "sleep", slept.append)
    stream = load_model("toy:slow_warmup:slow_calls=2:seconds=0.5").session()
    for _ in range(5):
        stream.extend(torch.zeros((1, 1), dtype=torch.long))
    assert slept == [50.0, 50.0]


def test_numbers_of_calls_and_children_are_not_negative() -> None:
    for option in ("slow_calls", "children"):
        with pytest.raises(SpecError, match=option):
            load_model(f"toy:hang:{option}=-1")


# -- the outcome -----------------------------------------------------------------------------------------------------

_FOUND = (
    Finding("a", "1", "1", RECOVERED),
    Finding("b", "2", "3", NOT_RECOVERED),
    Finding("c", "4", "", NOT_DECIDABLE),
)


def test_an_outcome_is_kept_for_this_machine_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    here = host.environment()
    assert outcome.last(here) == {"result": outcome.NOT_RUN}
    outcome.keep(_FOUND)
    kept = outcome.last(here)
    assert kept["result"] == "1 recovered, 1 not recovered, 1 not decidable"
    assert kept["of"] == "this machine and code"
    assert kept["verdicts"] == {"a": RECOVERED, "b": NOT_RECOVERED, "c": NOT_DECIDABLE}
    assert outcome.last({**here, "cpu": "another"})["of"] == "another machine"
    monkeypatch.setattr(outcome, "_code", lambda: "other")
    assert outcome.last({**here, "cpu": "another"})["of"] == "another machine and other code"


@pytest.mark.parametrize("text", ["", "[]", '{"result": "21 recovered"}', '{"verdicts": 3}', "\x00"])
def test_a_damaged_outcome_was_not_run(text: str) -> None:
    path = outcome.cache_folder() / "selftest.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert outcome.last(host.environment()) == {"result": outcome.NOT_RUN}


def test_every_new_run_carries_the_last_outcome_and_its_report_shows_it(tmp_path: Path) -> None:
    plan = make_plan(RunSpec(("toy:uniform",), ("memory",), contexts=(16,)))

    def stored(run_id: str) -> Any:
        return json.loads((prepare(plan, tmp_path, run_id, False) / "run.json").read_text())["environment"]["selftest"]

    assert stored("before") == {"result": outcome.NOT_RUN}
    outcome.keep(_FOUND)
    after = stored("after")
    assert after["verdicts"]["b"] == NOT_RECOVERED

    def shown(selftest: Any) -> str:
        environment = {**usual_manifest((), 1, 0)["environment"], "selftest": selftest}
        run = write_run(tmp_path / f"{len(str(selftest))}", manifest={"environment": environment})
        return dict(provenance_of(run))["selftest"]

    assert shown({"result": outcome.NOT_RUN}) == "not run"
    text = shown(after)
    assert text.startswith("1 recovered, 1 not recovered, 1 not decidable; b: not recovered; c: not decidable; ")
    assert text.endswith("of this machine and code")


# -- the command -----------------------------------------------------------------------------------------------------


def test_exit_codes_and_the_one_object(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[Finding, ...]] = [_FOUND, (_FOUND[0], _FOUND[2])]
    monkeypatch.setattr(proof, "find", lambda keep, report, perf: found.pop(0))
    code, out, _ = cli("selftest", "--json")
    answer = json.loads(out)
    assert (code, answer["schema"], answer["status"]) == (6, "bdh-bench/selftest/1", "failed")
    assert [row["verdict"] for row in answer["data"]["truths"]] == [RECOVERED, NOT_RECOVERED, NOT_DECIDABLE]
    assert [error["message"] for error in answer["errors"]] == ["b: got 3 · expected 2"]
    code, out, err = cli("selftest")
    assert code == 0
    assert "1 recovered, 1 not decidable" in err
    assert [line.split("  ")[0] for line in out.splitlines()] == ["name", "a", "c"]


def test_toys_through_the_real_runner(tmp_path: Path) -> None:
    """Two of the requests for real: what hangs with a child of its own, and one peak."""
    wanted = [request for request in known.REQUESTS if request.name in ("hang", "alloc")]
    found = known.gather(tmp_path, lambda *a: None, wanted[::-1])
    judged = {t.name: t.found(found) for t in truths.TRUTHS if t.name.startswith(("hang", "alloc"))}
    assert len(judged) == 3
    for finding in judged.values():
        assert finding.verdict == RECOVERED, finding


def test_rows_are_kept_where_asked_and_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "REQUESTS", ())
    monkeypatch.setattr(proof, "gather", lambda folder, report: (folder / "row").write_text("x"))
    monkeypatch.setattr(proof, "judged", lambda evidence: _FOUND)
    proof.find(tmp_path / "rows", lambda *a: None)
    assert (tmp_path / "rows" / "row").exists()
    with pytest.raises(SpecError, match="exists already"):
        proof.find(tmp_path / "rows", lambda *a: None)


def test_a_truth_without_rows_is_not_recovered() -> None:
    nothing = replace(_evidence(_sound()), runs={}, plain={}, families={}, parent=(0.0, 0.0))
    assert {finding.verdict for finding in truths.judged(nothing)} == {NOT_RECOVERED}
