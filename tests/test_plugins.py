"""Can a stranger's package bring a model or a task, and can a broken one do no harm?

Plug-ins here are files in a folder with the metadata that an installation writes, so that nothing has to be installed.
``test_plugin_projects.py`` installs real ones.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bdh_bench import laws, list_models, load_model, registry, sources
from bdh_bench.errors import PluginError, UnknownNameError
from bdh_bench.registry import list_tasks
from bdh_bench.sources import source_digest

_MODEL = (Path(registry.__file__).parent / "templates" / "model.py").read_text(encoding="utf-8")
_TASK = (Path(registry.__file__).parent / "templates" / "task.py").read_text(encoding="utf-8")

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install(distribution, entry points, files): a folder on sys.path that looks like an installed package."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(distribution: str, points: str, group: str = "models", **files: str) -> Path:
        info = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[bdh_bench.{group}]\n{points}\n")
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__in__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        _forget()
        return tmp_path

    yield write
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(f"{tmp_path}{os.sep}"):
            del sys.modules[name]
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    for cached in (registry._entries, sources.source_path, sources._imports):
        cached.cache_clear()


def _row(name: str) -> registry.Entry:
    (row,) = (entry for entry in list_models() if entry.name == name)
    return row


def test_a_plugin_is_a_model_like_any_other(install: Install) -> None:
    install("their-models", "average = their_average", their_average=_MODEL)
    row = _row("average")
    assert (row.origin, row.problem) == ("their-models", "")
    assert row.options == {"d_model": 128, "n_layer": 4, "vocab_size": 256}
    assert "their_average" not in sys.modules  # listed without importing it
    model = load_model("average:d_model=16:n_layer=1")
    assert all(finding.kept for finding in laws.check(model))
    assert abs(load_model("average@1m").parameter_count() / 1e6 - 1) <= 0.02


def test_a_task_plugin_is_listed_with_its_question(install: Install) -> None:
    install("their-tasks", "influence = their_influence", "tasks", their_influence=_TASK)
    (row,) = (entry for entry in list_tasks() if entry.name == "influence")
    assert (row.origin, row.problem, row.options) == ("their-tasks", "", {"texts": 8})
    assert row.summary.startswith("How long does one changed byte matter?")


#: What is wrong with the file, and what the listing says of it.
_BROKEN = {
    "raises": ("raise RuntimeError('no luck')\n" + _MODEL, "raises RuntimeError('no luck') when imported (line 1)"),
    "needs": (
        _MODEL + "\nimport no_such_package.kernels\n",
        "imports 'no_such_package.kernels', which is not installed",
    ),
    "syntax": ("class Model(:\n", "SyntaxError"),
    "null": ("x = 1\0", "source code string cannot contain null bytes"),
    "computed": (_MODEL.replace('"learning_rate": 4e-3,', '"learning_rate": math.sqrt(4),'), "no literal dictionary"),
    "listed": (_MODEL.replace("DEFAULTS = {", "DEFAULTS = 1, {"), "no literal dictionary"),
    "no_config": (_MODEL.replace("class Config:", "class Options:"), "defines no Config"),
    "elsewhere": ("from bdh_bench.models.toy import Config, Model\n", "Config is not a class of this file"),
    "empty": ("", "defines no Config and no Model"),
    "absent": (None, "no source file of the module 'their_file'"),
}


@pytest.mark.parametrize("case", _BROKEN)
def test_a_broken_plugin_is_a_row_with_its_reason(case: str, install: Install) -> None:
    text, says = _BROKEN[case]
    install("their-models", "theirs = their_file", **({} if text is None else {"their_file": text}))
    row = _row("theirs")
    assert says in row.problem
    assert row.origin == "their-models"
    assert _row("bdh").problem == ""
    with pytest.raises(PluginError, match="from their-models cannot be used: ") as caught:
        load_model("theirs")
    assert says in str(caught.value)


def test_a_package_that_raises_is_a_row_and_is_not_run_by_the_listing(install: Install, tmp_path: Path) -> None:
    init = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit('stop')\n"
    install("their-models", "theirs = their.model", their__in____init__=init, their__in__model=_MODEL)
    assert "raises SystemExit('stop') when imported (line 2)" in _row("theirs").problem
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "point", ["9lives = their_file", "a:b = their_file", "theirs = ???", "theirs = no.such.module"]
)
def test_a_malformed_entry_point_is_a_row(point: str, install: Install) -> None:
    install("their-models", point, their_file=_MODEL)
    (row,) = (entry for entry in list_models() if entry.origin == "their-models")
    assert row.problem


def test_a_plugin_cannot_take_the_name_of_a_built_in(install: Install) -> None:
    install("their-models", "bdh = their_file", their_file=_MODEL)
    ours, theirs = (entry for entry in list_models() if entry.name == "bdh")
    assert (ours.origin, ours.problem) == ("built in", "")
    assert theirs.origin == "their-models"
    assert "a plug-in needs another name" in theirs.problem
    assert registry.find("models", "bdh") is ours
    assert type(load_model("bdh")).__module__ == "bdh_bench.models.bdh"


def test_a_name_of_two_plugins_belongs_to_neither(install: Install) -> None:
    install("first-models", "theirs = first_file", first_file=_MODEL)
    install("second-models", "theirs = second_file\nalone = second_file", second_file=_MODEL)
    rows = [entry for entry in list_models() if entry.name == "theirs"]
    assert [row.origin for row in rows] == ["first-models", "second-models"]
    assert all("first-models and second-models" in row.problem for row in rows)
    with pytest.raises(PluginError, match="from first-models and second-models cannot be used"):
        load_model("theirs")
    assert load_model("alone:d_model=8")  # the rest of the package is untouched
    with pytest.raises(UnknownNameError, match="did you mean 'theirs'"):
        load_model("their")


def test_a_reading_task_without_target_blocks_is_refused_before_a_run(install: Install) -> None:
    install("their-tasks", "theirs = their_file", "tasks", their_file=_TASK.replace('"reads": False', '"reads": True'))
    (row,) = (entry for entry in list_tasks() if entry.name == "theirs")
    assert "needs the fields block and blocks" in row.problem


_HIDDEN = (
    "\ndef _fail():\n    raise RuntimeError('no\\nluck')\n\n\n_fail()\n"  # what no reading of the text can foresee
)


@pytest.mark.parametrize(
    "command",
    [["check", "theirs"], ["generate", "theirs"], ["run", "--models", "theirs", "--task", "memory", "--runs", "RUNS"]],
)
def test_a_plugin_that_raises_in_use_is_blamed_with_its_distribution(
    command: list[str], install: Install, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install("their-models", "theirs = their_file", their_file=_MODEL + _HIDDEN)
    command = [word.replace("RUNS", str(folder / "runs")) for word in command]
    code, out, _ = cli("list", "models")
    assert code == 0
    assert "their-models" in out
    code, _, err = cli(*command)
    assert code == 2
    assert "model 'theirs' from their-models cannot be imported: RuntimeError: no luck" in err
    assert "defect" not in err
    assert err.count("\n") == 1
    assert not (folder / "runs").exists()
    monkeypatch.setenv("BDH_BENCH_DEBUG", "1")
    code, _, err = cli(*command)
    assert code == 2
    assert "in _fail" in err


def test_a_plugin_that_cannot_be_built_is_blamed_too(install: Install) -> None:
    text = _MODEL.replace(
        "        super().__init__()\n", "        super().__init__()\n        raise ZeroDivisionError\n"
    )
    install("their-models", "theirs = their_file", their_file=text)
    with pytest.raises(PluginError, match="from their-models cannot be built: ZeroDivisionError"):
        load_model("theirs:d_model=8")


def test_warnings_show_in_every_listing(install: Install, cli: Any) -> None:
    install("first-models", "bad = first_file\nbdh = first_file", first_file="raise OSError\n")
    code, plain, _ = cli("list", "models")
    assert code == 0
    warned = [line.split() for line in plain.splitlines() if " warning: " in line]
    assert [words[:3] for words in warned] == [["bad", "first-models", "warning:"], ["bdh", "first-models", "warning:"]]
    rows = json.loads(cli("list", "models", "--json")[1])["data"]["models"]
    assert {row["name"] for row in rows if row["problem"]} == {"bad", "bdh"}
    code, table, err = cli("list", "models", "--details")
    assert code == 0, err
    assert table.count("problem: ") == 2
    assert "bdh@quick" in table


# -- editing a plug-in invalidates its results --------------------------------------------------------------------------


def _digest(module: str) -> str:
    _forget()
    return source_digest(module, "bdh_bench.tasks.memory")


@pytest.mark.parametrize("edited", ["model", "_core", "_deep", "__init__", "_first"])
def test_editing_any_file_that_a_plugin_imports_changes_its_digest(edited: str, install: Install) -> None:
    files = {
        "__init__": "from . import _first\n",
        "_first": "",
        "model": "from . import _core\n" + _MODEL,
        "_core": "from bdh_bench_like._deep import x\n",
        "_deep": "x = 1\n",
        "_unused": "",
    }
    folder = install("t", "t = bdh_bench_like.model", **{f"bdh_bench_like__in__{n}": t for n, t in files.items()})
    before = _digest("bdh_bench_like.model")
    assert before == _digest("bdh_bench_like.model")
    (folder / "bdh_bench_like" / "_unused.py").write_text("y = 1\n")
    assert before == _digest("bdh_bench_like.model")
    with (folder / "bdh_bench_like" / f"{edited}.py").open("a") as file:
        file.write("\n# another version\n")
    assert before != _digest("bdh_bench_like.model")


def test_the_packages_above_a_plugin_count_as_they_run_when_it_is_imported(install: Install) -> None:
    folder = install(
        "t", "t = its.own.model", its__in____init__="", its__in__own__in____init__="", its__in__own__in__model=_MODEL
    )
    digests = [_digest("its.own.model")]
    for package in ("its", "its/own"):
        (folder / package / "__init__.py").write_text("import torch\n")
        digests.append(_digest("its.own.model"))
    assert len(set(digests)) == 3


def test_an_edited_plugin_plans_other_cells(install: Install) -> None:
    from bdh_bench.runner.plan import make_plan
    from bdh_bench.spec import RunSpec

    folder = install("t", "theirs = their_file", their_file=_MODEL)
    request = RunSpec(("theirs", "toy:uniform"), ("memory",), contexts=(64,))
    before = {cell.model: cell.key for cell in make_plan(request).cells}
    (folder / "their_file.py").write_text(_MODEL.replace("fade + 2", "fade + 3"))
    _forget()
    after = {cell.model: cell.key for cell in make_plan(request).cells}
    assert before["theirs"] != after["theirs"]
    assert before["toy:uniform"] == after["toy:uniform"]


def test_kernels_of_this_package_count_for_a_plugin(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("t", "t = their_file", their_file="from bdh_bench.kernels import rotary\n")
    _forget()
    assert "bdh_bench.kernels.rotary" in sources._reachable(("their_file",))
    assert "json" not in sources._reachable(("their_file",))
