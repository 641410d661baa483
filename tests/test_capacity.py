"""Does the search find the largest batch that fits, does a process end at its cap, and is a multiplied stream the one it was?"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdh_bench import list_models, load_model
from bdh_bench.errors import LawError, SessionError, SpecError
from bdh_bench.models import toy
from bdh_bench.results.store import Run
from bdh_bench.runner import apart
from bdh_bench.runner.plan import make_plan
from bdh_bench.runner.run import execute, prepare
from bdh_bench.session import TensorMemory
from bdh_bench.spec import RunSpec
from bdh_bench.tasks import capacity
from bdh_bench.types import Apart, Measurement, Scalar, TaskContext

_MIB = 2**20
_FAMILIES = [
    e.name for e in list_models() if not e.problem and not e.defaults.get("words") and not e.defaults.get("needs_name")
]


# -- multiplied streams --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [*_FAMILIES, "llama:kv_heads=1:window=24:sinks=3:d_model=48:n_layer=2:n_head=2", "llama:kv_bits=8", "toy:copy"],
)
@torch.inference_mode()
def test_a_multiplied_stream_goes_on_like_the_one(name: str) -> None:
    model = load_model(name)
    tokens = torch.randint(0, 256, (1, 50), generator=torch.Generator().manual_seed(0))
    one = model.session(1)
    one.extend(tokens[:, :38])
    three = one.fork()
    three.multiply(3, room=12)
    assert (three.length, three.batch_size) == (38, 3)
    assert three.state_bytes == model.state_bytes(3, 38)
    room = three.capacity_bytes
    assert room <= max(model.state_bytes(3, 50), model.state_bytes(3, 38))
    for place in range(38, 50):
        token = tokens[:, place : place + 1]
        truth = one.extend(token)
        got = three.extend(token.expand(3, 1))
        assert torch.allclose(got, truth.expand_as(got), atol=2e-5)
    assert three.state_bytes == model.state_bytes(3, 50)
    if "window" not in name:  # it has its own room
        assert three.capacity_bytes == room  # what was asked for was enough


def test_only_one_stream_can_be_multiplied_and_only_where_streams_can_be_told() -> None:
    with pytest.raises(SessionError, match="one stream"):
        load_model("toy:copy").session(2).multiply(2)

    class Shared(toy.Model):
        def memory(self, batch_size: int) -> Any:
            return TensorMemory({"shared": torch.zeros(5)})

    with pytest.raises(SessionError, match="counts streams"):
        Shared(toy.Config()).session(1).multiply(2)


# -- the search --------------------------------------------------------------------------------------------------------


@given(
    truth=st.integers(0, 6000),
    guess=st.integers(0, 8000),
    most=st.integers(1, 5000),
    precision=st.integers(1, 50),
)
def test_the_search_ends_beside_the_truth(truth: int, guess: int, most: int, precision: int) -> None:
    tried: dict[int, bool] = {}
    while (batch := capacity.proposal(tried, guess, most, precision)) is not None:
        assert batch not in tried
        assert 1 <= batch <= most
        tried[batch] = batch <= truth
        assert len(tried) <= 40
    fits = max((b for b, ok in tried.items() if ok), default=0)
    fails = min((b for b, ok in tried.items() if not ok), default=math.inf)
    assert fits <= truth < fails or (fits == most <= truth and fails == math.inf)
    assert fails - fits <= max(1, fits * precision / 100) or fits == most


def test_a_right_guess_needs_four_probes() -> None:
    tried: dict[int, bool] = {}
    while (batch := capacity.proposal(tried, 1003, 4096, 5)) is not None:
        tried[batch] = batch <= 1010
    assert tried == {1: True, 8: True, 1003: True, 1053: False}


def test_the_prediction_is_the_census() -> None:
    """100 of program, 7 of state and 3 of workspace for every stream."""
    footprints = {1: 110, 8: 180}
    assert capacity.predicted(footprints, {1: True, 8: True}, 7, 1105) == 100
    assert capacity.predicted(footprints, {1: True}, 10, 1105) == 100
    assert capacity.predicted({}, {1: False}, 7, 50) == 0


class _Machine:
    """A stand-in for processes: ``base`` and ``each`` byte; whatever is past the cap does not fit."""

    def __init__(self, base: int, each: int) -> None:
        self.base, self.each = base, each

    def __call__(self, request: Mapping[str, Scalar], cap_bytes: int) -> Apart:
        held = self.base + self.each * int(request["streams"] or 0)
        if held > cap_bytes:
            return Apart("oom_host", "too large", {}, held)
        return Apart("ok", "", {"windows": [0.5, 0.25, 0.5]}, held)


def _rows(machine: Any, **config: Any) -> list[Measurement]:
    context = TaskContext(0, 64, (64,), 64, (), "random", False, lambda *a: None, apart=machine)
    model = load_model("toy:linear_kv:bytes_per_token=1")  # 64 bytes of state
    return list(capacity.run(model, capacity.Config(**config), context))


def test_every_probe_is_a_row_with_its_status() -> None:
    rows = _rows(_Machine(1000, 70), budget="8050")
    probes = [row for row in rows if row.metric == "probe_footprint_bytes"]
    assert [(row.batch_size, row.value, row.status) for row in probes] == [
        (1, 1070, "ok"),
        (8, 1560, "ok"),
        (100, 8000, "ok"),
        (105, None, "oom_host"),
    ]
    assert all(row.axes == {"budget": 8050} and row.context == 64 for row in rows)
    assert [row.value for row in rows if row.metric == "capacity_predicted_streams"] == [100]
    assert [row.value for row in rows if row.metric == "probe_step_s" and row.batch_size == 100] == [0.5, 0.25, 0.5]


def test_what_is_no_question_of_memory_ends_the_search() -> None:
    rows = _rows(lambda request, cap: Apart("crash", "SIGSEGV", {}, 0))
    assert [(row.metric, row.status) for row in rows] == [("probe_footprint_bytes", "crash")]
    with pytest.raises(LawError):
        _rows(lambda request, cap: Apart("gate_failed", "wrong bytes", {}, 0))


@pytest.mark.parametrize("budget", ["much", "0", "1.5GiB"])
def test_a_budget_that_is_none_is_refused_before_the_run(budget: str) -> None:
    with pytest.raises(SpecError):
        make_plan(RunSpec(("toy:uniform",), (f"capacity:budget={budget}",), contexts=(8,)))


# -- processes ---------------------------------------------------------------------------------------------------------

_HOLDS = "import sys, json, time; line = sys.stdin.readline(); held = b'x' * (int(line) * 2**20); time.sleep(0.1)"
_ANSWERS = _HOLDS + "; print('noise'); print(json.dumps({'status': 'ok', 'reason': '', 'values': {}, 'peak_bytes': 7}))"


def test_a_process_past_its_cap_is_ended() -> None:
    ended = apart.run_capped([sys.executable, "-c", _HOLDS + "; time.sleep(60)"], "200", 100 * _MIB)
    assert (ended.capped, ended.code) == (True, -9)
    assert ended.peak_bytes > 100 * _MIB
    assert apart._judged(ended, 100 * _MIB).status == "oom_host"


def test_a_process_within_its_cap_answers() -> None:
    ended = apart.run_capped([sys.executable, "-c", _ANSWERS], "50", 100 * _MIB)
    assert (ended.capped, ended.code) == (False, 0)
    assert 50 * _MIB < ended.peak_bytes < 90 * _MIB
    assert apart._judged(ended, 100 * _MIB) == Apart("ok", "", {}, ended.peak_bytes)


def test_a_peak_that_nobody_saw_counts() -> None:
    """Between two looks of the parent: the child's own mark decides."""
    answer = json.dumps({"status": "ok", "reason": "", "values": {}, "peak_bytes": 200})
    assert apart._judged(apart.Ended(0, answer.encode(), 90, False), 100).status == "oom_host"
    assert apart._judged(apart.Ended(0, answer.encode(), 90, False), 300) == Apart("ok", "", {}, 200)


def test_a_process_without_an_answer_is_no_success() -> None:
    found = apart._judged(apart.Ended(-11, b"noise\n", 90, False), 100)
    assert (found.status, found.values) == ("crash", {})
    assert "-11" in found.reason


def _go(spec: RunSpec, root: Path) -> Run:
    plan = make_plan(spec)
    return execute(plan, prepare(plan, root, None, False), lambda *a: None, 300.0)


def test_streams_of_a_known_size_fill_a_known_budget(tmp_path: Path) -> None:
    """8 MiB a stream, measured in real processes: what fits is what the arithmetic says."""
    task = "capacity:budget=400MiB:steps=1:windows=1:precision=15"
    run = _go(RunSpec(("toy:const_state:bytes=8388608",), (task,), contexts=(8,)), tmp_path)
    assert [cell.status for cell in run.cells] == ["ok"]
    probes = {r.batch_size: r for r in run.records if r.metric == "probe_footprint_bytes"}
    fits = max(b for b, r in probes.items() if r.value is not None)
    fails = min(b for b, r in probes.items() if r.value is None)
    assert probes[fails].status == "oom_host"
    assert fails - fits <= 0.15 * fits
    one = probes[1].value or 0
    truth = 1 + (400 * _MIB - one) / (8 * _MIB)
    assert fits - 1 <= truth < fails + 2  # a stream is held beside its copies, and the program itself moves by some MiB
    assert all((r.value or 0) <= 400 * _MIB for r in probes.values())
