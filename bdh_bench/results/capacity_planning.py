"""How many streams of a context fit a machine, and how many tokens per second do they make? From measured curves, else from formulae.

Measured: the largest batch whose peak footprint stays within the memory and whose 95th percentile of steps stays within the latency; its
tokens per second are batch over time per token. Between measured batches and contexts values are straight in log-log; outside the
measured grid nothing is said but "not measured".

Formula: weights + batch · state(context). The workspace of a step (activations, logits, the allocator, the program) is in no formula, so
the batch is an upper bound. Tokens per second have one only where a bandwidth is given: each step reads all weights and states once.

Every number says which of the two it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from bdh_bench.results.display import GAP, count, number, quantity
from bdh_bench.results.reductions import BETWEEN, derived_records
from bdh_bench.results.rounds import grouped, point_of
from bdh_bench.results.store import Run
from bdh_bench.results.tables import finite

Basis = Literal["measured", "formula", "not measured"]
_FOOTPRINT, _STEP = "peak_footprint_bytes", "tpot_s"
_MEASURED = ((_FOOTPRINT, "probe_footprint_bytes"), (_STEP, "probe_step_s"))
_ROUNDING = 1 + 1e-9  # a value read at a measured place is what was measured
#: (batch, context) → value
Grid = Mapping[tuple[int, int], float]


@dataclass(frozen=True)
class Wish:
    """What is asked for: bytes of memory, tokens of context, seconds of a step, price per hour, bytes per second of bandwidth."""

    memory: int
    context: int
    latency: float | None = None
    price: float | None = None
    bandwidth: float | None = None


@dataclass(frozen=True)
class Needs:
    """What a model needs by formula at the wished context; ``problem`` is why there is no formula. None: unknown, never 0."""

    model: str
    dtype: str = ""
    parameters: int | None = None
    weights_bytes: int | None = None
    state_bytes: int | None = None
    max_positions: int | None = None
    remark: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Capacity:
    """The answer for one model. ``streams`` None is unknown, or unbounded where ``limit`` says so; ``limit`` is what fails next."""

    model: str
    streams: int | None
    streams_by: Basis
    tokens_per_s: float | None
    tokens_by: Basis
    step_s: float | None
    limit: str
    remark: str = ""
    cost_per_million: float | None = None
    needs: Needs | None = None


@dataclass(frozen=True)
class Grids:
    """What a run measured of one model, by batch and context: footprints, median steps, and 95th percentiles of single steps."""

    footprints: Grid
    times: Grid
    tails: Grid


def capacity_of(needs: Needs, wish: Wish, run: Run | None = None) -> Capacity:
    """By measurement where the run has it, else by formula."""
    return capacity_from(needs, wish, grids_of(run, needs.model) if run else None)


def capacity_from(needs: Needs, wish: Wish, grids: Grids | None) -> Capacity:
    """By measurement where the grids have it, else by formula."""
    limit = needs.max_positions
    if limit is not None and wish.context > limit:
        why = f"position limit: {count(limit)} tokens"
        return Capacity(needs.model, 0, "formula", None, "formula", None, why, needs=needs)
    found = measured_capacity(grids, needs.model, wish) if grids else None
    by_formula = formula_capacity(needs, wish)
    if found is None or found.streams is None:
        beside = [found.remark] if found else []
        found = replace(by_formula, remark=" · ".join(filter(None, (*beside, by_formula.remark))))
    cost = None
    if wish.price is not None and found.tokens_per_s:
        cost = wish.price / (found.tokens_per_s * 3600) * 1e6
    return replace(found, cost_per_million=cost, needs=needs)


# -- formula ---------------------------------------------------------------------------------------------------------


def formula_capacity(needs: Needs, wish: Wish) -> Capacity:
    """Weights and states against memory, and against the latency where a bandwidth is given."""
    weights, state = needs.weights_bytes, needs.state_bytes
    if needs.problem or weights is None or state is None:
        why = needs.problem or "no formula for its state"
        return Capacity(needs.model, None, "not measured", None, "not measured", None, f"unknown: {why}")
    remark = " · ".join(part for part in (needs.remark, "workspace unknown: an upper bound") if part)
    if weights > wish.memory:
        why = f"memory: the weights alone are {quantity(weights, 'byte')}"
        return Capacity(needs.model, 0, "formula", None, "formula", None, why, needs.remark)
    limits = [((wish.memory - weights) // state, "memory")] if state else []
    if wish.latency is not None and wish.bandwidth:
        room = wish.latency * wish.bandwidth - weights
        limits.append((max(0, int(room // state)) if state else (0 if room < 0 else 2**62), "latency"))
    streams, limit = min(limits, default=(None, "none: it keeps nothing per stream"))
    if streams is not None and streams >= 2**62:
        streams, limit = None, "none: it keeps nothing per stream"
    step = (weights + streams * state) / wish.bandwidth if wish.bandwidth and streams else None
    tokens = streams / step if step and streams else None
    if step is None and streams:
        remark += " · tokens per second have no formula without --bandwidth"
    if wish.latency is not None and not wish.bandwidth:
        remark += " · not held against the latency"
    return Capacity(needs.model, streams, "formula", tokens, "formula", step, limit, remark)


# -- measurement -----------------------------------------------------------------------------------------------------


def measured_capacity(grids: Grids, model: str, wish: Wish) -> Capacity | None:
    """The largest batch inside the measured grid; without streams where the wish lies outside. None for a model it never measured."""
    footprints, times, tails = grids.footprints, grids.times, grids.tails
    if not footprints and not times:
        return None
    outside = Capacity(model, None, "not measured", None, "not measured", None, "")
    bytes_at = _over_batches(footprints, wish.context)
    if len(bytes_at) < 1:
        return replace(outside, remark=f"not measured: no footprint around {count(wish.context)} tokens")
    fits, limit = _largest(bytes_at, float(wish.memory), "memory")
    if wish.latency is not None:
        step_at = _over_batches(tails or times, wish.context)
        if not step_at:
            return replace(outside, remark=f"not measured: no times around {count(wish.context)} tokens")
        quick, why = _largest(step_at, wish.latency, "latency")
        fits, limit = (quick, why) if quick is None or (fits is not None and quick < fits) else (fits, limit)
    if fits is None:
        return replace(outside, remark=f"not measured: {limit}")
    if fits == 0:
        return Capacity(model, 0, "measured", None, "measured", None, limit)
    step = _read(_over_batches(times, wish.context), fits)
    tokens_by: Basis = "measured" if step else "not measured"
    remark = (
        "" if wish.latency is None or tails else "the median step was held against the latency: no single steps stored"
    )
    return Capacity(model, fits, "measured", fits / step if step else None, tokens_by, step, limit, remark)


def grids_of(run: Run, model: str) -> Grids:
    """The grids of one model: of ``latency`` and ``memory``, and of the probes of ``capacity``, each in a process of its own too."""
    own = replace(run, records=tuple(r for r in run.records if r.model == model))
    footprints, times = ({**grid_of(own, model, probe), **grid_of(own, model, plain)} for plain, probe in _MEASURED)
    return Grids(footprints, times, tails_of(own, model))


def grid_of(run: Run, model: str, metric: str) -> dict[tuple[int, int], float]:
    """(batch, context) → the median over rounds; of several ways of running, the one with the least median time or bytes."""
    rows: dict[tuple[int, int], dict[str, list[tuple[Any, float]]]] = {}
    for r in run.records:
        value = finite(r.value)
        if r.model == model and r.metric == metric and value is not None and r.context > 0:
            way = f"{r.task}|{sorted(r.axes.items(), key=str)}"
            rows.setdefault((r.batch_size, r.context), {}).setdefault(way, []).append(((r.seed, r.round), float(value)))
    return {at: min(point_of(grouped(values)) for values in ways.values()) for at, ways in rows.items()}


def tails_of(run: Run, model: str) -> dict[tuple[int, int], float]:
    """(batch, context) → the 95th percentile of single steps, the median over rounds, where they were stamped one by one."""
    steps = tuple(r for r in run.records if r.model == model and r.metric == _STEP)
    rows = [
        r for r in derived_records(replace(run, records=steps)) if r.metric == BETWEEN and r.axes["quantile"] == "p95"
    ]
    return grid_of(replace(run, records=tuple(rows)), model, BETWEEN)


def _over_batches(grid: Grid, context: int) -> dict[int, float]:
    """batch → value at the context, for batches with measured contexts on both sides of it (or at it)."""
    found = {}
    for batch in sorted({b for b, _ in grid}):
        curve = {c: value for (b, c), value in grid.items() if b == batch}
        if (value := _read(curve, context)) is not None:
            found[batch] = value
    return found


def _read(curve: Mapping[int, float], at: int) -> float | None:
    """The curve at a place inside its ends, straight in log-log; None outside."""
    places = sorted(curve)
    if not places or not places[0] <= at <= places[-1]:
        return None
    logs = np.log([curve[place] for place in places])
    return float(math.exp(np.interp(math.log(at), np.log(places), logs)))


def _largest(curve: Mapping[int, float], most: float, what: str) -> tuple[int | None, str]:
    """The largest batch that stays within ``most``, and what ends there; None where that is below the smallest measured batch."""
    batches = sorted(curve)
    if curve[batches[0]] > most:
        if batches[0] > 1:
            return None, f"{what} ends below the smallest measured batch, {batches[0]}"
        return 0, what
    fits = next(
        b
        for b in range(batches[-1], batches[0] - 1, -1)
        if (v := _read(curve, b)) is not None and v <= most * _ROUNDING
    )
    if fits == batches[-1]:
        return fits, f"none met: {count(fits)} is the largest measured batch"
    return fits, what


# -- views -----------------------------------------------------------------------------------------------------------


def as_row(capacity: Capacity) -> dict[str, str]:
    """One model as text, each number with what it rests on."""
    needs = capacity.needs or Needs(capacity.model)

    def marked(text: str, basis: Basis) -> str:
        return f"{text} ({basis})" if text != GAP else GAP

    streams = GAP if capacity.streams is None else count(capacity.streams)
    return {
        "model": capacity.model,
        "dtype": needs.dtype,
        "weights": marked(quantity(needs.weights_bytes, "byte"), "formula"),
        "state per stream": marked(quantity(needs.state_bytes, "byte"), "formula"),
        "streams": marked(streams, capacity.streams_by),
        "tokens/s": marked(number(capacity.tokens_per_s), capacity.tokens_by),
        "step": marked(quantity(capacity.step_s, "s"), capacity.tokens_by),
        "per 1M tokens": GAP if capacity.cost_per_million is None else number(capacity.cost_per_million),
        "limit": capacity.limit,
        "remark": capacity.remark,
    }


def as_json(wish: Wish, capacities: Sequence[Capacity]) -> dict[str, Any]:
    """The plan for other programs."""
    return {"wish": asdict(wish), "models": [asdict(capacity) for capacity in capacities]}
