"""Can a stored run be read where torch is not installed? Every reading verb, in an interpreter that cannot import it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from synthetic_run import write_run

_HEAVY = ("torch", "transformers", "safetensors", "triton", "lm_eval", "datasets")
_BLOCK = f"""
import sys
class Block:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in {_HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""
_MAIN = _BLOCK + "sys.argv = ['bdh-bench', *sys.argv[1:]]\nfrom bdh_bench.cli import main\nmain()\n"

#: Everything that reads what is stored, with RUN for a run, another one like it OTHER, and CELL for a cell of it.
READING = (
    "report RUN --output page.html --json",
    "show",
    "show RUN --all",
    "show RUN --json",
    "show RUN CELL",
    "export RUN",
    "export RUN --raw",
    "export RUN --assessment",
    "export RUN --json",
    *(f"export RUN --format {name}" for name in ("json", "jsonl", "csv", "md", "latex")),
    "compare RUN OTHER",
    "list runs",
    "list models",
    "list tasks",
)
#: Verbs that come to measure, train or write code; all others are held to reading without torch by the test below.
MEASURING = {"run", "worker", "train", "sweep", "generate", "new", "check", "convert", "plan", "selftest", "doctor"}


def _commands() -> set[str]:
    from bdh_bench.cli import app

    return set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def _python(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "NO_COLOR": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, RUN and OTHER, of the same request."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("OTHER", "RUN"):
        write_run(folder / "runs").path.rename(folder / "runs" / name)
    return folder


def test_the_block_blocks(tmp_path: Path) -> None:
    done = _python(_BLOCK + "import torch", folder=tmp_path)
    assert done.returncode == 1
    assert "No module named 'torch'" in done.stderr


def test_loading_a_model_there_fails(tmp_path: Path) -> None:
    """What needs torch does not run: so the verbs above were really without it."""
    assert _python(_BLOCK + "import bdh_bench.loading", folder=tmp_path).returncode == 1


@pytest.mark.parametrize("command", [c for c in READING if c.split()[0] in _commands()])
def test_reading_needs_no_torch(command: str, reader: Path) -> None:
    cell = json.loads((reader / "runs" / "RUN" / "run.json").read_text())["cells"][0]["key"]
    words = [cell if word == "CELL" else word for word in command.split()]
    done = _python(_MAIN, *words, folder=reader)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "Traceback" not in done.stderr


def test_no_reading_verb_is_forgotten() -> None:
    """A new verb either reads and is tried above, or is named as one that measures."""
    assert not _commands() - {command.split()[0] for command in READING} - MEASURING


def test_the_doctor_comes_where_torch_is_missing(tmp_path: Path) -> None:
    code = _BLOCK + "from bdh_bench.runner.doctor import examine\n"
    code += "import json\nprint(json.dumps(examine(0.02).as_json()))\n"
    done = _python(code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {row["name"]: row for row in json.loads(done.stdout)["findings"]}
    assert (found["torch"]["verdict"], found["torch"]["do"]) == ("missing", "pip install torch")
