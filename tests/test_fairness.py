"""Does the card show what each model had, and refuse a ranking where the declared axis is not matched or not known?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import write_run

from bdh_bench.registry import list_models
from bdh_bench.results.assessment import assess
from bdh_bench.results.contenders import Facts
from bdh_bench.results.fairness import AXES, Card, card_of, fairness_table
from bdh_bench.results.report.page import content_of, render
from bdh_bench.results.store import Run
from bdh_bench.results.tables import points_of
from bdh_bench.runner.recipes import MATCHES, RECORDED, rate_source
from bdh_bench.spec import RunSpec, parse_model


def card(run: Run) -> tuple[Card, Facts]:
    facts = Facts(run, points_of(run))
    return card_of(facts), facts


def declared(run: Run, axis: str) -> Run:
    return replace(run, manifest={**run.manifest, "spec": {**run.manifest["spec"], "match": axis}})


def given(run: Run, family: str, *path: str, value: Any) -> Run:
    """The run with one fact of one family replaced."""

    def changed(facts: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        inner = value if len(names) == 1 else changed(dict(facts.get(names[0]) or {}), names[1:])
        return {**facts, names[0]: inner}

    cells = tuple(replace(c, facts=changed(dict(c.facts), path)) if c.family == family else c for c in run.cells)
    return replace(run, cells=cells)


FACT = {
    "params": ("parameters",),
    "bytes": ("training", "bytes"),
    "flops": ("training", "flops"),
    "wallclock": ("training", "seconds"),
    "state": ("state_bytes", "1024"),
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_run(tmp_path, documents=24, models=("bdh@1m", "mamba@1m"), crash=None)


def test_the_axes_are_those_of_a_request() -> None:
    assert set(AXES) == set(MATCHES) == set(FACT)


@pytest.mark.parametrize("axis", FACT)
def test_five_percent_on_the_declared_axis_only(run: Run, axis: str) -> None:
    run = declared(run, axis)
    for family in ("bdh", "mamba"):
        run = given(run, family, *FACT[axis], value=1000)
    assert card(run)[0].unmatched("bdh@1m", "mamba@1m") == ""
    assert card(given(run, "mamba", *FACT[axis], value=1050))[0].unmatched("bdh@1m", "mamba@1m") == ""
    for one, two in (("bdh@1m", "mamba@1m"), ("mamba@1m", "bdh@1m")):
        assert "differ by more than 5 %" in card(given(run, "mamba", *FACT[axis], value=1051))[0].unmatched(one, two)
    for other in set(FACT) - {axis}:
        assert card(given(run, "mamba", *FACT[other], value=10**9))[0].unmatched("bdh@1m", "mamba@1m") == ""


@pytest.mark.parametrize("axis", FACT)
def test_a_missing_fact_on_the_declared_axis_is_no_match(run: Run, axis: str) -> None:
    found = card(given(declared(run, axis), "mamba", *FACT[axis], value=None))[0]
    assert "is not known for mamba@1m" in found.unmatched("bdh@1m", "mamba@1m")


def test_an_axis_that_nobody_knows_matches_nothing(run: Run) -> None:
    assert "is not one of" in card(declared(run, "luck"))[0].unmatched("bdh@1m", "mamba@1m")


def test_the_card_shows_values_and_marks_what_is_missing(run: Run) -> None:
    table = fairness_table(*card(given(run, "mamba", "vocab_size", value=None)))
    rows = {row[0].text: row[1:] for row in table.rows}
    assert table.columns == ("fact", "bdh", "mamba")
    assert [e.text for e in rows["parameters (declared axis)"]] == ["1,000,000", "980,000"]
    assert [e.text for e in rows["state bytes at 4T"]] == ["1 MiB", "1 MiB"]
    assert [(e.text, e.note) for e in rows["vocabulary"]] == [("256", ""), ("—", "missing")]
    assert [e.text for e in rows["learning rate"]] == ["0.001", "0.001"]
    assert "regime crop" in table.note


def test_the_card_says_where_a_learning_rate_comes_from(run: Run) -> None:
    """P3: what was searched for one and not for the other can be seen."""
    run = given(
        run, "bdh", "learning_rate", value={"source": "default of the family (a sweep)", "grid": [0.001, 0.004]}
    )
    run = given(run, "mamba", "learning_rate", value={"source": "given with the model", "grid": []})
    rows = {row[0].text: [e.text for e in row[1:]] for row in fairness_table(*card(run)).rows}
    assert rows["origin of the learning rate"] == ["default of the family (a sweep)", "given with the model"]
    assert rows["learning rates tried"] == ["0.001, 0.004", "—"]
    assert rows["how many learning rates"] == ["2", "—"]


def test_the_origin_of_a_rate_is_that_of_the_request() -> None:
    spec = RunSpec(("bdh",), ("long_ppl",))
    plain = rate_source(parse_model("bdh"), spec)
    assert plain["source"].startswith(f"default of the family ({RECORDED}, at 303,104 parameters")
    assert plain["grid"] == [0.001, 0.002, 0.004, 0.008, 0.016]
    assert rate_source(parse_model("gated_delta"), spec)["grid"] == [0.002, 0.004]  # of the file: fewer than the others
    assert rate_source(parse_model("bdh:learning_rate=0.1"), spec) == {"source": "given with the model", "grid": []}
    assert rate_source(parse_model("bdh"), replace(spec, learning_rate=0.1)) == {
        "source": "given for the run",
        "grid": [],
    }
    assert rate_source(parse_model("someone"), spec) == {"source": "default of the family", "grid": []}


def test_the_card_shows_what_the_start_symbol_and_a_short_convolution_are_worth(run: Run) -> None:
    effect = {"on": 2.25, "off": 2.5, "difference": 0.25, "documents": 3, "bytes": 765}
    run = given(run, "mamba", "start_symbol_check", value=effect)
    run = given(run, "mamba", "config", "conv_kernel", value=4)
    rows = {row[0].text: [e.text for e in row[1:]] for row in fairness_table(*card(run)).rows}
    bits = next(texts for name, texts in rows.items() if "without the start symbol" in name)
    assert bits[0] == "—"
    assert bits[1].startswith("2.25 with, 2.5 without (+0.25")
    assert rows["tokens under a short convolution (1: none)"] == ["no such option", "4"]


def test_all_four_matchings_are_printed_whatever_is_declared(run: Run) -> None:
    assert set(card(run)[0].ratios("bdh@1m", "mamba@1m")) == set(AXES)


def test_the_card_is_on_the_page(run: Run) -> None:
    text = render(content_of(given(run, "mamba", "parameters", value=2_000_000)))
    assert "Fairness card" in text
    assert "unranked" in text
    assert "differ by more than 5 % (1,000,000 and 2,000,000)" in text


def test_a_run_recorded_before_the_card_has_one_with_gaps(run: Run) -> None:
    bare = replace(run, cells=tuple(replace(c, facts={}) for c in run.cells), manifest={"cells": []})
    known = assess(bare)
    assert known.card.axis == "params"
    assert all(value is None for row in known.card.values.values() for value in row.values())
    assert all(c.decision.unranked for c in known.comparisons)


def test_every_model_of_ours_says_what_kind_it_is() -> None:
    entries = [entry for entry in list_models() if entry.origin == "built in"]
    assert {str(e.defaults.get("kind")) for e in entries} <= {
        "transformer",
        "recurrent",
        "control",
        "yardstick",
        "checkpoint",
    }
    assert all(entry.defaults.get("architecture") for entry in entries)
    assert {e.name for e in entries if e.defaults["kind"] == "transformer"} >= {"gpt2", "llama"}
