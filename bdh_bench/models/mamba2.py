"""Mamba-2: a selective state-space model whose decay is one number per head, so that its state can be large.

Question: what does a constant state reach when it is read and written by products of matrices?

Source: Dao & Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality"
(2024), and their mamba_ssm code for the initial values. Parameter names and shapes are those of transformers'
Mamba2ForCausalLM with tied embeddings (as in the published models), so its weights load as they are.

Kernels: the SSD algorithm in torch (kernels/ssd.py). Where mamba_ssm and causal_conv1d are installed beside a CUDA device, theirs
serve training and every piece of more than one token: that branch is not yet run on a GPU.

Legend: B batch, T tokens in this call, E inner channels (expand · d_model), H heads, P channels of a head, G groups of heads
that share B and C, N state size, K conv kernel, W = E + 2·G·N channels of the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdh_bench.errors import SpecError
from bdh_bench.kernels.ssd import ssd, ssd_step
from bdh_bench.models import _state_space as frame
from bdh_bench.models._state_space import wide

DEFAULTS = {
    "learning_rate": 4e-3,
    "position_limit": "none",
    "kind": "recurrent",
    "architecture": "state-space duality, one decay per head, short convolution, gated RMSNorm, no positions",
}

#: A target from which the state has the published 128 rows instead of 64, and heads of at most so many channels.
_LARGE = 15_000_000
_HEAD_DIM = 64
_CLOSE = 0.019
#: Tokens of a chunk of the authors' kernel; the result does not depend on it.
_CUDA_CHUNK = 256


@dataclass(frozen=True)
class Config:
    """Shape of the model.

    d_model      width D of the residual stream
    n_layer      layers
    state_size   rows of the state of a head
    conv_kernel  tokens under the short convolution; 1 is none, each token by itself
    expand       inner channels, as a multiple of the width
    head_dim     channels of a head; 0 stands for about an eighth of the inner channels, at most 64
    n_groups     groups of heads that share their keys and queries (B and C)
    vocab_size   tokens; 256 are the bytes
    """

    d_model: int = 72
    n_layer: int = 6
    state_size: int = 64
    conv_kernel: int = 4
    expand: int = 2
    head_dim: int = 0
    n_groups: int = 1
    vocab_size: int = 256

    @property
    def inner(self) -> int:
        return self.expand * self.d_model

    @property
    def width(self) -> int:
        """P: ``head_dim``, or the divisor of E nearest to an eighth of it or to 64 that leaves every group equally many heads."""
        if self.head_dim:
            return self.head_dim
        groups = self.inner // self.n_groups if self.inner % self.n_groups == 0 else self.inner
        wanted = min(_HEAD_DIM, self.inner / 8)
        return min((p for p in range(1, groups + 1) if groups % p == 0), key=lambda p: abs(math.log(p / wanted)))

    @property
    def heads(self) -> int:
        return self.inner // self.width

    @property
    def convolved(self) -> int:
        return self.inner + 2 * self.n_groups * self.state_size


def parameters(config: Config) -> int:
    """Closed form of the parameter count; the embedding is the output layer too and counts once."""
    d, e, h, w, k = config.d_model, config.inner, config.heads, config.convolved, config.conv_kernel
    mixer = d * (e + w + h) + w * (k + 1) + 3 * h + e + e * d
    return config.vocab_size * d + config.n_layer * (d + mixer) + d


def scaled(target: int, **pinned: Any) -> Iterator[Config]:
    """Shapes near ``target`` parameters, in the roundest widths that come close to it; pinned heads and groups stay whole."""
    base = Config(**{"state_size": 128 if target > _LARGE else 64, **pinned})
    whole = (base.head_dim or 1) * base.n_groups
    for unit in (32, 16, 8, 4, 2, 1):
        unit = math.lcm(unit, whole // math.gcd(whole, base.expand))
        found = list(frame.shapes(base, target, pinned, parameters, unit))
        yield from sorted(found, key=lambda c: abs(parameters(c) - target))
        if any(abs(parameters(c) - target) < _CLOSE * target for c in found):
            return  # heads of a round width are worth more than the last percent


def config_from_weights(tensors: Mapping[str, Tensor], pinned: Mapping[str, Any]) -> Config:
    """The Config that these weights have. Raises KeyError or ValueError for those of another family.

    ``n_groups`` is not in the tensors: one group unless it is given.
    """
    mixer = "backbone.layers.0.mixer."
    vocab, d = tensors["backbone.embeddings.weight"].shape
    inner, heads = tensors[mixer + "out_proj.weight"].shape[1], tensors[mixer + "A_log"].shape[0]
    convolved, _, kernel = tensors[mixer + "conv1d.weight"].shape
    groups = int(pinned.get("n_groups", 1))
    if tensors[mixer + "A_log"].ndim != 1 or inner % d or inner % heads or (convolved - inner) % (2 * groups):
        raise ValueError(
            f"{inner} inner channels, {heads} heads and {convolved} convolved channels do not fit together"
        )
    layers = {name.split(".")[2] for name in tensors if name.startswith("backbone.layers.")}
    state = (convolved - inner) // (2 * groups)
    found = _automatic(Config(d, len(layers), state, kernel, inner // d, inner // heads, groups, vocab))
    return frame.check_pinned(found, pinned, {"head_dim": inner // heads})


def _automatic(config: Config) -> Config:
    """The same with head_dim = 0 where the heads are the usual ones, so that equal shapes are equal Configs."""
    usual = replace(config, head_dim=0)
    return usual if usual.width == config.width else config


def to_transformers(model: Model) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and state_dict of the same model as transformers' Mamba2ForCausalLM."""
    c = model.config
    own = {"num_heads": c.heads, "head_dim": c.width, "n_groups": c.n_groups, "chunk_size": _CUDA_CHUNK}
    return frame.published_config(model, "Mamba2") | own, model.state_dict()


def config_from_transformers(config: Mapping[str, Any]) -> Config:
    """The Config of a config.json of Mamba2ForCausalLM. Raises ValueError for a model that this one cannot be."""
    defaults = {
        "hidden_size": 4096,
        "num_hidden_layers": 64,
        "vocab_size": 32768,
        "state_size": 128,
        "conv_kernel": 4,
        "expand": 2,
        "tie_word_embeddings": False,
    }
    shared = frame.shape_from_published(config, "Mamba2", defaults)
    low, high = config.get("time_step_limit", (0.0, math.inf))
    high = high.get("__float__") if isinstance(high, Mapping) else high  # how transformers writes infinity
    if low > 0 or str(high).lower() not in ("inf", "infinity"):
        raise ValueError(f"time_step_limit is {[low, high]}, this model can only be [0.0, inf]")
    found = Config(**shared, head_dim=int(config.get("head_dim", 64)), n_groups=int(config.get("n_groups", 8)))
    heads = int(config.get("num_heads", 128))
    if heads * found.head_dim != found.inner:
        raise ValueError(
            f"num_heads is {heads}, {found.inner} channels in heads of {found.head_dim} need another number"
        )
    return _automatic(found)


class Model(frame.StateSpaceModel):
    """The frame of both Mambas with this mixer."""

    def __init__(self, config: Config) -> None:
        frame.check_least("mamba2", config, {"head_dim": 0})
        if config.inner % config.width or config.heads % config.n_groups:
            raise SpecError(
                f"got {config.inner} inner channels in heads of {config.width} and {config.n_groups} groups for mamba2 · "
                "expected whole heads, equally many in each group",
                "choose head_dim as a divisor of expand·d_model / n_groups",
            )
        super().__init__(config, partial(Mixer, config))
        self.config = config

    def state_bytes(self, batch_size: int, context: int) -> int:
        """The same at every context."""
        c = self.config
        itemsize = frame.wide_dtype(self.backbone.embeddings.weight.dtype).itemsize
        return batch_size * c.n_layer * (c.convolved * (c.conv_kernel - 1) + c.inner * c.state_size) * itemsize

    def flops_per_token(self, context: int, mode: str = "recurrent") -> float:
        """The same at every context; every mode is counted as the recurrence.

        Per layer: two projections, the convolution, and per state element Δx·B (1), update and output (2 each).
        """
        c = self.config
        d, e, w = c.d_model, c.inner, c.convolved
        projections = d * (e + w + c.heads) + e * d
        return float(
            c.n_layer * (2 * projections + 2 * c.conv_kernel * w + 5 * e * c.state_size + 6 * e) + 2 * c.vocab_size * d
        )

    def kernels(self) -> str:
        """Which kernel does the recurrence on this model's device."""
        device = self.backbone.embeddings.weight.device.type
        return "mamba-ssm" if _cuda_kernels(device, self.config.conv_kernel) else "torch SSD"


class Mixer(frame.Mixer):
    """One projection for gate, x, B, C and Δ; convolution, recurrence, gated norm, and a projection back."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d, e, h, w, k = config.d_model, config.inner, config.heads, config.convolved, config.conv_kernel
        self.split = (e, w, h)
        self.groups, self.width, self.size = config.n_groups, config.width, config.state_size
        self.in_proj = nn.Linear(d, e + w + h, bias=False)
        self.conv1d = nn.Conv1d(w, w, k, groups=w, padding=k - 1)
        self.dt_bias = nn.Parameter(frame.step_bias(h))
        self.A_log = nn.Parameter(torch.empty(h).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(h))
        self.norm = GatedNorm(e, config.n_groups)
        self.out_proj = nn.Linear(e, d, bias=False)
        with torch.no_grad():
            self.out_proj.weight.div_(math.sqrt(config.n_layer))

    def remembered(self) -> dict[str, tuple[int, ...]]:
        convolved = self.split[1]
        return {"conv": (convolved, self.conv1d.kernel_size[0] - 1), "ssm": (self.split[2], self.width, self.size)}

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D), from an empty state."""
        gate, raw, step = self.in_proj(x).split(self.split, -1)
        return self._out(self._mixed(raw, step, None, None)[0], gate)

    def advance(self, x: Tensor, conv: Tensor, ssm: Tensor, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
        gate, raw, step = self.in_proj(x).split(self.split, -1)
        if raw.shape[1] > 1:
            y, last = self._mixed(raw, step, conv, ssm)
        else:
            x1, delta, A, B, C, D = self._selected(raw, step, conv)
            row, last = ssd_step(x1[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, ssm)
            y = row.unsqueeze(1)
        return self._out(y, gate), frame.last_inputs(raw, conv), last

    def _mixed(self, raw: Tensor, step: Tensor, conv: Tensor | None, ssm: Tensor | None) -> tuple[Tensor, Tensor]:
        """The recurrence over a text: outputs (B, T, H, P) and the state after it."""
        selected = self._selected(raw, step, conv)
        if fused := _cuda_kernels(raw.device.type, self.conv1d.kernel_size[0]):
            x, delta, A, B, C, D = selected
            options = {"D": D, "initial_states": ssm, "return_final_states": True}
            y, last = fused[1](x, delta, A, B, C, _CUDA_CHUNK, **options)
            return y, last.float()
        return ssd(*selected, ssm)

    def _selected(
        self, raw: Tensor, step: Tensor, conv: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, H, P), Δ (B, T, H), A (H), B and C (B, T, G, N), D (H)."""
        rows = self.groups * self.size
        x, B, C = self._convolved(raw, conv).split((self.split[0], rows, rows), -1)
        delta = F.softplus(wide(step) + wide(self.dt_bias))
        A = -torch.exp(wide(self.A_log))
        B, C = (t.unflatten(2, (self.groups, self.size)) for t in (B, C))
        return x.unflatten(2, (-1, self.width)), delta, A, B, C, self.D

    def _convolved(self, raw: Tensor, conv: Tensor | None) -> Tensor:
        """(B, T, W) → (B, T, W)."""
        fused = _cuda_kernels(raw.device.type, self.conv1d.kernel_size[0])
        if not fused:
            return frame.convolve(raw, self.conv1d, conv)
        window = raw.transpose(1, 2) if conv is None else torch.cat((conv.to(raw.dtype), raw.transpose(1, 2)), 2)
        out: Tensor = fused[0](window, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu")  # (B, W, T)
        return out[:, :, -raw.shape[1] :].transpose(1, 2)

    def _out(self, y: Tensor, gate: Tensor) -> Tensor:
        """Outputs (B, T, H, P) and gate (B, T, E) → (B, T, D)."""
        normed = self.norm(wide(y).flatten(2), wide(gate))
        return self.out_proj(normed.to(self.out_proj.weight.dtype))  # type: ignore[no-any-return]


class GatedNorm(nn.Module):
    """RMSNorm of y · silu(gate) in every group of channels by itself."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        gated = (y * F.silu(gate)).unflatten(-1, (self.groups, -1))
        normed: Tensor = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + frame.EPS)
        return normed.flatten(-2) * self.weight


def _cuda_kernels(device: str, conv_kernel: int) -> tuple[Any, Any] | None:
    return frame.cuda_kernels(device, "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", conv_kernel)
