"""Are only like runtimes compared, are verdicts those of the rounds, and do tables and sentences say so?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from timed_run import drift, records, rounds, run_of, timed_run

from bdh_bench.results.claims import answer_of
from bdh_bench.results.contenders import Facts
from bdh_bench.results.speed import speed_tables, speeds_of
from bdh_bench.results.tables import points_of

TRUTH = {"bdh": {1024: 0.004, 4096: 0.004}, "llama": {1024: 0.002, 4096: 0.008}, "mamba": {1024: 0.004, 4096: 0.004}}


def test_verdicts_follow_the_truth() -> None:
    run = timed_run(TRUTH)
    found = {(s.second.model, s.first.context): s.ratio.verdict for s in speeds_of(Facts(run, points_of(run)))}
    assert found == {
        ("llama", 1024): "slower",
        ("llama", 4096): "faster",
        ("mamba", 1024): "within noise",
        ("mamba", 4096): "within noise",
    }


def test_sentences_and_tables_say_the_verdict() -> None:
    run = timed_run(TRUTH)
    answer = answer_of(run)
    times = [claim for claim in answer.claims if claim.topic == "time"]
    assert "bdh is faster (7 rounds)" in times[0].text
    assert times[0].kind == "measured"
    assert "within noise of ±" in times[1].text
    assert not any("Which model is faster" in claim.text for claim in answer.open)
    table = next(t for t in answer.assessment.tables() if t.id == "table-speed-tpot_s")
    assert [row[0].text for row in table.rows] == ["bdh / llama", "bdh / mamba"]
    assert table.rows[0][3].text.endswith("faster")


def test_different_runtimes_are_paired_only_as_best_of_each() -> None:
    generator = np.random.default_rng(0)
    shared = drift(generator, 5)
    eager = records("bdh", 1024, rounds(generator, 0.004, shared))
    compiled = [
        replace(r, model="llama", family="llama", cell="l", axes={"runtime": "compile"}, task="latency:runtime=compile")
        for r in records("llama", 1024, rounds(generator, 0.001, shared))
    ]
    run = run_of([*eager, *compiled])
    facts = Facts(run, points_of(run))
    (only,) = speeds_of(facts)
    assert only.best_of_each
    assert only.runtime == "best of each: eager against compile"
    (table,) = speed_tables(facts, [only])
    assert "best of each (runtimes differ)" in table.title
    assert table.detail
    assert not [claim for claim in answer_of(run).claims if claim.topic == "time"]


def test_a_point_has_the_interval_of_its_rounds_and_says_what_is_marked() -> None:
    run = timed_run({"bdh": {1024: 0.004}}, rounds_=3)
    (point,) = points_of(run)
    assert point.n == 3
    assert point.low is not None
    assert point.low < 0.0044
    assert "few rounds (3)" in point.reason
    rows = [replace(r, status="noisy") if r.round == 1 and r.repeat == 0 else r for r in run.records]
    (marked,) = points_of(replace(run, records=tuple(rows)))
    assert marked.status == "noisy"
    assert marked.value == pytest.approx(point.value)
    assert marked.reason.startswith("1 of 27 windows noisy")
