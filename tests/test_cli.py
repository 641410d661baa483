"""Is the command line what programs and people rely on?"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bdh_bench import __version__

_TRACE = "import sys; sys.argv = ['bdh-bench', *sys.argv[1:]]\nimport bdh_bench.cli as c\ntry: c.main()\nexcept SystemExit: pass\n"
_TRACE += "bad = {'torch', 'numpy', 'pandas', 'matplotlib', 'transformers'} & set(sys.modules)\nassert not bad, bad"


def _cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bdh_bench.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *([verb, "--help"] for verb in ("run", "report", "show", "export", "selftest", "doctor")),
        ["list", "models"],
        ["list", "tasks"],
        ["list", "runs", "--runs", "x"],
    ],
)
def test_help_and_lists_import_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", _TRACE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_and_lists_start_fast() -> None:
    """Processor time, which a busy host disturbs little, and the best of five."""
    for arguments in (["--help"], ["list", "models"], ["selftest", "--help"], ["doctor", "--help"]):
        spent = []
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            _cli(*arguments)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert min(spent) < 0.3


def test_the_version_is_told() -> None:
    assert _cli("--version").stdout == f"bdh-bench {__version__}\n"


def test_the_contract_of_run_list_export_and_report(tmp_path: Path, books: Path) -> None:
    runs = ["--runs", str(tmp_path / "runs")]
    request = ["run", "--models", "toy:uniform,toy:copy", "--task", "long_ppl,memory", "--data", f"path:{books}"]
    done = _cli(*request, "--contexts", "128,256", *runs, "--run-id", "a", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["schema"] == "bdh-bench/run/1"
    assert answer["status"] == "ok"
    assert answer["data"] == {
        "run": "a",
        "path": str(tmp_path / "runs" / "a"),
        "cells": {"ok": 6, "failed": 0, "skipped": 0},
    }

    points = json.loads(_cli("export", "a", *runs, "--format", "json").stdout)
    expected = "model family size task metric metric_id unit value low high n context batch_size seed axes status reason weights cell"
    assert all(set(p) == set(expected.split()) for p in points)
    uniform = [p for p in points if p["model"] == "toy:uniform" and p["metric"] == "bits_per_byte"]
    assert [(p["context"], p["value"], p["family"], p["unit"]) for p in uniform] == [
        (128, 8.0, "toy", "bit/byte"),
        (256, 8.0, "toy", "bit/byte"),
    ]
    assert all(isinstance(p["context"], int) for p in points)
    raw = json.loads(_cli("export", "a", *runs, "--raw").stdout)
    measured = {row["metric"] for row in raw}  # other points are made of stored arrays
    assert len(raw) >= len([p for p in points if p["metric"] in measured])

    known = json.loads(_cli("export", "a", *runs, "--assessment").stdout)
    assert set(known) == {
        "labels",
        "signals",
        "comparisons",
        "extrapolation",
        "training",
        "fairness",
        "gates",
        "speed",
        "time_crossovers",
    }
    assert json.loads(_cli("show", "a", *runs, "--json").stdout)["data"]["assessment"] == known

    head, row = _cli("list", "runs", *runs).stdout.splitlines()
    assert head.split() == ["run", "created", "status", "cells", "command"]
    assert "6 ok, 0 failed, 0 skipped" in row
    key = json.loads(_cli("export", "a", *runs, "--format", "json").stdout)[0]["cell"]
    shown = json.loads(_cli("show", "a", key[:12], *runs, "--json").stdout)
    assert (shown["schema"], shown["data"]["cell"]["key"]) == ("bdh-bench/show/1", key)
    listed = json.loads(_cli("list", "runs", *runs, "--json").stdout)
    assert [r["run"] for r in listed["data"]["runs"]] == ["a"]
    page = json.loads(_cli("report", "a", *runs, "--json").stdout)["data"]["html"]
    assert "8.000" in Path(page).read_text(encoding="utf-8")
    assert (Path(page).parent / "report.md").exists()
    assert (Path(page).parent / "results.csv").exists()
    assert "8.000" in _cli("show", "a", *runs, NO_COLOR="1").stdout


_BAD = [
    (["run", "--models", "bhd", "--task", "long_ppl"], "did you mean 'bdh'"),
    (["run", "--models", "bdh@2m", "--task", "long_ppl"], "1m"),
    (["run", "--models", "bdh", "--task", "long_pl"], "did you mean 'long_ppl'"),
    (["run", "--models", "bdh,bdh", "--task", "long_ppl"], "listed twice"),
    (["run", "--models", "bdh", "--task", "long_ppl", "--data", "path:/no/such"], "no file or folder"),
    (["run", "--models", "bdh", "--task", "long_ppl", "--data", "path:EMPTY"], "no bytes"),
    (["run", "--models", "bdh", "--task", "long_ppl", "--contexts", "99999999"], "longest test document"),
    (["run", "--models", "bdh", "--task", "long_ppl", "--train-bytes", "0"], "greater than 0"),
    (["run", "--models", "bdh", "--task", "long_ppl", "--train-context", "-4"], "greater than 0"),
    (["run", "--models", "bdh", "--task", "long_ppl", "--seeds", "0"], "greater than 0"),
    (["run", "--models", "bdh", "--task", "long_ppl", "--seed", "-1"], "0 or more"),
    (["run", "--models", "bdh", "--task", "long_ppl", "--contexts", "0"], "expected"),
    (["run", "--models", "bdh", "--task", "long_ppl", "--threads", "-1"], "negative"),
    (["run", "--models", "bdh", "--task", "long_ppl", "--train-bytes", "many"], "valid integer"),
    (["run", "--models", "bdh:n_layer=1:weights=DAMAGED", "--task", "memory"], "damaged"),
    (["run", "--models", "toy:uniform", "--task", "memory", "--runs", "FILE/x"], "writable"),
    (["run", "--models", "bdh", "--task", "long_ppl", "--nonsense"], "nonsense"),
    (["run", "--models", "bdh", "--task", "long_ppl", "--match", "luck"], "wallclock"),
    (["run", "--models", "bdh", "--task", "long_ppl", "--equivalence-margin", "0"], "greater than 0"),
    (["export", "a", "--assessment", "--raw"], "--assessment alone"),
    (["report", "nothing"], "no run"),
    (["list", "modles"], "did you mean 'models'"),
    (["export", "nothing", "--format", "json"], "no run"),
]


@pytest.mark.parametrize(("arguments", "says"), _BAD, ids=[" ".join(a)[:60] for a, _ in _BAD])
def test_bad_input_gives_one_clear_error_and_leaves_nothing(arguments: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "DAMAGED.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0garbage")
    places = {"EMPTY": f"{tmp_path}/EMPTY", "DAMAGED": f"{tmp_path}/DAMAGED.safetensors", "FILE": f"{tmp_path}/FILE"}
    for word, place in places.items():
        arguments = [a.replace(word, place) for a in arguments]
    if "--runs" not in arguments and arguments[0] != "list":
        arguments = [*arguments, "--runs", str(tmp_path / "runs")]
    done = _cli(*arguments)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    assert not (tmp_path / "runs").exists()
    answer = json.loads(_cli(*arguments, "--json").stdout)
    assert answer["status"] == "failed"
    assert len(answer["errors"]) == 1


def test_any_bytes_are_text(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.bin").write_bytes(os.urandom(2000))
    done = _cli(
        "run",
        "--models",
        "toy:uniform",
        "--task",
        "long_ppl",
        "--contexts",
        "128",
        "--data",
        f"path:{folder}",
        "--runs",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "8.000" in done.stdout


def test_a_program_that_is_stopped_still_gets_its_one_object(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bdh_bench.results.store.list_runs", stop)
    code, out, _ = cli("list", "runs", "--json")
    assert code == 130
    assert [e["code"] for e in json.loads(out)["errors"]] == ["Interrupted"]
