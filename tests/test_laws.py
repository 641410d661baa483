"""Does every registered model obey the laws of a session, and do the toys have the answers they are known for?

Models are found by the registry, so that a new file is under law without a line here. Laws: ``bdh_bench.laws``.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bdh_bench import laws, list_models, load_model, registry, sizing
from bdh_bench.errors import PositionLimitError, SessionError, SpecError, UnknownNameError
from bdh_bench.models import toy
from bdh_bench.spec import SIZES

_NEEDS_A_NAME = {"hf"}
_TOYS = ("toy:uniform", "toy:copy", "toy:const_state:bytes=4096", "toy:linear_kv:bytes_per_token=24")
_SMALL = "llama:d_model=48:n_layer=2:n_head=6"
_VARIANTS = (
    f"{_SMALL}:kv_heads=2",
    f"{_SMALL}:window=24",
    f"{_SMALL}:kv_heads=2:window=20:sinks=3",
    f"{_SMALL}:kv_bits=8",
    f"{_SMALL}:kv_bits=4",
    f"{_SMALL}:kv_heads=3:window=24:sinks=2:kv_bits=4:rope_scaling=ntk:rope_factor=4",
    f"{_SMALL}:rope_scaling=yarn:rope_factor=4:rope_context=64",
    f"{_SMALL}:attention=linear",
    f"{_SMALL}:kv_heads=2:attention=linear",
)
_FAMILIES = [
    e.name for e in list_models() if not e.problem and not e.defaults.get("words") and e.name not in _NEEDS_A_NAME
]
_SIZED = ("quick", "1m", "3m", "10m", "25m", "50m", "100m")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # small products; on a busy machine more threads only wait for each other
    yield
    torch.set_num_threads(before)


@cache
def _model(name: str) -> Any:
    # Rounding to codes is a step, and float32 sums in another order fall on its other side about once in a million features.
    return load_model(name, dtype="float64" if "kv_bits" in name else "float32")


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.name.replace(" ", "_"))
@pytest.mark.parametrize("name", [*_FAMILIES, *_VARIANTS, *_TOYS])
def test_law(name: str, law: laws.Law) -> None:
    finding = laws.find(law, _model(name))
    assert finding.kept, f"{name} · {law.name} · error {finding.error} · at most {law.tolerance} · {finding.detail}"


def test_laws_that_must_not_be_skipped() -> None:
    found = {f.law: f.error for f in laws.check(_model("gpt2"))}
    skipped = {name for name, error in found.items() if error is None}
    assert skipped == {"a constant state stays in its storage"}
    # cuts must find something: reading in another order is not bit for bit the same arithmetic
    assert 0 < found["stepwise = whole text"] <= 1e-5  # type: ignore[operator]


@pytest.mark.parametrize("name", ["gpt2", "llama", *_VARIANTS])
def test_a_forgotten_past_would_be_seen(name: str) -> None:
    """The tolerance means something only while the past moves the logits by much more."""
    model, tokens = _model(name), torch.randint(0, 256, (2, 48))
    with torch.inference_mode():
        moved = (model.logits(tokens)[:, 24:] - model.logits(tokens[:, 23:])[:, 1:]).abs().max()
    assert moved > 100 * laws.ROUNDING


@pytest.mark.parametrize(
    "name", sorted({"bdh", "mamba", "mamba2", "lstm", "linear_attention", "gated_delta"} & set(_FAMILIES))
)
def test_recurrent_state_is_constant(name: str) -> None:
    model = _model(name)
    assert model.state_bytes(1, 1) == model.state_bytes(1, 1_000_000) > 0
    assert model.state_bytes(3, 7) == 3 * model.state_bytes(1, 7)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_kv_state_is_linear(name: str) -> None:
    model = _model(name)
    assert model.state_bytes(1, 0) == model.session().state_bytes == model.session().capacity_bytes == 0
    assert model.state_bytes(2, 300) == 600 * model.state_bytes(1, 1) > 0


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", _FAMILIES)
def test_every_size_is_within_two_percent(family: str) -> None:
    module = registry.load("models", family)
    if not hasattr(module, "scaled"):
        pytest.skip(f"{family} has no sizes")
    for size in _SIZED:
        config = sizing.solve(module, size, {}, explicit=True)  # raises where the size is missed
        assert abs(sizing.count(module, config) / SIZES[size] - 1) <= 0.02


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_transformers_have_natural_shapes(family: str) -> None:
    module = registry.load("models", family)
    for size, depths in (("quick", {3, 4, 5}), ("1m", {4, 5, 6}), ("10m", {6, 7, 8}), ("100m", {10, 11, 12, 13, 14})):
        config = sizing.solve(module, size, {}, explicit=True)
        width = config.n_embd if family == "gpt2" else config.d_model
        head = width // config.n_head
        assert config.n_layer in depths
        assert 16 <= head <= 64
        assert head % 2 == 0


@pytest.mark.parametrize(
    "name",
    [
        "gpt2@1m:n_layer=3",
        "gpt2@1m:n_head=4",
        "gpt2@1m:vocab_size=300",
        "gpt2@1m:max_positions=1024",
        "llama@1m:kv_heads=2",
        "llama@1m:n_head=4",
        "llama@1m:d_model=64",
        "llama@1m:rope_theta=500000.0",
        "llama@1m:window=64",
        "llama@1m:kv_bits=4",
        "llama@1m:attention=linear",
        "llama@1m:kv_heads=2:rope_scaling=ntk:rope_factor=2.0",
        "gpt2:n_embd=32:n_layer=2:n_head=2",
        "llama:d_model=32:n_layer=2:n_head=2",
    ],
)
def test_pinned_options_are_kept(name: str) -> None:
    model = load_model(name)
    for part in name.split(":")[1:]:
        key, value = part.split("=")
        assert str(getattr(model.config, key)) == value
    if "@1m" in name:
        assert abs(model.parameter_count() / 1e6 - 1) <= 0.02


@pytest.mark.parametrize(
    "name",
    [
        "gpt2:n_embd=30:n_head=4:n_layer=2",
        "llama:d_model=30:n_head=2:n_layer=2",
        "llama:n_head=4:kv_heads=3",
        "toy:copy:period=0",
    ],
)
def test_impossible_shapes_are_refused(name: str) -> None:
    with pytest.raises(SpecError):
        load_model(name)


def test_position_table_follows_the_training_context() -> None:
    assert load_model("gpt2").max_positions == 384
    model = load_model("gpt2:n_embd=16:n_layer=1:n_head=1", train_context=8)
    assert model.max_positions == 136
    with pytest.raises(PositionLimitError, match="got 137 positions · this model has 136"):
        model.logits(torch.zeros((1, 137), dtype=torch.long))


def test_llama_reads_past_any_table_and_keeps_its_angles_in_other_dtypes() -> None:
    model = _model(_VARIANTS[0])
    half = load_model(_VARIANTS[0], dtype="bfloat16")
    exact, kept = (m.model.model.rotary_emb.inv_freq for m in (model, half))
    assert kept.dtype == torch.float32
    assert torch.equal(exact, kept)
    assert half.state_bytes(1, 10) == model.state_bytes(1, 10) // 2
    session = model.session()
    session.length = 2**20  # far beyond any published table
    assert session.extend(torch.zeros((1, 3), dtype=torch.long)).isfinite().all()


def test_weights_are_drawn_with_the_usual_width() -> None:
    for name, weight in (
        ("gpt2", "model.transformer.h.0.mlp.c_fc.weight"),
        ("llama", "model.model.embed_tokens.weight"),
    ):
        assert _model(name).get_parameter(weight).std().item() == pytest.approx(0.02, rel=0.05)


# -- toys --------------------------------------------------------------------------------------------------------------


def _bits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return nats.double() / math.log(2)


def test_uniform_is_eight_bits_per_byte() -> None:
    tokens = torch.randint(0, 256, (1, 50))
    bits = _bits(load_model("toy:uniform").session().extend(tokens, keep="all"), tokens)
    assert bits.numpy() == pytest.approx(8.0, abs=1e-6)


@pytest.mark.parametrize("context", [64, 65, 127, 128, 500])
def test_copy_is_certain_from_its_period_on(context: int) -> None:
    model = load_model("toy:copy")
    text = torch.randint(0, 256, (1, 64)).repeat(1, 12)  # blocks of 64 bytes, over and over
    start = torch.full((1, 1), model.start_symbol)
    read = torch.cat((start, text[:, :context]), 1)
    targets = text[:, context : context + 128]
    session = model.session()
    first = session.extend(read)
    rest = session.extend(targets[:, :-1], keep="all")
    assert _bits(torch.cat((first, rest), 1), targets).abs().max() <= 1e-9
    whole = model.logits(torch.cat((read, targets[:, :-1]), 1))[:, context:]
    assert _bits(whole, targets).abs().max() <= 1e-9


def test_copy_is_uniform_before_its_period_and_counts_input_tokens() -> None:
    tokens = torch.tensor([[10, 5, 6, 7, 8, 9]])
    probabilities = load_model("toy:copy:period=4").logits(tokens).softmax(-1)
    assert torch.equal(probabilities[0, :3], torch.full((3, 256), 1 / 256))
    assert probabilities[0, 3:].argmax(-1).tolist() == [10, 5, 6]  # the byte 4 positions before the predicted one


def test_toys_remember_what_they_say() -> None:
    tokens = torch.zeros((2, 5), dtype=torch.long)
    for name, expected in (
        ("toy:const_state:bytes=1000", 2000),
        ("toy:linear_kv:bytes_per_token=10", 100),
        ("toy:copy", 80),
    ):
        session = load_model(name).session(2)
        session.extend(tokens)
        assert session.state_bytes == expected


def test_another_toys_session_is_refused(tmp_path: Any) -> None:
    session = load_model("toy:linear_kv:bytes_per_token=8").session()
    session.extend(torch.zeros((1, 2), dtype=torch.long))
    session.save(tmp_path / "s")
    with pytest.raises(SessionError, match="another model"):
        load_model("toy:linear_kv:bytes_per_token=16").restore(tmp_path / "s")


def test_toys_misbehave_as_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.zeros((1, 2), dtype=torch.long)
    assert load_model("toy:nan").session().extend(tokens).isnan().all()
    for call in (load_model("toy:oom").logits, load_model("toy:oom").session().extend):
        with pytest.raises((RuntimeError, MemoryError)):
            call(tokens)
    sleeper, before = load_model("toy:sleep:seconds=0.02").session(), time.perf_counter()
    sleeper.extend(tokens)
    assert time.perf_counter() - before >= 0.02
    load_model("toy:alloc:bytes=1000").session().extend(tokens)

    def wake(seconds: float) -> None:
        raise TimeoutError(seconds)

    monkeypatch.setattr(toy.time, "sleep", wake)
    for call in (load_model("toy:hang").logits, load_model("toy:hang").session().extend):
        with pytest.raises(TimeoutError):
            call(tokens)


def test_segfault_kills_its_process() -> None:
    code = (
        "import torch; from bdh_bench import load_model; load_model('toy:segfault').logits(torch.zeros((1, 1)).long())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -11


def test_toys_have_a_word_and_no_size() -> None:
    assert not load_model("toy:uniform").trainable
    assert load_model("toy:uniform").parameter_count() == 0
    with pytest.raises(UnknownNameError, match="did you mean 'uniform'"):
        load_model("toy:unifrom")
    with pytest.raises(SpecError, match="no sizes"):
        load_model("toy:uniform@1m")
