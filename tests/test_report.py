"""Is the page whole, inert, silent on the network, and there for every run however empty?"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_run import write_run

from bdh_bench.results.escaping import markdown
from bdh_bench.results.export import export
from bdh_bench.results.figure import from_json
from bdh_bench.results.report.page import content_of, render
from bdh_bench.results.report.write import as_text, write_report
from bdh_bench.results.terminal import renderable, show

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "=cmd()|' /C calc'!A0",
    "\u202egnp.exe",
    "🐉💥\x1b[31m\x07",
    "x" * 300,
    "${7*7}{{7*7}}\\input{/etc/passwd}",
    "a|b`c`[d](javascript:alert(1))",
)
ASSETS = Path(__file__).parents[1] / "bdh_bench" / "results" / "report"


class Page(HTMLParser):
    """Tags and attributes of a page, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append((self.tags[-1][1], data))
        else:
            self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("report")
    return folder, write_report(write_run(folder), folder / "out" / "report.html")


def test_five_files_and_nothing_half_written(written: tuple[Path, dict[str, str]]) -> None:
    folder, files = written
    names = {"report.html", "report.md", "summary.md", "report.json", "results.csv"}
    assert {path.name for path in (folder / "out").iterdir()} == names
    assert {Path(path).name for path in files.values()} == names


def test_the_json_beside_the_page_holds_its_points_and_figures(written: tuple[Path, dict[str, str]]) -> None:
    held = json.loads(Path(written[1]["json"]).read_text(encoding="utf-8"), parse_constant=pytest.fail)
    rows = list(csv.DictReader(io.StringIO(Path(written[1]["csv"]).read_text(encoding="utf-8"))))
    assert [str(point["value"]) for point in held["points"] if point["value"] is not None] == [
        row["value"] for row in rows if row["value"]
    ]
    content = content_of(write_run(written[0] / "again"))
    assert tuple(from_json(figure) for figure in held["figures"]) == content.figures
    summary = Path(written[1]["summary"]).read_text(encoding="utf-8")
    assert all(markdown(line.text) in summary for line in content.answer.lines)


def test_static_pages_are_small_and_pictures_are_files(tmp_path: Path) -> None:
    files = write_report(write_run(tmp_path), tmp_path / "out", static=True, pictures=True)
    assert Path(files["html"]).stat().st_size < 1_500_000
    beginnings = {"svg": b"<?xml", "pdf": b"%PDF", "png": b"\x89PNG"}
    made = {path.name: path.read_bytes() for path in Path(files["figures"]).iterdir()}
    assert len(made) == 3 * len(content_of(write_run(tmp_path / "again")).figures)
    assert all(content.startswith(beginnings[name.rpartition(".")[2]]) for name, content in made.items())
    write_report(write_run(tmp_path / "more"), tmp_path / "out", static=True, pictures=True)
    assert made == {path.name: path.read_bytes() for path in Path(files["figures"]).iterdir()}


def test_plotly_is_inlined_once_and_the_rest_is_small(written: tuple[Path, dict[str, str]]) -> None:
    text = Path(written[1]["html"]).read_text(encoding="utf-8")
    assert text.count("* plotly.js v") == 1
    assert len(text.encode()) < 6_500_000


def test_policy_allows_the_scripts_of_the_page_and_no_others(written: tuple[Path, dict[str, str]]) -> None:
    page = Page(Path(written[1]["html"]).read_text(encoding="utf-8"))
    meta = next(
        attrs["content"] or "" for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert meta.startswith("default-src 'none'; ")
    assert "unsafe-eval" not in meta
    running = [text for attrs, text in page.scripts if attrs.get("type") != "application/json" and text.strip()]
    assert len(running) == 2
    for text in running:
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in meta


def small(tmp_path: Path, **options: object) -> str:
    return render(content_of(write_run(tmp_path, **options)))  # type: ignore[arg-type]


def test_nothing_is_loaded_and_nothing_is_inline_code(tmp_path: Path) -> None:
    page = Page(small(tmp_path))
    for _, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attrs.get(name) or "#").startswith("#"), attrs
    assert "@import" not in small(tmp_path / "again")
    assert not re.search(r"url\((?!#)", (ASSETS / "page.css").read_text(encoding="utf-8"))


def test_every_static_picture_is_there_without_scripts(tmp_path: Path) -> None:
    text = small(tmp_path)
    assert text.count("<svg ") == text.count("<figure ") == 9
    assert text.count("<summary>Data</summary>") == 9
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_every_reference_leads_somewhere(tmp_path: Path) -> None:
    page = Page(small(tmp_path))
    ids = {attrs.get("id") for _, attrs in page.tags}
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links
    assert {str(link)[1:] for link in links} <= ids


def test_figure_data_is_json_without_nan(tmp_path: Path) -> None:
    page = Page(small(tmp_path))
    data = "".join(text for attrs, text in page.scripts if attrs.get("id") == "figure-data")
    assert set(json.loads(data, parse_constant=lambda name: pytest.fail(name))) >= {"quality", "memory", "tpot"}


def test_the_answer_comes_first(tmp_path: Path) -> None:
    text = small(tmp_path)
    assert text.index("smoke: not ranked") < text.index("What it does not decide") < text.index("<svg")
    assert "smoke</span>" in text
    assert "RuntimeError: boom" in text
    assert "worker ended by signal 11" in text


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_inert(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path, rename=lambda text: text + name, manifest={"labels": [name], "command": name})
    html = render(content_of(run))
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 5
    assert not [attrs for _, attrs in page.tags if any(key.startswith("on") for key in attrs)]
    for text in (html, as_text(content_of(run)), export(run, "latex"), export(run, "md")):
        assert "<img" not in text
        assert "</script><script>" not in text
    for text in (html, as_text(content_of(run)), *(export(run, format_) for format_ in ("csv", "latex", "md"))):
        assert not re.search("[\\u202e\\x1b\\x07]", text)
    assert "[d](javascript" not in as_text(content_of(run))
    assert r"\input" not in export(run, "latex")


def test_no_csv_cell_is_a_formula(tmp_path: Path) -> None:
    run = write_run(tmp_path, rename=lambda text: f"=cmd(){text}")
    cells = [cell for row in csv.reader(io.StringIO(export(run, "csv"))) for cell in row]
    assert "'=cmd()bdh@1m" in cells
    assert not [cell for cell in cells if cell[:1] in ("=", "@")]


@pytest.mark.parametrize("options", [{"models": ()}, {"crash": "all"}, {"models": ("bdh@1m",)}, {"seeds": 3, "documents": 5},
                                     {"manifest": {"corpus": None, "references": [], "environment": {}, "spec": {}}}])  # fmt: skip
def test_every_run_has_a_page(tmp_path: Path, options: dict[str, object]) -> None:
    run = write_run(tmp_path, **options)  # type: ignore[arg-type]
    page = Page(render(content_of(run)))
    assert "What it does not decide" in page.text
    assert "nan" not in re.findall(r"[a-z]+", page.text.lower())
    assert as_text(content_of(run))


def test_a_log_outside_the_run_is_not_read(tmp_path: Path) -> None:
    from dataclasses import replace

    from bdh_bench.results.report.page import log_tail

    run = write_run(tmp_path)
    (tmp_path / "secret.txt").write_text("a secret\n", encoding="utf-8")
    (run.path / "own.log").write_text("own line\n", encoding="utf-8")
    assert "secret\n" not in log_tail(run, replace(run.cells[0], log="../secret.txt"))
    assert "own line" in log_tail(run, replace(run.cells[0], log="own.log"))


def test_the_terminal_shows_the_answer_and_the_tables(tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(renderable(write_run(tmp_path, rename=lambda text: f"{text}[red]\x1b[2J")))
    text = console.export_text()
    assert "not ranked" in text
    assert "[red]" in text
    assert "\x1b[2J" not in text


def test_show_prints_plain_text_into_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(write_run(tmp_path))
    printed = capsys.readouterr().out
    assert "Not decided" in printed
    assert "\x1b" not in printed


def test_the_reading_half_needs_no_torch() -> None:
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import bdh_bench.results.terminal, bdh_bench.results.export, bdh_bench.results.report.write, bdh_bench.results.figures
heavy = {"pandas", "plotly", "matplotlib", "jinja2", "rich"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
