"""Is BDH's memory a graph whose edges learn while it reads? The explicit n×n form, for small n, beside the low-rank one.

Source: arXiv 2509.26507, the paper's form on n neurons, without layer norm. Per token t and layer l, with y_0(t) given and x_0 = 0:

    x_l = x_{l−1} + relu(Dx · E y_{l−1})
    a_l = Σ_{τ<t} v(τ) <x_l(τ), U^{t−τ} x_l(t)>       v = E y_{l−1}
    y_l = relu(Dy · a_l) ⊙ x_l

What travels along which edge. Neurons are nodes, and there are two kinds of edges.

* Fixed edges, the model's weights: Dx·E and Dy·E, n×n of rank d. What fires at neuron j in layer l−1 reaches neuron i over edge
  (Dx·E)[i, j] and adds to x there.
* Synapses, the memory: σ[k, j], one per pair of neurons, empty before the first token. Reading: x_j travels over σ[k, j] to
  k, and from k over the fixed edge (Dy·E)[i, k] to i, where x_i gates it. Writing, after reading: neurons that fire together
  strengthen their edge, σ[k, j] += y_k x_j. Ageing, before the next token: σ ← σ U.

E is linear, so the low-rank memory ρ (d, n) is E σ at every token, for every U; width d only compresses the graph. For a diagonal U
(decay) each synapse ages by itself, the case in which the paper proves equivalence. RoPE rotates pairs of
columns: the identity still holds to rounding, but a synapse then needs the value of its neighbour (k, j±1), and may become negative.

Layer norm (``norms``, no parameters) at three places: of the ``drive`` of x and of the ``read`` it leaves ρ = E σ whole, although each
message then depends on all neurons. Of the ``value``, as in the paper's own LN(E y), it breaks it: a write is divided by the deviation
of E y, which no synapse sees. With that factor put into the write and the mean taken out of E, the identity returns (``rescaled``).
The published form also keeps its residual in d, where no neuron-space σ is defined.

Legend: T tokens, L layers, n neurons, d width.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

_EPS = 1e-5
NORMS = frozenset({"drive", "read", "value"})


@dataclass(frozen=True)
class Weights:
    """One set for all layers: E (d, n), Dx and Dy (n, d), and U (n, n), which ages the memory from one token to the next."""

    E: Tensor
    Dx: Tensor
    Dy: Tensor
    U: Tensor


@dataclass(frozen=True)
class Trace:
    """All that happened, in float64: ``x`` (T, L, n); ``y`` (T, L + 1, n), beginning with the input; ``reads`` (T, L, d).

    ``memory`` (T, L, d, n) is ρ, or (T, L, n, n) σ, after the write of each token and before it ages.
    """

    x: Tensor
    y: Tensor
    reads: Tensor
    memory: Tensor


def random_weights(n: int, d: int, U: Tensor, seed: int) -> Weights:
    """Normal weights; activations are near 1 in the first layer and, for want of layer norm, grow with depth and tokens."""
    generator = torch.Generator().manual_seed(seed)
    E, Dx, Dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((d, n), (n, d), (n, d)))
    return Weights(E / n**0.5, Dx / d**0.5, Dy / (d**0.5 * n), U)  # a read sums products of n activations


def decay(n: int, slowest: float = 0.99, fastest: float = 0.8) -> Tensor:
    """A diagonal U (n, n): every neuron forgets at a rate of its own."""
    return torch.linspace(slowest, fastest, n, dtype=torch.float64).diag()


def rotation(n: int, theta: float = 2.0**16) -> Tensor:
    """RoPE as U (n, n): 2×2 blocks that turn neurons 2k and 2k + 1 by θ^(−2k/n) radians per token. ``n`` is even."""
    angles = theta ** (-torch.arange(0, n, 2, dtype=torch.float64) / n)
    turn = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), -1).view(-1, 2, 2)
    return torch.block_diag(*turn)  # type: ignore[no-any-return]


def low_rank(w: Weights, inputs: Tensor, layers: int, norms: Set[str] = frozenset()) -> Trace:
    """Read y_0 (T, n) with a memory ρ (d, n) per layer: the form that runs on a GPU."""
    memory = inputs.new_zeros(layers, *w.E.shape)
    steps = []
    for y in inputs:
        x, xs, ys, reads = torch.zeros_like(y), [], [y], []
        for layer in range(layers):
            x = x + torch.relu(w.Dx @ _normed(w.E @ ys[-1], "drive" in norms))
            read = memory[layer] @ x  # (d,)
            memory[layer] += torch.outer(_normed(w.E @ ys[-1], "value" in norms), x)
            ys.append(torch.relu(w.Dy @ _normed(read, "read" in norms)) * x)
            xs.append(x)
            reads.append(read)
        steps.append((torch.stack(xs), torch.stack(ys), torch.stack(reads), memory.clone()))
        memory = memory @ w.U
    return Trace(*(torch.stack(part) for part in zip(*steps, strict=True)))


def graph(w: Weights, inputs: Tensor, layers: int) -> Trace:
    """Read y_0 (T, n) by messages along edges, without layer norm: nothing but n×n graphs; d is looked at for the record only."""
    to_x, to_y = w.Dx @ w.E, w.Dy @ w.E  # the fixed edges
    synapses = inputs.new_zeros(layers, *to_x.shape)
    steps = []
    for y in inputs:
        x, xs, ys, reads = torch.zeros_like(y), [], [y], []
        for layer in range(layers):
            x = x + torch.relu(to_x @ ys[-1])
            arrived = synapses[layer] @ x  # (n,)
            synapses[layer] += torch.outer(ys[-1], x)
            ys.append(torch.relu(to_y @ arrived) * x)
            xs.append(x)
            reads.append(w.E @ arrived)
        steps.append((torch.stack(xs), torch.stack(ys), torch.stack(reads), synapses.clone()))
        synapses = synapses @ w.U
    return Trace(*(torch.stack(part) for part in zip(*steps, strict=True)))


def synapses_of(w: Weights, trace: Trace, rescaled: bool = False) -> Tensor:
    """σ (T, L, n, n) that the neurons of ``trace`` leave behind; ``rescaled`` divides each write by the deviation of E y."""
    fired = trace.y[:, :-1]  # (T, L, n)
    if rescaled:
        fired = fired / (fired @ w.E.mT).var(-1, correction=0, keepdim=True).add(_EPS).sqrt()
    synapses, kept = torch.zeros_like(w.U), []
    for y, x in zip(fired, trace.x, strict=True):
        synapses = synapses @ w.U + y.unsqueeze(-1) * x.unsqueeze(-2)  # (L, n, n)
        kept.append(synapses)
    return torch.stack(kept)


def centred(E: Tensor) -> Tensor:
    """E (d, n) without the mean over d of each column: what layer norm's subtraction makes of it."""
    return E - E.mean(0)


def _normed(v: Tensor, really: bool) -> Tensor:
    return torch.nn.functional.layer_norm(v, v.shape, eps=_EPS) if really else v
