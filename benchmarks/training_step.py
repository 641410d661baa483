"""What does a training step of one family cost against another's? A table of ratios from one process.

    make bench-training                                # or: python benchmarks/training_step.py --families mamba,mamba2 --rounds 5
    python benchmarks/training_step.py --csv results/training-step-cpu.csv

A step is that of ``training/loop.py`` itself: forward, backward, clipping and AdamW, products in the precision that training chooses
on this machine, freed memory kept. All families have the same number of parameters and take turns, round by round; a ratio is the
median over rounds of seconds per trained byte, with its lowest and highest round. A family whose position table is longer than the
training context trains on pieces of its table's length. One row compares mamba with transformers' class on the same weights,
which without mamba-ssm runs its own loop over the tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from engine import Figure, alternate, figure, seconds, write  # type: ignore[import-not-found]  # beside this file
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from bdh_bench import list_models, load_model, registry
from bdh_bench.data.corpus import Document
from bdh_bench.measure.allocator import keep_freed_memory
from bdh_bench.measure.host import native_bfloat16
from bdh_bench.models import mamba
from bdh_bench.training.loop import Training, begun
from bdh_bench.training.recipe import Recipe

_YARDSTICK = "llama"
_GOALS = {"mamba": "≤ 4", "mamba2": "≤ 2.5"}
_CONTEXT = 512


class Published(nn.Module):
    """transformers' Mamba with the weights of ours, in the form that the training loop reads."""

    max_positions, start_symbol = None, 10

    def __init__(self, ours: mamba.Model) -> None:
        super().__init__()
        config, weights = mamba.to_transformers(ours)
        self.model = MambaForCausalLM(MambaConfig(**config, use_cache=False))
        self.model.load_state_dict({**weights, "lm_head.weight": weights["backbone.embeddings.weight"]})

    def logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens).logits
        return logits


def families() -> list[str]:
    """Every registered family that comes in sizes, the yardstick first."""
    sized = [
        e.name
        for e in list_models()
        if not e.problem and not e.defaults.get("words") and hasattr(registry.load("models", e.name), "scaled")
    ]
    return sorted(sized, key=lambda name: name != _YARDSTICK)


def trainer(model: Any, precision: str, batch_bytes: int) -> Training:
    """The training loop before its first step."""
    recipe = Recipe(1 << 20, _CONTEXT, 1e-3, seed=1, batch_bytes=batch_bytes, precision=precision)
    document = Document("this file", Path(__file__))  # what is read does not matter
    return begun(model, recipe, (document,))


def step_s(run: Training) -> float:
    """Seconds per trained byte of one step."""
    return seconds(run.one) / (run.reader.rows * run.reader.length)


def against_llama(names: list[str], size: str, precision: str, rounds: int, batch_bytes: int) -> Iterator[Figure]:
    """Every family against the yardstick."""
    runs = {
        name: trainer(load_model(f"{name}@{size}", train_context=_CONTEXT), precision, batch_bytes)
        for name in [_YARDSTICK, *(n for n in names if n != _YARDSTICK)]
    }
    found = alternate(rounds, *(lambda run=run: step_s(run) for run in runs.values()))
    for i, (name, run) in enumerate(runs.items()):
        reader = run.reader
        median = sorted(r[i] for r in found)[len(found) // 2] * reader.rows * reader.length
        note = f"{reader.rows} × {reader.length}, {run.model.parameter_count():,} parameters, {1e3 * median:.0f} ms"
        goal = _GOALS.get(name, "none")
        if name == _YARDSTICK:
            continue
        yield figure(f"step @{size}, {precision}: {name} / {_YARDSTICK}", [r[i] / r[0] for r in found], goal, note)


def against_published(size: str, precision: str, rounds: int, batch_bytes: int) -> Figure:
    """Ours against transformers' loop over the tokens."""
    ours = load_model(f"mamba@{size}")
    sides = [trainer(model, precision, batch_bytes) for model in (Published(ours), ours)]
    found = alternate(rounds, *(lambda run=run: step_s(run) for run in sides))
    return figure(f"step @{size}, {precision}: transformers' mamba / ours", [a / b for a, b in found], "≥ 20")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="", help="which families besides llama; all that come in sizes")
    parser.add_argument("--size", default="1m")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--published-rounds", type=int, default=3, help="of transformers' mamba; 0 leaves it out")
    parser.add_argument("--batch-bytes", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    precision = "bfloat16" if native_bfloat16() else "float32"
    names = arguments.families.split(",") if arguments.families else families()
    done: list[Figure] = []
    for line in _table(names, precision, arguments):
        done.append(line)
        print(
            f"{line.name:60} {line.value:8.2f} [{line.low:.2f}, {line.high:.2f}]  goal {line.goal:8} {line.note}",
            flush=True,
        )
    if arguments.csv:
        write(arguments.csv, done)


def _table(names: list[str], precision: str, arguments: argparse.Namespace) -> Iterator[Figure]:
    yield from against_llama(names, arguments.size, precision, arguments.rounds, arguments.batch_bytes)
    if arguments.published_rounds:
        for kind in dict.fromkeys((precision, "float32")):
            yield against_published(arguments.size, kind, arguments.published_rounds, arguments.batch_bytes)


if __name__ == "__main__":
    sys.exit(main())
