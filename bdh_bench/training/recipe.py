"""What determines a trained checkpoint? The recipe, shared by every architecture, and the key it gives.

Defaults: AdamW (0.9, 0.95), weight decay 0.1, 5 % warm-up, cosine down to 10 %, clipping at norm 1, no dropout, a byte budget.
The learning rate is the one thing that differs by family; see ``results/learning-rate-sweep-quick.csv`` for the sweep behind the defaults.

Regimes: ``crop`` trains on independent random pieces, each from an empty state; ``carried`` on consecutive pieces of a document,
passing the state on and cutting the gradient at the piece edge (truncated back-propagation through time). ``crop+carried`` takes the
finished weights of ``crop`` and goes on for another 5 % of the budget with carried state: the cheapest test of whether a model only
lacks the habit of reading with a memory that is not empty. Models are compared within one regime only.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace

from bdh_bench.errors import UnknownNameError

REGIMES = ("crop", "carried", "crop+carried")

#: What ``crop+carried`` adds: a share of the budget, at a share of the peak learning rate.
CONTINUED_SHARE = 0.05
CONTINUED_RATE = 0.3


def check_regime(regime: str) -> None:
    """Raise UnknownNameError for a regime that does not exist."""
    if regime not in REGIMES:
        raise UnknownNameError("training regime", regime, REGIMES)


@dataclass(frozen=True)
class Recipe:
    """``context`` is T, the bytes of one piece; ``batch_bytes`` the target bytes of one step; ``precision`` of the products.

    ``start`` is the sha256 of the weights that training starts from, "" for those drawn from ``seed``.
    """

    bytes: int
    context: int
    learning_rate: float
    seed: int
    batch_bytes: int = 512
    warm_up: float = 0.05
    final_share: float = 0.1
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    precision: str = "float32"
    regime: str = "crop"
    start: str = ""

    def __post_init__(self) -> None:
        check_regime(self.regime)

    def batch(self, piece: int) -> int:
        """Pieces per step for pieces of this length."""
        return max(1, round(self.batch_bytes / piece))

    def steps(self, piece: int, rows: int | None = None) -> int:
        """Steps of ``rows`` pieces (without it, as many as ``batch`` says) that use up the byte budget."""
        return max(1, round(self.bytes / ((rows or self.batch(piece)) * piece)))

    def rate(self, step: int, steps: int) -> float:
        """The learning rate at ``step`` (0-based): linear warm-up, then cosine to ``final_share``."""
        rising = max(1, math.ceil(self.warm_up * steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, steps - rising)
        return self.learning_rate * (self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * done)))


def continued(recipe: Recipe, sha256: str) -> Recipe:
    """The second stage of ``crop+carried``, from weights with this sha256."""
    return replace(
        recipe,
        bytes=round(CONTINUED_SHARE * recipe.bytes),
        learning_rate=CONTINUED_RATE * recipe.learning_rate,
        regime="carried",
        start=sha256,
    )


def checkpoint_key(recipe: Recipe, model: str, config: str, data_digest: str, code_digest: str) -> str:
    """sha256 over everything that determines the trained weights."""
    inputs = [asdict(recipe), model, config, data_digest, code_digest]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
