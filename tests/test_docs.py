"""Is what the documentation says true? Every command in README and docs runs here, or, where it takes minutes, is planned or parsed."""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from synthetic_run import write_run

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
import generate_definitions

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
PROGRAMS = ("bdh-bench ", "python -m bdh_bench", "make ", "pip install")


def commands(text: str) -> Iterator[str]:
    """The commands in indented blocks and in `code` of a page, without comments and optional arguments.

    Left out: a verb named in a sentence without arguments, and patterns with NAME in them.
    """
    for line in text.splitlines():
        block = line.startswith("    ")
        for code in [line.strip()] if block else re.findall(r"`([^`]+)`", line):
            command = re.sub(r"\s*\[[A-Z]+\]", "", re.split(r"\s{2,}#", code)[0].strip())
            spoken_of = not block and len(command.split()) < 3 and not command.startswith("make ")
            if command.startswith(PROGRAMS) and not spoken_of and "NAME" not in command and "…" not in command:
                yield command


def long_commands() -> tuple[str, ...]:
    lines = (ROOT / "docs" / "long-commands.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


DOCUMENTED = sorted({command for page in PAGES for command in commands(page.read_text(encoding="utf-8"))})
LONG = [c for c in DOCUMENTED if c.startswith(long_commands())]
SHORT = [c for c in DOCUMENTED if not c.startswith(long_commands())]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader has it who has followed the pages: a finished run, some books, a model and a task installed."""
    folder = tmp_path_factory.mktemp("reader")
    write_run(folder / "runs").path.rename(folder / "runs" / "laptop")
    (folder / "books").mkdir()
    for number in range(12):
        (folder / "books" / f"book{number}.txt").write_text(f"Chapter {number}. " * 4000, encoding="utf-8")
    (folder / "specs").symlink_to(ROOT / "specs")
    for kind, name in (("model", "mine"), ("task", "mytask")):
        assert run(program(f"bdh-bench new {kind} {name}"), folder).returncode == 0
        install = ["pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", "plugins", f"./{name}"]
        done = run([sys.executable, "-m", *install], folder)
        assert done.returncode == 0, done.stderr
    return folder


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"BDH_BENCH_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(folder / "plugins")))
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def program(command: str) -> list[str]:
    """The words of a command, with this interpreter in place of the name on the path."""
    words = shlex.split(command)
    return [sys.executable, "-m", "bdh_bench.cli", *words[1:]]


def test_the_pages_have_commands() -> None:
    assert len(SHORT) >= 10
    assert len(LONG) >= 10
    for beginning in long_commands():
        assert any(c.startswith(beginning) for c in DOCUMENTED), f"{beginning} is listed as long but documented nowhere"


@pytest.mark.parametrize("command", SHORT)
def test_command_runs(command: str, reader: Path, tmp_path: Path) -> None:
    done = run(program(command), tmp_path if command.startswith("bdh-bench new ") else reader)
    assert done.returncode == 0, done.stderr
    assert done.stdout or done.stderr


@pytest.mark.parametrize("command", [c for c in LONG if c.startswith("bdh-bench run")])
def test_run_is_planned(command: str, reader: Path) -> None:
    words = [word for word in program(command) if word != "--dry-run"]
    done = run([*words, "--dry-run"], reader)
    assert done.returncode == 0, done.stderr
    assert "seed 0" in done.stdout


@pytest.mark.parametrize(
    "command", [c for c in LONG if c.startswith("bdh-bench ") and not c.startswith("bdh-bench run")]
)
def test_long_command_parses(command: str) -> None:
    parsed(command)


def parsed(command: str) -> None:
    """The parser takes it; nothing is run."""
    from bdh_bench.cli import app

    group: Any = typer.main.get_command(app)
    verb, *arguments = shlex.split(command)[1:]
    group.commands[verb].make_context(verb, arguments)


@pytest.mark.parametrize("command", [c for c in LONG if c.startswith("python -m bdh_bench.lm_eval")])
def test_lm_eval_command_parses(command: str) -> None:
    from lm_eval._cli import HarnessCLI

    HarnessCLI()._parser.parse_args(["run", *shlex.split(command)[3:]])


@pytest.mark.parametrize("command", [c for c in LONG if c.startswith("make ")])
def test_make_target_exists(command: str) -> None:
    target = shlex.split(command)[1]
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in LONG if c.startswith("pip install")])
def test_what_is_installed_exists(command: str) -> None:
    """A project of this repository (with its extra), or one that the page has the reader write."""
    named = shlex.split(command)[-1]
    extra = re.search(r"\[(.+)\]", named)
    if extra:
        assert f"{extra[1]} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    else:
        assert named in (".", "mine", "mytask")


def test_a_wrong_command_is_noticed() -> None:
    found = list(
        commands("    bdh-bench show --al    # everything\n\n`bdh-bench run --task x`, `bdh-bench list models [NAME]`")
    )
    assert found == ["bdh-bench show --al", "bdh-bench run --task x", "bdh-bench list models"]
    with pytest.raises(Exception, match="No such option"):
        parsed("bdh-bench show --al")


def test_definitions_are_those_of_the_table() -> None:
    assert generate_definitions.PAGE.read_text(encoding="utf-8") == generate_definitions.text()


def test_the_readme_table_is_the_recorded_one() -> None:
    """Means over seeds and half of their intervals, as far as the page rounds them."""
    names = {
        "bdh, crops": "bdh",
        "bdh, carried state": "bdh:regime=carried",
        "bdh, crops + carried": "bdh:regime=crop+carried",
    }
    names |= {"ngram_cache, unlearned": "ngram_cache"} | {name: name for name in ("llama", "gpt2", "mamba", "mamba2")}
    with (ROOT / "results" / "laptop" / "results.csv").open(encoding="utf-8") as file:
        rows = [
            row for row in csv.DictReader(file) if row["metric"] == "bits_per_byte" and not row["seed"] and row["value"]
        ]
    stored = {(row["model"], int(row["context"])): row for row in rows}
    text = (
        (ROOT / "README.md")
        .read_text(encoding="utf-8")
        .partition("## A first experiment")[2]
        .partition("What it shows")[0]
    )
    checked = 0
    for shown, model in names.items():
        (line,) = (one for one in text.splitlines() if one.startswith(f"      {shown}  "))
        for context, (mean, half) in zip(
            (128, 256, 512, 1024, 2048, 4096), re.findall(r"(\d\.\d+) +± (\d\.\d+)", line), strict=False
        ):
            row = stored[model, context]
            assert float(mean) == pytest.approx(float(row["value"]), abs=0.51 * 10.0 ** -len(mean.partition(".")[2])), (
                model,
                context,
            )
            assert float(half) == pytest.approx((float(row["high"]) - float(row["low"])) / 2, abs=0.0101), (
                model,
                context,
            )
            checked += 1
    assert checked == 7 * 6 + 2
