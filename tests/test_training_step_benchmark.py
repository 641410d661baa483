"""Do the ratios of a training step compare equal work: same step, same bytes, same weights and gradients on both sides?"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from bdh_bench import load_model

_FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.insert(0, str(_FOLDER))  # it imports its neighbour, as when it is run
    spec = importlib.util.spec_from_file_location("training_step_benchmark", _FOLDER / "training_step.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    sys.path.remove(str(_FOLDER))
    return module


def test_transformers_side_has_the_same_logits_and_gradients(benchmark: ModuleType) -> None:
    ours = load_model("mamba:d_model=32:n_layer=2")
    sides, found = (ours, benchmark.Published(ours)), []
    tokens = torch.randint(256, (1, 65), generator=torch.Generator().manual_seed(0))
    for side in sides:
        logits = side.logits(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        grads = dict(
            zip([n for n, _ in side.named_parameters()], torch.autograd.grad(loss, [*side.parameters()]), strict=True)
        )
        found.append((logits, {name.removeprefix("model."): g for name, g in grads.items()}))
    (got, ours_by_name), (wanted, theirs_by_name) = found
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert ours_by_name.keys() == theirs_by_name.keys()
    for name, g in ours_by_name.items():
        error = (g - theirs_by_name[name]).norm() / theirs_by_name[name].norm()
        assert error < 1e-4, f"{name}: {error}"


def test_every_sized_family_is_a_row_and_llama_leads(benchmark: ModuleType) -> None:
    names = benchmark.families()
    assert names[0] == "llama"
    assert {"bdh", "gpt2", "mamba", "mamba2"} < set(names)
    assert "toy" not in names


def test_seconds_are_per_trained_byte_of_one_real_step(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    run = benchmark.trainer(load_model("gpt2:n_embd=16:n_head=1:n_layer=1", train_context=512), "float32", 1280)
    assert (run.reader.rows, run.reader.length) == (2, 640)
    before = [x.clone() for x in run.model.parameters()]
    monkeypatch.setattr(benchmark, "seconds", lambda action: action() is not None and 1.28)
    assert benchmark.step_s(run) == pytest.approx(0.001)
    assert any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
