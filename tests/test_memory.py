"""Are the bytes of the memory task what the system, the arithmetic and another tool say?

Known truths: a toy that allocates 100 MiB in every call, logits of a known size, a model that leaks; and the mark of
``/usr/bin/time -v`` for the same process. Tolerances: 2 % of a peak of 100 MiB, 1 % of a whole process, bytes of tensors exact.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bdh_bench import list_models, load_model
from bdh_bench.measure import memory as marks
from bdh_bench.models import toy
from bdh_bench.session import storage_bytes
from bdh_bench.tasks import memory
from bdh_bench.types import Measurement, TaskContext

_MIB = 2**20
_FAMILIES = [
    e.name for e in list_models() if not e.problem and not e.defaults.get("words") and not e.defaults.get("needs_name")
]


def _measured(model: Any, context: int, **config: int) -> dict[tuple[str, str], Measurement]:
    """(metric, keep) → the row."""
    told = TaskContext(0, context, (context,), context, (), "random", False, lambda *a: None)
    rows = memory.run(model, memory.Config(**config), told)
    return {(row.metric, str(row.axes.get("keep", ""))): row for row in rows}


def _value(rows: dict[tuple[str, str], Measurement], metric: str, keep: str = "") -> float:
    value = rows[metric, keep].value
    assert value is not None
    return value


# -- peaks -------------------------------------------------------------------------------------------------------------


def test_an_allocation_of_100_mib_is_the_peak_of_each_phase() -> None:
    """The least of three: counters of the kernel come in batches, and a process that ran other tests adds a few MiB now and then."""
    found = [_measured(load_model("toy:alloc"), 1024) for _ in range(3)]
    for metric, keep in (
        ("prefill_peak_live_bytes", "last"),
        ("prefill_peak_live_bytes", "all"),
        ("decode_peak_live_bytes", ""),
    ):
        assert min(_value(rows, metric, keep) for rows in found) == pytest.approx(100 * _MIB, rel=0.02)
    assert all(_value(rows, "peak_footprint_bytes") > 100 * _MIB for rows in found)
    assert min(abs(_value(rows, "fragmentation_bytes")) for rows in found) < 2 * _MIB


class _Greedy(toy.Model):
    """Allocates in one phase only."""

    phase = "prefill"

    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        if (tokens.shape[1] > 8) == (self.phase == "prefill"):
            torch.ones(50 * _MIB, dtype=torch.uint8)
        return super().advance(memory, position, tokens, keep)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_peak_of_one_phase_is_not_that_of_the_other(phase: str) -> None:
    model = _Greedy(toy.Config())
    model.phase = phase
    rows = _measured(model, 512)
    peaks = {
        "prefill": _value(rows, "prefill_peak_live_bytes", "last"),
        "decode": _value(rows, "decode_peak_live_bytes"),
    }
    assert peaks.pop(phase) == pytest.approx(50 * _MIB, rel=0.04)
    assert all(peak < 2 * _MIB for peak in peaks.values())


class _Leaking(toy.Model):
    """Keeps 32 MiB of every session for ever."""

    leaked: tuple[Tensor, ...] = ()

    def memory(self, batch_size: int) -> Any:
        self.leaked += (torch.ones(32 * _MIB, dtype=torch.uint8),)
        return super().memory(batch_size)


def test_what_is_never_given_back_is_told() -> None:
    rows = _measured(_Leaking(toy.Config()), 64)
    assert _value(rows, "fragmentation_bytes") == pytest.approx(64 * _MIB, rel=0.04)  # two measured sessions


def test_without_a_mark_that_can_be_set_back_the_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks, "reset_peak", lambda: False)
    rows = _measured(toy.Model(toy.Config("const_state")), 64)
    for key in (
        ("prefill_peak_live_bytes", "last"),
        ("prefill_peak_live_bytes", "all"),
        ("decode_peak_live_bytes", ""),
    ):
        assert (rows[key].value, rows[key].status) == (None, "unsupported")
        assert "reset" in rows[key].reason
    footprint = rows["peak_footprint_bytes", ""]
    assert footprint.value == marks.peak_resident_bytes()
    assert "since the start of the process" in footprint.reason


# -- logits (P21) ------------------------------------------------------------------------------------------------------

_WIDE = toy.Config(vocab_size=50_000)


class _AllLogits(toy.Model):
    """Computes the logits of every position when asked for the last."""

    view = False

    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        last = super().advance(memory, position, tokens, "all")[:, -1:]
        return last if self.view else last.clone()


def test_logits_are_told_apart_from_activations() -> None:
    """P21: what is planted in ``_AllLogits`` is seen, as a peak or as a storage."""
    size = 512 * 50_000 * 4
    sound = _measured(toy.Model(_WIDE), 1024)
    assert _value(sound, "logits_bytes", "last") == 50_000 * 4
    assert _value(sound, "logits_bytes", "all") == size
    assert _value(sound, "prefill_peak_live_bytes", "last") < 0.02 * size
    assert _value(sound, "prefill_peak_live_bytes", "all") == pytest.approx(size, rel=0.02)
    planted = _AllLogits(_WIDE)
    wasteful = _measured(planted, 1024)
    assert _value(wasteful, "prefill_peak_live_bytes", "last") > 0.98 * size
    assert _value(wasteful, "logits_bytes", "last") == 50_000 * 4
    planted.view = True
    assert _value(_measured(planted, 1024), "logits_bytes", "last") == size


@cache
def _model(name: str) -> Any:
    return load_model(name)


@pytest.mark.parametrize("name", [*_FAMILIES, "toy:uniform", "toy:copy"])
def test_no_model_hands_out_more_than_the_last_logits(name: str) -> None:
    model = _model(name)
    with torch.inference_mode():
        logits = model.session(2).extend(torch.zeros((2, 65), dtype=torch.long))
    assert storage_bytes([logits]) == logits.numel() * logits.itemsize == 2 * model.vocab_size * logits.itemsize


# -- another tool ------------------------------------------------------------------------------------------------------

_TIME = Path("/usr/bin/time")
_CHILD = """
import sys
from bdh_bench import load_model
from bdh_bench.measure import memory as marks
from bdh_bench.tasks import memory
from bdh_bench.types import TaskContext
if sys.argv[1] == "fixed":
    marks.reset_peak = lambda: False
told = TaskContext(0, 64, (64,), 64, (), "random", False, lambda *a: None)
rows = memory.run(load_model("toy:alloc:bytes=314572800"), memory.Config(steps=2), told)
print([row.value for row in rows if row.metric == "peak_footprint_bytes"][0])
"""


@pytest.mark.skipif(not _TIME.is_file(), reason="there is no /usr/bin/time here to compare with")
@pytest.mark.parametrize("mark", ["reset", "fixed"])
def test_gnu_time_sees_the_same_peak_of_the_process(mark: str) -> None:
    """Within 1 %: with the mark set back between phases (each of which has the peak) and without."""
    command = [str(_TIME), "-v", sys.executable, "-c", _CHILD, mark]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    theirs = int(re.findall(r"Maximum resident set size \(kbytes\): (\d+)", done.stderr)[0]) * 1024
    assert float(done.stdout) == pytest.approx(theirs, rel=0.01)
    assert theirs > 300 * _MIB


# -- census ------------------------------------------------------------------------------------------------------------

_STOPS = (1, 2, 63, 64, 65, 127, 128, 129, 1000, 1024, 4096, 16_384)
#: As small as each family allows: the count is of shapes, and a long text is read quickly.
_SMALL = {
    "bdh": "n_layer=2:n_embd=8:n_head=2:mlp_internal_dim_multiplier=8",
    "gated_delta": "d_model=8:n_layer=2:n_head=2:key_dim=4",
    "gpt2": "n_embd=8:n_layer=1:n_head=1:max_positions=16384",
    "linear_attention": "d_model=8:n_layer=2:n_head=2",
    "llama": "d_model=8:n_layer=1:n_head=1",
    "lstm": "d_model=8:n_layer=2",
    "mamba": "d_model=8:n_layer=2:state_size=4",
    "mamba2": "d_model=8:n_layer=2:state_size=4",
}
_CENSUS = [f"{name}:{_SMALL[name]}" if name in _SMALL else name for name in _FAMILIES] + [
    "llama:d_model=8:n_layer=2:n_head=2:kv_heads=1:window=100:sinks=3",
    "llama:d_model=8:n_layer=1:n_head=1:kv_bits=8",
    "toy:linear_kv:bytes_per_token=3",
    "toy:copy",
]


@pytest.mark.parametrize("name", _CENSUS)
@torch.inference_mode()
def test_the_census_is_the_formula(name: str) -> None:
    """Exactly, for 1 to 4 streams and 1 to 16,384 tokens, across the edges of chunks, rooms and windows."""
    model = load_model(name)
    for batch in (1, 2, 3, 4):
        session = model.session(batch)
        assert session.state_bytes == model.state_bytes(batch, 0)
        for start, stop in pairwise((0, *_STOPS)):
            if stop > {1: 16_384, 4: 4096}.get(batch, 1024):  # time, not principle
                break
            for piece in torch.zeros((batch, stop - start), dtype=torch.long).split(1024, 1):
                session.extend(piece)
            assert session.state_bytes == model.state_bytes(batch, stop), (batch, stop)
            assert session.capacity_bytes >= session.state_bytes
