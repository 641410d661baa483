"""Is what ``list models --details`` says of a family what the built model is?"""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from bdh_bench import columns, details, list_models, load_model, registry
from bdh_bench.models import mamba, toy
from bdh_bench.registry import Entry

_BUILT = [
    e for e in list_models() if not e.problem and not e.defaults.get("words") and not e.defaults.get("needs_name")
]


@pytest.mark.parametrize("entry", _BUILT, ids=lambda e: e.name)
@pytest.mark.parametrize("size", ["", "1m"])
def test_facts_are_those_of_the_built_model(entry: Entry, size: str) -> None:
    told = details.describe(entry, size)
    sized = hasattr(registry.load("models", entry.name), "scaled")
    model = load_model(f"{entry.name}@{size}" if size and sized else entry.name)
    assert told["parameters"] == sum(p.numel() for p in model.parameters())
    for name, context in (("1k", 1024), ("64k", 65_536)):
        reachable = model.max_positions is None or model.max_positions >= context
        assert told[f"state_bytes_{name}"] == (model.state_bytes(1, context) if reachable else None)
    if model.max_positions is None:
        assert told["flops_per_token_1k"] == model.flops_per_token(1024)
    assert told["kernels"] == (model.kernels() if hasattr(model, "kernels") else "")
    assert told["size"] == ((size or "quick") if sized else "")


def test_what_a_name_alone_does_not_build_is_said() -> None:
    (toys,) = (e for e in list_models() if e.name == "toy")
    assert details.describe(toys) == {"missing": "a word: toy:uniform, …"}
    assert details.describe(Entry("models", "hf", "built in", "bdh_bench.models.absent", "", {"needs_name": True})) == {
        "missing": "an ID: hf:ID"
    }
    assert details.describe(Entry("models", "x", "them", "x", "", problem="broken")) == {}


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stranger's family, as loaded; the test adds what it is about."""
    module: Any = ModuleType("theirs")
    module.Config, module.Model = toy.Config, type("Model", (toy.Model,), {})
    monkeypatch.setattr(registry, "load", lambda *_: module)
    return module


_THEIRS = Entry("models", "theirs", "their-models", "theirs", "")


def test_a_broken_model_is_a_row_that_says_why(family: Any) -> None:
    def fail(*_: Any) -> None:
        raise SystemExit("no\nluck")

    family.Model.__init__ = fail
    assert details.describe(_THEIRS) == {"problem": "SystemExit: no luck"}
    row = details.as_row({"name": "theirs", "origin": "x", **details.describe(_THEIRS)})
    assert row["missing"] == "problem: SystemExit: no luck"
    assert row["parameters"] == ""


def test_missing_is_told_by_the_model_or_its_file_or_not_at_all(family: Any) -> None:
    assert details.describe(_THEIRS)["missing"] == ""
    family.missing = lambda: "a compiler"
    assert details.describe(_THEIRS)["missing"] == "a compiler"
    family.Model.missing = lambda self: "a GPU"
    assert details.describe(_THEIRS)["missing"] == "a GPU"


@pytest.mark.parametrize(
    ("installed", "cuda", "says"),
    [
        ((), False, "mamba-ssm, causal-conv1d and a CUDA device: pip install 'bdh-bench[cuda]'"),
        ((), True, "mamba-ssm and causal-conv1d: pip install 'bdh-bench[cuda]'"),
        (("mamba_ssm",), True, "causal-conv1d: pip install 'bdh-bench[cuda]'"),
        (("mamba_ssm", "causal_conv1d"), False, "a CUDA device"),
        (("mamba_ssm", "causal_conv1d"), True, ""),
    ],
)
def test_mamba_says_what_its_faster_kernels_need(
    installed: tuple[str, ...], cuda: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mamba.Model(mamba.Config(8, 1))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert model.missing() == says


def test_past_the_last_position_there_is_a_dash() -> None:
    (entry,) = (e for e in list_models() if e.name == "gpt2")
    row = details.as_row({"name": "gpt2", "origin": "built in", **details.describe(entry)})
    assert (row["state at 1k"], row["state at 64k"], row["positions"]) == ("–", "–", "384")


def test_the_command_in_a_pipe_and_as_json(cli: Any) -> None:
    code, out, _ = cli("list", "models", "--details", "--size", "1m")
    head, *lines = out.splitlines()
    assert code == 0
    assert len(lines) == len(list_models())
    assert all(line[head.index("origin") :].startswith("built in") for line in lines)
    code, out, _ = cli("list", "models", "--details", "--size", "1m", "--json")
    by_name = {row["name"]: row for row in json.loads(out)["data"]["models"]}
    assert code == 0
    assert by_name["bdh"]["size"] == "1m"
    assert abs(by_name["bdh"]["parameters"] / 1e6 - 1) <= 0.02
    assert f"{by_name['bdh']['parameters']:,}" in next(line for line in lines if line.startswith("bdh@1m"))


@pytest.mark.parametrize(
    ("arguments", "says"), [(["--size", "1m"], "add --details"), (["--details", "--size", "2m"], "no size called '2m'")]
)
def test_sizes_that_cannot_be(arguments: list[str], says: str, cli: Any) -> None:
    code, _, err = cli("list", "models", *arguments)
    assert code == 2
    assert says in err


# -- columns ------------------------------------------------------------------------------------------------------------

_ROWS = [{"name": "a", "n": "1"}, {"name": "long", "n": "1,000"}, {"name": "[red]", "n": ""}]


def test_columns_are_aligned() -> None:
    assert columns.plain(_ROWS, right=("n",)) == "name       n\na          1\nlong   1,000\n[red]\n"
    columns.show([])


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_table_with_the_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", _Terminal())
    columns.show(_ROWS, right=("n",))
    assert sys.stdout.getvalue() == "name       n\n─────  ─────\na          1\nlong   1,000\n[red]\n"  # type: ignore[attr-defined]


_LONG = [{"name": "a", "n": "1", "what": "word " * 20}, {"name": "b", "n": "", "what": "short"}]


def test_the_widest_column_is_folded_to_the_terminal() -> None:
    shown = columns.fitted(_LONG, ("n",), 40)
    assert max(map(len, shown.splitlines())) <= 40
    assert shown.count("word") == 20
    assert shown.splitlines()[3].startswith("      ")  # a folded line has no name


def test_where_that_leaves_too_little_room_each_row_is_a_list() -> None:
    shown = columns.fitted(_LONG, ("n",), 25)
    assert max(map(len, shown.splitlines())) <= 25
    assert shown.count("word") == 20
    assert shown.endswith("\n\nb\n  what  short\n")


@pytest.mark.parametrize("width", [80, 120])
def test_the_details_fit_a_terminal_whole(width: int, cli: Any) -> None:
    rows = json.loads(cli("list", "models", "--details", "--size", "1m", "--json")[1])["data"]["models"]
    shown = columns.fitted([details.as_row(row) for row in rows], details.NUMBERS, width)
    assert max(map(len, shown.splitlines())) <= width
    squeezed = "".join(shown.split())
    for row in rows:
        for fact in details.as_row(row).values():
            assert "".join(fact.split()) in squeezed
