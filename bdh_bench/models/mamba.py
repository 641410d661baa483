"""Mamba-1: a selective state-space model with constant state.

Question: what does a recurrence chosen by the input reach with a state of fixed size?

Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), and their mamba_ssm code for
the initial values. Parameter names and shapes are those of transformers' MambaForCausalLM, so its weights load as they
are. As there, the output layer is the embedding; a ``lm_head.weight`` in a state_dict must be the same tensor.

Kernels: the selective scan in torch (kernels/selective_scan.py). Where mamba_ssm and causal_conv1d are installed beside a
CUDA device, theirs serve training and the first prefill: that branch is not yet run on a GPU.

Legend: B batch, T tokens in this call, V vocabulary, E inner channels (expand · d_model), N state size, K conv kernel,
R rank of Δ.
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

from bdh_bench.kernels.selective_scan import selective_scan, selective_scan_step
from bdh_bench.models import _state_space as frame
from bdh_bench.models._state_space import wide

DEFAULTS = {
    "learning_rate": 4e-3,
    "position_limit": "none",
    "kind": "recurrent",
    "architecture": "selective scan, short convolution, RMSNorm before each block, gated SiLU, no positions",
}


@dataclass(frozen=True)
class Config:
    """Shape of the model.

    d_model      width D of the residual stream
    n_layer      layers
    state_size   numbers of state per inner channel
    conv_kernel  tokens under the short convolution; 1 is none, each token by itself
    expand       inner channels, as a multiple of the width
    dt_rank      rank of the projection to step sizes; 0 stands for ceil(d_model / 16)
    vocab_size   tokens; 256 are the bytes
    """

    d_model: int = 72
    n_layer: int = 6
    state_size: int = 16
    conv_kernel: int = 4
    expand: int = 2
    dt_rank: int = 0
    vocab_size: int = 256

    @property
    def inner(self) -> int:
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        return self.dt_rank or math.ceil(self.d_model / 16)


def parameters(config: Config) -> int:
    """Closed form of the parameter count; the embedding is the output layer too and counts once."""
    d, e, n, k, r = config.d_model, config.inner, config.state_size, config.conv_kernel, config.rank
    projections = d * 2 * e + e * (r + 2 * n) + (r + 1) * e + e * d
    return config.vocab_size * d + config.n_layer * (d + projections + e * (k + 1) + e * n + e) + d


def scaled(target: int, **pinned: Any) -> Iterator[Config]:
    """Shapes near ``target`` parameters."""
    return frame.shapes(Config(**pinned), target, pinned, parameters)


def config_from_weights(tensors: Mapping[str, Tensor], pinned: Mapping[str, Any]) -> Config:
    """The Config that these weights have. Raises KeyError or ValueError for those of another family."""
    mixer = "backbone.layers.0.mixer."
    vocab, d = tensors["backbone.embeddings.weight"].shape
    inner, state = tensors[mixer + "A_log"].shape
    if inner % d:
        raise ValueError(f"{inner} inner channels are no multiple of d_model {d}")
    layers = {name.split(".")[2] for name in tensors if name.startswith("backbone.layers.")}
    rank, kernel = tensors[mixer + "dt_proj.weight"].shape[1], tensors[mixer + "conv1d.weight"].shape[2]
    found = _automatic(Config(d, len(layers), state, kernel, inner // d, rank, vocab))
    return frame.check_pinned(found, pinned, {"dt_rank": rank})


def _automatic(config: Config) -> Config:
    """The same with dt_rank = 0 where the rank is the usual one, so that equal shapes are equal Configs."""
    usual = replace(config, dt_rank=0)
    return usual if usual.rank == config.rank else config


def to_transformers(model: Model) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and state_dict of the same model as transformers' MambaForCausalLM."""
    return frame.published_config(model, "Mamba") | {"time_step_rank": model.config.rank}, model.state_dict()


def config_from_transformers(config: Mapping[str, Any]) -> Config:
    """The Config of a config.json of MambaForCausalLM. Raises ValueError for a model that this one cannot be."""
    defaults = {
        "hidden_size": 768,
        "num_hidden_layers": 32,
        "vocab_size": 50280,
        "state_size": 16,
        "conv_kernel": 4,
        "expand": 2,
        "tie_word_embeddings": True,
    }
    rank = config.get("time_step_rank", "auto")
    shared = frame.shape_from_published(config, "Mamba", defaults)
    return _automatic(Config(**shared, dt_rank=0 if rank == "auto" else int(rank)))


class Model(frame.StateSpaceModel):
    """The frame of both Mambas with this mixer."""

    def __init__(self, config: Config) -> None:
        frame.check_least("mamba", config, {"dt_rank": 0})
        super().__init__(config, partial(Mixer, config))
        self.config = config

    def state_bytes(self, batch_size: int, context: int) -> int:
        """The same at every context."""
        c = self.config
        itemsize = frame.wide_dtype(self.backbone.embeddings.weight.dtype).itemsize
        return batch_size * c.n_layer * c.inner * (c.conv_kernel - 1 + c.state_size) * itemsize

    def flops_per_token(self, context: int, mode: str = "recurrent") -> float:
        """The same at every context and in every mode.

        Per layer: four projections, the convolution, and per state element Δ·A, exp, Δu·B (1 each), update and output
        (2 each).
        """
        c = self.config
        d, e, r, n = c.d_model, c.inner, c.rank, c.state_size
        projections = d * 2 * e + e * (r + 2 * n) + r * e + e * d
        return float(c.n_layer * (2 * projections + 2 * c.conv_kernel * e + 7 * e * n + 3 * e) + 2 * c.vocab_size * d)

    def kernels(self) -> str:
        """Which kernel does the scan on this model's device."""
        device = self.backbone.embeddings.weight.device.type
        return "mamba-ssm" if _cuda_kernels(device, self.config.conv_kernel) else "torch selective scan"


class Mixer(frame.Mixer):
    """Convolution, selective scan and gate between two projections (the paper's figure 3)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d, e, n, r, k = config.d_model, config.inner, config.state_size, config.rank, config.conv_kernel
        self.split = (r, n, n)
        self.in_proj = nn.Linear(d, 2 * e, bias=False)
        self.conv1d = nn.Conv1d(e, e, k, groups=e, padding=k - 1)
        self.x_proj = nn.Linear(e, r + 2 * n, bias=False)
        self.dt_proj = nn.Linear(r, e)
        self.A_log = nn.Parameter(torch.arange(1, n + 1).float().log().repeat(e, 1))
        self.A_log._no_weight_decay = True  # type: ignore[attr-defined]  # as published: decay would pull every rate to 1
        self.D = nn.Parameter(torch.ones(e))
        self.out_proj = nn.Linear(e, d, bias=False)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(r**-0.5), r**-0.5)
            self.dt_proj.bias.copy_(frame.step_bias(e))
            self.out_proj.weight.div_(math.sqrt(config.n_layer))

    def remembered(self) -> dict[str, tuple[int, ...]]:
        channels, size = self.A_log.shape
        return {"conv": (channels, self.conv1d.kernel_size[0] - 1), "ssm": (channels, size)}

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D), from an empty state."""
        u, gate = self.in_proj(x).chunk(2, -1)  # (B, T, E) each
        if fused := _cuda_kernels(u.device.type, self.conv1d.kernel_size[0]):
            return self.out_proj(self._fused(fused, u, gate)[0])  # type: ignore[no-any-return]
        u = frame.convolve(u, self.conv1d, None)
        y, _ = selective_scan(u, *self._selected(u), None)
        return self.out_proj(y.to(gate.dtype) * F.silu(gate))  # type: ignore[no-any-return]

    def advance(self, x: Tensor, conv: Tensor, ssm: Tensor, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
        raw, gate = self.in_proj(x).chunk(2, -1)  # (B, T, E) each
        after = frame.last_inputs(raw, conv)
        fused = _cuda_kernels(raw.device.type, self.conv1d.kernel_size[0])
        # their kernel takes no incoming state and gives the outgoing one no gradient
        if fused and fresh and not torch.is_grad_enabled():
            y, last = self._fused(fused, raw, gate)
            return self.out_proj(y), after, last
        u = frame.convolve(raw, self.conv1d, conv)
        delta, A, B, C, D = self._selected(u)
        if u.shape[1] == 1:
            row, ssm = selective_scan_step(u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, ssm)
            y = row.unsqueeze(1)
        else:
            y, ssm = selective_scan(u, delta, A, B, C, D, ssm)
        return self.out_proj(y.to(gate.dtype) * F.silu(gate)), after, ssm

    def _selected(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Δ (B, T, E), A (E, N), B and C (B, T, N), D (E), of which Δ, B and C depend on the input."""
        low, B, C = self.x_proj(u).split(self.split, -1)
        delta = F.softplus(wide(self.dt_proj(low)))
        return delta, -torch.exp(wide(self.A_log)), B, C, self.D

    def _fused(self, fused: tuple[Any, Any], u: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """The same by mamba_ssm's kernels: gated outputs (B, T, E), last state (B, E, N)."""
        convolve, scan = fused
        x = convolve(u.transpose(1, 2), self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu")  # (B, E, T)
        delta, A, B, C, D = self._selected(x.transpose(1, 2))
        streams = (x, delta.to(x.dtype).transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2), D.float())
        y, last = scan(*streams, z=gate.transpose(1, 2), return_last_state=True)
        return y.transpose(1, 2), last.float()


def _cuda_kernels(device: str, conv_kernel: int) -> tuple[Any, Any] | None:
    return frame.cuda_kernels(device, "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", conv_kernel)
