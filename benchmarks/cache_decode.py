"""Is decoding with our KV cache dominated by reading the cache, and not by copying it? A table of ratios from one process.

    make bench-cache                                   # or: python benchmarks/cache_decode.py --only llama@1m --rounds 5
    python benchmarks/cache_decode.py --csv results/cache-decode-cpu.csv

All sides take turns, round by round; a figure is the median over rounds with its lowest and highest round. A token costs the weights once,
whatever the depth, and the cache up to its depth, so what reading a byte of cache costs is the *marginal* cost between two depths:

    seconds per byte = (seconds per token at 8,192 − seconds per token at 1,024) / (state bytes at 8,192 − state bytes at 1,024)

It is held against this machine's own speed in the same round: a copy of 512 MiB (bytes read and bytes written both count) and a
sum over it (bytes read). A ratio of 1 says that a byte of cache costs what a byte of a plain copy costs; a cache that copied
itself for every token would need at least 3: read, read again to copy, write. ``DynamicCache`` is transformers' default cache, which
concatenates, under the same weights with its own fused attention. For codes of few bits the bytes are those of the codes;
DynamicCache keeps no codes.

A cache at depth is a short text repeated: what it holds does not change the time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine import Figure, figure, seconds, write  # type: ignore[import-not-found]  # beside this file
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from bdh_bench.loading import load_model

_SHALLOW, _DEEP = 1024, 8192
_COPIED = 128 * 2**20  # float32 elements: 512 MiB
_CASES = (
    "llama@1m",
    "llama@25m",
    "llama@25m:kv_heads=2",
    "llama@25m:kv_bits=8",
    "llama@25m:kv_bits=4",
)
_WINDOWS = ("llama@25m:window=1024", "llama@25m:sinks=4:window=1024")


@dataclass(frozen=True)
class Round:
    """Seconds per token of each side and bytes per second of the machine, one after the other."""

    shallow: float
    deep: float
    concatenating: float
    copied: float
    summed: float


@torch.inference_mode()
def stream_at(model: Any, depth: int) -> Any:
    """A session whose cache is as large as after ``depth`` tokens."""
    session = model.session()
    session.extend(torch.arange(16).unsqueeze(0))
    grown = {name: _longer(t, min(depth, _limit(model))) for name, t in session.memory.tensors().items()}
    session.memory.load(grown)
    session.length = depth
    return session


def _limit(model: Any) -> int:
    window = int(model.config.window)
    return int(model.config.sinks) + window - 1 if window else sys.maxsize


def _longer(cached: Tensor, depth: int) -> Tensor:
    return cached.repeat(1, 1, -(-depth // cached.shape[2]), 1)[:, :, :depth].contiguous()


@torch.inference_mode()
def decode_s(session: Any, steps: int) -> float:
    """Mean seconds of one token of so many."""
    token = torch.zeros(1, 1, dtype=torch.long)
    return seconds(lambda: [session.extend(token) for _ in range(steps)]) / steps


class Concatenating:
    """The same weights behind transformers' own cache and attention, filled to the same depth."""

    def __init__(self, model: Any, depth: int) -> None:
        config = type(model.model.config).from_dict(model.model.config.to_dict())
        config._attn_implementation = "sdpa"
        self.net = LlamaForCausalLM(config).eval()
        self.net.load_state_dict(model.model.state_dict())
        self.cache = DynamicCache()
        c = model.config
        for layer in range(c.n_layer):
            self.cache.update(*torch.randn(2, 1, c.groups, depth, c.head_dim).unbind(0), layer)

    @torch.inference_mode()
    def decode_s(self, steps: int) -> float:
        """Mean seconds of one token of so many."""
        token = torch.zeros(1, 1, dtype=torch.long)

        def step() -> None:
            self.net(input_ids=token, past_key_values=self.cache, use_cache=True)

        return seconds(lambda: [step() for _ in range(steps)]) / steps


def rounds_of(model: Any, count: int, steps: int) -> tuple[list[Round], int]:
    """What each side measured, by round, after one that is thrown away; and the bytes between the two depths."""
    shallow, deep = stream_at(model, _SHALLOW), stream_at(model, _DEEP)
    theirs = Concatenating(model, _DEEP)
    source = torch.ones(_COPIED)
    target = torch.empty_like(source)

    def one() -> Round:
        return Round(
            decode_s(shallow, steps),
            decode_s(deep, steps),
            theirs.decode_s(steps),
            2 * source.nbytes / seconds(lambda: target.copy_(source)),
            source.nbytes / seconds(source.sum),
        )

    one()
    found = [one() for _ in range(count)]
    return found, deep.state_bytes - shallow.state_bytes


def depth_figures(name: str, count: int, steps: int) -> Iterator[Figure]:
    """One model at two depths, against the machine and against a cache that concatenates."""
    model = load_model(name)
    found, between = rounds_of(model, count, steps)
    per_byte = [(r.deep - r.shallow) / between for r in found]
    speed = 1e-9 / figure("", per_byte, "").value
    size = f"{model.state_bytes(1, _DEEP) / 1e6:,.0f} MB of cache, read at {speed:.1f} GB/s"
    for kind, goal in (("copied", "< 3"), ("summed", "none")):
        known = [getattr(r, kind) for r in found]
        yield figure(
            f"{name}: cost of a cache byte / of a byte {kind}",
            [cost * speed for cost, speed in zip(per_byte, known, strict=True)],
            goal if not model.config.kv_bits else "none",
            f"{size}; {kind} at {figure('', known, '').value / 1e9:.1f} GB/s",
        )
    whole = _DEEP / (_DEEP - _SHALLOW)
    weights = model.parameter_count() * torch.float32.itemsize
    larger = model.state_bytes(1, _DEEP) > weights  # otherwise the weights are most of what a token reads
    yield figure(
        f"{name}: share of a token's time that is the cache, depth {_DEEP:,}",
        [(r.deep - r.shallow) * whole / r.deep for r in found],
        "> 0.5" if larger else "none",
        f"{figure('', [r.deep for r in found], '').value * 1e3:.1f} ms per token, {weights / 1e6:,.0f} MB of weights",
    )
    yield figure(
        f"{name}: ours / DynamicCache, depth {_DEEP:,}",
        [r.deep / r.concatenating for r in found],
        "< 1" if not model.config.kv_bits else "none",
    )


def window_figures(name: str, count: int, steps: int) -> Iterator[Figure]:
    """A window's cost per token does not depend on the depth, beyond its own length."""
    model = load_model(name)
    shallow, deep = stream_at(model, _SHALLOW), stream_at(model, _DEEP)
    plain = stream_at(load_model("llama@25m"), _DEEP)
    sides = [lambda s=s: decode_s(s, steps) for s in (shallow, deep, plain)]
    [side() for side in sides]
    found = [[side() for side in sides] for _ in range(count)]
    yield figure(f"{name}: depth {_DEEP:,} / {_SHALLOW:,}", [r[1] / r[0] for r in found], "≤ 1.1")
    yield figure(f"{name}: with window / without, depth {_DEEP:,}", [r[1] / r[2] for r in found], "< 1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join((*_CASES, *_WINDOWS)), help="which models, of the default ones")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8, help="tokens per round and side")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    done: list[Figure] = []
    for name in arguments.only.split(","):
        make = window_figures if "window" in name else depth_figures
        for line in make(name, arguments.rounds, arguments.steps):
            done.append(line)
            print(
                f"{line.name:78} {line.value:7.2f} [{line.low:.2f}, {line.high:.2f}] goal {line.goal:6} {line.note}",
                flush=True,
            )
    if arguments.csv:
        write(arguments.csv, done)


if __name__ == "__main__":
    sys.exit(main())
