"""Llama: rotary positions, SwiGLU, RMS norm, optional shared key heads; the strong transformer, with no last position.

Source: ``LlamaForCausalLM`` of transformers, built from its configuration, never from the hub. No biases, no dropout, MLP
width 8/3·D rounded to a multiple of 8, weights from N(0, 0.02²). Input and output embeddings are tied, as in gpt2: with 256
bytes a second table is a small part of a model, and one less difference between the two transformers.

Rotary angles are computed for the positions at hand, so that there is no limit; their frequencies stay
float32 in a model of another dtype. What lies beyond the training context is extrapolation, not a refusal.

Options, each the same arithmetic in ``logits`` and in a stream, and free to be combined:

- ``kv_heads``: grouped-query attention (arXiv 2305.13245).
- ``window=W``: a token sees itself and the W − 1 before it (Mistral, arXiv 2310.06825); the cache stops at W − 1 tokens.
  ``sinks=K`` keeps the first K tokens beside them (StreamingLLM, arXiv 2309.17453). Positions stay those of the text, so that a
  mask on the whole text is the truth; StreamingLLM counts them within the cache instead, and so never meets a large distance.
- ``kv_bits=8|4``: keys and values rounded per token and head (``kernels.quantise``) before anyone reads them, the token itself included,
  in training too, with the gradient of the unrounded value (straight-through). A model trained without it takes it by ``weights=``.
  Rounding is a step: two ways to sum that differ by 1e-8 fall, rarely, on two sides of it, and then logits differ by more than rounding.
- ``rope_scaling=linear|ntk|yarn|llama3`` with ``rope_factor``, and ``rope_context`` (the context that was trained on) for the last two:
  transformers' frequencies; ``ntk`` is the static form, a larger base. ``dynamic`` and ``longrope`` choose frequencies by the
  length of the text, which turns keys that a stream has already cached: refused.
- ``attention=linear``: only the softmax is replaced, by positive features and a normaliser (``kernels.feature_attention``); all
  else, the rotation of queries and keys before it included, is untouched. It asks whether the swap alone is enough.
  RoFormer (arXiv 2104.09864, equation 19) would rotate the features instead.

Legend: B batch, T tokens, V vocabulary, D width, L layers, F width of the MLP, W window, K sinks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from bdh_bench.errors import SpecError
from bdh_bench.kernels import quantise
from bdh_bench.kernels.feature_attention import feature_attention
from bdh_bench.models._causal_attention import attention_name
from bdh_bench.models._kv_cache import KVCache, rounding_cache
from bdh_bench.session import Streaming, TensorMemory
from bdh_bench.types import Keep

DEFAULTS = {
    "learning_rate": 2e-3,
    "position_limit": "none",
    "kind": "transformer",
    "architecture": "rotary positions, RMSNorm before each block, gated SiLU, tied embeddings",
}

#: Parameters up to which this depth is the natural one; beyond the last, 24.
_DEPTHS = ((5e5, 4), (2e6, 5), (5e6, 6), (1.5e7, 7), (3e7, 8), (7e7, 10), (2e8, 12))
_CLOSE = 0.019

_SCALINGS = ("none", "linear", "ntk", "yarn", "llama3")
#: Scalings of transformers that no stream can have exactly.
_BY_LENGTH = ("dynamic", "longrope")
_SHAPE = ("d_model", "n_layer", "n_head", "kv_heads", "vocab_size")


@dataclass(frozen=True)
class Config:
    """Shape of the model, its KV cache and its positions; how they work stands above.

    d_model       width D of the residual stream
    n_layer       layers
    n_head        query heads
    kv_heads      heads of keys and values (grouped-query attention); 0 means as many as n_head
    vocab_size    tokens; 256 are the bytes
    rope_theta    base of the rotary frequencies
    window        tokens that a token sees, itself included; 0 means all
    sinks         first tokens that are kept beside a window
    kv_bits       8 or 4 round keys and values to so many bits; 0 means off
    rope_scaling  none, linear, ntk, yarn or llama3
    rope_factor   how much longer than rope_context texts may get; needs rope_scaling
    rope_context  context of the training, for yarn and llama3
    attention     softmax, or linear in its place
    """

    d_model: int = 76
    n_layer: int = 4
    n_head: int = 2
    kv_heads: int = 0
    vocab_size: int = 256
    rope_theta: float = 10000.0
    window: int = 0
    sinks: int = 0
    kv_bits: int = 0
    rope_scaling: str = "none"
    rope_factor: float = 0.0
    rope_context: int = 256
    attention: str = "softmax"

    @property
    def groups(self) -> int:
        """Key heads."""
        return self.kv_heads or self.n_head

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head

    @property
    def kv_width(self) -> int:
        """Features of all key heads together."""
        return self.groups * self.head_dim

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
    pinned = {name: value for name, value in pinned.items() if name in _SHAPE}  # the others weigh nothing
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
                num_key_value_heads=config.groups,
                # No limit; transformers warns where it is not what it expects of a rotary type.
                max_position_embeddings=config.rope_context if config.rope_scaling == "yarn" else 2**30,
                rope_parameters=_rope_parameters(config),
                tie_word_embeddings=True,
                bos_token_id=None,  # the published ids are ordinary bytes here
                eos_token_id=None,
                attn_implementation=_linear_attention_name()
                if config.attention == "linear"
                else attention_name(config.window, config.sinks),
            )
        )

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, V)."""
        c = self.config
        if c.attention == "linear":
            return self._read(tokens, 0, "all", feature_memory=self._features(tokens.shape[0]))
        cache = rounding_cache(c.n_layer, c.kv_bits) if c.kv_bits else None
        return self._read(tokens, 0, "all", past_key_values=cache, use_cache=False)

    forward = logits

    def memory(self, batch_size: int) -> KVCache | TensorMemory:
        """An empty cache, whose rooms are reserved by the first token; or zero sums."""
        c = self.config
        return (
            self._features(batch_size) if c.attention == "linear" else KVCache(c.n_layer, c.kv_bits, c.window, c.sinks)
        )

    def _features(self, batch_size: int) -> TensorMemory:
        """S = 0 for every layer, (B, key heads, features, features + 1)."""
        c, weight = self.config, self.model.lm_head.weight
        shape = (batch_size, c.groups, c.head_dim, c.head_dim + 1)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return TensorMemory(
            {f"layer{i}.sums": torch.zeros(shape, dtype=dtype, device=weight.device) for i in range(c.n_layer)}
        )

    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Keep) -> Tensor:
        """Attention over the cache and the piece; the head only where logits are kept."""
        if self.config.attention == "linear":
            return self._read(tokens, position, keep, feature_memory=memory, use_cache=False)
        logits = self._read(tokens, position, keep, past_key_values=memory.cache, use_cache=True)
        memory.settle()
        return logits

    def _read(self, tokens: Tensor, position: int, keep: Keep, **memory: Any) -> Tensor:
        places = torch.arange(position, position + tokens.shape[1], device=tokens.device).unsqueeze(0)  # (1, T)
        kept = 1 if keep == "last" else 0  # 0 keeps all
        out: Tensor = self.model(input_ids=tokens, position_ids=places, logits_to_keep=kept, **memory).logits
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Model:
        rotary = self.model.model.rotary_emb
        exact = {name: getattr(rotary, name) for name in ("inv_freq", "original_inv_freq")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in exact.items():  # a change of the model's dtype must not change its angles
            setattr(rotary, name, tensor.to(getattr(rotary, name).device))
        return self

    def state_bytes(self, batch_size: int, context: int) -> int:
        """Keys and values, 2·L·(key width) elements per kept token, or codes and scales; for linear L sums, at any context."""
        c = self.config
        item: int = self.model.lm_head.weight.itemsize
        wide = max(item, 4)  # sums and scales
        if c.attention == "linear":
            return c.n_layer * c.groups * c.head_dim * (c.head_dim + 1) * wide * batch_size
        token = c.groups * (quantise.code_bytes(c.head_dim, c.kv_bits) + wide) if c.kv_bits else c.kv_width * item
        kept = min(context, c.sinks + c.window - 1) if c.window else context
        return 2 * c.n_layer * token * kept * batch_size

    def flops_per_token(self, context: int, mode: str = "recurrent") -> float:
        """Matrices once per token, and scores and sums over the positions that are seen (or, linear, the sums); no other form of it exists.

        Codes cost one product per key and value feature that is read.
        """
        c = self.config
        matrices = 2 * c.d_model * (2 * c.d_model + 2 * c.kv_width + 3 * c.mlp_width)
        seen = min(context, c.sinks + c.window) if c.window else context
        mixing = 4 * c.d_model * seen + (2 * c.kv_width * seen if c.kv_bits else 0)
        if c.attention == "linear":  # a query reads the sums of its key head, which are written once
            mixing = 2 * (c.d_model + c.kv_width) * (c.head_dim + 1)
        return float(c.n_layer * (matrices + mixing) + 2 * c.vocab_size * c.d_model)

    def kernels(self) -> str:
        """What runs here."""
        c = self.config
        if c.attention == "linear":
            return "transformers, torch linear attention in chunks"
        codes = f"; one token at a time, torch attention on codes of {c.kv_bits} bits in blocks" if c.kv_bits else ""
        return "transformers, torch fused attention" + codes

    @property
    def discontinuous(self) -> bool:
        """Whether logits jump somewhere: rounding to codes is a step, and sums in another order may fall on its other side."""
        return bool(self.config.kv_bits)


def _linear_attention_name() -> str:
    """The name under which transformers finds ``_linear_attention``."""
    name = "bdh_bench_linear"
    AttentionInterface.register(name, _linear_attention)
    return name


def _linear_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, feature_memory: TensorMemory, **_: Any
) -> tuple[Tensor, None]:
    """What transformers calls in place of a softmax; returns (B, T, heads, features)."""
    name = f"layer{module.layer_idx}.sums"
    reads, feature_memory[name] = feature_attention(query, key, value, feature_memory[name])
    return reads.transpose(1, 2), None


def _rope_parameters(config: Config) -> dict[str, Any]:
    """transformers' description of the frequencies."""
    c, kind = config, config.rope_scaling
    if kind == "none":
        return {"rope_type": "default", "rope_theta": c.rope_theta}
    if kind == "ntk":  # the slowest pair is slowed by the whole factor, the fastest not at all
        theta = c.rope_theta * c.rope_factor ** (c.head_dim / (c.head_dim - 2))
        return {"rope_type": "default", "rope_theta": theta}
    found: dict[str, Any] = {"rope_type": kind, "rope_theta": c.rope_theta, "factor": c.rope_factor}
    if kind in ("yarn", "llama3"):
        found["original_max_position_embeddings"] = c.rope_context
    if kind == "llama3":
        found |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # as published with Llama 3.1
    return found


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
    _check_cache(config)
    _check_rotary(config)


def _check_cache(config: Config) -> None:
    c = config
    if c.attention not in ("softmax", "linear"):
        raise SpecError(f"got attention={c.attention} · expected softmax or linear")
    if c.window < 0 or c.window == 1:
        raise SpecError(
            f"got window={c.window} · expected 0 (no window) or at least 2 tokens, the reading one included"
        )
    if c.sinks < 0 or (c.sinks and not c.window):
        raise SpecError(
            f"got sinks={c.sinks} with window={c.window} · expected 0, or sinks beside a window", "add window=W"
        )
    if c.kv_bits not in (0, *quantise.BITS):
        raise SpecError(f"got kv_bits={c.kv_bits} · expected 0 (unrounded), 8 or 4")
    for name in ("window", "kv_bits"):
        if c.attention == "linear" and getattr(c, name):
            raise SpecError(
                f"got {name}={getattr(c, name)} with attention=linear · expected no option of a KV cache: it has none",
                "leave one of the two out",
            )


def _check_rotary(config: Config) -> None:
    c = config
    if c.rope_scaling in _BY_LENGTH:
        raise SpecError(
            f"got rope_scaling={c.rope_scaling} · expected one of {', '.join(_SCALINGS)}: it chooses frequencies by the "
            "length of the text, and a stream has cached keys that were turned by others",
            "use ntk or yarn",
        )
    if c.rope_scaling not in _SCALINGS:
        raise SpecError(f"got rope_scaling={c.rope_scaling} · expected one of {', '.join(_SCALINGS)}")
    if c.rope_scaling == "none" and c.rope_factor:
        raise SpecError(
            f"got rope_factor={c.rope_factor} without rope_scaling · expected both", "add rope_scaling=linear"
        )
    if c.rope_scaling != "none" and not c.rope_factor >= 1:
        raise SpecError(
            f"got rope_factor={c.rope_factor} with rope_scaling={c.rope_scaling} · expected at least 1",
            "add rope_factor=4 for texts four times as long",
        )
    if c.rope_context < 1:
        raise SpecError(f"got rope_context={c.rope_context} · expected the context of the training, at least 1")
    if c.rope_scaling == "ntk" and c.head_dim < 4:
        raise SpecError(f"got {c.head_dim} features per head with rope_scaling=ntk · expected at least 4")
