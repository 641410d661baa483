"""Do lm-eval's numbers for our models mean what ours mean, whichever way they are asked for, and is nothing read twice?"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'bdh-bench[lm-eval]')")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate

from bdh_bench import load_model
from bdh_bench.data.corpus import open_corpus
from bdh_bench.errors import LawError, MissingExtraError, PositionLimitError, SpecError, UnknownNameError
from bdh_bench.lm_eval import __main__ as command
from bdh_bench.lm_eval import catalogue, documents
from bdh_bench.lm_eval.adapter import BenchLM, ByteLM, TokenLM, settings_of, wrap
from bdh_bench.lm_eval.prefixes import PrefixScorer, Request
from bdh_bench.lm_eval.windows import Windowing, score_rolling
from bdh_bench.results.report.write import write_report
from bdh_bench.results.store import Run
from bdh_bench.results.tables import points_of, value_tables
from bdh_bench.results.terminal import renderable
from bdh_bench.runner.plan import make_plan
from bdh_bench.runner.run import execute, prepare
from bdh_bench.spec import RunSpec, parse_tasks
from bdh_bench.tasks import lm_eval as lm_eval_task
from bdh_bench.types import Measurement, TaskContext

TINY = "bdh:mlp_internal_dim_multiplier=4:n_embd=16:n_head=2:n_layer=1"
TEXTS = ("def f(x):\n    return x\n", "naïve 🐉 text\r\n" * 30, "".join(chr(32 + i * 7 % 90) for i in range(1300)))


def _asked(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def _nats(model: Any, before: list[int], after: list[int]) -> tuple[float, bool]:
    """The truth: one full forward."""
    ids = torch.tensor([*before, *after])
    with torch.inference_mode():
        logits = model.logits(ids[None, :-1])[0, len(before) - 1 :].double()
    picked = logits.log_softmax(-1).gather(1, ids[len(before) :, None])
    return float(picked.sum()), bool((logits.argmax(-1) == ids[len(before) :]).all())


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load_model(TINY)


# -- likelihoods ---------------------------------------------------------------------------------------------------------


def test_rolling_is_the_full_forward(tiny: Any) -> None:
    lm = wrap(tiny)
    answers = lm.loglikelihood_rolling([_asked("loglikelihood_rolling", text) for text in TEXTS])
    for text, answer in zip(TEXTS, answers, strict=True):
        truth, _ = _nats(tiny, [10], list(text.encode()))
        assert answer == pytest.approx(truth, rel=1e-6)
    assert sorted(len(u.bits) for u in lm.positions.values()) == sorted(len(t.encode()) for t in TEXTS)
    assert -math.log(2) * sum(u.bits.astype(float).sum() for u in lm.positions.values()) == pytest.approx(sum(answers))


def test_likelihoods_and_greed_of_bytes_are_those_of_the_full_forward(tiny: Any) -> None:
    with torch.inference_mode():
        first = int(tiny.logits(torch.tensor([[10, *b"ab"]]))[0, -1].argmax())
    asked = [
        ("ab", chr(first) if first < 128 else "x"),
        ("ab ", "cd"),
        ("", "ab"),
        ("ab", " cd"),
        ("é", "é"),
        ("ab", "cd"),
    ]
    answers = wrap(tiny).loglikelihood([_asked("loglikelihood", *pair) for pair in asked])
    for (context, continuation), answer in zip(asked, answers, strict=True):
        truth = _nats(tiny, [10, *context.encode()], list(continuation.encode()))
        assert answer[0] == pytest.approx(truth[0], abs=1e-5)
        assert answer[1] == truth[1]
    assert answers[0][1] == (first < 128)


def test_greedy_means_every_token() -> None:
    lm = wrap(load_model("toy:copy:period=4"))  # after abcd it writes abcd
    asked = [_asked("loglikelihood", "abcd", text) for text in ("abcd", "ax", "xb", "a", "x")]
    assert [greedy for _, greedy in lm.loglikelihood(asked)] == [True, False, False, True, False]


_WORDS = st.lists(st.sampled_from(b"ab"), max_size=7)


@example([([97], [97]), ([], [97, 97])], 2**30)
@example([([97, 98, 97], [97]), ([97], [98, 97, 98]), ([97], [98])], 2**30)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(_WORDS, _WORDS), min_size=1, max_size=8), st.sampled_from([0, 20_000, 2**30]))
def test_the_walk_gives_what_each_request_gives_alone(pairs: list[tuple[list[int], list[int]]], budget: int) -> None:
    model = load_model(TINY)
    requests = [Request(np.array([10, *before, *after]), 1 + len(before)) for before, after in pairs]
    scorer = PrefixScorer(model, budget)
    answers = dict(scorer.score(requests))
    assert sorted(answers) == list(range(len(pairs)))
    for index, (before, after) in enumerate(pairs):
        truth = _nats(model, [10, *before], after) if after else (0.0, True)
        assert answers[index].nats.sum() == pytest.approx(truth[0], abs=1e-5)
        assert len(answers[index].nats) == len(after)
    assert scorer.store.peak <= budget
    assert scorer.store.held == 0
    read = {tuple(r.ids[:n]) for r in requests if len(r.ids) > r.first for n in range(1, len(r.ids))}
    if budget == 2**30:  # every distinct prefix once; a start symbol alone may be read again
        assert scorer.tokens_read <= len(read) + len(pairs)


def _choice(model: Any, reuse: bool, budget: int = 2**27) -> tuple[BenchLM, dict[str, Any]]:
    lm = wrap(model, settings_of("stop", budget, "empty", reuse))
    known = catalogue.manager(metadata={"documents": 2})
    found = simple_evaluate(lm, tasks=["bdh_stdlib_choice"], task_manager=known, bootstrap_iters=0)
    return lm, found


def test_four_options_over_one_context_read_a_third_of_the_tokens_and_rank_alike(tiny: Any) -> None:
    (reusing, a), (naive, b), (starved, c) = _choice(tiny, True), _choice(tiny, False), _choice(tiny, True, 3000)
    assert reusing.scorer.tokens_read <= naive.scorer.tokens_read / 3
    # each of the naive ones reads everything but its last token
    assert naive.scorer.tokens_read == naive.scorer.tokens_alone == reusing.scorer.tokens_alone
    assert 0 < reusing.scorer.store.peak <= 2**27
    assert starved.scorer.store.peak <= 3000
    assert starved.scorer.tokens_read > reusing.scorer.tokens_read
    for x, y, z in zip(*(f["samples"]["bdh_stdlib_choice"] for f in (a, b, c)), strict=True):
        one, two, three = ([r[0][0] for r in s["resps"]] for s in (x, y, z))
        assert one == pytest.approx(two, abs=1e-5)
        assert one == pytest.approx(three, abs=1e-5)
        assert np.argsort(one).tolist() == np.argsort(two).tolist() == np.argsort(three).tolist()
        assert [r[0][1] for r in x["resps"]] == [r[0][1] for r in y["resps"]]


def test_a_budget_for_one_state_keeps_one(tiny: Any) -> None:
    requests = [
        Request(np.array([10, *text]), len(text)) for text in (b"aaaaaaab", b"aaaaaaac", b"aaaadddb", b"aaaadddc")
    ]
    free = PrefixScorer(tiny)
    scores = dict(free.score(requests))
    one = PrefixScorer(tiny, budget=free.store.peak // 2)
    again = dict(one.score(requests))
    assert 0 < one.store.peak <= free.store.peak // 2
    assert free.tokens_read == 8 + 3  # a turn after five tokens and two after eight
    assert one.tokens_read == 8 + 8  # the stream after eight replaced the one after five, which was used longer ago
    assert all(again[i].nats == pytest.approx(scores[i].nats, abs=1e-5) for i in scores)


# -- positions -----------------------------------------------------------------------------------------------------------


def test_a_model_with_a_last_position_stops_there_or_slides_when_told() -> None:
    model = load_model("gpt2:n_layer=1:n_embd=16:n_head=2:max_positions=48")
    text = "a stream of characters that is longer than the table of positions of this model, by far"
    with pytest.raises(PositionLimitError, match="windowing=sliding"):
        wrap(model).loglikelihood_rolling([_asked("loglikelihood_rolling", text)])
    with pytest.raises(PositionLimitError, match="never truncated"):
        wrap(model).loglikelihood([_asked("loglikelihood", text, "x"), _asked("loglikelihood", "a", "b")])
    lm = wrap(model, settings_of("sliding:16", 0, "empty"))
    (answer,) = lm.loglikelihood_rolling([_asked("loglikelihood_rolling", text)])
    ids, truth = [10, *text.encode()], 0.0
    for done in range(1, len(ids)):  # window by hand: 48 tokens first, then 16 at a time after the 32 before them
        stop = 49 if done < 49 else 49 + ((done - 49) // 16 + 1) * 16
        window = ids[max(0, min(stop, len(ids)) - 1 - 48) : done + 1]
        truth += _nats(model, window[:-1], window[-1:])[0]
    assert answer == pytest.approx(truth, rel=1e-6)
    assert lm.scoring == "window=48,stride=16"
    assert wrap(load_model(TINY), settings_of("sliding:16", 0, "empty")).scoring == "stream,state=carry"
    for wrong in ("sliding", "sliding:0", "slide:3"):
        with pytest.raises(SpecError, match="windowing"):
            Windowing.parse(wrong)
    with pytest.raises(SpecError, match="stride"):
        score_rolling(model, text.encode(), Windowing(99))


# -- generation ----------------------------------------------------------------------------------------------------------


def test_generation_is_greedy_stops_at_the_first_stop_and_counts_its_tokens(tiny: Any) -> None:
    ids = [10, *b"def "]
    for _ in range(12):
        with torch.inference_mode():
            ids.append(int(tiny.logits(torch.tensor([ids]))[0, -1].argmax()))
    written = bytes(ids[5:])
    lm = wrap(tiny)

    def ask(**how: Any) -> str:
        return lm.generate_until([_asked("generate_until", "def ", {"max_gen_toks": 12, **how})])[0]

    assert ask() == ask(until=None, do_sample=False) == written.decode(errors="replace")
    assert ask(max_gen_toks=3) == written[:3].decode(errors="replace")
    printable = load_model("toy:copy:period=4")  # writes what it saw four bytes ago
    copy = wrap(printable)
    (text,) = copy.generate_until([_asked("generate_until", "abcd", {"until": ["da", "c"], "max_gen_toks": 9})])
    assert text == "ab"
    (text,) = copy.generate_until([_asked("generate_until", "abcd", {"until": ["c", "bc"], "max_gen_toks": 9})])
    assert text == "a"  # both end at the same byte: the one that begins first
    (text,) = copy.generate_until([_asked("generate_until", "abcd", {"until": "cda", "max_new_tokens": 9})])
    assert text == "ab"
    for how in ({"do_sample": True}, {"temperature": 0.7}, {"num_beams": 4}):
        with pytest.raises(SpecError, match="greedy"):
            ask(**how)
    with pytest.raises(PositionLimitError):
        wrap(load_model("gpt2:n_embd=16:n_head=2:max_positions=8")).generate_until(
            [_asked("generate_until", "abcd", {"max_gen_toks": 9})]
        )


# -- tokens that are not bytes, and lm-eval's own class as the judge ----------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of two tiny random checkpoints with a byte-level BPE trained on a few lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    lines = ["the old house stood on a hill and nobody had lived there since winter came early that year"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|end|>", eos_token="<|end|>")
    size = {"vocab_size": len(fast), "bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gpt = GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3, **size)
        )
        llama = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=128,
                initializer_range=0.3,
                **size,
            )
        )
    folders = {"gpt2": tmp_path_factory.mktemp("gpt2"), "llama": tmp_path_factory.mktemp("llama")}
    for module, folder in ((gpt, folders["gpt2"]), (llama, folders["llama"])):
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            module.save_pretrained(folder)
        fast.save_pretrained(folder)
    return folders


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_our_numbers_are_those_of_lm_evals_own_class(published: dict[str, Path], name: str) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval's own class needs accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(published[name]).eval()
    fast = AutoTokenizer.from_pretrained(published[name])
    theirs = huggingface.HFLM(pretrained=module, tokenizer=fast, device="cpu", batch_size=1)
    ours = wrap(load_model(f"hf:{published[name]}"))
    assert isinstance(ours, TokenLM)
    pairs = [
        ("the old house", " stood on a hill"),
        ("the old house ", "stood"),
        ("", "nobody had lived"),
        ("a hill", "s"),
        ("the", " old"),
    ]
    asked = [_asked("loglikelihood", *pair) for pair in pairs]
    for mine, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-4)
        assert mine[1] == other[1]
    rolled = [
        _asked("loglikelihood_rolling", text) for text in ("winter came early that year", "x", "the house\n and 12")
    ]
    assert ours.loglikelihood_rolling(rolled) == pytest.approx(theirs.loglikelihood_rolling(rolled), abs=1e-4)
    how = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    written = [_asked("generate_until", "the old house", dict(how)), _asked("generate_until", "winter", dict(how))]
    assert ours.generate_until(written) == theirs.generate_until(written)


def test_a_start_symbol_before_every_context_is_asked_for_and_named(published: dict[str, Path]) -> None:
    model = load_model(f"hf:{published['gpt2']}")
    always = wrap(model, settings_of("stop", 0, "always"))
    before, after = model.tokenizer.encode(b"the old").ids.tolist(), model.tokenizer.encode(b" house").ids.tolist()
    (answer,) = always.loglikelihood([_asked("loglikelihood", "the old", " house")])
    assert answer[0] == pytest.approx(_nats(model, [0, *before], after)[0], abs=1e-5)
    assert always.scoring.endswith("start=always")
    with pytest.raises(UnknownNameError, match="start rule"):
        settings_of("stop", 0, "sometimes")


def test_without_a_start_symbol_the_first_token_is_context(tiny: Any) -> None:
    model = load_model(TINY)
    model.start_symbol = None
    lm = wrap(model)
    (answer,) = lm.loglikelihood([_asked("loglikelihood", "", "abc")])
    assert answer[0] == pytest.approx(_nats(model, [*b"a"], [*b"bc"])[0], abs=1e-5)
    assert lm.scoring.endswith("start=none")


# -- lm-eval's evaluator, its command line, its cache -------------------------------------------------------------------


def test_offline_tasks_ask_the_same_each_time_and_the_right_option_follows() -> None:
    by_name = {d.name: d.content.decode(errors="ignore") for d in open_corpus("stdlib").part("test")}
    rows = list(documents.choices(documents=12)["test"])
    assert rows == list(documents.choices(documents=12)["test"])
    assert len({row["gold"] for row in rows}) == 4
    for row in rows:
        text = by_name[row["bdh_document"]]
        assert row["context"] + row["choices"][row["gold"]] in text
        assert len(set(row["choices"])) == 4
        assert all(option in text for option in row["choices"])
    for row in documents.clozes(documents=12)["test"]:
        text = by_name[row["bdh_document"]]
        assert row["context"] + row["answer"] in text
        assert row["context"][-3:] + row["answer"] in row["context"][:-3]  # the name was used before
    for row in documents.streams(documents=3, stream_bytes=700)["test"]:
        assert by_name[row["bdh_document"]].startswith(row["text"])


def test_the_model_is_registered_and_says_who_it_is(tmp_path: Path) -> None:
    from lm_eval.api.registry import get_model

    assert get_model("bdh_bench") is BenchLM
    lm = get_model("bdh_bench").create_from_arg_string(
        f"spec={TINY},seed=3,windowing=sliding:8", {"device": "cpu", "batch_size": 1}
    )
    assert isinstance(lm, ByteLM)
    info = lm.get_model_info()
    assert info["model_num_parameters"] == lm.model.parameter_count()
    assert info["state_bytes"]["1024"] == lm.model.state_bytes(1, 1024)
    assert (info["model_dtype"], info["state_dtypes"]) == ("torch.float32", ["torch.float32"])
    assert lm.fingerprint != wrap(load_model(TINY, seed=4)).fingerprint
    for arguments in ("device=cpu", f"spec={TINY},windwing=stop", f"spec={TINY},batch_size=4"):
        with pytest.raises(SpecError):
            BenchLM.create_from_arg_string(arguments)


def test_a_cache_answers_for_its_own_model_only(tmp_path: Path) -> None:
    known = catalogue.manager(metadata={"documents": 2, "stream_bytes": 200})
    one, two = wrap(load_model(TINY, seed=0)), wrap(load_model(TINY, seed=1))

    def bits(lm: BenchLM, path: str | None) -> float:
        how: dict[str, Any] = {"task_manager": known, "bootstrap_iters": 0, "use_cache": path}
        found = simple_evaluate(lm, tasks=["bdh_stdlib_bpb"], **how)
        return float(found["results"]["bdh_stdlib_bpb"]["bits_per_byte,none"])

    path = str(tmp_path / "cache")
    with pytest.raises(SpecError, match="another model's scores"):
        bits(one, path)
    first = bits(one, one.cache_path(path))
    assert bits(two, two.cache_path(path)) == bits(two, None) != first
    again = wrap(load_model(TINY, seed=0))
    assert bits(again, again.cache_path(path)) == first
    assert not again.positions  # nothing ran: the cache answered
    with pytest.raises(SpecError, match="another model's scores"):
        bits(two, one.cache_path(path))


def test_the_command_line_runs_offline_and_renames_the_cache(tmp_path: Path) -> None:
    asked = f"--model bdh_bench --model_args spec={TINY} --tasks bdh_stdlib_bpb --limit 2 --metadata stream_bytes=600".split()
    said = subprocess.run(
        [sys.executable, "-m", "bdh_bench.lm_eval", *asked, "--use_cache", "c", "--output_path", "out"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )
    assert "bits_per_byte" in said.stdout
    (cache,) = tmp_path.glob("c.*_rank0.db")
    assert wrap(load_model(TINY)).fingerprint[:16] in cache.name
    (file,) = (tmp_path / "out").rglob("results_*.json")
    stored = json.loads(file.read_text())
    assert stored["results"]["bdh_stdlib_bpb"]["bits_per_byte,none"] == pytest.approx(8.0, abs=0.3)
    assert stored["config"]["fingerprint"] == wrap(load_model(TINY)).fingerprint


def test_its_errors_are_ours_there_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--model_args", "spec=bhd", "--tasks", "bdh_stdlib_bpb", "--use_cache", "c"])
    assert command.main() == 2
    assert "did you mean 'bdh'" in capsys.readouterr().err


def test_a_task_that_is_nowhere_is_a_usage_error_there_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval._cli import HarnessCLI

    def fail(*_: Any) -> None:
        raise ValueError("Tasks not found: nosuch")  # as theirs does, after half a minute in its own thousands

    monkeypatch.setattr(HarnessCLI, "execute", fail)
    monkeypatch.setattr(sys, "argv", ["x", "--model_args", "spec=bdh", "--tasks", "nosuch"])
    assert command.main() == 2
    said = capsys.readouterr().err
    assert "error: Tasks not found: nosuch · expected" in said
    assert "Traceback" not in said


# -- our command line ----------------------------------------------------------------------------------------------------

_MINE = """task: mine
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
metadata:
  version: 2.0
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run: the same documents as streams by long_ppl and through lm-eval, and its own tasks."""
    root = tmp_path_factory.mktemp("lm-eval")
    books = root / "books"
    books.mkdir()
    (root / "tasks").mkdir()
    rows, words = [], ["the", "old", "house", "stood", "on", "a", "hill"]
    for i in range(6):
        text = " ".join(words[(j * (i + 3) + j // 7) % 7] for j in range(300))
        (books / f"book{i}.txt").write_text(text)
        rows.append({"bdh_document": f"book{i}.txt", "text": text[:600]})
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "tasks" / "mine.yaml").write_text(_MINE.format(file=root / "rows.jsonl"))
    spec = RunSpec(
        (TINY,),
        (
            "long_ppl:block=32:blocks=1:stream_bytes=600",
            f'lm_eval:"mine,bdh_stdlib_choice,bdh_stdlib_cloze":limit=6:include={root / "tasks"}',
        ),
        data=f"path:{books}",
        contexts=(64,),
        train_bytes=2048,
        train_context=64,
        threads=1,
        learning_rate=1e-3,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(root / "hf"))
        patch.setenv("BDH_BENCH_CACHE", str(root / "cache"))
        plan = make_plan(spec)
        return execute(plan, prepare(plan, root / "runs", None, False), lambda *a: None, 120.0)


def test_lm_evals_bits_per_byte_are_ours(run: Run) -> None:
    rows = {
        task: {r.sample: r for r in run.records if r.model == TINY and r.metric == metric}
        for task, metric in (("stream", "stream_bits_per_byte"), ("lm-eval", "lm_eval_bits_per_byte"))
    }
    assert rows["stream"]
    assert len(rows["lm-eval"]) == 6
    for name, row in rows["stream"].items():
        assert rows["lm-eval"][name].value == pytest.approx(row.value, abs=1e-6)
        assert rows["lm-eval"][name].weight == row.weight == 600
    (metric_id,) = {r.metric_id for r in rows["lm-eval"].values()}
    assert metric_id == "bits_per_byte@lm-eval=0.4.13,task=mine,v=2.0,shots=0,limit=6,stream,state=carry"
    assert {r.weights for r in rows["lm-eval"].values()} == {"trained"}


def test_the_rows_of_a_run_are_values_gaps_and_intervals(run: Run) -> None:
    assert [c.status for c in run.cells] == ["ok"] * 2
    points = {(p.model, p.metric): p for p in points_of(run) if p.task.startswith("lm_eval:")}
    bits = points[TINY, "lm_eval_bits_per_byte"]
    assert bits.low is not None
    assert bits.high is not None
    assert bits.low <= bits.value <= bits.high  # type: ignore[operator]
    assert points[TINY, "lm_eval_accuracy"].n == 3  # two questions of one document are resampled together
    assert {"lm_eval_accuracy_norm", "lm_eval_exact_match"} <= {metric for _, metric in points}
    assert not {r.metric for r in run.records} & {"lm_eval_score"}  # perplexities are no rows of their own


def test_a_model_that_is_too_short_is_a_gap_in_every_metric_of_the_task() -> None:
    config = lm_eval_task.Config(names="bdh_stdlib_bpb,bdh_stdlib_choice", limit=1)
    context = TaskContext(0, None, (64,), 64, (), "random", False, lambda *a: None)
    rows = list(lm_eval_task.run(load_model("gpt2:n_layer=1:n_embd=16:n_head=2:max_positions=352"), config, context))
    stopped, *others = rows
    assert isinstance(stopped, Measurement)
    assert (stopped.metric, stopped.value, stopped.status) == ("lm_eval_bits_per_byte", None, "unsupported")
    assert "windowing=sliding" in stopped.reason
    assert [r.metric for r in others if isinstance(r, Measurement)] == ["lm_eval_accuracy", "lm_eval_accuracy_norm"]


def test_what_we_reduce_must_be_what_lm_eval_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = lm_eval_task._evaluate

    def off(*arguments: Any) -> dict[str, Any]:
        found = honest(*arguments)
        found["results"]["bdh_stdlib_choice"]["acc,none"] += 0.01
        return found

    monkeypatch.setattr(lm_eval_task, "_evaluate", off)
    context = TaskContext(0, None, (64,), 64, (), "random", False, lambda *a: None)
    with pytest.raises(LawError, match="lm-eval reports"):
        list(lm_eval_task.run(load_model(TINY), lm_eval_task.Config(names="bdh_stdlib_choice", limit=1), context))


def test_the_reading_half_shows_them(run: Run, tmp_path: Path) -> None:
    from rich.console import Console

    titles = [table.title for table in value_tables(points_of(run))]
    assert any(title.endswith("bits per byte (lm-eval)") for title in titles)
    assert any(title.startswith('lm_eval:"mine,bdh_stdlib_choice,bdh_stdlib_cloze"') for title in titles)
    with (tmp_path / "shown").open("w") as file:
        Console(file=file, width=200).print(renderable(run))
    assert "exact match (lm-eval)" in (tmp_path / "shown").read_text()
    page = Path(write_report(run, tmp_path / "report.html")["html"]).read_text()
    assert "accuracy (lm-eval)" in page


def test_answers_and_positions_are_kept_beside_the_rows(run: Run) -> None:
    files = [p for p in (run.path / "cells").rglob("lm_eval_mine.npz")]
    assert files
    with np.load(files[0]) as arrays:
        bits = [arrays[name] for name in arrays.files if name.startswith("bits_")]
        total = sum(float(b.astype(float).sum()) for b in bits)
        assert len(bits) == 6
        assert total == pytest.approx(-float(arrays["nats"].sum()) / math.log(2))


@pytest.mark.parametrize(
    ("text", "tasks"),
    [
        ("memory,lm_eval:a", ["memory", "lm_eval:a"]),
        ("lm_eval:a,b,memory", ['lm_eval:"a,b"', "memory"]),
        ("lm_eval:a,b:limit=2,c,latency:steps=2", ['lm_eval:"a,b,c":limit=2', "latency:steps=2"]),
        ('lm_eval:"a,memory",lm_eval:c', ['lm_eval:"a,memory"', "lm_eval:c"]),
        ('lm_eval:"a,b",c', ['lm_eval:"a,b,c"']),
    ],
)
def test_names_after_lm_eval_go_on_until_a_task_of_ours(text: str, tasks: list[str]) -> None:
    parsed = [str(task) for task in parse_tasks(text, {"memory", "latency", "lm_eval"})]
    assert parsed == tasks
    assert [str(task) for task in parse_tasks(",".join(parsed), {"memory", "latency", "lm_eval"})] == tasks


@pytest.mark.parametrize(
    ("task", "error", "says"),
    [
        ("lm_eval", SpecError, "lm_eval:NAMES"),
        ("lm_eval:bdh_stdlib_bpd", UnknownNameError, "did you mean 'bdh_stdlib_bpb'"),
        ("lm_eval:bdh_stdlib_bpb:limit=none", SpecError, "whole number"),
        ("lm_eval:bdh_stdlib_bpb:lmit=3", UnknownNameError, "limit"),
        ("lm_eval:bdh_stdlib_bpb:names=x", UnknownNameError, "option"),
        ("lm_eval:bdh_stdlib_bpb:stock=maybe", SpecError, "on or off"),
        ("lm_eval:bdh_stdlib_bpb:include=/nowhere", SpecError, "no folder"),
        ('lm_eval:bdh_stdlib_bpb:windowing="sliding:x"', SpecError, "sliding:STRIDE"),
        ('lm_eval:"bdh_stdlib_bpb,bdh_stdlib_bpb"', SpecError, "distinct"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(task: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make_plan(RunSpec(("toy:uniform",), (task,)))


def test_without_lm_eval_the_command_that_adds_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'bdh-bench\[lm-eval\]'"):
        make_plan(RunSpec(("toy:uniform",), ("lm_eval:bdh_stdlib_bpb",)))


def test_a_changed_task_is_another_cell(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
    keys = set()
    for version in ("2.0", "3.0"):
        (tmp_path / "mine.yaml").write_text(_MINE.format(file=tmp_path / "rows.jsonl").replace("2.0", version))
        keys.add(make_plan(RunSpec(("toy:uniform",), (f"lm_eval:mine:include={tmp_path}",))).cells[0].key)
    assert len(keys) == 2
