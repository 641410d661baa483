"""Does each line of the answer follow from the rows that it links, and does none say more than they decide?"""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import usual_loss, write_run

from bdh_bench.results import statistics
from bdh_bench.results.answer import BACKGROUND, QUESTION
from bdh_bench.results.claim import Claim
from bdh_bench.results.claims import answer_of
from bdh_bench.results.display import number, quantity, signed
from bdh_bench.results.report.page import content_of, render
from bdh_bench.results.report.write import as_json, as_summary, as_text
from bdh_bench.results.score_cards import score_cards
from bdh_bench.results.store import Run
from bdh_bench.results.tables import Table, points_of, samples_of
from bdh_bench.results.terminal import show

NUMBER = re.compile(r"[+−]?\d[\d,]*(?:\.\d+)?")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("run"))


def line(run: Run, label: str) -> Claim:
    (found,) = [one for one in answer_of(run).lines if one.topic == label]
    return found


def alike(family: str, document: int, context: int, seed: int) -> float:
    """bdh and gpt2 differ by a thousandth of a bit."""
    return usual_loss("bdh", document, context, seed) + (0.001 if family == "gpt2" else 0.0)


def undertrained(family: str, document: int, context: int, seed: int) -> float:
    """The yardstick gains a bit from context, everyone else a thousandth."""
    own = {"yardstick": 3.0 - 0.5 * (context >= 256)}.get(family, 2.5 - 0.001 * (context >= 256))
    return own + 0.01 * (document % 3)


def documents(run: Run, family: str, context: int) -> Any:
    return samples_of(
        r for r in run.records if r.metric == "bits_per_byte" and r.family == family and r.context == context
    )


def test_the_line_on_quality_is_recomputed_from_the_cells_it_links(run: Run) -> None:
    claim = line(run, "Quality")
    linked = [cell for cell in run.cells if cell.key in claim.evidence]
    assert {(cell.family, cell.task) for cell in linked} == {("bdh", "long_ppl"), ("gpt2", "long_ppl")}
    only = replace(run, records=tuple(r for r in run.records if r.cell in claim.evidence))
    scores = {
        p.model.partition("@")[0]: p.value for p in points_of(only) if (p.metric, p.context) == ("bits_per_byte", 256)
    }
    apart = statistics.paired_difference(documents(only, "bdh", 256), documents(only, "gpt2", 256))
    wanted = {number(scores["bdh"], "bit/byte"), number(scores["gpt2"], "bit/byte")}
    wanted |= {signed(apart.value), signed(apart.low or 0), signed(apart.high or 0)}
    rules = {"256", "0", "10", "20"}  # the context, above or below 0, documents and how many are needed
    assert {text.rstrip(",") for text in NUMBER.findall(claim.text.replace("gpt2", ""))} == wanted | rules
    assert claim.scope == "at 1M parameters, trained on 117.19 KiB, 1 training seed, 10 documents"


def test_the_line_on_memory_is_recomputed_from_the_cells_it_links(run: Run) -> None:
    claim = line(run, "Memory")
    only = replace(run, records=tuple(r for r in run.records if r.cell in claim.evidence))
    kept = {(r.family, r.context): r.value for r in only.records if r.metric == "state_bytes" and r.value is not None}
    for family, contexts in {"bdh": (128,), "gpt2": (128, 256), "mamba": (128,)}.items():
        for context in contexts:
            assert quantity(kept[family, context], "byte") in claim.text
    ratio = (kept["bdh", 256] or 0) / (kept["gpt2", 256] or 1)
    assert f"At 256 bytes bdh keeps {number(ratio)} times the bytes of gpt2." in claim.text
    assert (
        "at about 171 bytes (interpolated between contexts); beyond it bdh keeps less." in claim.text
    )  # 6144 · c = 2**20
    assert claim.scope.startswith("counted, ")


def test_without_a_census_memory_is_a_formula_and_says_so(tmp_path: Path) -> None:
    claim = line(write_run(tmp_path, tasks=("long_ppl",)), "Memory")
    assert "bdh keeps the same 1 MiB from 256 to 4,096 bytes of context" in claim.text
    assert claim.scope.startswith("by formula, ")
    assert claim.kind == "not decided"


def test_matches_is_said_where_the_verdict_is_equivalent_and_nowhere_else(tmp_path: Path) -> None:
    models = ("bdh@1m", "gpt2@1m")
    same = line(write_run(tmp_path / "same", seeds=5, documents=24, losses=alike, models=models), "Quality")
    assert same.text.startswith("bdh matches gpt2 after 256 bytes")
    assert same.kind == "measured"
    far = line(write_run(tmp_path / "far", seeds=5, documents=24, models=models), "Quality")
    assert far.text.startswith("bdh is ahead of gpt2 after 256 bytes")
    few = line(write_run(tmp_path / "few", seeds=3, documents=24, losses=alike, models=models), "Quality")
    assert few.text.startswith("Whether bdh matches gpt2 is not decided")
    assert "3 seeds, 5 are needed" in few.text
    one = line(write_run(tmp_path / "one", seeds=1, documents=24, losses=alike, models=models), "Quality")
    assert one.text.startswith("This bdh checkpoint matches this gpt2 checkpoint")


def test_undertrained_models_say_nothing_about_long_contexts(tmp_path: Path) -> None:
    run = write_run(tmp_path, documents=24, losses=undertrained, models=("bdh@1m", "llama@1m", "mamba@1m", "yardstick"))
    answer = answer_of(run)
    assert line(run, "Long contexts").text.startswith("Not answered: from 128 to 256 bytes")
    assert "after 256 bytes of context, no more than they were trained on" in line(run, "Quality").text
    assert all("2,048" not in one.text for one in answer.lines if one.topic in ("Quality", "Other models"))
    longer = next(claim.command for claim in answer.open if "long contexts" in claim.text)
    assert "--train-bytes 1200000" in longer


def test_the_strongest_transformer_is_the_one_that_is_compared(tmp_path: Path) -> None:
    def loss(family: str, document: int, context: int, seed: int) -> float:
        return usual_loss("bdh", document, context, seed) + {"llama": 0.1, "llama_2": 0.2}.get(family, 0.0)

    run = write_run(tmp_path, losses=loss, models=("bdh@1m", "gpt2@1m", "llama@1m"), tasks=("long_ppl",))
    assert "llama" in line(run, "Quality").text.split(":")[0]  # gpt2 has fewer bits, but only up to 256 bytes
    assert "after 2,048 bytes" in line(run, "Quality").text


@pytest.mark.parametrize(
    "options", [{}, {"models": ()}, {"crash": "all"}, {"models": ("mamba@1m",)}, {"tasks": ("latency",)}]
)
def test_every_output_says_the_same_answer(
    tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, **options)
    content = content_of(run)
    monkeypatch.setenv("COLUMNS", "100000")
    show(run)
    for text in (capsys.readouterr().out, render(content), as_text(content), as_summary(content), as_json(content)):
        bare = re.sub(r"\\(.)", r"\1", text.replace("&#34;", '"').replace("&#39;", "'"))
        for said in (QUESTION, *(one.text for one in (*content.answer.lines, *content.answer.open))):
            assert said in bare
        words = re.sub(r"<script.*?</script>", "", bare, flags=re.S).lower()  # a script may speak of NaN
        assert "nan" not in re.findall(r"[a-z]+", words)
    assert BACKGROUND in as_summary(content).replace("\\", "")


def test_commands_ask_for_what_was_missing(run: Run) -> None:
    commands = {claim.text: shlex.split(claim.command) for claim in answer_of(run).open}
    (architecture,) = [parts for text, parts in commands.items() if text.startswith("Which architecture")]
    assert architecture[architecture.index("--seeds") + 1] == "5"
    assert architecture[architecture.index("--documents") + 1] == "40"
    assert architecture[architecture.index("--train-bytes") + 1] == "120000"
    assert "--smoke" not in architecture
    (beyond,) = [parts for text, parts in commands.items() if "beyond 2,048 bytes" in text]
    assert beyond[beyond.index("--contexts") + 1].endswith(",8192")


def test_commands_are_requests_that_the_program_takes(run: Run) -> None:
    from typer.testing import CliRunner

    from bdh_bench.cli import app

    commands = [shlex.split(claim.command)[1:] for claim in answer_of(run).open if claim.command]
    assert len(commands) >= 4
    for parts in (commands[0], commands[-2], commands[-1]):  # seeds, rounds, contexts
        done = CliRunner().invoke(app, [*parts, "--dry-run"])
        assert done.exit_code == 0, (parts, done.output)


def test_score_cards_hold_what_rows_say_and_gaps_elsewhere(run: Run, tmp_path: Path) -> None:
    cards = {row[0].text: [entry.text for entry in row[1:]] for row in table_of(run).rows}
    bits = number(sum(usual_loss("bdh", i, 2048, 0) for i in range(10)) / 10, "bit/byte")
    assert cards["bdh"] == ["1,000,000", "2,000,000", "1 MiB", "4.04 ms", bits]  # nobody has a state at 64k
    assert cards["gpt2"][2] == "—"  # it stops at 256 bytes: a gap, not 0
    assert not table_of(write_run(tmp_path, crash="all")).rows


def table_of(run: Run) -> Table:
    return score_cards(answer_of(run).assessment.facts)
