"""Is a model called by as little as tells it apart, with its regime, and never by the name of another?"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_run import facts, write_run

from bdh_bench.results.claims import answer_of
from bdh_bench.results.contenders import Facts
from bdh_bench.results.naming import MOST, names_of, without_regime
from bdh_bench.results.report.page import content_of
from bdh_bench.results.store import Run
from bdh_bench.results.tables import points_of
from bdh_bench.results.terminal import renderable

CASES = {
    ("bdh@1m", "gpt2@1m"): ("bdh", "gpt2"),
    ("bdh@1m", "bdh@3m", "gpt2"): ("bdh@1m", "bdh@3m", "gpt2"),
    ("bdh", "bdh:regime=carried", "llama"): ("bdh (crop)", "bdh (carried)", "llama"),
    ("bdh:decay=0.9", "bdh:decay=0.99:rope=off"): ("bdh:decay=0.9", "bdh:decay=0.99:rope=off"),
    ("toy:uniform", "toy:copy"): ("toy:uniform", "toy:copy"),
    ("bdh:weights=/a/long/path/to/one.pt", "bdh:weights=/a/long/path/to/two.pt"): (
        "bdh:weights=one.pt", "bdh:weights=two.pt",
    ),
    ("bdh:weights=/a/x.pt", "bdh:weights=/b/x.pt"): ("bdh:weights=/a/x.pt", "bdh:weights=/b/x.pt"),
    ('hf:"a:b"', "hf:gpt2@main"): ('hf:"a:b"', "hf:gpt2@main"),
}  # fmt: skip


@pytest.mark.parametrize(("models", "names"), CASES.items())
def test_a_name_is_as_short_as_it_can_be(tmp_path: Path, models: tuple[str, ...], names: tuple[str, ...]) -> None:
    assert tuple(names_of(write_run(tmp_path, models=models)).values()) == names


def test_a_long_name_is_cut_and_stays_its_own(tmp_path: Path) -> None:
    models = tuple(f"toy:{'x' * 300}{end}" for end in ("a" * 20, "b" * 20))
    names = list(names_of(write_run(tmp_path, models=models)).values())
    assert len(set(names)) == 2
    assert all(len(name) <= MOST for name in names)


def two_regimes(root: Path, **options: object) -> Run:
    run = write_run(root, models=("bdh", "bdh:regime=carried", "llama"), crash=None, **options)  # type: ignore[arg-type]
    carried = {**facts("bdh", 0), "training": {**facts("bdh", 0)["training"], "regime": "carried"}}
    cells = tuple(replace(c, facts=carried) if "carried" in c.model else c for c in run.cells)
    return replace(run, cells=cells)


def test_regimes_are_never_ranked_against_each_other(tmp_path: Path) -> None:
    run = two_regimes(tmp_path, documents=24, manifest={"labels": []})
    answer = answer_of(run)
    quality = [c.text for c in (*answer.claims, *answer.verdicts) if c.topic == "quality"]
    assert quality
    assert not [text for text in quality if "carried" in text]
    (regimes,) = (c.text for c in answer.verdicts if c.topic == "regime")
    assert regimes.endswith("crop: bdh (crop), llama; carried: bdh (carried).")
    across = [c for c in answer.assessment.comparisons if "bdh:regime=carried" in (c.first, c.second)]
    assert across
    assert all(c.decision.unranked for c in across)
    content = content_of(run)
    assert [row[0].text for row in content.models.rows] == ["bdh (crop)", "bdh (carried)", "llama"]
    card = next(t for t in content.tables if t.id == "table-fairness")
    assert card.columns[1:] == ("bdh (crop)", "bdh (carried)", "llama")
    assert [e.text for e in next(r for r in card.rows if r[0].text == "training regime")][1:] == [
        "crop",
        "carried",
        "crop",
    ]
    labels = {s.label.split(": ")[0] for f in content.figures for s in f.series}  # times against depth add a slope
    assert labels == {"bdh (crop)", "bdh (carried)", "llama"}


def test_bytes_and_times_are_said_once_for_both_regimes(tmp_path: Path) -> None:
    run = two_regimes(tmp_path)
    assert Facts(run, points_of(run)).machines() == ["bdh", "llama"]
    texts = [c.text for c in answer_of(run).claims if c.topic in ("memory", "time")]
    assert texts
    assert not [text for text in texts if "carried" in text]
    assert without_regime("bdh@1m:regime=carried:decay=0.9") == "bdh@1m:decay=0.9"


def printed(run: Run, everything: bool = False, width: int = 80) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable(run, everything))
    return console.export_text()


def test_eighty_columns_hold_the_headline_and_the_rest_is_on_request(tmp_path: Path) -> None:
    run = two_regimes(tmp_path, documents=24)
    text = printed(run)
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) < 120
    assert "…" not in text
    first = text.splitlines()
    row = next(line for line in first if line.startswith("bdh (carried)"))
    assert len(row.split()) == 2 + 5  # every context on one line
    assert (
        text.index("[smoke]")
        < text.index("bits per byte (same targets)")
        < text.index("Verdicts")
        < text.index("Not decided\n")
    )
    assert "Fairness card" not in text
    assert "show --all" in text
    everything = printed(run, True)
    assert "Fairness card" in everything
    assert len(everything) > 1.5 * len(text)


def test_more_contexts_than_columns_go_on_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import synthetic_run

    monkeypatch.setattr(synthetic_run, "CONTEXTS", tuple(64 * 2**i for i in range(14)))
    text = printed(write_run(tmp_path, models=("bdh@1m", "mamba@1m"), tasks=("long_ppl",)))
    assert max(map(len, text.splitlines())) <= 80
    assert "continued" in text
    assert "512k" in text


def test_an_undertrained_run_says_so_at_the_top(tmp_path: Path) -> None:
    def losses(family: str, document: int, context: int, seed: int) -> float:
        return 3.0 + 0.01 * document - (0.5 * (context > 128) if family == "yardstick" else 0.0)

    run = write_run(tmp_path, models=("bdh", "llama", "yardstick"), documents=24, losses=losses, crash=None)
    text = printed(run)
    assert "[undertrained]" in text.splitlines()[0]
    assert "Not answered: from 128 to 256 bytes of context the best transformer" in " ".join(text.split())
    content = content_of(run)
    assert any("Undertrained" in note for note in content.figures[0].notes)
    sweep = next(t for t in content.tables if t.id == "table-extrapolation")
    assert {row[6].text for row in sweep.rows} == {"undertrained"}
    assert not [c for c in content.answer.verdicts if c.topic == "quality" and "after 2,048" in c.text]
