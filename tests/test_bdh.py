"""Is our BDH the published one, in every mode and through its gradients?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bdh_bench import load_model
from bdh_bench.kernels.linear_attention import frequencies, linear_attention, rotate, rotations
from bdh_bench.models.bdh import Config, Model, parameters

_GOLDEN = json.loads((Path(__file__).parent / "golden" / "bdh_reference_logits.json").read_text())
_SEEDS = {"embed.weight": 1, "encoder": 2, "encoder_v": 3, "decoder": 4, "lm_head": 5}


def _golden_weights(case: dict) -> dict[str, torch.Tensor]:
    config = Config(**case["config"])
    shapes = {name: tensor.shape for name, tensor in Model(config).state_dict().items() if name != "attn.freqs"}
    weights = {}
    for name, shape in shapes.items():
        i = torch.arange(shape.numel(), dtype=torch.float64)
        k = _SEEDS[name]
        scale = 1.0 if name == "embed.weight" else case["scale"]
        weights[name] = (scale * torch.sin(0.7 * k + (i + 1) * (1 + 0.1 * k))).float().view(shape)
    return weights


@pytest.mark.parametrize("index", range(len(_GOLDEN["cases"])))
@pytest.mark.parametrize("mode", ["parallel", "chunked", "recurrent"])
def test_golden_logits_of_the_published_forward(index: int, mode: str, tmp_path: Path) -> None:
    case = _GOLDEN["cases"][index]
    save_file(_golden_weights(case), tmp_path / "w.safetensors")
    model = load_model(f"bdh:n_layer={case['config']['n_layer']}:mode={mode}:chunk=3:weights={tmp_path}/w.safetensors")
    tokens = torch.tensor(case["tokens"]).view(1, -1)
    expected = torch.tensor(case["logits"]).view(1, tokens.shape[1], -1)
    with torch.inference_mode():
        if mode == "recurrent":
            session = model.session()
            got = torch.cat([session.extend(tokens[:, i : i + 1]) for i in range(tokens.shape[1])], 1)
        else:
            got = model.logits(tokens)
    assert (got - expected).abs().max() <= 1e-5


def test_published_pt_state_dict_loads(tmp_path: Path) -> None:
    model = Model(Config(2, 16, 2, 4, 40))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    loaded = load_model(f"bdh:n_layer=2:weights={tmp_path}/w.pt")
    assert loaded.config == Config(2, 16, 2, 4, 40)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize(("heads", "batch"), [(1, 1), (3, 2), (4, 3)])
def test_modes_agree_at_2000_tokens_with_uneven_cuts(heads: int, batch: int) -> None:
    torch.manual_seed(1)
    config = Config(3, 24, heads, 8 * heads, 256)
    model = Model(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    tokens = torch.randint(0, 256, (batch, 2000))
    with torch.inference_mode():
        truth = model._parallel(tokens)
        chunked, session, stepped = model.logits(tokens), model.session(batch), model.session(batch)
        cuts = [1, 7, 64, 65, 500, 2, 861, 500]
        pieces = torch.cat([session.extend(part, keep="all") for part in tokens.split(cuts, 1)], 1)
        steps = torch.cat([stepped.extend(tokens[:, i : i + 1]) for i in range(2000)], 1)
    assert truth.std() > 0.05
    for other in (chunked, pieces, steps):
        assert (other - truth).abs().max() <= 1e-5


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000])
def test_kernel_equals_the_quadratic_form_with_state(length: int) -> None:
    torch.manual_seed(0)
    keys = torch.rand(2, length, 3, 8, dtype=torch.float64)
    values = torch.randn(2, length, 5, dtype=torch.float64)
    state = torch.randn(2, 3, 8, 5, dtype=torch.float64)
    freqs = frequencies(8)
    got, after = linear_attention(keys, values, freqs, 11, state, 64)
    query = rotate(keys, rotations(freqs, 11, length)).double()
    truth = (query @ query.mT).tril(-1) @ values[:, None] + query @ state
    assert torch.allclose(got, truth, atol=1e-9)
    assert torch.allclose(after, state + query.mT @ values[:, None], atol=1e-9)


@pytest.mark.parametrize("chunk", [4, 100])
def test_explicit_backward_equals_autograd_of_the_quadratic_form(chunk: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.rand(2, 13, 3, 6), torch.randn(2, 13, 5), torch.randn(2, 3, 6, 5)]
    freqs = frequencies(6)

    def quadratic(keys: torch.Tensor, values: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        query = rotate(keys, rotations(freqs, 7, 13))
        return (query @ query.mT).tril(-1) @ values[:, None] + query @ state, state + query.mT @ values[:, None]

    weights = torch.randn(2, 3, 13, 5), torch.randn(2, 3, 6, 5)
    gradients = []
    for form in (quadratic, lambda k, v, s: linear_attention(k, v, freqs, 7, s, chunk)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        reads, after = form(*leaves)
        ((reads * weights[0]).sum() + (after * weights[1]).sum()).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()


def test_gradients_of_chunked_training_equal_the_published_form() -> None:
    torch.manual_seed(0)
    model = Model(Config(3, 16, 2, 8, 64, chunk=16))
    tokens = torch.randint(0, 64, (2, 50))
    found = []
    for form in (model._parallel, model.logits):
        model.zero_grad()
        form(tokens).logsumexp(-1).sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(1.0, float(a.abs().max()))


def test_phases_are_exact_at_a_million_positions() -> None:
    freqs = frequencies(64)
    position = 1_048_577
    turn = rotations(freqs, position, 1)[0]
    exact = [(position * float(f)) % 1.0 for f in freqs[::2]]
    angle = torch.tensor(exact, dtype=torch.float64) * 2 * torch.pi
    assert (turn.real - angle.cos()).abs().max() < 1e-6
    assert (turn.imag - angle.sin()).abs().max() < 1e-6


def test_the_first_token_passes_through_every_layer_unchanged() -> None:
    model = Model(Config(3, 16, 2, 8, 64)).eval()
    token = torch.tensor([[5]])
    x = torch.nn.functional.layer_norm(model.embed(token), (16,))
    for _ in range(3):  # LN(x + LN(0)) = LN(x)
        x = torch.nn.functional.layer_norm(x, (16,))
    assert torch.allclose(model.logits(token), x @ model.lm_head, atol=1e-6)


def test_default_size_is_the_published_one() -> None:
    assert parameters(Config()) == 25_296_896
    with torch.device("meta"):
        model = Model(Config())
    assert model.state_bytes(1, 10) == 192 * 2**20
    assert model.flops_per_token(1, "recurrent") - 2 * 256 * 256 == 503_316_480
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        "embed.weight": (256, 256),
        "encoder": (4, 256, 8192),
        "encoder_v": (4, 256, 8192),
        "decoder": (32768, 256),
        "lm_head": (256, 256),
    }
