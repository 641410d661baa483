"""Is what a longer context is worth told from the rows, past T as the interval says, and not at all where models learned too little?"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import Losses, usual_loss, write_run

from bdh_bench.results import statistics
from bdh_bench.results.assessment import Assessment, assess
from bdh_bench.results.claims import answer_of
from bdh_bench.results.decisions import Why
from bdh_bench.results.extrapolation import Sweep
from bdh_bench.results.report.page import content_of, render
from bdh_bench.results.store import Run

TRIO = ("bdh@1m", "llama@1m", "yardstick")


def made(root: Path, losses: Losses, models: tuple[str, ...] = ("bdh@1m", "mamba@1m"), **options: Any) -> Run:
    return write_run(root, documents=24, models=models, tasks=("long_ppl",), crash=None, losses=losses, **options)


def beyond(slope: float, noise: float = 0.0) -> Losses:
    """Down by 0.02 per doubling to T = 256, then by ``slope`` per doubling, with noise by document."""

    def losses(family: str, document: int, context: int, seed: int) -> float:
        own = 2.3 + 0.3 * math.sin(1.7 * document) - 0.02 * math.log2(min(context, 256) / 128)
        past = max(0.0, math.log2(context / 256))
        return own + past * (slope + noise * math.sin(2.9 * document + context))

    return losses


def sweep(run: Run, model: str = "bdh@1m") -> Sweep:
    (found,) = (s for s in assess(run).sweeps if s.model == model)
    return found


@pytest.mark.parametrize(
    ("slope", "noise", "verdict", "says"),
    [
        (-0.02, 0.002, "uses", "it uses context beyond its training context"),
        (0.0, 0.02, "flat", "flat: the interval contains 0"),
        (0.04, 0.002, "degrades", "it degrades beyond its training context"),
    ],
)
def test_the_verdict_past_t_is_the_interval(
    tmp_path: Path, slope: float, noise: float, verdict: str, says: str
) -> None:
    run = made(tmp_path, beyond(slope, noise))
    found = sweep(run)
    assert (found.base, found.verdict) == (256, verdict)
    assert [step.context for step in found.beyond] == [512, 1024, 2048]
    rows = {
        c: {r.sample: (r.value or 0.0, r.weight) for r in run.records if (r.family, r.context) == ("bdh", c)}
        for c in (256, 2048)
    }
    assert found.beyond[-1].beyond == statistics.paired_difference(rows[2048], rows[256])
    texts = [claim.text for claim in answer_of(run).claims if claim.topic == "context"]
    assert any(says in text and "from 256 to 2,048 bytes" in text for text in texts)


def test_the_first_context_that_is_worse_by_005(tmp_path: Path) -> None:
    run = made(tmp_path, beyond(0.04))
    assert sweep(run).first_worse == 1024  # +0.04 at 512, +0.08 at 1,024
    assert any("worse by more than 0.05 from 1,024 bytes on" in claim.text for claim in answer_of(run).claims)
    assert sweep(made(tmp_path / "b", beyond(-0.01))).first_worse is None


def with_half(run: Run, change: float, noise: float = 0.002) -> Run:
    """The run with scores of half the training at T = 256 and at 1,024 bytes, ``change`` apart."""
    rows = []
    for r in run.records:
        if r.metric == "bits_per_byte" and r.context in (256, 1024):
            own = 2.9 + 0.2 * math.sin(1.3 * int(r.sample[3:-4]))
            past = (change + noise * math.sin(3.7 * int(r.sample[3:-4]))) if r.context == 1024 else 0.0
            about = {"metric": "halfway_bits_per_byte", "metric_id": f"bpb@halfway,c={r.context},S=128"}
            rows.append(replace(r, value=own + past, **about))
    return replace(run, records=(*run.records, *rows))


@pytest.mark.parametrize(
    ("change", "verdict", "says"),
    [
        (-0.05, "uses", "more training changes it: at 1,024 bytes the verdict was 'uses' at half of the training and is 'degrades'"),
        (0.05, "degrades", "at 1,024 bytes the verdict was 'degrades' at half of the training already"),
    ],
)  # fmt: skip
def test_a_verdict_that_more_training_changes_says_so(tmp_path: Path, change: float, verdict: str, says: str) -> None:
    plain = made(tmp_path, beyond(0.04, 0.002))
    run = with_half(plain, change)
    half, bare = sweep(run).halfway, sweep(plain)
    assert half is not None
    assert (half.context, half.verdict, half.final) == (1024, verdict, "degrades")
    assert half.change.value == pytest.approx(change, abs=1e-3)
    assert half.differs == (verdict == "uses")
    texts = [claim.text for claim in answer_of(run).claims if claim.topic == "context"]
    assert any(says in text for text in texts)
    assert bare.halfway is None
    assert replace(sweep(run), halfway=None) == bare  # no headline number has anything of it
    compared = [c for c in assess(run).comparisons if c.point.metric == "halfway_bits_per_byte"]
    assert not compared
    (table,) = (t for t in assess(run).tables() if t.id == "table-extrapolation")
    assert table.columns[-1] == "at half of the training"
    assert table.rows[0][-1].text == f"{verdict}, then degrades"
    assert "at half of the training" not in " ".join(c.text for c in answer_of(plain).claims)


def test_few_documents_do_not_say_whether_more_training_changes_anything(tmp_path: Path) -> None:
    run = write_run(tmp_path, documents=4, models=("bdh@1m",), tasks=("long_ppl",), crash=None, losses=beyond(0.1))
    half = sweep(with_half(run, -0.1)).halfway
    assert half is not None
    assert (half.verdict, half.differs) == ("undecided", False)


def test_gain_slope_and_effective_context(tmp_path: Path) -> None:
    found = sweep(made(tmp_path, beyond(-0.002)))
    assert [step.gain for step in found.steps] == pytest.approx([0.0, 0.02, 0.022, 0.024, 0.026])
    assert [step.slope for step in found.steps[1:]] == pytest.approx([-0.02, -0.002, -0.002, -0.002])
    assert found.steps[0].slope is None
    assert found.effective == 512  # at T 0.006 above the end, at 512 bytes 0.004


def test_a_context_that_only_seems_enough_is_not_the_effective_one(tmp_path: Path) -> None:
    """By its mean 512 bytes would do; the upper limit of the difference says that this is not known."""
    found = sweep(made(tmp_path, beyond(0.0, 0.02)))
    assert any(step.value - found.steps[-1].value < 0.005 for step in found.steps[:-1])
    assert found.effective == 2048


def test_seeds_are_averaged_by_document(tmp_path: Path) -> None:
    def fickle(family: str, document: int, context: int, seed: int) -> float:
        return beyond(0.0)(family, document, context, seed) + (0.03 * (-1) ** seed if context > 256 else 0.0)

    found = sweep(made(tmp_path, fickle, seeds=2))
    assert found.beyond[-1].beyond is not None
    assert found.beyond[-1].beyond.value == pytest.approx(0.0)
    assert (found.seeds, found.beyond[-1].beyond.n) == (2, 24)


def test_a_model_that_stops_at_t_has_no_verdict(tmp_path: Path) -> None:
    run = made(tmp_path, usual_loss, models=("bdh@1m", "gpt2@1m"))
    found = sweep(run, "gpt2@1m")
    assert (found.verdict, found.base) == (None, 256)
    assert any("this gpt2 checkpoint" in c.text and "from 128 to 256" in c.text for c in answer_of(run).claims)


def test_few_documents_decide_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path, documents=4, models=("bdh@1m",), tasks=("long_ppl",), crash=None, losses=beyond(0.1))
    assert sweep(run).verdict == "undecided"
    assert sweep(run).effective is None


# -- undertrained ----------------------------------------------------------------------------------------------------


def learned(share: float) -> Losses:
    """A yardstick that gains 0.2 up to T, and models that capture a share of it."""

    def losses(family: str, document: int, context: int, seed: int) -> float:
        level = {"yardstick": 3.0, "llama": 2.4}.get(family, 2.3) + 0.3 * math.sin(1.7 * document)
        return level - 0.2 * (1.0 if family == "yardstick" else share) * math.log2(context / 128)

    return losses


def judged(root: Path, share: float, models: tuple[str, ...] = TRIO) -> Assessment:
    return assess(made(root, learned(share), models))


@pytest.mark.parametrize(("share", "status"), [(0.19, "undertrained"), (0.21, "sufficient"), (1.5, "sufficient")])
def test_a_fifth_of_the_yardsticks_gain_is_needed(tmp_path: Path, share: float, status: str) -> None:
    training = judged(tmp_path, share).training
    assert (training.status, training.share) == (status, pytest.approx(share))


def test_an_undertrained_run_says_nothing_about_long_contexts(tmp_path: Path) -> None:
    run = made(tmp_path, learned(0.1), TRIO)
    answer = answer_of(run)
    assert "undertrained" in answer.assessment.labels
    assert [c for c in answer.claims if c.topic == "context" and "Undertrained" not in c.text] == []
    assert all("At 256 bytes" in c.text for c in answer.claims if c.topic == "quality")
    assert all("2,048" not in c.text and "1,024" not in c.text for c in answer.claims if c.topic != "memory")
    assert any(claim.text.startswith("Anything about long contexts: undertrained") for claim in answer.open)
    barred = {c.context: c.decision.has(Why.UNDERTRAINED) for c in answer.assessment.comparisons}
    assert barred == {128: False, 256: False, 512: True, 1024: True, 2048: True}
    assert ">undertrained</span>" in render(content_of(run))


def test_a_trained_run_keeps_its_sentences_and_the_yardstick_competes_with_nobody(tmp_path: Path) -> None:
    answer = answer_of(made(tmp_path, learned(0.9), TRIO))
    assert answer.assessment.labels == ("smoke",)
    assert any("2,048" in c.text for c in answer.claims if c.topic == "context")
    assert {(c.first, c.second) for c in answer.assessment.comparisons} == {("bdh@1m", "llama@1m")}


def test_the_best_transformer_is_what_counts(tmp_path: Path) -> None:
    def losses(family: str, document: int, context: int, seed: int) -> float:
        return learned(0.9 if family == "llama" else 0.0)(family, document, context, seed) + (family == "gpt2") * 0.5

    known = assess(made(tmp_path, losses, ("bdh@1m", "gpt2@1m", "llama@1m", "yardstick")))
    assert known.training.status == "sufficient"
    assert "llama" in known.training.text


@pytest.mark.parametrize(
    ("models", "says"),
    [(("bdh@1m", "llama@1m"), "no yardstick"), (("bdh@1m", "mamba@1m", "yardstick"), "no transformer")],
)
def test_without_a_yardstick_or_a_transformer_nothing_is_judged(
    tmp_path: Path, models: tuple[str, ...], says: str
) -> None:
    run = made(tmp_path, learned(0.0), models)
    assert says in assess(run).training.text
    assert assess(run).training.status == "not judged"
    assert any(says in claim.text for claim in answer_of(run).open)


def test_a_yardstick_without_gain_or_random_transformers_judge_nothing(tmp_path: Path) -> None:
    flat: Losses = lambda family, document, context, seed: 2.3 + 0.01 * document  # noqa: E731
    assert "gains nothing" in assess(made(tmp_path / "a", flat, TRIO)).training.text
    run = made(tmp_path / "b", learned(0.0), TRIO)
    random = tuple(replace(r, weights="random") for r in run.records)
    assert "no trained transformer" in assess(replace(run, records=random)).training.text
