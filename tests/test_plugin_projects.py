"""Does a stranger's evening work: a new project, installed, listed, checked and run; and the example beside this package?

Real projects are built and installed with pip, offline, by ``pip install --target SCRATCH --no-deps --no-build-isolation``. A virtual
environment of their own would not do: the tests run in one, and one made from inside it sees the base interpreter's packages
and not torch. SCRATCH on PYTHONPATH is found by importlib.metadata just like site-packages, entry points and all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bdh_bench import load_model, scaffold
from bdh_bench.errors import SpecError, UnknownNameError
from bdh_bench.sizing import count, solve
from bdh_bench.spec import SIZES
from bdh_bench.types import TaskContext

_ROOT = Path(__file__).parent.parent
_EXAMPLE = _ROOT / "examples" / "clocks"


def _run(command: list[str], scratch: Path, folder: Path) -> str:
    path = os.pathsep.join([str(scratch), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, a new model ``mine`` and a new task ``asks``, installed."""
    assert importlib.util.find_spec("hatchling"), "hatchling builds the projects: pip install -e '.[dev]'"
    folder, work = tmp_path_factory.mktemp("scratch"), tmp_path_factory.mktemp("work")
    projects = [_EXAMPLE, work / "mine", work / "asks"]
    scaffold.create("model", "mine", projects[1])
    scaffold.create("task", "asks", projects[2])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    _run([*pip, "--no-build-isolation", "--target", str(folder), *map(str, projects)], folder, work)
    return folder


def _cli(scratch: Path, folder: Path, *arguments: str) -> Any:
    return json.loads(_run([sys.executable, "-m", "bdh_bench.cli", *arguments, "--json"], scratch, folder))["data"]


def test_installed_projects_say_what_the_report_and_a_user_ask(scratch: Path, tmp_path: Path) -> None:
    for kind, name in (("models", "clocks"), ("models", "mine"), ("tasks", "echo"), ("tasks", "asks")):
        (row,) = _cli(scratch, tmp_path, "list", kind, name)[kind]
        assert all(option["meaning"] for option in row["options"])
        assert kind == "tasks" or (row["kind"] == "recurrent" and row["architecture"])


def test_installed_projects_are_listed(scratch: Path, tmp_path: Path) -> None:
    models = {row["name"]: row for row in _cli(scratch, tmp_path, "list", "models")["models"]}
    tasks = {row["name"]: row for row in _cli(scratch, tmp_path, "list", "tasks")["tasks"]}
    assert (models["clocks"]["origin"], models["mine"]["origin"]) == ("bdh-bench-clocks", "bdh-bench-mine")
    assert (tasks["echo"]["origin"], tasks["asks"]["origin"]) == ("bdh-bench-clocks", "bdh-bench-asks")
    for row in (models["clocks"], models["mine"], tasks["echo"], tasks["asks"]):
        assert row["summary"]
        assert not row["problem"]


@pytest.mark.parametrize("name", ["clocks", "mine"])
def test_installed_models_keep_every_law(name: str, scratch: Path, tmp_path: Path) -> None:
    report = _cli(scratch, tmp_path, "check", name)
    assert report["counts"] == {"kept": 18, "broken": 0, "does not apply": 1}  # neither has a position limit


def test_installed_projects_run(scratch: Path, tmp_path: Path) -> None:
    request = ["run", "--models", "clocks,mine:n_layer=1", "--task", "memory", "--contexts", "64", "--threads", "1"]
    assert _cli(scratch, tmp_path, *request)["cells"] == {"ok": 2, "failed": 0, "skipped": 0}
    request = ["run", "--models", "toy:copy:period=17", "--task", "asks", "--contexts", "64", "--run-id", "t"]
    assert _cli(scratch, tmp_path, *request)["cells"] == {"ok": 1, "failed": 0, "skipped": 0}
    points = json.loads(_run([sys.executable, "-m", "bdh_bench.cli", "export", "t"], scratch, tmp_path))
    values = {p["axes"]["distance"]: p["value"] for p in points if p["metric"] == "influence"}
    assert values == {1: 0, 2: 0, 4: 0, 8: 0, 16: 1, 32: 0, 64: 0}


def test_an_editable_installation_points_at_the_source(tmp_path: Path) -> None:
    """What ``pip install --editable .`` would do: the file that is edited is the file that runs and is digested."""
    scaffold.create("model", "mine", tmp_path / "mine")
    code = f"import hatchling.build; print(hatchling.build.build_editable({str(tmp_path)!r}))"
    wheel = tmp_path / _run([sys.executable, "-c", code], tmp_path, tmp_path / "mine").strip()
    with zipfile.ZipFile(wheel) as archive:
        (pointer,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".pth"))
    assert Path(pointer.strip()) == tmp_path / "mine"


# -- what a new project holds -------------------------------------------------------------------------------------------


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _context(length: int, seed: int = 0) -> TaskContext:
    return TaskContext(seed, length, (length,), 256, (), "random", False, lambda *_: None)


def _measured(task: ModuleType, name: str, length: int, **config: int) -> list[Any]:
    return list(task.run(load_model(name), task.Config(**config), _context(length)))


@pytest.mark.parametrize("path", [_ROOT / "bdh_bench/templates/model.py", _EXAMPLE / "bdh_bench_clocks/model.py"])
def test_sizes_are_met(path: Path) -> None:
    module = _import(path)
    for size in SIZES:
        assert abs(count(module, solve(module, size, {}, explicit=True)) / SIZES[size] - 1) <= 0.02
    assert solve(module, "1m", {"n_layer": 2}, explicit=True).n_layer == 2


def test_the_new_task_has_the_answers_that_are_known() -> None:
    task = _import(_ROOT / "bdh_bench/templates/task.py")
    assert {m.value for m in _measured(task, "toy:uniform", 64)} == {0.0}
    reach = {m.axes["distance"]: m.value for m in _measured(task, "toy:copy:period=17", 64, texts=2)}
    # the first byte decides the prediction after 16 more, and no other
    assert reach == {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 16: 1.0, 32: 0.0, 64: 0.0}
    assert [m.status for m in _measured(task, "gpt2:n_layer=1", 5000)] == ["unsupported"]
    again = [m.value for m in _measured(task, "mamba", 64)]
    assert again == [m.value for m in _measured(task, "mamba", 64)]
    assert all(0 <= value <= 1 for value in again)


def test_the_example_task_has_the_answers_that_are_known() -> None:
    task = _import(_EXAMPLE / "bdh_bench_clocks/echo.py")
    assert [m.value for m in _measured(task, "toy:uniform", 64)] == pytest.approx([8.0] * 4)
    assert [m.value for m in _measured(task, "toy:copy:period=64", 64)] == pytest.approx([0.0] * 4)
    assert next(m.value for m in _measured(task, "toy:copy:period=63", 64, texts=1)) > 1000
    assert [m.status for m in _measured(task, "gpt2:n_layer=1", 300)] == ["unsupported"]


# -- refusals -----------------------------------------------------------------------------------------------------------

_BAD = [
    ("model", "my-model", "did you mean 'my_model'"),
    ("model", "2fast", "for example my_model"),
    ("model", "class", "no word of Python"),
    ("model", "_mine", "did you mean 'mine'"),
    ("model", "modèle", "letters, digits"),
    ("model", "../up", "did you mean 'up'"),
    ("model", "bdh", "is taken (built in)"),
    ("model", "BDH", "is taken (built in)"),
    ("task", "memory", "is taken (built in)"),
    ("modle", "mine", "did you mean 'model'"),
]


@pytest.mark.parametrize(("kind", "name", "says"), _BAD)
def test_names_that_cannot_be(kind: str, name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises((SpecError, UnknownNameError)) as caught:
        scaffold.create(kind, name, tmp_path / "new")
    assert says in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(SpecError, match="exists already"):
        scaffold.create("model", "mine", tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir())
    (tmp_path / "file").write_text("x")
    with pytest.raises(SpecError, match="cannot write"):
        scaffold.create("model", "mine", tmp_path / "file" / "mine")


def test_a_project_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = Path.write_text, []

    def fail_at_the_second(path: Path, *rest: Any, **options: Any) -> int:
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return write(path, *rest, **options)

    monkeypatch.setattr(Path, "write_text", fail_at_the_second)
    with pytest.raises(SpecError, match="No space left on device"):
        scaffold.create("model", "mine", tmp_path / "mine")
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_comes_next(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bdh_bench.cli", "new", "model", "mine"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["mine/pyproject.toml", "mine/bdh_bench_mine.py", "mine/README.md"]
    assert "bdh-bench check mine" in done.stderr
    again = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert again.returncode == 2
    assert "mine exists already" in again.stderr
