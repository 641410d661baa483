"""Does training use each byte once, in the same order for all, and survive being stopped?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bdh_bench import load_model
from bdh_bench.data.corpus import open_corpus
from bdh_bench.errors import BenchError, CheckpointError
from bdh_bench.training import loop
from bdh_bench.training.checkpoints import Checkpoint
from bdh_bench.training.loop import train
from bdh_bench.training.recipe import Recipe

_MODEL = "bdh:n_layer=2:n_embd=16:n_head=2:mlp_internal_dim_multiplier=4:dropout=0.1"


def _quiet(phase: str, share: float, facts: dict[str, Any]) -> None: ...


def _train(folder: Path, key: str, recipe: Recipe, progress: Any = _quiet) -> tuple[Any, dict[str, Any]]:
    corpus = open_corpus(f"path:{folder}")
    model = load_model(_MODEL, seed=recipe.seed)
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
