"""Causal linear attention with a positive feature map and a normaliser: what a softmax layer becomes when only its kernel is exchanged.

    φ(x) = elu(x) + 1        a_t = Σ_{s≤t} (φ(q_t)·φ(k_s)) v_s  /  Σ_{s≤t} φ(q_t)·φ(k_s)

A column of ones beside the values makes the normaliser one more feature, so that the state of a head is one matrix,
S = Σ φ(k_s)ᵀ [v_s 1] of D × (D + 1). Text is read in chunks: what lies in the chunk by its C×C products, all before it by S.
No 1/√D scales the products: it would cancel.

Source: Katharopoulos et al., arXiv 2006.16236, equations 7, 9 and 18.

Legend: B batch, H query heads, K key and value heads, G = H/K queries that share a key, T tokens, C chunk, D features per head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: Tokens whose products are made at once.
_CHUNK = 64


def feature_attention(query: Tensor, key: Tensor, value: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (B, H, T, D), keys and values (B, K, T, D), state (B, K, D, D + 1) → reads (B, H, T, D) and the new state.

    Differentiable; the state is replaced, never written into. Sums run in the dtype of the state.
    """
    batch, heads, length, width = query.shape
    shared = key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        q = _features(query.to(state.dtype)).view(batch, shared, -1, length, width)  # (B, K, G, T, D)
        k = _features(key.to(state.dtype))
        v = F.pad(value.to(state.dtype), (0, 1), value=1.0)  # (B, K, T, D + 1)
        reads = []
        for start in range(0, length, _CHUNK):
            piece = slice(start, start + _CHUNK)
            keys, values, asked = k[:, :, piece], v[:, :, piece], q[:, :, :, piece]
            scores = (asked @ keys.mT.unsqueeze(2)).tril()  # (B, K, G, C, C)
            reads.append(scores @ values.unsqueeze(2) + asked @ state.unsqueeze(2))
            state = state + keys.mT @ values
        sums = torch.cat(reads, 3).reshape(batch, heads, length, width + 1)
        mixed, normaliser = sums.split((width, 1), -1)
    return (mixed / normaliser).to(query.dtype), state


def _features(x: Tensor) -> Tensor:
    return F.elu(x) + 1
