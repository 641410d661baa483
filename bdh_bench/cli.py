"""The command line: it parses, calls, and prints; it decides nothing.

stdout is data, stderr is progress and messages. Exit codes: 0 all cells have a result; 1 internal error; 2 usage; 3 finished with
failed cells; 4 a regression; 5 nothing measured or compared; 6 a correctness gate failed; 7 unfit host
under --strict-host; 130 Ctrl-C (the store stays consistent).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdh_bench.errors import BenchError, SpecError, UnknownNameError

if TYPE_CHECKING:
    from bdh_bench.results.store import Run
    from bdh_bench.runner.local import Limits
    from bdh_bench.runner.selection import Selection
    from bdh_bench.spec import RunSpec

app = typer.Typer(
    name="bdh-bench",
    help="Does BDH match transformers and state-space models on long contexts without a KV cache?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        from bdh_bench import __version__

        typer.echo(f"bdh-bench {__version__}")
        raise typer.Exit


@app.callback()
def _everywhere(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Does BDH match transformers and state-space models on long contexts without a KV cache?"""


Runs = Annotated[Path, typer.Option("--runs", help="Folder that holds the runs.", envvar="BDH_BENCH_RUNS")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Data = Annotated[str, typer.Option("--data", help="stdlib, path:DIR, path:FILE or hf:NAME.")]
TrainBytes = Annotated[int, typer.Option("--train-bytes", help="Training budget in bytes.")]
TrainContext = Annotated[int, typer.Option("--train-context", help="Bytes in one training piece.")]
Device = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
Threads = Annotated[int, typer.Option("--threads", help="Threads of a worker; without it, what torch chooses.")]
Rate = Annotated[float, typer.Option("--learning-rate", help="For every model; without it, each family's own.")]
Regime = Annotated[str, typer.Option("--regime", help="crop, carried (the state goes on) or crop+carried.")]
Match = Annotated[str, typer.Option("--match", help="What is equal: params, bytes, flops, wallclock or state.")]
TrainSeconds = Annotated[float, typer.Option("--train-seconds", help="Training time of each model, with wallclock.")]
Margin = Annotated[
    float, typer.Option("--equivalence-margin", help="Bits per byte below which two models count as equal.")
]
State = Annotated[str, typer.Option("--state", help="carry, or where a scored stream starts anew: cold, window.")]
Gate = Annotated[str, typer.Option("--gate", help="Length of the correctness gates: standard or full.")]
Pieces = Annotated[str, typer.Option("--split-documents", help="Cut longer documents into pieces, for example 200KiB.")]
CellTimeout = Annotated[float, typer.Option("--cell-timeout", help="Seconds that one round of a cell may take.")]
TimeBudget = Annotated[str, typer.Option("--time-budget", help="Start nothing after so long: 90s, 30m, 2h.")]
FailFast = Annotated[bool, typer.Option("--fail-fast", help="Start nothing after the first failed round.")]
RunName = Annotated[str | None, typer.Argument(metavar="[RUN]", help="Run id or folder; the newest without it.")]

_PLAIN_BYTES, _PLAIN_CONTEXT = 1_572_864, 256


@app.command()
def run(
    models: Annotated[str, typer.Option("--models", help="NAME[@SIZE][:key=value]…, comma-separated.")] = "",
    task: Annotated[str, typer.Option("--task", help="Task names, comma-separated.")] = "",
    data: Data = "stdlib",
    contexts: Annotated[str, typer.Option("--contexts", help="FROM-TO*FACTOR or a list, in bytes.")] = "",
    train_bytes: TrainBytes = _PLAIN_BYTES,
    train_context: TrainContext = _PLAIN_CONTEXT,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Number of seeds: 0, 1, … N−1.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="One seed.")] = None,
    device: Device = "cpu",
    threads: Threads = 0,
    learning_rate: Rate = 0.0,
    regime: Regime = "crop",
    state: State = "carry",
    split_documents: Pieces = "",
    match: Match = "params",
    train_seconds: TrainSeconds = 0.0,
    equivalence_margin: Margin = 0.02,
    gate: Gate = "standard",
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", help="Rounds (fresh processes) of each cell, for tasks that repeat in rounds."),
    ] = None,
    documents: Annotated[int, typer.Option("--documents", help="Test documents at the most.")] = 10,
    budget: Annotated[str, typer.Option("--budget", help="Memory for --task capacity: 512MiB, 2GiB.")] = "",
    spec: Annotated[Path | None, typer.Option("--spec", help="A recorded experiment (TOML) instead of flags.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny budget, labelled smoke.")] = False,
    runs: Runs = Path("runs"),
    run_id: Annotated[str | None, typer.Option("--run-id", help="Name of the run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run of that id.")] = False,
    cell_timeout: CellTimeout = 7200.0,
    time_budget: TimeBudget = "",
    fail_fast: FailFast = False,
    retry: Annotated[str, typer.Option("--retry", help="Measure again what ended so, for example timeout,crash.")] = "",
    only_failed: Annotated[
        bool, typer.Option("--only-failed", help="Measure again what failed, nothing else.")
    ] = False,
    max_cells: Annotated[int | None, typer.Option("--max-cells", help="Measure at most so many cells now.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and stop.")] = False,
    json_: Json = False,
) -> None:
    """Train what is needed, measure every cell in its own process, and keep the results."""
    from bdh_bench.spec import from_toml, require_positive

    require_positive(cell_timeout=cell_timeout, rounds=1 if rounds is None else rounds)
    if spec is not None and (models or task or budget):
        raise SpecError("got --spec and --models, --task or --budget · expected one or the other")
    if spec is not None:
        request = from_toml(spec)
    else:
        request = _request(
            models,
            task,
            contexts,
            budget,
            data=data,
            train_bytes=train_bytes,
            train_context=train_context,
            seeds=_seeds(seeds, seed),
            device=device,
            threads=threads,
            learning_rate=learning_rate,
            documents=documents,
            regime=regime,
            match=match,
            train_seconds=train_seconds,
            equivalence_margin=equivalence_margin,
            state_protocol=state,
            gate=gate,
            rounds=rounds or 0,
            split_documents=_bytes(split_documents),
        )
    from bdh_bench.runner.selection import Selection, parse_statuses

    selection = Selection(parse_statuses(retry), only_failed, max_cells)
    limits = _limits(cell_timeout, time_budget, fail_fast)
    _run(_smoke(request) if smoke else request, runs, run_id, resume, limits, selection, dry_run, json_)


def _seeds(count: int | None, one: int | None) -> tuple[int, ...]:
    from bdh_bench.spec import require_positive

    if count is not None and one is not None:
        raise SpecError("got --seeds and --seed · expected one or the other")
    if one is not None:
        if one < 0:
            raise SpecError(f"got --seed {one} · expected 0 or more")
        return (one,)
    require_positive(seeds=1 if count is None else count)
    return tuple(range(count or 1))


def _bytes(text: str) -> int:
    """A size in bytes; 0 where none was given."""
    from bdh_bench.spec import parse_bytes

    return parse_bytes(text) if text else 0


def _request(models: str, task: str, contexts: str = "", budget: str = "", **settings: Any) -> RunSpec:
    """The request of these flags; ``settings`` are fields of RunSpec. Raises SpecError for numbers that make no sense."""
    from bdh_bench.registry import give_bytes, list_tasks
    from bdh_bench.spec import RunSpec, parse_contexts, parse_models, parse_tasks, require_positive

    if not models or not task:
        raise SpecError("--models and --task are needed", "for example --models bdh,gpt2,mamba --task long_ppl")
    tasks = parse_tasks(task, {entry.name for entry in list_tasks()})
    request = RunSpec(
        models=tuple(str(m) for m in parse_models(models)),
        tasks=tuple(str(t) for t in (give_bytes(tasks, "budget", budget) if budget else tasks)),
        contexts=parse_contexts(contexts) if contexts else (),
        **settings,
    )
    require_positive(**{name: getattr(request, name) for name in ("train_bytes", "train_context", "documents")})
    for name in ("threads", "learning_rate", "train_seconds"):
        if getattr(request, name) < 0:
            raise SpecError(f"got --{name.replace('_', '-')} {getattr(request, name)} · expected no negative number")
    return request


def _smoke(request: RunSpec) -> RunSpec:
    from dataclasses import replace

    return replace(
        request, smoke=True, train_bytes=min(request.train_bytes, 65_536), documents=min(request.documents, 3)
    )


def _limits(cell_timeout: float, time_budget: str, fail_fast: bool) -> Limits:
    from bdh_bench.runner.local import Limits
    from bdh_bench.spec import parse_seconds

    return Limits(cell_timeout, parse_seconds(time_budget) if time_budget else None, fail_fast)


def _run(
    request: RunSpec,
    root: Path,
    run_id: str | None,
    resume: bool,
    limits: Limits,
    selection: Selection,
    dry_run: bool,
    json_: bool,
) -> None:
    from bdh_bench.runner.plan import cell_json, make_plan
    from bdh_bench.runner.run import execute, exit_code, prepare, tally

    plan = make_plan(request)
    if dry_run:
        cells = [cell_json(cell) for cell in plan.cells]
        if json_:
            _print_json("run", "ok", {"cells": cells, "contexts": plan.contexts})
        else:
            for cell in cells:
                where = f" context {cell['context']:,}" if cell["context"] is not None else ""
                often = f" rounds {cell['rounds']}" if cell["rounds"] > 1 else ""
                typer.echo(f"{cell['key'][:12]}  {cell['model']}  {cell['task']}  seed {cell['seed']}{where}{often}")
        return
    folder = prepare(plan, root, run_id, resume, selection)
    _say(f"run {folder.name}: {len(plan.cells)} cells" + (f" · {', '.join(plan.labels)}" if plan.labels else ""))
    with _progress(len(plan.rounds)) as report:
        try:
            done = execute(plan, folder, report, limits.cell_timeout_s, limits, selection)
        except KeyboardInterrupt:
            again = f"bdh-bench run --resume --run-id {shlex.quote(folder.name)} --runs {shlex.quote(str(root))}"
            again += plan.manifest("", "", {})["command"].removeprefix("bdh-bench run")
            _say(f"stopped; nothing is lost. Continue with: {again}")
            raise
    counts, code = tally(done), exit_code(done)
    errors = [
        {"code": c.status, "message": c.reason, "hint": "", "cell": c.key} for c in done.cells if c.kind == "failed"
    ]
    if json_:
        status = "ok" if code == 0 else ("failed" if code == 5 else "partial")
        _print_json("run", status, {"run": folder.name, "path": str(folder), "cells": counts}, errors)
    else:
        _print_run(done)
        for error in errors:
            _say(f"failed: {error['message']} (log: {folder}/cells/{error['cell'][:16]})")
        left = len(done.cells) - sum(counts.values())
        missing = f", {left} not measured yet" if left else ""
        _say(
            f"{counts['ok']} measured, {counts['skipped']} skipped, {counts['failed']} failed{missing} · {folder} · "
            f"read it with: bdh-bench report {shlex.quote(folder.name)} --runs {shlex.quote(str(root))}"
        )
    if code:
        raise typer.Exit(code)


@app.command()
def report(
    run: RunName = None,
    runs: Runs = Path("runs"),
    output: Annotated[Path | None, typer.Option("--output", help="The HTML file; beside the run without it.")] = None,
    static: Annotated[bool, typer.Option("--static", help="A small page for archives, with pictures only.")] = False,
    figures: Annotated[bool, typer.Option("--figures", help="Every figure as SVG, PDF and PNG too.")] = False,
    open_: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
    baseline: Annotated[str | None, typer.Option("--baseline", help="A run to compare with, in a table.")] = None,
    json_: Json = False,
) -> None:
    """Write one HTML file that opens from disk; report.md, summary.md, report.json and results.csv beside it."""
    from bdh_bench.results.report.write import write_report

    stored = _open(runs, run)
    before = _open(runs, baseline) if baseline else None
    written = write_report(stored, output or stored.path / "report.html", static, figures, before)
    if open_:
        import webbrowser

        webbrowser.open(Path(written["html"]).resolve().as_uri())
    if json_:
        _print_json("report", "ok", {name: str(path) for name, path in written.items()})
    else:
        typer.echo(str(written["html"]))
        _say(f"open it in a browser: {Path(written['html']).resolve().as_uri()}")


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="NAME[@SIZE][:key=value]…")],
    data: Data = "stdlib",
    train_bytes: TrainBytes = _PLAIN_BYTES,
    train_context: TrainContext = _PLAIN_CONTEXT,
    seed: Annotated[int, typer.Option("--seed", help="Seed of weights and of the order of bytes.")] = 0,
    device: Device = "cpu",
    threads: Threads = 0,
    learning_rate: Rate = 0.0,
    regime: Regime = "crop",
    split_documents: Pieces = "",
    json_: Json = False,
) -> None:
    """Train one model, or find its checkpoint; print where the weights are and what they score on validation text."""
    request = _request(
        model,
        "long_ppl",
        data=data,
        train_bytes=train_bytes,
        train_context=train_context,
        seeds=_seeds(None, seed),
        device=device,
        threads=threads,
        learning_rate=learning_rate,
        regime=regime,
        split_documents=_bytes(split_documents),
    )
    if len(request.models) != 1:
        raise SpecError(f"got {len(request.models)} models · expected one")
    from bdh_bench.runner.training import train_model
    from bdh_bench.types import Cell

    cell = Cell("", request.models[0], "train", seed)
    with _progress(1) as report_:
        done = train_model(
            request, lambda phase, share, facts: report_(cell, {"phase": phase, "fraction": share, **facts})
        )
    if json_:
        _print_json("train", "ok", done)
    else:
        how = "found" if done["reused"] else f"trained in {done['seconds']:.0f} s"
        typer.echo(done["weights"])
        _say(
            f"{done['model']}: {how}, {done['parameters']:,} parameters, {done['bytes']:,} bytes ({done['regime']}) at "
            f"rate {done['learning_rate']:g}, {done['validation_bits_per_byte']} bits per byte on validation text"
        )


@app.command()
def sweep(
    models: Annotated[str, typer.Argument(help="NAME[@SIZE][:key=value]…, comma-separated.")],
    rates: Annotated[str, typer.Option("--rates", help="At least four learning rates.")] = "1e-3,2e-3,4e-3,8e-3",
    data: Data = "stdlib",
    train_bytes: TrainBytes = 524_288,
    train_context: TrainContext = _PLAIN_CONTEXT,
    device: Device = "cpu",
    threads: Threads = 0,
    regime: Regime = "crop",
    output: Annotated[Path | None, typer.Option("--output", help="A CSV file for every trial.")] = None,
    json_: Json = False,
) -> None:
    """Choose each family's learning rate on validation text; a best rate on the edge extends the grid."""
    from bdh_bench.runner import sweep as sweeping

    try:
        grid = sweeping.check_grid([float(rate) for rate in rates.split(",")])
    except ValueError:
        raise SpecError(f"got --rates {rates} · expected numbers separated by commas") from None
    request = _request(
        models,
        "long_ppl",
        data=data,
        train_bytes=train_bytes,
        train_context=train_context,
        device=device,
        threads=threads,
        regime=regime,
    )
    trials = []
    for trial in sweeping.sweep(request, grid):
        trials.append(trial)
        _say(f"{trial.model} at {trial.learning_rate:g}: {trial.bits:.4f} bits per byte, {trial.seconds:.0f} s")
    chosen = sweeping.choices(trials)
    if output is not None:
        from bdh_bench.results.store import write_atomically

        write_atomically(output, sweeping.as_csv(trials))
    if json_:
        _print_json("sweep", "ok", {"chosen": chosen, "trials": sweeping.as_rows(trials)})
        return
    for choice in chosen:
        edge = " (on the edge of the grid)" if choice["on_edge"] else ""
        typer.echo(
            f"{choice['model']}  {choice['learning_rate']:g}  {choice['best']:.4f} bits per byte, "
            f"median of {choice['trials']} trials {choice['median']:.4f}{edge}"
        )


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="NAME[@SIZE][:key=value]…")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text to go on from.")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="A file to go on from; - is stdin.")] = None,
    max_bytes: Annotated[int, typer.Option("--max-bytes", help="How many bytes to write.")] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0 takes the likeliest byte, above it draws.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws.")] = 0,
    save_state: Annotated[Path | None, typer.Option("--save-state", help="File for the state at the end.")] = None,
    load_state: Annotated[Path | None, typer.Option("--load-state", help="Go on from such a file.")] = None,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Write bytes after a prompt, as they come, to stdout; the prompt is not repeated."""
    from bdh_bench.generation import Request, begin

    request = Request(model, prompt, prompt_file, max_bytes, temperature, seed, save_state, load_state, device, threads)
    text, written = begin(request, _say), 0
    try:
        for data in text.write_bytes(max_bytes, temperature, seed):
            written += len(data)
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
    except BrokenPipeError:  # here and not in main: the parser would make it exit code 1
        _reader_has_gone()
        return
    finally:
        if sys.stdout.isatty():
            _say("")  # what comes next begins its own line
    if save_state is not None:
        text.save(save_state)
    _say(
        f"{written:,} bytes written, state {text.session.state_bytes:,} bytes"
        + (f" · go on with --load-state {shlex.quote(str(save_state))}" if save_state else "")
    )


@app.command()
def new(
    kind: Annotated[str, typer.Argument(help="model or task.")],
    name: Annotated[str, typer.Argument(help="Its name on the command line.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="The project's new folder; ./NAME without it.")
    ] = None,
    json_: Json = False,
) -> None:
    """Write a project outside this repository with one working model or task in it."""
    from bdh_bench.scaffold import create

    files = create(kind, name, output)
    if json_:
        _print_json("new", "ok", {"folder": str(files[0].parent), "files": [str(file) for file in files]})
        return
    for file in files:
        typer.echo(str(file))
    then = f"bdh-bench check {name}" if kind == "model" else f"bdh-bench run --models toy:uniform --task {name}"
    _say(f"next: pip install --editable {shlex.quote(str(files[0].parent))} && {then}")


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="NAME[@SIZE][:key=value]…, or the path of a model's .py file.")],
    device: Device = "cpu",
    json_: Json = False,
) -> None:
    """Hold one model to every law that its numbers would rest on; exit code 6 where one is broken."""
    from bdh_bench import checking, columns

    report = checking.check(model, device)
    broken = report.count(checking.BROKEN)
    if json_:
        errors = [
            {"code": "LawError", "message": checking.complaint(finding), "hint": "", "cell": None}
            for finding in report.findings
            if not finding.kept
        ]
        _print_json("check", "failed" if broken else "ok", report.as_json(), errors)
    else:
        columns.show(report.as_rows(), right=("error", "at most"))
        _say(
            f"{report.model}: {report.count(checking.KEPT)} kept, {broken} broken, "
            f"{report.count(checking.NOT_APPLICABLE)} do not apply · {report.parameters:,} parameters in {report.dtype}"
        )
    if broken:
        raise typer.Exit(6)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="NAME[@SIZE][:key=value]…, mostly with weights=PATH.")],
    to: Annotated[str, typer.Option("--to", help="published or transformers.")],
    output: Annotated[Path, typer.Option("--output", help="The new folder.")],
    format_: Annotated[str, typer.Option("--format", help="safetensors or pt.")] = "safetensors",
    json_: Json = False,
) -> None:
    """Write a model's weights and config.json in a layout that others read; weights=FOLDER reads it back."""
    from bdh_bench.conversion import convert as write

    done = write(model, to, output, format_)
    if done["random"]:
        _say("warning: these weights are random; name trained ones with weights=PATH")
    if json_:
        _print_json("convert", "ok", done)
    else:
        typer.echo(done["weights"])
        _say(f"{done['model']}: {done['parameters']:,} parameters as {to} · read them back with weights={output}")


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="models, tasks or runs.")],
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One model or task: what it is, and every option.")
    ] = None,
    runs: Runs = Path("runs"),
    details: Annotated[
        bool, typer.Option("--details", help="Parameters, operations, state bytes, kernels of models (loads torch).")
    ] = False,
    size: Annotated[
        str, typer.Option("--size", help="With --details: quick, 1m, …; for families that have sizes.")
    ] = "",
    json_: Json = False,
) -> None:
    """What is registered, or what has been run; with a NAME, one model or task and its options."""
    if what not in ("models", "tasks", "runs"):
        raise UnknownNameError("list", what, ("models", "tasks", "runs"))
    if size and not details:
        raise SpecError("got --size without --details · expected both", "add --details")
    if details and what != "models":
        raise SpecError(f"got --details for {what} · expected models", f"bdh-bench list {what} NAME tells more of one")
    if name and what == "runs":
        raise SpecError(f"got the name {name!r} for runs · expected none", f"bdh-bench show {name}")
    rows = _run_rows(runs) if what == "runs" else _entry_rows(what, name, details, size)
    if json_:
        _print_json("list", "ok", {what: rows})
    elif details:
        from bdh_bench import columns
        from bdh_bench.details import NUMBERS, as_row

        columns.show([as_row(row) for row in rows], right=NUMBERS)
    elif name:
        _print_entry(rows[0])
    else:
        from bdh_bench import columns

        columns.show([_run_line(row) if what == "runs" else _as_line(row) for row in rows])
        if what != "runs":
            _say(f"one of them with its options: bdh-bench list {what} NAME")
    if not rows:
        _say(f"no {what} here")


def _entry_rows(kind: str, name: str | None, details: bool, size: str) -> list[dict[str, Any]]:
    from bdh_bench import options, registry
    from bdh_bench.spec import SIZES, WEIGHT_OPTIONS

    if size and size not in SIZES:
        raise UnknownNameError("size", size, SIZES)
    found = registry.list_models() if kind == "models" else registry.list_tasks()
    if name:
        registry.find(kind, name)  # an unknown or broken one is an error, not a row
    rows: list[dict[str, Any]] = []
    for entry in found:
        if name not in (None, entry.name):
            continue
        row: dict[str, Any] = {"name": entry.name, "origin": entry.origin, "summary": entry.summary}
        row["problem"] = entry.problem
        if kind == "models":
            row["position_limit"] = entry.defaults.get("position_limit", "unknown")
            row["words"] = ", ".join(entry.defaults.get("words", ()))
        if name:
            shared = dict(WEIGHT_OPTIONS) if kind == "models" else {}
            row |= {fact: entry.defaults.get(fact, "") for fact in ("kind", "architecture") if kind == "models"}
            row["options"] = options.rows({**entry.options, **dict.fromkeys(shared)}, {**entry.meanings, **shared})
            row["text"] = entry.text
        if details:
            from bdh_bench.details import describe

            row |= describe(entry, size)
        rows.append(row)
    return rows


def _run_line(row: dict[str, Any]) -> dict[str, str]:
    """A run in one line; of one that cannot be read, why."""
    cells = ", ".join(f"{count} {kind}" for kind, count in row.get("cells", {}).items())
    about = row["reason"] if "reason" in row else row["command"]
    return {
        "run": row["run"],
        "created": row.get("created", "")[:19],
        "status": row["status"],
        "cells": cells,
        "command": about,
    }


def _as_line(row: dict[str, Any]) -> dict[str, str]:
    """A model or task in one line; a problem in place of what it is."""
    limit = {"position limit": "" if row["problem"] else row["position_limit"]} if "position_limit" in row else {}
    about = f"warning: {row['problem']}" if row["problem"] else row["summary"]
    return {"name": row["name"], "origin": row["origin"], **limit, "what it is": about}


def _print_entry(row: dict[str, Any]) -> None:
    from bdh_bench import columns

    typer.echo(f"{row['name']} ({row['origin']}): {row['text']}\n")
    for fact in ("kind", "architecture", "position_limit", "words"):
        if row.get(fact):
            typer.echo(f"{fact.replace('_', ' ')}: {row[fact]}")
    if row["options"]:
        typer.echo("\noptions:")
        columns.show(row["options"])


def _run_rows(root: Path) -> list[dict[str, Any]]:
    from bdh_bench.results.store import list_runs, open_run
    from bdh_bench.runner.run import tally

    rows: list[dict[str, Any]] = []
    for folder in list_runs(root):
        try:
            run = open_run(folder)
        except BenchError as error:
            rows.append({"run": folder.name, "status": "unreadable", "reason": str(error)})
            continue
        rows.append(
            {
                "run": run.id,
                "created": run.manifest.get("created", ""),
                "status": "finished" if run.finished else "unfinished",
                "cells": tally(run),
                "command": run.manifest.get("command", ""),
            }
        )
    return rows


@app.command()
def show(
    run: RunName = None,
    cell: Annotated[str | None, typer.Argument(metavar="[CELL]", help="First characters of a cell's key.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every sentence and every derived table as well.")] = False,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """The answer and the headline tables of a run in the terminal, or all that is known of one cell."""
    stored = _open(runs, run)
    if cell is not None:
        from dataclasses import asdict

        found = [c for c in stored.cells if c.key.startswith(cell)]
        if len(found) != 1:
            raise UnknownNameError("cell", cell, [c.key[:12] for c in stored.cells])
        text = json.dumps(asdict(found[0]), indent=1, sort_keys=True, default=str)
        if json_:
            _print_json("show", "ok", {"run": stored.id, "cell": json.loads(text)})
        else:
            typer.echo(text)
    elif json_:
        from bdh_bench.results.assessment import assess
        from bdh_bench.results.export import points_as_json

        data = {"run": stored.id, "points": points_as_json(stored), "assessment": assess(stored).as_json()}
        _print_json("show", "ok", data | {"problems": list(stored.problems)})
    else:
        _print_run(stored, all_)


@app.command()
def export(
    run: RunName = None,
    format_: Annotated[str, typer.Option("--format", help="json, jsonl, csv, md or latex.")] = "json",
    raw: Annotated[bool, typer.Option("--raw", help="Every measurement instead of one row per point.")] = False,
    assessment: Annotated[
        bool, typer.Option("--assessment", help="Verdicts, reasons and the fairness card instead, as one JSON object.")
    ] = False,
    runs: Runs = Path("runs"),
    output: Annotated[Path | None, typer.Option("--output", help="A file instead of stdout.")] = None,
    json_: Json = False,
) -> None:
    """Every point of a run, for other programs."""
    from bdh_bench.results.export import assessment as assessment_text
    from bdh_bench.results.export import export as export_text

    if assessment and (raw or format_ != "json"):
        raise SpecError("got --assessment with --raw or another --format · expected --assessment alone, which is JSON")
    stored = _open(runs, run)
    text = assessment_text(stored) if assessment else export_text(stored, format_, raw)
    if output is not None:
        from bdh_bench.results.store import write_atomically

        write_atomically(output, text)
    if json_:
        rows = json.loads(text if assessment else export_text(stored, "json", raw))
        _print_json("export", "ok", {"run": stored.id, "rows": rows, "output": str(output) if output else None})
    elif output is None:
        typer.echo(text, nl=not text.endswith("\n"))


@app.command()
def selftest(
    perf: Annotated[
        bool, typer.Option("--perf", help="Also what measuring costs, and whether 5 % more time is found (minutes).")
    ] = False,
    keep: Annotated[Path | None, typer.Option("--keep", help="A new folder for the rows; without it they go.")] = None,
    json_: Json = False,
) -> None:
    """Run toys whose numbers are known through the harness; exit code 6 where a truth is not recovered."""
    from bdh_bench import columns
    from bdh_bench.runner.selftest import outcome
    from bdh_bench.runner.selftest.proof import cell_count, find
    from bdh_bench.runner.selftest.truths import NOT_RECOVERED

    with _progress(cell_count()) as report:
        findings = find(keep, report, perf)
    kept = outcome.keep(findings)
    wrong = [finding for finding in findings if finding.verdict == NOT_RECOVERED]
    if json_:
        rows = [vars(finding) for finding in findings]
        errors = [
            {
                "code": "NotRecovered",
                "message": f"{f.name}: got {f.measured} · expected {f.expected}",
                "hint": "",
                "cell": None,
            }
            for f in wrong
        ]
        _print_json("selftest", "failed" if wrong else "ok", kept | {"truths": rows}, errors)
    else:
        columns.show([vars(finding) for finding in findings])
        _say(kept["result"])
    if wrong:
        raise typer.Exit(6)


@app.command()
def doctor(
    run: RunName = None,
    store: Annotated[
        bool, typer.Option("--store", help="Look through a stored run instead; damage is copied, exit code 3.")
    ] = False,
    strict_host: Annotated[
        bool, typer.Option("--strict-host", help="Exit code 7 where this machine is unfit to measure on.")
    ] = False,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """What this machine is, how noisy it is now, what is missing, and the command that adds it; or whether a run is sound."""
    from bdh_bench import columns
    from bdh_bench.runner.doctor import examine

    if run and not store:
        raise SpecError(f"got the run {run!r} without --store · expected both", "add --store")
    if store:
        _doctor_store(runs, run, json_)
        return
    examination = examine()
    if json_:
        _print_json("doctor", "ok" if examination.fit else "failed", examination.as_json())
    else:
        columns.show(examination.as_rows())
        _say(f"noise: {examination.noise.grade}" + ("" if examination.fit else "; unfit to measure on"))
    if strict_host and not examination.fit:
        raise typer.Exit(7)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="The run before: id or folder.")],
    second: Annotated[list[str], typer.Argument(metavar="B…", help="The run after; several confirm each other.")],
    fail_on: Annotated[
        str, typer.Option("--fail-on", help="METRIC:SHARE, comma-separated: how much worse each may get, tpot_s:5%.")
    ] = "",
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """What changed between two runs on one machine; exit code 4 for a regression, 5 where nothing can be compared."""
    from bdh_bench import columns
    from bdh_bench.results import regression

    rules = regression.parse_rules(fail_on)
    report = regression.compare(_open(runs, first), [_open(runs, name) for name in second], rules)
    if json_:
        status = {0: "ok", 4: "failed"}.get(report.exit_code, "partial")
        _print_json("compare", status, regression.as_json(report))
    else:
        columns.show([row for _, row in regression.comparison_rows(report)], right=("context", "before", "after"))
        _say(report.refused or f"{len(report.changes)} points compared, {len(report.regressions)} regressions")
    if report.exit_code:
        raise typer.Exit(report.exit_code)


_PLANNED = ",".join(f"{family}@{size}" for family in ("bdh", "llama", "mamba2") for size in ("10m", "100m", "1b"))


@app.command()
def plan(
    memory: Annotated[str, typer.Option("--memory", help="Bytes there are: 80GiB.")],
    context: Annotated[str, typer.Option("--context", help="Tokens of each stream: 4096, 128k.")],
    models: Annotated[str, typer.Option("--models", help="NAME[@SIZE][:key=value]…, hf:./folder too.")] = _PLANNED,
    latency: Annotated[str, typer.Option("--latency", help="Longest step: 50ms.")] = "",
    price: Annotated[float, typer.Option("--price", help="Of the machine, per hour.")] = 0.0,
    bandwidth: Annotated[str, typer.Option("--bandwidth", help="Of the memory, per second: 3120GiB.")] = "",
    dtype: Annotated[str, typer.Option("--dtype", help="Of the weights, for formulae: float32, bfloat16.")] = "float32",
    run: Annotated[str | None, typer.Option("--run", help="A run whose measurements count before formulae.")] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """How many streams fit a machine, and how many tokens per second they make: measured where a run has it, else by formula."""
    from bdh_bench import columns
    from bdh_bench.footprint import needs_of
    from bdh_bench.results import capacity_planning
    from bdh_bench.spec import parse_bytes, parse_models, parse_seconds, parse_tokens

    wish = capacity_planning.Wish(
        parse_bytes(memory),
        parse_tokens(context),
        parse_seconds(latency) if latency else None,
        price or None,
        float(parse_bytes(bandwidth)) if bandwidth else None,
    )
    stored = _open(runs, run) if run else None
    names = [str(model) for model in parse_models(models)]
    found = [capacity_planning.capacity_of(needs_of(name, wish.context, dtype), wish, stored) for name in names]
    if json_:
        _print_json("plan", "ok", capacity_planning.as_json(wish, found))
    else:
        columns.show([capacity_planning.as_row(one) for one in found])
        _say("measured: this machine's rows; formula: weights + streams · state, and no workspace")


@app.command()
def worker(
    run: Annotated[Path, typer.Option("--run", help="Folder of the run.")],
    cells: Annotated[str, typer.Option("--cells", help="KEY[-ROUND],…; all that is missing without it.")] = "",
    cell_timeout: CellTimeout = 7200.0,
    time_budget: TimeBudget = "",
    fail_fast: FailFast = False,
    attached: Annotated[bool, typer.Option("--attached", help="End when stdin is closed.")] = False,
) -> None:
    """Measure rounds of a run that exists, as engines do; several workers share a run. Progress is JSON lines on stdout."""
    from bdh_bench.runner.executor import serve

    names = [name for name in cells.split(",") if name]
    code = serve(run, names, _limits(cell_timeout, time_budget, fail_fast), attached, typer.echo)
    if code:
        raise typer.Exit(code)


def _doctor_store(root: Path, name: str | None, json_: bool) -> None:
    from bdh_bench import columns
    from bdh_bench.results.store import find_run
    from bdh_bench.runner.repair import repair

    done = repair(find_run(root, name))
    if json_:
        errors = [
            {"code": f.kind, "message": f"{f.where}: {f.about}", "hint": f"copied to {f.copy}", "cell": None}
            for f in done.damage
        ]
        _print_json("doctor", "ok" if done.sound else "partial", done.as_json(), errors)
    else:
        columns.show([vars(finding) for finding in done.findings])
        _say(f"{done.run}: " + ("sound" if done.sound else f"{len(done.damage)} damaged; copies in quarantine/"))
    if not done.sound:
        raise typer.Exit(3)


def _open(root: Path, name: str | None) -> Run:
    from bdh_bench.results.store import find_run, open_run

    stored = open_run(find_run(root, name))
    for problem in stored.problems:
        _say(f"warning: {problem}")
    return stored


def _print_run(run: Run, everything: bool = False) -> None:
    from bdh_bench.results.terminal import show as print_run

    print_run(run, everything)


def _progress(total: int) -> Any:
    from bdh_bench.progress import Progress

    return Progress(total)


def _say(message: str) -> None:
    typer.echo(message, err=True)


def _reader_has_gone() -> None:
    """Let what is still buffered for a closed pipe go nowhere, silently."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_json(verb: str, status: str, data: Any, errors: list[dict[str, Any]] | None = None) -> None:
    envelope = {"schema": f"bdh-bench/{verb}/1", "status": status, "data": data, "errors": errors or []}
    typer.echo(json.dumps(envelope, ensure_ascii=False, allow_nan=False))


def main() -> None:
    """Entry point: every way to fail ends in one message and a documented exit code."""
    arguments = sys.argv[1:]
    try:
        code = app(args=arguments, standalone_mode=False)
        if code == 130 and "--json" in arguments:  # the parser has made an exit code of Ctrl-C
            code = _fail(arguments, 130, "Interrupted", "stopped by the user", "")
    except BenchError as error:
        if os.environ.get("BDH_BENCH_DEBUG"):
            traceback.print_exc()
        code = _fail(arguments, error.exit_code, type(error).__name__, error.message, error.hint)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail(arguments, 130, "Interrupted", "stopped by the user", "")
    except BrokenPipeError:
        _reader_has_gone()
        code = 0
    except Exception as error:
        code = _unexpected(arguments, error)
    sys.exit(code if isinstance(code, int) else 0)


def _unexpected(arguments: list[str], error: Exception) -> int:
    """A usage error found by the parser, or an error of our own."""
    shown = getattr(error, "format_message", None)
    if callable(shown):
        return _fail(arguments, 2, "UsageError", str(shown()), "see --help")
    if os.environ.get("BDH_BENCH_DEBUG"):
        raise error
    hint = "this is a defect; BDH_BENCH_DEBUG=1 shows where it happened"
    return _fail(arguments, 1, type(error).__name__, str(error), hint)


def _fail(arguments: list[str], code: int, kind: str, message: str, hint: str) -> int:
    if "--json" in arguments:
        verb = next((a for a in arguments if not a.startswith("-")), "bdh-bench")
        _print_json(verb, "failed", None, [{"code": kind, "message": message, "hint": hint, "cell": None}])
    else:
        _say(f"error: {message}" + (f" · {hint}" if hint else ""))
    return code


if __name__ == "__main__":
    main()
