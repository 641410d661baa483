"""What does each family of transformers do as ``hf:…``? Writes ``docs/hf-models.md`` from tiny random checkpoints (tests/hf_zoo.py).

    python docs/generate_hf_models.py

``tests/test_hf_docs.py`` measures the rows again and compares everything but the errors, so that the page cannot rot.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import hf_zoo
import torch

from bdh_bench import load_model
from bdh_bench.errors import BenchError

PAGE = Path(__file__).parent / "hf-models.md"
_HEAD = """# Published models, family by family

`hf:ID[@REVISION]` and `hf:./folder` run any causal language model that transformers has itself. A model is read in pieces
only in a way that gives the numbers of its whole text, measured before its first session:

- **cached**: pieces of any length over the model's own cache;
- **stepwise**: token by token over that cache, because longer pieces lose a part of the state (prefill is as slow as decoding);
- **rowwise**: one stream of a batch after the other, because the rows of a batch are mixed;
- **recompute**: the tokens are kept and the whole text is read again for every piece (quadratic time; 8 bytes of state per token).

Measured on tiny random checkpoints of two to four layers (float32, CPU, weights of width 0.2 so that the past matters):
150 tokens read as 64, 1, 7, 1, 16, 60, 1 in a batch of two, and as 1, 1, 1, 13, 134 alone. *Off by* is the largest difference of a
logit from the whole text; at most 1e-4 times the deviation of the logits (at least 1e-4) counts as exact. Times, and what large
published checkpoints do, are not measured here.

State bytes are those of the tiny checkpoint: what matters is whether they grow.

"""
_COLUMNS = (
    "family",
    "class",
    "read as",
    "off by in pieces",
    "state at 64",
    "state at 128",
    "state",
    "positions",
    "why not cached",
)


@dataclass(frozen=True)
class Row:
    """One line of the table; ``error`` is the only cell that depends on rounding."""

    family: str
    kind: str
    path: str
    error: str
    short: str = ""
    long: str = ""
    growth: str = ""
    positions: str = ""
    why: str = ""

    def cells(self) -> tuple[str, ...]:
        return (
            self.family, self.kind, self.path, self.error, self.short, self.long, self.growth, self.positions, self.why,
        )  # fmt: skip

    def line(self) -> str:
        return "| " + " | ".join(cell.replace("|", "/") for cell in self.cells()) + " |"

    def stable(self) -> tuple[str, ...]:
        """What must be the same when it is measured again."""
        return (self.family, self.kind, self.path, self.short, self.long, self.growth, self.positions)


def measure(family: str, folder: Path) -> Row:
    """One family as this version of transformers has it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if hf_zoo.ZOO[family][0] not in CONFIG_MAPPING_NAMES:
        return Row(family, "", "not there", "", why="this version of transformers has no such family")
    hf_zoo.write(family, folder)
    try:
        model = load_model(f"hf:{folder}:tokenizer=bytes")
    except BenchError as error:
        return Row(family, "", "refused", "", why=error.message.replace(f"{folder}: ", "").replace(str(folder), family))
    found = model.verification
    short, long = model.state_bytes(1, 64), model.state_bytes(1, 128)
    error = f"{found.errors['cached']:.1g}" if "cached" in found.errors else "–"
    limit = "no limit" if model.max_positions is None else f"{model.max_positions}, then refused"
    growth = "constant" if short == long == model.state_bytes(1, 10**6) else "grows"
    if growth == "constant" and short != model.state_bytes(1, 1):
        growth = "constant past its window"
    why = "" if found.path == "cached" else found.told().partition(" ")[2].strip("()")
    return Row(family, type(model.model).__name__, found.path, error, f"{short:,}", f"{long:,}", growth, limit, why)


def rows(families: Iterable[str]) -> Iterable[Row]:
    """The rows of these families, measured now."""
    with tempfile.TemporaryDirectory() as root:
        for family in families:
            yield measure(family, Path(root) / family)


def stored() -> dict[str, tuple[str, ...]]:
    """The cells of the page by family."""
    lines = [
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ") and "---" not in line
    ]
    table = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[1:]]
    return {cells[0]: cells for cells in table}


def page(found: Iterable[Row]) -> str:
    """The whole page."""
    from transformers import __version__

    head = "| " + " | ".join(_COLUMNS) + " |\n|" + " --- |" * len(_COLUMNS)
    lines = "\n".join(row.line() for row in found)
    return f"{_HEAD}transformers {__version__}, torch {torch.__version__.partition('+')[0]}.\n\n{head}\n{lines}\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page(rows(hf_zoo.ZOO)), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
