"""What every test gets: its own cache folder, no network, two threads."""

from __future__ import annotations

import os
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
