"""Does BDH learn with our kernels what it learns in the published form? Two loss curves from one process, step by step.

    make bench-parity DATA=tinyshakespeare.txt         # or: python benchmarks/training_parity.py --data FILE --steps 300
    python benchmarks/training_parity.py --data FILE --csv results/training-parity.csv
    python benchmarks/training_parity.py --data FILE --precision float64 --csv results/training-parity-float64.csv

``parallel`` is the published arithmetic, T×T scores, differentiated by autograd; ``chunked`` is our kernel with its explicit backward
pass. Both start from the same weights, read the same pieces in the same order, and take turns. In float32 their losses must agree
within 1 % at every step, in float64 within 1e-6; both bounds were fixed before the recorded runs. Training multiplies what rounding leaves
between two curves, in float32 to a percent (below), so that float64 is the stronger evidence.

The loop is ``training/loop.py`` itself with the published recipe: AdamW with its usual moments (0.9, 0.999) at a constant 1e-3, decay
0.1, no clipping. Scaled down from 32 random pieces of 512 bytes per step, 256 features and 32,768 neurons: to 8 pieces of 256, 64 and
1,024, chosen by the cost of a step before any loss was seen. Departures: no autocast, no dropout, and a piece begins with the start
symbol, as everywhere in this project.

A loss curve is a weak witness, because AdamW divides a gradient by its own size and so forgives a wrong constant factor. Every few steps
``gradient_difference`` therefore holds the gradients of both forms against each other at the weights that ``chunked`` has by then, in
float64: ‖g_chunked − g_parallel‖ / ‖g_parallel‖, the largest over the parameters. ``rounding_parallel`` and ``rounding_chunked`` are what
either form loses in float32 against float64 (of weights in float64, their rounding included). They jump to 1e-3 when rounding carries
one neuron of one token over the edge of its relu, in either form, so that a comparison in float32 could not tell such a jump from a
small error.

How far apart may two curves be that differ by nothing but rounding? ``loss_last_bit`` is the control: ``chunked`` once more, from weights
that differ in their last bit. What it differs from ``loss_chunked`` by is the training's own sensitivity, not a form's. It is run in
float32 alone.

Recorded over 300 steps: in float32 (``results/training-parity.csv``) the losses are at most 0.78 % apart, median 0.06 %, and one bit of the
first weights moves them by up to 0.90 %; in float64 (``results/training-parity-float64.csv``) at most 1.7e-15.

An older run on 2 pieces of 512 bytes per step and 2,048 neurons (``results/training-parity-2x512.csv``) misses the 1 %: three losses of 300
are up to 1.1 % apart. Its gradients are equal to 1e-15, and one bit of the first weights moves the same kernel's losses by up to 0.8 %.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import machine  # type: ignore[import-not-found]  # beside this file
from torch import Tensor

from bdh_bench import load_model
from bdh_bench.data.corpus import Document, open_corpus
from bdh_bench.data.pieces import TrainingText
from bdh_bench.kernels.bdh_pass import chunk_length
from bdh_bench.training.loop import Training, begun, piece_loss
from bdh_bench.training.recipe import Recipe

LOSS_LIMITS = {"float32": 0.01, "float64": 1e-6}  # relative, at every step
GRADIENT_LIMIT = 1e-6  # relative, in float64
_BETAS = (0.9, 0.999)  # the published script leaves them as AdamW has them
_MODES = ("parallel", "chunked")
_MODEL = "bdh:n_layer=6:n_embd=64:mlp_internal_dim_multiplier=16:chunk=64"


@dataclass(frozen=True)
class Step:
    """Losses are in nats per byte, before the update of that step; the last three are None where the gradients were not looked at."""

    step: int
    loss_parallel: float
    loss_chunked: float
    relative_difference: float
    gradient_difference: float | None
    rounding_parallel: float | None = None
    rounding_chunked: float | None = None
    loss_last_bit: float | None = None


def published_recipe(steps: int, batch: int, context: int, seed: int = 1337, precision: str = "float32") -> Recipe:
    """Constant rate, no clipping; ``batch`` pieces per step. ``precision`` is that of the weights too."""
    return Recipe(
        bytes=steps * batch * context,
        context=context,
        learning_rate=1e-3,
        seed=seed,
        batch_bytes=batch * context,
        warm_up=0.0,
        final_share=1.0,
        clip_norm=math.inf,
        precision=precision,
    )


def side(model: Any, recipe: Recipe, documents: tuple[Document, ...]) -> Training:
    """The project's training before its first step, with the moments of the published script."""
    run = begun(model, recipe, documents)
    for group in run.optimiser.param_groups:
        group["betas"] = _BETAS
    return run


def compare(spec: str, recipe: Recipe, documents: tuple[Document, ...], look_every: int = 50) -> Iterator[Step]:
    """Both forms of the bdh that ``spec`` names, trained side by side."""
    parallel, chunked = (load_model(f"{spec}:mode={mode}", dtype=recipe.precision, seed=recipe.seed) for mode in _MODES)
    chunked.load_state_dict(parallel.state_dict())
    runs = [side(model, recipe, documents) for model in (parallel, chunked)]
    text = TrainingText(documents, recipe.context).pieces(recipe.seed + 1)  # other pieces than the first steps'
    pieces = torch.from_numpy(np.stack(list(islice(text, runs[0].reader.rows))).astype(np.int64))
    for step in range(runs[0].steps):
        look = step % look_every == 0 or step == runs[0].steps - 1
        found = compare_gradients(spec, chunked.state_dict(), pieces) if look else (None, None, None)
        a, b = (float(run.one()) for run in runs)
        for run in runs:
            run.step += 1
        yield Step(step, a, b, abs(b - a) / a, *found)


def control(spec: str, recipe: Recipe, documents: tuple[Document, ...], steps: list[Step]) -> Iterator[Step]:
    """The same steps with the losses of ``chunked`` from weights one bit off."""
    model = load_model(f"{spec}:mode=chunked", dtype=recipe.precision, seed=recipe.seed)
    one_bit_off(model)
    run = side(model, recipe, documents)
    for step in steps:
        yield replace(step, loss_last_bit=float(run.one()))
        run.step += 1


@torch.no_grad()
def one_bit_off(model: Any) -> None:
    """Every weight moved to a neighbouring number of its dtype, up or down at random."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        up = torch.rand(weight.shape, generator=generator) < 0.5
        weight.copy_(torch.nextafter(weight, torch.where(up, math.inf, -math.inf).to(weight)))


def compare_gradients(spec: str, weights: dict[str, Tensor], pieces: Tensor) -> tuple[float, float, float]:
    """At these weights: the difference in float64, and what either form loses in float32."""
    truth, ours = (_gradients(f"{spec}:mode={mode}", "float64", weights, pieces) for mode in _MODES)
    rounded = (_gradients(f"{spec}:mode={mode}", "float32", weights, pieces) for mode in _MODES)
    return _apart(ours, truth), *(_apart(found, truth) for found in rounded)  # type: ignore[return-value]


def _gradients(spec: str, dtype: str, weights: dict[str, Tensor], pieces: Tensor) -> list[Tensor]:
    """Of every parameter, on the loss that training uses."""
    model = load_model(spec, dtype=dtype).train()
    model.load_state_dict(weights)
    return [g.double() for g in torch.autograd.grad(piece_loss(model, pieces), [*model.parameters()])]


def _apart(found: list[Tensor], truth: list[Tensor]) -> float:
    return float(torch.stack([(g - t).norm() / t.norm() for g, t in zip(found, truth, strict=True)]).max())


def objections(steps: list[Step], precision: str) -> list[str]:
    """Why these curves do not show that both forms learn the same; empty if they do."""
    limit = LOSS_LIMITS[precision]
    apart = [s for s in steps if not s.relative_difference <= limit]  # written so that a loss of nan is apart
    wrong = [s for s in steps if s.gradient_difference is not None and not s.gradient_difference <= GRADIENT_LIMIT]
    found = []
    if apart:
        found.append(
            f"losses differ by more than {limit:g} of themselves at {len(apart)} steps, first at {apart[0].step}"
        )
    if wrong:
        found.append(
            f"gradients differ by more than {GRADIENT_LIMIT:g} at steps {', '.join(str(s.step) for s in wrong)}"
        )
    if not any(s.gradient_difference is not None for s in steps):
        found.append("no gradients were compared")
    if not steps or not steps[-1].loss_parallel < 0.9 * steps[0].loss_parallel:
        found.append("the published form learned nothing, so that agreement says nothing")
    return found


def summary(steps: list[Step]) -> str:
    """The whole curve in a line."""
    worst = max(steps, key=lambda s: s.relative_difference)
    looked = [s.gradient_difference for s in steps if s.gradient_difference is not None]
    off = [abs(s.loss_last_bit / s.loss_chunked - 1) for s in steps if s.loss_last_bit is not None]
    return (
        f"loss {steps[0].loss_parallel:.4f} -> {steps[-1].loss_parallel:.4f} parallel, {steps[-1].loss_chunked:.4f} chunked; "
        f"largest relative difference {worst.relative_difference:.2e} at step {worst.step}; "
        f"largest difference of gradients at equal weights {max(looked):.2e} of {len(looked)} looks, in float64"
        + (f"; one bit of the first weights changes the loss of chunked by up to {max(off):.2e}" if off else "")
    )


def facts(spec: str, model: Any, recipe: Recipe, documents: tuple[Document, ...]) -> Iterator[str]:
    """What was trained on what and how."""
    chunk = model.config.chunk or chunk_length(model.config.n_embd)
    yield f"{spec}, {model.parameter_count():,} parameters, a piece is {math.ceil(recipe.context / chunk)} chunks of {chunk}"
    yield (
        f"AdamW{_BETAS} {recipe.learning_rate:g} constant, decay {recipe.weight_decay:g}, no clipping, dropout {model.config.dropout:g}, "
        f"{recipe.precision}, {recipe.batch(recipe.context)} pieces of {recipe.context} bytes per step, seed {recipe.seed}"
    )
    for d in documents if len(documents) < 3 else ():
        yield f"{d.name}, {d.size:,} bytes, sha256 {d.sha256}"
    if len(documents) >= 3:
        yield f"{len(documents)} documents, {sum(d.size for d in documents):,} bytes"


def write(path: Path, comments: Iterable[str], steps: list[Step]) -> None:
    """The curves as CSV, with machine and recipe in comments above them."""
    with path.open("w", encoding="utf-8", newline="") as file:
        for comment in comments:
            print(f"# {comment}", file=file)
        writer = csv.DictWriter(file, [f.name for f in fields(Step)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: _shown(k, v) for k, v in asdict(one).items()} for one in steps)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.8g}" if name.startswith("loss") else f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a text file or a folder of them, or stdlib")
    parser.add_argument("--model", default=_MODEL, help="a bdh without mode")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="pieces per step")
    parser.add_argument("--context", type=int, default=256, help="bytes of a piece")
    parser.add_argument("--precision", choices=tuple(LOSS_LIMITS), default="float32", help="of weights and arithmetic")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--look-every", type=int, default=50, help="steps between two looks at the gradients")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="write the curves here too")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    documents = open_corpus("stdlib" if arguments.data == "stdlib" else f"path:{arguments.data}").part("train")
    recipe = published_recipe(arguments.steps, arguments.batch, arguments.context, arguments.seed, arguments.precision)
    done: list[Step] = []
    for one in compare(arguments.model, recipe, documents, arguments.look_every):
        done.append(one)
        if one.gradient_difference is not None:
            print(
                f"step {one.step:5}  parallel {one.loss_parallel:.5f}  chunked {one.loss_chunked:.5f}  "
                f"apart {one.relative_difference:.1e}  gradients apart {one.gradient_difference:.1e}  "
                f"rounding {one.rounding_parallel:.1e} parallel, {one.rounding_chunked:.1e} chunked",
                flush=True,
            )
    if recipe.precision == "float32":
        done = list(control(arguments.model, recipe, documents, done))
    print(summary(done))
    if arguments.csv:
        comments = [machine(), *facts(arguments.model, load_model(arguments.model), recipe, documents), summary(done)]
        write(arguments.csv, comments, done)
    for objection in (found := objections(done, recipe.precision)):
        print(f"not equal: {objection}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
