"""Is each option of ``llama`` the arithmetic it names, against plain formulas and transformers' own code, in the bytes it claims?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from bdh_bench import load_model, registry, sizing
from bdh_bench.errors import SpecError
from bdh_bench.kernels.feature_attention import feature_attention
from bdh_bench.kernels.quantise import Codes, code_bytes, dequantise, quantise, read_codes, straight_through
from bdh_bench.models._causal_attention import causal_attention
from bdh_bench.models._window import WindowTensor

_SMALL = "llama:d_model=32:n_layer=2:n_head=4"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _tokens(length: int, batch: int = 1) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))


def _theirs(model: Any, **changes: Any) -> LlamaForCausalLM:
    """transformers' own module with its eager attention and these weights."""
    described = {**model.model.config.to_dict(), **changes}
    config = type(model.model.config).from_dict(described)
    config._attn_implementation = "eager"
    plain = LlamaForCausalLM(config).eval()
    plain.load_state_dict(model.model.state_dict())
    return plain


def _seen(length: int, window: int, sinks: int) -> Tensor:
    """Which token reads which, written down token by token."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for reader in range(length):
        for read in range(reader + 1):
            seen[reader, read] = read > reader - window or read < sinks
    return seen


# -- window and sinks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "sinks"), [(2, 0), (17, 0), (17, 1), (20, 4), (140, 3), (400, 2)])
def test_a_window_is_a_mask_on_the_whole_text(window: int, sinks: int) -> None:
    model = load_model(f"{_SMALL}:kv_heads=2:window={window}:sinks={sinks}")
    tokens, length = _tokens(300, 2), 300
    mask = torch.zeros(1, 1, length, length).masked_fill(~_seen(length, window, sinks), float("-inf"))
    with torch.inference_mode():
        truth = _theirs(model)(input_ids=tokens, attention_mask=mask).logits
        assert torch.allclose(model.logits(tokens), truth, atol=1e-5)
        session, kept = model.session(2), []
        for piece in tokens.split([1, 30, 1, 1, 130, 1, 136], 1):
            kept.append(session.extend(piece, keep="all"))
        assert torch.allclose(torch.cat(kept, 1), truth, atol=1e-5)
        unmasked = _theirs(model)(input_ids=tokens).logits
    assert (window >= length) == torch.allclose(unmasked, truth, atol=1e-5)


def test_a_windows_memory_stops_growing() -> None:
    model = load_model(f"{_SMALL}:window=30:sinks=4")
    session, token = model.session(2), 2 * 2 * 32 * 4 * 2  # keys and values, layers, features, float32, streams
    with torch.inference_mode():
        session.extend(_tokens(33, 2))
        assert session.state_bytes == model.state_bytes(2, 33) == 33 * token
        session.extend(_tokens(1000, 2))  # a long prompt leaves nothing behind
        assert session.capacity_bytes <= 1.5 * session.state_bytes
        for _ in range(200):
            session.extend(_tokens(1, 2))
            assert session.state_bytes == model.state_bytes(2, session.length) == 33 * token
            assert session.capacity_bytes <= 1.5 * session.state_bytes
    assert model.state_bytes(1, 10**6) == model.state_bytes(1, 33)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("sinks", [0, 4])
def test_a_token_does_not_move_the_window(mode: Any, sinks: int) -> None:
    """It is written in place: the view walks through its buffer, and moves as a whole once per so many tokens as there is room for."""
    model = load_model(f"{_SMALL}:window=101:sinks={sinks}")
    session, places, buffers = model.session(), [], []
    with mode():
        session.extend(_tokens(300))
        for _ in range(500):
            session.extend(_tokens(1))
            key = session.state()[0]
            places.append(key.data_ptr())
            buffers.append(key.untyped_storage().data_ptr())
    moves = sum(a != b for a, b in pairwise(buffers))
    assert moves <= 500 // 50 + 1
    width = 32 // 4 * 4  # features of a head, float32
    steps = [b - a for (a, b), (x, y) in zip(pairwise(places), pairwise(buffers), strict=True) if x == y]
    assert set(steps) == {width}


def test_window_tensor_moves_few_bytes_and_keeps_the_right_tokens() -> None:
    store, seen, moved, before = WindowTensor(1, 50, 3), 0, 0, 0
    with torch.no_grad():
        for place in range(5000):
            visible = store.append(torch.full((1, 1), float(place)))
            first = max(3, place - 49)
            assert visible[0].tolist() == [*range(min(3, place + 1)), *range(first, place + 1)]
            buffer = visible.untyped_storage().data_ptr()
            moved += visible.shape[1] if buffer != before else 3
            store.settle()
            before, seen = buffer, seen + 1
            assert store.filled is not None
            assert store.filled.shape[1] == min(place + 1, 52)
    assert moved <= (3 + 2.2) * seen  # the sinks, and the window about twice


def test_detach_keeps_the_room_and_gradients_stop_there() -> None:
    model, tokens = load_model(f"{_SMALL}:window=12:sinks=2:kv_bits=8"), _tokens(40)
    weight = model.model.model.layers[0].self_attn.k_proj.weight
    with torch.no_grad():
        session = model.session()
        session.extend(tokens[:, :20])
        session.extend(tokens[:, 20:21])
        before = [t.data_ptr() for t in session.state()]
        session.detach()
        assert [t.data_ptr() for t in session.state()] == before

    def gradient(cut: bool) -> Tensor:
        session = model.session()
        session.extend(tokens[:, :20])
        session = session.fork()
        if cut:
            session.detach()
        return torch.autograd.grad(session.extend(tokens[:, 20:], keep="all").square().sum(), weight)[0]

    truth = torch.autograd.grad(model.logits(tokens)[:, 20:].square().sum(), weight)[0]
    assert (gradient(cut=False) - truth).norm() <= 1e-3 * truth.norm()
    assert (gradient(cut=True) - truth).norm() > 1e-2 * truth.norm()


# -- codes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_a_code_is_the_nearest_of_its_levels(bits: int) -> None:
    x = torch.randn(3, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] = 0
    codes, scale = quantise(x, bits)
    back = dequantise(codes, scale, bits, torch.float32)
    levels = 2 ** (bits - 1) - 1
    assert torch.allclose(scale, x.abs().amax(-1, keepdim=True) / levels)
    assert ((back - x).abs() <= scale / 2 * (1 + 1e-5)).all()
    assert (back - x).abs().max() > scale.max() / 8  # it does round
    assert (back / scale.clamp(min=1e-9)).round().unique().numel() == 2 * levels + 1 if bits == 4 else True
    assert torch.equal(back[0, 0, 0], torch.zeros(16))
    peaks = x.abs().argmax(-1, keepdim=True)
    assert torch.allclose(back.gather(-1, peaks), x.gather(-1, peaks))
    assert codes[0, 0, 0].numel() * codes.itemsize == code_bytes(16, bits) == 16 * bits // 8
    assert all(
        torch.equal(a, b)
        for a, b in zip(quantise(back, bits), (codes, scale), strict=True)
        if not b.is_floating_point()
    )


@pytest.mark.parametrize(("bits", "share"), [(8, (8 + 4) / 32), (4, (4 + 4) / 32)])
def test_codes_and_scales_are_counted(bits: int, share: float) -> None:
    model, plain = load_model(f"{_SMALL}:kv_heads=2:kv_bits={bits}"), load_model(f"{_SMALL}:kv_heads=2")
    session = model.session(3)
    with torch.inference_mode():
        session.extend(_tokens(50, 3))
        for _ in range(30):
            session.extend(_tokens(1, 3))
    # 8 features of 32 bits per head become so many codes and one scale of 32 bits
    assert session.state_bytes == model.state_bytes(3, 80) == round(plain.state_bytes(3, 80) * share)
    assert {t.dtype for t in session.state()} == {torch.float32, torch.int8 if bits == 8 else torch.uint8}
    assert model.to(torch.bfloat16).state_bytes(3, 80) == session.state_bytes  # a scale stays float32


def test_logits_are_those_of_rounded_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain, tokens = load_model(f"{_SMALL}:kv_bits=4"), load_model(_SMALL), _tokens(60)
    with torch.inference_mode():
        unrounded = plain.logits(tokens)
        got = model.logits(tokens)

        def rounding(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
            key, value = (dequantise(*quantise(t, 4), 4, t.dtype) for t in (key, value))
            return causal_attention(module, query, key, value, *rest, **more)

        monkeypatch.setattr(
            "transformers.models.llama.modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface", lambda *_: rounding
        )
        assert torch.allclose(got, plain.logits(tokens), atol=1e-5)
    assert 1e-4 < (got - unrounded).abs().max() < 0.1


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_read_in_blocks_as_a_whole(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdh_bench.kernels.quantise._BLOCK", 1)  # blocks of 16 tokens
    torch.manual_seed(0)
    query, room = torch.randn(2, 3, 2, 8), torch.randn(2, 2, 3, 90, 8)
    key, value = (Codes(*(t[:, :, 5:80] for t in quantise(x, bits)), bits, torch.float32) for x in room)
    back = [dequantise(*codes) for codes in (key, value)]
    truth = torch.nn.functional.scaled_dot_product_attention(query, *back, scale=0.3)
    assert torch.allclose(read_codes(query, key, value, 0.3), truth, atol=1e-6)


def test_a_decoded_token_never_turns_the_whole_cache_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import bdh_bench.kernels.quantise as kernel

    turned: list[int] = []
    plain = kernel.dequantise

    def spy(codes: Tensor, *rest: Any) -> Tensor:
        turned.append(codes.shape[-2])
        return plain(codes, *rest)

    monkeypatch.setattr(kernel, "dequantise", spy)
    monkeypatch.setattr("bdh_bench.models._kv_cache.dequantise", spy)
    monkeypatch.setattr(kernel, "_BLOCK", 1)
    session = load_model(f"{_SMALL}:kv_bits=8").session()
    with torch.inference_mode():
        session.extend(_tokens(200))
        turned.clear()
        session.extend(_tokens(1))
    assert max(turned) == 16
    assert sum(turned) == 2 * 2 * 201  # keys and values of two layers, once


def test_the_gradient_passes_straight_through() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    rounded = dequantise(*quantise(x.detach(), 4), 4, torch.float32)
    out = straight_through(x, rounded)
    assert torch.equal(out, rounded)
    assert torch.equal(torch.autograd.grad((out * 3).sum(), x)[0], torch.full((4, 8), 3.0))


# -- positions ---------------------------------------------------------------------------------------------------------

_ROTARY = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


@pytest.mark.parametrize("kind", _ROTARY)
def test_rescaled_positions_are_those_of_transformers(kind: str) -> None:
    context = ":rope_context=64" if kind != "linear" else ""
    model = load_model(f"{_SMALL}:rope_scaling={kind}:rope_factor=4{context}")
    described = {"rope_theta": 10000.0, **_ROTARY[kind]}
    theirs = _theirs(model, rope_parameters=described, max_position_embeddings=256)
    plain, tokens = load_model(_SMALL), _tokens(200)
    with torch.inference_mode():
        truth = theirs(input_ids=tokens).logits
        assert torch.allclose(model.logits(tokens), truth, atol=1e-5)
        assert not torch.allclose(plain.logits(tokens), truth, atol=1e-4)


def test_ntk_slows_the_slowest_pair_by_the_factor_and_the_fastest_not() -> None:
    slow, plain = (
        load_model(_SMALL + end).model.model.rotary_emb.inv_freq for end in (":rope_scaling=ntk:rope_factor=4", "")
    )
    ratio = plain / slow
    assert ratio[0] == pytest.approx(1)
    assert ratio[-1] == pytest.approx(4)
    assert (ratio.diff() > 0).all()


# -- linear attention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 64, 150])
def test_linear_attention_is_its_quadratic_formula(length: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 6, length, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, length, 8, dtype=torch.float64).unbind(0)
    got, state = feature_attention(query, key, value, torch.zeros(2, 2, 8, 9, dtype=torch.float64))
    features = [torch.where(t > 0, t + 1, t.exp()) for t in (query, key.repeat_interleave(3, 1))]
    weights = torch.einsum("bhtd,bhsd->bhts", *features).tril()
    truth = weights / weights.sum(-1, keepdim=True) @ value.repeat_interleave(3, 1)
    assert torch.allclose(got, truth)
    assert torch.allclose(state[..., 8], features[1][:, ::3].sum(2))
    assert torch.allclose(state[..., :8], features[1][:, ::3].mT @ value)


def test_linear_attention_changes_nothing_but_the_mixing(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, plain, tokens = load_model(f"{_SMALL}:attention=linear"), load_model(_SMALL), _tokens(100)
    assert all(torch.equal(a, b) for a, b in zip(linear.parameters(), plain.parameters(), strict=True))

    def naive(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        weights = ((torch.nn.functional.elu(query) + 1) @ (torch.nn.functional.elu(key) + 1).mT).tril()
        return (weights / weights.sum(-1, keepdim=True) @ value).transpose(1, 2), None

    with torch.inference_mode():
        got = linear.logits(tokens)
        assert not torch.allclose(got, plain.logits(tokens), atol=1e-4)
        monkeypatch.setattr(
            "transformers.models.llama.modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface", lambda *_: naive
        )
        assert torch.allclose(got, plain.logits(tokens), atol=1e-5)


def test_linear_state_is_constant_and_shared_by_grouped_heads() -> None:
    for name, groups in ((f"{_SMALL}:attention=linear", 4), (f"{_SMALL}:kv_heads=2:attention=linear", 2)):
        model = load_model(name)
        assert model.state_bytes(3, 1) == model.state_bytes(3, 10**6) == 3 * 2 * groups * 8 * 9 * 4
        assert model.flops_per_token(1) == model.flops_per_token(10**6)


# -- costs, sizes, refusals --------------------------------------------------------------------------------------------


def test_operations_follow_what_is_seen() -> None:
    plain, window, codes = (load_model(_SMALL + end) for end in ("", ":window=30:sinks=4", ":kv_bits=8"))
    assert plain.flops_per_token(100) - plain.flops_per_token(34) == 2 * 4 * 32 * 66
    assert window.flops_per_token(20) == plain.flops_per_token(20)
    assert window.flops_per_token(10**6) == window.flops_per_token(34) == plain.flops_per_token(34)
    assert codes.flops_per_token(100) - plain.flops_per_token(100) == 2 * 2 * 32 * 100


@pytest.mark.parametrize("size", ["quick", "10m", "100m"])
def test_an_option_that_weighs_nothing_changes_no_shape(size: str) -> None:
    module = registry.load("models", "llama")
    plain = sizing.solve(module, size, {}, explicit=True)
    for pinned in (
        {"window": 64, "sinks": 4},
        {"kv_bits": 4},
        {"attention": "linear"},
        {"rope_scaling": "ntk", "rope_factor": 2.0},
    ):
        got = sizing.solve(module, size, pinned, explicit=True)
        assert (got.d_model, got.n_layer, got.n_head) == (plain.d_model, plain.n_layer, plain.n_head)
        assert all(getattr(got, name) == value for name, value in pinned.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("sinks=4", "add window"),
        ("window=1", "at least 2"),
        ("window=-3", "at least 2"),
        ("kv_bits=5", "8 or 4"),
        ("attention=flash", "softmax or linear"),
        ("attention=linear:window=8", "it has none"),
        ("attention=linear:kv_bits=8", "it has none"),
        ("rope_scaling=dynamic:rope_factor=2", "length of the text"),
        ("rope_scaling=longrope:rope_factor=2", "length of the text"),
        ("rope_scaling=yarm:rope_factor=2", "expected one of none, linear, ntk, yarn, llama3"),
        ("rope_scaling=yarn", "add rope_factor"),
        ("rope_factor=2", "without rope_scaling"),
        ("rope_scaling=yarn:rope_factor=2:rope_context=0", "context of the training"),
        ("d_model=8:rope_scaling=ntk:rope_factor=2", "at least 4"),
    ],
)
def test_what_makes_no_sense_is_refused(options: str, message: str) -> None:
    shape = "llama:n_layer=2:n_head=4" if "d_model" in options else _SMALL
    with pytest.raises(SpecError, match=message):
        load_model(f"{shape}:{options}")


def test_what_runs_is_said() -> None:
    said = {end: load_model(_SMALL + end).kernels() for end in ("", ":kv_bits=4", ":attention=linear")}
    assert "fused attention" in said[""]
    assert "codes of 4 bits in blocks" in said[":kv_bits=4"]
    assert "linear attention" in said[":attention=linear"]
