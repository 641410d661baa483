"""Is ours the published Mamba-2: same weights, same logits, same gradients, exact streams, and sizes as asked?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bdh_bench import sizing
from bdh_bench.errors import SpecError
from bdh_bench.loading import fill, load_model
from bdh_bench.models import mamba2
from bdh_bench.models.mamba2 import Config, Model
from bdh_bench.spec import SIZES

TINY = Config(d_model=24, n_layer=3, state_size=5, head_dim=4, n_groups=2, vocab_size=61)
SHAPES = (
    TINY,
    replace(TINY, n_groups=1, conv_kernel=2, expand=3),
    replace(TINY, n_groups=4, head_dim=12, state_size=16, n_layer=1),
)


def model(config: Config = TINY) -> Model:
    """Random weights that are large enough for every path to matter, the memory above all."""
    torch.manual_seed(1)
    made = Model(config)
    with torch.no_grad():
        for name, x in made.named_parameters():
            if "A_log" not in name and "dt_bias" not in name:
                x.add_(0.2 * torch.randn_like(x))
            elif "dt_bias" in name:
                x.add_(2)  # longer steps: what a token writes is large, and it fades within the text
    return made


def some_tokens(batch: int, length: int, vocabulary: int = TINY.vocab_size) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(length))


def published(config: Config) -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layer,
            state_size=config.state_size,
            conv_kernel=config.conv_kernel,
            expand=config.expand,
            head_dim=config.width,
            num_heads=config.heads,
            n_groups=config.n_groups,
            tie_word_embeddings=True,
            use_cache=False,
            chunk_size=16,
        )
    )


@pytest.mark.parametrize("config", SHAPES)
def test_logits_and_gradients_are_those_of_transformers(config: Config) -> None:
    ours, theirs = model(config), published(config)
    theirs.load_state_dict({**ours.state_dict(), "lm_head.weight": ours.backbone.embeddings.weight})
    tokens = some_tokens(2, 40)
    got, wanted = ours.logits(tokens), theirs(tokens).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    for logits in (got, wanted):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    grads = {name: x.grad for name, x in theirs.named_parameters()}
    assert set(grads) == {name for name, _ in ours.named_parameters()}
    for name, x in ours.named_parameters():
        torch.testing.assert_close(x.grad, grads[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("config", [*SHAPES, replace(TINY, n_groups=1, head_dim=0)])
def test_the_shape_is_read_from_the_weights(config: Config) -> None:
    state = {name: x.clone() for name, x in published(config).state_dict().items()}
    ours = Model(mamba2.config_from_weights(state, {"n_groups": config.n_groups}))
    assert ours.config == config
    fill(ours, state, "published")
    assert torch.equal(ours.backbone.embeddings.weight, state["backbone.embeddings.weight"])


@pytest.mark.parametrize("pinned", [{"n_layer": 2}, {"head_dim": 6}, {"state_size": 16}, {"n_groups": 1}])
def test_options_against_the_weights_are_refused(pinned: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="was asked for"):
        mamba2.config_from_weights(model().state_dict(), {"n_groups": 2, "state_size": 5, **pinned})


def test_weights_of_the_other_mamba_are_refused() -> None:
    other = load_model("mamba:d_model=16:n_layer=1").state_dict()
    with pytest.raises((KeyError, ValueError)):
        mamba2.config_from_weights(other, {})


@pytest.mark.parametrize(
    "config", [*SHAPES, replace(TINY, head_dim=0), replace(TINY, d_model=33, n_groups=1, head_dim=0)]
)
def test_parameter_formula_is_the_count(config: Config) -> None:
    assert mamba2.parameters(config) == Model(config).parameter_count()


@pytest.mark.parametrize("size", [name for name, target in SIZES.items() if target <= 100_000_000])
@pytest.mark.parametrize("pinned", [{}, {"state_size": 32}, {"n_layer": 10}, {"n_groups": 2}])
def test_sizes_are_met(size: str, pinned: dict[str, int]) -> None:
    config = sizing.solve(mamba2, size, pinned, explicit=True)
    assert abs(mamba2.parameters(config) / SIZES[size] - 1) <= 0.02
    assert all(getattr(config, name) == value for name, value in pinned.items())
    assert config.heads >= 4
    assert 8 <= config.width <= 96


@pytest.mark.parametrize("option", ["n_layer", "d_model", "conv_kernel", "vocab_size", "n_groups", "head_dim"])
def test_shapes_without_sense_are_refused(option: str) -> None:
    with pytest.raises(SpecError):
        Model(replace(TINY, **{option: 5 if option == "head_dim" else 0}))
    with pytest.raises(SpecError, match="groups"):
        Model(replace(TINY, n_groups=5))


@pytest.mark.parametrize("cuts", [(1,) * 30, (7, 1, 16), (130,), (2, 65, 63), (1, 129)])
def test_a_stream_in_any_cut_is_the_full_forward(cuts: tuple[int, ...]) -> None:
    ours, tokens = model(), some_tokens(2, sum(cuts))
    with torch.no_grad():
        wanted = ours.logits(tokens)
        session, rows = ours.session(2), []
        for part in tokens.split(cuts, 1):
            rows.append(session.extend(part, keep="all"))
            assert session.state_bytes == ours.state_bytes(2, session.length)
        assert session.capacity_bytes == session.state_bytes
    torch.testing.assert_close(torch.cat(rows, 1), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv", "ssm"])
def test_a_dropped_state_shows(kind: str) -> None:
    ours, tokens = model(), some_tokens(1, 60)
    with torch.no_grad():
        wanted = ours.logits(tokens)[:, 40:]
        for second in (1, 20):  # the one-token path and the chunks
            session = ours.session(1)
            session.extend(tokens[:, :40])
            whole = session.fork().extend(tokens[:, 40 : 40 + second], keep="all")
            torch.testing.assert_close(whole, wanted[:, :second], rtol=1e-5, atol=1e-5)
            for name, x in session.memory.tensors().items():
                if name.startswith(kind):
                    x.zero_()
            lost = session.extend(tokens[:, 40 : 40 + second], keep="all")
            assert (lost - whole).abs().max() > 1e-2


def test_the_empty_memory_counts_too() -> None:
    ours = model()  # 48 inner channels, and 2 · 2 · 5 rows for B and C
    assert ours.session(3).state_bytes == ours.state_bytes(3, 0) == 3 * 3 * (68 * 3 + 48 * 5) * 4


def test_autocast_keeps_state_and_residuals_in_float32_and_the_gradient_in_sight() -> None:
    ours, tokens = model(), some_tokens(2, 148)
    text, targets = tokens[:, :-1], tokens[:, 1:].flatten()
    exact = ours.logits(text)
    wanted = torch.autograd.grad(F.cross_entropy(exact.flatten(0, 1), targets), [*ours.parameters()])
    with torch.autocast("cpu", torch.bfloat16):
        close = ours.logits(text)
        session = ours.session(2)
        session.extend(text)
    got = torch.autograd.grad(F.cross_entropy(close.float().flatten(0, 1), targets), [*ours.parameters()])
    assert all(x.dtype == torch.float32 for x in session.state())
    assert (close.float() - exact).abs().max() < 0.1 * exact.abs().max()
    for (name, _), g, truth in zip(ours.named_parameters(), got, wanted, strict=True):
        assert float((g - truth).norm() / truth.norm()) < 0.1, name


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-2)])
def test_other_precisions_stream_too(dtype: torch.dtype, near: float) -> None:
    ours, tokens = model().to(dtype), some_tokens(1, 24)
    with torch.no_grad():
        wanted, session = ours.logits(tokens), ours.session(1)
        rows = torch.cat([session.extend(part, keep="all") for part in tokens.split((9, 1, 14), 1)], 1)
    assert session.state_bytes == ours.state_bytes(1, 24)
    assert rows.dtype == wanted.dtype == dtype
    assert (rows - wanted).abs().max() <= near * wanted.abs().max()


def test_operations_are_counted() -> None:
    ours = model(Config(d_model=24, n_layer=1, state_size=5, head_dim=6, vocab_size=61))
    in_proj, out_proj, head = 24 * (48 + 58 + 8), 48 * 24, 24 * 61
    convolution, recurrence, skip_and_gate = 2 * 4 * 58, 5 * 48 * 5, 6 * 48
    assert ours.flops_per_token(10) == 2 * (in_proj + out_proj + head) + convolution + recurrence + skip_and_gate
    assert ours.flops_per_token(10_000, "chunked") == ours.flops_per_token(10)
    assert ours.kernels() == "torch SSD"


def test_the_authors_kernels_would_be_called_with_what_they_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their published signatures, carried out by torch on the CPU; no GPU has run the real ones here."""
    from bdh_bench.kernels.ssd import ssd

    calls: list[str] = []

    def conv(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        calls.append(activation)
        padded = F.pad(x, (weight.shape[1] - 1, 0))
        return F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[1]))

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **options: Any) -> Any:
        assert options.pop("return_final_states")
        return ssd(x, dt, A, B, C, options.pop("D"), options.pop("initial_states"), chunk=chunk_size, **options)

    ours, tokens = model(), some_tokens(2, 40)
    wanted = ours.logits(tokens)
    monkeypatch.setattr(mamba2, "_cuda_kernels", lambda *about: (conv, scan))
    torch.testing.assert_close(ours.logits(tokens), wanted, rtol=1e-5, atol=1e-5)
    session = ours.session(2)
    rows = torch.cat([session.extend(part, keep="all") for part in tokens.split((17, 1, 22), 1)], 1)
    torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-5)
    assert len(calls) == 4 * TINY.n_layer
    assert ours.kernels() == "mamba-ssm"
