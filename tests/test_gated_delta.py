"""Is the chunked kernel the recurrence it stands for, does it overwrite, and is the mixer the published one?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bdh_bench import laws, sizing
from bdh_bench.errors import SpecError
from bdh_bench.kernels.gated_delta import gated_delta, gated_delta_step
from bdh_bench.kernels.short_convolution import short_convolution
from bdh_bench.loading import load_model
from bdh_bench.models import gated_delta as family
from bdh_bench.models.gated_delta import Config, GatedDelta, Model

NAMES = ("query", "key", "value", "log_alpha", "beta", "state")
VARIANTS = (
    "gated_delta:key_dim=8:value_dim=12:n_layer=2:d_model=30:n_head=3",
    "gated_delta:conv_kernel=2:key_dim=5:n_layer=1:d_model=20:n_head=1",
)


def inputs(batch: int, length: int, keys: int, values: int) -> list[Tensor]:
    """Float64: keys of length 1, α between 0 and 1, β between 0 and 1."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, 2, *shape, generator=generator, dtype=torch.float64)

    key = F.normalize(normal(length, keys), dim=-1)
    rates = -normal(length).abs(), normal(length).sigmoid()
    drawn = (normal(length, keys), key, normal(length, values), *rates, normal(keys, values))
    return [x.requires_grad_() for x in drawn]


def slow(
    query: Tensor, key: Tensor, value: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence in the paper's form, S (D, N) and token by token: S ← S α (I − β k kᵀ) + β v kᵀ, y = S q."""
    s, rows, eye = state.mT, [], torch.eye(key.shape[-1], dtype=key.dtype)
    for t in range(query.shape[2]):
        k, v, b = key[:, :, t, :, None], value[:, :, t, :, None], beta[:, :, t, None, None]  # columns
        s = s @ (log_alpha[:, :, t, None, None].exp() * (eye - b * k @ k.mT)) + b * v @ k.mT
        rows.append((s @ query[:, :, t, :, None]).squeeze(3))
    return torch.stack(rows, 2), s.mT


def gradients(outputs: tuple[Tensor, Tensor], given: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a loss in which the reads and the last state both count, each element with its own weight."""
    weights = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x) for x in outputs]
    return torch.autograd.grad(sum((x.double() * w).sum() for x, w in zip(outputs, weights, strict=True)), given)


def some_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(length))


# -- the kernel --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 16, 64])
@pytest.mark.parametrize("length", [1, 64, 65, 130])
def test_reads_and_gradients_are_those_of_the_recurrence(length: int, chunk: int) -> None:
    exact = inputs(2, length, 5, 4)
    truth = slow(*exact)
    wanted = gradients(truth, exact)
    for dtype, near in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        given = [x.detach().to(dtype).requires_grad_() for x in exact]
        got = gated_delta(*given, chunk=chunk)
        for x, y in zip((*got, *gradients(got, given)), (*truth, *wanted), strict=True):
            torch.testing.assert_close(x.double() / y.abs().max(), y / y.abs().max(), rtol=near, atol=near)


def test_gradcheck_with_and_without_a_state() -> None:
    given = inputs(1, 5, 2, 3)
    assert torch.autograd.gradcheck(lambda *x: gated_delta(*x, chunk=2), given)
    assert torch.autograd.gradcheck(lambda *x: gated_delta(*x, chunk=2), given[:5])


@pytest.mark.parametrize("needed", NAMES)
def test_gradient_where_only_one_input_needs_it(needed: str) -> None:
    given = [x.detach().requires_grad_(name == needed) for name, x in zip(NAMES, inputs(1, 9, 3, 2), strict=True)]
    one = [given[NAMES.index(needed)]]
    torch.testing.assert_close(gradients(gated_delta(*given, chunk=4), one), gradients(slow(*given), one))


def test_cuts_and_single_steps_give_the_same_stream_and_gradients_through_the_state() -> None:
    given = inputs(2, 70, 5, 3)
    state, rows, start = given[5], [], 0
    for length in (1, 7, 1, 16, 45):
        part = [x[:, :, start : start + length] for x in given[:5]]
        if length == 1:
            row, state = gated_delta_step(*(x[:, :, 0] for x in part), state)
            rows.append(row.unsqueeze(2))
        else:
            piece, state = gated_delta(*part, state, chunk=8)
            rows.append(piece)
        start += length
    got, truth = (torch.cat(rows, 2), state), slow(*given)
    for x, y in zip((*got, *gradients(got, given)), (*truth, *gradients(truth, given)), strict=True):
        torch.testing.assert_close(x, y)


def test_reads_are_those_of_transformers() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    query, key, value, log_alpha, beta, state = (x.detach().float() for x in inputs(2, 130, 8, 6))
    theirs = (x.transpose(1, 2) for x in (query, key, value, log_alpha, beta))
    wanted, last = torch_chunk_gated_delta_rule(*theirs, initial_state=state, output_final_state=True)
    got, after = gated_delta(query * 8**-0.5, key, value, log_alpha, beta, state)
    torch.testing.assert_close(got, wanted.transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after, last, rtol=1e-5, atol=1e-5)


def test_half_precision_is_widened_and_autocast_changes_nothing() -> None:
    half = [x.detach().bfloat16().requires_grad_() for x in inputs(2, 70, 5, 4)]
    plain = [x.detach().float().requires_grad_() for x in half]
    truth = gated_delta(*plain)
    with torch.autocast("cpu", torch.bfloat16):
        got = gated_delta(*half)
        found = gradients(got, half)
        step = gated_delta_step(*(x[:, :, 0] for x in half[:5]), plain[5])
    assert got[0].dtype == got[1].dtype == step[0].dtype == step[1].dtype == torch.float32
    for x, y in zip((*got, *found), (*truth, *(g.bfloat16() for g in gradients(truth, plain))), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_the_backward_pass_keeps_no_square_of_a_chunk_and_the_state_owns_its_storage() -> None:
    given = [x.float().detach().requires_grad_() for x in inputs(2, 64, 5, 3)]
    before, saved = given[5].clone(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        _, state = gated_delta(*given, chunk=16)
    heads, chunks = 2 * 2, 4
    kept = sum(x.numel() for x in given[:5]) + heads * (chunks * 5 * 3 + 64 * (5 + 3))  # inputs, states, W and U
    assert sum(saved) == kept
    assert state.untyped_storage().nbytes() == state.numel() * 4
    assert torch.equal(given[5], before)


def test_strong_and_long_fading_stays_finite() -> None:
    """The product of α over a chunk underflows; the ratios of two of them must not become 0/0."""
    given = inputs(1, 150, 4, 3)
    given[3] = torch.full_like(given[3], -20.0).requires_grad_()
    narrow = [x.detach().float().requires_grad_() for x in given]
    got, truth = gated_delta(*narrow), slow(*given)
    for x, y in zip((*got, *gradients(got, narrow)), (*truth, *gradients(truth, given)), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


# -- what it is for ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [True, False], ids=["steps", "chunks"])
def test_a_key_written_again_returns_its_last_value(steps: bool) -> None:
    """With α = β = 1 and unit keys a write replaces. Linear attention returns the sum (test_linear_attention.py)."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]  # orthonormal rows
    order = torch.randint(8, (130,), generator=generator)
    values = torch.randn(130, 4, generator=generator, dtype=torch.float64)
    given = [keys[order], keys[order], values, torch.zeros(130).double(), torch.ones(130).double()]
    given = [x[None, None] for x in given]
    if steps:
        state, rows = torch.zeros(1, 1, 8, 4, dtype=torch.float64), []
        for t in range(130):
            row, state = gated_delta_step(*(x[:, :, t] for x in given), state)
            rows.append(row)
        read = torch.stack(rows, 2)
    else:
        read, state = gated_delta(*given)
    torch.testing.assert_close(read[0, 0], values)  # it reads what it has just written
    last = torch.stack([values[(order == i).nonzero().max()] for i in range(8)])
    torch.testing.assert_close(keys @ state[0, 0], last)


def test_half_strength_moves_halfway_and_fading_forgets() -> None:
    key = torch.tensor([[[[0.6, 0.8]]]], dtype=torch.float64)
    old, new = torch.tensor([[[[3.0]]]], dtype=torch.float64), torch.tensor([[[[7.0]]]], dtype=torch.float64)
    one, none = torch.ones(1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
    _, state = gated_delta(key, key, old, none, one)
    for beta, alpha, wanted in ((0.5, 1.0, 5.0), (0.0, 0.25, 0.75), (1.0, 0.25, 7.0)):
        read, _ = gated_delta(key, key, new, one * math.log(alpha), one * beta, state)
        assert read.item() == pytest.approx(wanted)


# -- the convolution ---------------------------------------------------------------------------------------------------


def test_the_convolution_is_torchs_in_any_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    x, kernel, before = (torch.randn(*shape, generator=generator).double() for shape in ((2, 9, 5), (5, 4), (2, 3, 5)))
    given = [t.requires_grad_() for t in (x, kernel, before)]
    whole = F.conv1d(torch.cat((before, x), 1).transpose(1, 2), kernel.unsqueeze(1), groups=5).transpose(1, 2)
    rows, kept = [], before
    for part in x.split((1, 2, 5, 1), 1):
        row, kept = short_convolution(part, kernel, kept)
        rows.append(row)
        assert kept.untyped_storage().nbytes() == kept.numel() * 8
    got = (torch.cat(rows, 1), kept)
    truth = (whole, x[:, -3:])
    for a, b in zip((*got, *gradients(got, given)), (*truth, *gradients(truth, given)), strict=True):
        torch.testing.assert_close(a, b)
    fresh = short_convolution(x, kernel)[0]
    torch.testing.assert_close(fresh, short_convolution(x, kernel, torch.zeros_like(before))[0])
    assert torch.autograd.gradcheck(lambda *t: short_convolution(*t), given)


# -- the model ---------------------------------------------------------------------------------------------------------


def theirs(mixer: GatedDelta) -> Callable[[Tensor], Tensor]:
    """transformers' module with our weights; it orders its rows by head: q, k, v and gate of one, then of the next."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

    c = mixer.config
    module = Qwen3NextGatedDeltaNet(
        Qwen3NextConfig(
            hidden_size=c.d_model,
            linear_num_value_heads=c.n_head,
            linear_num_key_heads=c.n_head,
            linear_key_head_dim=c.key_dim,
            linear_value_head_dim=c.value_width,
            linear_conv_kernel_dim=c.conv_kernel,
            num_hidden_layers=1,
            rms_norm_eps=1e-5,
        ),
        0,
    )
    channels, gate, strength, rate = mixer.in_proj.weight.split(mixer.split)
    by_head = [part.unflatten(0, (c.n_head, -1)) for part in (*channels.split(c.parts), gate)]
    weights = {
        "in_proj_qkvz.weight": torch.cat(by_head, 1).flatten(0, 1),
        "in_proj_ba.weight": torch.stack((strength, rate), 1).flatten(0, 1),
        "conv1d.weight": mixer.conv.unsqueeze(1),
        "dt_bias": mixer.alpha_bias,
        "A_log": mixer.A_log,
        "norm.weight": mixer.norm.weight,
        "out_proj.weight": mixer.out.weight,
    }
    module.load_state_dict(weights)
    return module


def test_the_mixer_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    mixer = GatedDelta(Config(d_model=20, n_head=3, key_dim=8, value_dim=12))
    with torch.no_grad():
        for weight in (mixer.in_proj.weight, mixer.norm.weight):
            weight.add_(0.3 * torch.randn_like(weight))
    x = torch.randn(2, 70, 20)
    torch.testing.assert_close(mixer(x, {})[0], theirs(mixer)(x), rtol=1e-4, atol=1e-5)


def test_it_starts_with_slow_and_fast_fading() -> None:
    torch.manual_seed(0)
    mixer = GatedDelta(Config(n_head=400)).requires_grad_(False)
    step, rate = F.softplus(mixer.alpha_bias), mixer.A_log.exp()
    assert 1e-3 <= step.min() < 2e-3
    assert 0.08 < step.max() <= 0.1
    assert step.log().mean().exp() == pytest.approx(1e-2, rel=0.2)  # even in the logarithm
    assert 1 <= rate.min() < 1.5
    assert 15 < rate.max() <= 16
    assert mixer.conv.abs().max() == pytest.approx(0.5, abs=1e-3)
    assert Model(Config(d_model=128)).stack.blocks[0].mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_keep_the_laws(name: str) -> None:
    broken = [finding for finding in laws.check(load_model(name)) if not finding.kept]
    assert not broken


@pytest.mark.parametrize("kind", ["conv", "state"])
def test_a_dropped_state_shows(kind: str) -> None:
    model, tokens = load_model("gated_delta"), some_tokens(1, 60)
    with torch.no_grad():
        for second in (1, 20):  # the step and the chunk
            session = model.session()
            session.extend(tokens[:, :40])
            whole = session.fork().extend(tokens[:, 40 : 40 + second], keep="all")
            for name, kept in session.memory.tensors().items():
                if name.startswith(kind):
                    kept.zero_()
            lost = session.extend(tokens[:, 40 : 40 + second], keep="all")
            assert (lost - whole).abs().max() > 100 * laws.ROUNDING


def test_state_and_operations_are_counted() -> None:
    model = Model(Config(d_model=40, n_layer=3, n_head=2, key_dim=8, value_dim=12))
    channels = 2 * (8 + 8 + 12)
    assert model.state_bytes(2, 9) == 2 * 3 * (3 * channels + 2 * 8 * 12) * 4
    matrices = 2 * sum(w.numel() for w in model.parameters() if w.ndim == 2)  # the convolutions are among them
    assert model.flops_per_token(10) == matrices + 3 * 2 * 7 * 8 * 12
    # per head and token: two scores, half a product for each solved column, and the sum over the chunk's writes
    chunked = 6 * 8 * 12 + 64 * (2 * 8 + 2 * 8 + (8 + 12) + 2 * 12)
    assert model.flops_per_token(1000, "chunked") == matrices + 3 * 2 * chunked


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_stream_too(dtype: torch.dtype) -> None:
    model, tokens = load_model("gated_delta").to(dtype), some_tokens(1, 40)
    with torch.no_grad():
        whole, session = model.logits(tokens), model.session()
        rows = torch.cat([session.extend(part, keep="all") for part in tokens.split((19, 1, 20), 1)], 1)
    assert rows.dtype == dtype
    assert all(x.dtype == torch.promote_types(dtype, torch.float32) for x in session.state())
    assert session.state_bytes == model.state_bytes(1, 40)
    assert (rows - whole).abs().max() <= (1e-12 if dtype == torch.float64 else 3e-2) * whole.abs().max()


def test_autocast_keeps_state_and_residuals_in_float32() -> None:
    model, tokens = load_model("gated_delta"), some_tokens(2, 48)
    exact = model.logits(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        near, session = model.logits(tokens), model.session(2)
        session.extend(tokens)
    F.cross_entropy(near.float().flatten(0, 1), tokens.flatten()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in model.parameters())
    assert all(x.dtype == torch.float32 for x in session.state())
    assert (near.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("options", [{"n_layer": 3}, {"n_head": 5}, {"d_model": 128}, {"key_dim": 64}], ids=str)
def test_pinned_options_are_kept(options: dict[str, int]) -> None:
    config = sizing.solve(family, "1m", options, explicit=False)
    assert all(getattr(config, key) == value for key, value in options.items())
    assert abs(family.parameters(config) / 1e6 - 1) <= (0.1 if "d_model" in options else 0.02)


@pytest.mark.parametrize("size", ["quick", "1m", "10m", "100m"])
def test_shapes_are_natural(size: str) -> None:
    config = sizing.solve(family, size, {}, explicit=True)
    assert 0.55 <= config.n_head * config.key_dim / config.d_model <= 1  # 3/4 as far as heads are whole
    assert config.value_width == 2 * config.key_dim
    if size == "quick":
        assert config == Config()


@pytest.mark.parametrize("option", ["d_model", "n_layer", "n_head", "key_dim", "conv_kernel", "vocab_size"])
def test_impossible_shapes_are_refused(option: str) -> None:
    with pytest.raises(SpecError, match=option):
        Model(replace(Config(), **{option: 0}))
