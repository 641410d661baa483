"""Is each number of the sweep the likelihood of the bytes that it names? Known truths first."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bdh_bench import load_model
from bdh_bench.data.corpus import open_corpus
from bdh_bench.data.targets import choose_targets
from bdh_bench.measure import memory
from bdh_bench.tasks import long_ppl
from bdh_bench.tasks._scoring import score_stream
from bdh_bench.types import Arrays, Measurement, TaskContext


def _context(folder: Path, contexts: tuple[int, ...]) -> TaskContext:
    documents = choose_targets(open_corpus(f"path:{folder}").documents, max(contexts), 128, 2, 10).documents
    return TaskContext(0, None, contexts, 64, documents, "random", False, lambda *a: None)


def _sweep(model: Any, folder: Path, contexts: tuple[int, ...]) -> tuple[list[Measurement], dict[str, Any]]:
    items = list(long_ppl.run(model, long_ppl.Config(), _context(folder, contexts)))
    arrays = next(dict(i.arrays) for i in items if isinstance(i, Arrays))
    return [i for i in items if isinstance(i, Measurement)], arrays


@pytest.fixture
def periodic(tmp_path: Path) -> Path:
    folder = tmp_path / "periodic"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}").write_bytes(os.urandom(64) * 40)
    return folder


def test_uniform_is_exactly_eight_bits(books: Path) -> None:
    rows, _ = _sweep(load_model("toy:uniform"), books, (128, 256, 512))
    assert rows
    assert all(r.value == 8.0 for r in rows)


def test_copy_is_zero_on_repeated_blocks_and_eight_without_context(periodic: Path) -> None:
    rows, _ = _sweep(load_model("toy:copy"), periodic, (128, 256, 512))
    assert max(abs(r.value or 0.0) for r in rows) <= 1e-9
    items = list(long_ppl.run(load_model("toy:copy"), long_ppl.Config(block=32), _context(periodic, (64, 128))))
    rows = [i for i in items if isinstance(i, Measurement)]
    assert max(abs(r.value or 0.0) for r in rows) <= 1e-9
    items = list(long_ppl.run(load_model("toy:copy"), long_ppl.Config(block=16), _context(periodic, (32,))))
    assert all(r.value == 8.0 for r in items if isinstance(r, Measurement))


@pytest.mark.parametrize("shift", [63, 65])
def test_an_off_by_one_oracle_fails_as_it_should(periodic: Path, shift: int) -> None:
    rows, _ = _sweep(load_model(f"toy:copy:period={shift}"), periodic, (128,))
    assert all((r.value or 0) > 8 for r in rows)


def test_the_sweep_equals_a_plain_full_forward(books: Path) -> None:
    model = load_model("bdh:n_layer=2:n_embd=16:n_head=2:mlp_internal_dim_multiplier=4")
    contexts = (128, 700)
    rows, arrays = _sweep(model, books, contexts)
    targets = choose_targets(_context(books, contexts).documents, 700, 128, 2, 10)
    assert {r.axes["target_hash"] for r in rows} == {targets.hash}
    blocks = [(d, p) for d, s in zip(targets.documents, targets.starts, strict=True) for p in s]
    for c in contexts:
        for index, (document, p) in enumerate(blocks):
            text = torch.tensor([10, *document.content[p - c : p + 128]])
            with torch.inference_mode():
                logp = model.logits(text[None, :-1])[0].log_softmax(-1)
            truth = -logp[c : c + 128].gather(1, text[c + 1 :, None])[:, 0] / math.log(2)
            assert np.abs(arrays[f"bits_c{c}"][index] - truth.numpy()).max() < 1e-3
    for row in rows:  # a value is a reduction of the stored bits
        owner = list(arrays["documents"]).index(row.sample)
        bits = arrays[f"bits_c{row.context}"][arrays["block_document"] == owner]
        assert row.value == pytest.approx(float(bits.astype(np.float64).mean()), abs=1e-12)
        assert row.weight == bits.size


def test_a_position_limit_ends_the_line_and_truncates_nothing(books: Path) -> None:
    rows, arrays = _sweep(load_model("gpt2", train_context=256), books, (128, 256, 512))
    assert {r.context for r in rows if r.status == "ok"} == {128, 256}
    (stopped,) = [r for r in rows if r.status != "ok"]
    assert (stopped.context, stopped.value, stopped.status) == (512, None, "unsupported")
    assert "bits_c512" not in arrays


def test_the_stream_score_counts_every_byte_once(books: Path) -> None:
    content = (books / "book00.txt").read_bytes()
    bits = np.concatenate(list(score_stream(load_model("toy:uniform"), content)))
    assert len(bits) == len(content)
    assert float(bits.sum()) == 8.0 * len(content)
    model = load_model("bdh:n_layer=2:n_embd=16:n_head=2:mlp_internal_dim_multiplier=4")
    tokens = torch.tensor([10, *content])
    with torch.inference_mode():
        logp = model.logits(tokens[None, :-1])[0].log_softmax(-1)
    truth = -logp.gather(1, tokens[1:, None])[:, 0] / math.log(2)
    assert np.abs(np.concatenate(list(score_stream(model, content))) - truth.numpy()).max() < 1e-3


def test_memory_of_scoring_64_kib_with_bdh_does_not_grow() -> None:
    """The held state is constant, and the peak of the process for 64 KiB is that for 8 KiB."""
    model = load_model("bdh:n_layer=2:n_embd=32:n_head=2:mlp_internal_dim_multiplier=16")
    text = os.urandom(65_536)
    for _ in score_stream(model, text[:8192]):  # workspaces of the libraries
        pass
    peaks = []
    for length in (8192, 65_536):
        memory.settle()
        if not memory.reset_peak():
            pytest.skip("this system does not let a process reset its high-water mark")
        before = memory.resident_bytes() or 0
        for _ in score_stream(model, text[:length]):
            pass
        peaks.append(memory.peak_resident_bytes() - before)
    assert peaks[1] <= peaks[0] + 4 * 2**20
