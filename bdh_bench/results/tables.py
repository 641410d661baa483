"""Which points do the raw records of a run make?

A *point* is one (model, task, metric, context, batch size, axes, seed), reduced as the table of metrics says. With several
seeds there is one more point over the seeds, with ``seed`` None. What has no value is a point all the same, with its
status and reason: a gap is shown as a gap, never as 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from bdh_bench.metrics import METRICS
from bdh_bench.results import statistics
from bdh_bench.results.blocks import LABEL, blocks_of
from bdh_bench.results.capacity import ALONE, TOGETHER, capacity_records
from bdh_bench.results.display import GAP, interval, quantity
from bdh_bench.results.reductions import derived_records
from bdh_bench.results.rounds import grouped, timing_of
from bdh_bench.results.store import Run
from bdh_bench.types import MEASURED_STATUSES, Record, Scalar

if TYPE_CHECKING:
    import pandas as pd

Axes = tuple[tuple[str, Scalar], ...]
#: Part of what makes a point comparable rather than of what is measured; no column of its own in a table.
HASH_AXIS = "target_hash"


@dataclass(frozen=True)
class Point:
    """One reduced value. ``cell`` holds the keys of the cells behind it, separated by commas."""

    model: str
    family: str
    size: str
    task: str
    metric: str
    metric_id: str
    unit: str
    value: float | int | None
    low: float | None
    high: float | None
    n: int
    context: int
    batch_size: int
    seed: int | None
    axes: Axes
    status: str
    reason: str
    weights: str
    cell: str

    @property
    def cells(self) -> tuple[str, ...]:
        return tuple(key for key in self.cell.split(",") if key)

    @property
    def target_hash(self) -> str:
        return str(dict(self.axes).get(HASH_AXIS) or "")


FIELDS = tuple(field.name for field in fields(Point))


def points_of(run: Run) -> tuple[Point, ...]:
    """All points of a run in the order of its plan, those derived from stored arrays, and then points over seeds."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    clusters = clusters_of(run)
    blocks = blocks_of(run, clusters)
    for record in (*blocks.run.records, *derived_records(blocks.run)):
        groups.setdefault(_identity(record), []).append(record)
    single = [_reduced(records, clusters, blocks.documents) for records in groups.values()]
    if len({cell.seed for cell in run.cells}) < 2:
        return tuple(single)
    return (*single, *_over_seeds(single))


def clusters_of(run: Run) -> dict[str, str]:
    """document → cluster, for the documents of the manifest that say which others they belong with."""
    corpus = run.manifest.get("corpus")
    documents = corpus.get("documents") if isinstance(corpus, Mapping) else None
    rows = [row for row in documents or [] if isinstance(row, Mapping)]
    return {str(row.get("name")): str(row["cluster"]) for row in rows if row.get("cluster")}


def frozen_axes(axes: Mapping[str, Scalar]) -> Axes:
    """Axes as sorted pairs, so that they can be part of a key."""
    return tuple(sorted((str(name), _scalar(value)) for name, value in axes.items()))


def finite(value: object) -> float | int | None:
    """The number, or None for what is none (missing, NaN, infinite, not a number at all)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def reduction_of(metric: str, records: Sequence[Record]) -> str:
    """How the raw values become one; for a metric of a plug-in, a ratio where it has samples, else the median."""
    if metric in METRICS:
        return METRICS[metric].reduction
    return "ratio" if any(record.sample for record in records) else "median"


def samples_of(records: Iterable[Record]) -> dict[str, tuple[float, float]]:
    """sample → (value, weight), for the records that have a value."""
    rows = ((r.sample or f"{r.round}/{r.repeat}", finite(r.value), finite(r.weight)) for r in records)
    return statistics.merge_samples((s, float(v), float(w)) for s, v, w in rows if v is not None and w is not None)


def _scalar(value: object) -> Scalar:
    return value if value is None or isinstance(value, str | int | float | bool) else json.dumps(value, sort_keys=True)


def _identity(record: Record) -> tuple[Any, ...]:
    axes = json.dumps(frozen_axes(record.axes))
    return (
        record.model,
        record.task,
        record.metric,
        record.metric_id,
        record.context,
        record.batch_size,
        axes,
        record.seed,
    )


def _reduced(records: Sequence[Record], clusters: Mapping[str, str], blocks: Mapping[str, str]) -> Point:
    first = records[0]
    gaps = [record for record in records if finite(record.value) is None]
    how = reduction_of(first.metric, records)
    if how in ("ratio", "share"):
        found = _over_samples(records, gaps, how, clusters)
        few = _too_few(records, found) or _over_blocks(records, found, blocks)
        value, low, high, n = (found.value, found.low, found.high, found.n) if found else (None, None, None, 0)
    elif how == "median":
        few, (value, low, high, n) = _over_rounds(records)
    else:
        few, (value, low, high, n) = "", _exact(records)
    status, reason = _status(records, gaps, how, value)
    return _point(first, value, low, high, n, first.seed, status, reason or few, records)


def _over_samples(
    records: Sequence[Record], gaps: Sequence[Record], how: str, clusters: Mapping[str, str]
) -> statistics.Estimate | None:
    """The estimate over documents or trials; None where one is missing: without it, it would be another statistic."""
    samples = samples_of(records)
    trials = sum(weight for _, weight in samples.values())
    if gaps or trials <= 0:
        return None
    if how == "share":
        successes = sum(value * weight for value, weight in samples.values())
        possible = all(0 <= value <= 1 for value, _ in samples.values())
        return statistics.wilson(min(successes, trials), trials) if possible else None
    estimate = statistics.bootstrap_ratio(samples, clusters)
    if any(record.sample for record in records):
        return estimate
    return replace(estimate, low=None, high=None)  # repeats of one process are no units of resampling


def _too_few(records: Sequence[Record], estimate: statistics.Estimate | None) -> str:
    """Why there is no interval, where documents are too few for one."""
    if estimate is None or estimate.low is not None or not any(record.sample for record in records):
        return ""
    return f"no interval: {estimate.units} independent documents, {statistics.FEWEST_DOCUMENTS} are needed"


def _over_blocks(records: Sequence[Record], estimate: statistics.Estimate | None, blocks: Mapping[str, str]) -> str:
    """That an interval is over blocks, where it is."""
    documents = {blocks[record.sample] for record in records if record.sample in blocks}
    if estimate is None or not documents:
        return ""
    return f"{LABEL}: 95 % over {estimate.units} blocks of {len(documents)} documents, not over documents"


def _over_rounds(records: Sequence[Record]) -> tuple[str, tuple[float | None, float | None, float | None, int]]:
    """The median over rounds of the medians of their windows, with its interval; n counts rounds. A remark comes first."""
    values = [(r.round, float(value)) for r in records if (value := finite(r.value)) is not None]
    if not values:
        return "", (None, None, None, 0)
    found = timing_of(grouped(values))
    marked = [r for r in records if r.status != "ok" and r.status in MEASURED_STATUSES and finite(r.value) is not None]
    kinds = " and ".join(dict.fromkeys(r.status for r in marked))
    marks = f"{len(marked)} of {len(values)} windows {kinds}" if len(values) > len(marked) > 0 else ""
    timed = METRICS[records[0].metric].unit == "s" if records[0].metric in METRICS else False
    remark = " · ".join(part for part in (marks, found.remark if timed else "") if part)
    return remark, (found.value, found.low, found.high, found.rounds)


def _exact(records: Sequence[Record]) -> tuple[float | int | None, None, None, int]:
    values = [value for record in records if (value := finite(record.value)) is not None]
    if not values or len(set(values)) > 1:
        return None, None, None, 0
    return values[0], None, None, len(values)


def _status(records: Sequence[Record], gaps: Sequence[Record], how: str, value: float | None) -> tuple[str, str]:
    if value is not None:
        marked = next((r for r in records if r.status != "ok" and r.status in MEASURED_STATUSES), records[0])
        return (marked.status if marked.status in MEASURED_STATUSES else "ok"), marked.reason
    if gaps:
        first = gaps[0]
        status = first.status if first.status not in MEASURED_STATUSES else "error"
        return status, first.reason or ("a value is missing" if first.value is None else "the value is not finite")
    if how == "share" and any((finite(record.weight) or 0) > 0 for record in records):
        return "error", "a share is outside 0 and 1"
    if how == "exact":
        return "error", f"repeats disagree: {_listed(record.value for record in records)}"
    return "error", "nothing was weighed: the weights sum to 0"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in list(dict.fromkeys(values))[:5])


def _point(
    first: Record | Point,
    value: float | int | None,
    low: float | None,
    high: float | None,
    n: int,
    seed: int | None,
    status: str,
    reason: str,
    sources: Sequence[Record | Point],
) -> Point:
    known = METRICS.get(first.metric)
    axes = first.axes if isinstance(first.axes, tuple) else frozen_axes(first.axes)
    return Point(
        model=first.model,
        family=first.family,
        size=first.size,
        task=first.task,
        metric=first.metric,
        metric_id=first.metric_id,
        unit=known.unit if known else "",
        value=finite(value),
        low=finite(low),
        high=finite(high),
        n=n,
        context=int(finite(first.context) or 0),
        batch_size=first.batch_size,
        seed=seed,
        axes=axes,
        status=status,
        reason=reason,
        weights=first.weights,
        cell=",".join(dict.fromkeys(source.cell for source in sources)),
    )


def _over_seeds(points: Sequence[Point]) -> Iterator[Point]:
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for p in points:
        key = (p.model, p.task, p.metric, p.metric_id, p.context, p.batch_size, json.dumps(p.axes))
        groups.setdefault(key, []).append(p)
    for group in groups.values():
        yield _mean_point(group)


def _mean_point(group: Sequence[Point]) -> Point:
    first = group[0]
    with_value = [point for point in group if point.value is not None]
    if not with_value:
        return _point(first, None, None, None, 0, None, first.status, first.reason, group)
    values = [point.value for point in with_value if point.value is not None]
    missing = len(group) - len(with_value)
    reason = f"{missing} of {len(group)} seeds have no value" if missing else ""
    if first.metric in METRICS and METRICS[first.metric].reduction == "exact":
        if len(set(values)) > 1:
            return _point(first, None, None, None, 0, None, "error", f"seeds disagree: {_listed(values)}", group)
        return _point(first, values[0], None, None, len(values), None, with_value[0].status, reason, group)
    mean = statistics.t_interval(values)
    return _point(first, mean.value, mean.low, mean.high, mean.n, None, with_value[0].status, reason, group)


# -- views -----------------------------------------------------------------------------------------------------------


#: Texts whose note says why, and is shown wherever they are.
EXPLAINED = ("undecided", "unranked", "equivalent")


@dataclass(frozen=True)
class Entry:
    """One cell of a table: the text, and a remark (interval, status, reason) behind it."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A titled table of text; the first column names the row. ``note`` stands below it in every format.

    A ``detail`` is what a reader asks for: it is not shown first.
    """

    id: str
    title: str
    meaning: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    note: str = ""
    detail: bool = False


def best_points(points: Sequence[Point]) -> list[Point]:
    """One seed level per quantity: the points over seeds where there are some, else those of the only seed."""
    pooled = [point for point in points if point.seed is None]
    return pooled or list(points)


#: Metrics that are shown first in every task, beside each task's own headline metric.
_SHOWN_FIRST = ("stream_bits_per_byte", "prefill_s", "tpot_s", "state_restore_s", "state_fork_s", TOGETHER, ALONE)


def headlines_of(run: Run) -> set[tuple[str, str]]:
    """(task, metric) of what is shown first: the metric that a task declares its headline, and scores and times beside it.

    Of a task whose headline nothing measured (what it measures depends on what it was asked for), all that was.
    """
    wanted = {(cell.task, metric) for cell in run.cells for metric in (cell.metric, *_SHOWN_FIRST)}
    rows = (*run.records, *capacity_records(run.records))
    measured = {(record.task, record.metric) for record in rows if record.value is not None}
    silent = {task for task, _ in measured} - {task for task, _ in measured & wanted}
    return wanted | {(task, metric) for task, metric in measured if task in silent}


def value_tables(
    points: Sequence[Point],
    names: Mapping[str, str] | None = None,
    headlines: Collection[tuple[str, str]] | None = None,
    invalid: Collection[str] = (),
) -> list[Table]:
    """One table per task and metric: a row per model (and axes), a column per context or per value of what is varied.

    ``names`` are short names of models; what is not among ``headlines`` is a detail (nothing is, without them); ``invalid``
    are tasks whose numbers decide nothing, and their titles say so.
    """
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for point in best_points(points):
        groups.setdefault((point.task, point.metric, _varied(point)), []).append(point)
    groups = {key: group for key, group in groups.items() if any(p.value is not None for p in group) or not key[2]}
    tables = []
    for number, ((task, metric, varied), group) in enumerate(groups.items()):
        detail = headlines is not None and (task, metric) not in headlines
        made = _value_table(f"table-{number}", (task, metric, varied), group, names or {}, detail)
        tables.append(replace(made, title=f"{made.title} (invalid: no signal)") if task in invalid else made)
    return tables


def _varied(point: Point) -> str:
    """What a task says that it varies (its axis ``axis``), or ""."""
    return str(dict(point.axes).get("axis") or "")


def _column_axis(group: Sequence[Point]) -> str:
    """The axis that runs over the columns: the one that is varied, else the only one that differs where no context does, else ""."""
    varied = _varied(group[0])
    known = {name for point in group for name, _ in point.axes}
    if varied:
        return varied if varied in known else ""
    if len({point.context for point in group}) > 1:
        return ""
    values: dict[str, set[Scalar]] = {}
    for point in group:
        for name, value in point.axes:
            values.setdefault(name, set()).add(value)
    several = [name for name, found in values.items() if len(found) > 1 and name not in _ABOUT]
    return several[0] if len(several) == 1 else ""


def _value_table(
    id_: str, about: tuple[str, str, str], group: Sequence[Point], names: Mapping[str, str], detail: bool
) -> Table:
    task, metric, varied = about
    known, across = METRICS.get(metric), _column_axis(group)
    rows_by_name = row_names(group, names, across)

    def place(point: Point) -> Scalar:
        return dict(point.axes).get(across) if across else point.context

    places = list(dict.fromkeys(place(point) for point in group))
    if all(isinstance(value, int | float) for value in places):
        places.sort(key=lambda value: float(value or 0))
    rows: dict[str, dict[Scalar, Point]] = {}
    for point in group:
        rows.setdefault(rows_by_name[point], {})[place(point)] = point
    common = _common_reason(group)
    body = tuple((Entry(name), *(_entry(by_place.get(at), common) for at in places)) for name, by_place in rows.items())
    begins = len(places) > 1 and any(
        p.context == 0 and p.value is not None for p in group
    )  # 0 is a context among others
    if across:
        columns = tuple(f"{across} {at}" if isinstance(at, int | float) else str(at) for at in places)
    else:
        columns = tuple(f"c = {at:,}" if at or begins else "any c" for at in places)
    label = known.label if known else metric
    title = f"{task}: {label}{f', by {varied}' if varied else ''}"
    note = " ".join(
        part for part in (_scope(metric, group), f"{common[:1].upper()}{common[1:]}." if common else "") if part
    )
    return Table(id_, title, known.meaning if known else "", ("model", *columns), body, note, detail)


def _scope(metric: str, group: Sequence[Point]) -> str:
    """What a table of quality speaks about: checkpoints, or designs."""
    if (
        metric not in METRICS
        or METRICS[metric].reduction not in ("ratio", "share")
        or METRICS[metric].better == "neither"
    ):
        return ""
    seeds = max((point.n for point in group if point.seed is None), default=1)
    if seeds < 2:
        return "One training seed: a table of these checkpoints, not of architectures."
    return (
        f"Means over {seeds} training seeds with Student's t; which differences are decided is said by the comparisons."
    )


def row_names(points: Sequence[Point], names: Mapping[str, str] | None = None, across: str = "") -> dict[Point, str]:
    """Point → the name of its row or line: the model, with batch size and axes where it has several of them at one place.

    ``names`` are short names of models; ``across`` is the axis that tells places apart, instead of the context.
    """
    values: dict[tuple[str, str, Scalar], set[Scalar]] = {}
    for point in points:
        if point.value is not None:
            at = dict(point.axes).get(across) if across else point.context
            for name, value in _settings(point, across):
                values.setdefault((point.model, name, at), set()).add(value)
    several = {(model, name) for (model, name, _), found in values.items() if len(found) > 1}
    return {
        point: " · ".join(
            [
                (names or {}).get(point.model, point.model),
                *(f"{n}={v}" for n, v in _settings(point, across) if (point.model, n) in several),
            ]
        )
        for point in points
    }


#: Axes that say something about a point and make no row of its own.
_ABOUT = (HASH_AXIS, "chance", "vocabulary", "axis")


def _settings(point: Point, across: str) -> list[tuple[str, Scalar]]:
    return [("batch", point.batch_size), *(pair for pair in point.axes if pair[0] not in (*_ABOUT, across))]


def _common_reason(group: Sequence[Point]) -> str:
    """The remark that every value of a table has, which is said once below it."""
    reasons = {point.reason for point in group if point.value is not None}
    return reasons.pop() if len(reasons) == 1 else ""


def _entry(point: Point | None, common: str = "") -> Entry:
    if point is None:
        return Entry(GAP, "not planned")
    if point.value is None:
        return Entry(point.status, point.reason)
    span = interval(point.low, point.high, point.unit)
    mark = "" if point.status == "ok" else f" ({point.status})"
    return Entry(
        quantity(point.value, point.unit) + mark,
        " ".join(part for part in (span, point.reason) if part and part != common),
    )


def frame(points: Sequence[Point]) -> pd.DataFrame:
    """The points as a data frame, one row each; axes as JSON text."""
    import pandas as pd

    rows = [
        {name: getattr(point, name) for name in FIELDS} | {"axes": json.dumps(dict(point.axes))} for point in points
    ]
    return pd.DataFrame(rows, columns=list(FIELDS))


def pivot(points: Sequence[Point], metric: str) -> pd.DataFrame:
    """Values of one metric, models against contexts; gaps are missing values."""
    chosen = [point for point in best_points(points) if point.metric == metric]
    table = frame(chosen)
    table["value"] = table["value"].astype("Float64")
    return table.pivot_table(index="model", columns="context", values="value", aggfunc="first", dropna=False)
