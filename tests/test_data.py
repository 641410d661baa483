"""Is the text what the manifest says, and are targets the same for every context?"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bdh_bench.data.corpus import SPLITS, Document, name_hash, open_corpus
from bdh_bench.data.pieces import CarriedText, TrainingText
from bdh_bench.data.reference import order_bits, reference_lines
from bdh_bench.data.targets import choose_longest, choose_targets
from bdh_bench.errors import CorpusError, LawError, MissingExtraError, UnknownNameError
from bdh_bench.results.store import open_run
from bdh_bench.runner.plan import make_plan
from bdh_bench.runner.run import prepare
from bdh_bench.spec import RunSpec


def test_stdlib_is_long_and_split_by_name() -> None:
    corpus = open_corpus("stdlib")
    sizes = [len(d.content) for d in corpus.documents]
    assert sum(s > 65_536 for s in sizes) >= 20
    assert sum(len(d.content) > 16_384 for d in corpus.part("test")) >= 30
    assert all(name_hash(d.name) % 100 >= 70 for d in corpus.part("test"))
    assert not any("test" in d.name.split("/")[:-1] or "encodings" in d.name for d in corpus.documents)
    manifest = corpus.manifest()
    assert [d["bytes"] for d in manifest["documents"]] == [d.path.stat().st_size for d in corpus.documents]


def test_splits_never_share_a_document_and_none_is_empty(tmp_path: Path) -> None:
    for count in (3, 4, 5, 12):
        for i in range(count):
            (tmp_path / f"{i}.txt").write_bytes(os.urandom(100))
        corpus = open_corpus(f"path:{tmp_path}")
        names = [{d.name for d in corpus.part(s)} for s in SPLITS]
        assert all(names)
        assert sum(map(len, names)) == count == len(set.union(*names))


def test_an_empty_split_is_filled_and_the_manifest_says_so(tmp_path: Path) -> None:
    names = [n for n in (f"{i}.txt" for i in range(1000)) if name_hash(n) % 100 < 80][:4]
    for name in names:
        (tmp_path / name).write_text("x")
    corpus = open_corpus(f"path:{tmp_path}")
    assert all(corpus.part(s) for s in SPLITS)
    assert len(corpus.notes) == 2


def test_one_file_is_cut_with_gaps_and_labelled(tmp_path: Path) -> None:
    data = os.urandom(50_000)
    (tmp_path / "one.bin").write_bytes(data)
    corpus = open_corpus(f"path:{tmp_path}/one.bin")
    assert corpus.labels == ("smoke",)
    assert [d.name for d in corpus.documents] == [f"one.bin#{s}" for s in SPLITS]
    assert [len(d.content) for d in corpus.documents] == [40_000 - 1024, 5_000 - 1024, 5_000]
    assert corpus.documents[2].content == data[45_000:]


@pytest.mark.parametrize("spec", ["path:/no/such/place", "wikipedia", "path:EMPTY", "path:EMPTYFILE"])
def test_bad_corpora_are_refused(spec: str, tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / "f").touch()
    spec = spec.replace("EMPTYFILE", f"{tmp_path}/f").replace("EMPTY", f"{tmp_path}/e")
    with pytest.raises((CorpusError, UnknownNameError)):
        open_corpus(spec)


def test_targets_follow_the_rule_and_leave_room_for_the_context() -> None:
    documents = open_corpus("stdlib").part("test")
    targets = choose_targets(documents, 2048, 128, 2, 10)
    assert len(targets.documents) == 10
    for document, starts in zip(targets.documents, targets.starts, strict=True):
        room = len(document.content) - 2048 - 128 - 64
        for j, start in enumerate(starts):
            base = 2048 + j * room // 2
            assert base <= start <= base + 64
            assert start + 128 <= len(document.content)
            assert document.content[start - 1 : start].isspace() or start == base
    assert targets.hash == choose_targets(documents, 2048, 128, 2, 10).hash
    assert targets.hash != choose_targets(documents, 4096, 128, 2, 10).hash


def test_contexts_longer_than_every_document_are_refused() -> None:
    documents = open_corpus("stdlib").part("test")
    assert choose_longest(documents, (128, 2048), 128, 20) == (128, 2048)
    with pytest.raises(CorpusError, match="longest test document"):
        choose_longest(documents, (1 << 24,), 128, 20)


def _for_training(folder: Path) -> tuple[Document, ...]:
    """Every document of the folder, whatever its split."""
    return tuple(replace(d, split="train") for d in open_corpus(f"path:{folder}").documents)


@pytest.mark.parametrize("made", [lambda d: TrainingText(d, 40), lambda d: CarriedText(d, rows=1, length=40)])
def test_nothing_learns_from_a_test_document(tmp_path: Path, made: Callable[[Any], Any]) -> None:
    """Not even from one among many, and whoever gives it."""
    for i in range(12):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * 50)
    corpus = open_corpus(f"path:{tmp_path}")
    for split in ("train", "validation"):
        made(corpus.part(split))  # type: ignore[arg-type]
    with pytest.raises(LawError, match="test documents were about to be learned from") as raised:
        made((*corpus.part("train"), corpus.part("test")[0]))
    assert (raised.value.gate, raised.value.error) == ("splits", 1.0)


def test_pieces_repeat_for_a_seed_and_stay_inside_documents(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * (50 + i))
    text = TrainingText(_for_training(tmp_path), 40)
    first = [p.tobytes() for p in islice(text.pieces(3), 500)]
    assert first == [p.tobytes() for p in islice(text.pieces(3), 500)]
    assert first[100:200] == [p.tobytes() for p in islice(text.pieces(3, skip=100), 100)]
    assert first != [p.tobytes() for p in islice(text.pieces(4), 500)]
    assert all(len(set(p)) == 1 and len(p) == 40 for p in first)
    assert len(set(first)) == 12


def _numbered(folder: Path, sizes: tuple[int, ...]) -> tuple[Document, ...]:
    """Documents in which every byte says where it is: the high bits name the document."""
    for i, size in enumerate(sizes):
        (folder / f"{i}").write_bytes(bytes(64 * i + j for j in range(size)))
    return tuple(sorted(_for_training(folder), key=lambda d: d.name))


def test_every_byte_of_a_stretch_is_a_target_once_and_inputs_follow(tmp_path: Path) -> None:
    documents = _numbered(tmp_path, (50, 11, 64))  # two rows of 6: four pieces (a tail of 2), none, five (a tail of 4)
    text = CarriedText(documents, rows=2, length=6)
    epoch = list(islice(text.pieces(0), 9))
    read = np.concatenate([piece.targets.ravel() for piece in epoch])
    assert sorted(read) == [*range(48), *range(128, 188)]
    assert sum(piece.before is None for piece in epoch) == 2
    for previous, piece in pairwise(epoch):
        same = previous.targets[0, 0] // 64 == piece.targets[0, 0] // 64
        assert same == (piece.before is not None)
        if piece.before is not None:  # rows continue side by side, each from its own last byte
            assert piece.before.tolist() == previous.targets[:, -1].tolist() == (piece.targets[:, 0] - 1).tolist()
    first = next(piece for piece in epoch if piece.before is None and piece.targets[0, 0] == 0)
    assert first.targets.tolist() == [[0, 1, 2, 3, 4, 5], [24, 25, 26, 27, 28, 29]]


def test_carried_documents_come_in_a_new_order_every_epoch_and_can_be_skipped_to(tmp_path: Path) -> None:
    text = CarriedText(_numbered(tmp_path, (24, 36, 48, 64)), rows=2, length=6)  # 2 + 3 + 4 + 5 pieces

    def order(seed: int, skip: int, number: int) -> list[tuple[int, bool]]:
        return [(int(p.targets[0, 0]), p.before is None) for p in islice(text.pieces(seed, skip), number)]

    whole = order(3, 0, 14 * 6)
    epochs = [whole[i : i + 14] for i in range(0, len(whole), 14)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3
    assert whole != order(4, 0, 14 * 6)
    for skip in (1, 2, 13, 14, 17, 45):
        assert order(3, skip, 20) == whole[skip : skip + 20]


def test_a_carry_limit_empties_the_state_inside_a_document(tmp_path: Path) -> None:
    text = CarriedText(_numbered(tmp_path, (60, 60, 60)), rows=1, length=6, limit=20)  # 18 bytes fit, 24 do not
    starts = [piece.before is None for piece in islice(text.pieces(0), 20)]
    assert starts == [i % 10 % 3 == 0 for i in range(20)]


def test_documents_too_short_for_the_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"holds 2 rows of 40 bytes .* --regime crop"):
        CarriedText(_numbered(tmp_path, (50, 64, 79 - 20)), rows=2, length=40)


def test_reference_models_on_known_text() -> None:
    train = np.frombuffer(b"ab" * 5000, dtype=np.uint8)
    block = b"ab" * 50
    assert order_bits(train, [block], 0, 4) / 96 == pytest.approx(1.0, abs=0.01)
    assert order_bits(train, [block], 1, 4) / 96 == pytest.approx(0.0, abs=0.01)
    noise = np.random.default_rng(0).integers(0, 256, 200_000).astype(np.uint8)
    assert order_bits(noise, [noise[:1000].tobytes()], 0, 4) / 996 == pytest.approx(8.0, abs=0.01)


def test_order_model_probabilities_sum_to_one() -> None:
    train = np.frombuffer(b"the cat sat on the mat " * 20, dtype=np.uint8)
    for order in (0, 1, 2):
        total = sum(2 ** -order_bits(train, [b"th" + bytes([b])], order, 2) for b in range(256))
        assert math.isclose(total, 1.0, abs_tol=1e-9)


def test_reference_lines_on_the_standard_library_are_ordered() -> None:
    corpus = open_corpus("stdlib")
    targets = choose_targets(corpus.part("test"), 2048, 128, 2, 10)
    train = np.concatenate(list(islice(TrainingText(corpus.part("train"), 256).pieces(0), 4096)))
    rows = {row["name"]: row["bits_per_byte"] for row in reference_lines(train, targets)}
    assert rows["order-0 byte model"] > rows["order-1 byte model"] > rows["order-2 byte model"] > 2


# -- long corpora, pieces, clusters ----------------------------------------------------------------------------------------


def test_long_files_are_mapped_and_small_ones_read(tmp_path: Path) -> None:
    sizes = {"small": 1000, "large": 2**20 + 5, "third": 2**21}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(os.urandom(size))
    for d in open_corpus(f"path:{tmp_path}").documents:
        raw = (tmp_path / d.name).read_bytes()
        assert (d.size, d.content, d.sha256) == (len(raw), raw, hashlib.sha256(raw).hexdigest())
        assert isinstance(d.data.base, mmap.mmap | np.memmap) == (d.size >= 2**20)
        with pytest.raises(ValueError, match="read-only"):
            d.data[0] = 1


def test_crops_of_a_large_corpus_take_no_memory_of_their_own(tmp_path: Path) -> None:
    """Opening 64 MiB and drawing crops allocates less than 1 MiB: what is used stays in the file."""
    for i in range(4):
        (tmp_path / f"{i}").write_bytes(os.urandom(2**20) * 16)
    documents = _for_training(tmp_path)
    tracemalloc.start()
    text = TrainingText(documents, 256)
    pieces = list(islice(text.pieces(0), 100))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 2**20
    assert all(any(p.tobytes() in d.content for d in documents) for p in pieces[:5])


def test_pieces_stay_in_the_split_and_cluster_of_their_file(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i}.txt").write_bytes(os.urandom(100 + 900 * (i % 3)))
    whole, cut = open_corpus(f"path:{tmp_path}"), open_corpus(f"path:{tmp_path}", 300)
    split = {d.name: d.split for d in whole.documents}
    joined: dict[str, bytes] = {}
    for d in cut.documents:
        file = d.name.partition("#")[0]
        assert (d.cluster or d.name, d.split) == (file, split[file])
        assert d.size <= 300
        joined[file] = joined.get(file, b"") + d.content
    assert joined == {d.name: d.content for d in whole.documents}
    names = [d.name for d in cut.documents if d.name.startswith("2.txt")]
    assert names == [f"2.txt#{n:04}" for n in range(1, 8)]
    assert "cut into pieces" in cut.notes[-1]
    assert cut.manifest()["digest"] != whole.manifest()["digest"]
    one = open_corpus(f"path:{tmp_path}", 10**9)
    assert one.manifest()["documents"] == whole.manifest()["documents"]


def test_parts_of_one_file_are_cut_too_and_stay_its_cluster(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(os.urandom(50_000))
    corpus = open_corpus(f"path:{tmp_path}", 4000)
    assert {d.cluster for d in corpus.documents} == {"one"}
    assert [d.name for d in corpus.part("test")] == ["one#test#0001", "one#test#0002"]
    for split in SPLITS:  # no piece reaches over the end of its part
        (part,) = open_corpus(f"path:{tmp_path}").part(split)
        assert b"".join(d.content for d in corpus.part(split)) == part.content


def test_modules_of_a_package_are_one_cluster() -> None:
    rows = {d["name"]: d["cluster"] for d in open_corpus("stdlib").manifest()["documents"]}
    assert rows["json/decoder.py"] == rows["json/encoder.py"] == "json"
    assert rows["ast.py"] == "ast"


def test_the_manifest_of_a_run_tells_the_overlap_with_the_training_text(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}").write_bytes(os.urandom(3000))
    corpus = open_corpus(f"path:{folder}")
    tested, trained = corpus.part("test")[0], corpus.part("train")[0]
    tested.path.write_bytes(tested.content[:1500] + trained.content[:1500])
    spec = RunSpec(("toy:uniform",), ("long_ppl:block=32",), f"path:{folder}", (64,), 4096, 64)
    run = open_run(prepare(make_plan(spec), tmp_path, None, False))
    rows = {d["name"]: d for d in run.manifest["corpus"]["documents"]}
    assert rows[tested.name]["overlap"] == pytest.approx(1451 / 2951, abs=1e-6)
    assert {name for name, d in rows.items() if "overlap" in d} == {d.name for d in corpus.part("test")}


# -- data sets -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder that ``datasets`` reads without a network: eight rows, one of them empty."""
    pytest.importorskip("datasets", reason="the extra hf is not installed")
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = [{"text": "" if i == 3 else f"naïve row {i} " * 40, "other": f"{i}"} for i in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture
def _quiet_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("_quiet_datasets")
def test_each_row_of_a_data_set_is_a_document(rows: Path) -> None:
    corpus = open_corpus(f"hf:{rows}")
    assert [d.name for d in corpus.documents] == [f"train-{i}" for i in range(8) if i != 3]
    for d in corpus.documents:
        expected = f"naïve row {d.name[-1]} ".encode() * 40
        assert (d.content, d.size, d.sha256) == (expected, len(expected), hashlib.sha256(expected).hexdigest())
    assert all(corpus.part(s) for s in SPLITS)
    other = open_corpus(f"hf:{rows}:train:column=other")
    assert {d.content for d in other.documents} == {str(i).encode() for i in range(8)}
    cut = open_corpus(f"hf:{rows}", 100)
    assert b"".join(d.content for d in cut.documents if d.name.startswith("train-5")) == "naïve row 5 ".encode() * 40
    assert {d.cluster for d in cut.documents if d.name.startswith("train-5")} == {"train-5"}


@pytest.mark.usefixtures("_quiet_datasets")
@pytest.mark.parametrize(
    ("rest", "says"),
    [
        (":test", "cannot open"),
        (":column=words", "it has text, other"),
        (":a:b", "expected hf:NAME"),
        ("/no", "cannot open"),
    ],
)
def test_what_a_data_set_does_not_have_is_said(rows: Path, rest: str, says: str) -> None:
    with pytest.raises(CorpusError, match=says):
        open_corpus(f"hf:{rows}{rest}")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"bdh-bench\[hf\]"):
        open_corpus("hf:anything")
