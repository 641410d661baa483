"""Where does a report go? An HTML file, the same in Markdown, and the points as CSV beside it, each written whole or not."""

from __future__ import annotations

from pathlib import Path

from bdh_bench.errors import StoreError
from bdh_bench.results.claims import VERDICTS_MEAN
from bdh_bench.results.escaping import markdown
from bdh_bench.results.export import as_csv, markdown_table, point_as_json
from bdh_bench.results.report.page import QUESTION, Content, content_of, failures_of, provenance_of, render
from bdh_bench.results.store import Run, write_atomically


def write_report(run: Run, output: Path) -> dict[str, str]:
    """Write the report of a run. ``output`` is the HTML file, or a folder for report.html; returns what was written."""
    page = output if output.suffix.lower() in (".html", ".htm") else output / "report.html"
    files = {"html": page, "markdown": page.with_suffix(".md"), "csv": page.with_name("results.csv")}
    content = content_of(run)
    texts = {
        "html": render(content, _plotly_source()),
        "markdown": as_text(content),
        "csv": as_csv(point_as_json(point) for point in content.points),
    }
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "choose a writable folder with --output"
        raise StoreError(f"cannot create {page.parent}: {error.strerror or error}", hint) from error
    for name, path in files.items():
        write_atomically(path, texts[name])
    return {name: str(path) for name, path in files.items()}


def as_text(content: Content) -> str:
    """The report as Markdown: to paste where a page cannot go."""
    labels = ", ".join(content.answer.assessment.labels)
    lines = [f"# {QUESTION}", "", f"Run {markdown(content.run.id)}{f' ({markdown(labels)})' if labels else ''}.", ""]
    lines += [markdown(content.answer.paragraph.text), "", "## Not decided", ""]
    lines += [f"- {markdown(claim.text)}" for claim in content.answer.open]
    lines += ["", "## What was measured", "", VERDICTS_MEAN, ""]
    said = (*content.answer.verdicts, *content.answer.details)
    lines += [f"- {markdown(claim.text)}" for claim in said] or ["- Nothing."]
    lines += ["", "## Tables", "", markdown_table(content.models), *map(markdown_table, content.tables)]
    lines += ["## What has no value, and why", ""]
    lines += [
        f"- {markdown(cell.model)} on {markdown(cell.task)}: {markdown(cell.status)} {markdown(cell.reason)}"
        for cell, _ in failures_of(content.run)
    ] or ["- Nothing: every cell was measured."]
    lines += ["", "## Where the numbers come from", ""]
    lines += [f"- {markdown(name)}: {markdown(value)}" for name, value in provenance_of(content.run)]
    return "\n".join([*lines, ""])


def _plotly_source() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())
