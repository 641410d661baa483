"""Does every cell end in a row with a reason, once, whatever happens to its process?"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bdh_bench import load_model
from bdh_bench.data.corpus import open_corpus
from bdh_bench.data.pieces import CarriedText
from bdh_bench.errors import SpecError, UnknownNameError
from bdh_bench.results.assessment import assess
from bdh_bench.results.report.page import cell_command, models_table
from bdh_bench.results.store import Run, open_run
from bdh_bench.runner.plan import _training_bytes, command_line, make_plan
from bdh_bench.runner.run import execute, exit_code, prepare, tally
from bdh_bench.spec import RunSpec
from bdh_bench.tasks import latency, memory
from bdh_bench.types import TaskContext


def _go(spec: RunSpec, root: Path, timeout_s: float = 120.0, **how: Any) -> Run:
    plan = make_plan(spec)
    return execute(plan, prepare(plan, root, how.get("run_id"), how.get("resume", False)), lambda *a: None, timeout_s)


def test_each_death_is_a_row_and_the_others_finish(tmp_path: Path) -> None:
    models = ("toy:segfault", "toy:nan", "toy:oom", "toy:uniform")
    run = _go(
        RunSpec(models, ("latency:budget=smoke:steps=2:windows=2:prefills=1",), contexts=(16,), rounds=1), tmp_path
    )
    assert [c.status for c in run.cells[:3]] == ["crash", "gate_failed", "oom_host"]
    assert run.cells[3].kind == "ok"  # a busy machine may mark it noisy
    assert "SIGSEGV" in run.cells[0].reason
    assert tally(run) == {"ok": 1, "failed": 2, "skipped": 1}
    assert exit_code(run) == 6
    assert all(r.value is None for r in run.records if r.model != "toy:uniform")


def test_a_hanging_cell_times_out_and_its_processes_are_gone(tmp_path: Path) -> None:
    run = _go(RunSpec(("toy:hang",), ("memory",), contexts=(16,)), tmp_path, timeout_s=6.0)
    assert run.cells[0].status == "timeout"
    found = subprocess.run(["pgrep", "-f", "[b]dh_bench.runner.worker"], capture_output=True, text=True, check=False)
    for pid in found.stdout.split():  # other tests may run workers of their own beside this one
        assert str(tmp_path) not in Path(f"/proc/{pid}/cmdline").read_text()
    assert exit_code(run) == 5


def test_a_second_call_repeats_nothing(tmp_path: Path) -> None:
    spec = RunSpec(("toy:uniform", "toy:nan"), ("memory",), contexts=(16,))
    first = _go(spec, tmp_path, run_id="r")
    before = {p: p.read_bytes() for p in (tmp_path / "r" / "events").iterdir()}
    second = _go(spec, tmp_path, run_id="r", resume=True)
    assert second.records == first.records
    assert {p: p.read_bytes() for p in (tmp_path / "r" / "events").iterdir()} == before


def test_an_unfinished_run_of_the_same_request_is_continued(tmp_path: Path) -> None:
    spec = RunSpec(("toy:uniform",), ("memory",), contexts=(16, 32))
    plan = make_plan(spec)
    folder = prepare(plan, tmp_path, None, False)
    assert prepare(plan, tmp_path, None, False) == folder
    run = execute(plan, folder, lambda *a: None, 120.0)
    assert run.finished
    assert prepare(plan, tmp_path, None, False) != folder
    assert prepare(make_plan(RunSpec(("toy:copy",), ("memory",), contexts=(16,))), tmp_path, None, False) != folder


def test_a_used_id_needs_resume_and_the_same_request(tmp_path: Path) -> None:
    spec = RunSpec(("toy:uniform",), ("memory",), contexts=(16,))
    assert prepare(make_plan(spec), tmp_path, "x", True) == tmp_path / "x"  # --resume on a missing run starts it
    with pytest.raises(SpecError, match="--resume"):
        prepare(make_plan(spec), tmp_path, "x", False)
    with pytest.raises(SpecError, match="another request"):
        prepare(make_plan(RunSpec(("toy:uniform",), ("memory",), contexts=(32,))), tmp_path, "x", True)


def test_a_killed_parent_leaves_a_store_that_resumes(tmp_path: Path, books: Path) -> None:
    """SIGKILL to the parent: its worker ends, the cell counts as unfinished, and the same command completes the run."""
    command = [
        sys.executable,
        "-m",
        "bdh_bench.cli",
        "run",
        "--models",
        "bdh:n_embd=16,toy:uniform",
        "--task",
        "long_ppl",
    ]
    command += [
        "--data",
        f"path:{books}",
        "--contexts",
        "128",
        "--train-bytes",
        "65536",
        "--runs",
        str(tmp_path),
        "--json",
    ]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob("*/events/*.jsonl")):
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    (folder,) = [p.parent for p in tmp_path.glob("*/run.json")]
    assert not open_run(folder).finished
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["data"] == {
        "run": folder.name,
        "path": str(folder),
        "cells": {"ok": 2, "failed": 0, "skipped": 0},
    }
    values = [r for r in open_run(folder).records if r.model == "toy:uniform"]
    assert len({(r.sample, r.context) for r in values}) == len(values)
    assert not list((folder / "leases").iterdir())


def test_ctrl_c_keeps_the_training_and_says_how_to_go_on(tmp_path: Path, books: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bdh_bench.cli",
        "run",
        "--models",
        "bdh:n_embd=32",
        "--task",
        "long_ppl",
        "--runs",
        str(tmp_path),
    ]
    command += ["--data", f"path:{books}", "--contexts", "128", "--train-bytes", "8388608", "--run-id", "r"]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob("*/events/*.jsonl")):
        time.sleep(0.05)
    time.sleep(1.0)
    parent.send_signal(signal.SIGINT)
    _, said = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert "bdh-bench run --resume --run-id r" in said
    run = open_run(tmp_path / "r")
    assert run.cells[0].status == "interrupted"
    assert run.records == ()


def test_per_byte_results_are_kept_beside_the_rows(tmp_path: Path, books: Path) -> None:
    run = _go(RunSpec(("toy:uniform",), ("long_ppl",), data=f"path:{books}", contexts=(128,)), tmp_path, run_id="r")
    (path,) = (tmp_path / "r" / "cells").rglob("bits.npz")
    with np.load(path) as arrays:
        assert arrays["bits_c128"].shape == (len(arrays["block_start"]), 128)
    assert "smoke" in run.manifest["labels"]
    assert {row["name"] for row in run.manifest["references"]} >= {
        "order-0 byte model",
        "order-1 byte model",
        "order-2 byte model",
        "zlib",
    }
    assert len(run.manifest["corpus"]["documents"]) == 12


def test_memory_and_latency_rows_have_units_and_truths(tmp_path: Path) -> None:
    spec = RunSpec(
        ("toy:linear_kv", "toy:sleep", "gpt2"),
        ("memory", "latency:budget=smoke:steps=3:windows=2:prefills=2"),
        contexts=(64, 600),
        rounds=1,
    )
    run = _go(spec, tmp_path)
    state = {(r.model, r.context): r.value for r in run.records if r.metric == "state_bytes"}
    assert state["toy:linear_kv", 600] * 64 == state["toy:linear_kv", 64] * 600  # type: ignore[operator]
    assert state["gpt2", 600] is None
    assert all(r.value >= 1e-3 for r in run.records if r.metric == "tpot_s" and r.model == "toy:sleep")  # type: ignore[operator]
    assert {c.status for c in run.cells if c.model == "gpt2" and c.context == 600} == {"unsupported"}
    assert exit_code(run) == 0


def test_rounds_are_interleaved_and_no_part_of_the_key() -> None:
    spec = RunSpec(("bdh", "gpt2", "llama"), ("latency", "memory"), contexts=(16, 32), seeds=(0, 1))
    plan = make_plan(spec)
    assert {c.rounds for c in plan.cells if c.task == "latency"} == {5}
    assert {c.rounds for c in plan.cells if c.task == "memory"} == {1}
    assert {c.key for c in make_plan(replace(spec, rounds=2)).cells} == {c.key for c in plan.cells}
    timed = [c for c in plan.cells if c.task == "latency"]
    once = [(c, 1) for c in plan.cells if c.task == "memory"]
    assert plan.rounds[: len(once)] == tuple(once)  # as planned
    drawn = plan.rounds[len(once) :]
    orders = [drawn[i * len(timed) : (i + 1) * len(timed)] for i in range(5)]
    for number, order in enumerate(orders, 1):
        assert {n for _, n in order} == {number}
        assert {c.key for c, _ in order} == {c.key for c in timed}
    assert len({tuple(c.key for c, _ in order) for order in orders}) == 5  # each round in an order of its own
    assert make_plan(spec).rounds == plan.rounds
    assert {c.rounds for c in make_plan(replace(spec, smoke=True)).cells} == {1}
    with pytest.raises(SpecError, match="repeats in rounds"):
        make_plan(replace(spec, tasks=("memory",), rounds=3))


def test_every_round_is_a_process_and_a_row_and_is_resumed_on_its_own(tmp_path: Path) -> None:
    spec = RunSpec(("toy:uniform",), ("latency:budget=smoke:steps=2:windows=2:prefills=1",), contexts=(16,), rounds=2)
    plan = make_plan(spec)
    folder = prepare(plan, tmp_path, "r", False)
    first = replace(plan, cells=(replace(plan.cells[0], rounds=1),))
    half = execute(first, folder, lambda *a: None, 120.0)
    assert (half.finished, tally(half)) == (False, {"ok": 0, "failed": 0, "skipped": 0})
    shard = {p: p.read_bytes() for p in (folder / "events").iterdir()}
    run = execute(plan, prepare(plan, tmp_path, "r", True), lambda *a: None, 120.0)
    assert tally(run) == {"ok": 1, "failed": 0, "skipped": 0}
    assert {p: p.read_bytes() for p in shard} == shard
    assert [(one.round, one.attempt) for one in run.cells[0].rounds] == [(1, 1), (2, 1)]
    key = run.cells[0].key[:16]
    assert sorted(p.name for p in (folder / "cells" / key).iterdir()) == ["1-1", "2-1"]
    windows = {
        r.round: {s.repeat for s in run.records if (s.metric, s.round) == ("tpot_s", r.round)} for r in run.records
    }
    assert sorted(windows) == [1, 2]
    assert all({0, 1} <= repeats for repeats in windows.values())
    assert cell_command(run, run.cells[0]).endswith("--rounds 2")


def test_cells_change_with_what_changes_their_numbers(books: Path) -> None:
    base = RunSpec(("bdh",), ("long_ppl",), data=f"path:{books}", contexts=(128,))
    keys = {make_plan(base).cells[0].key}
    for changed in (
        {"contexts": (128, 256)},
        {"train_bytes": 7},
        {"seeds": (1,)},
        {"models": ("bdh:n_layer=2",)},
        {"documents": 1},
        {"state_protocol": "cold"},
        {"split_documents": 2000},
    ):
        keys.add(make_plan(RunSpec(**{**base.__dict__, **changed})).cells[0].key)
    (books / "book00.txt").write_text("another text " * 300)
    keys.add(make_plan(base).cells[0].key)
    assert len(keys) == 9
    latency = RunSpec(("bdh",), ("latency",), train_bytes=1)
    assert make_plan(latency).cells == make_plan(RunSpec(("bdh",), ("latency",), train_bytes=2)).cells  # never trains


def test_the_printed_command_asks_for_the_same_run() -> None:
    spec = RunSpec(
        ("bdh", "toy:copy:period=32"), ("memory",), contexts=(64, 128), seeds=(0, 1, 2), threads=1, train_bytes=5
    )
    assert command_line(spec) == (
        "bdh-bench run --models bdh,toy:copy:period=32 --task memory --train-bytes 5 --contexts 64,128 --seeds 3 --threads 1"
    )


def test_the_training_regime_reaches_the_weights_the_reference_lines_and_the_report(
    tmp_path: Path, books: Path
) -> None:
    model, task = "llama:d_model=16:n_layer=1:n_head=2", "long_ppl:block=32:blocks=1"
    crop = RunSpec((model,), (task,), f"path:{books}", (64,), 4096, 64, threads=1, learning_rate=1e-2)
    carried = replace(crop, regime="carried")
    assert command_line(carried) == command_line(crop).replace(" --learning-rate", " --regime carried --learning-rate")
    plans = [make_plan(spec) for spec in (crop, carried)]
    assert plans[0].cells[0].key != plans[1].cells[0].key
    documents = open_corpus(carried.data).part("train")
    pieces = islice(CarriedText(documents, 8, 64).pieces(0), 8)
    # the reference lines are fitted on the bytes that the models read
    assert np.array_equal(_training_bytes(carried, documents), np.concatenate([p.targets.ravel() for p in pieces]))
    assert len(_training_bytes(crop, documents)) == 4096
    assert plans[0].references != plans[1].references
    run = _go(carried, tmp_path)
    assert run.cells[0].facts["training"]["regime"] == "carried"
    row = {column: entry.text for column, entry in zip(*_models_of(run), strict=True)}
    assert row["trained on"] == "4,096 bytes, carried up to 1,024"
    assert "--regime carried" in cell_command(run, run.cells[0])


def test_where_a_stream_starts_anew_is_part_of_the_printed_command() -> None:
    spec = RunSpec(("bdh",), ("long_ppl",), state_protocol="cold", split_documents=204_800)
    assert command_line(spec).endswith("--state cold --split-documents 204800")


def _models_of(run: Run) -> tuple[Any, Any]:
    table = models_table(run, {cell.model: cell.model for cell in run.cells})
    return table.columns, table.rows[0]


@pytest.mark.parametrize(
    "spec",
    [
        RunSpec(("bhd",), ("memory",)),
        RunSpec(("bdh:n_heads=2",), ("memory",)),
        RunSpec(("bdh",), ("memry",)),
        RunSpec(("bdh",), ("memory:step=2",)),
        RunSpec(("bdh",), ("memory:steps=0",)),
        RunSpec(("toy:unifrm",), ("memory",)),
        RunSpec(("bdh",), ("long_ppl",), data="path:/nowhere"),
        RunSpec(("bdh",), ("long_ppl",), contexts=(1 << 26,)),
        RunSpec(("bdh:weights=/no/file",), ("memory",)),
        RunSpec(("bdh",), ("memory",), device="tpu"),
        RunSpec(("bdh",), ("long_ppl",), regime="carry"),
        RunSpec(("bdh",), ("long_ppl",), state_protocol="warm"),
    ],
)
def test_impossible_requests_fail_before_anything_is_written(spec: RunSpec) -> None:
    with pytest.raises((SpecError, UnknownNameError)):
        make_plan(spec)


def test_the_declarations_are_in_the_command_and_kinds_are_in_the_manifest() -> None:
    spec = RunSpec(("toy:uniform", "gpt2", "bdh"), ("memory",), contexts=(16,), match="bytes", equivalence_margin=0.01)
    assert command_line(spec).endswith("--match bytes --equivalence-margin 0.01")
    assert "--match" not in command_line(replace(spec, match="params", equivalence_margin=0.02))
    kinds = [cell["kind"] for cell in make_plan(spec).manifest("", "", {})["cells"]]
    assert kinds == ["control", "transformer", "recurrent"]


def test_a_trained_cell_knows_what_the_fairness_card_asks(tmp_path: Path, books: Path) -> None:
    """Each fact against its own arithmetic: L = 2 passes, D = 16, H·N = 64, V = 256, T = 64."""
    name = "bdh:mlp_internal_dim_multiplier=4:n_embd=16:n_head=2:n_layer=2"
    spec = RunSpec((name,), ("long_ppl",), data=f"path:{books}", contexts=(128,), train_bytes=8192, train_context=64)
    run = _go(spec, tmp_path)
    facts = run.cells[0].facts
    shared, embedding = 3 * 64 * 16, 256 * 16
    assert facts["parameters"] == shared + 2 * embedding
    assert facts["non_embedding_parameters"] == shared + embedding  # the output head is no embedding
    assert facts["unrolled_parameters"] == 2 * shared + 2 * embedding
    assert facts["state_bytes"] == {str(k * 64): 2 * 64 * 16 * 4 for k in (1, 4, 16)}
    forward = load_model(name, train_context=64).flops_per_token(32, "chunked")  # the mean context of a piece
    assert facts["training"]["flops"] == pytest.approx(3 * forward * 8192)
    assert (facts["start_symbol"], facts["vocab_size"], facts["training"]["clip_norm"]) == (10, 256, 1.0)
    card = assess(run).card
    missing = {row for row, value in card.values[name].items() if value is None}
    assert missing == set()
    assert run.cells[0].model_kind == "recurrent"


@pytest.mark.parametrize("task", [memory, latency], ids=["memory", "latency"])
@pytest.mark.parametrize("vocabulary", [16, 5000])
def test_random_tokens_are_those_of_the_whole_vocabulary(
    task: Any, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = load_model(f"toy:uniform:vocab_size={vocabulary}"), set()
    advance = model.advance

    def watched(state: Any, position: int, tokens: Any, keep: Any) -> Any:
        seen.update(tokens.flatten().tolist())
        return advance(state, position, tokens, keep)

    monkeypatch.setattr(model, "advance", watched)
    list(task.run(model, task.Config(steps=1), TaskContext(0, 400, (400,), 256, (), "random", False, lambda *_: None)))
    assert max(seen) < vocabulary
    assert len(seen) > min(vocabulary - 1, 256)
