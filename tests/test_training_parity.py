"""Would the comparison of two trainings see a kernel whose gradient is wrong, and are both sides the published arithmetic?

The published forward pass is written here once more, with complex numbers for the rotation and a loop over heads, so that it has
nothing in common with the package but the weights and the table of frequencies.

Legend: B batch, T tokens, D width, H heads, N neurons per head.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bdh_bench import load_model
from bdh_bench.data.corpus import Document
from bdh_bench.kernels import bdh_pass
from bdh_bench.training import loop

_FOLDER = Path(__file__).parents[1] / "benchmarks"
_SPEC = "bdh:n_layer=3:n_embd=16:n_head=2:mlp_internal_dim_multiplier=4:chunk=8"  # a piece of 30 bytes is 4 chunks
_STEPS, _BATCH, _CONTEXT = 5, 2, 30


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.insert(0, str(_FOLDER))  # it imports its neighbour, as when it is run
    spec = importlib.util.spec_from_file_location("training_parity_benchmark", _FOLDER / "training_parity.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    sys.path.remove(str(_FOLDER))
    return module


def _compared(benchmark: ModuleType, precision: str = "float32") -> list:
    """Five steps, the gradients looked at before each."""
    recipe = benchmark.published_recipe(_STEPS, _BATCH, _CONTEXT, precision=precision)
    document = Document("this file", Path(__file__))
    return list(benchmark.compare(_SPEC, recipe, (document,), look_every=1))


# -- the published arithmetic ---------------------------------------------------------------------------------------------


def _centred(x: Tensor) -> Tensor:
    spread = x - x.mean(-1, keepdim=True)
    return spread / (spread.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def _published(weights: dict[str, Tensor], passes: int, tokens: Tensor) -> Tensor:
    """(B, T) → (B, T, V), one head after the other."""
    heads, _, neurons = weights["encoder"].shape
    decoders = weights["decoder"].split(neurons)  # the published layout: all neurons of the first head, then the next
    per_pair = weights["attn.freqs"].flatten()[::2].double()
    place = torch.arange(tokens.shape[1], dtype=torch.float64)
    phase = torch.polar(torch.ones(1, dtype=torch.float64), 2 * math.pi * place[:, None] * per_pair)  # (T, N/2)
    earlier = place[:, None] > place  # strictly
    x = _centred(F.one_hot(tokens, weights["embed.weight"].shape[0]).double() @ weights["embed.weight"])
    for _ in range(passes):
        z = torch.zeros_like(x)
        for head in range(heads):
            keys = (x @ weights["encoder"][head]).clamp(min=0)  # (B, T, N)
            turned = torch.view_as_complex(keys.unflatten(-1, (-1, 2)).contiguous()) * phase
            scores = torch.einsum("btn,bsn->bts", turned, turned.conj()).real * earlier
            gates = (_centred(scores @ x) @ weights["encoder_v"][head]).clamp(min=0)
            z = z + (keys * gates) @ decoders[head]
        x = _centred(x + _centred(z))
    return x @ weights["lm_head"]


@pytest.mark.parametrize("mode", ["parallel", "chunked"])
@pytest.mark.parametrize("scale", [1, 6], ids=["fresh", "spread"])
def test_one_step_has_the_gradients_of_the_published_arithmetic(mode: str, scale: float) -> None:
    model = load_model(f"{_SPEC}:mode={mode}", dtype="float64").train()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(scale)
    tokens = torch.randint(256, (3, 42), generator=torch.Generator().manual_seed(0))
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == 5
    twin = {name: tensor.detach().clone().requires_grad_(name in names) for name, tensor in model.state_dict().items()}
    pair = torch.arange(16).double() * 2  # 32 neurons per head
    assert torch.allclose(twin["attn.freqs"].flatten()[::2].double(), 65536 ** (-pair / 32) / (2 * math.pi), rtol=1e-6)

    found = []
    for logits, leaves in (
        (_published(twin, 3, tokens[:, :-1]), [twin[name] for name in names]),
        (model.logits(tokens[:, :-1]), [*model.parameters()]),
    ):
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        found.append((loss, torch.autograd.grad(loss, leaves)))
    (truth, wanted), (loss, got) = found
    assert float((loss / truth - 1).detach().abs()) <= 1e-9
    for name, g, w in zip(names, got, wanted, strict=True):
        error = float((g - w).norm() / w.norm())
        assert error <= 1e-6, f"{name}: {error}"


# -- the comparison -------------------------------------------------------------------------------------------------------


def test_both_forms_train_alike(benchmark: ModuleType) -> None:
    steps = _compared(benchmark)
    assert [s.step for s in steps] == [*range(_STEPS)]
    assert steps[-1].loss_parallel < steps[0].loss_parallel
    assert max(s.relative_difference for s in steps) <= 1e-4
    assert max(s.gradient_difference for s in steps) <= 1e-9
    assert all(1e-9 < r < 1e-2 for s in steps for r in (s.rounding_parallel, s.rounding_chunked))


def test_in_float64_everything_is_float64(benchmark: ModuleType) -> None:
    """Weights, loss and update: one narrowed product would leave 1e-8 between the curves."""
    steps = _compared(benchmark, "float64")
    assert max(s.relative_difference for s in steps) <= 1e-12
    assert float(torch.tensor(steps[0].loss_parallel).float()) != steps[0].loss_parallel


def test_float64_sees_in_the_losses_what_float32_forgives(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bdh_pass, "_backward", _planted("values"))
    for precision, seen in (("float32", False), ("float64", True)):
        steps = _compared(benchmark, precision)
        assert any("losses" in found for found in benchmark.objections(steps, precision)) is seen


@pytest.mark.parametrize("wrong", ["encoder", "encoder_v", "decoder", "values", "state"])
def test_a_gradient_one_percent_too_large_is_seen(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setattr(bdh_pass, "_backward", _planted(wrong))
    steps = _compared(benchmark)
    assert min(s.gradient_difference for s in steps) > 1e-3 > benchmark.GRADIENT_LIMIT
    assert any("gradients" in found for found in benchmark.objections(steps, "float32"))


def _planted(wrong: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The backward pass of a chunk with one of its results 1.01 times what it should be."""
    right = bdh_pass._backward

    def backward(*given, d_state, wanted, d_weights):  # type: ignore[no-untyped-def]
        fresh = [torch.zeros_like(d) for d in d_weights]
        d_x, d_state = right(*given, d_state, wanted, fresh)
        for name, total, part in zip(("encoder", "encoder_v", "decoder"), d_weights, fresh, strict=True):
            total += part * (1.01 if wrong == name else 1)
        return d_x * (1.01 if wrong == "values" else 1), (
            d_state * 1.01 if wrong == "state" and d_state is not None else d_state
        )

    return lambda *a: backward(*a[:6], d_state=a[6], wanted=a[7], d_weights=a[8])


def test_the_loss_alone_would_forgive_a_factor(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the gradients are compared as well: AdamW takes the same step for 1.01 times the gradient."""
    monkeypatch.setattr(bdh_pass, "_backward", _planted("encoder"))
    assert max(s.relative_difference for s in _compared(benchmark)) < benchmark.LOSS_LIMITS["float32"] / 100


def test_both_sides_read_the_same_pieces_under_the_published_recipe(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, list[Tensor]] = {"parallel": [], "chunked": []}
    loss = loop.piece_loss

    def noted(model, pieces):  # type: ignore[no-untyped-def]
        read[model.config.mode].append(pieces)
        return loss(model, pieces)

    monkeypatch.setattr(loop, "piece_loss", noted)
    _compared(benchmark)
    ours, theirs = (torch.stack(pieces) for pieces in read.values())
    assert ours.shape == (_STEPS, _BATCH, _CONTEXT)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours[0], ours[1])


def test_the_loop_takes_the_steps_of_plain_adamw(benchmark: ModuleType) -> None:
    """Constant rate, decay on every weight, usual moments, no clipping even of a gradient of any size."""
    recipe = benchmark.published_recipe(4, _BATCH, _CONTEXT)
    model, twin = (load_model(f"{_SPEC}:mode=chunked", dtype="float64").train() for _ in range(2))
    with torch.no_grad():
        for weight in (*model.parameters(), *twin.parameters()):
            weight.mul_(10)
    run = benchmark.side(model, recipe, (Document("this file", Path(__file__)),))
    pieces = benchmark.TrainingText((Document("this file", Path(__file__)),), _CONTEXT).pieces(recipe.seed)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(run.steps):
        batch = torch.stack([torch.from_numpy(next(pieces).copy()).long() for _ in range(_BATCH)])
        plain.zero_grad()
        loop.piece_loss(twin, batch).backward()
        plain.step()
        run.one()
        run.step += 1
    assert run.steps == 4
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-7)  # a step is about 1e-3


def test_the_control_is_the_same_training_one_bit_off(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, document = benchmark.published_recipe(_STEPS, _BATCH, _CONTEXT), Document("this file", Path(__file__))
    steps = _compared(benchmark)
    off = list(benchmark.control(_SPEC, recipe, (document,), steps))
    assert [s.loss_last_bit for s in off] == pytest.approx([s.loss_chunked for s in steps], rel=1e-4)
    assert "one bit" in benchmark.summary(off)
    model, moved = (load_model(_SPEC) for _ in range(2))
    benchmark.one_bit_off(moved)
    for a, b in zip(model.parameters(), moved.parameters(), strict=True):
        assert bool(((a - b).abs() > 0).all())
        assert bool(((a - b).abs() <= 1.2e-7 * a.abs()).all())
    monkeypatch.setattr(benchmark, "one_bit_off", lambda model: None)
    same = list(benchmark.control(_SPEC, recipe, (document,), steps))
    assert [s.loss_last_bit for s in same] == [s.loss_chunked for s in steps]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"loss_chunked": 4.05, "relative_difference": 0.0125}, "losses"),
        ({"relative_difference": math.nan}, "losses"),
        ({"relative_difference": 0.009}, None),
        ({"gradient_difference": 0.01}, "gradients"),
        ({"gradient_difference": math.nan}, "gradients"),
        ({"loss_parallel": 5.5}, "learned nothing"),
        ({"gradient_difference": None}, "no gradients"),
    ],
)
def test_curves_are_objected_to_for_each_reason(benchmark: ModuleType, change: dict, reason: str | None) -> None:
    good = {"loss_parallel": 4.0, "loss_chunked": 4.0, "relative_difference": 0.0, "gradient_difference": 1e-8}
    steps = [benchmark.Step(0, 5.5, 5.5, 0.0, None), benchmark.Step(1, **{**good, **change})]
    found = benchmark.objections(steps, "float32")
    assert [reason in one for one in found] == [True] if reason else found == []


def test_float64_is_held_to_its_own_bound(benchmark: ModuleType) -> None:
    steps = [benchmark.Step(0, 5.5, 5.5, 0.0, 1e-15), benchmark.Step(1, 4.0, 4.00001, 2.5e-6, None)]
    assert benchmark.objections(steps, "float32") == []
    assert [("losses" in one) for one in benchmark.objections(steps, "float64")] == [True]


def test_the_table_holds_what_was_measured(benchmark: ModuleType, tmp_path: Path) -> None:
    steps = [benchmark.Step(0, 5.54330351, 5.54330351, 0.0, 4e-6), benchmark.Step(1, 4.5, 4.4999, 2.2222e-5, None)]
    benchmark.write(tmp_path / "t.csv", ["machine", benchmark.summary(steps)], steps)
    first, second, *table = (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()
    assert first == "# machine"
    assert "2.22e-05 at step 1" in second
    rows = list(csv.DictReader(table))
    assert [float(r["loss_parallel"]) for r in rows] == [5.5433035, 4.5]
    assert [r["gradient_difference"] for r in rows] == ["4e-06", ""]
