"""Does training use each byte once, in the same order for all, and survive being stopped?"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bdh_bench import load_model
from bdh_bench.data.corpus import Document, open_corpus
from bdh_bench.data.pieces import CarriedText
from bdh_bench.errors import BenchError, CheckpointError, PositionLimitError, UnknownNameError
from bdh_bench.runner.training import halfway_of
from bdh_bench.training import loop
from bdh_bench.training.checkpoints import Checkpoint
from bdh_bench.training.loop import train
from bdh_bench.training.recipe import REGIMES, Recipe, checkpoint_key

_MODEL = "bdh:n_layer=2:n_embd=16:n_head=2:mlp_internal_dim_multiplier=4:dropout=0.1"


def _quiet(phase: str, share: float, facts: dict[str, Any]) -> None: ...


def _train(
    folder: Path, key: str, recipe: Recipe, progress: Any = _quiet, name: str = _MODEL
) -> tuple[Any, dict[str, Any]]:
    corpus = open_corpus(f"path:{folder}")
    model = load_model(name, seed=recipe.seed, train_context=recipe.context)
    report = train(model, recipe, corpus.part("train"), corpus.part("validation"), Checkpoint(key), progress)
    return model, report


def test_training_lowers_the_loss_and_uses_the_budget(books: Path) -> None:
    recipe = Recipe(65_536, 64, 1e-2, 0, batch_bytes=1024)
    _, report = _train(books, "k" * 64, recipe)
    assert report["bytes"] == 65_536
    assert report["validation_bits_per_byte"] < report["curve"][0][1] - 2
    assert [p[0] for p in report["curve"]] == sorted(p[0] for p in report["curve"])


def test_a_finished_checkpoint_is_reused_bit_for_bit(books: Path) -> None:
    recipe = Recipe(8192, 64, 1e-2, 0, batch_bytes=1024)
    first, report = _train(books, "k" * 64, recipe)
    second, again = _train(books, "k" * 64, recipe)
    assert not report["reused"]
    assert again["reused"]
    assert again["sha256"] == report["sha256"]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_stopped_and_resumed_equals_uninterrupted(books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(16_384, 64, 1e-2, 3, batch_bytes=1024)
    whole, report = _train(books, "a" * 64, recipe)

    def stop(phase: str, share: float, facts: dict[str, Any]) -> None:
        if share >= 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train(books, "b" * 64, recipe, stop)
    assert Checkpoint("b" * 64).finished() is None
    monkeypatch.setattr(loop, "_SAVE_EVERY_S", 0.0)
    resumed, again = _train(books, "b" * 64, recipe)
    assert [p[:2] for p in again["curve"]] == [p[:2] for p in report["curve"]]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not (Checkpoint("b" * 64).folder / "partial.safetensors").exists()


def test_the_weights_of_half_the_budget_are_those_of_that_step(books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the schedule of the whole training, and the same whether or not it was stopped in between."""
    recipe = Recipe(16_384, 64, 1e-2, 3, batch_bytes=1024)  # 16 steps
    whole, report = _train(books, "a" * 64, recipe)
    kept = report["halfway"]
    assert (kept["steps"], kept["bytes"]) == (8, 8192)
    assert kept["learning_rate"] == recipe.rate(7, 16) != recipe.rate(7, 8)

    def stop(phase: str, share: float, facts: dict[str, Any]) -> None:
        if share >= 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train(books, "b" * 64, recipe, stop)
    partial = Checkpoint("b" * 64).load_partial()
    assert partial is not None
    assert partial[1]["step"] == 8
    half = Checkpoint("a" * 64).load_halfway(kept["sha256"])
    assert all(torch.equal(half[name], partial[0][f"model.{name}"]) for name in half)
    assert not all(torch.equal(half[name], last) for name, last in whole.state_dict().items())
    assert _train(books, "b" * 64, recipe)[1]["halfway"] == kept

    earlier = halfway_of(whole, {**report, "checkpoint": "a" * 32})
    assert all(torch.equal(half[name], own) for name, own in earlier.state_dict().items())
    Checkpoint("a" * 64).keep_halfway(whole.state_dict())  # other weights under its name
    with pytest.raises(CheckpointError, match="half the training"):
        halfway_of(whole, {**report, "checkpoint": "a" * 32})


_CARRIED = Recipe(8192, 64, 1e-2, 3, batch_bytes=256, regime="carried")  # 4 rows, 16 or 17 pieces per document
_SMALL = {
    "bdh": _MODEL,
    "llama": "llama:d_model=16:n_layer=2:n_head=2",
    "mamba": "mamba:d_model=16:n_layer=2",
    "gpt2": "gpt2:n_embd=16:n_layer=2:n_head=2:max_positions=192",
}


@pytest.mark.parametrize("family", _SMALL)
@pytest.mark.parametrize("stop_at", [0.4, 0.5, 0.7])
def test_carried_training_stopped_and_resumed_equals_uninterrupted(books: Path, family: str, stop_at: float) -> None:
    whole, report = _train(books, "a" * 64, _CARRIED, name=_SMALL[family])

    def stop(phase: str, share: float, facts: dict[str, Any]) -> None:
        if share >= stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train(books, "b" * 64, _CARRIED, stop, name=_SMALL[family])
    kept = Checkpoint("b" * 64).load_partial()
    assert kept is not None
    assert any(name.startswith("state.") for name in kept[0])
    resumed, again = _train(books, "b" * 64, _CARRIED, name=_SMALL[family])
    assert [p[:2] for p in again["curve"]] == [p[:2] for p in report["curve"]]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_step_that_was_stopped_halfway_is_not_saved(books: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = _train(books, "a" * 64, _CARRIED)
    extend, calls = loop.Carried.loss, iter(range(1000))

    def stop(reader: loop.Carried) -> torch.Tensor:
        loss = extend(reader)
        if next(calls) == 20:  # the state has gone on, the weights have not
            raise KeyboardInterrupt
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_SAVE_EVERY_S", 0.0)
        patch.setattr(loop.Carried, "loss", stop)
        with pytest.raises(KeyboardInterrupt):
            _train(books, "b" * 64, _CARRIED)
    resumed, _ = _train(books, "b" * 64, _CARRIED)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def _reader(folder: Path, family: str, recipe: Recipe = _CARRIED) -> tuple[Any, loop.Carried, tuple[Document, ...]]:
    model = load_model(_SMALL[family], seed=1, train_context=recipe.context)
    documents = open_corpus(f"path:{folder}").part("train")
    reader = loop.Carried(model, recipe, documents)
    reader.begin(0)
    return model, reader, documents


@pytest.mark.parametrize("family", ["bdh", "llama", "mamba"])
def test_the_state_is_carried_through_a_document_and_not_into_the_next(books: Path, family: str) -> None:
    """With frozen weights the losses of the pieces are those of their stretches read at once, document by document."""
    model, reader, documents = _reader(books, family)
    pieces = list(islice(CarriedText(documents, 4, 64, reader.carry_limit).pieces(_CARRIED.seed), 40))
    edges = [i for i, piece in enumerate(pieces) if piece.before is None]
    assert len(edges) > 2 < edges[1]
    losses = []
    for _ in range(edges[2]):
        losses.append(float(reader.loss().detach()))
        reader.cut()
    for first, last in pairwise(edges[:3]):
        joined = torch.from_numpy(np.concatenate([p.targets for p in pieces[first:last]], 1)).long()
        whole = float(loop.piece_loss(model, joined).detach())
        assert sum(losses[first:last]) / (last - first) == pytest.approx(whole, abs=1e-5)
        if last > first + 1:
            cold = float(loop.piece_loss(model, joined[:, 64:128]).detach())
            assert abs(losses[first + 1] - cold) > 1e-4


@pytest.mark.parametrize("family", _SMALL)
def test_the_gradient_ends_at_the_edge_of_a_piece(books: Path, family: str) -> None:
    """A piece's gradient is the same when the state before it is a constant; the state itself has no graph."""
    model, reader, _ = _reader(books, family)
    reader.loss().backward()
    reader.cut()
    assert reader.state()
    assert not any(tensor.requires_grad for tensor in reader.state().values())
    constant = {name: tensor.clone() for name, tensor in reader.state().items()}
    model.zero_grad()
    reader.loss().backward()
    carried = [p.grad.clone() for p in model.parameters()]
    reader.begin(1, constant, 64)
    model.zero_grad()
    reader.loss().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(carried, model.parameters(), strict=True))


def test_a_carry_ends_at_the_last_position_and_where_a_growing_state_gets_long(books: Path) -> None:
    for family, limit in (("bdh", None), ("mamba", None), ("llama", 16 * 64), ("gpt2", 192)):
        _, reader, _ = _reader(books, family)
        assert (reader.carry_limit, reader.rows * reader.length) == (limit, 192 if family == "gpt2" else 256)
    seen = []
    for _ in range(9):
        reader.loss()
        seen.append(reader.position)
    assert seen == [64, 128, 192] * 3


def test_pieces_are_equal_parts_of_a_position_table_that_is_no_multiple_of_the_context(books: Path) -> None:
    model = load_model("gpt2:n_embd=16:n_layer=1:n_head=2", train_context=64)  # 192 positions: 64 + 128
    documents = open_corpus(f"path:{books}").part("train")
    for positions, piece, limit in ((96, 48, 96), (100, 50, 100), (64, 64, 64), (190, 63, 189)):
        model.max_positions = positions
        reader = loop.Carried(model, _CARRIED, documents)
        assert (reader.length, reader.carry_limit) == (piece, limit)
    model.max_positions = 32  # shorter than the context: refused, never cut
    reader = loop.Carried(model, _CARRIED, documents)
    reader.begin(0)
    with pytest.raises(PositionLimitError):
        reader.loss()


def test_the_report_says_how_pieces_followed_each_other(books: Path) -> None:
    _, carried = _train(books, "a" * 64, _CARRIED, name=_SMALL["llama"])
    rule = {"regime": "carried", "reset": "document", "carry_limit": 1024, "piece_bytes": 64, "batch": 4, "bytes": 8192}
    assert rule.items() <= carried.items()
    _, crop = _train(books, "b" * 64, replace(_CARRIED, regime="crop"), name=_SMALL["llama"])
    assert {**rule, "regime": "crop", "reset": "piece", "carry_limit": None}.items() <= crop.items()
    assert carried["curve"] != crop["curve"]


def test_the_regime_is_known_and_part_of_the_key() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'carried'"):
        replace(_CARRIED, regime="carry")
    keys = {checkpoint_key(replace(_CARRIED, regime=regime), "m", "c", "d", "e") for regime in REGIMES}
    assert len(keys) == len(REGIMES)


def test_a_damaged_checkpoint_is_refused_not_used(books: Path) -> None:
    recipe = Recipe(2048, 64, 1e-2, 0, batch_bytes=1024)
    _train(books, "k" * 64, recipe)
    weights = Checkpoint("k" * 64).weights
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="delete that folder"):
        _train(books, "k" * 64, recipe)


def test_a_loss_that_is_not_finite_stops_training_without_a_checkpoint(books: Path) -> None:
    with pytest.raises(BenchError, match="smaller --learning-rate"):
        _train(books, "k" * 64, Recipe(65_536, 64, 1e30, 0, batch_bytes=1024))
    assert Checkpoint("k" * 64).finished() is None


def test_longer_position_tables_get_longer_pieces_and_the_same_bytes() -> None:
    recipe = Recipe(1_048_576, 256, 1e-3, 0)
    for piece in (256, 384):
        used = recipe.steps(piece) * recipe.batch(piece) * piece
        assert used == pytest.approx(1_048_576, rel=0.005)


def test_the_rate_rises_then_falls_to_a_tenth() -> None:
    recipe = Recipe(1, 1, 2.0, 0)
    rates = [recipe.rate(step, 100) for step in range(100)]
    assert rates[4] == 2.0 == max(rates)
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.2, rel=0.01)


def test_every_byte_of_a_piece_is_a_target_and_the_start_symbol_comes_first() -> None:
    class Echo(torch.nn.Module):
        start_symbol = 10
        seen: torch.Tensor

        def logits(self, tokens: torch.Tensor) -> torch.Tensor:
            self.seen = tokens
            return torch.zeros(*tokens.shape, 256)

    model = Echo()
    pieces = torch.tensor([[1, 2, 3], [4, 5, 6]])
    loss = loop.piece_loss(model, pieces)
    assert model.seen.tolist() == [[10, 1, 2], [10, 4, 5]]
    assert float(loss) == pytest.approx(torch.tensor(256.0).log().item())
