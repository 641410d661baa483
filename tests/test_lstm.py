"""Is the model the LSTM of the books in residual layers, streamed exactly, with two vectors of state per layer?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bdh_bench import laws, sizing
from bdh_bench.errors import SpecError
from bdh_bench.loading import load_model
from bdh_bench.models import lstm as family
from bdh_bench.models.lstm import Config, Model

TINY = Config(d_model=12, n_layer=3, vocab_size=50)


def model(config: Config = TINY) -> Model:
    torch.manual_seed(1)
    return Model(config)


def some_tokens(batch: int, length: int, vocabulary: int = TINY.vocab_size) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(length))


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def slow(ours: Model, tokens: Tensor) -> Tensor:
    """The equations, one token and one layer at a time: c ← f c + i g, h = o tanh c."""
    weights, width = dict(ours.named_parameters()), ours.config.d_model
    states = [[torch.zeros(len(tokens), width).double() for _ in "hc"] for _ in range(ours.config.n_layer)]
    rows = []
    for t in range(tokens.shape[1]):
        x = weights["embedding.weight"][tokens[:, t]]
        for i, state in enumerate(states):
            own = {n.removeprefix(f"layers.{i}."): w for n, w in weights.items() if n.startswith(f"layers.{i}.")}
            given = normed(x, own["norm.weight"]) @ own["lstm.weight_ih_l0"].T + own["lstm.bias_ih_l0"]
            gates = given + state[0] @ own["lstm.weight_hh_l0"].T + own["lstm.bias_hh_l0"]
            enter, forget, new, leave = gates.chunk(4, -1)
            state[1] = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
            state[0] = leave.sigmoid() * state[1].tanh()
            x = x + state[0]
        rows.append(normed(x, weights["norm.weight"]) @ weights["embedding.weight"].T)
    return torch.stack(rows, 1)


def gradients(logits: Tensor, ours: Model, tokens: Tensor) -> tuple[Tensor, ...]:
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return torch.autograd.grad(loss, [*ours.parameters()])


def test_logits_and_gradients_are_those_of_the_equations() -> None:
    ours, tokens = model().double(), some_tokens(2, 20)
    got, wanted = ours.logits(tokens), slow(ours, tokens)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(gradients(got, ours, tokens), gradients(wanted, ours, tokens))


@pytest.mark.parametrize("cuts", [(1,) * 40, (7, 1, 16, 16), (39, 1)])
def test_a_stream_in_any_cut_is_the_whole_text(cuts: tuple[int, ...]) -> None:
    """The one-token path and the LSTM are two implementations; gradients pass through both."""
    ours, tokens = model(), some_tokens(2, 40)
    session = ours.session(2)
    rows = torch.cat([session.extend(part, keep="all") for part in tokens.split(cuts, 1)], 1)
    whole = ours.logits(tokens)
    torch.testing.assert_close(rows, whole, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(gradients(rows, ours, tokens), gradients(whole, ours, tokens), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_the_state_is_two_vectors_per_layer() -> None:
    ours = model()
    session = ours.session(5)
    session.extend(some_tokens(5, 9))
    assert [tuple(x.shape) for x in session.state()] == [(5, 12)] * 2 * 3
    assert session.state_bytes == session.capacity_bytes == ours.state_bytes(5, 9) == 5 * 2 * 3 * 12 * 4


@pytest.mark.parametrize("kind", ["h", "c"])
def test_a_dropped_state_shows(kind: str) -> None:
    ours, tokens = load_model("lstm"), some_tokens(1, 30, 256)
    with torch.no_grad():
        for second in (1, 5):
            session = ours.session()
            session.extend(tokens[:, :25])
            whole = session.fork().extend(tokens[:, 25 : 25 + second], keep="all")
            for name, kept in session.memory.tensors().items():
                if name.startswith(kind):
                    kept.zero_()
            lost = session.extend(tokens[:, 25 : 25 + second], keep="all")
            assert (lost - whole).abs().max() > 100 * laws.ROUNDING


def test_it_starts_by_remembering() -> None:
    ours = model(Config(d_model=64))
    for layer in ours.requires_grad_(False).layers:
        both = layer.lstm.bias_ih_l0 + layer.lstm.bias_hh_l0
        assert torch.equal(both[64:128], torch.ones(64))
        assert both[:64].abs().max() <= 2 / 8
        assert layer.lstm.weight_hh_l0.abs().max() == pytest.approx(1 / 8, rel=0.01)
    assert ours.embedding.weight.std() == pytest.approx(0.02, rel=0.05)


def test_operations_are_counted() -> None:
    ours = model()
    matrices = 2 * sum(x.numel() for x in ours.parameters() if x.ndim == 2)
    biases = sum(x.numel() for name, x in ours.named_parameters() if "bias" in name)
    assert ours.flops_per_token(10) == ours.flops_per_token(10_000) == matrices + biases + 3 * 9 * 12


def test_autocast_leaves_the_recurrence_in_float32() -> None:
    ours, tokens = model(), some_tokens(2, 20)
    exact = ours.logits(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        near, session = ours.logits(tokens), ours.session(2)
        session.extend(tokens[:, :19])
        session.extend(tokens[:, 19:])
    assert all(x.dtype == torch.float32 for x in session.state())
    assert (near.float() - exact).abs().max() < 0.02 * exact.abs().max()
    gradients(near.float(), ours, tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_stream_too(dtype: torch.dtype) -> None:
    ours, tokens = model().to(dtype), some_tokens(1, 30)
    with torch.no_grad():
        whole, session = ours.logits(tokens), ours.session()
        rows = torch.cat([session.extend(part, keep="all") for part in tokens.split((9, 1, 20), 1)], 1)
    assert rows.dtype == dtype
    assert session.state_bytes == ours.state_bytes(1, 30) == 2 * 3 * 12 * dtype.itemsize
    assert (rows - whole).abs().max() <= (1e-12 if dtype == torch.float64 else 3e-2) * whole.abs().max()


def test_evaluation_can_still_be_differentiated_by_cudnn() -> None:
    ours = model().eval()
    assert not ours.training
    assert all(layer.lstm.training and not layer.norm.training for layer in ours.layers)


@pytest.mark.parametrize("options", [{"n_layer": 1}, {"n_layer": 5}, {"d_model": 100}, {"vocab_size": 512}], ids=str)
def test_pinned_options_are_kept(options: dict[str, int]) -> None:
    config = sizing.solve(family, "1m", options, explicit=False)
    assert all(getattr(config, key) == value for key, value in options.items())
    assert abs(family.parameters(config) / 1e6 - 1) <= (0.06 if "d_model" in options else 0.02)


def test_layers_are_few() -> None:
    found = {size: sizing.solve(family, size, {}, explicit=True).n_layer for size in ("quick", "1m", "10m", "100m")}
    assert found == {"quick": 2, "1m": 2, "10m": 3, "100m": 4}
    assert sizing.solve(family, "quick", {}, explicit=True) == Config()


@pytest.mark.parametrize("option", ["d_model", "n_layer", "vocab_size"])
def test_impossible_shapes_are_refused(option: str) -> None:
    with pytest.raises(SpecError, match=option):
        Model(replace(TINY, **{option: 0}))
