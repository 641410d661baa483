"""Llama: rotary positions, SwiGLU, RMS norm, optional shared key heads; the strong transformer, with no last position.

Source: ``LlamaForCausalLM`` of transformers, built from its configuration, never from the hub. No biases, no dropout, MLP
width 8/3·D rounded to a multiple of 8, weights from N(0, 0.02²). Input and output embeddings are tied, as in gpt2: with 256
bytes a second table is a small part of a model, and one less difference between the two transformers.

Rotary angles are computed for the positions at hand, so that there is no limit and no rescaling; their frequencies stay
float32 in a model of another dtype. What lies beyond the training context is extrapolation, not a refusal.

Legend: B batch, T tokens, V vocabulary, D width, L layers, F width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bdh_bench.errors import SpecError
from bdh_bench.models._kv_cache import KVCache, attention_name
from bdh_bench.session import Streaming
from bdh_bench.types import Keep

DEFAULTS = {"learning_rate": 2e-3, "position_limit": "none"}

#: Parameters up to which this depth is the natural one; beyond the last, 24.
_DEPTHS = ((5e5, 4), (2e6, 5), (5e6, 6), (1.5e7, 7), (3e7, 8), (7e7, 10), (2e8, 12))
_CLOSE = 0.019


@dataclass(frozen=True)
class Config:
    """``kv_heads`` 0 means as many as ``n_head``; fewer share keys and values (grouped-query attention)."""

    d_model: int = 76
    n_layer: int = 4
    n_head: int = 2
    kv_heads: int = 0
    vocab_size: int = 256
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head

    @property
    def kv_width(self) -> int:
        """Features of all key heads together."""
        return (self.kv_heads or self.n_head) * self.head_dim

    @property
    def mlp_width(self) -> int:
        """F: 8/3·D to the nearest multiple of 8, so that SwiGLU's three matrices weigh as much as two of width 4·D."""
        return max(8, 8 * round(self.d_model / 3))


def parameters(config: Config) -> int:
    """V·D + D + L·(2·D² + 2·D·(key width) + 3·D·F + 2·D)."""
    d = config.d_model
    block = 2 * d * d + 2 * d * config.kv_width + 3 * d * config.mlp_width + 2 * d
    return config.vocab_size * d + d + config.n_layer * block


def scaled(target: int, **pinned: Any) -> Iterator[Config]:
    """Shapes near ``target``: the natural depth first, then its neighbours; heads of about 32 features, 64 when large."""
    natural = next((depth for limit, depth in _DEPTHS if target <= limit), 24)
    wanted = 32 if target < 5e6 else 64
    groups = pinned.get("kv_heads", 0)
    reach = 36 if pinned else max(1, natural // 6)  # pinned options may leave only an unnatural depth
    near = sorted(range(max(1, natural - reach), natural + reach + 1), key=lambda n: abs(n - natural))
    depths = [pinned["n_layer"]] if "n_layer" in pinned else near
    for depth in depths:
        found: list[tuple[float, Config]] = []
        for heads in [pinned["n_head"]] if "n_head" in pinned else range(1, 65):
            if groups and heads % groups:
                continue
            for width in _widths(target, depth, heads, pinned):
                config = Config(width, depth, heads, groups, pinned.get("vocab_size", 256))
                found.append((abs(parameters(config) / target - 1) + abs(config.head_dim - wanted) / 1e4, config))
        usable = [f for f in found if "n_head" in pinned or 16 <= f[1].head_dim <= 64] or found
        for _, config in sorted(usable, key=lambda f: f[0]):
            yield config
        if any(abs(parameters(config) - target) < _CLOSE * target for _, config in usable):
            return  # a more natural depth is worth more than the last percent


def _widths(target: int, depth: int, heads: int, pinned: dict[str, Any]) -> list[int]:
    """Widths of even heads that lie on both sides of the target."""
    if "d_model" in pinned:
        return [pinned["d_model"]] if pinned["d_model"] % (2 * heads) == 0 else []
    b = pinned.get("vocab_size", 256)
    exact = ((b * b + 48 * depth * target) ** 0.5 - b) / (24 * depth)  # of 12·L·D² + V·D = target, kv_heads = n_head
    middle = max(1, round(exact / heads / 2))
    reach = 1 if not pinned.get("kv_heads") else max(1, middle // 4)  # shared key heads leave room for a wider model
    return [heads * 2 * half for half in range(max(1, middle - 1), middle + reach + 1)]


class Model(Streaming, nn.Module):
    """transformers' module without a last position; weights are below ``model.``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.vocab_size = config.vocab_size
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.d_model,
                intermediate_size=config.mlp_width,
                num_hidden_layers=config.n_layer,
                num_attention_heads=config.n_head,
                num_key_value_heads=config.kv_heads or config.n_head,
                max_position_embeddings=2**30,  # read by rescaling rotary types only; the plain one has no limit
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                tie_word_embeddings=True,
                bos_token_id=None,  # the published ids are ordinary bytes here
                eos_token_id=None,
                attn_implementation=attention_name(),
            )
        )

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, V)."""
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Model:
        rotary = self.model.model.rotary_emb
        exact = {name: getattr(rotary, name) for name in ("inv_freq", "original_inv_freq")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in exact.items():  # a change of the model's dtype must not change its angles
            setattr(rotary, name, tensor.to(getattr(rotary, name).device))
        return self

    def state_bytes(self, batch_size: int, context: int) -> int:
        """Keys and values: 2·L·(key width) elements per token."""
        item: int = self.model.lm_head.weight.itemsize
        return 2 * self.config.n_layer * self.config.kv_width * item * context * batch_size

    def flops_per_token(self, context: int, mode: str = "recurrent") -> float:
        """Matrices once per token, and scores and sums over ``context`` positions; no other form of it exists."""
        c = self.config
        matrices = 2 * c.d_model * (2 * c.d_model + 2 * c.kv_width + 3 * c.mlp_width)
        return float(c.n_layer * (matrices + 4 * c.d_model * context) + 2 * c.vocab_size * c.d_model)

    def kernels(self) -> str:
        """What runs here."""
        return "transformers, torch fused attention"


def _check(config: Config) -> None:
    for name in ("d_model", "n_layer", "n_head", "vocab_size"):
        if getattr(config, name) < 1:
            raise SpecError(f"got {name}={getattr(config, name)} · expected at least 1")
    if config.d_model % (2 * config.n_head):
        raise SpecError(
            f"got d_model={config.d_model} for {config.n_head} heads · expected an even number of features per head "
            "(they rotate in pairs)"
        )
    if config.kv_heads < 0 or (config.kv_heads and config.n_head % config.kv_heads):
        raise SpecError(f"got kv_heads={config.kv_heads} for {config.n_head} heads · expected 0 or a divisor")
    if not config.rope_theta > 0:
        raise SpecError(f"got rope_theta={config.rope_theta} · expected more than 0")
