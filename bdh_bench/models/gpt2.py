"""GPT-2: learned positions, a KV cache that grows with every token, and a last position.

Source: ``GPT2LMHeadModel`` of transformers, built from its configuration, never from the hub. Pre-norm blocks, heads of D/H
features, an MLP of width 4·D, input and output embeddings tied, weights from N(0, 0.02²) with transformers' 1/√(2L) on the
residual projections.

Departures from its defaults, which make it slow and weak here: no dropout (every byte is seen about once), the fused tanh
GELU (same function, one kernel), attention by torch's fused kernel with the cache of ``_kv_cache``.

The position table has the training context and half a sweep block beyond it (``max_positions=0``); past it ``logits`` and
sessions refuse. Sizes count a table of 384 positions, the table of the default training context 256.
A longer training context adds its rows on top of the size; a pinned ``max_positions`` is counted, and narrows the model.

Legend: B batch, T tokens, V vocabulary, D width, L layers, P positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from bdh_bench.errors import PositionLimitError, SpecError
from bdh_bench.models._causal_attention import attention_name
from bdh_bench.models._kv_cache import KVCache
from bdh_bench.session import Streaming
from bdh_bench.types import Keep

DEFAULTS = {
    "learning_rate": 4e-3,
    "position_limit": "training context + 128",
    "kind": "transformer",
    "architecture": "learned positions, LayerNorm before each block, GELU, biases, tied embeddings",
}

_DEFAULT_POSITIONS = 384
#: Parameters up to which this depth is the natural one; beyond the last, 24.
_DEPTHS = ((5e5, 4), (2e6, 5), (5e6, 6), (1.5e7, 7), (3e7, 8), (7e7, 10), (2e8, 12))
_CLOSE = 0.019


@dataclass(frozen=True)
class Config:
    """Shape of the model.

    n_embd         width D of the residual stream
    n_layer        layers
    n_head         heads
    vocab_size     tokens; 256 are the bytes
    max_positions  rows of the position table, past which the model refuses; 0 means the training context + 128
    """

    n_embd: int = 72
    n_layer: int = 4
    n_head: int = 3
    vocab_size: int = 256
    max_positions: int = 0

    @property
    def positions(self) -> int:
        """P, the rows of the position table."""
        return self.max_positions or _DEFAULT_POSITIONS


def parameters(config: Config) -> int:
    """(V + P + 2)·D + L·(12·D² + 13·D)."""
    d = config.n_embd
    return (config.vocab_size + config.positions + 2) * d + config.n_layer * (12 * d * d + 13 * d)


def scaled(target: int, **pinned: Any) -> Iterator[Config]:
    """Shapes near ``target``: the natural depth first, then its neighbours; heads of about 32 features, 64 when large."""
    natural = next((depth for limit, depth in _DEPTHS if target <= limit), 24)
    wanted = 32 if target < 5e6 else 64
    reach = 36 if pinned else max(1, natural // 6)  # pinned options may leave only an unnatural depth
    near = sorted(range(max(1, natural - reach), natural + reach + 1), key=lambda n: abs(n - natural))
    depths = [pinned["n_layer"]] if "n_layer" in pinned else near
    for depth in depths:
        # 12·L·D² + b·D = target, for the width of exactly this size
        b = 13 * depth + pinned.get("vocab_size", 256) + (pinned.get("max_positions") or _DEFAULT_POSITIONS) + 2
        exact = ((b * b + 48 * depth * target) ** 0.5 - b) / (24 * depth)
        heads = [pinned["n_head"]] if "n_head" in pinned else range(1, 65)
        found: list[tuple[float, int, int]] = []
        for head in heads:
            if "n_embd" in pinned:
                widths = [pinned["n_embd"]] if pinned["n_embd"] % head == 0 else []
            else:
                widths = [head * 2 * max(1, round(exact / head / 2))]
            found += [(abs(width - exact) / exact + abs(width / head - wanted) / 1e4, width, head) for width in widths]
        usable = [f for f in found if "n_head" in pinned or 16 <= f[1] // f[2] <= 64] or found
        close = False
        for _, width, head in sorted(usable):
            config = Config(width, depth, head, pinned.get("vocab_size", 256), pinned.get("max_positions", 0))
            close |= abs(parameters(config) - target) < _CLOSE * target
            yield config
        if close:  # a more natural depth is worth more than the last percent
            return


class Model(Streaming, nn.Module):
    """transformers' module and its position limit; weights are below ``model.``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.vocab_size = config.vocab_size
        self.max_positions = config.positions
        self.model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.positions,
                n_embd=config.n_embd,
                n_layer=config.n_layer,
                n_head=config.n_head,
                activation_function="gelu_pytorch_tanh",
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=None,  # the published ids lie outside a byte vocabulary
                eos_token_id=None,
                attn_implementation=attention_name(),
            )
        )

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, V). Raises PositionLimitError past the position table."""
        if tokens.shape[1] > self.config.positions:
            raise PositionLimitError(
                f"got {tokens.shape[1]} positions · this model has {self.config.positions}",
                "use fewer tokens or a model with more positions; inputs are never truncated",
            )
        out: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return out

    forward = logits

    def memory(self, batch_size: int) -> KVCache:
        """An empty cache; rooms are reserved by the first token."""
        return KVCache(self.config.n_layer)

    def advance(self, memory: KVCache, position: int, tokens: Tensor, keep: Keep) -> Tensor:
        """Attention over the cache and the piece; the head only where logits are kept."""
        places = torch.arange(position, position + tokens.shape[1], device=tokens.device).unsqueeze(0)  # (1, T)
        out: Tensor = self.model(
            input_ids=tokens,
            position_ids=places,
            past_key_values=memory.cache,
            use_cache=True,
            logits_to_keep=1 if keep == "last" else 0,  # 0 keeps all
        ).logits
        return out

    def state_bytes(self, batch_size: int, context: int) -> int:
        """Keys and values: 2·L·D elements per token."""
        item: int = self.model.transformer.wte.weight.itemsize
        return 2 * self.config.n_layer * self.config.n_embd * item * context * batch_size

    def flops_per_token(self, context: int, mode: str = "recurrent") -> float:
        """Matrices once per token, and scores and sums over ``context`` positions; no other form of it exists."""
        c = self.config
        return float(c.n_layer * (24 * c.n_embd**2 + 4 * c.n_embd * context) + 2 * c.vocab_size * c.n_embd)

    def kernels(self) -> str:
        """What runs here."""
        return "transformers, torch fused attention"


def _check(config: Config) -> None:
    for name in ("n_embd", "n_layer", "n_head", "vocab_size"):
        if getattr(config, name) < 1:
            raise SpecError(f"got {name}={getattr(config, name)} · expected at least 1")
    if config.max_positions < 0:
        raise SpecError(f"got max_positions={config.max_positions} · expected 0 (training context + 128) or more")
    if config.n_embd % config.n_head:
        raise SpecError(f"got n_embd={config.n_embd} for {config.n_head} heads · expected a multiple")
