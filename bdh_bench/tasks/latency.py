"""How long until the first token, and how long for each one after, at a given depth?

Protocol, in a process of its own per round: a stream reads ``context`` seeded random tokens in pieces (prefill: until the logits of the
last are ready; ``ttft_s``: and the first token is chosen), again and again; then windows of greedy steps, argmax included, each on a
copy of the prefilled stream, so that every window starts at that depth. ``tpot_s`` is the wall time of a window over its steps. What
comes first is apart: the first call (``first_call_s``), compilation (``compile_s``), and a warm-up that ends when three windows in a
row agree within 2 %, else every row is ``unsteady``. A window in which something else had the core is ``noisy``. Both are kept and
marked. Raw stamps of every step and of the warm-up are kept (``prefill.npz``, ``decode.npz``).

Checks: a window of twice the steps, less one, must cost as much per step (``tpot_by_difference_s``), else work was put off into the
first steps, and rows are ``unsteady``; the stamps' own cost (``harness_overhead_share``) fails the cell from 1 % on; a model that
compiles itself has the runtime ``own compile``.

Caveats: rounds are what differences are judged by, not windows. Synthetic tokens: what depends on text (sparse decoding of random
weights, half of whose keys are active) is not timed unless ``force=1``. On CUDA a window has one stamp pair, so that launches overlap as
they do for users, and single steps come from windows of their own; that part was never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bdh_bench.errors import LawError, SpecError
from bdh_bench.measure import energy, runtime, timing
from bdh_bench.measure.clock import Clocks
from bdh_bench.measure.timing import Window
from bdh_bench.tasks._scoring import PIECE
from bdh_bench.types import Arrays, Measurement, Scalar, TaskContext

DEFAULTS = {
    "metric": "tpot_s",
    "cell_axes": ("seed", "context"),
    "trains": False,
    "reads": False,
    "context_factors": (1, 4, 16),
    "rounds": 5,
}

_TIMES = ("prefill_s", "ttft_s", "tpot_s")
_DOUBLES = 3  # pairs of a window and one of twice the steps
_DIFFERENCE = 0.10  # how far apart the two ways to the time of a step may be
_PARITY_STEPS = 4
_MOST_SAMPLES = 2000  # prefills in one window


@dataclass(frozen=True)
class Config:
    """What is timed, and for how long.

    budget      full (at least 3 s of warm-up and 5 s of each phase), quick (a tenth of it) or smoke; empty: full, smoke in smoke runs
    steps       tokens of a window
    windows     per depth, at least
    prefills    repeats, at least
    batch_size  streams
    runtime     eager or compile
    force       1 times sparse decoding on random weights too
    """

    budget: str = ""
    steps: int = 64
    windows: int = 5
    prefills: int = 20
    batch_size: int = 1
    runtime: str = "eager"
    force: int = 0


def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement | Arrays]:
    """Repeats of prefill and time to first token, then windows of decoding at that depth."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    settle = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    yield from timed_with(Clocks(settle=settle), model, config, context)


@torch.inference_mode()
def timed_with(clocks: Clocks, model: Any, config: Config, context: TaskContext) -> Iterator[Measurement | Arrays]:
    """``run`` on these clocks."""
    bench = _Bench(clocks, model, config, context)
    needed = bench.length + config.steps
    if model.max_positions is not None and needed > model.max_positions:
        reason = f"{bench.length} + {config.steps} tokens need more than its {model.max_positions} positions"
        yield from (bench.row(name, None, reason=reason) for name in _TIMES)
        return
    try:
        runtime.check_runtime(config.runtime)
        if config.runtime == runtime.COMPILE:
            truth = bench.proof()
            with runtime.compiled(model):
                yield bench.compile(truth)
                yield from bench.rows()
        else:
            yield from bench.rows()
    except runtime.Unsupported as reason:
        yield from (bench.row(name, None, reason=str(reason)) for name in _TIMES)


@dataclass
class _Bench:
    """One cell on its way: what is timed, and what came out so far."""

    clocks: Clocks
    model: Any
    config: Config
    context: TaskContext
    axes: dict[str, Scalar] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = self.config.budget or ("smoke" if self.context.smoke else "full")
        if name not in timing.BUDGETS:
            raise SpecError(f"got budget={name} · expected one of {', '.join(timing.BUDGETS)}")
        self.budget = timing.BUDGETS[name]
        self.length, self.batch = int(self.context.context or 0), self.config.batch_size
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.device = device
        generator = torch.Generator().manual_seed(self.context.seed)
        shape = (self.batch, self.length)
        self.tokens = torch.randint(self.model.vocab_size, shape, generator=generator).to(device)
        self.axes["runtime"] = self.config.runtime
        self.facts |= {"budget": name, **asdict(self.budget), "device": device.type}
        self.context.note("timing", self.facts)

    def row(
        self, metric: str, value: float | None, repeat: int = 0, status: str = "ok", reason: str = "", **axes: Scalar
    ) -> Measurement:
        """A measurement of this cell; without a value it is unsupported."""
        status = status if value is not None else "unsupported"
        axes = {**self.axes, **axes}
        return Measurement(metric, value, self.length, self.batch, axes, repeat=repeat, status=status, reason=reason)

    # -- what happens, in order ----------------------------------------------------------------------------------------

    def rows(self) -> Iterator[Measurement | Arrays]:
        """Everything of a cell that can run."""
        with timing.quiet():
            first, session, logits = self._first_prefill()
            warm, steady, windows = self._prefill_windows()
        self._look_at_runtime()
        self.overhead_s = timing.overhead_s(self.clocks)
        yield self.row("first_call_s", first, phase="prefill")
        why = "" if steady else "three windows in a row never agreed within 2 % in the warm-up"
        for part, name in enumerate(("prefill_s", "ttft_s"), start=1):
            yield from (self._of(name, float(w.each_s(part).mean()), i, w, why) for i, w in enumerate(windows))
        yield self._overhead(windows, "prefill")
        yield Arrays("prefill", {**timing.arrays(windows), **timing.arrays(warm, "warm_up_")})
        self._keep("prefill", windows, warm, steady)
        if self._senseless():
            reason = "about half of the keys of random weights are active, and sparse decoding of them says nothing of a trained model"
            yield self.row("tpot_s", None, reason=f"{reason} · give trained weights, or latency:force=1", path="sparse")
            return
        yield from self._decode(session, logits[:, -1:].argmax(-1))

    def proof(self) -> Tensor:
        """Logits of the prompt, piece by piece, and of some steps: what compiling must not change."""
        session = self.model.session(self.batch)
        pieces = [*self.tokens.split(PIECE, 1), *self.tokens[:, :_PARITY_STEPS].split(1, 1)]
        return torch.cat([session.extend(piece) for piece in pieces[: self._fitting(len(pieces))]], 1)

    def _fitting(self, pieces: int) -> int:
        """How many of the pieces lie before the last position."""
        over = self.length + _PARITY_STEPS - (self.model.max_positions or self.length + _PARITY_STEPS)
        return pieces - max(0, over)

    def compile(self, truth: Tensor) -> Measurement:
        """Compile for the pieces and steps of this cell. Raises Unsupported where the answers are not the same."""
        found: list[Tensor] = []
        window: list[Window] = []

        def use() -> Tensor:
            window.append(timing.timed((lambda: found.append(self.proof()),), 1, self.clocks))
            return found[0]

        self.context.progress("compile", 0.0, {"context": self.length})
        before = runtime.graphs()
        runtime.prove(use, truth)
        after = runtime.graphs()
        self.facts["compiled"] = {"graphs": after.compiled - before.compiled, "breaks": after.broken - before.broken}
        return self.row("compile_s", window[0].wall_s)

    def _first_prefill(self) -> tuple[float, Any, Tensor]:
        """Seconds of the very first call, the stream and its logits. Raises LawError where they are no numbers."""
        reader = _Reader(self.model, self.tokens)
        self.context.progress("prefill", 0.0, {"context": self.length})
        first = timing.timed((reader.read, reader.choose), 1, self.clocks, before=reader.begin)
        if not bool(torch.isfinite(reader.logits).all()):
            raise LawError(
                f"logits after {self.length:,} tokens are not finite · expected finite logits before anything is timed",
                gate="numerics",
            )
        self.context.passed("numerics", 0.0, 0.0)
        return float(first.each_s(1)[0]), reader.session, reader.logits

    def _prefill_windows(self) -> tuple[list[Window], bool, list[Window]]:
        """Warm-up, whether it became steady, and what is measured: so many prefills to a window that enough of them fill the time."""
        reader = _Reader(self.model, self.tokens)

        def take(samples: int) -> Callable[[], Window]:
            return lambda: timing.timed((reader.read, reader.choose), samples, self.clocks, before=reader.begin)

        pace = float(take(1)().each_s()[0])
        wanted_s = self.budget.measure_s / self.config.prefills
        samples = min(_MOST_SAMPLES, max(1, int(wanted_s / max(pace, 1e-9))))
        warm, steady = timing.warm_up(take(samples), self.budget, self.clocks)
        self.context.progress("prefill", 0.5, {"context": self.length})
        return warm, steady, timing.measure(take(samples), self.budget, self.clocks, 1, self.config.prefills)

    def _decode(self, session: Any, token: Tensor) -> Iterator[Measurement | Arrays]:
        steps = self.config.steps
        self.context.progress("decode", 0.0, {"context": self.length})
        with timing.quiet():
            first = self._window(session, token, steps, 1)
            block = steps if self.device.type == "cuda" else timing.block_length(float(first.each_s().min()), steps)

            def take() -> Window:
                return self._window(session, token, steps, block)

            warm, steady = timing.warm_up(take, self.budget, self.clocks)
            self.context.progress("decode", 0.5, {"context": self.length})
            compiled = runtime.graphs().compiled
            windows = timing.measure(take, self.budget, self.clocks, self.config.windows, steps)
            single = windows if block == 1 or self.device.type == "cpu" else self._single(session, token)
            doubles = self._doubles(session, token, block)
            recompiled = runtime.graphs().compiled - compiled
        self._look_at_runtime()
        self.axes |= self._path(session, token)
        why = "" if steady else "three windows in a row never agreed within 2 % in the warm-up"
        why = f"{recompiled} graphs were compiled inside measured windows" if recompiled else why
        difference = self._difference(doubles)
        yield self.row("first_call_s", float(first.each_s()[0]), phase="decode")
        yield from self._densities(session, token)
        why = why or (difference.reason if difference.status == "unsteady" else "")
        mean = ((w, w.wall_s / w.calls) for w in windows)
        yield from (self._of("tpot_s", value, i, w, why) for i, (w, value) in enumerate(mean))
        yield difference
        yield self._overhead(windows, "decode")
        extra = {
            **timing.arrays(warm, "warm_up_"),
            **(timing.arrays(single, "single_") if single is not windows else {}),
        }
        yield Arrays("decode", {**timing.arrays(windows), **extra})
        self._keep("decode", windows, warm, steady)
        yield self._energy(session, token)

    # -- parts -----------------------------------------------------------------------------------------------------------

    def _window(self, session: Any, token: Tensor, steps: int, block: int) -> Window:
        """``steps`` greedy steps on a copy of the stream."""
        decoder = _Decoder(session.fork(), token)
        return timing.timed((decoder.step,), steps // block, self.clocks, block)

    def _single(self, session: Any, token: Tensor) -> list[Window]:
        """Windows in which every step is waited for: what a client sees of a stream."""
        return [self._window(session, token, self.config.steps, 1) for _ in range(self.config.windows)]

    def _doubles(self, session: Any, token: Tensor, block: int) -> list[tuple[Window, Window]]:
        """Pairs of a window and one of twice the steps; none past the last position."""
        steps, limit = self.config.steps, self.model.max_positions
        if limit is not None and self.length + 2 * steps > limit:
            return []
        return [
            (self._window(session, token, steps, block), self._window(session, token, 2 * steps, block))
            for _ in range(_DOUBLES)
        ]

    def _difference(self, doubles: list[tuple[Window, Window]]) -> Measurement:
        """(t(2g) − t(g)) / g of the shortest of each, and a reason where it is not t(g) / g."""
        if not doubles:
            reason = f"twice {self.config.steps} steps need more than its {self.model.max_positions} positions"
            return self.row("tpot_by_difference_s", None, reason=reason)
        short, long = (min(pair[i].wall_s for pair in doubles) for i in (0, 1))
        calls = doubles[0][1].calls - doubles[0][0].calls
        value, direct = (long - short) / calls, short / doubles[0][0].calls
        apart = abs(value - direct) > _DIFFERENCE * direct
        reason = (
            f"t(2g) − t(g) is {value:.3g} s per step, t(g) {direct:.3g} s: the first steps cost otherwise"
            if apart
            else ""
        )
        return self.row("tpot_by_difference_s", value, status="unsteady" if apart else "ok", reason=reason)

    def _of(self, metric: str, value: float, repeat: int, window: Window, unsteady: str) -> Measurement:
        """A row of a window, marked where it is not to be trusted."""
        noise = timing.noisy(window)
        status = "noisy" if noise else "unsteady" if unsteady else "ok"
        return self.row(metric, value, repeat, status, noise or unsteady)

    def _overhead(self, windows: list[Window], phase: str) -> Measurement:
        """Raises LawError where the harness itself is a part of what it measures."""
        share = timing.overhead_share(windows, self.overhead_s)
        if timing.overheavy(windows, self.overhead_s):
            raise LawError(
                f"stamps took {share:.2%} of the {phase} windows · expected less than {timing.OVERHEAD_LIMIT:.0%}",
                "use a machine whose clock is cheap to read",
                "overhead",
                share,
                timing.OVERHEAD_LIMIT,
            )
        return self.row("harness_overhead_share", share, phase=phase)

    def _keep(self, phase: str, windows: list[Window], warm: list[Window], steady: bool) -> None:
        self.facts[phase] = {
            "windows": len(windows),
            "calls": sum(w.calls for w in windows),
            "noisy_windows": sum(bool(timing.noisy(w)) for w in windows),
            "block": windows[0].block,
            "warm_up_windows": len(warm),
            "warm_up_s": round(sum(w.span_ns for w in warm) * 1e-9, 6),
            "steady": steady,
        }

    def _look_at_runtime(self) -> None:
        """Eager means that somebody looked."""
        if self.config.runtime == runtime.EAGER and (found := runtime.own_compilation(self.model)):
            self.axes["runtime"] = runtime.OWN
            self.facts["own_compilation"] = found
        self.context.note("runtime", self.axes["runtime"])

    def _senseless(self) -> bool:
        sparse = getattr(getattr(self.model, "config", None), "mode", "") == "sparse"
        return sparse and self.context.weights == "random" and not self.config.force

    def _path(self, session: Any, token: Tensor) -> dict[str, Scalar]:
        """How a step was decoded, where the model says so."""
        told = self._stepped(session, token).facts()
        return {"path": str(told["path"])} if "path" in told else {}

    def _stepped(self, session: Any, token: Tensor) -> Any:
        decoder = _Decoder(session.fork(), token)
        decoder.step()
        return decoder.session

    def _densities(self, session: Any, token: Tensor) -> Iterator[Measurement]:
        """Shares of active rows by pass, as decoding met them, else as a model that shows its activity does."""
        shares = dict(self._stepped(session, token).facts().get("row_density", {}))
        if not shares and hasattr(self.model, "observe"):
            copy = session.fork()
            try:
                seen = self.model.observe(copy.memory, copy.length, token)
            except SpecError:  # a memory without keys to show
                return
            shares = {layer: float((keys != 0).double().mean()) for layer, (keys, _, _) in enumerate(seen)}
        for layer, share in shares.items():
            yield replace(self.row("row_density", share), axes={"layer": layer})

    def _energy(self, session: Any, token: Tensor) -> Measurement:
        """Joules per token, in a pass of its own."""
        name = "energy_per_token_j"
        sources = energy.counters(str(self.device))
        if not sources:
            return self.row(name, None, reason=energy.why_none(str(self.device)))
        if self.facts["budget"] != "full":
            return self.row(name, None, reason=f"energy takes {energy.LEAST_S:g} s: use budget=full")

        def work() -> int:
            decoder = _Decoder(session.fork(), token)
            for _ in range(self.config.steps):
                decoder.step()
            return self.config.steps

        self.context.progress("energy", 0.0, {"context": self.length})
        found = energy.spent(work, sources, self.clocks)
        self.facts["energy"] = asdict(found)
        return self.row(name, found.per_call_j / self.batch)


class _Reader:
    """A prompt read from the beginning, again and again."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.model, self.batch = model, tokens.shape[0]
        self.pieces = tokens.split(PIECE, 1)
        self.session: Any = None
        self.logits: Tensor = tokens

    def begin(self) -> None:
        """An empty stream; the one before is let go first."""
        self.session = None
        self.session = self.model.session(self.batch)

    def read(self) -> None:
        for piece in self.pieces:
            self.logits = self.session.extend(piece)

    def choose(self) -> None:
        """The first token, on the host."""
        self.logits[:, -1].argmax(-1).tolist()


class _Decoder:
    """A stream that goes on with its own likeliest token."""

    def __init__(self, session: Any, token: Tensor) -> None:
        self.session, self.token = session, token

    def step(self) -> None:
        self.token = self.session.extend(self.token)[:, -1:].argmax(-1)
