"""How does an attention model remember a stream without copying it at every token?

A cache behind transformers' unified ``Cache`` over growing tensors, so that reading one token costs the attention over the
past and nothing else that grows with it. transformers' own ``DynamicCache`` concatenates, which copies the whole past once
per token and layer.

``causal_attention`` is the attention that goes with it. transformers builds a mask (B, 1, T, past + T) for a prompt that
is read in pieces; here a mask covers one block of queries at a time and is shared by rows, heads and features.

Source: ``transformers.cache_utils`` and ``transformers.integrations.sdpa_attention`` (5.x).

Legend: B batch, H query heads, K key and value heads, T tokens in this call, S tokens in the cache, D features per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from bdh_bench.models._growing import GrowingTensor

#: Queries that share one mask where a piece of text follows a past.
_QUERY_BLOCK = 128


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values (B, K, S, D) of one layer, in the form that transformers calls."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = GrowingTensor(2), GrowingTensor(2)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first piece brings shape, dtype and device."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self.key.append(key_states), self.value.append(value_states)  # (B, K, S, D) each

    def get_seq_length(self) -> int:
        return self.key.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.key.length + query_length, 0

    def get_max_length(self) -> int:
        return -1  # transformers' word for no limit


class KVCache:
    """The memory of an attention model; ``cache`` is what its transformers module is given."""

    def __init__(self, n_layer: int) -> None:
        self.layers = [_Layer() for _ in range(n_layer)]
        self.cache = Cache(layers=list(self.layers))

    def tensors(self) -> dict[str, Tensor]:
        """``layer0.key``, ``layer0.value``, …: views of the filled part; nothing before the first token."""
        found: dict[str, Tensor] = {}
        for name, part in self._parts().items():
            if (filled := part.filled) is not None:
                found[name] = filled
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over these tensors as the content; a name that is missing means an empty part."""
        for name, part in self._parts().items():
            part.load(tensors.get(name))

    def fork(self) -> KVCache:
        """An independent copy."""
        copy = KVCache(len(self.layers))
        copy.load({name: tensor.clone() for name, tensor in self.tensors().items()})
        return copy

    def _parts(self) -> dict[str, GrowingTensor]:
        both = ((i, layer) for i, layer in enumerate(self.layers))
        return {f"layer{i}.{kind}": getattr(layer, kind) for i, layer in both for kind in ("key", "value")}


def causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Queries (B, H, T, D) are the last T of the S positions of keys and values (B, K, S, D); returns (B, T, H, D)."""
    length, total = query.shape[2], key.shape[2]
    rest: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    if length == 1:
        # Heads that share keys become queries of one head, so that no key is repeated.
        packed = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])  # (B, K, H/K, D)
        mixed = scaled_dot_product_attention(packed, key, value, **rest).reshape(query.shape)
        return mixed.transpose(1, 2), None
    rest["enable_gqa"] = query.shape[1] != key.shape[1]
    if length == total:
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, **rest)
        return mixed.transpose(1, 2).contiguous(), None
    past, blocks = total - length, []
    for start in range(0, length, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, length)
        seen = past + stop
        rows = torch.arange(past + start, seen, device=query.device).unsqueeze(1)
        mask = torch.arange(seen, device=query.device) <= rows  # (block, seen)
        part = query[:, :, start:stop]
        blocks.append(scaled_dot_product_attention(part, key[:, :, :seen], value[:, :, :seen], attn_mask=mask, **rest))
    return torch.cat(blocks, 2).transpose(1, 2).contiguous(), None


def attention_name() -> str:
    """The name under which transformers finds ``causal_attention``; it builds no mask for a name it has none for."""
    name = "bdh_bench_causal"
    AttentionInterface.register(name, causal_attention)
    return name
