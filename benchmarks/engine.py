"""How fast is our BDH against the published form of the same arithmetic? A table of ratios from one process.

    make bench-engine                                  # or: python benchmarks/engine.py --only prefill,decode --rounds 5
    python benchmarks/engine.py --csv results/engine-cpu.csv

Two sides take turns, round by round, so that a slow moment of the machine hits both; a ratio is the median over rounds with its
lowest and highest round. ``published`` is the mode ``parallel``: the published operations, T×T scores and a rotation of the whole
text, with its phases computed once instead of in every pass. Peaks of memory are high-water marks of fresh processes above what the
process held with its model loaded.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bdh_bench.data.corpus import open_corpus
from bdh_bench.loading import load_model
from bdh_bench.measure import memory
from bdh_bench.measure.allocator import keep_freed_memory
from bdh_bench.measure.host import environment
from bdh_bench.models.bdh import Config, Model
from bdh_bench.runner.training import train_model
from bdh_bench.spec import RunSpec

_FLOAT_BYTES = 4
_PREFILL = (4, 128, 4, 64)  # passes, width, heads, neurons per unit of width: n = 8,192
_DEFAULT = (6, 256, 4, 128)  # the published default: n = 32,768


@dataclass(frozen=True)
class Figure:
    """One line of the table. ``value`` is the median over rounds, ``low`` and ``high`` their extremes."""

    name: str
    value: float
    low: float
    high: float
    rounds: int
    goal: str
    note: str = ""


def model(shape: tuple[int, int, int, int], **options: Any) -> Model:
    """A model with seeded random weights, in eval mode."""
    torch.manual_seed(0)
    return Model(Config(*shape, vocab_size=256, **options)).eval()


def text(batch: int, length: int) -> Tensor:
    """Seeded random bytes (B, T)."""
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1))


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def alternate(rounds: int, *sides: Callable[[], float]) -> list[list[float]]:
    """What each side measured, by round; one round before that is thrown away."""
    for side in sides:
        side()
    return [[side() for side in sides] for _ in range(rounds)]


def figure(name: str, ratios: list[float], goal: str, note: str = "") -> Figure:
    """Median and extremes."""
    return Figure(name, sorted(ratios)[len(ratios) // 2], min(ratios), max(ratios), len(ratios), goal, note)


# -- prefill ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def prefill_s(net: Model, tokens: Tensor) -> float:
    """Seconds to read a prompt as a stream."""
    session = net.session(tokens.shape[0])
    return seconds(lambda: [session.extend(piece) for piece in tokens.split(4096, 1)])


def prefill(rounds: int) -> Iterator[Figure]:
    """One prompt of 8,192 tokens, streamed against the published form; then the cost per token of a longer one."""
    ours, published, tokens = model(_PREFILL), model(_PREFILL, mode="parallel"), text(1, 8192)
    with torch.inference_mode():
        found = alternate(
            min(rounds, 3), lambda: seconds(lambda: published.logits(tokens)), lambda: prefill_s(ours, tokens)
        )
    yield figure("prefill 8,192: published / ours", [a / b for a, b in found], "≥ 8", _bound(ours, 8192))
    peaks = [_peak_in_fresh_process(kind) for kind in ("parallel", "auto")]
    note = f"{peaks[0] / 2**20:,.0f} MiB against {peaks[1] / 2**20:,.0f} MiB"
    yield figure("prefill 8,192: peak live memory, published / ours", [peaks[0] / peaks[1]], "≥ 15", note)
    short, long = text(1, 4096), text(1, 65_536)
    found = alternate(min(rounds, 5), lambda: prefill_s(ours, short) * 16, lambda: prefill_s(ours, long))
    yield figure("prefill cost per token: 65,536 / 4,096", [b / a for a, b in found], "≤ 1.1")


def _bound(net: Model, length: int) -> str:
    published, ours = (net.flops_per_token(length, mode) for mode in ("parallel", "chunked"))
    return f"operations: {published / ours:.1f}×"


def _peak_in_fresh_process(mode: str) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return int(pool.apply(_prefill_peak_bytes, (mode, torch.get_num_threads())))


@torch.inference_mode()
def _prefill_peak_bytes(mode: str, threads: int) -> int:
    torch.set_num_threads(threads)
    net, tokens = model(_PREFILL, mode=mode), text(1, 8192)
    read = net.logits if mode == "parallel" else net.session().extend
    net.logits(tokens[:, :64])
    memory.settle()
    before = memory.resident_bytes() or 0
    memory.reset_peak()
    read(tokens)
    return memory.peak_resident_bytes() - before


# -- training ---------------------------------------------------------------------------------------------------------


def step_s(net: Model, tokens: Tensor, bfloat16: bool) -> float:
    """Seconds of one forward and backward pass."""

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            logits = net.logits(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        net.zero_grad(set_to_none=True)

    return seconds(step)


def training(rounds: int) -> Iterator[Figure]:
    """Forward and backward, without the optimiser, which is the same for both: with the C library as it comes, then as ``train`` sets it.

    A published step allocates and frees far more than ours, so that keeping freed memory makes it faster by more.
    """
    yield from _training(rounds, "")
    keep_freed_memory()
    yield from _training(rounds, ", freed memory kept")


def _training(rounds: int, allocator: str) -> Iterator[Figure]:
    cases = ((64, 4, 512, "≥ 2", True), (64, 1, 4096, "≥ 6", False), (256, 1, 4096, "none", False))
    for width, batch, length, goal, eager in cases:
        shape = (4, width, 4, 2048 // width)  # n = 2,048
        ours, published, tokens = model(shape).train(), model(shape, mode="parallel").train(), text(batch, length + 1)
        sides = [lambda: step_s(published, tokens, True), lambda: step_s(ours, tokens, True)]  # noqa: B023
        if eager:
            sides.append(lambda: step_s(published, tokens, False))  # noqa: B023
        found = alternate(rounds if length < 4096 else min(rounds, 5), *sides)
        where = f"training D={width}, {batch} × {length:,}{allocator}"
        yield figure(f"{where}, bfloat16: published / ours", [r[0] / r[1] for r in found], goal, _bound(ours, length))
        if eager:
            yield figure(f"{where}: published in float32 / ours in bfloat16", [r[2] / r[1] for r in found], "≥ 5")


# -- decoding ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def decode_s(session: Any, steps: int) -> float:
    """Mean seconds of one step of so many."""
    token = torch.zeros(session.batch_size, 1, dtype=torch.long)
    return seconds(lambda: [session.extend(token) for _ in range(steps)]) / steps


def decode(rounds: int) -> Iterator[Figure]:
    """One token at a time: at depth, against the bandwidth of the machine, and sparsely."""
    net = model(_PREFILL)
    with torch.inference_mode():
        early, late = net.session(), net.session()
        early.extend(text(1, 1024))
        for piece in text(1, 65_536).split(4096, 1):
            late.extend(piece)
    found = alternate(rounds, lambda: decode_s(early, 64), lambda: decode_s(late, 64))
    yield figure("decode per token: depth 65,536 / 1,024", [b / a for a, b in found], "≤ 1.05")
    large = model(_DEFAULT, mode="recurrent")
    c = large.config
    weights = 3 * c.n_head * c.neurons * c.n_embd * _FLOAT_BYTES
    moved = 2 * large.state_bytes(1, 1) + weights * c.n_layer
    stream = large.session()
    source = torch.ones(128 * 2**20)  # 512 MiB
    target = torch.empty_like(source)
    copied = 2 * source.nbytes
    found = alternate(
        rounds, lambda: copied / seconds(lambda: target.copy_(source)), lambda: moved / decode_s(stream, 8)
    )
    speed = sorted(b for _, b in found)[len(found) // 2] / 1e9
    yield figure(
        "dense decode: share of copy bandwidth",
        [b / a for a, b in found],
        "≥ 0.6",
        f"{moved / 1e6:,.0f} MB a token at {speed:.0f} GB/s",
    )


def sparse(rounds: int, densities: tuple[tuple[str, float], ...]) -> Iterator[Figure]:
    """Sparse against dense decoding of the default size with so many active neurons, and where the two meet."""
    for label, share in (*densities, *(("break-even", s) for s in (0.1, 0.15, 0.2, 0.3))):
        sides = [_silenced(model(_DEFAULT, mode=mode), share).session() for mode in ("recurrent", "sparse")]
        found = alternate(rounds, lambda: decode_s(sides[0], 8), lambda: decode_s(sides[1], 8))  # noqa: B023
        rows = sides[1].facts()["row_density"]
        mean = sum(rows.values()) / len(rows)
        ceiling = 5 / (1 + 2 * share + 2 * mean)  # encoder whole; encoder_v and decoder by neuron; state twice by row
        name = f"sparse decode, {label}: {share:.0%} of neurons, {mean:.0%} of rows active: dense / sparse"
        goal = f"≥ 3, or ≥ {0.7 * ceiling:.2f}" if label != "break-even" else "none"
        yield figure(name, [a / b for a, b in found], goal, f"bytes allow {ceiling:.2f}×")


def _silenced(net: Model, share: float) -> Model:
    """The model with about this share of positive keys for every token: half of the neurons that are left answer."""
    with torch.no_grad():
        awake = torch.rand(net.encoder.shape[::2], generator=torch.Generator().manual_seed(0)) < 2 * share  # (H, N)
        net.encoder.mul_(awake.unsqueeze(1))
    return net


def generation(rounds: int) -> Iterator[Figure]:
    """256 tokens after a prompt of 4,096: a stream against the published demo, which reads the whole prefix for every token."""
    ours, published = model(_PREFILL), model(_PREFILL, mode="parallel")

    def recompute() -> float:
        with torch.inference_mode():
            three = [seconds(lambda t=t: published.logits(text(1, t))) for t in (4096, 4224, 4352)]  # type: ignore[misc]
        return 256 * (three[0] + 4 * three[1] + three[2]) / 6  # Simpson's rule: the cost is quadratic in the length

    def stream() -> float:
        session = ours.session()
        with torch.inference_mode():
            return seconds(lambda: session.extend(text(1, 4096))) + 256 * decode_s(session, 256)

    found = alternate(min(rounds, 3), recompute, stream)
    yield figure(
        "generate 256 after 4,096: published / ours",
        [a / b for a, b in found],
        "≥ 300",
        "published side from three lengths",
    )


def trained_density() -> float:
    """Share of positive keys of a trained ``bdh`` of the default size on test text, from the cache or trained now."""
    done = train_model(RunSpec(("bdh",), ("long_ppl",)), lambda phase, share, facts: None)
    net = load_model(f"bdh:n_layer=4:weights={done['weights']}")
    document = next(d for d in open_corpus("stdlib").part("test") if len(d.content) >= 2048)
    tokens = torch.frombuffer(bytearray(document.content[:2048]), dtype=torch.uint8).long().view(1, -1)
    seen = net.observe(net.memory(1), 0, tokens)
    return sum(float((activity.keys != 0).float().mean()) for activity in seen) / len(seen)


_PARTS = ("prefill", "decode", "sparse", "generation", "training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(_PARTS), help="which parts, of " + ", ".join(_PARTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument(
        "--trained", action="store_true", help="also at the density of a trained model (trains it once)"
    )
    parser.add_argument("--csv", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    densities = (("planted", 0.05), *((("trained", trained_density()),) if arguments.trained else ()))
    parts: dict[str, Callable[[], Iterator[Figure]]] = {
        "prefill": lambda: prefill(arguments.rounds),
        "training": lambda: training(arguments.rounds),
        "decode": lambda: decode(arguments.rounds),
        "sparse": lambda: sparse(arguments.rounds, densities),
        "generation": lambda: generation(arguments.rounds),
    }
    done: list[Figure] = []
    for part in arguments.only.split(","):
        for line in parts[part]():
            done.append(line)
            spread = f"[{line.low:.2f}, {line.high:.2f}]" if line.rounds > 1 else ""
            print(f"{line.name:84} {line.value:8.2f} {spread:18} goal {line.goal:18} {line.note}", flush=True)
    if arguments.csv:
        write(arguments.csv, done)


def machine() -> str:
    """Hardware, threads and versions, in a line."""
    facts = environment()
    versions = " ".join(f"{name} {value}" for name, value in facts["versions"].items())
    return f"{facts['cpu']}, {torch.get_num_threads()} threads, Python {facts['python']}, {versions}"


def write(path: Path, figures: list[Figure]) -> None:
    """The table as CSV, with the machine in a comment above it."""
    with path.open("w", encoding="utf-8", newline="") as file:
        print(f"# {machine()}", file=file)
        writer = csv.DictWriter(file, [f.name for f in fields(Figure)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(one).items()} for one in figures
        )


if __name__ == "__main__":
    sys.exit(main())
