"""Is the low-rank memory of BDH the image of a graph's synapses, and which layer norm ends that?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bdh_bench import list_models, registry
from bdh_bench.errors import UnknownNameError
from bdh_bench.models.bdh_graph import (
    NORMS,
    Trace,
    Weights,
    centred,
    decay,
    graph,
    low_rank,
    random_weights,
    rotation,
    synapses_of,
)

_N, _D, _LAYERS, _TOKENS = 24, 6, 3, 40
_AGEING = {
    "rotation": rotation(_N),
    "decay": decay(_N),
    "both": rotation(_N) @ decay(_N),
    "none": torch.eye(_N).double(),
}


def _case(ageing: str, seed: int, norms: frozenset[str] = frozenset()) -> tuple[Weights, Tensor, Trace]:
    weights = random_weights(_N, _D, _AGEING[ageing], seed)
    inputs = torch.rand(_TOKENS, _N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weights, inputs, low_rank(weights, inputs, _LAYERS, norms)


def _apart(a: Tensor, b: Tensor) -> float:
    """Largest difference in any token and layer, relative to the largest value there."""
    apart, size = (a - b).abs().flatten(2).amax(-1), b.abs().flatten(2).amax(-1)  # (T, L) each
    return float((apart / size.clamp(min=1e-12)).max())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ageing", _AGEING)
def test_reading_is_propagation_along_edges(ageing: str, seed: int) -> None:
    weights, inputs, rank = _case(ageing, seed)
    edges = graph(weights, inputs, _LAYERS)
    for one, other in ((edges.x, rank.x), (edges.y, rank.y), (edges.reads, rank.reads)):
        assert _apart(one, other) < 1e-9
    assert _apart(weights.E @ edges.memory, rank.memory) < 1e-9
    assert (rank.y[1:, 1:] > 0).float().mean() > 0.05  # neurons do fire, and what they read is not all zero
    assert rank.reads[1:].abs().min(0).values.max() > 0


@pytest.mark.parametrize("ageing", _AGEING)
def test_the_low_rank_form_is_the_sum_of_the_paper(ageing: str) -> None:
    weights, _, rank = _case(ageing, 0)
    for t in (0, 1, 7, _TOKENS - 1):
        for layer in range(_LAYERS):
            read = torch.zeros(_D, dtype=torch.float64)
            for tau in range(t):
                aged = torch.linalg.matrix_power(weights.U, t - tau) @ rank.x[t, layer]
                read += weights.E @ rank.y[tau, layer] * (rank.x[tau, layer] @ aged)
            torch.testing.assert_close(rank.reads[t, layer], read, rtol=1e-9, atol=1e-12)


def test_under_decay_a_synapse_ages_by_itself_and_under_rotation_with_its_pair() -> None:
    touched = torch.zeros(_N, _N, dtype=torch.float64)
    touched[3, 4] = 1.0
    assert (touched @ decay(_N)).nonzero().tolist() == [[3, 4]]
    assert (touched @ rotation(_N)).nonzero().tolist() == [[3, 4], [3, 5]]
    assert (synapses_of(*_hebbian("decay")) >= 0).all()
    assert (synapses_of(*_hebbian("rotation")) < 0).any()


def _hebbian(ageing: str) -> tuple[Weights, Trace]:
    weights, _, rank = _case(ageing, 0)
    return weights, rank


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ageing", ["rotation", "decay"])
def test_layer_norm_of_the_value_breaks_the_identity_and_elsewhere_does_not(ageing: str, seed: int) -> None:
    for norms in (frozenset({"read"}), frozenset({"drive"}), frozenset({"read", "drive"})):
        weights, _, rank = _case(ageing, seed, norms)
        assert _apart(weights.E @ synapses_of(weights, rank), rank.memory) < 1e-9, norms
    for norms in (frozenset({"value"}), NORMS):
        weights, _, rank = _case(ageing, seed, norms)
        plain, mended = synapses_of(weights, rank), synapses_of(weights, rank, rescaled=True)
        assert _apart(weights.E @ plain, rank.memory) > 0.1, norms
        assert _apart(weights.E @ mended, rank.memory) > 1e-3, norms  # the mean is still in
        assert _apart(centred(weights.E) @ mended, rank.memory) < 1e-9, norms


def test_theory_beside_the_models_is_not_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "bdh_graph" not in {entry.name for entry in list_models()}
    with pytest.raises(UnknownNameError, match="did you mean 'bdh'"):
        registry.find("models", "bdh_graph")
    texts = {
        "theory": "class Models: ...\ndef model() -> None: ...\n",
        "written": "class Model: ...\n",
        "assigned": "Model = object\n",
        "borrowed": "from bdh_bench.models.llama import Model\n",
        "broken": "class Model(:\n",
        "_hidden": "class Model: ...\n",
    }
    (tmp_path / "models").mkdir()
    for name, text in texts.items():
        (tmp_path / "models" / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(registry, "_PACKAGE", tmp_path)
    found = registry._entries.__wrapped__("models")
    assert {e.name: e.problem.startswith("SyntaxError") for e in found if e.origin == "built in"} == {
        "assigned": False, "borrowed": False, "broken": True, "written": False,
    }  # fmt: skip
