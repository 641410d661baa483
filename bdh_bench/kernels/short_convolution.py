"""A causal convolution over the last few tokens, each channel on its own, with the inputs that it still needs carried along: how?

    y_t = Σ_j kernel_j ⊙ x_{t-K+1+j}        j = 0 … K−1

Written as a sum of K shifted inputs: on a CPU a grouped convolution takes a multiple of that time and two transposed copies.
The gradient is written out because autograd's own makes a padded tensor of zeros per shift.

Legend: B batch, T tokens, E channels, K kernel length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def short_convolution(x: Tensor, kernel: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y (B, T, E) in the dtype of x, and the last K − 1 inputs (B, K − 1, E) in that of ``before``.

    x (B, T, E), kernel (E, K), before (B, K − 1, E) or None for zeros.
    """
    kept = kernel.shape[1] - 1
    padded = F.pad(x, (0, 0, kept, 0)) if before is None else torch.cat((before.to(x.dtype), x), 1)
    y: Tensor = _ShiftedSum.apply(padded, kernel.t().to(x.dtype))  # type: ignore[no-untyped-call]
    after = padded[:, padded.shape[1] - kept :].clone()  # a copy: a view would keep all of the text alive
    return y, after if before is None else after.to(before.dtype)


class _ShiftedSum(torch.autograd.Function):
    """padded (B, K − 1 + T, E), kernel (K, E) → (B, T, E)."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(padded, kernel)
        length = padded.shape[1] - len(kernel) + 1
        total = padded[:, :length] * kernel[0]
        for j in range(1, len(kernel)):
            total.addcmul_(padded[:, j : j + length], kernel[j])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor]:
        padded, kernel = ctx.saved_tensors
        length = d_y.shape[1]
        d_padded, d_kernel = torch.zeros_like(padded), torch.empty_like(kernel)
        for j in range(len(kernel)):
            d_padded[:, j : j + length].addcmul_(d_y, kernel[j])
            d_kernel[j] = (d_y * padded[:, j : j + length]).sum((0, 1))
        return d_padded, d_kernel
