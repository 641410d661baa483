"""What must come out, and did it? One list; adding a truth is one entry.

Statuses are compared by their beginning: ``crash`` and ``crash(SIGSEGV)`` both are a crash, and the signal may stand in the reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bdh_bench.results.crossover import measured
from bdh_bench.runner.selftest import evidence as known
from bdh_bench.runner.selftest.evidence import Evidence
from bdh_bench.runner.selftest.slopes import slope

RECOVERED, NOT_RECOVERED, NOT_DECIDABLE = "recovered", "not recovered", "not decidable"

_BARE_TOLERANCE = 0.01
_FLAT = 0.02
_PEAK_TOLERANCE = 0.02
_PARENT = 0.01


@dataclass(frozen=True)
class Finding:
    """One line of the outcome."""

    name: str
    expected: str
    measured: str
    verdict: str


Judge = Callable[[Evidence], tuple[str, str]]


@dataclass(frozen=True)
class Truth:
    """What is known of a toy; ``judge`` says what was measured, in words, and the verdict."""

    name: str
    expected: str
    judge: Judge

    def found(self, evidence: Evidence) -> Finding:
        """A judge that finds nothing to judge has not recovered the truth."""
        try:
            measured, verdict = self.judge(evidence)
        except (LookupError, StopIteration, ValueError) as error:
            measured, verdict = f"no such rows ({type(error).__name__})", NOT_RECOVERED
        return Finding(self.name, self.expected, measured, verdict)


def judged(evidence: Evidence) -> tuple[Finding, ...]:
    """Every truth, in the order of the list."""
    return tuple(truth.found(evidence) for truth in TRUTHS)


def _exactly(request: str, model: str, metric: str, wanted: Callable[[int], float]) -> Judge:
    """Every stored value of the metric is what ``wanted`` says for its context."""

    def judge(evidence: Evidence) -> tuple[str, str]:
        run = evidence.runs[request]
        contexts = sorted({r.context for r in run.records if r.model == model and r.metric == metric})
        found = {c: evidence.values(request, model, metric, c) for c in contexts}
        right = bool(found) and all(values and set(values) == {wanted(c)} for c, values in found.items())
        text = ", ".join(f"{_number(v)} at {c:,}" for c, values in found.items() for v in sorted(set(values))[:3])
        return text or evidence.cell(request, model).status, _verdict(right)

    return judge


def _status(request: str, model: str, *words: str) -> Judge:
    """The first word begins the status, the others stand in it or in the reason."""

    def judge(evidence: Evidence) -> tuple[str, str]:
        cell = evidence.cell(request, model)
        text = f"{cell.status} · {cell.reason}"
        right = cell.status.startswith(words[0]) and all(word in text for word in words)
        return text[:90], _verdict(right)

    return judge


def _no_number(evidence: Evidence) -> tuple[str, str]:
    cell = evidence.cell("deaths", "toy:nan")
    named = cell.status.startswith("nan") or (cell.status == "gate_failed" and "gate numerics" in cell.reason)
    values = [r.value for r in evidence.runs["deaths"].records if r.cell == cell.key and r.value is not None]
    return f"{cell.status} · {cell.reason}"[:90] + f"; {len(values)} values", _verdict(named and not values)


def _good_cells(evidence: Evidence) -> tuple[str, str]:
    run = evidence.runs["deaths"]
    statuses = [cell.status for cell in run.cells if cell.model in (known.UNIFORM, known.COPY)]
    text = ", ".join(statuses) + (f"; {len(run.problems)} damaged lines" if run.problems else "; store undamaged")
    return text, _verdict(statuses == ["ok", "ok"] and not run.problems)


def _group_gone(evidence: Evidence) -> tuple[str, str]:
    family = evidence.families["hang"]
    return f"{len(family.seen)} seen, {family.alive} alive", _verdict(len(family.seen) >= 2 and not family.alive)


def _crossing(evidence: Evidence) -> tuple[str, str]:
    contexts = _request("state").contexts
    linear, constant = (
        {c: statistics.median(evidence.values("state", model, "state_bytes", c)) for c in contexts}
        for model in (known.LINEAR, known.CONSTANT)
    )
    found, true = measured(linear, constant), known.CONSTANT_BYTES / known.BYTES_PER_TOKEN
    step = contexts[1] / contexts[0]
    at = found.at if found is not None and found.kind == "measured" else ()
    near = len(at) == 1 and true / step <= at[0] <= true * step
    return ", ".join(f"{place:,.0f}" for place in at) or "no crossing on the grid", _verdict(near)


def _peak(evidence: Evidence) -> tuple[str, str]:
    (model,) = _request("alloc").models
    found: list[float] = []
    for metric in ("prefill_peak_live_bytes", "decode_peak_live_bytes"):
        found += evidence.values("alloc", model, metric)
    if not found and evidence.cell("alloc", model).status == "ok":
        return "this system does not let a process reset its mark", NOT_DECIDABLE
    worst = max(abs(value / known.ALLOC_BYTES - 1) for value in found)
    text = ", ".join(f"{value / 2**20:.2f} MiB" for value in found)
    return text, _verdict(worst <= _PEAK_TOLERANCE)


def _at_least_a_sleep(evidence: Evidence) -> tuple[str, str]:
    found = evidence.values("slow", known.SLEEP, "tpot_s")
    return f"{1e3 * min(found):.4f} ms at the least", _verdict(min(found) >= known.SLEEP_S)


def _as_a_plain_loop(evidence: Evidence) -> tuple[str, str]:
    loop = evidence.plain["slow"]
    found = statistics.median(evidence.values("slow", known.SLEEP, "tpot_s"))
    apart = found / loop.median_s - 1
    text = f"{100 * apart:+.2f} % ({1e3 * found:.4f} ms; plain loop ±{100 * loop.spread:.2f} %)"
    return text, _decided(abs(apart) <= _BARE_TOLERANCE, loop.spread <= _BARE_TOLERANCE)


def _grows(evidence: Evidence) -> tuple[str, str]:
    values = _by_depth(evidence, known.LINEAR)
    found = slope(values).times(1e9)
    text = f"{found.value:.1f} µs per 1,000 tokens [{found.low:.1f}, {found.high:.1f}]"
    # A slope whose interval lies above 0 is seen whatever the noise; one that is lost in it may only be lost.
    return text, _verdict(True) if found.low > 0 else _decided(False, evidence.plain["depth"].spread <= _FLAT)


def _is_flat(evidence: Evidence) -> tuple[str, str]:
    values, loop = _by_depth(evidence, known.CONSTANT), evidence.plain["depth"]
    middle = statistics.median(v for each in values.values() for v in each)
    change = slope(values).times((max(values) - min(values)) / middle)
    text = f"{100 * change.value:+.2f} % over all depths [{100 * change.low:.2f}, {100 * change.high:.2f}]"
    flat = change.low <= 0 <= change.high and abs(change.value) < _FLAT
    return f"{text}; plain loop ±{100 * loop.spread:.2f} %", _decided(flat, loop.spread <= _FLAT)


def _by_depth(evidence: Evidence, model: str) -> dict[int, list[float]]:
    values = {c: evidence.values("depth", model, "tpot_s", c) for c in _request("depth").contexts}
    if not all(values.values()):
        raise LookupError("a depth without values")
    return values


def _slow_calls_are_warm_up(evidence: Evidence) -> tuple[str, str]:
    model = known.SLOW_WARMUP
    prefill, steps = max(evidence.values("slow", model, "prefill_s")), max(evidence.values("slow", model, "tpot_s"))
    first = evidence.values("slow", model, "first_call_s")
    text = f"longest prefill {1e3 * prefill:.2f} ms, longest mean step {1e3 * steps:.3f} ms"
    text += f", first call {1e3 * max(first):.0f} ms" if first else ""
    inside = prefill >= known.SLOW_S / 2 or steps >= known.SLOW_S / (2 * known.STEPS)
    return text, _verdict(not inside and (not first or max(first) >= known.SLOW_S))


def _parent_waits(evidence: Evidence) -> tuple[str, str]:
    wall_s, used_s = evidence.parent
    if not wall_s:
        raise LookupError("no phase in which a worker measured")
    return f"{100 * used_s / wall_s:.2f} % of a core in {wall_s:.1f} s", _verdict(used_s < _PARENT * wall_s)


def _request(name: str) -> known.Request:
    return next(request for request in known.REQUESTS if request.name == name)


def _verdict(right: bool) -> str:
    return RECOVERED if right else NOT_RECOVERED


def _decided(right: bool, quiet: bool) -> str:
    """What is seen on a machine too noisy for it proves nothing, neither way."""
    return _verdict(right) if quiet else NOT_DECIDABLE


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _bytes_of(model: str) -> Callable[[int], float]:
    return {
        known.LINEAR: lambda context: known.BYTES_PER_TOKEN * context,
        known.CONSTANT: lambda context: known.CONSTANT_BYTES,
    }[model]


TRUTHS: Sequence[Truth] = (
    Truth("uniform", "8 bits per byte", _exactly("deaths", known.UNIFORM, "bits_per_byte", lambda c: 8.0)),
    Truth("copy", "0 bits per byte", _exactly("deaths", known.COPY, "bits_per_byte", lambda c: 0.0)),
    Truth("oom", "oom_host, allocator", _status("deaths", "toy:oom", "oom_host", "allocator")),
    Truth("oom: the next cell", "ok", _status("deaths", known.COPY, "ok")),
    Truth("nan", "nan, by status or by its gate; no value", _no_number),
    Truth("segfault", "crash, SIGSEGV", _status("deaths", "toy:segfault", "crash", "SIGSEGV")),
    Truth("cells beside them", "ok, ok; store undamaged", _good_cells),
    Truth("hang", "timeout", _status("hang", "toy:hang:children=1", "timeout")),
    Truth("hang: its processes", "at least 2 seen, 0 alive", _group_gone),
    Truth(
        "linear_kv: state bytes",
        f"{known.BYTES_PER_TOKEN:,} per token, exactly",
        _exactly("state", known.LINEAR, "state_bytes", _bytes_of(known.LINEAR)),
    ),
    Truth(
        "const_state: state bytes",
        f"{known.CONSTANT_BYTES:,}, exactly",
        _exactly("state", known.CONSTANT, "state_bytes", _bytes_of(known.CONSTANT)),
    ),
    Truth(
        "T* of the two", f"{known.CONSTANT_BYTES // known.BYTES_PER_TOKEN:,} tokens, within one grid step", _crossing
    ),
    Truth("alloc: peak live", f"{known.ALLOC_BYTES / 2**20:.0f} MiB ± {100 * _PEAK_TOLERANCE:.0f} %", _peak),
    Truth("sleep: TPOT", f"at least {1e3 * known.SLEEP_S:g} ms", _at_least_a_sleep),
    Truth("sleep: against a plain loop", f"± {100 * _BARE_TOLERANCE:.0f} %", _as_a_plain_loop),
    Truth("slow_warmup: slow calls", "in no sample", _slow_calls_are_warm_up),
    Truth("the parent meanwhile", f"less than {100 * _PARENT:.0f} % of a core", _parent_waits),
    Truth("linear_kv: cost slope", "above 0", _grows),
    Truth("const_state: cost slope", f"flat: 0 in the interval, less than {100 * _FLAT:.0f} %", _is_flat),
)
