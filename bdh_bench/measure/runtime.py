"""Does a model run as its file is written, or was it compiled: by us, for every model alike, or by itself, unasked?

The same weights can run several times as fast once they are compiled, often more than architectures differ, so the runtime is a
condition of a timing, as the device is:

    eager        as the file is written, and looked at: nothing in it was compiled or captured
    compile      ``torch.compile`` on the model's ``advance``, the arithmetic of a session; what it cannot trace runs as before
    own compile  the model compiled or captured something itself; comparable with nothing but itself

``compile`` is refused (``Unsupported``) where it fails, compiles nothing, or moves the logits further than rounding does.

What is not seen: kernels in a language of their own, which a model names (``kernels``), and graphs that a library captured outside torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdh_bench.errors import SpecError

EAGER, COMPILE, OWN, CUDA_GRAPH = "eager", "compile", "own compile", "cudagraph"
RUNTIMES = (EAGER, COMPILE, CUDA_GRAPH)
BACKEND = "inductor"
#: Largest difference of logits of deviation 1 that rounding explains: types of at least 32 bits, and narrower ones.
PARITY, PARITY_NARROW = 1e-4, 5e-2


class Unsupported(Exception):
    """This model has no such runtime here; the message is the reason of its rows."""


@dataclass(frozen=True)
class Graphs:
    """What torch has compiled in this process so far."""

    compiled: int
    broken: int


def graphs() -> Graphs:
    """Counted by torch itself; nothing is loaded to ask."""
    known = sys.modules.get("torch._dynamo.utils")
    if known is None:
        return Graphs(0, 0)
    counters = known.counters
    return Graphs(int(counters["stats"]["unique_graphs"]), int(sum(counters["graph_break"].values())))


@contextmanager
def compiled(model: Any) -> Iterator[None]:
    """The model with its ``advance`` compiled; as it was behind it. Past torch's limit of versions it raises, never goes on uncompiled."""
    if not callable(getattr(model, "advance", None)):
        raise Unsupported("this model has no advance that could be compiled")
    import torch._dynamo

    own = model.__dict__.get("advance")
    model.advance = torch.compile(model.advance, backend=BACKEND)
    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            yield
    finally:
        del model.advance  # the class's own shows again
        if own is not None:
            model.advance = own


def prove(use: Callable[[], Tensor], truth: Tensor) -> None:
    """``use`` the compiled model, which compiles it, and compare with what it said before. Raises Unsupported."""
    before = graphs()
    try:
        got = use()
    except Exception as error:  # whatever a compiler raises on a stranger's model is the reason
        said = " ".join(str(error).split())[:300]
        raise Unsupported(f"torch.compile failed: {type(error).__name__}: {said}") from error
    if graphs().compiled == before.compiled:
        raise Unsupported("torch.compile found nothing to compile in this model")
    wide = truth.itemsize >= 4
    bound = (PARITY if wide else PARITY_NARROW) * max(1.0, float(truth.float().std()))
    apart = float((got.double() - truth.double()).abs().max()) if got.shape == truth.shape else float("inf")
    if not apart <= bound:
        raise Unsupported(f"torch.compile changed the logits by {apart:.3g} · at most {bound:.3g} is rounding")


def own_compilation(model: nn.Module) -> str:
    """What this model compiled or captured itself, or ""; for a process in which nobody else compiled anything."""
    found = next(filter(None, map(_artefact, _reachable(model))), "")
    count = graphs().compiled
    return found or (f"{count} graphs were compiled in this process" if count else "")


def _reachable(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """Everything by a name: submodules, their attributes, what their classes define, and what the model's own file does."""
    for name, module in model.named_modules():
        yield name or type(module).__name__, module
        yield from vars(module).items()
        for kind in type(module).__mro__:
            if kind.__module__.partition(".")[0] not in ("torch", "builtins"):
                yield from vars(kind).items()
    yield from vars(sys.modules.get(type(model).__module__, sys)).items()


def _artefact(named: tuple[str, Any]) -> str:
    name, thing = named
    if isinstance(thing, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        return f"{name} is a TorchScript"
    if isinstance(thing, torch.cuda.CUDAGraph):
        return f"{name} is a captured CUDA graph"
    if isinstance(thing, nn.Module):
        if type(thing).__name__ == "OptimizedModule" or getattr(thing, "_compiled_call_impl", None) is not None:
            return f"{name} is compiled"
        return ""
    plain = not isinstance(thing, type | Tensor) and callable(thing)
    return f"{name} is compiled" if plain and "_torchdynamo_orig_callable" in getattr(thing, "__dict__", {}) else ""


def check_runtime(name: str) -> None:
    """Raises SpecError for a runtime that does not exist, Unsupported for one that nobody has written."""
    if name not in RUNTIMES:
        raise SpecError(f"got runtime={name} · expected one of {', '.join(RUNTIMES)}")
    if name == CUDA_GRAPH:
        raise Unsupported(
            "capture as a CUDA graph is not written: it needs states of fixed addresses, and no GPU was there to try it"
        )
