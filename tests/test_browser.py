"""Does the report work for a reader: in a real browser, from disk, without a network, by keyboard, in the dark, on paper?

Debian's Chromium (or Google Chrome) is driven by Playwright; where either is missing every test is skipped and says so. Requests,
console messages and violations of the page's content security policy are collected in every test and must be none.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import write_run
from test_capacity_calculator import with_probes
from test_recall_figures import made, needle

from bdh_bench.results.capacity_calculator import known_of
from bdh_bench.results.capacity_planning import Wish
from bdh_bench.results.contenders import Facts
from bdh_bench.results.report.write import write_report
from bdh_bench.results.tables import points_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
try:
    from playwright.sync_api import sync_playwright
except ImportError:  # an environment without the dev extra
    sync_playwright = None
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium"),
    pytest.mark.skipif(sync_playwright is None, reason="Playwright is missing: pip install 'bdh-bench[dev]'"),
]
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(1)</script>\u202e=cmd()🐉"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    return Path(write_report(write_run(folder), folder / "report.html")["html"])


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=_FLAGS)
        yield browser
        browser.close()


class Reader:
    """A page from disk, and everything that should not have happened on it."""

    def __init__(self, browser: Any, page: Path, address: str = "", **options: Any) -> None:
        self.context = browser.new_context(offline=True, **({"viewport": {"width": 1280, "height": 900}} | options))
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(page.as_uri() + address)
        if options.get("java_script_enabled", True):
            self.page.wait_for_function("document.querySelectorAll('.live svg.main-svg').length > 0")

    def close(self) -> None:
        asked = [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))]
        self.context.close()
        assert not asked, "the page asked the network"
        assert not self.complaints, "the page complained"


@pytest.fixture
def reader(chromium: Any, report: Path) -> Iterator[Reader]:
    opened = Reader(chromium, report)
    yield opened
    opened.close()


def visible_rows(page: Any, table: str) -> list[str]:
    """The texts of the rows that are not filtered out, cells separated by tabs."""
    script = "rows => rows.filter(r => !r.hidden).map(r => [...r.cells].map(c => c.textContent.trim()).join('\\t'))"
    return list(page.locator(f"{table} tbody tr").evaluate_all(script))


def test_every_figure_is_drawn(reader: Reader) -> None:
    figures = reader.page.locator("figure").count()
    reader.page.wait_for_function(f"document.querySelectorAll('.live svg.main-svg').length >= {figures}")
    assert figures >= 6
    assert reader.page.locator(".static:visible").count() == 0


def test_hiding_a_model_acts_on_all_figures_and_tables_and_is_in_the_address(reader: Reader) -> None:
    page = reader.page
    before = [row for row in visible_rows(page, "#first") if row.startswith("bdh")]
    assert before
    page.locator("#model-chips button", has_text="bdh").click()
    page.wait_for_function("location.hash.includes('m=')")
    shown = page.evaluate(
        "[...document.querySelectorAll('.live')].map(p => p.data.filter(t => t.meta === 'bdh').map(t => t.visible)).flat()"
    )
    assert len(shown) >= 5
    assert set(shown) == {"legendonly"}
    assert not [row for row in visible_rows(page, "#first") if row.startswith("bdh")]
    assert [row for row in visible_rows(page, "#first") if row.startswith("mamba")]


def test_a_legend_acts_on_the_other_figures(reader: Reader) -> None:
    page = reader.page
    page.locator("#figure-quality .legendtoggle").first.click()
    page.wait_for_function("location.hash.includes('m=')")
    hidden = page.evaluate(
        "document.querySelector('#figure-memory .live').data.filter(t => t.visible === 'legendonly').length"
    )
    assert hidden >= 1


def test_a_deep_link_restores_what_was_shown(chromium: Any, report: Path) -> None:
    reader = Reader(chromium, report, "#m=mamba&x=linear&q=mamba&t=dark")
    page = reader.page
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.input_value("#query") == "mamba"
    assert page.get_attribute("#x-scale", "aria-pressed") == "true"
    assert page.evaluate("document.querySelector('#figure-quality .live').layout.xaxis.type") == "linear"
    pressed = page.locator("#model-chips button[aria-pressed=true]").all_inner_texts()
    assert [text.strip() for text in pressed] == ["mamba"]
    key = str(page.locator(".cells li").nth(3).get_attribute("id"))
    page.evaluate(f"location.hash = '{key}'")
    page.wait_for_function("document.querySelector('li.target')")
    assert page.locator("li.target").get_attribute("id") == key
    reader.close()


def test_evidence_leads_to_its_cell_and_keeps_the_filters(reader: Reader) -> None:
    page = reader.page
    page.fill("#query", "bdh")
    page.locator(".answer .sources a").first.click()
    page.wait_for_function("location.hash.includes('cell=')")
    assert "q=bdh" in page.evaluate("location.hash")
    assert page.locator("li.target").count() == 1


def test_without_scripts_every_figure_and_table_is_there(chromium: Any, report: Path) -> None:
    reader = Reader(chromium, report, java_script_enabled=False)
    figures = reader.page.locator("figure").count()
    assert reader.page.locator(".static svg").count() == figures
    assert reader.page.locator(".static svg:visible").count() == figures
    assert reader.page.locator("#toolbar:visible").count() == 0
    assert reader.page.locator("#first:visible").count() == 1
    reader.close()


def test_paper_shows_static_pictures_and_opens_what_is_folded(reader: Reader) -> None:
    page = reader.page
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".live:visible").count() == 0
    assert page.locator("#toolbar:visible").count() == 0
    assert page.locator(".static:visible").count() == page.locator("figure").count()
    assert page.locator("details:not([open])").count() == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.parametrize("how", ["system", "switch"])
def test_dark(chromium: Any, report: Path, how: str) -> None:
    reader = Reader(chromium, report, color_scheme="dark" if how == "system" else "light")
    if how == "switch":
        reader.page.select_option("#theme", "dark")
    background = reader.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(15, 20, 25)"
    reader.page.wait_for_function("document.querySelector('#figure-quality .live').layout.font.color.startsWith('#e6')")
    reader.close()


def test_hover_and_keyboard_show_value_and_interval(reader: Reader) -> None:
    page = reader.page
    place = page.locator("#figure-quality .live")
    place.scroll_into_view_if_needed()
    place.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('#figure-quality .hovertext')")
    shown = page.locator("#figure-quality .hovertext").first.text_content()
    spoken = page.locator("#spoken").text_content()
    for text in (shown, spoken):
        assert re.search(r"context 128.*\d\.\d+ .*\[\d\.\d+.+\d\.\d+\]", text), text


def test_sorting_puts_gaps_last(reader: Reader) -> None:
    page = reader.page
    page.locator("#every summary").click()
    head = page.locator("#points thead button", has_text="value")
    for direction in ("ascending", "descending"):
        head.click()
        assert page.locator(f"#points th[aria-sort={direction}]").count() == 1
        values = [row.split("\t")[7] for row in visible_rows(page, "#points")]
        gaps = [value in ("—", "") for value in values]
        assert any(gaps)
        assert gaps == sorted(gaps)


def test_every_point_is_in_the_table(reader: Reader, report: Path) -> None:
    written = report.with_name("results.csv").read_text(encoding="utf-8").count("\n") - 1
    assert reader.page.locator("#points tbody tr").count() == written


def test_filter_changes_the_table(reader: Reader) -> None:
    page = reader.page
    before = len(visible_rows(page, "#points"))
    page.fill("#query", "latency")
    after = visible_rows(page, "#points")
    assert 0 < len(after) < before
    assert all("latency" in row for row in after)
    page.click("#reset")
    assert len(visible_rows(page, "#points")) == before


def test_exports_hold_the_rows_of_the_table(reader: Reader, tmp_path: Path) -> None:
    page = reader.page
    reader.context.grant_permissions(["clipboard-read", "clipboard-write"])
    table = page.locator("section.answer")
    rows = len(visible_rows(page, "#first"))
    table.get_by_role("button", name="JSON").click()
    page.get_by_role("button", name="copied").wait_for()
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert len(copied) == rows
    assert {"model"} <= set(copied[0])
    for name, beginning in (("SVG", "<svg"), ("PNG", "\ufffdPNG"), ("CSV", '"series"')):
        with page.expect_download() as download:
            page.locator("#figure-quality .tools").first.get_by_role("button", name=name).click()
        saved = tmp_path / name
        download.value.save_as(saved)
        assert saved.read_bytes().decode("utf-8", "replace").startswith(beginning), name


@pytest.mark.parametrize("width", [360, 1440])
def test_nothing_is_wider_than_the_screen(chromium: Any, report: Path, width: int) -> None:
    reader = Reader(chromium, report, viewport={"width": width, "height": 800})
    assert reader.page.evaluate("document.documentElement.scrollWidth") <= width
    reader.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(chromium: Any, report: Path, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    reader = Reader(chromium, report, color_scheme=scheme)
    found = Axe().run(reader.page).response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    assert not serious, [(v["id"], [n["html"][:200] for n in v["nodes"][:3]]) for v in serious]
    reader.close()


def test_readable_in_time(reader: Reader) -> None:
    """Until the answer is painted; on a machine that others use, so several times what is asked of a quiet one."""
    painted = reader.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert painted < 6000


@pytest.fixture(scope="module")
def with_grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("capacity")
    run = with_probes(write_run(folder, crash=None))
    return run, Path(write_report(run, folder / "report.html", static=True)["html"])


def test_the_calculator_says_what_the_planner_says(chromium: Any, with_grid: tuple[Any, Path]) -> None:
    """Measured, interpolated and by formula, with and without latency, price and bandwidth."""
    run, written = with_grid
    known = known_of(Facts(run, points_of(run)))
    context = chromium.new_context(offline=True)
    page = context.new_page()
    page.goto(written.as_uri())
    assert page.locator("#capacity-fixed:visible").count() == 0
    seen = set()
    for memory, tokens, latency, price, bandwidth in (
        (0.375, 512, "", "", ""),
        (0.375, 300, "4", "2.5", ""),
        (0.4, 128, "", "1", "20"),
        (16, 2048, "", "2", "50"),
        (0.5, 200, "7", "3", "40"),
        (4, 100_000, "8", "2", "100"),
        (0.003, 128, "", "", "10"),
        (0.29, 700, "", "", "30"),
    ):
        wishes = {"memory": memory, "context": tokens, "latency": latency, "price": price, "bandwidth": bandwidth}
        for name, value in wishes.items():
            page.fill(f"#calculator [name={name}]", str(value))
        wish = Wish(
            round(memory * 2**30), tokens, *(float(v) * by if v else None for v, by in ((latency, 1e-3), (price, 1), (bandwidth, 1e9)))
        )  # fmt: skip
        rows = page.locator("#capacity-answers tbody tr").evaluate_all(
            "rows => rows.map(r => [...r.cells].map(c => [c.dataset.value ?? '', c.textContent]))"
        )
        assert len(rows) == len(known) == 3
        for one, row in zip(known, rows, strict=True):
            said = one.capacity(wish)
            assert row[0][1] == one.label
            expected = (said.streams, said.tokens_per_s, said.step_s and said.step_s * 1e3, said.cost_per_million)
            for (value, text), number in zip(row[1:5], expected, strict=True):
                assert (float(value) if value else None) == (
                    pytest.approx(number, rel=1e-9) if number is not None else None
                ), (wish, one.label, text)
            if said.streams is not None:
                assert row[1][1].endswith(f"({said.streams_by})")
            assert row[5][1].split(":")[0].split(" (")[0] == said.limit.split(":")[0]
            seen.add((said.streams_by, said.limit.split(":")[0]))
    assert {("measured", "memory"), ("measured", "latency"), ("formula", "memory"), ("formula", "latency"),
            ("formula", "position limit"), ("not measured", "unknown")} <= seen  # fmt: skip
    context.close()


def test_a_map_is_drawn_read_aloud_and_hidden_with_its_model(chromium: Any, tmp_path: Path) -> None:
    run = made(tmp_path, needle=needle)
    reader = Reader(chromium, Path(write_report(run, tmp_path / "report.html")["html"]))
    page, place = reader.page, reader.page.locator("#figure-needle-map .live")
    page.wait_for_function("document.querySelectorAll('#figure-needle-map .hm image').length === 4")
    assert page.locator("#figure-needle-map .static:visible").count() == 0
    place.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#spoken").text_content() == (
        "bdh: context, bytes 256, bdh · 0 %: share of needles ranked first 0.38"
    )
    page.locator("#model-chips button", has_text="bdh").click()
    page.wait_for_function("document.querySelectorAll('#figure-needle-map .hm image').length === 3")
    reader.close()


def test_hostile_names_run_nothing(chromium: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path, rename=lambda name: name.replace("mamba", f"mamba{HOSTILE}"))
    reader = Reader(chromium, Path(write_report(run, tmp_path / "report.html")["html"]))
    dialogs: list[Any] = []
    reader.page.on("dialog", lambda dialog: dialogs.append(dialog))
    reader.page.locator("#model-chips button").nth(1).click()
    assert not dialogs
    assert reader.page.locator("img").count() == 0
    reader.close()


def test_a_page_that_asks_the_network_is_noticed(chromium: Any, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='https://example.org/x.png'><div class='live'><svg class='main-svg'></svg></div>")
    reader = Reader(chromium, page)
    with pytest.raises(AssertionError, match="network"):
        reader.close()
