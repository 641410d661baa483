"""The delta rule in BDH's memory (ours, not the paper's): a token writes only what the memory did not already answer.

    a_t = q_t S        S ← S + q_tᵀ (x_t − a_t)        q_t = key / ‖key‖

Because BDH reads before it writes, the read is itself the correction. Over a chunk with state S₀ the answers solve a unit
lower triangular system, U = X − A:

    (I + strict_lower(Q Qᵀ)) U = X − Q S₀        A = X − U        S = S₀ + Qᵀ U

Source: the chunked form follows from the recurrence; compare DeltaNet (arXiv 2406.06484), which reads after it writes.

Legend: B batch, H heads, T tokens, C chunk, N neurons per head, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bdh_bench.kernels.bdh_pass import chunks


def delta_rule(query: Tensor, values: Tensor, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Rotated keys (B, H, T, N), values (B, T, D), state (B, H, N, D) → reads (B, H, T, D) and the new state.

    Differentiable; the solves run in float32 or wider.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    unit = F.normalize(query.to(dtype), dim=-1)
    wide = values.to(dtype).unsqueeze(1)  # (B, 1, T, D)
    running, reads = state.to(dtype), []
    with torch.autocast(query.device.type, enabled=False):
        for part in chunks(query.shape[2], chunk):
            keys, value = unit[:, :, part], wide[:, :, part]
            system = (keys @ keys.mT).tril(-1)
            written = torch.linalg.solve_triangular(system, value - keys @ running, upper=False, unitriangular=True)
            reads.append(value - written)
            running = running + keys.mT @ written
    return torch.cat(reads, 2).to(query.dtype), running.to(state.dtype)
