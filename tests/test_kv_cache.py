"""Does the KV cache copy nothing per token, tell bytes in use from bytes reserved, carry gradients, and change no number?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, GPT2LMHeadModel, LlamaForCausalLM

from bdh_bench import load_model
from bdh_bench.models._causal_attention import causal_attention
from bdh_bench.models._growing import GrowingTensor
from bdh_bench.models._kv_cache import KVCache

_NAMES = (
    "gpt2:n_embd=32:n_layer=2:n_head=2:max_positions=400",
    "llama:d_model=32:n_layer=2:n_head=4:kv_heads=0",
    "llama:d_model=32:n_layer=2:n_head=4:kv_heads=2",
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _tokens(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(0))


# -- no copy per token -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_token_moves_nothing_except_at_growth(mode: Any) -> None:
    session = load_model(_NAMES[0]).session(2)
    places, capacities = [], []
    with mode():
        for _ in range(400):
            session.extend(_tokens(1, 2))
            places.append(session.state()[0].data_ptr())
            capacities.append(session.capacity_bytes)
    assert sum(before != after for before, after in pairwise(places)) <= 5  # 64, 96, 144, 216, 324, 486
    assert all(after == before or after >= 1.45 * before for before, after in pairwise(capacities))


def test_growth_is_amortised() -> None:
    grown, moved, before = GrowingTensor(1), 0, None
    with torch.no_grad():
        for _ in range(20_000):
            filled = grown.append(torch.ones(1, 1))
            moved += 0 if before in (None, filled.data_ptr()) else filled.shape[1]
            before = filled.data_ptr()
    assert moved <= 3 * 20_000
    assert grown.filled is not None
    assert grown.filled.shape == (1, 20_000)
    assert grown.filled.untyped_storage().nbytes() <= 1.5 * 4 * 20_000


def test_detach_keeps_the_reserved_room() -> None:
    session = load_model(_NAMES[0]).session()
    with torch.no_grad():
        session.extend(_tokens(3))
        before = [t.data_ptr() for t in session.state()]
        session.detach()
        session.extend(_tokens(1))
    assert [t.data_ptr() for t in session.state()] == before


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _NAMES)
def test_census_counts_what_is_filled_and_capacity_what_is_reserved(name: str) -> None:
    model = load_model(name)
    session = model.session(3)
    assert session.state() == []
    with torch.inference_mode():
        for length in (1, 5, 94, 30):
            session.extend(_tokens(length, 3))
            assert session.state_bytes == model.state_bytes(3, session.length)
            assert session.state_bytes <= session.capacity_bytes
    assert session.capacity_bytes == model.state_bytes(3, 150)  # room for 64, 100, 150 positions


def test_names_and_load() -> None:
    session = load_model(_NAMES[1]).session()
    with torch.inference_mode():
        session.extend(_tokens(7))
    tensors = session.memory.tensors()
    assert list(tensors) == ["layer0.key", "layer0.value", "layer1.key", "layer1.value"]
    other = KVCache(2)
    other.load(tensors)
    assert all(torch.equal(t, tensors[n]) for n, t in other.tensors().items())
    other.load({})
    assert other.tensors() == {}
    assert other.cache.get_seq_length() == 0


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _NAMES)
def test_same_logits_as_transformers_with_its_own_cache_and_masks(name: str) -> None:
    model = load_model(name)
    kind = GPT2LMHeadModel if name.startswith("gpt2") else LlamaForCausalLM
    config = type(model.model.config).from_dict(model.model.config.to_dict())
    config._attn_implementation = "eager"
    plain = kind(config).eval()
    plain.load_state_dict(model.model.state_dict())
    tokens, session, cache = _tokens(300, 2), model.session(2), DynamicCache()
    with torch.inference_mode():
        for piece in tokens.split([1, 7, 130, 1, 161], 1):
            theirs = plain(input_ids=piece, past_key_values=cache, use_cache=True).logits
            assert torch.allclose(session.extend(piece, keep="all"), theirs, atol=1e-5)
        assert torch.allclose(model.logits(tokens), plain(input_ids=tokens).logits, atol=1e-5)


def test_gradients_flow_through_the_carried_cache_and_stop_at_detach() -> None:
    model, tokens = load_model(_NAMES[2]), _tokens(20, 2)
    weight = model.model.model.layers[0].self_attn.k_proj.weight

    def gradient(cut: bool) -> torch.Tensor:
        session = model.session(2)
        session.extend(tokens[:, :10])
        if cut:
            session.detach()
        return torch.autograd.grad(session.extend(tokens[:, 10:], keep="all").square().sum(), weight)[0]

    truth = torch.autograd.grad(model.logits(tokens)[:, 10:].square().sum(), weight)[0]
    assert (gradient(cut=False) - truth).norm() <= 1e-4 * truth.norm()
    assert (gradient(cut=True) - truth).norm() > 1e-2 * truth.norm()


def test_autograd_mode_may_change_between_tokens() -> None:
    model, tokens = load_model(_NAMES[0]), _tokens(12)
    session, kept = model.session(), []
    for index in range(12):
        with (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.enable_grad)[index % 4]():
            kept.append(session.extend(tokens[:, index : index + 1]).detach().clone())
    assert torch.allclose(torch.cat(kept, 1), model.logits(tokens).detach(), atol=1e-5)


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize(("past", "length"), [(0, 1), (0, 9), (5, 1), (5, 9), (3, 128), (300, 257)])
def test_attention_is_causal_at_the_lower_right(heads: int, past: int, length: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, heads, length, 8)
    key, value = torch.randn(2, 2, 2, past + length, 8).unbind(0)
    repeated = (t.repeat_interleave(heads // 2, 1) for t in (key, value))
    mask = torch.ones(length, past + length, dtype=torch.bool).tril(past)
    expected = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    got, _ = causal_attention(torch.nn.Module(), query, key, value, None, scaling=0.3)
    assert torch.allclose(got, expected.transpose(1, 2), atol=1e-5)


def test_no_mask_in_prefill_and_decode_and_a_small_one_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int]] = []
    fused = F.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: torch.Tensor | None = None, is_causal: bool = False, **rest: Any) -> torch.Tensor:
        seen.append((is_causal, 0 if attn_mask is None else attn_mask.numel()))
        return fused(*args, attn_mask=attn_mask, is_causal=is_causal, **rest)

    monkeypatch.setattr("bdh_bench.models._causal_attention.scaled_dot_product_attention", spy)
    for name in _NAMES:
        model = load_model(name)
        session = model.session(3)
        for length, expected in ((50, (True, 0)), (1, (False, 0))):
            seen.clear()
            session.extend(_tokens(length, 3))
            assert set(seen) == {expected}
        seen.clear()
        session.extend(_tokens(300, 3))
        assert max(size for _, size in seen) <= 128 * 351  # one block of queries, whatever the batch
        seen.clear()
        model.logits(_tokens(300, 3))
        assert set(seen) == {(True, 0)}


# -- gpt2 ---------------------------------------------------------------------------------------------------------------


def test_gpt2_has_learned_positions_no_dropout_and_one_fused_activation() -> None:
    model, tokens = load_model(_NAMES[0]), _tokens(20, 2)
    table = model.model.transformer.wpe.weight
    assert table.shape == (model.max_positions, 32)
    assert table.requires_grad
    with torch.no_grad():
        assert torch.equal(model.train().logits(tokens), model.eval().logits(tokens))
        x = torch.randn(50)
        activation = model.model.transformer.h[0].mlp.act
        assert torch.equal(activation(x), F.gelu(x, approximate="tanh"))  # one kernel, bit for bit
        before = model.logits(tokens)
        table[7] += torch.randn(32)
        moved = (model.logits(tokens) - before).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False] * 7 + [True] * 13
