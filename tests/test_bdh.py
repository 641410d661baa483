"""Is our BDH the published one, in every mode and through its gradients?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bdh_bench import load_model
from bdh_bench.errors import SpecError
from bdh_bench.kernels import rotary
from bdh_bench.kernels.bdh_pass import Form, Weights, bdh_pass
from bdh_bench.models import bdh
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
@pytest.mark.parametrize("mode", ["parallel", "chunked", "recurrent", "sparse"])
def test_golden_logits_of_the_published_forward(index: int, mode: str, tmp_path: Path) -> None:
    case = _GOLDEN["cases"][index]
    save_file(_golden_weights(case), tmp_path / "w.safetensors")
    model = load_model(f"bdh:n_layer={case['config']['n_layer']}:mode={mode}:chunk=5:weights={tmp_path}/w.safetensors")
    tokens = torch.tensor(case["tokens"]).view(1, -1)
    expected = torch.tensor(case["logits"]).view(1, tokens.shape[1], -1)
    with torch.inference_mode():
        if mode in ("recurrent", "sparse"):
            session = model.session()
            got = torch.cat([session.extend(tokens[:, i : i + 1]) for i in range(tokens.shape[1])], 1)
        else:
            got = model.logits(tokens)
    # Rounding in float32 phases and sums leaves the fixture itself up to 7e-6 away from the same arithmetic in float64.
    assert (got - expected).abs().max() <= 1e-5


def test_published_pt_state_dict_loads(tmp_path: Path) -> None:
    model = Model(Config(2, 16, 2, 4, 40))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    loaded = load_model(f"bdh:n_layer=2:weights={tmp_path}/w.pt")
    assert loaded.config == Config(2, 16, 2, 4, 40)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def _model(heads: int = 3, dtype: torch.dtype = torch.float32, **options: object) -> Model:
    """A small model whose logits spread enough for an error to show."""
    torch.manual_seed(1)
    model = Model(Config(3, 24, heads, 8 * heads, 256, **options)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    return model.to(dtype)


def _streamed(model: Model, tokens: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    session = model.session(tokens.shape[0])
    return torch.cat([session.extend(part, keep="all") for part in tokens.split(cuts, 1)], 1)


@pytest.mark.parametrize(("heads", "batch"), [(1, 1), (3, 2), (4, 3)])
def test_modes_agree_at_2000_tokens_with_uneven_cuts(heads: int, batch: int) -> None:
    model = _model(heads)
    tokens = torch.randint(0, 256, (batch, 2000))
    with torch.inference_mode():
        truth = model._parallel(tokens)
        others = [model.logits(tokens), _streamed(model, tokens, [1, 7, 64, 65, 500, 2, 861, 500])]
        others += [_streamed(_model(heads, mode=mode), tokens, [1] * 2000) for mode in ("recurrent", "sparse")]
    assert truth.std() > 0.05
    for other in others:
        assert (other - truth).abs().max() <= 1e-5


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize("mode", ["chunked", "recurrent", "sparse"])
def test_every_mode_equals_the_published_form_at_awkward_lengths(mode: str, length: int) -> None:
    batch = 1 + length % 3
    model = _model(3, mode=mode, chunk=64)
    tokens = torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(length))
    with torch.inference_mode():
        truth = model._parallel(tokens)
        got = model.logits(tokens) if mode == "chunked" else _streamed(model, tokens, [1] * length)
    assert (got - truth).abs().max() <= 1e-5


_OURS = [
    {"decay": 0.05},
    {"rope": False},
    {"key_density": 0.2},
    {"key_sign": "signed"},
    {"key_sign": "signed", "key_density": 0.3},
    {"delta": True},
    {"attention": "softmax"},
    {"state_dtype": "float64"},
    {"checkpointing": True},
]


@pytest.mark.parametrize("options", _OURS, ids=str)
def test_options_stream_and_learn_as_their_quadratic_form(options: dict) -> None:
    """In float64, where the largest keys of two forms are the same keys."""
    model = _model(3, torch.float64, chunk=16, **options)
    tokens = torch.randint(0, 256, (2, 101))
    with torch.inference_mode():
        truth = model._parallel(tokens)
        for cuts in ([101], [1] * 101, [1, 7, 33, 2, 58]):
            assert (_streamed(model, tokens, cuts) - truth).abs().max() <= 1e-9
        assert (truth - _model(3, torch.float64)._parallel(tokens)).abs().max() > 1e-3 or not _changes_the_form(options)
    found = []
    for form in (model._parallel, model.logits):
        model.zero_grad()
        form(tokens).logsumexp(-1).sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-8 * max(1.0, float(a.abs().max()))


def _changes_the_form(options: dict) -> bool:
    return not options.keys() & {"state_dtype", "checkpointing"}


def test_the_slopes_of_decay_are_those_of_alibi() -> None:
    slopes = _model(4, decay=0.08)._slopes()
    assert slopes is not None
    assert torch.allclose(slopes, torch.tensor([0.08, 0.02, 0.005, 0.00125]))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("key_sign", "up"),
        ("attention", "none"),
        ("key_density", "0"),
        ("decay", "-1"),
        ("dropout", "1"),
        ("mode", "fast"),
    ],
)
def test_senseless_options_are_refused(option: str, value: str) -> None:
    with pytest.raises(SpecError, match=option):
        load_model(f"bdh:{option}={value}")


def test_kinds_of_memory_do_not_mix() -> None:
    with pytest.raises(SpecError, match="delta"):
        Model(Config(decay=0.1, delta=True))
    with pytest.raises(SpecError, match="sparse"):
        Model(Config(mode="sparse", decay=0.1))


# -- the kernel ---------------------------------------------------------------------------------------------------------


def _inputs(length: int, heads: int = 3) -> tuple[torch.Tensor, Weights, torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(2, length, 5), (heads, 5, 8), (heads, 5, 8), (heads, 8, 5), (2, heads, 8, 5)]
    x, *weights, state = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return x, Weights(*weights), state


def _quadratic(
    x: torch.Tensor, weights: Weights, by: rotary.Turn, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same pass in one piece, heads second."""
    keys = torch.relu(x.unsqueeze(1) @ weights.encoder)  # (B, H, T, N)
    query = rotary.turned(keys, by)
    read = (query @ query.mT).tril(-1) @ x.unsqueeze(1) + query @ state
    answer = torch.nn.functional.layer_norm(read, read.shape[-1:])
    gated = keys * torch.relu(answer @ weights.encoder_v)
    return (gated @ weights.decoder).sum(1), state + query.mT @ x.unsqueeze(1)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_kernel_equals_the_quadratic_form_behind_a_past(length: int) -> None:
    x, weights, state = _inputs(length)
    by = rotary.turn(rotary.frequencies(8), 11, length)
    before = state.clone()
    got, after = bdh_pass(x, weights, by, state, Form(chunk=64))
    truth, truth_after = _quadratic(x, weights, by, state)
    assert torch.allclose(got, truth, atol=1e-9)
    assert torch.allclose(after, truth_after, atol=1e-9)
    assert torch.equal(state, before)


@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize(
    "form", [Form(4), Form(100), Form(4, signed=True), Form(4, active=3), Form(4, dropout=0.3)], ids=str
)
def test_explicit_backward_equals_finite_differences(form: Form, past: bool) -> None:
    x, weights, state = _inputs(9)
    by = rotary.turn(rotary.frequencies(8), 7, 9)
    leaves = [t.requires_grad_() for t in (x, *weights, *([state] if past else []))]

    def run(x: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(3)  # the same neurons are dropped in every call
        z, after = bdh_pass(x, Weights(*rest[:3]), by, rest[3] if past else None, form)
        return (z, after.double()) if past else (z,)

    assert torch.autograd.gradcheck(run, leaves, eps=1e-6, atol=1e-5)


def test_explicit_backward_with_decay_equals_finite_differences() -> None:
    x, weights, state = _inputs(9)
    by = rotary.turn(rotary.frequencies(8), 7, 9)
    form = Form(4, decay=torch.tensor([0.3, 0.1, 0.0], dtype=torch.float64))
    leaves = [t.requires_grad_() for t in (x, *weights, state)]
    assert torch.autograd.gradcheck(
        lambda x, *rest: bdh_pass(x, Weights(*rest[:3]), by, rest[3], form), leaves, atol=1e-5
    )


def test_dropout_keeps_the_mean_and_is_off_in_evaluation() -> None:
    x, weights, _ = _inputs(6)
    truth, _ = bdh_pass(x, weights, None, None, Form(64))
    torch.manual_seed(0)
    mean = torch.stack([bdh_pass(x, weights, None, None, Form(64, dropout=0.5))[0] for _ in range(3000)]).mean(0)
    assert (mean - truth).abs().max() <= 0.15 * truth.abs().max()
    model = _model(3, dropout=0.5)
    tokens = torch.randint(0, 256, (1, 20))
    assert torch.equal(model.logits(tokens), model.logits(tokens))
    assert not torch.equal(model.train().logits(tokens), model.logits(tokens))


def test_products_in_bfloat16_stay_near_float32() -> None:
    """Half of the products' rounding may come from the order of the sums, not more than the published form loses itself."""
    model = _model(4)
    tokens = torch.randint(0, 256, (2, 300))
    truth = model._parallel(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        published, ours = model._parallel(tokens), model.logits(tokens)
    published_error, our_error = ((other - truth).float().std() for other in (published, ours))
    assert 0 < our_error <= 1.5 * published_error


# -- decoding -----------------------------------------------------------------------------------------------------------


def _quiet(model: Model, density: float) -> Model:
    """The model with all but a share of its neurons silenced for every token: their encoder columns point away."""
    with torch.no_grad():
        asleep = torch.rand(model.encoder.shape[::2], generator=torch.Generator().manual_seed(0)) > density  # (H, N)
        model.encoder.mul_(~asleep.unsqueeze(1))
    return model


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6])
def test_sparse_decoding_touches_few_rows_and_loses_nothing(batch: int, density: float) -> None:
    model = _quiet(_model(3, mode="sparse"), density)
    tokens = torch.randint(0, 256, (batch, 40))
    with torch.inference_mode():
        session = model.session(batch)
        session.extend(tokens[:, :30])
        got = torch.cat([session.extend(tokens[:, i : i + 1]) for i in range(30, 40)], 1)
        assert (got - model._parallel(tokens)[:, 30:]).abs().max() <= 1e-5
    facts = session.facts()
    assert facts["path"] == "sparse"
    assert set(facts["row_density"]) == {0, 1, 2}
    for share in facts["row_density"].values():
        assert share <= 1 - (1 - density) ** 2 + 0.05  # a pair is awake if either member is


@pytest.mark.parametrize(("density", "path"), [(0.05, "sparse"), (0.9, "dense")])
def test_auto_decodes_by_the_measured_density(density: float, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bdh, "_SPARSE_BYTES", 0)
    model = _quiet(_model(3), density)
    tokens = torch.randint(0, 256, (1, 60))
    with torch.inference_mode():
        session = model.session()
        assert session.facts()["path"] == "dense"
        got = torch.cat([session.extend(tokens[:, i : i + 1]) for i in range(60)], 1)
        assert (got - model._parallel(tokens)).abs().max() <= 1e-5
    assert session.facts()["path"] == path
    assert session.fork().facts() == session.facts()


def test_a_small_state_is_read_densely_whatever_its_density() -> None:
    session = _quiet(_model(3), 0.02).session()
    with torch.inference_mode():
        session.extend(torch.tensor([[1]]))
    assert session.facts()["path"] == "dense"


def test_a_weight_changed_in_place_reaches_the_next_token() -> None:
    model = _model(3)
    tokens = torch.randint(0, 256, (1, 12))
    with torch.no_grad():
        session = model.session()
        session.extend(tokens[:, :10])
        session.extend(tokens[:, 10:11])
        model.encoder_v.mul_(-1)
        other = model.session()
        other.memory.load({name: tensor.clone() for name, tensor in session.memory.tensors().items()})
        other.length = session.length
        assert torch.equal(session.extend(tokens[:, 11:]), other.extend(tokens[:, 11:]))


# -- the model ----------------------------------------------------------------------------------------------------------


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
    freqs = rotary.frequencies(64)
    position = 1_048_577
    turn = rotary.turn(freqs, position, 1)
    exact = [(position * float(f)) % 1.0 for f in freqs[::2]]
    angle = torch.tensor(exact, dtype=torch.float64) * 2 * torch.pi
    assert (turn.cos - angle.cos()).abs().max() < 1e-6
    assert (turn.sin - angle.sin()).abs().max() < 1e-6


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
