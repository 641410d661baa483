"""Does every sentence follow from its points, and does none say more than they do?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from synthetic_run import usual_loss, write_run

from bdh_bench.results import statistics
from bdh_bench.results.claim import Claim
from bdh_bench.results.claims import answer_of
from bdh_bench.results.display import count, number, quantity, signed
from bdh_bench.results.store import Run
from bdh_bench.results.tables import points_of, samples_of

#: Rules and names: contains 0, --seeds 5, 20 documents, gpt2, 90 % intervals, the margin, the least difference, worse by 0.05.
CONSTANTS = {"0", "5", "20", "2", "90", "0.02", "0.005", "0.05"}
NUMBER = re.compile(r"[+−]?\d[\d,]*(?:\.\d+)?")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("run"))


def claims_on(run: Run, topic: str) -> list[Claim]:
    return [claim for claim in answer_of(run).claims if claim.topic == topic]


def follows(run: Run, claim: Claim) -> set[str]:
    """Every number that the linked cells allow in a sentence."""
    points = [p for p in points_of(run) if set(p.cells) <= set(claim.evidence) and p.value is not None]
    allowed = {count(p.context) for p in points_of(run) if set(p.cells) & set(claim.evidence)}
    for p in points:
        allowed |= set(NUMBER.findall(quantity(p.value, p.unit))) | {number(p.value, p.unit)}
    pairs = [(p, q) for p in points for q in points if p.metric == q.metric and p.batch_size == q.batch_size]
    for p, q in pairs:
        assert p.value is not None
        assert q.value is not None
        if p.metric == "bits_per_byte":
            d = statistics.paired_difference(documents(run, p), documents(run, q))
            allowed |= {signed(d.value), signed(d.low or 0), signed(d.high or 0), count(d.n), number(d.mde, p.unit)}
            allowed |= {signed(limit) for limit in d.inner or ()}
        elif q.value:
            allowed.add(number(p.value / q.value))
    allowed |= {str(r["bits_per_byte"]) + "00" for r in run.manifest["references"]}
    allowed |= {
        count(c.facts["max_positions"]) for c in run.cells if c.key in claim.evidence and c.facts.get("max_positions")
    }
    return allowed | CONSTANTS


def documents(run: Run, point: object) -> dict[str, tuple[float, float]]:
    same = ("model", "metric", "context", "seed")
    return samples_of(r for r in run.records if all(getattr(r, n) == getattr(point, n) for n in same))


def test_every_number_is_recomputed_from_its_points(run: Run) -> None:
    claims = [c for c in answer_of(run).claims if c.topic in ("quality", "context", "reference", "time", "limit")]
    assert len(claims) >= 10
    for claim in claims:
        assert claim.evidence
        found = set(NUMBER.findall(claim.text.replace("gpt2", "").replace("order-2", "")))
        assert found <= follows(run, claim), claim.text


def test_evidence_names_cells_of_the_run(run: Run) -> None:
    keys = {cell.key for cell in run.cells}
    answer = answer_of(run)
    assert all(set(claim.evidence) <= keys for claim in (*answer.claims, *answer.open, *answer.lines))


def test_ten_documents_rank_nothing(run: Run) -> None:
    claims = claims_on(run, "quality")
    assert len(claims) == 4
    for claim in claims:
        assert "this bdh checkpoint" in claim.text
        assert "smoke: not ranked (10 documents" in claim.text
        assert "ahead" not in claim.text
        assert claim.kind == "not decided"
    assert any(
        claim.text.startswith("Which architecture") for claim in answer_of(run).open
    )  # once, not in every sentence


def test_pairs_meet_at_the_primary_contexts_and_the_longest_common_one(run: Run) -> None:
    starts = [claim.text.split(" bytes")[0] for claim in claims_on(run, "quality")]
    assert starts == ["At 256", "At 256", "At 1,024", "At 2,048"]  # gpt2 stops at T; mamba at T, 4T and the end


def test_a_clear_difference_names_a_checkpoint_not_an_architecture(tmp_path: Path) -> None:
    answer = answer_of(write_run(tmp_path, documents=24))
    claim = next(claim for claim in answer.claims if claim.topic == "quality")
    assert claim.kind == "measured"
    assert "the bdh checkpoint is ahead" in claim.text
    assert any(claim.text.startswith("Which architecture") for claim in answer.open)


def test_no_winner_where_the_interval_contains_zero(tmp_path: Path) -> None:
    def alike(family: str, document: int, context: int, seed: int) -> float:
        return usual_loss("bdh", document, context, seed) + (0.05 if family == "gpt2" else 0.0) * (-1) ** document

    claim = claims_on(write_run(tmp_path, documents=24, losses=alike), "quality")[0]
    assert "contains 0" in claim.text
    assert claim.kind == "not decided"


def test_no_winner_on_a_tiny_difference(tmp_path: Path) -> None:
    def close(family: str, document: int, context: int, seed: int) -> float:
        return usual_loss("bdh", document, context, seed) + (0.002 if family == "gpt2" else 0.0)

    claim = claims_on(write_run(tmp_path, documents=24, losses=close), "quality")[0]
    assert "smaller than 0.005" in claim.text
    assert "ahead" not in claim.text
    assert "equivalent: 90 % interval" in claim.text


@pytest.mark.parametrize(("seeds", "says", "kind"), [(2, "this bdh", "not decided"), (3, "shown, not ranked", "not decided"),
                                                     (5, "bdh is ahead", "measured")])  # fmt: skip
def test_seeds_decide_what_may_be_said(tmp_path: Path, seeds: int, says: str, kind: str) -> None:
    documents = 10 if seeds == 2 else 24
    claim = claims_on(write_run(tmp_path, seeds=seeds, documents=documents, models=("bdh@1m", "gpt2@1m")), "quality")[0]
    assert says in claim.text
    assert claim.kind == kind


def test_other_targets_are_never_compared(tmp_path: Path) -> None:
    from dataclasses import replace

    run = write_run(tmp_path, models=("bdh@1m", "mamba@1m"))
    changed = tuple(
        replace(r, axes={"target_hash": "else"}) if r.family == "mamba" and r.axes else r for r in run.records
    )
    claim = claims_on(replace(run, records=changed), "quality")[0]
    assert "were not compared" in claim.text


def test_gpt2_stopped_and_was_never_truncated(run: Run) -> None:
    (claim,) = claims_on(run, "limit")
    assert "384 learned positions: it stopped at 256 bytes" in claim.text
    assert "never truncated" in claim.text


def test_memory_is_constant_or_grows_by_its_points(run: Run) -> None:
    texts = [claim.text for claim in claims_on(run, "memory")]
    assert "bdh keeps 1 MiB per stream at every measured context (128 to 2,048 bytes)." in texts
    assert any(text.startswith("gpt2's cache grows to 1.50 MiB") for text in texts)
    crossing = next(text for text in texts if "interpolated" in text)
    assert "equal at about 171 bytes" in crossing  # 6144 · c = 2**20
    assert "beyond it bdh keeps less" in crossing


def test_time_is_never_ranked_on_one_round(run: Run) -> None:
    claims = claims_on(run, "time")
    assert claims
    assert all(claim.kind == "not decided" and "single round" in claim.text for claim in claims)


def test_open_questions_are_listed(run: Run) -> None:
    answer = answer_of(run)
    assert any("architecture" in claim.text for claim in answer.open)
    assert any("beyond 2,048 bytes" in claim.text for claim in answer.open)
    assert "smoke: not ranked" in answer.lines[0].text


def test_failures_are_said(run: Run) -> None:
    (claim,) = claims_on(run, "failure")
    assert claim.text == "1 of 12 cells failed: toy:uniform on latency."


@pytest.mark.parametrize("options", [{"models": ()}, {"crash": "all"}, {"models": ("mamba@1m",)}])
def test_nothing_to_compare_still_has_an_answer(tmp_path: Path, options: dict[str, object]) -> None:
    answer = answer_of(write_run(tmp_path, **options))  # type: ignore[arg-type]
    assert answer.open
    assert not [claim for claim in answer.claims if claim.topic == "quality"]
