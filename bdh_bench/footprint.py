"""What does a model need by formula (weights, state per stream, last position), without a single weight in memory?

Models are built on torch's meta device, where tensors have a shape and no content. A family whose weights are published may say it from a
checkpoint's headers alone: its module then defines ``without_weights(config, dtype)``.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from bdh_bench import registry
from bdh_bench.errors import BenchError, SpecError
from bdh_bench.loading import DTYPES, resolve
from bdh_bench.results.capacity_planning import Needs
from bdh_bench.spec import ModelSpec, parse_model
from bdh_bench.weights import inspect, read_tensors


class _Shape(Protocol):
    """A model as far as its formulae go."""

    max_positions: int | None
    remark: str

    def parameter_count(self) -> int: ...
    def weights_bytes(self) -> int: ...
    def state_bytes(self, batch_size: int, context: int) -> int: ...


def needs_of(name: str, context: int, dtype: str = "float32", train_context: int = 256) -> Needs:
    """What the model called ``name`` needs at ``context``. Raises SpecError for a name or dtype that does not exist.

    What cannot be built or told is a ``problem`` of the answer: one model must not spoil the table of the others.
    """
    if dtype not in DTYPES:
        raise SpecError(f"got dtype {dtype!r} · expected one of {', '.join(DTYPES)}")
    spec = parse_model(name)
    registry.check(spec)
    try:
        return _needs(spec, context, dtype, train_context)
    except (BenchError, RuntimeError, ValueError, NotImplementedError) as error:
        return Needs(str(spec), dtype, problem=" ".join(str(error).split())[:200])


def _needs(spec: ModelSpec, context: int, dtype: str, train_context: int) -> Needs:
    module = registry.load("models", spec.family)
    path = spec.option("weights")
    tensors = read_tensors(inspect(path).path) if path else None
    config = resolve(spec, module, tensors, train_context)
    shape: _Shape
    shape = (
        module.without_weights(config, DTYPES[dtype])
        if hasattr(module, "without_weights")
        else _OnMeta(module, config, DTYPES[dtype])
    )
    limit = shape.max_positions
    state = None if limit is not None and context > limit else int(shape.state_bytes(1, context))
    return Needs(str(spec), dtype, shape.parameter_count(), shape.weights_bytes(), state, limit, shape.remark)


class _OnMeta:
    """A model of this package without content."""

    def __init__(self, module: Any, config: Any, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            self.model = module.Model(config).to(dtype)
        self.max_positions: int | None = self.model.max_positions
        self.remark = ""

    def parameter_count(self) -> int:
        return int(self.model.parameter_count())

    def weights_bytes(self) -> int:
        found = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(t.numel() * t.itemsize for t in found.values())

    def state_bytes(self, batch_size: int, context: int) -> int:
        return int(self.model.state_bytes(batch_size, context))
