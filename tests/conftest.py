"""What every test gets: its own cache folder, no network, two threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDH_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """A folder of twelve short English-like documents, the same in every run."""
    folder = tmp_path / "books"
    folder.mkdir()
    sentence = "the old house stood on a hill and nobody had lived there since winter came early that year"
    words = sentence.split()
    for i in range(12):
        text = " ".join(words[(j * (i + 3) + j // 7) % len(words)] for j in range(900))
        (folder / f"book{i:02}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process, which has torch already: cli(*arguments) → exit code, stdout, stderr."""
    from bdh_bench.cli import main

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bdh-bench", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(str(ended.value.code)), out, err

    return call
