"""How does an attention model remember a stream without copying it at every token?

A cache behind transformers' unified ``Cache``: room grows geometrically and a token is written in place, so that reading
one token costs the attention over the past and nothing else that grows with it. transformers' own ``DynamicCache``
concatenates, which copies the whole past once per token and layer. With gradients on, an in-place write would damage
the graph; pieces are then concatenated, and gradients flow through the carried state.

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

#: Smallest room, and how fast it grows: at most a third of a large room is unused, and a token is moved twice on average.
_FIRST_ROOM = 64
_GROWTH = 1.5

#: Queries that share one mask where a piece of text follows a past.
_QUERY_BLOCK = 128


class GrowingTensor:
    """A tensor that gets longer along one dimension; ``filled`` is the part in use, a view of the reserved buffer."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.length = 0
        self._buffer: Tensor | None = None

    @property
    def filled(self) -> Tensor | None:
        """The part in use; None before anything was read."""
        return None if self._buffer is None else self._buffer.narrow(self.dim, 0, self.length)

    def load(self, tensor: Tensor | None) -> None:
        """Take over ``tensor`` as the content. Room behind a view of the own buffer is kept (``detach`` hands one back)."""
        if tensor is None:
            self._buffer, self.length = None, 0
            return
        own = self._buffer
        same = own is not None and own.data_ptr() == tensor.data_ptr() and own.stride() == tensor.stride()
        self.length = tensor.shape[self.dim]
        self._buffer = own.detach() if same and own is not None and not tensor.requires_grad else tensor

    def append(self, piece: Tensor) -> Tensor:
        """Add ``piece`` behind the content; returns all of it. In place where gradients are off."""
        filled, before = self.filled, self.length
        self.length += piece.shape[self.dim]
        if torch.is_grad_enabled():
            # A clone for the first piece too: it may be a view into the projection of queries, keys and values.
            first = piece.clone(memory_format=torch.contiguous_format)
            self._buffer = first if filled is None else torch.cat((filled, piece), self.dim)
            return self._buffer
        if self._buffer is None or self._must_move(self._buffer):
            self._buffer = self._larger(filled, piece)
        self._buffer.narrow(self.dim, before, piece.shape[self.dim]).copy_(piece)
        return self._buffer.narrow(self.dim, 0, self.length)

    def _must_move(self, buffer: Tensor) -> bool:
        # A tensor born in inference mode cannot be written outside of it, nor one that a graph still holds.
        foreign = buffer.is_inference() and not torch.is_inference_mode_enabled()
        return self.length > buffer.shape[self.dim] or foreign or buffer.requires_grad

    def _larger(self, filled: Tensor | None, piece: Tensor) -> Tensor:
        shape = list(piece.shape)
        reserved = 0 if self._buffer is None else self._buffer.shape[self.dim]
        shape[self.dim] = max(self.length, _FIRST_ROOM, int(reserved * _GROWTH))
        buffer = torch.empty(shape, dtype=piece.dtype, device=piece.device)
        if filled is not None:
            buffer.narrow(self.dim, 0, filled.shape[self.dim]).copy_(filled)
        return buffer


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
