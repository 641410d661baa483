"""What stands on the page of a run, and in which order? The answer first, then tables, pictures, failures, method, origin.

One file that opens from disk: no request leaves it, and its policy allows no script but the ones whose hashes it names.
Everything a run holds is untrusted: the template escapes it, JSON inside the page is escaped on its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bdh_bench.metrics import METRICS
from bdh_bench.results.answer import BACKGROUND, QUESTION
from bdh_bench.results.capacity_calculator import known_of, without_script
from bdh_bench.results.claims import VERDICTS_MEAN, Answer, answer_of
from bdh_bench.results.contenders import QUALITY
from bdh_bench.results.display import GAP, count, interval, number, quantity
from bdh_bench.results.escaping import json_in_html, plain
from bdh_bench.results.figure import BREAK, Dot, Figure
from bdh_bench.results.figures import figures_of
from bdh_bench.results.regression import baseline_table, compare
from bdh_bench.results.report.render_matplotlib import to_svg
from bdh_bench.results.report.render_plotly import to_plotly
from bdh_bench.results.score_cards import score_cards
from bdh_bench.results.store import CellOutcome, Run
from bdh_bench.results.tables import HASH_AXIS, Entry, Point, Table, finite, headlines_of, points_of, value_tables
from bdh_bench.results.validity import without_signal

_FOLDER = Path(__file__).parent
_LOG_TAIL = 4000
#: Rows of one table of the page; the exports have all.
_MOST_ROWS = 60
#: Points that the page carries; results.csv has all.
_MOST_POINTS = 2000


@dataclass(frozen=True)
class Content:
    """Everything that is said about a run, before it becomes HTML or Markdown."""

    run: Run
    points: tuple[Point, ...]
    answer: Answer
    models: Table
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...]


def content_of(run: Run, baseline: Run | None = None) -> Content:
    """The content of the report of a run, compared with another one where that is given."""
    points = points_of(run)
    answer = answer_of(run, points)
    facts = answer.assessment.facts
    tables = (
        *value_tables(points, facts.titles, headlines_of(run), without_signal(answer.assessment.signals)),
        *([cards] if (cards := score_cards(facts)).rows else []),
        *answer.assessment.tables(),
        *([baseline_table(compare(baseline, [run]))] if baseline else []),
    )
    return Content(run, points, answer, models_table(run, facts.titles), tables, figures_of(run, points))


def models_table(run: Run, titles: Mapping[str, str]) -> Table:
    """What was compared: one row per model, by its short name, with its whole one."""
    seen: dict[str, CellOutcome] = {}
    for cell in run.cells:
        if cell.facts or cell.model not in seen:
            seen.setdefault(cell.model, cell)
            seen[cell.model] = cell if "training" in cell.facts or not seen[cell.model].facts else seen[cell.model]
    rows = tuple((Entry(titles[model]), *(Entry(text) for text in _model_row(cell))) for model, cell in seen.items())
    columns = ("model", "whole name", "parameters", "weights", "trained on", "validation", "positions", "kernels")
    return Table("models", "Models", "What was compared, and how it came to its weights.", columns, rows)


def _model_row(cell: CellOutcome) -> tuple[str, ...]:
    facts = cell.facts
    training = _mapping(facts.get("training"))
    parameters, read, limit = (
        finite(v) for v in (facts.get("parameters"), training.get("bytes"), facts.get("max_positions"))
    )
    return (
        cell.model,
        GAP if parameters is None else count(parameters),
        str(facts.get("weights") or GAP),
        GAP if read is None else f"{count(read)} bytes{_regime(training)}",
        number(finite(training.get("validation_bits_per_byte")), "bit/byte"),
        "any" if facts and limit is None else GAP if limit is None else count(limit),
        str(facts.get("kernels") or GAP),
    )


def _regime(training: Mapping[str, Any]) -> str:
    """How pieces followed each other in training, and after how many bytes a carried state was emptied."""
    if "regime" not in training:
        return ""
    limit = finite(training.get("carry_limit"))
    return f", {training['regime']}" + (f" up to {count(limit)}" if limit is not None else "")


def render(content: Content, plotly_js: str | None = None) -> str:
    """The page. ``plotly_js`` is the source of the plotting library; without it the static pictures stay."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = plain
    environment.globals["most_rows"] = _MOST_ROWS
    scripts = [_script(text) for text in (plotly_js, _asset("capacity.js") + _asset("page.js")) if text is not None]
    return environment.get_template("page.html.j2").render(
        question=QUESTION,
        background=BACKGROUND,
        run=content.run,
        labels=content.answer.assessment.labels,
        answer=content.answer,
        evidence=_evidence_names(content.run),
        models=content.models,
        first=first_table(content.tables),
        verdicts_mean=VERDICTS_MEAN,
        tables=[table for table in content.tables if not table.detail],
        details=[table for table in content.tables if table.detail],
        figures=[(figure, to_svg(figure), figure_table(figure)) for figure in content.figures],
        figure_data=json_in_html({figure.id: to_plotly(figure) for figure in content.figures}),
        capacity=(known := known_of(content.answer.assessment.facts)),
        capacity_table=without_script(content.answer.assessment.facts, known),
        capacity_json=json_in_html([one.as_json() for one in known]),
        chips=(chips := chips_of(content.figures)),
        model_names=json_in_html([name for name, _ in chips]),
        point_count=len(content.points),
        points_shown=_MOST_POINTS,
        point_data=(data := point_data(content.points, content.answer.assessment.facts.names)),
        point_json=json_in_html(data),
        failures=failures_of(content.run),
        metrics=[metric for name, metric in METRICS.items() if name in {point.metric for point in content.points}],
        provenance=provenance_of(content.run),
        documents=_documents(content.run),
        cells=[(cell, cell_command(content.run, cell)) for cell in content.run.cells],
        references=[_mapping(row) for row in content.run.manifest.get("references") or []],
        css=_asset("page.css"),
        policy=policy([text for text, _ in scripts]),
        scripts=[text for text, _ in scripts],
    )


def chips_of(figures: Sequence[Figure]) -> list[tuple[str, str]]:
    """(short name, colour) of every model that is drawn: what a reader can show and hide."""
    lines = (line for figure in figures for line in figure.series if line.model)
    return list({line.model: line.color for line in lines}.items())


def point_data(points: Sequence[Point], names: Mapping[str, str]) -> dict[str, Any]:
    """The points as a table of texts: columns, the words that occur, and rows of numbers of words (or of rare texts)."""
    columns = (
        "model",
        "task",
        "metric",
        "context",
        "batch size",
        "axes",
        "seed",
        "value",
        "95 %",
        "n",
        "status",
        "cell",
    )
    words: dict[str, int] = {}
    rows = []
    for point in points[:_MOST_POINTS]:
        axes = ", ".join(f"{name}={value}" for name, value in point.axes if name != HASH_AXIS)
        common = (
            names.get(point.model, point.model), point.task, point.metric, str(point.context), str(point.batch_size), axes,
            "all" if point.seed is None else str(point.seed),
        )  # fmt: skip
        value, span = quantity(point.value, point.unit), interval(point.low, point.high, point.unit)
        status = f"{point.status}: {point.reason}" if point.reason else point.status
        numbers = [words.setdefault(plain(text), len(words)) for text in common]
        ends = [words.setdefault(plain(text), len(words)) for text in (str(point.n), status, (point.cells or ("",))[0])]
        rows.append([*numbers, plain(value), plain(span), *ends])
    return {"columns": columns, "words": list(words), "rows": rows}


def first_table(tables: Sequence[Table]) -> Table | None:
    """The table that stands in the answer: quality by context, else whatever comes first."""
    shown = [table for table in tables if not table.detail]
    quality = f": {METRICS[QUALITY].label}"
    found = next((table for table in shown if table.title.endswith(quality)), shown[0] if shown else None)
    if found is None:
        return None
    rows = tuple((row[0], *(_bare(entry) for entry in row[1:])) for row in found.rows)
    return replace(found, id="first", rows=rows)


def _bare(entry: Entry) -> Entry:
    """The value with its interval; why there is none stands in the tables."""
    return Entry(
        "stopped" if entry.text == "unsupported" else entry.text, entry.note if entry.note.startswith("[") else ""
    )


def policy(scripts: Sequence[str]) -> str:
    """The content security policy: nothing is loaded, and only these scripts run."""
    hashes = " ".join(f"'sha256-{_digest(text)}'" for text in scripts) or "'none'"
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _script(text: str) -> tuple[str, str]:
    """A script as a browser will see it between its tags. Raises ValueError where it would end the tag."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "</script" in text.lower() or "<!--" in text:
        raise ValueError("got a script that closes its own tag · expected one that can be inlined")
    return text, _digest(text)


def _asset(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def figure_table(figure: Figure) -> Table:
    """The data behind a picture; of a long line every n-th dot, and the last."""
    if figure.heats:
        return _map_table(figure)
    rows = tuple(
        tuple(
            Entry(text) for text in (line.label, figure.x.read(dot.x), quantity(dot.y, figure.y.unit), span, dot.status)
        )
        for line in figure.series
        for dot in _thinned(line.points)
        if dot.status != BREAK
        for span in [interval(dot.low, dot.high, figure.y.unit)]
    )
    return Table(
        f"data-{figure.id}", figure.title, "", ("series", figure.x.label, figure.y.label, "95 %", "status"), rows
    )


def _map_table(figure: Figure) -> Table:
    rows = tuple(
        tuple(
            Entry(text)
            for text in (
                heat.label,
                figure.y.read(c.y),
                figure.x.read(c.x),
                c.text if c.value is not None else GAP,
                c.status,
            )
        )
        for heat in figure.heats
        for c in heat.cells
    )
    columns = ("series", figure.y.label, figure.x.label, figure.z, "status")
    return Table(f"data-{figure.id}", figure.title, "", columns, rows)


def _thinned(dots: Sequence[Dot]) -> Sequence[Dot]:
    every = -(-len(dots) // 10)
    return dots if every < 3 else (*dots[:-1:every], dots[-1])


def failures_of(run: Run) -> list[tuple[CellOutcome, str]]:
    """Cells without a measured value, with the tail of their log."""
    return [(cell, log_tail(run, cell)) for cell in run.cells if cell.kind != "ok"]


def log_tail(run: Run, cell: CellOutcome) -> str:
    """The last lines of a cell's log: the stored text, or the file inside the run that it names."""
    text = str(cell.log)
    if text and "\n" not in text and len(text) < 300:
        path = run.path / text
        try:  # never outside the run's own folder, whatever the store says
            if path.is_file() and path.resolve().is_relative_to(run.path.resolve()):
                with open(path, "rb") as file:
                    file.seek(max(0, path.stat().st_size - _LOG_TAIL))
                    text = file.read(_LOG_TAIL).decode("utf-8", "replace")
        except (OSError, ValueError):
            pass
    return plain(text[-_LOG_TAIL:], keep_lines=True)


def cell_command(run: Run, cell: CellOutcome) -> str:
    """A command that runs this one cell again."""
    spec = _mapping(run.manifest.get("spec"))
    parts = ["bdh-bench", "run", "--models", cell.model, "--task", cell.task, "--seed", str(cell.seed)]
    if cell.context is not None:
        parts += ["--contexts", str(cell.context)]
    elif isinstance(spec.get("contexts"), list | tuple):
        parts += ["--contexts", ",".join(str(context) for context in spec["contexts"])]
    for option, name in (("--data", "data"), ("--train-bytes", "train_bytes"), ("--train-context", "train_context")):
        if isinstance(spec.get(name), str | int):
            parts += [option, str(spec[name])]
    for option, name in (
        ("--device", "device"),
        ("--threads", "threads"),
        ("--regime", "regime"),
        ("--match", "match"),
    ):
        if isinstance(spec.get(name), str | int):
            parts += [option, str(spec[name])]
    parts += ["--rounds", str(len(cell.rounds))] if len(cell.rounds) > 1 else []
    return plain(shlex.join(parts + (["--smoke"] if spec.get("smoke") else [])))


def provenance_of(run: Run) -> list[tuple[str, str]]:
    """Where the numbers come from, as name and text."""
    manifest = run.manifest
    environment = _mapping(manifest.get("environment"))
    corpus = _mapping(manifest.get("corpus"))
    documents = _documents(run)
    rows = [
        ("run", run.id),
        ("created", manifest.get("created", GAP)),
        ("command", manifest.get("command", GAP)),
        ("specification digest", manifest.get("spec_digest", GAP)),
        *((f"specification: {name}", _text(value)) for name, value in _mapping(manifest.get("spec")).items()),
        *((name.replace("_", " "), _environment(name, value)) for name, value in environment.items()),
    ]
    if corpus:
        size = sum(int(finite(document.get("bytes")) or 0) for document in documents)
        rows.append(("corpus", f"{corpus.get('name', GAP)}: {count(len(documents))} documents, {count(size)} bytes"))
        rows += [(f"corpus {name}", _text(corpus[name])) for name in ("python", "notes") if corpus.get(name)]
    return [(plain(name), plain(value)) for name, value in rows]


def _environment(name: str, value: object) -> str:
    if name == "selftest" and isinstance(value, Mapping):
        return _selftest(value)
    return quantity(finite(value), "byte") if name.endswith("_bytes") else _text(value)


def _selftest(kept: Mapping[str, Any]) -> str:
    """What the harness proved before this run; by name whatever it did not recover."""
    verdicts = _mapping(kept.get("verdicts"))
    parts = [str(kept.get("result", GAP))]
    parts += [f"{name}: {verdict}" for name, verdict in verdicts.items() if verdict != "recovered"]
    if "time" in kept:
        parts.append(f"{kept['time']}, version {kept.get('version', GAP)}, of {kept.get('of', GAP)}")
    return "; ".join(parts)


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(inner) for inner in value) or GAP
    return GAP if value is None else value if isinstance(value, str) else json.dumps(value)


def _documents(run: Run) -> list[Mapping[str, Any]]:
    documents = _mapping(run.manifest.get("corpus")).get("documents") or []
    return [_mapping(document) for document in documents]


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _evidence_names(run: Run) -> dict[str, str]:
    """cell key → what a reader sees as the link to it."""
    return {cell.key: plain(f"{cell.model} · {cell.task} · seed {cell.seed}") for cell in run.cells}
