"""What may be resampled where a run has fewer than five independent documents?

Blocks instead: the target blocks of the same-target sweep, and stretches of T bytes of a stream. Their bits are stored, so the rows of a
document become one row per block with the same sum, and everything after that (ratios, pairing, draws) is as it was. The interval then
speaks of more text of these documents and not of other documents; whatever shows it says ``blocks``, and documents are what is counted
where a ranking asks how many there are.

All cells must have their bits, else nothing is changed: models are paired block by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from bdh_bench.results.reductions import SWEEP, Stream, arrays_of, stream_of
from bdh_bench.results.statistics import FEWEST_DOCUMENTS, cluster_count
from bdh_bench.results.store import CellOutcome, Run
from bdh_bench.types import Record

#: How whatever rests on blocks is labelled.
LABEL = "blocks"
#: Metrics whose bits are stored by block or byte.
_STREAM = "stream_bits_per_byte"


@dataclass(frozen=True)
class Blocks:
    """A run whose rows are of blocks where they had to be, and block → document for those; no entry: nothing was changed."""

    run: Run
    documents: Mapping[str, str]


def blocks_of(run: Run, clusters: Mapping[str, str]) -> Blocks:
    """The run as it is resampled."""
    documents: dict[str, str] = {}
    rows: dict[int, list[Record]] = {}
    cells = {cell.key: cell for cell in run.cells}
    for metric in (SWEEP, _STREAM):
        own = [(i, r) for i, r in enumerate(run.records) if r.metric == metric and r.sample and r.value is not None]
        if not own or cluster_count({r.sample for _, r in own}, clusters) >= FEWEST_DOCUMENTS:
            continue
        stored = {key: _bits(run, cells[key], metric) for key in dict.fromkeys(r.cell for _, r in own) if key in cells}
        made = {i: list(_in_blocks(r, stored.get(r.cell, {}))) for i, r in own}
        if all(made.values()):
            rows |= made
            documents |= {part.sample: run.records[i].sample for i, parts in made.items() for part in parts}
    if not rows:
        return Blocks(run, {})
    records = tuple(part for i, record in enumerate(run.records) for part in rows.get(i, [record]))
    return Blocks(replace(run, records=records), documents)


#: (document, context) → (offset, bits per byte, bytes) of each block
_Bits = dict[tuple[str, int], list[tuple[int, float, int]]]


def _in_blocks(record: Record, stored: _Bits) -> Iterator[Record]:
    for offset, value, size in stored.get((record.sample, record.context), ()):
        yield replace(record, sample=f"{record.sample}@{offset}", value=value, weight=float(size))


def _bits(run: Run, cell: CellOutcome, metric: str) -> _Bits:
    if metric == SWEEP:
        return _of_sweep(run, cell)
    stream = stream_of(run, cell)
    return {} if stream is None else dict(_of_stream(stream))


def _of_sweep(run: Run, cell: CellOutcome) -> _Bits:
    arrays = arrays_of(run, cell, "bits")
    found: _Bits = {}
    if not {"documents", "block_document", "block_start"} <= arrays.keys():
        return found
    names = [str(name) for name in arrays["documents"]]
    for name in arrays:
        if name.startswith("bits_c"):
            for owner, start, bits in zip(arrays["block_document"], arrays["block_start"], arrays[name], strict=True):
                block = (int(start), float(bits.astype(np.float64).mean()), len(bits))
                found.setdefault((names[int(owner)], int(name.removeprefix("bits_c"))), []).append(block)
    return found


def _of_stream(stream: Stream) -> Iterator[tuple[tuple[str, int], list[tuple[int, float, int]]]]:
    """Stretches of T bytes, counted from the beginning of the document whatever was skipped there."""
    for document, bits, start in zip(stream.documents, stream.bits, stream.starts, strict=True):
        edges = [*range(0, start + len(bits), stream.train_context), start + len(bits)]
        parts = [(low, bits[max(low - start, 0) : high - start]) for low, high in pairwise(edges)]
        yield (document, 0), [(low, float(part.mean()), len(part)) for low, part in parts if len(part)]
