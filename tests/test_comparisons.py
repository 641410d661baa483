"""Is a comparison drawn from the right rows, corrected over the declared family, and open about why it decides nothing?"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import synthetic_run
from synthetic_run import Losses, facts, usual_loss, write_run

from bdh_bench.metrics import METRICS
from bdh_bench.results import significance, statistics
from bdh_bench.results.assessment import assess
from bdh_bench.results.claims import answer_of
from bdh_bench.results.comparisons import Comparison
from bdh_bench.results.decisions import Why
from bdh_bench.results.export import assessment, export
from bdh_bench.results.store import Run
from bdh_bench.results.tables import points_of, value_tables
from bdh_bench.types import Record

PAIR = ("bdh@1m", "mamba@1m")


def made(root: Path, documents: int = 24, models: tuple[str, ...] = PAIR, **options: Any) -> Run:
    return write_run(root, documents=documents, models=models, tasks=("long_ppl",), crash=None, **options)


def at(run: Run, context: int, second: str = "mamba@1m") -> Comparison:
    (found,) = (c for c in assess(run).comparisons if c.context == context and c.second == second)
    return found


def changed(run: Run, family: str, change: Callable[[Record], Record]) -> Run:
    return replace(run, records=tuple(change(r) if r.family == family else r for r in run.records))


def with_facts(run: Run, family: str, **new: Any) -> Run:
    cells = tuple(replace(c, facts={**c.facts, **new}) if c.family == family else c for c in run.cells)
    return replace(run, cells=cells)


# -- what is drawn ---------------------------------------------------------------------------------------------------


def test_a_comparison_is_the_paired_difference_of_its_rows(tmp_path: Path) -> None:
    run = made(tmp_path)
    c = at(run, 1024)
    rows = {
        family: {r.sample: (r.value or 0.0, r.weight) for r in run.records if (r.family, r.context) == (family, 1024)}
        for family in ("bdh", "mamba")
    }
    assert c.difference == statistics.paired_difference(rows["bdh"], rows["mamba"])
    assert c.p == significance.sign_flip(statistics.cluster_differences([(rows["bdh"], rows["mamba"])])).value
    assert (c.claim, c.decision.verdict, c.documents, c.primary) == ("checkpoint", "better", 24, True)
    assert c.mde == pytest.approx(2.8 * (c.difference.se or 0) if c.difference else 0)


def test_holm_runs_over_the_declared_family_and_others_pay_for_all(tmp_path: Path) -> None:
    run = made(tmp_path, models=("bdh@1m", "gpt2@1m", "mamba@1m"))
    found = assess(run).comparisons
    primary = [c for c in found if c.primary]
    assert {(c.second, c.context) for c in primary} == {("gpt2@1m", 256), ("mamba@1m", 256), ("mamba@1m", 1024)}
    assert [c.holm for c in primary] == significance.holm([c.p or 0 for c in primary])
    everything = significance.holm([c.p or 0 for c in found])
    assert [c.holm for c in found if not c.primary] == [
        p for c, p in zip(found, everything, strict=True) if not c.primary
    ]


def test_five_seeds_make_an_architecture_claim_with_its_floor(tmp_path: Path) -> None:
    c = at(made(tmp_path, seeds=5), 256)
    assert (c.claim, len(c.pairs), c.decision.verdict) == ("architecture", 5, "better")
    assert c.p_seeds is not None
    assert (c.p_seeds.value, c.p_seeds.floor) == (0.0625, 0.0625)
    assert c.difference is not None
    assert c.difference.method == "t"
    assert c.evidence.second_look is not None
    own = [float(a.value or 0) - float(b.value or 0) for a, b in c.pairs]
    assert c.p == max(statistics.t_p_value(own), c.p_documents.value if c.p_documents else 1)


def test_seeds_that_disagree_decide_nothing_about_architectures(tmp_path: Path) -> None:
    """In every seed the documents are sure, but of another winner."""

    def fickle(family: str, document: int, context: int, seed: int) -> float:
        return usual_loss("bdh", document, context, 0) + (0.05 * (-1) ** seed if family == "mamba" else 0.0)

    c = at(made(tmp_path, seeds=5, losses=fickle), 256)
    assert c.decision.has(Why.CONTAINS_ZERO)
    assert c.decision.verdict == "undecided"


def test_equal_models_are_equivalent_and_the_sentence_says_so(tmp_path: Path) -> None:
    run = made(tmp_path, losses=alike)
    assert at(run, 256).decision.verdict == "equivalent"
    texts = [claim.text for claim in answer_of(run).claims if claim.topic == "quality"]
    assert all("equivalent: 90 % interval" in text and "inside ±0.02" in text for text in texts)
    strict = replace(run, manifest={**run.manifest, "spec": {**run.manifest["spec"], "equivalence_margin": 0.0001}})
    assert at(strict, 256).decision.verdict == "undecided"


def alike(family: str, document: int, context: int, seed: int) -> float:
    """The same model up to noise: ±0.004 by document."""
    return usual_loss("bdh", document, context, seed) + (0.004 * (-1) ** document if family == "mamba" else 0.0)


# -- clusters --------------------------------------------------------------------------------------------------------


def clustered(documents: int, books: int) -> dict[str, Any]:
    names = [{"name": f"doc{i}.txt", "cluster": f"book{i % books}"} for i in range(documents)]
    return {"corpus": {"name": "books", "documents": names}}


def by_book(family: str, document: int, context: int, seed: int) -> float:
    """Chapters of one book share the difference."""
    return usual_loss("bdh", document, context, seed) + (0.03 + 0.01 * (document % 6) if family == "mamba" else 0.0)


def test_clusters_of_the_manifest_widen_every_interval_and_are_what_is_counted(tmp_path: Path) -> None:
    loose = made(tmp_path / "a", losses=by_book)
    tied = made(tmp_path / "b", losses=by_book, manifest=clustered(24, 6))
    for run, independent in ((loose, 24), (tied, 6)):
        c = at(run, 256)
        assert (c.documents, c.evidence.documents) == (24, independent)
        assert c.decision.has(Why.FEW_DOCUMENTS) == (independent < 20)
    ends = [at(run, 256).difference for run in (loose, tied)]
    widths = [(e.high or 0) - (e.low or 0) for e in ends if e]
    assert widths[1] > 1.3 * widths[0]
    assert "24 documents in 6 clusters" in answer_of(tied).claims[0].text
    points = [next(p for p in points_of(run) if p.metric == "bits_per_byte") for run in (loose, tied)]
    assert points[0].value == points[1].value
    assert points[0].low != points[1].low


def test_fewer_than_five_clusters_have_no_interval_and_the_row_says_so(tmp_path: Path) -> None:
    run = made(tmp_path, manifest=clustered(24, 4))
    point = next(p for p in points_of(run) if p.metric == "bits_per_byte")
    assert (point.low, point.status) == (None, "ok")
    assert point.reason == "no interval: 4 independent documents, 5 are needed"
    assert value_tables(points_of(run))[0].note.endswith("No interval: 4 independent documents, 5 are needed.")


# -- what is never compared ------------------------------------------------------------------------------------------


def test_another_metric_id(tmp_path: Path) -> None:
    run = changed(made(tmp_path), "mamba", lambda r: replace(r, metric_id=f"bpb@c={r.context},S=64"))
    c = at(run, 256)
    assert c.decision.has(Why.METRIC_ID)
    assert (c.difference, c.p, c.decision.verdict) == (None, None, "undecided")
    assert "the metrics differ" in answer_of(run).claims[0].text


def test_other_targets(tmp_path: Path) -> None:
    c = at(changed(made(tmp_path), "mamba", lambda r: replace(r, axes={"target_hash": "else"})), 256)
    assert [r.why for r in c.decision.reasons] == [Why.TARGET_HASH]
    assert c.difference is None


@pytest.mark.parametrize("where", ["axes", "metric_id"])
def test_another_state_protocol(tmp_path: Path, where: str) -> None:
    def cold(r: Record) -> Record:
        if where == "axes":
            return replace(r, axes={**r.axes, "state": "cold"})
        return replace(r, metric_id=f"{r.metric_id},state=cold")

    c = at(changed(made(tmp_path), "mamba", cold), 256)
    assert c.decision.has(Why.STATE_PROTOCOL)
    assert c.difference is None


def test_another_training_regime(tmp_path: Path) -> None:
    run = with_facts(made(tmp_path), "mamba", training={**facts("mamba", 0)["training"], "regime": "carried"})
    c = at(run, 256)
    assert [r.why for r in c.decision.reasons] == [Why.REGIME]
    assert c.decision.verdict == "undecided"


def test_random_weights(tmp_path: Path) -> None:
    c = at(changed(made(tmp_path), "mamba", lambda r: replace(r, weights="random")), 256)
    assert [r.why for r in c.decision.reasons] == [Why.UNTRAINED]


def test_a_failed_gate(tmp_path: Path) -> None:
    run = made(tmp_path)
    failed = replace(run.cells[0], key="other", task="parity", status="gate_failed")
    c = at(replace(run, cells=(*run.cells, failed)), 256)
    assert [r.why for r in c.decision.reasons] == [Why.GATE]
    assert c.difference is not None  # it is shown all the same


def test_an_unmatched_card(tmp_path: Path) -> None:
    run = with_facts(made(tmp_path), "mamba", parameters=1_060_000)
    c = at(run, 256)
    assert [r.why for r in c.decision.reasons] == [Why.UNMATCHED]
    assert c.decision.unranked
    (table,) = (t for t in assess(run).tables() if t.id == "table-comparisons")
    assert all(row[-1].text.startswith("unranked") for row in table.rows)
    assert (
        "Against every winner here: unranked: parameters, the declared axis, differ" in table.note
    )  # said once, not in every row
    assert "Unranked: 5 of 5" in table.note


# -- trials that succeed or fail -------------------------------------------------------------------------------------


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    like = METRICS["bits_per_byte"]
    monkeypatch.setitem(METRICS, "hits", replace(like, name="hits", unit="share", better="higher", reduction="share"))


def trials(run: Run, right: dict[str, set[int]]) -> Run:
    """40 prompts at 256 bytes of context; ``right`` says which each family answered."""
    firsts = [next(r for r in run.records if r.family == family) for family in right]
    rows = [
        replace(r, metric="hits", metric_id="hits@c=256", context=256, sample=f"p{i}", weight=1.0,
                value=float(i in right[r.family]), axes={"target_hash": "prompts"})
        for r in firsts for i in range(40)
    ]  # fmt: skip
    return replace(run, records=tuple(rows))


@pytest.mark.usefixtures("accuracy")
def test_shares_have_wilsons_interval_and_mcnemars_p(tmp_path: Path) -> None:
    run = trials(made(tmp_path), {"bdh": set(range(30)), "mamba": set(range(2, 12))})
    point = next(p for p in points_of(run) if p.model == "bdh@1m")
    expected = statistics.wilson(30, 40)
    assert (point.value, point.low, point.high, point.n) == (0.75, expected.low, expected.high, 40)
    c = at(run, 256)
    assert c.p == significance.mcnemar(20, 0).value
    assert (c.decision.verdict, c.evidence.margin, c.primary) == ("better", None, False)  # higher wins


@pytest.mark.usefixtures("accuracy")
def test_other_examples_are_not_compared(tmp_path: Path) -> None:
    run = trials(made(tmp_path), {"bdh": set(range(30)), "mamba": set(range(2, 12))})
    c = at(changed(run, "mamba", lambda r: replace(r, axes={"target_hash": "easier prompts"})), 256)
    assert Why.TARGET_HASH in {reason.why for reason in c.decision.reasons}
    assert (c.p, c.difference) == (None, None)


@pytest.mark.usefixtures("accuracy")
def test_a_share_outside_0_and_1_is_an_error(tmp_path: Path) -> None:
    run = trials(made(tmp_path), {"bdh": set(), "mamba": set()})
    bad = replace(run, records=(replace(run.records[0], value=1.5), *run.records[1:]))
    point = next(p for p in points_of(bad) if p.model == "bdh@1m")
    assert (point.value, point.status) == (None, "error")
    assert "outside 0 and 1" in point.reason


# -- how it leaves ---------------------------------------------------------------------------------------------------


def test_the_assessment_is_json_with_reasons_and_cards(tmp_path: Path) -> None:
    run = made(tmp_path, documents=10)
    known = json.loads(assessment(run), parse_constant=lambda name: pytest.fail(name))
    first = known["comparisons"][0]
    assert {"few_documents"} <= {reason["code"] for reason in first["reasons"]}
    assert (first["verdict"], first["claim"], first["equivalence_margin"]) == ("undecided", "checkpoint", 0.02)
    assert (first["resamples"], first["resampling_seed"]) == (10_000, 20_260_101)
    assert first["fairness"]["models"]["bdh@1m"]["parameters"] == 1_000_000
    assert first["fairness"]["ratios"]["params"] == pytest.approx(1_000_000 / 980_000)
    assert known["training"]["status"] == "not judged"
    for text in (export(run, "md"), export(run, "latex")):
        assert "Fairness card" in text
        assert "smoke: not ranked" in text
        assert "checkpoints" in text


def test_every_table_of_quality_says_what_it_speaks_about(tmp_path: Path) -> None:
    for seeds, says in ((1, "One training seed"), (3, "Means over 3 training seeds")):
        run = made(tmp_path / str(seeds), seeds=seeds)
        quality = next(t for t in value_tables(points_of(run)) if "bits per byte" in t.title)
        assert quality.note.startswith(says)
        (table,) = (t for t in assess(run).tables() if t.id == "table-comparisons")
        assert ("architectures" in table.note) == (seeds == 3)
        assert all(row[1].text.startswith("architecture" if seeds == 3 else "checkpoint") for row in table.rows)


def test_a_large_run_is_assessed_in_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_run, "CONTEXTS", tuple(128 * 2**i for i in range(8)))
    models = ("bdh@1m", "bdh@3m", "llama@1m", "llama@3m", "mamba@1m", "mamba@3m")
    losses: Losses = usual_loss
    run = made(tmp_path, documents=60, models=models, seeds=3, losses=losses)
    start = time.process_time()
    points = points_of(run)
    answer = answer_of(run, points)
    spent = time.process_time() - start
    assert len(answer.assessment.comparisons) == 9 * 8  # 2 subjects × 4 others, and the subjects with each other
    assert spent < 5
