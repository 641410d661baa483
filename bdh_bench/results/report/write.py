"""Where does a report go? An HTML file, and beside it Markdown, a summary to paste, JSON, CSV and, on request, pictures; each whole or not.

report.html    the page; report.md the same as text
summary.md     the answer and its table, for a pull request
report.json    points, assessment and figure descriptions, for programs
results.csv    the points
figures/       every figure as SVG, PDF and PNG
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bdh_bench.errors import StoreError
from bdh_bench.results.answer import BACKGROUND, QUESTION
from bdh_bench.results.claim import Claim
from bdh_bench.results.claims import VERDICTS_MEAN, Answer
from bdh_bench.results.escaping import markdown
from bdh_bench.results.export import as_csv, markdown_table, point_as_json
from bdh_bench.results.figure import to_json
from bdh_bench.results.report.page import (
    Content,
    content_of,
    failures_of,
    first_table,
    provenance_of,
    render,
)
from bdh_bench.results.report.render_matplotlib import PICTURES, to_picture
from bdh_bench.results.store import Run, write_atomically


def write_report(
    run: Run, output: Path, static: bool = False, pictures: bool = False, baseline: Run | None = None
) -> dict[str, str]:
    """Write the report of a run; returns what was written where.

    ``output`` is the HTML file, or a folder for report.html. ``static`` leaves the plotting library out of the page (the pictures
    stay); ``pictures`` writes figures/ too; ``baseline`` is a run to compare with. Raises StoreError.
    """
    page = output if output.suffix.lower() in (".html", ".htm") else output / "report.html"
    files = {
        "html": page,
        "markdown": page.with_suffix(".md"),
        "summary": page.with_name("summary.md"),
        "json": page.with_suffix(".json"),
        "csv": page.with_name("results.csv"),
    }
    content = content_of(run, baseline)
    texts = {
        "html": render(content, None if static else _plotly_source()),
        "markdown": as_text(content),
        "summary": as_summary(content),
        "json": as_json(content),
        "csv": as_csv(point_as_json(point) for point in content.points),
    }
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "choose a writable folder with --output"
        raise StoreError(f"cannot create {page.parent}: {error.strerror or error}", hint) from error
    for name, path in files.items():
        write_atomically(path, texts[name])
    written = {name: str(path) for name, path in files.items()}
    return written | ({"figures": str(_write_pictures(content, page.with_name("figures")))} if pictures else {})


def _write_pictures(content: Content, folder: Path) -> Path:
    try:
        folder.mkdir(exist_ok=True)
        for figure in content.figures:
            for format_ in PICTURES:
                (folder / f"{figure.id}.{format_}").write_bytes(to_picture(figure, format_))
    except OSError as error:
        raise StoreError(f"cannot write {folder}: {error.strerror or error}", "check space and permissions") from error
    return folder


def as_json(content: Content) -> str:
    """Everything on the page as one JSON object: points, assessment, and the descriptions of the figures."""
    value = {
        "schema": "bdh-bench/report-file/1",
        "run": content.run.id,
        "labels": list(content.answer.assessment.labels),
        "question": QUESTION,
        "answer": [_claim_as_json(line) for line in content.answer.lines],
        "not_decided": [_claim_as_json(claim) for claim in content.answer.open],
        "points": [point_as_json(point) for point in content.points],
        "assessment": content.answer.assessment.as_json(),
        "figures": [to_json(figure) for figure in content.figures],
    }
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def _claim_as_json(claim: Claim) -> dict[str, Any]:
    value = {"text": claim.text, "scope": claim.scope, "kind": claim.kind, "cells": list(claim.evidence)}
    return {"label": claim.topic, **value, **({"command": claim.command} if claim.command else {})}


def _answer_as_text(answer: Answer) -> list[str]:
    """The lines of the answer, each with its scope, and what a reader must know to read them."""
    lines = [BACKGROUND, ""]
    return [*lines, *(f"- **{c.topic}.** {markdown(c.text)} ({markdown(c.scope)})" for c in answer.lines), ""]


def _open_as_text(answer: Answer) -> list[str]:
    """What stays open; each with the run that could decide it, on a line of its own."""
    made = (f"- {markdown(c.text)}" + (f"  \n  {markdown(c.command)}" if c.command else "") for c in answer.open)
    return list(made) or ["- Nothing that its rules ask for."]


def as_summary(content: Content) -> str:
    """The answer, its first table and what stays open, as Markdown: short enough for a pull request."""
    first = first_table(content.tables)
    lines = [f"**{QUESTION}**", "", *_answer_as_text(content.answer)]
    lines += [markdown_table(first)] if first else []
    lines += [f"- {markdown(claim.text)}" for claim in content.answer.verdicts]
    lines += ["", "Not decided, and which run could:", "", *_open_as_text(content.answer)]
    return "\n".join([*lines, ""])


def as_text(content: Content) -> str:
    """The report as Markdown: to paste where a page cannot go."""
    labels = ", ".join(content.answer.assessment.labels)
    lines = [f"# {QUESTION}", "", f"Run {markdown(content.run.id)}{f' ({markdown(labels)})' if labels else ''}.", ""]
    lines += [
        *_answer_as_text(content.answer),
        "## Not decided, and which run could",
        "",
        *_open_as_text(content.answer),
    ]
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
