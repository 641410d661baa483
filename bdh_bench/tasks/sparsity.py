"""How sparse are BDH's activations, how large does its memory grow, and how alike are its keys?

Protocol: held-out documents are read from an empty state, the start symbol first, in pieces of at most 512. By pass and document:
the shares of keys xs, gates ys and products xs ⊙ ys that are not zero over all bytes after the first 16 (a cold memory gates
everything off); the norm of the memory at each context; and the mean cosine of keys at distances 1, 16 and 256 within the last
piece. The three densities answer different questions and are never merged: xs is what decoding must read of the memory, xs ⊙ ys what
it must read of the decoder.

Caveats: untrained weights have about half of their keys active, which says nothing; rows carry ``weights``. Only models that show
their activity (``observe``) can be measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdh_bench.errors import SpecError
from bdh_bench.tasks._scoring import PIECE
from bdh_bench.types import Measurement, TaskContext

DEFAULTS = {
    "metric": "gated_density",
    "cell_axes": ("seed",),
    "trains": True,
    "reads": True,
    "context_factors": (1, 4),
}

_COLD = 16
_DISTANCES = (1, 16, 256)


@dataclass(frozen=True)
class Config:
    """Which documents: each holds the longest context and so much more.

    block   chooses the documents, with blocks, as long_ppl does
    blocks  see block
    """

    block: int = 128
    blocks: int = 1


def run(model: Any, config: Config, context: TaskContext) -> Iterator[Measurement]:
    """Densities, norms and overlaps by pass; one measurement per document, weighted by its bytes."""
    longest = max(context.contexts)
    if not hasattr(model, "observe"):
        reason = "this model does not show which of its neurons are active"
        yield Measurement("gated_density", None, longest, status="unsupported", reason=reason)
        return
    for done, document in enumerate(context.documents):
        context.progress("observe", done / len(context.documents), {"context": longest})
        try:
            yield from _document(model, document, sorted(context.contexts))
        except SpecError as error:
            yield Measurement("gated_density", None, longest, status="unsupported", reason=str(error))
            return


@torch.inference_mode()
def _document(model: Any, document: Any, contexts: list[int]) -> Iterator[Measurement]:
    device = next(model.parameters()).device
    longest = contexts[-1]
    read = bytes([model.start_symbol]) + document.content[: longest - 1]
    tokens = torch.from_numpy(np.frombuffer(read, dtype=np.uint8).astype(np.int64)).view(1, -1).to(device)
    session = model.session()
    active: dict[tuple[str, int], float] = defaultdict(float)
    for start, stop in _pieces(contexts):
        for layer, (keys, gates, state) in enumerate(model.observe(session.memory, start, tokens[:, start:stop])):
            warm = slice(max(0, _COLD - start), None)
            for name, values in (("key", keys), ("gate", gates), ("gated", keys * gates)):
                active[f"{name}_density", layer] += float((values[:, :, warm] != 0).double().mean((0, 1, 3)).sum())
            if stop in contexts:
                yield Measurement(
                    "state_norm", float(state.double().norm()), stop, axes={"layer": layer}, sample=document.name
                )
            if stop == longest:
                yield from _overlaps(keys, layer, document.name, longest)
    for (name, layer), total in active.items():
        counted = longest - _COLD
        yield Measurement(
            name, total / counted, longest, axes={"layer": layer}, sample=document.name, weight=float(counted)
        )


def _pieces(contexts: list[int]) -> Iterator[tuple[int, int]]:
    """Pieces of at most PIECE tokens that end at every context."""
    before = 0
    for end in contexts:
        for start in range(before, end, PIECE):
            yield start, min(start + PIECE, end)
        before = end


def _overlaps(keys: Tensor, layer: int, document: str, context: int) -> Iterator[Measurement]:
    """Cosines of keys (H, 1, T, N) with those so many tokens earlier, all heads as one key; a silent key has no direction."""
    whole = keys[:, 0].transpose(0, 1).flatten(1).double()  # (T, H·N)
    unit = torch.nn.functional.normalize(whole, dim=-1)
    for distance in _DISTANCES:
        if distance >= len(unit):
            continue
        cosine = (unit[distance:] * unit[:-distance]).sum(-1)
        known = (whole[distance:].any(-1) & whole[:-distance].any(-1)).double()
        if known.any():
            yield Measurement(
                "key_cosine",
                float((cosine * known).sum() / known.sum()),
                context,
                axes={"layer": layer, "distance": distance},
                sample=document,
                weight=float(known.sum()),
            )
