"""Is T* of a run's states that of their formulae, held against the census, and said on the card, in a table and in the answer?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import write_run

from bdh_bench.results.claims import answer_of
from bdh_bench.results.contenders import Facts
from bdh_bench.results.report.page import content_of, render
from bdh_bench.results.state_crossover import StateCrossover, state_crossovers
from bdh_bench.results.store import Run
from bdh_bench.results.tables import Table, points_of

FAR = 2**24
#: What the census of the synthetic run counts, as formulae; gpt2 ends at its last position.
CURVES: dict[str, list[list[int]]] = {
    "bdh": [[1, 2**20], [FAR, 2**20]],
    "gpt2": [[1, 6144], [384, 6144 * 384]],
    "mamba": [[1, 90_112], [FAR, 90_112]],
}


def with_curves(run: Run, curves: Mapping[str, Any] = CURVES, **more: Any) -> Run:
    cells = tuple(
        replace(c, facts={**c.facts, "state_curve": curves.get(c.family), **more}) if c.facts else c for c in run.cells
    )
    return replace(run, cells=cells)


def found(run: Run) -> dict[str, StateCrossover]:
    return {c.second: c for c in state_crossovers(Facts(run, points_of(run)))}


def table_of(run: Run, id_: str) -> Table:
    return next(table for table in content_of(run).tables if table.id == id_)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_run(tmp_path, models=("bdh@1m", "gpt2@1m", "mamba@1m"), crash=None)


def test_formulae_are_exact_and_the_census_confirms_them(run: Run) -> None:
    pairs = found(with_curves(run))
    crossed = pairs["gpt2@1m"].found
    assert crossed is not None
    assert crossed.at == pytest.approx((2**20 / 6144,), rel=1e-14)
    assert (crossed.kind, crossed.lower) == ("analytic", "first")
    assert pairs["gpt2@1m"].remark == "formulae; the census agrees at 128 and 256"
    assert pairs["mamba@1m"].text == f"none up to {FAR:,}"
    assert pairs["mamba@1m"].remark == "formulae; the census agrees from 128 to 2,048"


def test_a_formula_that_the_census_contradicts_decides_nothing(run: Run) -> None:
    wrong = {
        **CURVES,
        "gpt2": [[1, 3072], [384, 3072 * 384]],
    }  # half of what is counted: T* past 256, where 256 is counted as larger
    pair = found(with_curves(run, wrong))["gpt2@1m"]
    assert pair.contradicted
    assert pair.remark == "the census at 256 contradicts the formulae"
    assert pair.text.startswith("not decided")
    claims = [c for c in answer_of(with_curves(run, wrong)).claims if c.topic == "memory" and "contradicts" in c.text]
    assert [c.kind for c in claims] == ["not decided"]


def test_a_run_without_formulae_has_the_census_alone(run: Run) -> None:
    pairs = found(run)
    assert pairs["gpt2@1m"].text == "about 171 (interpolated between contexts)"
    assert pairs["mamba@1m"].text == "none up to 2,048"
    assert pairs["mamba@1m"].remark == "from the census alone"


def test_a_run_without_census_has_the_formulae_alone(tmp_path: Path) -> None:
    bare = with_curves(write_run(tmp_path, models=("bdh@1m", "gpt2@1m"), tasks=("long_ppl",), crash=None))
    pair = found(bare)["gpt2@1m"]
    assert (pair.text, pair.remark) == ("171 (analytic)", "formulae; no census")
    assert pair.cells


@pytest.mark.parametrize("gone", [None, [], [[1, "x"]], "text", [[1, 5]]])
def test_facts_that_are_no_curve_are_none(run: Run, gone: Any) -> None:
    assert found(with_curves(run, {**CURVES, "gpt2": gone}))["gpt2@1m"].remark == "from the census alone"


def test_tokens_of_other_vocabularies_are_not_the_same_context(run: Run) -> None:
    mixed = with_curves(run)
    cells = tuple(replace(c, facts={**c.facts, "vocab_size": 50257}) if c.family == "gpt2" else c for c in mixed.cells)
    pair = found(replace(mixed, cells=cells))["gpt2@1m"]
    assert pair.found is None
    assert "vocabularies" in pair.text


def test_it_stands_on_the_card_in_a_table_and_in_the_answer(run: Run) -> None:
    run = with_curves(run)
    card = {row[0].text: [e.text for e in row[1:]] for row in table_of(run, "table-fairness").rows}
    assert card["T*: state as large as that of bdh"] == ["—", "171 (analytic)", f"none up to {FAR:,}"]
    rows: Sequence[Sequence[str]] = [[e.text for e in row] for row in table_of(run, "table-state-crossover").rows]
    assert rows[0] == ["bdh and gpt2", "171 (analytic)", "bdh", "formulae; the census agrees at 128 and 256"]
    assert rows[1][2] == "mamba"
    texts = [c.text for c in answer_of(run).verdicts if c.topic == "memory"]
    assert (
        "The states of bdh and gpt2 are equal at 171 bytes of context (analytic); beyond it bdh keeps less (formulae; the census "
        "agrees at 128 and 256)." in texts
    )
    assert any(
        text.startswith("The states of bdh and mamba are nowhere equal up to 16,777,216 bytes") for text in texts
    )
    assert "Crossover of states" in render(content_of(run))


def test_programs_read_it_with_the_card(run: Run) -> None:
    known = answer_of(with_curves(run)).assessment
    first = next(c for c in known.as_json()["comparisons"] if c["second"] == "gpt2@1m")
    (crossed,) = first["fairness"]["state_crossovers"]
    assert (crossed["kind"], crossed["lower_beyond"], crossed["contradicted"]) == ("analytic", "bdh@1m", False)
    assert crossed["contexts"] == pytest.approx([2**20 / 6144])
