"""Which pictures does a run make? Quality, bytes and time against context, quality against bytes; then budgets, recall and training.

Builders are pure: points → Figure. Models are called by their short names; what competes with nobody looks like a reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bdh_bench.metrics import METRICS
from bdh_bench.results.activity_figures import activity_figures
from bdh_bench.results.capacity_figures import capacity_figures
from bdh_bench.results.claims import references_of
from bdh_bench.results.contenders import CONTROLS, QUALITY, Facts
from bdh_bench.results.depth import STEP, curves_of, slope_of
from bdh_bench.results.display import shortened
from bdh_bench.results.escaping import plain
from bdh_bench.results.figure import Axis, Figure, Reference, styles_of
from bdh_bench.results.footprint_crossover import footprint_marks, state_marks
from bdh_bench.results.lines import Upwards, against_context, alt_of, dot_of, line_of, value_axis
from bdh_bench.results.reach import shaded
from bdh_bench.results.recall_figures import recall_figures
from bdh_bench.results.speed import timed_of
from bdh_bench.results.store import Run
from bdh_bench.results.sufficiency import sufficiency_of
from bdh_bench.results.tables import Point, best_points, finite, row_names
from bdh_bench.results.training_figures import training_figures

_NOISE = "Bands are 95 % intervals over rounds (fresh processes), from three on; marked values are in the data."


def figures_of(run: Run, points: Sequence[Point]) -> tuple[Figure, ...]:
    """The figures for which the run has at least one value."""
    facts, shown = Facts(run, points), best_points(points)
    built = (
        quality_vs_context(facts, shown),
        pareto(facts, shown),
        memory_vs_context(facts, shown),
        peak_vs_context(facts, shown),
        prefill_vs_context(facts, shown),
        tpot_vs_depth(facts, shown),
        *capacity_figures(facts, shown),
        *recall_figures(facts, shown),
        *training_figures(facts),
        *activity_figures(facts, shown),
    )
    return tuple(figure for figure in built if not figure.empty)


def quality_vs_context(facts: Facts, points: Sequence[Point]) -> Figure:
    """Bits per byte of the same targets against context; a model with a position limit is drawn as stopped."""
    everyone = [point for point in points if point.metric == QUALITY]
    chosen = [point for point in everyone if point.family not in CONTROLS] or everyone
    hashes = {point.target_hash for point in chosen}
    lines = tuple(
        Reference(plain(shortened(name)), value, "dot")
        for name, value, target in references_of(facts.run)
        if target in hashes | {""}
    )
    notes = ["Every model and every context scores the same bytes; lower is better."]
    if len(chosen) < len(everyone):
        notes.append("Controls are in the tables only: their scores would flatten the picture.")
    if train_context := _train_context(facts.run):
        meaning = (
            "with a state carried through documents; no gradient reached further back."
            if _carried(facts.run)
            else "what lies right of it is extrapolation."
        )
        notes.append(f"Models trained in this run saw {train_context:,} bytes at a time; {meaning}")
    if facts.blocks:
        notes.append("95 % intervals over blocks of fewer than five documents (blocks): nothing about other documents.")
    if (enough := sufficiency_of(facts)).undertrained:
        notes.append(f"Undertrained, so nothing follows about longer contexts: {enough.text}.")
    y: Upwards = ("bits per byte", "bit/byte", "linear")
    figure = against_context(facts, "quality", "Quality against context", chosen, y, lines, notes)
    return shaded(facts, figure, (p.model for p in chosen))


def memory_vs_context(facts: Facts, points: Sequence[Point]) -> Figure:
    """State bytes against context, both logarithmic."""
    chosen = [point for point in points if point.metric == "state_bytes" and "axis" not in dict(point.axes)]
    notes = ["The tensors that must survive until the next token, counted; a flat line is a state that never grows."]
    drawn = against_context(facts, "memory", "State against context", chosen, ("state", "byte", "log"), (), notes)
    return replace(drawn, marks=(*drawn.marks, *state_marks(facts)))


def peak_vs_context(facts: Facts, points: Sequence[Point]) -> Figure:
    """Peak footprint of the process against context."""
    chosen = [point for point in points if point.metric == "peak_footprint_bytes"]
    notes = ["High-water mark of the whole process, weights and program included."]
    y: Upwards = ("peak footprint", "byte", "log")
    drawn = against_context(facts, "peak", "Peak memory against context", chosen, y, (), notes)
    return replace(drawn, marks=(*drawn.marks, *footprint_marks(facts)))


def prefill_vs_context(facts: Facts, points: Sequence[Point]) -> Figure:
    """Tokens read per second against context, both logarithmic."""
    chosen = [_per_second(point) for point in points if point.metric == "prefill_s"]
    notes = ["Batch times context over the median of prefill; higher is better.", _NOISE]
    y: Upwards = ("prefill", "token/s", "log")
    return _ribbons(against_context(facts, "prefill", "Prefill speed against context", chosen, y, (), notes))


def tpot_vs_depth(facts: Facts, points: Sequence[Point]) -> Figure:
    """Time per token against depth with the slope of every line, both axes logarithmic."""
    chosen = [point for point in points if point.metric == STEP]
    notes = ["Slopes are of the least-squares line, per 1,000 tokens of depth; flat where the rounds say so.", _NOISE]
    y: Upwards = (METRICS[STEP].label, "s", "log")
    made = against_context(facts, "tpot", "Time per token against depth", chosen, y, (), notes, ("depth", "bytes"))
    names = row_names([p for p in chosen if p.context > 0], facts.names)
    curves = {(c.model, c.task, c.batch_size, c.axes): c for c in curves_of(timed_of(facts.run))}
    slopes: dict[str, str] = {}
    for point, name in names.items():
        curve = curves.get((point.model, point.task, point.batch_size, point.axes))
        slope = slope_of(curve.curve) if curve and name not in slopes else None
        if slope is not None:
            slopes[name] = f"{name}: {slope.label}"
    shown = {plain(shortened(name)): plain(shortened(text)) for name, text in slopes.items()}
    series = tuple(replace(line, label=shown.get(line.label, line.label)) for line in made.series)
    return _ribbons(replace(made, series=series))


def _ribbons(figure: Figure) -> Figure:
    return replace(figure, series=tuple(replace(line, ribbon=True) for line in figure.series))


def _per_second(point: Point) -> Point:
    """A time to read the context as tokens per second; the ends of the interval change places."""
    tokens = point.batch_size * point.context

    def turned(seconds: float | None) -> float | None:
        return tokens / seconds if seconds else None

    name = "prefill_tokens_per_s"
    value, low, high = turned(point.value), turned(point.high), turned(point.low)
    return replace(point, metric=name, unit=METRICS[name].unit, value=value, low=low, high=high)


def pareto(facts: Facts, points: Sequence[Point]) -> Figure:
    """Bits per byte against state bytes: one path per model over the contexts that have both."""
    state = {(p.model, p.context): p for p in reversed(points) if p.metric == "state_bytes" and p.value}
    pairs = [
        (q, float(s.value))
        for q in points
        if q.metric == QUALITY and q.value is not None and (s := state.get((q.model, q.context))) and s.value
    ]
    styles = styles_of(dict.fromkeys((p.model, p.family) for p, _ in pairs))
    series = tuple(
        line_of(
            facts, model, model, facts.label(model), styles[model], [dot_of(p, x) for p, x in pairs if p.model == model]
        )
        for model in dict.fromkeys(p.model for p, _ in pairs)
    )
    return Figure(
        "pareto",
        "Quality against state",
        alt_of("Bits per byte against bytes of state", series, "bit/byte"),
        value_axis("state per stream", "byte", "log", [x for _, x in pairs]),
        Axis("bits per byte", "bit/byte", "linear"),
        series,
        notes=("Down and to the left is better. Each path goes from short to long contexts.",),
    )


def _train_context(run: Run) -> int | None:
    spec = run.manifest.get("spec") or {}
    value = finite(spec.get("train_context"))
    trained = any(cell.facts.get("weights") == "trained" for cell in run.cells)
    return int(value) if value and trained else None


def _carried(run: Run) -> bool:
    return (run.manifest.get("spec") or {}).get("regime") == "carried"
