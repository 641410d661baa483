"""Are the densities, norms and overlaps those of the published arithmetic, byte by byte?"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from bdh_bench.kernels.rotary import turn, turned
from bdh_bench.models.bdh import Config, Model, _norm
from bdh_bench.tasks import latency, sparsity
from bdh_bench.types import Measurement, TaskContext

_LENGTH = 700  # two pieces


def _context(contexts: tuple[int, ...] = (300, _LENGTH), weights: str = "trained") -> TaskContext:
    generator = torch.Generator().manual_seed(5)
    documents = tuple(
        SimpleNamespace(name=f"d{i}", content=bytes(torch.randint(256, (900,), generator=generator).tolist()))
        for i in range(2)
    )
    return TaskContext(0, contexts[0], contexts, 256, documents, weights, True, lambda *_: None)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    net = Model(Config(3, 16, 2, 8, 256)).double().eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(5)
    return net


@pytest.fixture(scope="module")
def rows(model: Model) -> list[Measurement]:
    return list(sparsity.run(model, sparsity.Config(), _context()))


def _truth(model: Model, content: bytes) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Keys (T, H, N), gates (T, H, N) and state norms (T,) of every pass, from T×T scores."""
    tokens = torch.tensor([[10, *content[: _LENGTH - 1]]])
    weights, by = model._weights(), turn(model.attn.freqs, 0, _LENGTH)
    x, found = _norm(model.embed(tokens))[0], []
    for _ in range(model.config.n_layer):
        keys = torch.relu(x @ weights.encoder)  # (H, T, N)
        query = turned(keys, by)
        gates = torch.relu(_norm((query @ query.mT).tril(-1) @ x) @ weights.encoder_v)
        norms = torch.stack([(query[:, :t].mT @ x[:t]).norm() for t in range(1, _LENGTH + 1)])
        found.append((keys.transpose(0, 1), gates.transpose(0, 1), norms))
        x = _norm(x + _norm((keys * gates @ weights.decoder).sum(0)))
    return found


def test_densities_norms_and_overlaps_equal_the_quadratic_form(model: Model, rows: list[Measurement]) -> None:
    for document in _context().documents:
        with torch.no_grad():
            truth = _truth(model, document.content)
        found = {(m.metric, m.context, *m.axes.values()): m.value for m in rows if m.sample == document.name}
        for layer, (keys, gates, norms) in enumerate(truth):
            for name, values in (("key", keys), ("gate", gates), ("gated", keys * gates)):
                expected = float((values[16:] != 0).double().mean())
                assert found[f"{name}_density", _LENGTH, layer] == pytest.approx(expected, abs=1e-12)
            for context in (300, _LENGTH):
                assert found["state_norm", context, layer] == pytest.approx(float(norms[context - 1]), rel=1e-9)
            last = keys[300:].flatten(1)  # the last piece begins at the last context before
            for distance in (1, 16):
                cosine = F.cosine_similarity(last[distance:], last[:-distance], dim=-1).mean()
                assert found["key_cosine", _LENGTH, layer, distance] == pytest.approx(float(cosine), abs=1e-9)


def test_the_three_densities_differ_and_products_are_the_sparsest(rows: list[Measurement]) -> None:
    values = {
        (m.metric, m.axes.get("layer")): m.value for m in rows if m.sample == "d0" and m.metric.endswith("density")
    }
    for layer in range(3):
        assert values["gated_density", layer] < min(values["key_density", layer], values["gate_density", layer])


def test_a_model_that_shows_nothing_is_unsupported() -> None:
    (row,) = sparsity.run(torch.nn.Linear(1, 1), sparsity.Config(), _context())
    assert row.status == "unsupported"
    assert row.value is None
    assert [m.status for m in sparsity.run(Model(Config(1, 16, 2, 8, delta=True)), sparsity.Config(), _context())] == [
        "unsupported"
    ]


@pytest.mark.parametrize(
    ("weights", "force", "timed"), [("random", 0, False), ("random", 1, True), ("trained", 0, True)]
)
def test_sparse_decoding_of_random_weights_is_not_timed_unasked(weights: str, force: int, timed: bool) -> None:
    net = Model(Config(2, 16, 2, 8, mode="sparse")).eval()
    config = latency.Config("smoke", steps=2, windows=2, prefills=1, force=force)
    found = [m for m in latency.run(net, config, _context((32,), weights)) if isinstance(m, Measurement)]
    steps = [m for m in found if m.metric == "tpot_s"]
    assert all((m.value is not None) == timed for m in steps)
    assert {m.axes["path"] for m in steps} == {"sparse"}
    if timed:
        shares = {m.axes["layer"]: m.value for m in found if m.metric == "row_density"}
        assert set(shares) == {0, 1}
        assert all(0 < share <= 1 for share in shares.values())
    else:
        assert "force=1" in steps[0].reason
