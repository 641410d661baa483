"""Is a regression found, is noise let pass, are few rounds and other machines refused, and do exit codes say so?"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_run import write_run
from timed_run import timed_run
from typer.testing import CliRunner

from bdh_bench.cli import app
from bdh_bench.errors import SpecError, UnknownNameError
from bdh_bench.results.regression import Rule, as_json, compare, mann_whitney, parse_rules, unlike
from bdh_bench.results.store import Run

RULES = (Rule("tpot_s", 0.05),)
QUIET = {"own": 0.003, "windows": 0.004, "spread": 0.003}


def made(level: float, seed: int, rounds: int = 7, name: str = "a") -> Run:
    return timed_run({"bdh": {1024: level}}, rounds, seed, name, **QUIET)


def test_a_regression_is_found_and_seen_again() -> None:
    a, b, c = made(0.004, 0), made(0.0044, 1, name="b"), made(0.0044, 2, name="c")
    report = compare(a, [b, c], RULES)
    (change,) = report.changes
    assert (change.verdict, change.seen, report.exit_code) == ("regression", (2, 2), 4)
    assert change.ratio == pytest.approx(1.1, rel=0.01)
    assert change.low is not None
    assert change.high is not None
    assert change.low < 1.1 < change.high
    assert change.p is not None
    assert change.p < 0.002
    assert "seen once" in compare(a, [b], RULES).changes[0].reason


def test_what_a_second_run_does_not_see_is_no_regression() -> None:
    report = compare(made(0.004, 0), [made(0.0044, 1), made(0.004, 2)], RULES)
    assert report.exit_code == 0
    assert report.changes[0].verdict == "not decided"
    assert "seen in 1 of 2 runs" in report.changes[0].reason


@pytest.mark.parametrize("level", [0.004, 0.0041, 0.0036])
def test_small_or_good_changes_pass(level: float) -> None:
    report = compare(made(0.004, 0), [made(level, 1)], RULES)
    assert report.exit_code == 0
    assert not report.regressions


def test_noise_is_never_a_regression() -> None:
    reports = [compare(made(0.004, 2 * i), [made(0.004, 2 * i + 1)], (Rule("tpot_s", 0.0),)) for i in range(40)]
    assert sum(bool(r.regressions) for r in reports) <= 1


def test_six_rounds_decide_nothing() -> None:
    report = compare(made(0.004, 0, 6), [made(0.008, 1, 6)], RULES)
    assert report.changes[0].verdict == "not decided"
    assert "7 per side" in report.changes[0].reason
    assert report.exit_code == 0


def test_the_exact_distribution_is_that_of_all_orders() -> None:
    for m, n in ((2, 3), (4, 4)):
        orders = list(itertools.combinations(range(m + n), m))
        for chosen in orders[:: max(1, len(orders) // 9)]:
            first = [float(i) for i in chosen]
            second = [float(i) for i in range(m + n) if i not in chosen]
            own = sum(a > b for a in first for b in second)
            least = min(own, m * n - own)
            extreme = sum(
                min(u := sum(a > b for a in c for b in range(m + n) if b not in c), m * n - u) <= least for c in orders
            )
            assert (
                mann_whitney(first, second) == pytest.approx(min(1.0, extreme / len(orders)), abs=1e-12)
                or least * 2 == m * n
            )
    six, seven = range(6), range(7)
    assert mann_whitney([*six], [i + 6.5 for i in six]) == pytest.approx(2 / math.comb(12, 6))
    assert mann_whitney([*six], [i + 6.5 for i in six]) > 0.002 > mann_whitney([*seven], [i + 7.5 for i in seven])
    assert mann_whitney([1.0] * 8, [1.0] * 8) == 1.0


def test_integers_compare_exactly_and_documents_are_paired(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", documents=30)
    rows = []
    for r in a.records:
        value = r.value
        if r.model == "bdh@1m" and r.metric == "state_bytes" and value is not None:
            value += 1
        if r.model == "mamba@1m" and r.metric == "bits_per_byte" and value is not None:
            value *= 1.02
        rows.append(replace(r, value=value))
    report = compare(a, [replace(a, records=tuple(rows))], parse_rules("state_bytes:0,bits_per_byte:1%"))
    assert {(c.model, c.metric) for c in report.regressions} == {
        ("bdh@1m", "state_bytes"),
        ("mamba@1m", "bits_per_byte"),
    }
    same = compare(a, [a], parse_rules("state_bytes:0,bits_per_byte:0"))
    assert same.exit_code == 0
    assert not same.regressions
    other = [replace(r, sample=f"x{r.sample}") if r.sample else r for r in a.records]
    apart = compare(a, [replace(a, records=tuple(other))], parse_rules("bits_per_byte:1%"))
    assert {c.verdict for c in apart.changes if c.metric == "bits_per_byte"} == {"not compared"}
    assert apart.exit_code == 5


def test_other_machines_are_refused() -> None:
    a, b = made(0.004, 0), made(0.004, 1)
    other = replace(b, manifest={**b.manifest, "environment": {**b.manifest["environment"], "cpu": "another"}})
    report = compare(a, [other], RULES)
    assert "different hardware" in report.refused
    assert not report.changes
    assert report.exit_code == 5
    assert unlike(a, replace(b, manifest={**b.manifest, "spec": {"device": "cuda", "threads": 1}}))


def test_rules_are_checked() -> None:
    assert parse_rules("tpot_s:5%, state_bytes:0") == (Rule("tpot_s", 0.05), Rule("state_bytes", 0.0))
    with pytest.raises(SpecError, match="METRIC:SHARE"):
        parse_rules("tpot_s")
    with pytest.raises(UnknownNameError):
        parse_rules("tpot:5%")
    with pytest.raises(SpecError, match="more or less is better"):
        parse_rules("state_norm:5%")


def test_json_is_whole() -> None:
    report = compare(made(0.004, 0), [made(0.0044, 1)], RULES)
    assert json.loads(json.dumps(as_json(report), allow_nan=False))["regressions"] == 1


def test_the_command_line_has_its_exit_codes(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", documents=5)
    write_run(tmp_path / "b", documents=5)
    names = [str(tmp_path / side / "synthetic") for side in ("a", "b")]
    good = CliRunner().invoke(app, ["compare", *names, "--fail-on", "state_bytes:0", "--json"])
    assert good.exit_code == 0
    assert json.loads(good.stdout)["schema"] == "bdh-bench/compare/1"
    manifest = json.loads((a.path / "run.json").read_text())
    manifest["environment"]["cores"] = 64
    (a.path / "run.json").write_text(json.dumps(manifest))
    refused = CliRunner().invoke(app, ["compare", *names])
    assert refused.exit_code == 5
    assert "different hardware" in refused.output


def test_a_report_has_a_table_against_its_baseline() -> None:
    from bdh_bench.results.report.page import content_of

    table = content_of(made(0.0044, 1), made(0.004, 0, name="before")).tables[-1]
    assert table.title == "Against the baseline before"
    assert table.rows[0][6].text.startswith("1.099 [")
    assert table.rows[0][7].text == "no regression"
