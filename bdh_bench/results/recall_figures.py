"""Which pictures show what a model remembers: by position, by distance of a match, for its bytes, over lengths and gaps?

Text differs between the buckets of a stream, so positions are drawn as differences to one model of the run, paired by document; two buckets
of one model are never set against each other. Chance is drawn wherever guessing scores. What a task without a signal says is drawn, and
its note says that it decides nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from bdh_bench.metrics import METRICS
from bdh_bench.results import statistics
from bdh_bench.results.contenders import TRANSFORMER, YARDSTICK, Facts
from bdh_bench.results.display import count, number, tick
from bdh_bench.results.escaping import plain
from bdh_bench.results.figure import BREAK, Axis, Dot, Figure, Mark, Reference, styles_of
from bdh_bench.results.heat_maps import Row, Scored, heat_map
from bdh_bench.results.lines import Upwards, against_context, alt_of, dot_of, line_of, share_axis, value_axis
from bdh_bench.results.reach import shaded, shaded_places
from bdh_bench.results.reductions import POSITION, RECALL, derived_records
from bdh_bench.results.resampling import Samples
from bdh_bench.results.tables import Point
from bdh_bench.results.thresholds import SOLVED, half_lost
from bdh_bench.results.validity import signals_of, without_signal

_GAIN, _NEEDLE = "repeat_gain_bits_per_byte", "needle_rank_accuracy"
_DISTANCE = re.compile(r"recall,d=\[(\d+),(\d+)\)")


def recall_figures(facts: Facts, points: Sequence[Point]) -> Iterator[Figure]:
    """Those for which the run may have values; a figure without any is left out by whoever draws."""
    yield positions(facts)
    yield match_distance(facts, points)
    invalid = {task: signal.text for task, signal in without_signal(signals_of(facts)).items()}
    practised = dict.fromkeys((p.task, p.metric) for p in points if p.metric in _PRACTISED)
    for number_, (task, metric) in enumerate(practised):
        suffix = f"-{number_}" if number_ else ""
        own = [p for p in points if p.task == task and p.metric in (metric, "state_bytes")]
        note = [f"Invalid, {invalid[task]}: nothing follows from this picture."] if task in invalid else []
        if metric == "recall_accuracy":
            yield recall_by_state(facts, f"recall-state{suffix}", task, own, note)
            yield recall_by_pairs(facts, f"recall-pairs{suffix}", task, own, note)
        yield over_length(facts, f"{metric.partition('_')[0]}-length{suffix}", task, metric, own, note)
    for metric, build in ((_GAIN, repeat_gain), (_NEEDLE, needles), (_NEEDLE, needle_map)):
        tasks = dict.fromkeys(p.task for p in points if p.metric == metric)
        for number_, task in enumerate(tasks):
            own = [p for p in points if p.task == task and p.metric == metric and _drawn(facts, p.model)]
            yield build(facts, own, f"-{number_}" if number_ else "")


# -- the stream --------------------------------------------------------------------------------------------------------


def positions(facts: Facts) -> Figure:
    """Bits per byte in each bucket of the stream, less those of a reference model on the same documents in the same bucket."""
    rows: dict[str, dict[int, list[tuple[str, float, float]]]] = {}
    labels: dict[int, str] = {}
    for record in derived_records(facts.run):
        if record.metric == POSITION and record.axes.get("edges") == "bytes" and record.value is not None:
            own = rows.setdefault(record.model, {}).setdefault(record.context, [])
            own.append((record.sample, float(record.value), record.weight))
            low, high = record.metric_id.partition("[")[2].partition(")")[0].split(",")
            labels[record.context] = f"{tick(int(low))}–{tick(int(high))}"
    samples = {m: {c: statistics.merge_samples(own) for c, own in places.items()} for m, places in rows.items()}
    against = _reference(facts, samples)
    places = sorted(labels)
    styles = styles_of((m, facts.family[m]) for m in samples if m in facts.contenders)
    series = tuple(
        line_of(facts, m, m, facts.label(m), styles.get(m, ("", "", "")), _apart(facts, own, samples[against], places))
        for m, own in samples.items()
        if m != against and (m in styles or facts.kind[m] == YARDSTICK)
    )
    name = plain(facts.label(against)) if against else "nothing"
    notes = (
        f"Difference to {name} in the same bytes of the same documents, with 95 % intervals over documents; below 0 is better than {name}. "
        "The text differs between buckets, so one line is no statement about longer contexts: that is Quality against context.",
    )
    figure = Figure(
        "positions",
        f"Quality by position in the stream, against {name}",
        alt_of(f"Bits per byte less those of {name}", series, "bit/byte"),
        Axis(
            "position in the document, bytes", "", "ordinal", tuple((float(i), labels[c]) for i, c in enumerate(places))
        ),
        Axis(f"bits per byte − {name}", "bit/byte", "linear"),
        series,
        (Reference(name, 0.0, "dash"),),
        notes=notes,
    )
    return shaded_places(facts, figure, samples, places)


def _reference(facts: Facts, samples: Mapping[str, Mapping[int, Samples]]) -> str:
    """Whom the others are set against: the transformer that reached the most buckets, else a contender that is no subject."""
    rivals = [m for m in facts.contenders if m in samples and m not in facts.subjects]
    ranked = (
        [m for m in rivals if facts.kind[m] == TRANSFORMER] or rivals or [m for m in facts.contenders if m in samples]
    )
    return max(ranked, key=lambda m: len(samples[m]), default="")


def _apart(
    facts: Facts, own: Mapping[int, Samples], reference: Mapping[int, Samples], places: Sequence[int]
) -> list[Dot]:
    dots = []
    for i, place in enumerate(places):
        if set(own.get(place, {})) & set(reference.get(place, {})):
            found = statistics.paired_difference(own[place], reference[place], facts.clusters)
            dots.append(Dot(float(i), found.value, found.low, found.high))
        else:
            dots.append(Dot(float(i), None, status="not scored"))
    return dots


def match_distance(facts: Facts, points: Sequence[Point]) -> Figure:
    """Bits per byte of what the past of a document says, by how far back it says so; conflicts and news apart."""
    own = [p for p in points if p.metric == RECALL and _drawn(facts, p.model) and "state=" not in p.metric_id]
    spans = sorted({(int(m[1]), int(m[2])) for p in own if (m := _DISTANCE.fullmatch(_slice(p)))})
    far = [f"recall,d=[{low},{high})" for low, high in spans]
    ticks = [(float(i), tick(low)) for i, (low, _) in enumerate(spans)]
    others = [name for name in ("conflict", "novel") if any(_slice(p) == name for p in own)]
    ticks += [(len(far) + 1.0 + i, name) for i, name in enumerate(others)]
    place = {name: i for i, name in enumerate(far)} | {name: len(far) + 1 + i for i, name in enumerate(others)}
    lines: dict[str, list[Dot]] = {}
    for p in own:
        lines.setdefault(p.model, [Dot(len(far) + i * 1.0 + 0.5, None, status=BREAK) for i in range(2)]).append(
            dot_of(p, float(place[_slice(p)]))
        )
    styles = styles_of((m, facts.family[m]) for m in lines)
    series = tuple(
        line_of(facts, m, m, facts.label(m), styles[m], sorted(dots, key=lambda d: d.x)) for m, dots in lines.items()
    )
    notes = (
        "Bytes whose last 12 bytes occurred before: with the same next byte (the last such match is from the named number of bytes to "
        "twice as many back), only with another (conflict), or not at all (novel). Keys that were frequent in training are left out. The "
        "text differs between distances: compare models at one distance.",
    )
    figure = Figure(
        "match-distance",
        "Recall of repeated text by distance",
        alt_of("Bits per byte of repeated text by distance", series, "bit/byte"),
        Axis("distance to the match, bytes", "", "ordinal", tuple(ticks)),
        Axis("bits per byte", "bit/byte", "linear"),
        series,
        notes=notes,
    )
    return shaded_places(facts, figure, lines, [low for low, _ in spans])


def _slice(point: Point) -> str:
    return str(dict(point.axes).get("slice") or "")


def _drawn(facts: Facts, model: str) -> bool:
    return model in facts.contenders or facts.kind.get(model) == YARDSTICK


# -- what was practised ------------------------------------------------------------------------------------------------


#: Metric → the axis that says how long a text was (the context where there is none), its name and its unit.
_PRACTISED = {
    "recall_accuracy": ("", "length", "tokens"),
    "induction_accuracy": ("", "length", "tokens"),
    "copy_accuracy": ("copied", "copied text", "symbols"),
}


def recall_by_state(facts: Facts, id_: str, task: str, points: Sequence[Point], notes: Sequence[str]) -> Figure:
    """Accuracy against the bytes of state that a model had for it: one path per model from few pairs to many."""
    kept = {
        (p.model, p.context, _pairs(p)): float(p.value)
        for p in points
        if p.metric == "state_bytes" and p.value and dict(p.axes).get("axis") == "pairs"
    }
    own = [p for p in _by_pairs(points) if _drawn(facts, p.model)]
    placed = [(p, kept[key]) for p in own if (key := (p.model, p.context, _pairs(p))) in kept]
    styles = styles_of(dict.fromkeys((p.model, p.family) for p, _ in placed))
    series = tuple(
        line_of(facts, m, m, facts.label(m), styles[m], [dot_of(p, x) for p, x in placed if p.model == m])
        for m in dict.fromkeys(p.model for p, _ in placed)
    )
    pairs = sorted({_pairs(p) for p, _ in placed})
    notes = (
        *notes,
        f"Up and to the left is better. Each path goes from {count(pairs[0])} to {count(pairs[-1])} pairs; a vertical path is a state "
        "that does not grow."
        if pairs
        else "",
    )
    axis = value_axis("state at the end of the text", "byte", "log", [x for _, x in placed])
    title = f"{plain(task)}: accuracy against state"
    return Figure(
        id_,
        title,
        alt_of(title, series, "share"),
        axis,
        share_axis("share of right answers"),
        series,
        _chance(own),
        notes=notes,
    )


def recall_by_pairs(facts: Facts, id_: str, task: str, points: Sequence[Point], notes: Sequence[str]) -> Figure:
    """Accuracy against the number of pairs."""
    own = [replace(p, context=_pairs(p)) for p in _by_pairs(points) if _drawn(facts, p.model)]
    y: Upwards = (METRICS["recall_accuracy"].label, "share", "linear")
    return against_context(
        facts, id_, f"{plain(task)}: accuracy against pairs", own, y, _levels(own), notes, ("pairs to remember", "")
    )  # fmt: skip


def over_length(
    facts: Facts, id_: str, task: str, metric: str, points: Sequence[Point], notes: Sequence[str]
) -> Figure:
    """Accuracy against the length of the text."""
    axis, label, unit = _PRACTISED[metric]
    own = [
        p
        for p in points
        if p.metric == metric and dict(p.axes).get("axis") in (None, "length") and _drawn(facts, p.model)
    ]
    if axis:
        own = [replace(p, context=int(dict(p.axes).get(axis) or 0)) for p in own]
    y: Upwards = ("share of right answers", "share", "linear")
    title = f"{plain(task)}: accuracy against length" + (" at 16 pairs" if metric == "recall_accuracy" else "")
    return against_context(facts, id_, title, own, y, _levels(own), notes, (label, unit))


def _by_pairs(points: Sequence[Point]) -> list[Point]:
    own = [p for p in points if p.metric == "recall_accuracy" and dict(p.axes).get("axis") == "pairs"]
    return sorted(own, key=_pairs)


def _pairs(point: Point) -> int:
    value = dict(point.axes).get("pairs")
    return int(value) if isinstance(value, int | float) else 0


def _chance(points: Sequence[Point]) -> tuple[Reference, ...]:
    values = {chance for p in points if isinstance(chance := dict(p.axes).get("chance"), float)}
    return tuple(Reference(f"chance {number(value, 'share')}", value, "dot") for value in sorted(values))


def _levels(points: Sequence[Point]) -> tuple[Reference, ...]:
    return (*_chance(points), Reference(f"solved: {SOLVED:g}", SOLVED, "longdash"))


# -- text models as they are -------------------------------------------------------------------------------------------


def repeat_gain(facts: Facts, points: Sequence[Point], suffix: str) -> Figure:
    """What having read a passage before is worth after a gap, and where half of that is lost."""
    gaps = sorted({p.context for p in points})
    lines: dict[str, list[Point]] = {}
    for p in sorted(points, key=lambda p: p.context):
        lines.setdefault(p.model, []).append(p)
    styles = styles_of((m, facts.family[m]) for m in lines)
    series = tuple(
        line_of(facts, m, m, facts.label(m), styles[m], [dot_of(p, float(gaps.index(p.context))) for p in line])
        for m, line in lines.items()
    )
    marks, halves = [], []
    for m, line in lines.items():
        curve = [(float(p.context), float(p.value)) for p in line if p.value is not None]
        if half := half_lost(curve):
            value = min(curve)[1] / 2
            marks.append(Mark(gaps.index(int(half.left)) + half.share, value, "", "half"))
            halves.append(f"{facts.label(m)} after {count(half.at)} bytes")
    notes = (
        "Bits per byte saved at the second reading of a passage of random words, after so many bytes of other text; a model without memory "
        "saves 0. + marks where half of the first gain is lost"
        + (f": {'; '.join(halves)}." if halves else ": nowhere up to the longest gap."),
    )
    return Figure(
        f"repeat-gain{suffix}",
        "Memory of a passage over a gap",
        alt_of("Gain from having read a passage before", series, "bit/byte"),
        Axis("gap, bytes", "", "ordinal", tuple((float(i), tick(gap)) for i, gap in enumerate(gaps))),
        Axis("gain, bits per byte", "bit/byte", "linear"),
        series,
        (Reference("no memory", 0.0, "dash"),),
        tuple(marks),
        notes=notes,
    )


def needles(facts: Facts, points: Sequence[Point], suffix: str) -> Figure:
    """Needles ranked first against context, as the mean over the depths; every depth is in the table."""
    groups: dict[tuple[str, int], list[Point]] = {}
    for p in points:
        groups.setdefault((p.model, p.context), []).append(p)
    means = []
    for own in groups.values():
        values = [float(p.value) for p in own if p.value is not None]
        value = sum(values) / len(values) if len(values) == len(own) else None
        means.append(replace(own[0], value=value, low=None, high=None, axes=()))
    y: Upwards = ("needles ranked first", "share", "linear")
    notes = ("Mean over the depths of the hidden key; the right one of ten candidates. Every depth is in the tables.",)
    chance = (Reference("chance 0.1", 0.1, "dot"),)
    figure = against_context(facts, f"needle{suffix}", "Needles found against context", means, y, chance, notes)
    return shaded(facts, figure, (p.model for p in means))


def needle_map(facts: Facts, points: Sequence[Point], suffix: str) -> Figure:
    """The same needles by depth and length, a block of rows per model."""
    rows = [
        Row(p.model, facts.label(p.model), p.task, "" if depth is None else f"{depth} %", p)
        for p in points
        for depth in [dict(p.axes).get("depth_percent")]
    ]
    notes = (
        "Depth is where the key is hidden, 0 % at the beginning. Yellow is more, blue is fewer, chance is 0.1; hatched is no value.",
    )
    z = Scored("share of needles ranked first", lambda value: f"{value:.2f}", "share")
    return heat_map(
        facts, f"needle-map{suffix}", "Needles found by depth and length", rows, z, "depth of the key", notes
    )
