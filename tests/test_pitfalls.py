"""Does ``docs/pitfalls.md`` tell the truth: is each check where it says, and is there a test in which it fails?

Below the page's own tests are those that prove a check which has no better home.
"""

from __future__ import annotations

import ast
import re
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic_run
import torch
from torch import Tensor

from bdh_bench import load_model
from bdh_bench.errors import LawError, UnknownNameError
from bdh_bench.metrics import METRICS, metric
from bdh_bench.models import toy
from bdh_bench.registry import list_models, load
from bdh_bench.results.figures import figures_of
from bdh_bench.results.store import measurement_body
from bdh_bench.results.tables import points_of
from bdh_bench.runner import gates
from bdh_bench.runner.worker import _model_facts, _outcome
from bdh_bench.spec import RunSpec, parse_model
from bdh_bench.tasks import _exercises, latency, memory
from bdh_bench.types import Cell, Measurement, TaskContext

_ROOT = Path(__file__).parent.parent
_PAGE = (_ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")

#: Pitfalls of which a part has no check yet. Closing one means to change this line and the page.
OPEN: set[str] = set()


def _rows(page: str) -> dict[str, list[str]]:
    cells = ([c.strip() for c in line.strip("|").split("|")] for line in page.splitlines() if re.match(r"\| P\d", line))
    return {number: rest for number, *rest in cells}


@cache
def _tests_of(name: str) -> frozenset[str]:
    """The test functions at the top of a test file, without running it."""
    path = _ROOT / "tests" / name
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.parse("")
    return frozenset(n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def problems(page: str) -> list[str]:
    """What this page says that is not so."""
    rows = _rows(page)
    found = [f"no row {n}" for n in (f"P{i}" for i in range(1, 31)) if n not in rows]
    for number, (_, _, where, state, tests) in rows.items():
        named, modules = re.findall(r"`([^`]+)`", tests), re.findall(r"`([^`]+)`", where)
        found += [f"{number}: no module {m}" for m in modules if not (_ROOT / "bdh_bench" / m).is_file()]
        for file, _, test in (name.partition("::") for name in named):
            if test not in _tests_of(file):
                found.append(f"{number}: no test {file}::{test}")
        if state not in ("closed", "open"):
            found.append(f"{number}: state {state!r}")
        if not modules or not named:
            found.append(f"{number}: no module or no test")
        if (state == "open") != (f"\n- {number}: " in page):
            found.append(f"{number}: {state}, and the list of open parts says otherwise")
    return found


def test_the_page_names_checks_and_tests_that_exist() -> None:
    assert problems(_PAGE) == []


def test_what_is_open_is_known() -> None:
    assert {number for number, row in _rows(_PAGE).items() if row[3] == "open"} == OPEN


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("test_other_targets`", "test_other_target`", "P13: no test"),
        ("`results/figures.py`", "`results/drawing.py`", "P13: no module"),
        ("test_store.py::", "test_stores.py::", "P4: no test"),
        ("| P7 |", "| P77 |", "no row P7"),
        ("\n## Gates", "\n- P22: not yet\n\n## Gates", "P22: closed"),
        (
            "| `runner/sweep.py` `runner/recipes.py` | closed |",
            "| `runner/sweep.py` `runner/recipes.py` | open |",
            "P3: open",
        ),
    ],
)
def test_a_page_that_rots_is_noticed(old: str, new: str, says: str) -> None:
    assert old in _PAGE
    assert any(problem.startswith(says) for problem in problems(_PAGE.replace(old, new)))


# -- proofs without a better home ------------------------------------------------------------------------------------


def _context(length: int) -> TaskContext:
    return TaskContext(0, length, (length,), length, (), "random", False, lambda *a: None)


class _Wrong(toy.Model):
    def state_bytes(self, batch_size: int, context: int) -> int:
        return super().state_bytes(batch_size, context) + 1


def test_a_wrong_state_formula_stores_no_bytes() -> None:
    """P2."""
    sound = toy.Model(toy.Config("linear_kv"))
    passed: list[tuple[Any, ...]] = []
    context = TaskContext(**{**_context(16).__dict__, "passed": lambda *row: passed.append(row)})
    assert any(m.metric == "state_bytes" for m in memory.run(sound, memory.Config(), context))
    assert passed == [("census", 0.0, 0.0)]
    with pytest.raises(LawError) as raised:
        list(memory.run(_Wrong(toy.Config("linear_kv")), memory.Config(), _context(16)))
    assert (raised.value.gate, raised.value.error, raised.value.bound) == ("census", 1.0, 0.0)


def test_there_is_no_perplexity_to_compare() -> None:
    """P6."""
    for name in ("ppl", "perplexity", "word_perplexity", "token_perplexity"):
        with pytest.raises(UnknownNameError):
            metric(name)
    assert not [m for m in METRICS.values() if "perplexity" in f"{m.name} {m.label}".lower()]


def test_other_targets_are_another_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P13."""

    def lines(root: Path) -> int:
        run = synthetic_run.write_run(root, models=("bdh@1m",), crash=None)
        figures = {figure.id: figure for figure in figures_of(run, points_of(run))}
        return len(figures["quality"].series)

    before = lines(tmp_path / "same")

    def moved(m: Measurement) -> dict[str, Any]:
        body = measurement_body(m)
        if m.context >= 512 and "target_hash" in m.axes:
            body["axes"] = {"target_hash": "other"}
        return body

    monkeypatch.setattr(synthetic_run, "measurement_body", moved)
    assert lines(tmp_path / "moved") == before + 1


def test_published_weights_do_not_tell_what_they_have_read() -> None:
    """P17."""
    model = load_model("toy:uniform")
    assert _model_facts(model, parse_model("toy:uniform:weights=x"), 256)["contamination"] == "unknown"
    assert _model_facts(model, parse_model("toy:uniform"), 256)["contamination"] == ""


class _SlowPrefill(toy.Model):
    """50 ms for every piece, next to nothing for a token."""

    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        if tokens.shape[1] > 1:
            time.sleep(0.05)
        return super().advance(memory, position, tokens, keep)


def test_a_slow_prefill_is_not_in_the_time_per_token() -> None:
    """P20."""
    config = latency.Config("smoke", steps=4, windows=3, prefills=1)
    rows = [m for m in latency.run(_SlowPrefill(toy.Config()), config, _context(64)) if isinstance(m, Measurement)]
    assert min(m.value or 0 for m in rows if m.metric == "prefill_s") >= 0.05
    assert min(m.value or 1 for m in rows if m.metric == "tpot_s") < 0.0125  # a fourth of a piece


def test_a_trained_cell_has_half_of_its_training_and_its_start_symbol(books: Path, tmp_path: Path) -> None:
    """P24 and P30, through the worker; ``crop+carried`` has no half, for that would be another regime."""
    name = "bdh:n_layer=1:n_embd=16:n_head=2:mlp_internal_dim_multiplier=4"
    spec = RunSpec((name,), ("long_ppl",), f"path:{books}", (64, 128, 256), 8192, 64, smoke=True)
    found = {}
    for regime in ("crop", "crop+carried"):
        one = replace(spec, regime=regime)
        files = tmp_path / regime
        files.mkdir()
        found[regime] = _outcome(Cell("k", name, "long_ppl", 0), one, (64, 128, 256), files)
        assert found[regime]["status"] == "ok", found[regime]["reason"]
    facts = found["crop"]["facts"]
    half = [row for row in found["crop"]["measurements"] if row["metric"] == "halfway_bits_per_byte"]
    assert {row["context"] for row in half} == {64, 128}
    assert facts["training"]["halfway"]["bytes"] == 4096
    assert facts["training"]["halfway"]["sha256"] != facts["training"]["sha256"]
    assert facts["start_symbol_check"]["documents"] > 0
    assert (tmp_path / "crop" / "halfway.npz").is_file()
    assert found["crop+carried"]["facts"]["training"]["halfway"] is None
    assert not [row for row in found["crop+carried"]["measurements"] if row["metric"] == "halfway_bits_per_byte"]


_CONVOLVED = ("mamba", "mamba2", "gated_delta")


@pytest.mark.parametrize("family", _CONVOLVED)
def test_a_short_convolution_can_be_left_out(family: str) -> None:
    """P29: with ``conv_kernel=1`` a model looks at no neighbour past its state, and keeps every gate."""

    def looks_at_a_neighbour(kernel: int) -> bool:
        model = load_model(f"{family}:conv_kernel={kernel}:d_model=32:n_layer=1")
        logits = []
        with torch.inference_mode():
            for first in (3, 4):
                session = model.session()
                session.extend(torch.tensor([[first, first, first, first]]))
                kept = session.memory.tensors()
                session.memory.load({n: t if "conv" in n else torch.zeros_like(t) for n, t in kept.items()})
                logits.append(session.extend(torch.tensor([[5]])))
        return not torch.equal(*logits)

    assert looks_at_a_neighbour(4)
    assert not looks_at_a_neighbour(1)
    assert all(f.kept for f in gates.gates_of(load_model(f"{family}:conv_kernel=1:d_model=32:n_layer=2"), (65,)))


def test_every_family_with_a_short_convolution_can_leave_it_out() -> None:
    """P29: the list above is whole."""
    built_in = [entry.name for entry in list_models() if entry.origin == "built in"]
    found = [name for name in built_in if "conv_kernel" in load("models", name).Config.__dataclass_fields__]
    assert sorted(found) == sorted(_CONVOLVED)


def test_an_example_drawn_from_a_shared_generator_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """P25."""

    def draw(index: int) -> list[int]:
        return _exercises.generator("task", "test", index).integers(100, size=8).tolist()  # type: ignore[no-any-return]

    def depends_on_order() -> bool:
        forwards = [draw(i) for i in range(3)]
        return forwards[::-1] != [draw(i) for i in (2, 1, 0)]

    assert not depends_on_order()
    shared = np.random.default_rng(0)
    monkeypatch.setattr(_exercises, "generator", lambda *identity: shared)
    assert depends_on_order()
