"""Is a real model that was made worse by 0.003 bits per byte found out on 40 documents, and only by a paired test?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdh_bench import load_model
from bdh_bench.data.corpus import open_corpus
from bdh_bench.results import significance, statistics
from bdh_bench.results.resampling import Samples
from bdh_bench.tasks._scoring import bits
from bdh_bench.training.checkpoints import Checkpoint
from bdh_bench.training.loop import train
from bdh_bench.training.recipe import Recipe

DOCUMENTS, LENGTH = 40, 512


def prose(folder: Path) -> None:
    """Texts of made-up words over 3 to 16 letters: some are easy and some are hard."""
    generator = np.random.default_rng(6)
    for i in range(60):
        letters = list("abcdefghijklmnop"[: 3 + i % 14])
        words = ["".join(generator.choice(letters, size)) for size in generator.integers(2, 9, 30)]
        (folder / f"{i:02}.txt").write_text(" ".join(generator.choice(words, 400)), encoding="utf-8")


def logits_of(model: Any, text: Tensor) -> Tensor:
    start = torch.full((len(text), 1), model.start_symbol)
    with torch.inference_mode():
        return model.logits(torch.cat((start, text[:, :-1]), 1)).double()  # type: ignore[no-any-return]


def by_document(scores: np.ndarray[Any, Any]) -> Samples:
    return {f"{i}": (float(row.mean()), float(row.size)) for i, row in enumerate(scores.astype(np.float64))}


def test_a_model_worse_by_0003_bits_is_found_by_the_paired_test_only(tmp_path: Path) -> None:
    prose(tmp_path)
    corpus = open_corpus(f"path:{tmp_path}")
    model = load_model("bdh:n_layer=2:n_embd=16:n_head=2:mlp_internal_dim_multiplier=4", seed=0, train_context=64)
    train(
        model,
        Recipe(16_384, 64, 1e-2, 0, batch_bytes=1024),
        corpus.part("train"),
        (),
        Checkpoint("s" * 64),
        lambda *a: None,
    )
    texts = [np.frombuffer(d.content[:LENGTH], np.uint8).astype(np.int64) for d in corpus.documents]
    text = torch.from_numpy(np.stack([t for t in texts if len(t) == LENGTH][:DOCUMENTS]))
    assert len(text) == DOCUMENTS
    plain = logits_of(model, text)
    moves = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0), dtype=plain.dtype)
    before = bits(plain, text)

    def worse(strength: float) -> float:
        return float(bits(plain + strength * moves, text).astype(np.float64).mean() - before.astype(np.float64).mean())

    low, high = 0.0, 1.0  # how much noise on every logit costs 0.003 bits per byte
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if worse(middle) < 0.003 else (low, middle)
    one, two = by_document(before), by_document(bits(plain + high * moves, text))

    difference = statistics.paired_difference(two, one)
    p = significance.sign_flip(statistics.cluster_differences([(two, one)]))
    assert 0.0028 < difference.value < 0.0032
    assert not difference.contains_zero
    assert p.value < 0.05
    apart = [statistics.bootstrap_ratio(samples) for samples in (one, two)]
    assert difference.value < 0.5 * 1.96 * float(np.hypot(apart[0].se or 0, apart[1].se or 0))
