"""What do the probes of a memory budget say: how many streams fit, and how many tokens per second do they give together?

From the rows of the task ``capacity``, which tried batches each in a process of its own: the largest that fitted and the smallest that did
not, and streams over seconds of a step, for the largest batch and for a single stream. Where not even one stream fitted there are 0
streams, and no speed, with the reason of its probe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from bdh_bench.types import Record, Scalar

FOOTPRINT, STEP = "probe_footprint_bytes", "probe_step_s"
STREAMS, REFUSED = "capacity_streams", "capacity_refused_streams"
TOGETHER, ALONE = "capacity_tokens_per_s", "stream_tokens_per_s"
_NO_ROOM = ("oom_host", "oom_cuda")


def capacity_records(records: Iterable[Record]) -> Iterator[Record]:
    """What follows from the probes of each cell and context."""
    probes: dict[tuple[str, int, int, str], list[Record]] = {}
    for record in records:
        if record.metric in (FOOTPRINT, STEP):
            probes.setdefault((record.cell, record.round, record.context, _budget(record.axes)), []).append(record)
    for own in probes.values():
        yield from _of_cell(own)


def _budget(axes: Mapping[str, Scalar]) -> str:
    return str(axes.get("budget", ""))


def _of_cell(rows: list[Record]) -> Iterator[Record]:
    tried = {row.batch_size: row for row in rows if row.metric == FOOTPRINT}
    fits = [batch for batch, row in tried.items() if row.value is not None]
    fails = [batch for batch, row in tried.items() if row.value is None and row.status in _NO_ROOM]
    if not fits and not fails:
        return  # something else than memory ended the search
    some = next(iter(tried.values()))
    plain = replace(some, batch_size=1, repeat=0, status="ok", reason="")
    found = f"{min(fails):,} did not fit" if fails else "no larger batch was tried"
    yield _made(plain, STREAMS, float(max(fits, default=0)), reason=found)
    if fails:
        yield _made(plain, REFUSED, float(min(fails)))
    for metric, batch in ((TOGETHER, max(fits, default=1)), (ALONE, 1)):
        row = tried.get(batch)
        if row is not None and row.value is None:
            yield _made(plain, metric, None, row.status, row.reason)
        for step in rows:
            if step.metric == STEP and step.batch_size == batch and step.value:
                yield replace(_made(plain, metric, batch / step.value), batch_size=batch, repeat=step.repeat)


def _made(plain: Record, metric: str, value: float | None, status: str = "ok", reason: str = "") -> Record:
    return replace(plain, metric=metric, metric_id=metric, value=value, status=status, reason=reason)
