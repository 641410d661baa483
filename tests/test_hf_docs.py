"""Does ``docs/hf-models.md`` still say what this version of transformers does?"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import hf_zoo
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
import generate_hf_models as page


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_family_of_the_zoo_has_a_row() -> None:
    assert list(page.stored()) == list(hf_zoo.ZOO)


@pytest.mark.parametrize("family", hf_zoo.ZOO)
def test_row(family: str, tmp_path: Path) -> None:
    row = page.measure(family, tmp_path / family)
    known = page.Row(*page.stored()[family])
    assert row.stable() == known.stable()
    assert bool(row.why) == bool(known.why)
    if row.path == "cached":
        assert float(row.error) < 1e-4
