"""Which further metrics follow from arrays and rows that are stored already? No model is run again, and numpy is all that is needed.

From the bits of every streamed byte (``stream.npz`` of a cell) and the classes of these bytes (``texts.npz`` of the run):

* position buckets, with edges 0, 64, 128, 256, … bytes and, apart, 0, 1, 2, 4, … training contexts T;
* the burn-in variant: the stream without the first 16 bytes of each document, on which a start symbol, or none, weighs most;
* the recall slice: bytes whose past says them (by distance, in powers of two), contradicts them, or does not know their key.

From the stamps of every decoding step (``decode.npz`` of a round): quantiles of the time between tokens, warm-up and first token left out.

From the rows of the same-target sweep: gain(c) = bits at the shortest context − bits at c, and the slope per doubling of c.

From the probes of a memory budget: what ``capacity`` says.

Each of the others comes out as one record per document or round, like those of a task, so that reduction, intervals and pairing are the
same for all. A token of several bytes spreads its bits evenly over them.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from bdh_bench.results.capacity import capacity_records
from bdh_bench.types import Record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bdh_bench.results.store import CellOutcome, Run

SWEEP, STREAM = "bits_per_byte", "stream_bits_per_byte"
POSITION, RECALL, GAIN, SLOPE = "position_bits_per_byte", "recall_bits_per_byte", "context_gain", "context_slope"
BURN_IN = "burn_in_bits_per_byte"
_BURNT = 16  # bytes
STEP, BETWEEN = "tpot_s", "itl_s"
#: Name → quantile of single steps, and the fewest steps in which it is not simply the largest.
QUANTILES = {"p50": (0.5, 1), "p95": (0.95, 20), "p99": (0.99, 100), "max": (1.0, 1)}
#: What this file makes. Shown with intervals, and never tested: the same bits would be asked the same question many times.
DERIVED = frozenset({BURN_IN, POSITION, RECALL, GAIN, SLOPE, BETWEEN})
_FIRST_EDGE = 64
_CONFLICT, _NOVEL = -1, 0  # classes that are no distance; below them: excluded
_CARRIED = "bpb@stream,state=carry"


@dataclass(frozen=True)
class Stream:
    """What one cell paid for the bytes of some documents. ``bits`` per byte from offset ``starts`` on, by document."""

    documents: tuple[str, ...]
    bits: tuple[NDArray[np.float64], ...]
    starts: tuple[int, ...]
    train_context: int
    metric_id: str

    @property
    def protocol(self) -> str:
        """What a metric's identity needs where the state was emptied inside documents; nothing for ``carry``."""
        return "" if self.metric_id == _CARRIED else "," + self.metric_id.removeprefix("bpb@").removeprefix("stream,")


def derived_records(run: Run) -> Iterator[Record]:
    """Every record that follows from what is stored."""
    classes = classes_of(run)
    rows: dict[str, list[Record]] = {}
    for record in run.records:
        if record.metric in (SWEEP, STREAM, STEP) and record.value is not None:
            rows.setdefault(record.cell, []).append(record)
    yield from capacity_records(run.records)
    for cell in run.cells:
        own = rows.get(cell.key, [])
        yield from gains([r for r in own if r.metric == SWEEP])
        streamed = [r for r in own if r.metric == STREAM]
        stream = stream_of(run, cell) if streamed else None
        if stream is not None:
            plain = replace(streamed[0], axes={}, context=0, repeat=0)
            yield from burnt_in(stream, plain)
            yield from positions(stream, plain)
            yield from recall(stream, classes, plain)
        for one in cell.rounds:
            steps = [r for r in own if r.metric == STEP and r.round == one.round]
            if steps and one.files:
                yield from between_tokens(arrays_at(run.path / "cells" / one.files / "decode.npz"), steps)


# -- stored arrays -----------------------------------------------------------------------------------------------------


def stream_of(run: Run, cell: CellOutcome) -> Stream | None:
    """The stored bits of a cell's final attempt; None where there are none that can be read."""
    arrays = arrays_of(run, cell, "stream")
    if not {"documents", "train_context", "metric_id"} <= arrays.keys():
        return None
    names = [str(name) for name in arrays["documents"]]
    found = [i for i in range(len(names)) if {f"bits_{i}", f"ends_{i}", f"start_{i}"} <= arrays.keys()]
    starts = tuple(int(arrays[f"start_{i}"]) for i in found)
    bits = tuple(per_byte(arrays[f"bits_{i}"], arrays[f"ends_{i}"], s) for i, s in zip(found, starts, strict=True))
    documents = tuple(names[i] for i in found)
    return Stream(documents, bits, starts, int(arrays["train_context"]), str(arrays["metric_id"]))


def arrays_of(run: Run, cell: CellOutcome, name: str) -> dict[str, NDArray[Any]]:
    """The arrays that a cell's final attempt kept under this name; none where they cannot be read."""
    return arrays_at(run.path / "cells" / cell.files / f"{name}.npz")


def classes_of(run: Run) -> dict[str, NDArray[np.int32]]:
    """By document, the class of every byte of its stream; empty for a run without them."""
    arrays = arrays_at(run.path / "texts.npz")
    names = arrays.get("documents", ())
    return {str(name): arrays[f"classes_{i}"] for i, name in enumerate(names) if f"classes_{i}" in arrays}


def arrays_at(path: Any) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file; none of one that is missing or damaged."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (
        OSError,
        ValueError,
        zipfile.BadZipFile,
    ):  # a missing or damaged file takes its metrics with it, nothing else
        return {}


def per_byte(bits: NDArray[Any], ends: NDArray[Any], start: int) -> NDArray[np.float64]:
    """Bits of every byte from ``start`` on: those of a token evenly over its span, those of a token without bytes at the next byte."""
    import numpy as np

    owed, widths = bits.astype(np.float64), np.diff(ends, prepend=start)
    if len(owed) == 0 or (widths == 1).all():
        return owed
    paying = np.flatnonzero(widths > 0)
    payer = np.searchsorted(paying, np.arange(len(owed)))  # this token, or the next one that has bytes
    sums = np.bincount(np.minimum(payer, len(paying) - 1), weights=owed, minlength=len(paying))
    return np.repeat(sums / widths[paying], widths[paying])


# -- position buckets --------------------------------------------------------------------------------------------------


def positions(stream: Stream, plain: Record) -> Iterator[Record]:
    """One record per document and bucket; ``context`` is the first byte of the bucket."""
    longest = max((s + len(b) for s, b in zip(stream.starts, stream.bits, strict=True)), default=0)
    unit = stream.train_context
    for edges, scale, name in (
        (_doubling(_FIRST_EDGE, longest), 1, ""),
        (_doubling(unit, longest), unit, "T"),
    ):
        for low, high in pairwise(edges):
            bucket = f"[{_edge(low, scale, name)},{_edge(high, scale, name)})"
            made = replace(
                plain,
                metric=POSITION,
                metric_id=f"bpb@pos={bucket}{stream.protocol}",
                context=low,
                axes={"edges": "training contexts" if name else "bytes"},
            )
            for document, bits, start in zip(stream.documents, stream.bits, stream.starts, strict=True):
                yield from _weighed(made, document, bits[max(low - start, 0) : max(high - start, 0)])


def burnt_in(stream: Stream, plain: Record) -> Iterator[Record]:
    """One record per document: its stream from byte 16 on."""
    made = replace(plain, metric=BURN_IN, metric_id=f"bpb@stream,burn_in={_BURNT}{stream.protocol or ',state=carry'}")
    for document, bits, start in zip(stream.documents, stream.bits, stream.starts, strict=True):
        yield from _weighed(made, document, bits[max(_BURNT - start, 0) :])


def _doubling(first: int, longest: int) -> list[int]:
    """0, first, 2 · first, … up to the first edge that nothing lies beyond."""
    edges = [0, first]
    while edges[-1] < longest:
        edges.append(2 * edges[-1])
    return edges


def _edge(value: int, scale: int, name: str) -> str:
    return f"{value // scale}{name if value else ''}"


def _weighed(made: Record, document: str, bits: NDArray[np.float64]) -> Iterator[Record]:
    """The record of one document, where it has bytes at all."""
    if len(bits):
        yield replace(made, sample=document, value=float(bits.sum()) / len(bits), weight=float(len(bits)))


# -- recall slice ------------------------------------------------------------------------------------------------------


def recall(stream: Stream, classes: dict[str, NDArray[np.int32]], plain: Record) -> Iterator[Record]:
    """One record per document and slice, for documents whose classes are stored."""
    known = [
        (document, bits, classes[document][start : start + len(bits)])
        for document, bits, start in zip(stream.documents, stream.bits, stream.starts, strict=True)
        if document in classes
    ]
    farthest = max((int(own.max(initial=0)) for _, _, own in known), default=0)
    slices = [
        (f"recall,d=[{1 << power},{2 << power})", 1 << power, 2 << power) for power in range(farthest.bit_length())
    ]
    for name, low, high in (*slices, ("conflict", _CONFLICT, _CONFLICT + 1), ("novel", _NOVEL, _NOVEL + 1)):
        made = replace(
            plain,
            metric=RECALL,
            metric_id=f"bpb@{name}{stream.protocol}",
            axes={"slice": name},
        )
        for document, bits, own in known:
            yield from _weighed(made, document, bits[: len(own)][(low <= own) & (own < high)])


# -- single steps ------------------------------------------------------------------------------------------------------


def between_tokens(arrays: Mapping[str, NDArray[Any]], rows: Sequence[Record]) -> Iterator[Record]:
    """Quantiles of the steps of one round, marked as its windows (``rows``) are; gaps where steps were not told apart or are too few."""
    import numpy as np

    kind = "single_" if "single_stamps_ns" in arrays else ""
    if not {f"{kind}stamps_ns", f"{kind}block"} <= arrays.keys():
        return
    stamps, block = arrays[f"{kind}stamps_ns"], int(arrays[f"{kind}block"])  # (W, S, 2)
    steps = (stamps[..., -1] - stamps[..., 0]).ravel() * 1e-9
    marked = next((row for row in rows if row.status != "ok"), rows[0])
    for name, (share, fewest) in QUANTILES.items():
        made = replace(marked, metric=BETWEEN, axes={**marked.axes, "quantile": name}, repeat=0)
        if block > 1:
            reason = f"steps are so short that they were timed in blocks of {block}"
            yield replace(made, value=None, status="unsupported", reason=reason)
        elif steps.size < fewest:
            reason = f"{steps.size} steps have no {name}: {fewest} are needed"
            yield replace(made, value=None, status="unsupported", reason=reason)
        else:
            yield replace(made, value=float(np.quantile(steps, share)))


# -- the sweep ---------------------------------------------------------------------------------------------------------


def gains(rows: Sequence[Record]) -> Iterator[Record]:
    """Gain at each context but the shortest, and the slope over all of them, by document."""
    contexts = sorted({row.context for row in rows})
    if len(contexts) < 2:
        return
    by_document: dict[str, dict[int, Record]] = {}
    for row in rows:
        by_document.setdefault(row.sample, {})[row.context] = row
    shortest = contexts[0]
    for own in by_document.values():
        if set(own) != set(contexts):
            continue  # a document that lacks a context would make another statistic of it
        values = [float(own[c].value or 0.0) for c in contexts]
        for context, value in zip(contexts[1:], values[1:], strict=True):
            target = own[context].metric_id.partition(",")[2]
            yield replace(
                own[context],
                metric=GAIN,
                metric_id=f"gain@c={context},from={shortest},{target}",
                value=values[0] - value,
            )
        last = own[contexts[-1]]
        target = last.metric_id.partition(",")[2]
        yield replace(
            last,
            metric=SLOPE,
            metric_id=f"slope@c={shortest}-{contexts[-1]},{target}",
            value=_slope(contexts, values),
        )


def _slope(contexts: Iterable[int], values: Sequence[float]) -> float:
    import numpy as np

    x = np.log2(np.array(list(contexts), dtype=np.float64))
    x -= x.mean()
    return float((x * np.array(values)).sum() / (x * x).sum())
