"""Is each number of the sweep the likelihood of the bytes that it names? Known truths first."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bdh_bench import load_model
from bdh_bench.data.corpus import open_corpus
from bdh_bench.data.targets import choose_targets
from bdh_bench.errors import CorpusError, LawError, PositionLimitError, SpecError
from bdh_bench.measure import memory
from bdh_bench.session import Streaming
from bdh_bench.tasks import long_ppl
from bdh_bench.tasks._scoring import (
    Reading,
    Units,
    check_reset,
    score_after,
    score_document,
    score_following,
    score_stream,
    spread,
    start_symbol_effect,
)
from bdh_bench.types import Arrays, Encoding, Measurement, TaskContext


def _context(folder: Path, contexts: tuple[int, ...]) -> TaskContext:
    documents = choose_targets(open_corpus(f"path:{folder}").documents, max(contexts), 128, 2, 10).documents
    return TaskContext(0, None, contexts, 64, documents, "random", False, lambda *a: None)


def _sweep(model: Any, folder: Path, contexts: tuple[int, ...]) -> tuple[list[Measurement], dict[str, Any]]:
    items = list(long_ppl.run(model, long_ppl.Config(), _context(folder, contexts)))
    arrays = next(dict(i.arrays) for i in items if isinstance(i, Arrays) and i.name == "bits")
    return _rows(items), arrays


def _rows(items: list[Any], metric: str = "bits_per_byte") -> list[Measurement]:
    return [i for i in items if isinstance(i, Measurement) and i.metric == metric]


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
    rows = _rows(items)
    assert max(abs(r.value or 0.0) for r in rows) <= 1e-9
    items = list(long_ppl.run(load_model("toy:copy"), long_ppl.Config(block=16), _context(periodic, (32,))))
    assert all(r.value == 8.0 for r in _rows(items))


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
    units = score_document(load_model("toy:uniform"), content)
    assert len(units.bits) == units.byte_count == len(content)
    assert float(units.bits.sum()) == 8.0 * len(content)
    model = load_model("bdh:n_layer=2:n_embd=16:n_head=2:mlp_internal_dim_multiplier=4")
    tokens = torch.tensor([10, *content])
    with torch.inference_mode():
        logp = model.logits(tokens[None, :-1])[0].log_softmax(-1)
    truth = -logp.gather(1, tokens[1:, None])[:, 0] / math.log(2)
    assert np.abs(score_document(model, content).bits - truth.numpy()).max() < 1e-3


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


# -- the start symbol, and half of the training ----------------------------------------------------------------------------


def _plainly(model: Any, tokens: list[int], scored: int) -> float:
    """Bits of the last ``scored`` of these tokens, by a full forward."""
    text = torch.tensor(tokens)
    with torch.inference_mode():
        logp = model.logits(text[None, :-1])[0].log_softmax(-1)
    return float(-logp.gather(1, text[1:, None])[-scored:].sum() / math.log(2))


def test_the_start_symbol_is_left_out_and_both_sides_pay_for_the_same_bytes() -> None:
    model = load_model(_TINY)
    with torch.no_grad():
        model.embed.weight[10] *= 50  # a symbol that weighs on everything after it
        for weight in model.parameters():
            weight.mul_(6)
    texts = [os.urandom(40) for _ in range(3)]
    found = start_symbol_effect(model, texts)
    assert found is not None
    on = sum(_plainly(model, [10, *text], 39) for text in texts) / (3 * 39)
    off = sum(_plainly(model, [*text], 39) for text in texts) / (3 * 39)
    assert found["on"] == pytest.approx(on, abs=1e-4)
    assert found["off"] == pytest.approx(off, abs=1e-4)
    assert abs(found["difference"] - (off - on)) < 1e-4 < abs(off - on)
    assert (found["documents"], found["bytes"]) == (3, 3 * 39)
    assert model.start_symbol == 10
    assert start_symbol_effect(Pairs(start_symbol=None), texts) is None
    odd = start_symbol_effect(Pairs(), [b"abcde"])  # tokens of 2, 2 and 1 bytes: the first is left out
    assert odd is not None
    assert (odd["bytes"], odd["difference"]) == (3, 0.0)
    assert odd["on"] == pytest.approx(2 * _PER_TOKEN / 3)


def test_the_start_symbol_is_a_fact_of_the_cell(books: Path) -> None:
    noted: dict[str, Any] = {}
    context = replace(_context(books, (128,)), note=noted.__setitem__)
    list(long_ppl.run(load_model(_TINY), long_ppl.Config(), context))
    assert (noted["start_symbol_check"]["documents"], noted["start_symbol_check"]["bytes"]) == (3, 3 * 63)  # T = 64


_TINY = "bdh:n_layer=2:n_embd=16:n_head=2:mlp_internal_dim_multiplier=4"


def test_half_of_the_training_is_scored_on_the_same_targets_under_its_own_name(books: Path) -> None:
    model, earlier = load_model(_TINY, seed=1), load_model(_TINY, seed=2)
    contexts = (64, 128, 256, 512)
    context = replace(_context(books, contexts), halfway=lambda: earlier)
    items = list(long_ppl.run(model, long_ppl.Config(halfway=2), context))
    rows = _rows(items, "halfway_bits_per_byte")
    alone = _rows(list(long_ppl.run(earlier, long_ppl.Config(halfway=0), context)))
    assert [(r.context, r.sample, r.value, r.axes) for r in rows] == [
        (r.context, r.sample, r.value, r.axes) for r in alone
    ]
    assert {r.metric_id for r in rows} == {f"bpb@halfway,c={c},S=128" for c in contexts}
    final = _rows(items)
    plain = _rows(list(long_ppl.run(model, long_ppl.Config(), replace(context, halfway=lambda: None))))
    assert [(r.metric_id, r.value) for r in final] == [(r.metric_id, r.value) for r in plain]
    assert {r.value for r in final}.isdisjoint(r.value for r in rows)


def test_half_of_the_training_costs_at_most_a_third_more(books: Path) -> None:
    """With one context beyond T, the longest that fits; nothing without T, without a context beyond it or past the last position."""
    for contexts, blocks, streamed, chosen in (
        ((32, 64, 128, 256, 512, 1024), 2, 1024, (64, 512)),
        ((32, 64, 128, 256, 512, 1024), 8, 1024, (64, 512)),
        ((64, 128), 2, 0, ()),
        ((32, 128), 2, 1024, ()),
        ((32, 64), 2, 1024, ()),
    ):
        context = _context(books, contexts)
        targets = choose_targets(context.documents, max(contexts), 128, blocks, 10)
        assert long_ppl.halfway_contexts(1, targets, context, streamed, None) == chosen
        extra = blocks * sum(c + 128 for c in chosen)
        assert extra <= 0.35 * (blocks * sum(c + 128 for c in contexts) + streamed)
        assert long_ppl.halfway_contexts(0, targets, context, streamed, None) == ()
    context = _context(books, (64, 128, 256))
    targets = choose_targets(context.documents, 256, 128, 2, 10)
    assert long_ppl.halfway_contexts(2, targets, context, 1024, 300) == (64, 128)
    assert long_ppl.halfway_contexts(2, targets, context, 1024, 200) == ()


# -- models with a tokenizer of their own --------------------------------------------------------------------------------


class PairTokenizer:
    """Two bytes to a token (id 256 · first + second); a last single byte has an id of its own. ``drift`` damages the spans."""

    def __init__(self, drift: int = 0) -> None:
        self.drift = drift

    def encode(self, content: bytes) -> Encoding:
        ids = [256 * a + b for a, b in zip(content[::2], content[1::2], strict=False)]
        ids += [65_536 + content[-1]] if len(content) % 2 else []
        ends = [min(2 * i + 2, len(content)) for i in range(len(ids))]
        return Encoding(np.array(ids, dtype=np.int64), np.array(ends, dtype=np.int64) + self.drift)

    def decode(self, ids: Any) -> bytes:
        raise CorpusError("not needed here")


class Pairs(Streaming, torch.nn.Module):
    """Every token equally likely, so that a text costs log2(V) bits per token, whatever its bytes."""

    vocab_size = 65_536 + 256
    start_symbol: int | None = 0

    def __init__(self, start_symbol: int | None = 0, limit: int | None = None, drift: int = 0) -> None:
        super().__init__()
        self.tokenizer = PairTokenizer(drift)
        self.start_symbol, self.max_positions = start_symbol, limit

    def memory(self, batch_size: int) -> Any:
        return load_model("toy:uniform").memory(batch_size)

    def advance(self, memory: Any, position: int, tokens: torch.Tensor, keep: Any) -> torch.Tensor:
        return torch.zeros(*(tokens if keep == "all" else tokens[:, -1:]).shape, self.vocab_size)

    def state_bytes(self, batch_size: int, context: int) -> int:
        return 0


_PER_TOKEN = math.log2(65_536 + 256)


def test_bits_of_tokens_are_divided_by_raw_bytes() -> None:
    content = "naïve 🐉 text\r\n".encode() * 60 + b"\xff"  # the odd last byte is a token of its own
    units = score_document(Pairs(), content)
    assert units.byte_count == len(content)
    assert units.bits.sum() / units.byte_count == pytest.approx(_PER_TOKEN * ((len(content) + 1) // 2) / len(content))
    skipping = score_document(Pairs(start_symbol=None), content)
    assert (skipping.start, skipping.byte_count, len(skipping.bits)) == (2, len(content) - 2, len(units.bits) - 1)


def test_a_ledger_that_does_not_close_is_refused() -> None:
    with pytest.raises(LawError, match="does not close"):
        score_document(Pairs(drift=1), b"some text")


def test_a_tokenised_block_costs_the_same_after_every_context_and_in_sum() -> None:
    target = np.frombuffer(b"abcdefg", dtype=np.uint8)
    for context in (b"x", b"xy", b"some words before it"):
        bits = score_after(Pairs(), np.frombuffer(context, dtype=np.uint8)[None], target[None])
        assert bits.shape == (1, 7)
        assert bits.sum() == pytest.approx(4 * _PER_TOKEN, rel=1e-6)
        assert bits[0, 0] == pytest.approx(_PER_TOKEN / 2)


def test_a_token_without_bytes_pays_at_the_next_byte() -> None:
    units = Units(np.array([1.0, 2.0, 6.0], np.float32), np.array([1, 1, 3]), 0)
    assert spread(units).tolist() == [1.0, 4.0, 4.0]


def test_a_tokenised_position_limit_counts_tokens_and_truncates_nothing() -> None:
    content = b"0123456789"
    assert score_document(Pairs(limit=5), content).byte_count == 10
    with pytest.raises(PositionLimitError, match="5 tokens needs more than its 4"):
        score_document(Pairs(limit=4), content)
    text = np.frombuffer(content, dtype=np.uint8)[None]
    assert score_after(Pairs(limit=10), text, text).shape == (1, 10)
    with pytest.raises(PositionLimitError):
        score_after(Pairs(limit=9), text, text)


def test_the_stream_metric_is_the_ratio_over_the_stored_bits(books: Path) -> None:
    model = load_model("bdh:n_layer=2:n_embd=16:n_head=2:mlp_internal_dim_multiplier=4")
    items = list(long_ppl.run(model, long_ppl.Config(stream_bytes=700), _context(books, (128,))))
    rows = _rows(items, "stream_bits_per_byte")
    arrays = next(dict(i.arrays) for i in items if isinstance(i, Arrays) and i.name == "stream")
    assert len(rows) == len(arrays["documents"])
    for index, row in enumerate(rows):
        assert row.sample == arrays["documents"][index]
        assert row.weight == len(arrays[f"bits_{index}"]) == 700
        assert row.value == pytest.approx(float(arrays[f"bits_{index}"].astype(float).mean()), abs=1e-12)
    stopped = _rows(
        list(long_ppl.run(load_model("gpt2"), long_ppl.Config(), _context(books, (128,)))), "stream_bits_per_byte"
    )
    assert [(r.value, r.status) for r in stopped] == [(None, "unsupported")]


# -- where the state is emptied -------------------------------------------------------------------------------------------


_BDH = "bdh:n_layer=2:n_embd=16:n_head=2:mlp_internal_dim_multiplier=4"


def _truth(model: Any, before: bytes, target: bytes) -> np.ndarray:
    """Bits of target bytes after the start symbol and ``before``, by one plain forward."""
    text = torch.tensor([10, *before, *target])
    with torch.inference_mode():
        logp = model.logits(text[None, :-1])[0].log_softmax(-1)
    return (-logp[len(before) :].gather(1, text[len(before) + 1 :, None])[:, 0] / math.log(2)).numpy()


def test_cold_and_window_read_what_they_say(books: Path) -> None:
    model, content = load_model(_BDH), (books / "book01.txt").read_bytes()[:1000]
    cold = score_document(model, content, Reading(300))
    truth = np.concatenate([_truth(model, b"", content[i : i + 300]) for i in range(0, 1000, 300)])
    assert np.abs(cold.bits - truth).max() < 1e-3
    window = score_document(model, content, Reading(64, 200))
    truth = np.concatenate(
        [_truth(model, content[max(0, i - 200) : i], content[i : i + 64]) for i in range(0, 1000, 64)]
    )
    assert np.abs(window.bits - truth).max() < 1e-3
    assert window.byte_count == cold.byte_count == 1000
    assert np.abs(window.bits - cold.bits).max() > 1e-3


def test_tokens_stay_whole_in_cold_blocks_and_the_ledger_closes() -> None:
    content = b"0123456789" * 10 + b"x"
    for start in (0, None):
        for reading in (Reading(7), Reading(7, 5)):
            units = score_document(Pairs(start), content, reading)
            assert units.byte_count == len(content) - (2 if start is None else 0)
            assert len(units.bits) == 51 - (start is None)


def test_a_position_limit_holds_for_a_stretch_and_not_for_the_text(books: Path) -> None:
    model, content = load_model("gpt2"), (books / "book00.txt").read_bytes()[:2000]
    assert score_document(model, content, Reading(256)).byte_count == 2000
    assert score_document(model, content, Reading(64, 192)).byte_count == 2000
    with pytest.raises(PositionLimitError):
        score_document(model, content, Reading(512))


@pytest.mark.parametrize(
    ("state", "metric_id"),
    [
        ("carry", "bpb@stream,state=carry"),
        ("cold", "bpb@stream,state=cold,block=64"),
        ("window", "bpb@window=64,stride=16"),
    ],
)
def test_the_state_protocol_is_part_of_the_identity(books: Path, state: str, metric_id: str) -> None:
    context = replace(_context(books, (128,)), state_protocol=state)
    items = list(long_ppl.run(load_model("toy:uniform"), long_ppl.Config(stride=16), context))
    rows = _rows(items, "stream_bits_per_byte")
    assert {r.metric_id for r in rows} == {metric_id}
    assert {(r.value, r.weight) for r in rows} == {(8.0, 1024.0)}  # 16 training contexts of 64
    with pytest.raises(SpecError, match="stride=64"):
        list(long_ppl.run(load_model("toy:uniform"), long_ppl.Config(), replace(context, state_protocol="window")))


# -- the edge of a document -----------------------------------------------------------------------------------------------


class Leaky(Streaming, torch.nn.Module):
    """Likes the bytes that it has ever read, in any session: ``session()`` begins with what another one left behind."""

    vocab_size = 256
    trainable = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(256)

    def memory(self, batch_size: int) -> Any:
        return load_model("toy:uniform").memory(batch_size)

    def advance(self, memory: Any, position: int, tokens: torch.Tensor, keep: Any) -> torch.Tensor:
        self.seen.index_add_(0, tokens.flatten(), torch.ones(tokens.numel()))
        return self.seen.log1p().expand(*(tokens if keep == "all" else tokens[:, -1:]).shape, 256)

    def state_bytes(self, batch_size: int, context: int) -> int:
        return 0


def test_a_planted_leak_is_found_and_stores_nothing(books: Path) -> None:
    with pytest.raises(LawError, match="leaks between documents"):
        list(long_ppl.run(Leaky(), long_ppl.Config(), _context(books, (128,))))


@pytest.mark.parametrize(
    "name", [_BDH, "gpt2", "mamba", "llama:d_model=16:n_layer=1:n_head=2", "ngram_cache", "toy:copy"]
)
def test_scores_are_bit_equal_after_any_other_text(name: str) -> None:
    model = load_model(name)
    for seed in range(3):
        text = np.random.default_rng(seed).integers(0, 256, (2, 200)).astype(np.uint8)
        check_reset(model, text[0].tobytes(), text[1].tobytes())


def test_the_boundary_probe_is_the_cost_of_not_emptying_the_state(books: Path) -> None:
    model, context = load_model(_BDH), _context(books, (128,))
    items = list(long_ppl.run(model, long_ppl.Config(stream_bytes=300, boundary=1), context))
    rows = _rows(items, "boundary_bits_per_byte")
    texts = [(d.name, d.content[:300]) for d in context.documents]
    assert [r.sample for r in rows] == [name for name, _ in texts]
    for index, (_, text) in enumerate(texts):
        joined = _truth(model, texts[index - 1][1] + b"\n", text)
        expected = float((joined - _truth(model, b"", text)).mean())
        assert rows[index].value == pytest.approx(expected, abs=2e-6)
        assert np.abs(score_following(model, texts[index - 1][1], text) - joined).max() < 1e-3
    long = context.documents[0].content[:1300]  # longer than what is read at a time
    assert np.abs(score_following(model, long, text) - _truth(model, long + b"\n", text)).max() < 1e-3
    uniform = list(long_ppl.run(load_model("toy:uniform"), long_ppl.Config(boundary=1), context))
    assert {r.value for r in _rows(uniform, "boundary_bits_per_byte")} == {0.0}
    short = list(long_ppl.run(load_model("gpt2"), long_ppl.Config(stream_bytes=300, boundary=1), context))
    assert [r.status for r in _rows(short, "boundary_bits_per_byte")] == ["unsupported"]


# -- cost --------------------------------------------------------------------------------------------------------------


class Counting(Streaming, torch.nn.Module):
    """Uniform; counts the tokens that it reads."""

    vocab_size = 256
    tokens_read = 0

    def memory(self, batch_size: int) -> Any:
        return load_model("toy:uniform").memory(batch_size)

    def advance(self, memory: Any, position: int, tokens: torch.Tensor, keep: Any) -> torch.Tensor:
        self.tokens_read += tokens.numel()
        return torch.zeros(*(tokens if keep == "all" else tokens[:, -1:]).shape, 256)

    def state_bytes(self, batch_size: int, context: int) -> int:
        return 0


@pytest.mark.parametrize("blocks", [2, 8])
def test_the_sweep_costs_what_the_protocol_says(books: Path, blocks: int) -> None:
    contexts, block = (128, 256, 512, 1024, 2048), 128
    model, context = Counting(), _context(books, contexts)
    list(long_ppl.run(model, long_ppl.Config(block, blocks, stream_bytes=100), context))
    gate, stream = 3 * 100, 100 * len(context.documents)
    per_document = (model.tokens_read - gate - stream) / len(context.documents)
    assert per_document == pytest.approx(blocks * (2 * 2048 + len(contexts) * block), rel=0.05)
