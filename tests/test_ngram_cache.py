"""Is the yardstick the model that its docstring describes, on the training bytes of the others, and is it free of look-ahead?"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bdh_bench import laws, load_model
from bdh_bench.data.corpus import open_corpus
from bdh_bench.errors import SpecError
from bdh_bench.runner.plan import make_plan
from bdh_bench.runner.run import execute, prepare
from bdh_bench.runner.training import fit
from bdh_bench.spec import RunSpec
from bdh_bench.training import loop
from bdh_bench.training.recipe import Recipe

_NAME = "ngram_cache"


def _text(length: int, letters: int, seed: int) -> bytes:
    return np.random.default_rng(seed).integers(97, 97 + letters, length).astype(np.uint8).tobytes()


def _fitted(*rows: bytes, name: str = _NAME) -> Any:
    model = load_model(name)
    model.fit(np.frombuffer(row, dtype=np.uint8) for row in rows)
    return model


def _tokens(text: bytes) -> torch.Tensor:
    return torch.tensor([list(text)])


def _by_hand(rows: list[bytes], text: bytes, weight: float = 8.0, escape: float = 4.0) -> list[float]:
    """The formulae of the module's docstring, one byte at a time, with dictionaries: p of the byte after ``text``."""
    p = [1 / 256] * 256
    for order in range(6):
        counts: Counter[int] = Counter()
        if len(text) >= order:
            context = text[len(text) - order :]
            for row in rows:
                counts.update(row[j] for j in range(order, len(row)) if row[j - order : j] == context)
            if order >= 2:
                for j in range(order, len(text)):
                    if text[j - order : j] == context:
                        counts[text[j]] += weight  # type: ignore[assignment]
        total, distinct = sum(counts.values()), len(counts)
        if distinct:
            p = [(counts[s] + escape * distinct * p[s]) / (total + escape * distinct) for s in range(256)]
    for j in range(len(text) - 1, 7, -1):
        if text[j - 8 : j] == text[-8:]:
            length = 8
            while length < 32 and j > length and text[j - length - 1] == text[len(text) - length - 1]:
                length += 1
            belief = 0.8 - 4 / length
            p = [(1 - belief) * x for x in p]
            p[text[j]] += belief
            break
    return p


@pytest.mark.parametrize("letters", [2, 3, 20])
def test_every_probability_is_the_one_of_the_formulae(letters: int) -> None:
    rows = [_text(70, letters, 1), _text(50, letters, 2)]
    text = _text(60, letters, 3) + _text(60, letters, 3)[:45]  # repeats itself: long matches
    got = _fitted(*rows).logits(_tokens(text))[0].double().exp().numpy()
    assert np.abs(got.sum(1) - 1).max() < 1e-5
    for place in range(1, len(text) + 1):
        assert got[place - 1] == pytest.approx(_by_hand(rows, text[:place]), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.name.replace(" ", "_"))
def test_the_laws_hold_with_counts_too(law: laws.Law) -> None:
    finding = laws.find(law, _fitted(os.urandom(3000), bytes(range(256)) * 3))
    assert finding.kept, finding


def test_pieces_past_the_index_are_exact() -> None:
    text = _tokens(_text(1300, 4, 5))
    model = load_model(_NAME)
    session = model.session()
    pieces = [session.extend(part, keep="all") for part in text.split([700, 1, 599], 1)]
    assert torch.equal(torch.cat(pieces, 1), model.logits(text))
    assert session.state_bytes == 1300 == model.state_bytes(1, 1300)


def test_without_training_and_context_it_is_uniform_and_a_repeat_is_nearly_free() -> None:
    block = np.random.default_rng(0).permutation(256).astype(np.uint8).tobytes()  # no byte twice: nothing to go by
    p = load_model(_NAME).logits(_tokens(block + block))[0].double()
    bits = (-p[:-1].gather(1, _tokens(block + block).T[1:])[:, 0] / math.log(2)).tolist()
    assert bits[:255] == pytest.approx([8.0] * 255, abs=1e-6)
    assert sum(bits[280:]) / len(bits[280:]) < 1.0


def test_no_gram_reaches_over_the_edge_of_a_row() -> None:
    model = _fitted(b"ab", b"cd")
    grams = {k: getattr(model, f"grams_{k}").tolist() for k in (0, 1, 2)}
    assert grams == {0: [97, 98, 99, 100], 1: [97 * 256 + 98, 99 * 256 + 100], 2: []}


def test_two_fits_of_the_same_text_are_equal_and_of_another_are_not() -> None:
    one, same, other = _fitted(b"some text"), _fitted(b"some text"), _fitted(b"another text")
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), same.buffers(), strict=True))
    assert not torch.equal(one.grams_1, other.grams_1)


@pytest.mark.parametrize("options", ["orders=7", "orders=-1", "escape=0.0", "weight=-1.0"])
def test_impossible_options_are_refused(options: str) -> None:
    with pytest.raises(SpecError):
        load_model(f"{_NAME}:{options}")


@pytest.mark.parametrize("regime", ["crop", "carried"])
def test_it_is_fitted_on_the_bytes_that_train_the_others(
    books: Path, monkeypatch: pytest.MonkeyPatch, regime: str
) -> None:
    spec = RunSpec((_NAME,), ("long_ppl",), f"path:{books}", (), 5000, 64, seeds=(3,), regime=regime)
    corpus = open_corpus(spec.data)
    report = fit(load_model(_NAME), spec, 3, corpus)
    read = hashlib.sha256()
    learner = load_model("llama:d_model=16:n_layer=1:n_head=2")
    recipe = Recipe(5000, 64, 1e-3, 3, regime=regime)
    reader: Any = (loop.Carried if regime == "carried" else loop.Crops)(learner, recipe, corpus.part("train"))
    seen: list[Any] = []
    monkeypatch.setattr(loop, "_tokens", lambda text, model: seen.append(text) or torch.zeros(1))
    monkeypatch.setattr(loop, "piece_loss", lambda *a: torch.zeros(()))
    reader.begin(0)
    for _ in range(recipe.steps(reader.length, reader.rows)):
        if regime == "carried":
            seen.append(next(reader._pieces).targets)
        else:
            reader.loss()
    for block in seen:
        read.update(block.tobytes())
    assert report["read_sha256"] == read.hexdigest()
    assert report["bytes"] == sum(block.size for block in seen)


def test_a_run_fits_it_and_says_so(tmp_path: Path, books: Path) -> None:
    spec = RunSpec((_NAME,), ("long_ppl:block=32",), f"path:{books}", (32, 512), 4096, 64, threads=1)
    plan = make_plan(spec)
    run = execute(plan, prepare(plan, tmp_path, None, False), lambda *a: None, 120.0)
    (cell,) = run.cells
    assert (cell.status, cell.size, run.manifest["cells"][0]["kind"]) == ("ok", "", "yardstick")
    assert cell.facts["weights"] == "fitted"
    assert cell.facts["training"]["bytes"] == 4096
    values = {c: [r.value for r in run.records if r.metric == "bits_per_byte" and r.context == c] for c in (32, 512)}
    assert np.mean(values[512]) < np.mean(values[32]) < 4  # type: ignore[arg-type]
