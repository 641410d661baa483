"""Do the cache benchmark's figures say what was measured? The parts that its ratios rest on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bdh_bench import load_model

_PATH = Path(__file__).parents[1] / "benchmarks" / "cache_decode.py"
sys.path.insert(0, str(_PATH.parent))  # it imports its neighbour, as when it is run
_SPEC = importlib.util.spec_from_file_location("cache_benchmark", _PATH)
assert _SPEC is not None
bench = importlib.util.module_from_spec(_SPEC)
sys.modules["cache_benchmark"] = bench
_SPEC.loader.exec_module(bench)  # type: ignore[union-attr]
sys.path.remove(str(_PATH.parent))

_SMALL = "llama:d_model=32:n_layer=2:n_head=4"


@pytest.mark.parametrize("options", ["", ":kv_bits=4", ":kv_heads=2", ":window=40:sinks=3"])
def test_a_stream_at_depth_has_the_bytes_of_that_depth(options: str) -> None:
    model = load_model(_SMALL + options)
    session = bench.stream_at(model, 100)
    assert session.length == 100
    assert session.state_bytes == model.state_bytes(1, 100)
    bench.decode_s(session, 2)
    assert session.length == 102
    assert session.state_bytes == model.state_bytes(1, 102)


def test_both_sides_have_the_same_weights() -> None:
    model = load_model(_SMALL)
    theirs = bench.Concatenating(model, 50)
    theirs.decode_s(3)
    assert theirs.cache.get_seq_length() == 53
    tokens = torch.arange(20).unsqueeze(0)
    with torch.inference_mode():
        assert torch.allclose(theirs.net(input_ids=tokens).logits, model.logits(tokens), atol=1e-5)


def test_a_cost_of_one_is_the_cost_of_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 bytes more at 1,000 bytes per second are 1 s more; theirs takes 8 s."""
    one = bench.Round(shallow=3.0, deep=4.0, concatenating=8.0, copied=1000.0, summed=500.0)
    monkeypatch.setattr(bench, "rounds_of", lambda *_: ([one, one, one], 1000))
    found: list[Any] = list(bench.depth_figures(_SMALL, 3, 1))
    assert [f.value for f in found] == pytest.approx([1.0, 0.5, 8192 / 7168 / 4, 0.5])
