"""Is the chunked kernel the sum it stands for, and is the model around it llama with another memory?"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bdh_bench import laws, sizing
from bdh_bench.errors import SpecError
from bdh_bench.kernels.linear_attention import linear_attention, linear_attention_step
from bdh_bench.loading import load_model
from bdh_bench.models import linear_attention as family
from bdh_bench.models import llama
from bdh_bench.models._block import RMSNorm, SwiGLU
from bdh_bench.models.linear_attention import Config, LinearAttention, Model

NAMES = ("query", "key", "value", "state")
VARIANTS = (
    "linear_attention:feature=elu",
    "linear_attention:feature=elu:rope=off",
    "linear_attention:feature=relu",
    "linear_attention:rope=off:n_layer=2:d_model=30:n_head=3",
    "linear_attention:key_dim=6:n_head=2:n_layer=2:d_model=28",
)


def inputs(batch: int, length: int, keys: int, values: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = ((length, keys), (length, keys), (length, values), (keys, values))
    drawn = (torch.randn(batch, 2, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.requires_grad_() for x in drawn]


def quadratic(query: Tensor, key: Tensor, value: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of tokens at once."""
    return (query @ key.mT).tril() @ value + query @ state, state + key.mT @ value


def gradients(outputs: tuple[Tensor, Tensor], given: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a loss in which the reads and the last state both count, each element with its own weight."""
    weights = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x) for x in outputs]
    return torch.autograd.grad(sum((x.double() * w).sum() for x, w in zip(outputs, weights, strict=True)), given)


def some_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(length))


# -- the kernel --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 16, 64])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_reads_and_gradients_are_those_of_all_pairs(length: int, chunk: int) -> None:
    exact = inputs(2, length, 5, 4)
    truth = quadratic(*exact)
    wanted = gradients(truth, exact)
    for dtype, near in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        given = [x.detach().to(dtype).requires_grad_() for x in exact]
        got = linear_attention(*given, chunk=chunk)
        for x, y in zip((*got, *gradients(got, given)), (*truth, *wanted), strict=True):
            torch.testing.assert_close(x.double() / y.abs().max(), y / y.abs().max(), rtol=near, atol=near)


def test_gradcheck_with_and_without_a_state() -> None:
    given = inputs(1, 5, 2, 3)
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, chunk=2), given)
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, chunk=2), given[:3])


@pytest.mark.parametrize("needed", NAMES)
def test_gradient_where_only_one_input_needs_it(needed: str) -> None:
    given = [x.detach().requires_grad_(name == needed) for name, x in zip(NAMES, inputs(1, 9, 3, 2), strict=True)]
    one = [given[NAMES.index(needed)]]
    got, wanted = gradients(linear_attention(*given, chunk=4), one), gradients(quadratic(*given), one)
    torch.testing.assert_close(got, wanted)


def test_cuts_and_single_steps_give_the_same_stream_and_gradients_through_the_state() -> None:
    given = inputs(2, 70, 5, 3)
    query, key, value, state = given
    rows, start = [], 0
    for length in (1, 7, 1, 16, 45):
        part = slice(start, start + length)
        if length == 1:
            row, state = linear_attention_step(query[:, :, start], key[:, :, start], value[:, :, start], state)
            rows.append(row.unsqueeze(2))
        else:
            piece, state = linear_attention(query[:, :, part], key[:, :, part], value[:, :, part], state, chunk=8)
            rows.append(piece)
        start += length
    got, truth = (torch.cat(rows, 2), state), quadratic(*given)
    for x, y in zip((*got, *gradients(got, given)), (*truth, *gradients(truth, given)), strict=True):
        torch.testing.assert_close(x, y)


def test_half_precision_is_widened_and_autocast_changes_nothing() -> None:
    half = [x.detach().bfloat16().requires_grad_() for x in inputs(2, 70, 5, 4)]
    plain = [x.detach().float().requires_grad_() for x in half]
    truth = linear_attention(*plain)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_attention(*half)
        found = gradients(got, half)
        step = linear_attention_step(*(x[:, :, 0] for x in half[:3]), plain[3])
    assert got[0].dtype == got[1].dtype == step[0].dtype == step[1].dtype == torch.float32
    for x, y in zip((*got, *found), (*truth, *(g.bfloat16() for g in gradients(truth, plain))), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_the_backward_pass_keeps_the_inputs_only_and_the_state_owns_its_storage() -> None:
    given = [x.float().detach().requires_grad_() for x in inputs(2, 64, 5, 3)]
    before, saved = given[3].clone(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        _, state = linear_attention(*given, chunk=16)
    assert sum(saved) == sum(x.numel() for x in given)
    assert state.untyped_storage().nbytes() == state.numel() * 4
    assert torch.equal(given[3], before)


def test_a_key_written_again_returns_the_sum() -> None:
    """The memory is additive: what the delta rule does not do (test_gated_delta.py)."""
    generator = torch.Generator().manual_seed(0)
    key = F.normalize(torch.randn(8, generator=generator, dtype=torch.float64), dim=0)
    values = torch.randn(1, 1, 70, 4, generator=generator, dtype=torch.float64)
    keys = key.expand(1, 1, 70, 8)
    read, state = linear_attention(keys, keys, values)
    torch.testing.assert_close(read, values.cumsum(2))
    torch.testing.assert_close(key @ state[0, 0], values[0, 0].sum(0))


# -- the model ---------------------------------------------------------------------------------------------------------


def rotated(x: Tensor, theta: float) -> Tensor:
    """Members i and i + N/2 of x (B, H, T, N) as one complex number, turned by t·θ^(−2i/N)."""
    half = x.shape[-1] // 2
    angle = torch.outer(torch.arange(x.shape[2]).double(), theta ** (-torch.arange(half).double() / half))
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("feature", ["identity", "relu", "elu"])
def test_the_mixer_is_attention_over_all_pairs(feature: str, rope: bool) -> None:
    config = Config(d_model=24, n_layer=1, n_head=2, key_dim=6, feature=feature, rope=rope, rope_theta=100.0)
    torch.manual_seed(0)
    model = Model(config).double()
    mixer: LinearAttention = model.stack.blocks[0].mixer
    seen: list[Tensor] = []
    mixer.register_forward_hook(lambda _, given, out: seen.extend((given[0], out[0])))
    model.logits(some_tokens(2, 70))
    x, got = seen
    heads = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in mixer.qkv(x).split((12, 12, 24), -1)]
    mapped = {"identity": lambda k: k, "relu": F.relu, "elu": lambda k: torch.where(k > 0, k + 1, k.exp())}[feature]
    query, key = mapped(heads[0] / math.sqrt(6)), mapped(heads[1])
    plain = (query @ key.mT).tril()
    scores = (rotated(query, 100.0) @ rotated(key, 100.0).mT).tril() if rope else plain
    read = scores @ heads[2]
    sizes = plain.sum(3, keepdim=True) if feature == "elu" else (read.square().mean(3, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(got, mixer.out((read / sizes).transpose(1, 2).flatten(2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_keep_the_laws(name: str) -> None:
    broken = [finding for finding in laws.check(load_model(name)) if not finding.kept]
    assert not broken


def test_a_forgotten_past_would_be_seen() -> None:
    model, tokens = load_model("linear_attention"), some_tokens(2, 48)
    with torch.inference_mode():
        moved = (model.logits(tokens)[:, 24:] - model.logits(tokens[:, 23:])[:, 1:]).abs().max()
        session = model.session(2)
        session.extend(tokens[:, :24])
        whole = session.fork().extend(tokens[:, 24:25])
        for kept in session.state():
            kept.zero_()
        lost = (session.extend(tokens[:, 24:25]) - whole).abs().max()
    assert min(moved, lost) > 100 * laws.ROUNDING


def test_only_rotation_knows_the_order() -> None:
    tokens = some_tokens(1, 20)
    swapped = tokens.clone()
    swapped[0, [3, 11]] = tokens[0, [11, 3]]
    moved = {}
    for rope in ("on", "off"):
        model = load_model(f"linear_attention:n_layer=1:d_model=32:n_head=2:rope={rope}")
        with torch.no_grad():
            moved[rope] = float((model.logits(tokens) - model.logits(swapped))[0, -1].abs().max())
    assert moved["off"] < 1e-5 < 1e-3 < moved["on"]


def test_what_stands_around_the_memory_is_llama() -> None:
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm

    torch.manual_seed(0)
    x, ours, norm = torch.randn(2, 5, 24), SwiGLU(24), RMSNorm(24)
    theirs, their_norm = (
        LlamaMLP(LlamaConfig(hidden_size=24, num_attention_heads=2, intermediate_size=64)),
        LlamaRMSNorm(24),
    )
    weight = torch.randn(24)
    with torch.no_grad():
        theirs.gate_proj.weight.copy_(ours.gate_up.weight[:64])
        theirs.up_proj.weight.copy_(ours.gate_up.weight[64:])
        theirs.down_proj.weight.copy_(ours.down.weight)
        norm.weight.copy_(weight)
        their_norm.weight.copy_(weight)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(norm(x), their_norm(x))
    for size in ("quick", "10m", "100m"):
        config = sizing.solve(family, size, {}, explicit=True)
        twin = llama.Config(config.d_model, config.n_layer, config.n_head)
        assert family.parameters(config) == llama.parameters(twin) + config.n_layer * config.head_dim


def test_matrices_are_drawn_as_in_llama() -> None:
    torch.manual_seed(0)
    model = Model(Config(d_model=128))
    for name, weight in model.named_parameters():
        assert weight.std().item() == pytest.approx(0.02 if weight.ndim == 2 else 0.0, rel=0.05), name


def test_state_and_operations_are_counted() -> None:
    model = Model(Config(d_model=64, n_layer=3, n_head=4, key_dim=8))
    assert model.state_bytes(2, 9) == 2 * 3 * 4 * 8 * 16 * 4
    summed = Model(Config(d_model=64, n_layer=3, n_head=4, key_dim=8, feature="elu"))
    assert summed.state_bytes(1, 9) == 3 * 4 * 8 * 17 * 4
    matrices = 2 * sum(w.numel() for name, w in model.named_parameters() if w.ndim == 2)  # the table is read as output
    assert model.flops_per_token(10) == matrices + 3 * 4 * (2 * 8 * 16 + 2 * 8 * 16)
    # scores and sums of one chunk of 64 tokens, per head and token
    assert model.flops_per_token(1000, "chunked") - model.flops_per_token(1000) == 3 * 4 * 64 * (2 * 8 + 2 * 16)
    assert summed.flops_per_token(10) - model.flops_per_token(10) == 3 * 4 * 8 * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_stream_too(dtype: torch.dtype) -> None:
    model, tokens = load_model("linear_attention").to(dtype), some_tokens(1, 40)
    with torch.no_grad():
        whole, session = model.logits(tokens), model.session()
        rows = torch.cat([session.extend(part, keep="all") for part in tokens.split((19, 1, 20), 1)], 1)
    assert rows.dtype == dtype
    assert all(x.dtype == torch.promote_types(dtype, torch.float32) for x in session.state())
    assert (rows - whole).abs().max() <= (1e-12 if dtype == torch.float64 else 3e-2) * whole.abs().max()


def test_autocast_keeps_state_and_residuals_in_float32() -> None:
    model, tokens = load_model("linear_attention"), some_tokens(2, 48)
    exact = model.logits(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        near, session = model.logits(tokens), model.session(2)
        session.extend(tokens)
    F.cross_entropy(near.float().flatten(0, 1), tokens.flatten()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in model.parameters())
    assert all(x.dtype == torch.float32 for x in session.state())
    assert (near.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    "options",
    [{"n_layer": 3}, {"n_head": 4}, {"d_model": 128}, {"key_dim": 64}, {"feature": "elu"}, {"rope": False}],
    ids=str,
)
def test_pinned_options_are_kept(options: dict[str, object]) -> None:
    config = sizing.solve(family, "1m", options, explicit=False)
    assert all(getattr(config, key) == value for key, value in options.items())
    assert abs(family.parameters(config) / 1e6 - 1) <= (0.1 if "d_model" in options else 0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"feature": "softmax"},
        {"d_model": 31},
        {"key_dim": 5},
        {"key_dim": -1},
        {"n_layer": 0},
        {"vocab_size": 0},
        {"rope_theta": 0.0},
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=next(iter(options)).replace("key_dim", "key")):
        Model(replace(Config(d_model=32), **options))
