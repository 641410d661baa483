"""What stands around a memory in a modern language model, so that two models differ in their memory and in nothing else?

The block of ``llama``: RMS norm, a mixer, a residual, RMS norm, SwiGLU, a residual; one table for input and output; no biases;
matrices from N(0, 0.02²). The mixer is the model's own: called with the normed text and what it remembers, it returns its
output and what it remembers now.

Source: Shazeer, "GLU Variants Improve Transformer" (2020) for SwiGLU; Zhang & Sennrich (2019) for the RMS norm; depths and MLP
widths as in llama.py.

Legend: B batch, T tokens, V vocabulary, D width, F width of the MLP, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdh_bench.session import TensorMemory
from bdh_bench.types import Keep

#: Parameters up to which a depth is the natural one, as in llama.py; beyond the last, 24.
_DEPTHS = ((5e5, 4), (2e6, 5), (5e6, 6), (1.5e7, 7), (3e7, 8), (7e7, 10), (2e8, 12))


class Mixer(nn.Module):
    """What a block is built around; ``kept`` names what it remembers."""

    kept: tuple[str, ...]

    def empty(self, batch_size: int) -> dict[str, Tensor]:
        """Zeros for everything in ``kept``."""
        raise NotImplementedError


class Stack(nn.Module):
    """Embedding, blocks, norm, and the embedding again as output layer."""

    def __init__(self, vocabulary: int, width: int, layers: int, mixer: Callable[[], Mixer]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(mixer(), width) for _ in range(layers))
        self.norm = RMSNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, memory: TensorMemory, keep: Keep, *given: Any) -> Tensor:
        """Tokens (B, T) → logits (B, T, V) or (B, 1, V); ``given`` is what every mixer takes beside the text and its memory.

        The memory's tensors are replaced, never written into, so that autograd may pass through; an empty one is filled.
        """
        x = self.embedding(tokens)  # (B, T, D)
        for i, block in enumerate(cast(list[Block], self.blocks)):
            names = [name for name in block.mixer.kept if f"{name}.{i}" in memory]
            x, past = block(x, {name: memory[f"{name}.{i}"] for name in names}, *given)
            memory.update((f"{name}.{i}", kept) for name, kept in past.items())
        x = self.norm(x if keep == "all" else x[:, -1:])
        return F.linear(x, self.embedding.weight)

    def memory(self, batch_size: int) -> TensorMemory:
        """The mixers' empty memories, ``name.i`` for ``name`` in block i."""
        mixers = [block.mixer for block in cast(list[Block], self.blocks)]
        return TensorMemory(
            (f"{name}.{i}", kept) for i, mixer in enumerate(mixers) for name, kept in mixer.empty(batch_size).items()
        )


class Block(nn.Module):
    """Mixer and SwiGLU, each normed before and added after."""

    def __init__(self, mixer: Mixer, width: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(width)
        self.mixer: Mixer = mixer
        self.mlp_norm = RMSNorm(width)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, past: dict[str, Tensor], *given: Any) -> tuple[Tensor, dict[str, Tensor]]:
        mixed, past = self.mixer(self.mixer_norm(x), past, *given)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), past


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · weight, computed in float32 or wider, in the dtype of x."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        fine = wide(x)
        return F.rms_norm(fine, self.weight.shape, self.weight.to(fine.dtype), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate x) ⊙ up x); gate and up are one matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * mlp_width(width), bias=False)
        self.down = nn.Linear(mlp_width(width), width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


def mlp_width(width: int) -> int:
    """F: 8/3·D to the nearest multiple of 8, so that SwiGLU's three matrices weigh as much as two of width 4·D."""
    return max(8, 8 * round(width / 3))


def surroundings(vocabulary: int, width: int, layers: int) -> int:
    """Parameters of a Stack without its mixers: V·D + D + L·(3·D·F + 2·D)."""
    return vocabulary * width + width + layers * (3 * width * mlp_width(width) + 2 * width)


def surrounding_flops(vocabulary: int, width: int, layers: int) -> int:
    """Operations per token of a Stack's matrices without its mixers."""
    return 2 * (vocabulary * width + layers * 3 * width * mlp_width(width))


def depths(target: int, pinned: bool) -> list[int]:
    """The natural depth for so many parameters, then its neighbours; all others too where options are pinned."""
    natural = next((depth for limit, depth in _DEPTHS if target <= limit), 24)
    reach = 36 if pinned else max(1, natural // 6)
    return sorted(range(max(1, natural - reach), natural + reach + 1), key=lambda n: abs(n - natural))


def width_near(target: int, count: Callable[[int], int]) -> int:
    """The roundest width that is close to ``target``, else the nearest, for a count that grows with the width."""
    low, high = bracket(target, count)
    for step in (16, 8, 4, 2):
        below = max(step, low // step * step)
        best = min((below, below + step), key=lambda width: abs(count(width) - target))
        if close(count(best), target):
            return best
    return min((low, high), key=lambda width: abs(count(width) - target))


def close(count: int, target: int) -> bool:
    """Whether a natural shape is worth more than what is left to the target; sizes allow 2 %."""
    return abs(count - target) <= 0.019 * target


def bracket(target: int, count: Callable[[int], int]) -> tuple[int, int]:
    """The two whole numbers next to each other, at least 1, whose counts lie on both sides of ``target``."""
    low, high = 1, 2
    while count(high) <= target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= target else (low, middle)
    return low, high


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(wide_dtype(x.dtype))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of states and norms."""
    return torch.promote_types(dtype, torch.float32)
