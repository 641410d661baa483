"""Does the planner say what fits, by formula and by measurement, and never more than was measured?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_zoo import ZOO
from timed_run import records, run_of
from typer.testing import CliRunner

from bdh_bench.cli import app
from bdh_bench.errors import CheckpointError, SpecError
from bdh_bench.footprint import needs_of
from bdh_bench.loading import load_model
from bdh_bench.models._hf_shapes import header_elements
from bdh_bench.results.capacity_planning import Needs, Wish, as_row, capacity_of
from bdh_bench.results.store import RoundOutcome, Run
from bdh_bench.session import storage_bytes
from bdh_bench.spec import parse_seconds, parse_tokens

MIB = 2**20
NEEDS = Needs("bdh", "float32", 1000, 100 * MIB, 10 * MIB)


def measured() -> Run:
    """Footprint 200 MiB + B · (1 MiB + T KiB); a step of 2 ms + B · 0.1 ms."""
    rows = []
    for batch in (1, 4, 16):
        for context in (1024, 4096):
            step = 0.002 + batch * 1e-4
            footprint = float(200 * MIB + batch * (MIB + context * 1024))
            for metric, value, task in (("tpot_s", step, "latency"), ("peak_footprint_bytes", footprint, "memory")):
                values = {r: [value] * 3 for r in range(1, 6)}
                changed = {
                    "batch_size": batch,
                    "task": f"{task}:batch_size={batch}",
                    "cell": f"{task}/{batch}/{context}",
                }
                rows += [replace(r, **changed) for r in records("bdh", context, values, metric)]
    return run_of(rows)


def test_the_formula_is_weights_and_states() -> None:
    found = capacity_of(NEEDS, Wish(1024 * MIB, 4096))
    assert (found.streams, found.streams_by, found.limit) == (92, "formula", "memory")
    assert found.tokens_per_s is None
    assert "workspace unknown" in found.remark
    assert "--bandwidth" in found.remark
    quick = capacity_of(NEEDS, Wish(1024 * MIB, 4096, bandwidth=1000.0 * MIB, latency=0.5, price=3.6))
    assert (quick.streams, quick.limit) == (40, "latency")
    assert quick.step_s == pytest.approx(0.5)
    assert quick.tokens_per_s == pytest.approx(80)
    assert quick.cost_per_million == pytest.approx(3.6 / (80 * 3600) * 1e6)


def test_the_limit_that_fails_is_named() -> None:
    wish = Wish(1024 * MIB, 4096)
    assert capacity_of(replace(NEEDS, max_positions=384), wish).limit == "position limit: 384 tokens"
    assert "weights alone" in capacity_of(replace(NEEDS, weights_bytes=2048 * MIB), wish).limit
    nothing = capacity_of(replace(NEEDS, state_bytes=0), wish)
    assert nothing.streams is None
    assert "keeps nothing" in nothing.limit
    assert capacity_of(Needs("bdh", problem="no such file"), wish).limit == "unknown: no such file"


def test_measurements_come_first_and_are_interpolated_inside_the_grid() -> None:
    run = measured()
    at = capacity_of(NEEDS, Wish(230 * MIB, 1024), run)
    assert (at.streams, at.streams_by, at.limit) == (
        14,
        "measured",
        "memory",
    )  # 15 would fit; straight in log-log errs low
    assert at.tokens_per_s == pytest.approx(14 / 0.0034, rel=0.03)
    between = capacity_of(NEEDS, Wish(230 * MIB, 2048), run)
    assert between.streams is not None
    assert 6 <= between.streams <= 10  # the truth is 10, and a chord in log-log never says more
    slow = capacity_of(NEEDS, Wish(2**40, 1024, latency=0.0024), run)
    assert (slow.streams, slow.limit) == (4, "latency")


def test_the_latency_is_held_against_the_95th_percentile_of_single_steps(tmp_path: Path) -> None:
    """One step in ten takes 10 ms: the median step says nothing of it."""
    run = measured()
    spent = np.where(np.arange(320) % 10 == 0, 10_000_000, 2_000_000)
    stamps = np.stack([np.zeros(320, dtype=np.int64), spent], 1).reshape(5, 64, 2)
    folder = tmp_path / "cells" / "x" / "1-1"
    folder.mkdir(parents=True)
    np.savez(folder / "decode.npz", stamps_ns=stamps, block=np.array(1))
    outcome = (RoundOutcome(1, "ok", "", 1, 1, {}, files="x/1-1"),)
    cells = tuple(replace(cell, rounds=outcome) if cell.metric == "tpot_s" else cell for cell in run.cells)
    stored = replace(run, cells=cells, path=tmp_path)
    wish = Wish(2**40, 1024, latency=0.009)
    assert capacity_of(NEEDS, wish, run).streams == 16
    late = capacity_of(NEEDS, wish, stored)
    assert (late.streams, late.limit) == (0, "latency")


@pytest.mark.parametrize("context", [512, 8192])
def test_outside_the_grid_nothing_is_measured(context: int) -> None:
    found = capacity_of(NEEDS, Wish(1024 * MIB, context), measured())
    assert found.streams_by == "formula"
    assert "not measured" in found.remark


def test_the_largest_measured_batch_is_no_limit() -> None:
    found = capacity_of(NEEDS, Wish(2**40, 1024), measured())
    assert (found.streams, found.limit) == (16, "none met: 16 is the largest measured batch")
    assert capacity_of(NEEDS, Wish(100 * MIB, 1024), measured()).streams == 0
    assert capacity_of(replace(NEEDS, model="other"), Wish(1024 * MIB, 1024), measured()).streams_by == "formula"


@pytest.mark.parametrize("name", ["bdh", "llama", "mamba2", "gpt2"])
def test_formulae_are_those_of_the_model_with_weights(name: str) -> None:
    model = load_model(name)
    needs = needs_of(name, 300)
    assert needs.parameters == model.parameter_count()
    assert needs.state_bytes == model.state_bytes(1, 300)
    assert needs.weights_bytes == storage_bytes([*model.parameters(), *model.buffers()])
    assert needs_of(name, 300, "bfloat16").weights_bytes < needs.weights_bytes  # type: ignore[operator]


def checkpoint(name: str, folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = ZOO[name]
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=256, **settings))
    module.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "mamba"])
def test_a_folder_is_told_from_config_and_headers(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name, tmp_path / name)
    model = load_model(f"hf:{folder}:tokenizer=bytes")
    context = 100
    needs = needs_of(f"hf:{folder}", context)
    assert needs.problem == ""
    assert needs.remark == ""
    assert needs.state_bytes == model.state_bytes(1, context)
    assert needs.parameters == model.parameter_count()
    assert needs.weights_bytes == 4 * (header_elements(folder) or 0)
    assert needs.max_positions == model.max_positions


def test_no_weights_are_read(tmp_path: Path) -> None:
    folder = checkpoint("llama", tmp_path / "llama")
    whole = needs_of(f"hf:{folder}", 100)
    (path,) = folder.glob("*.safetensors")
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:length])  # the header alone
    assert needs_of(f"hf:{folder}", 100) == whole
    path.write_bytes(b"\xff" * 16)
    with pytest.raises(CheckpointError, match="damaged header"):
        header_elements(folder)
    assert "damaged header" in needs_of(f"hf:{folder}", 100).problem
    path.unlink()
    assert needs_of(f"hf:{folder}", 100).parameters == whole.parameters  # a config is enough


def test_the_command_prints_a_row_per_model() -> None:
    done = CliRunner().invoke(app, ["plan", "--memory", "1GiB", "--context", "4k", "--models", "bdh,gpt2", "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)["data"]
    assert [row["limit"].split(":")[0] for row in data["models"]] == ["memory", "position limit"]
    assert data["wish"]["context"] == 4096
    assert as_row(capacity_of(NEEDS, Wish(1024 * MIB, 4096)))["streams"] == "92 (formula)"


def test_amounts_are_parsed() -> None:
    assert (parse_tokens("128k"), parse_tokens("4096")) == (131_072, 4096)
    assert parse_seconds("50ms") == pytest.approx(0.05)
    for parse, text in ((parse_tokens, "0"), (parse_tokens, "1.5k"), (parse_seconds, "fast")):
        with pytest.raises(SpecError):
            parse(text)
