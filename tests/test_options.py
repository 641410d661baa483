"""Can a user find out every option of every model and task without reading source, and without torch?"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from bdh_bench import list_models, options, registry
from bdh_bench.registry import Entry
from bdh_bench.spec import WEIGHT_OPTIONS

_DOCSTRING = """Shapes, where ``depth`` counts layers; ``width`` is D.

    one, two   what both are,
               and more of it
    three      what three is
    Note       no option

Nothing else of ``three`` counts.
"""


def test_what_a_docstring_says_of_each_option() -> None:
    names = ("one", "two", "three", "depth", "width", "unsaid")
    plain = "\n".join(line.removeprefix("    ") for line in _DOCSTRING.splitlines())
    both = "what both are, and more of it"
    for text in (_DOCSTRING, plain):
        assert options.meanings(text, names) == {
            "one": both,
            "two": both,
            "three": "what three is",
            "depth": "Shapes, where depth counts layers",
            "width": "width is D",
        }
    assert options.meanings("", names) == {}


def test_defaults_are_shown_as_they_are_written() -> None:
    shown = [row["default"] for row in options.rows({"a": True, "b": False, "c": 0, "d": None, "e": "auto"}, {})]
    assert shown == ["on", "off", "0", "", "auto"]


@pytest.mark.parametrize("entry", [*list_models(), *registry.list_tasks()], ids=lambda e: f"{e.kind}-{e.name}")
def test_every_option_has_a_meaning(entry: Entry) -> None:
    assert [name for name in entry.options if not entry.meanings.get(name)] == []


def test_one_model_with_its_options(cli: Any) -> None:
    code, out, _ = cli("list", "models", "llama")
    assert code == 0
    lines = {line.split()[0]: line for line in out[out.index("options:") :].splitlines() if line}
    assert {*registry.find("models", "llama").options, *WEIGHT_OPTIONS} <= lines.keys()
    assert lines["kv_bits"].split()[1] == "0"
    assert "round keys and values" in lines["kv_bits"]
    assert "position limit: none" in out
    (row,) = json.loads(cli("list", "models", "llama", "--json")[1])["data"]["models"]
    assert {"option": "rope_theta", "default": "10000.0", "meaning": "base of the rotary frequencies"} in row["options"]
    assert row["kind"] == "transformer"


def test_one_task_with_its_protocol_and_options(cli: Any) -> None:
    code, out, _ = cli("list", "tasks", "recall")
    assert code == 0
    assert "Source: " in out
    assert "forgetting" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["models", "lama"], "did you mean 'llama'"),
        (["tasks", "llama"], "no task called 'llama'"),
        (["runs", "mine"], "bdh-bench show mine"),
        (["tasks", "--details"], "expected models"),
    ],
)
def test_what_cannot_be_listed(arguments: list[str], says: str, cli: Any) -> None:
    code, out, err = cli("list", *arguments)
    assert (code, out) == (2, "")
    assert says in err


def test_it_is_told_without_torch() -> None:
    code = "import sys; from bdh_bench.cli import app; app(['list', 'models', 'bdh'], standalone_mode=False); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
