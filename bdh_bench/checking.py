"""Does this model keep every law that its numbers would rest on? One row per law: measured error against tolerance.

A law that has nothing to say about a model is shown as such, never as kept. A model that is ``discontinuous`` (its logits jump where a
sum is rounded the other way) is held to its laws in float64, where that hardly ever happens, and the report says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdh_bench import laws, registry
from bdh_bench.errors import SpecError, UnknownNameError
from bdh_bench.loading import build, load_model, resolve
from bdh_bench.spec import ModelSpec

KEPT, BROKEN, NOT_APPLICABLE = "kept", "broken", "does not apply"


@dataclass(frozen=True)
class Report:
    """The findings on one model; ``spread`` is the standard deviation of its logits, which widens tolerances above 1.

    ``dtype`` is that of the weights under law.
    """

    model: str
    parameters: int
    spread: float
    findings: tuple[laws.Finding, ...]
    dtype: str = "float32"

    @property
    def kept(self) -> bool:
        return all(finding.kept for finding in self.findings)

    def count(self, result: str) -> int:
        return sum(result_of(finding) == result for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain values; an error that is no number (an exception, NaN) is null, and the detail says what it was."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "logits_std": self.spread,
            "dtype": self.dtype,
            "laws": [
                {
                    "law": f.law,
                    "result": result_of(f),
                    "error": f.error if f.error is not None and math.isfinite(f.error) else None,
                    "tolerance": f.tolerance,
                    "detail": _detail(f),
                }
                for f in self.findings
            ],
            "counts": {name: self.count(name) for name in (KEPT, BROKEN, NOT_APPLICABLE)},
        }

    def as_rows(self) -> list[dict[str, str]]:
        """The same as text for a table; a column of details only where there are some."""
        rows = [
            {
                "law": f.law,
                "result": result_of(f),
                "error": "" if f.error is None else f"{f.error:.2g}",
                "at most": "" if f.error is None else f"{f.tolerance:.2g}",
                "detail": _detail(f),
            }
            for f in self.findings
        ]
        if not any(row["detail"] for row in rows):
            rows = [{k: v for k, v in row.items() if k != "detail"} for row in rows]
        return rows


def result_of(finding: laws.Finding) -> str:
    """In one word, or three."""
    if not finding.applies:
        return NOT_APPLICABLE
    return KEPT if finding.kept else BROKEN


def complaint(finding: laws.Finding) -> str:
    """A broken law as one message."""
    return f"{finding.law}: {_detail(finding) or f'got an error of {finding.error:.2g}'} · expected at most {finding.tolerance:.2g}"


def _detail(finding: laws.Finding) -> str:
    if finding.detail:
        return " ".join(finding.detail.split())
    return "the error is NaN" if finding.error is not None and math.isnan(finding.error) else ""


def check(text: str, device: str = "cpu") -> Report:
    """Every law on the model that ``text`` names: a registered one, or ``PATH.py``. Raises what loading raises."""
    model = _load(text, _known_device(device))
    if getattr(model, "discontinuous", False):
        model = model.double()
    parameters = sum(p.numel() for p in model.parameters())
    dtype = str(next((p.dtype for p in model.parameters() if p.is_floating_point()), "")).removeprefix("torch.")
    return Report(text, parameters, laws.spread(model), tuple(laws.check(model)), dtype)


def _load(text: str, device: str) -> Any:
    if not text.endswith(".py"):
        return load_model(text, device=device)
    path = Path(text).expanduser()
    module = registry.load_file(path)
    with registry.blame(registry.Entry("models", path.stem, str(path), module.__name__, ""), "be built"):
        config = resolve(ModelSpec(path.stem), module, None, train_context=256)
        return build(module, config, seed=0).to(device).eval()


def _known_device(device: str) -> str:
    import torch

    if device not in ("cpu", "cuda"):
        raise UnknownNameError("device", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise SpecError("got --device cuda · torch finds no such device here", "use --device cpu")
    return device
