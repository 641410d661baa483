"""Is ours the published Mamba: same weights, same logits, same gradients, exact streams, and sizes as asked?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bdh_bench import sizing
from bdh_bench.errors import BenchError, SpecError
from bdh_bench.loading import fill, load_model
from bdh_bench.models import mamba
from bdh_bench.models.mamba import Config, Model
from bdh_bench.spec import SIZES

TINY = Config(d_model=24, n_layer=3, state_size=5, conv_kernel=4, expand=2, dt_rank=3, vocab_size=61)


def model(config: Config = TINY) -> Model:
    """Random weights that are large enough for every path to matter, the memory above all."""
    torch.manual_seed(1)
    made = Model(config)
    with torch.no_grad():
        for name, x in made.named_parameters():
            if "A_log" not in name and "dt_proj.bias" not in name:
                x.add_(0.2 * torch.randn_like(x))
    return made


def some_tokens(batch: int, length: int, vocabulary: int = TINY.vocab_size) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(length))


def published(config: Config) -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layer,
            state_size=config.state_size,
            conv_kernel=config.conv_kernel,
            expand=config.expand,
            time_step_rank=config.rank,
            use_cache=False,
        )
    )


def test_logits_and_gradients_are_those_of_transformers() -> None:
    ours, theirs = model(), published(TINY)
    theirs.load_state_dict({**ours.state_dict(), "lm_head.weight": ours.backbone.embeddings.weight})
    tokens = some_tokens(2, 40)
    got, wanted = ours.logits(tokens), theirs(tokens).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    for logits in (got, wanted):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    grads = {name: x.grad for name, x in theirs.named_parameters()}
    assert set(grads) == {name for name, _ in ours.named_parameters()}
    for name, x in ours.named_parameters():
        torch.testing.assert_close(x.grad, grads[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_published_state_dict_loads_with_its_second_name_for_the_embedding() -> None:
    state = {name: x.clone() for name, x in published(TINY).state_dict().items()}
    assert "lm_head.weight" in state
    ours = Model(mamba.config_from_weights(state, {}))
    assert ours.config == TINY
    fill(ours, dict(state), "published")
    assert torch.equal(ours.backbone.embeddings.weight, state["backbone.embeddings.weight"])
    state["lm_head.weight"] += 1
    with pytest.raises(BenchError, match="lm_head"):
        fill(ours, state, "published")


@pytest.mark.parametrize("pinned", [{"n_layer": 2}, {"dt_rank": 9}, {"state_size": 16}])
def test_options_against_the_weights_are_refused(pinned: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="was asked for"):
        mamba.config_from_weights(model().state_dict(), pinned)


@pytest.mark.parametrize("change", [{}, {"dt_rank": 0}, {"conv_kernel": 2, "expand": 3}, {"d_model": 33, "n_layer": 1}])
def test_parameter_formula_is_the_count(change: dict[str, int]) -> None:
    config = replace(TINY, **change)
    assert mamba.parameters(config) == Model(config).parameter_count()


@pytest.mark.parametrize("size", [name for name, target in SIZES.items() if target <= 100_000_000])
@pytest.mark.parametrize("pinned", [{}, {"state_size": 32}, {"n_layer": 10}])
def test_sizes_are_met(size: str, pinned: dict[str, int]) -> None:
    config = sizing.solve(mamba, size, pinned, explicit=True)
    assert abs(mamba.parameters(config) / SIZES[size] - 1) <= 0.02
    assert all(getattr(config, name) == value for name, value in pinned.items())


def test_a_pinned_width_is_met_by_depth() -> None:
    config = sizing.solve(mamba, "10m", {"d_model": 256}, explicit=False)
    assert config.d_model == 256
    assert abs(mamba.parameters(config) / SIZES["10m"] - 1) <= 0.05


@pytest.mark.parametrize("option", ["n_layer", "d_model", "conv_kernel", "vocab_size"])
def test_shapes_without_sense_are_refused(option: str) -> None:
    with pytest.raises(SpecError, match=option):
        Model(replace(TINY, **{option: 0}))


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
        last = ours.session(2).extend(tokens)
    torch.testing.assert_close(torch.cat(rows, 1), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, wanted[:, -1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv", "ssm"])
def test_a_dropped_state_shows(kind: str) -> None:
    ours, tokens = model(), some_tokens(1, 60)
    with torch.no_grad():
        wanted = ours.logits(tokens)[:, 40:]
        for second in (1, 20):  # the one-token path and the scan
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
    ours = model()
    assert ours.session(3).state_bytes == ours.state_bytes(3, 0) == 3 * 3 * 48 * (3 + 5) * 4


def test_the_future_never_changes_the_past_and_rows_do_not_touch() -> None:
    ours, tokens = model(), some_tokens(2, 50)
    other = tokens.clone()
    other[0, 30:] = (other[0, 30:] + 1) % TINY.vocab_size
    with torch.no_grad():
        a, b = ours.logits(tokens), ours.logits(other)
    assert torch.equal(a[0, :30], b[0, :30])
    assert torch.equal(a[1], b[1])
    assert not torch.allclose(a[0, 30:], b[0, 30:])


def test_carried_gradients_are_those_of_one_piece_until_detach() -> None:
    ours, tokens = model(), some_tokens(2, 37)
    session = ours.session(2)
    carried = torch.cat([session.extend(part, keep="all") for part in tokens.split((20, 1, 16), 1)], 1)
    wanted = torch.autograd.grad(ours.logits(tokens).square().sum(), [*ours.parameters()])
    for got, exact in zip(torch.autograd.grad(carried.square().sum(), [*ours.parameters()]), wanted, strict=True):
        torch.testing.assert_close(got / exact.abs().max(), exact / exact.abs().max(), rtol=1e-4, atol=1e-4)
    assert any(x.requires_grad for x in session.state())
    session.detach()
    assert not any(x.requires_grad for x in session.state())


def test_autocast_keeps_state_and_residuals_in_float32() -> None:
    ours, tokens = model(), some_tokens(2, 48)
    exact = ours.logits(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        close = ours.logits(tokens)
        session = ours.session(2)
        session.extend(tokens)
    F.cross_entropy(close.float().flatten(0, 1), tokens.flatten()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in ours.parameters())
    assert all(x.dtype == torch.float32 for x in session.state())
    assert (close.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-2)])
def test_other_precisions_stream_too(dtype: torch.dtype, near: float) -> None:
    ours, tokens = model().to(dtype), some_tokens(1, 24)
    with torch.no_grad():
        wanted, session = ours.logits(tokens), ours.session(1)
        rows = torch.cat([session.extend(part, keep="all") for part in tokens.split((9, 1, 14), 1)], 1)
    assert session.state_bytes == ours.state_bytes(1, 24)
    assert rows.dtype == wanted.dtype == dtype
    assert (rows - wanted).abs().max() <= near * wanted.abs().max()


def test_it_loads_by_name_saves_a_session_and_learns(tmp_path: Path) -> None:
    ours = load_model("mamba:d_model=16:n_layer=2", seed=3)
    tokens = some_tokens(2, 33, 256)
    with torch.no_grad():
        session = ours.session(2)
        session.extend(tokens)
        session.save(tmp_path / "stream")
        again = ours.restore(tmp_path / "stream")
        assert torch.equal(session.extend(tokens[:, :1]), again.extend(tokens[:, :1]))
    assert ours.kernels() == "torch selective scan"
    assert ours.flops_per_token(10) == ours.flops_per_token(10_000) > 2 * ours.parameter_count() * 0.9
    optimiser, losses = torch.optim.AdamW(ours.parameters(), lr=3e-3), []
    for _ in range(3):
        loss = F.cross_entropy(ours.logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


def test_the_rates_of_the_state_are_not_pulled_by_weight_decay() -> None:
    from bdh_bench.training.loop import _groups

    ours = model()
    _, plain = _groups(ours, 0.1)
    assert plain["weight_decay"] == 0
    left = {id(x) for x in plain["params"]}
    assert all(id(x) in left for name, x in ours.named_parameters() if name.endswith((".A_log", ".D", ".bias")))
    assert not any(id(x) in left for name, x in ours.named_parameters() if "proj.weight" in name)
