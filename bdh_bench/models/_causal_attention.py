"""Which keys does a query read, and how, when a piece of text follows a cached past?

transformers builds a mask (B, 1, T, past + T) for a prompt that is read in pieces; here a mask covers one block of queries at a time and is
shared by rows, heads and features. With a window a query reads itself and the W − 1 tokens before it, and a block only the keys that
one of its queries reads; the first K tokens, the sinks, are read by all.

Keys and values are the tokens that the cache still has, in order, with the piece at their end. What a window has dropped lies between the
sinks and the rest, so distances are counted from the end, and a key among the first K is a sink whatever its distance.

Source: ``transformers.integrations.sdpa_attention`` (5.x); sinks as in StreamingLLM (arXiv 2309.17453), but see ``llama`` for positions.

Legend: B batch, H query heads, K key and value heads, T tokens in this call, S tokens that can be read, D features per head.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from bdh_bench.kernels.quantise import Codes, read_codes

#: Queries that share one mask where a piece of text follows a past.
_QUERY_BLOCK = 128


def causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | Codes,
    value: Tensor | Codes,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    window: int = 0,
    sinks: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Queries (B, H, T, D) are the last T of the S tokens of keys and values (B, K, S, D); returns (B, T, H, D).

    A single query reads all keys: a cache with a window holds no others. It alone may be given codes.
    """
    if isinstance(key, Codes):
        assert isinstance(value, Codes)
        packed = query.reshape(query.shape[0], key.codes.shape[1], -1, query.shape[3])  # (B, K, H/K, D)
        mixed = read_codes(packed, key, value, scaling or query.shape[3] ** -0.5)
        return mixed.reshape(query.shape).transpose(1, 2), None
    assert isinstance(value, Tensor)
    length, total = query.shape[2], key.shape[2]
    rest: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    if length == 1:
        # Heads that share keys become queries of one head, so that no key is repeated.
        packed = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])  # (B, K, H/K, D)
        mixed = scaled_dot_product_attention(packed, key, value, **rest).reshape(query.shape)
        return mixed.transpose(1, 2), None
    rest["enable_gqa"] = query.shape[1] != key.shape[1]
    if length == total and (not window or total <= window):
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, **rest)
        return mixed.transpose(1, 2).contiguous(), None
    past, blocks = total - length, []
    for start in range(0, length, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, length)
        rows = torch.arange(past + start, past + stop, device=query.device).unsqueeze(1)
        first = max(0, past + start - window + 1) if window else 0
        near, columns = slice(first, past + stop), torch.arange(first, past + stop, device=query.device)
        keys, values = key[:, :, near], value[:, :, near]
        if ahead := min(sinks, first):  # sinks that are not among the near keys
            keys, values = (torch.cat((t[:, :, :ahead], n), 2) for t, n in ((key, keys), (value, values)))
            columns = torch.cat((torch.arange(ahead, device=query.device), columns))
        mask = columns <= rows  # (block, keys)
        if window:
            mask &= (rows - columns < window) | (columns < sinks)
        part = query[:, :, start:stop]
        blocks.append(scaled_dot_product_attention(part, keys, values, attn_mask=mask, **rest))
    return torch.cat(blocks, 2).transpose(1, 2).contiguous(), None


def attention_name(window: int = 0, sinks: int = 0) -> str:
    """The name under which transformers finds ``causal_attention``; it builds no mask for a name it has none for."""
    name = "bdh_bench_causal" + (f"_{window}_{sinks}" if window else "")
    AttentionInterface.register(name, partial(causal_attention, window=window, sinks=sinks))
    return name
