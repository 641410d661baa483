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

import importlib
import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bdh_bench.errors import SpecError
from bdh_bench.kernels.selective_scan import selective_scan, selective_scan_step
from bdh_bench.session import Streaming, TensorMemory
from bdh_bench.types import Keep

DEFAULTS = {"learning_rate": 4e-3, "position_limit": "none"}

#: Layers up to a parameter target: about two blocks where a transformer has one, as in the paper's models.
_LAYERS = ((500_000, 6), (2_000_000, 8), (6_000_000, 12), (15_000_000, 16), (35_000_000, 20), (200_000_000, 24))
_LAYERS_BEYOND = 48


@dataclass(frozen=True)
class Config:
    """Shape of the model; dt_rank = 0 stands for ceil(d_model / 16)."""

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
    """Shapes near ``target`` parameters: the table's depth first, round widths before odd ones."""
    base = Config(**pinned)
    usual = next((layers for bound, layers in _LAYERS if target <= bound), _LAYERS_BEYOND)
    near = [usual + step for step in (0, 1, -1, 2, -2) if usual + step > 0]
    if "d_model" in pinned:
        fixed, per_layer = parameters(replace(base, n_layer=0)), parameters(replace(base, n_layer=1))
        near = [max(1, round((target - fixed) / (per_layer - fixed)))]
    for layers in [base.n_layer] if "n_layer" in pinned else near:
        config = replace(base, n_layer=layers)
        if "d_model" in pinned:
            yield config
            continue
        width = _width(config, target)
        for step in (8, 4, 2, 1):
            below = max(step, width // step * step)
            pair = [replace(config, d_model=below), replace(config, d_model=below + step)]
            yield from sorted(pair, key=lambda c: abs(parameters(c) - target))


def _width(config: Config, target: int) -> int:
    """The greatest d_model with at most ``target`` parameters, at least 1."""
    low, high = 1, 2
    while parameters(replace(config, d_model=high)) <= target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if parameters(replace(config, d_model=middle)) <= target:
            low = middle
        else:
            high = middle
    return low


def config_from_weights(tensors: Mapping[str, Tensor], pinned: Mapping[str, Any]) -> Config:
    """The Config that these weights have. Raises KeyError or ValueError for those of another family."""
    mixer = "backbone.layers.0.mixer."
    vocab, d = tensors["backbone.embeddings.weight"].shape
    inner, state = tensors[mixer + "A_log"].shape
    if inner % d:
        raise ValueError(f"{inner} inner channels are no multiple of d_model {d}")
    layers = {name.split(".")[2] for name in tensors if name.startswith("backbone.layers.")}
    rank, kernel = tensors[mixer + "dt_proj.weight"].shape[1], tensors[mixer + "conv1d.weight"].shape[2]
    found = Config(d, len(layers), state, kernel, inner // d, 0 if rank == math.ceil(d / 16) else rank, vocab)
    for name, value in pinned.items():
        if name != "dt_rank" and getattr(found, name) != value:
            raise ValueError(f"{name}={value} was asked for, the tensors have {getattr(found, name)}")
    if pinned.get("dt_rank", 0) not in (0, rank):
        raise ValueError(f"dt_rank={pinned['dt_rank']} was asked for, the tensors have {rank}")
    return found


class Model(Streaming, nn.Module):
    """Embedding, n_layer residual mixers, norm; logits by the embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        for field in fields(config):
            least = {"dt_rank": 0, "conv_kernel": 2}.get(field.name, 1)
            if getattr(config, field.name) < least:
                got = getattr(config, field.name)
                raise SpecError(f"got {field.name}={got} for mamba · expected at least {least}")
        self.config = config
        self.vocab_size = config.vocab_size
        self.backbone = Backbone(config)
        self.register_load_state_dict_pre_hook(_drop_tied_head)  # type: ignore[no-untyped-call]

    def logits(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) → logits (B, T, V), from an empty state."""
        x = _wide(self.backbone.embeddings(tokens))
        for block in self.backbone.layers:
            x = x + block(x)
        return self._head(x)

    def _head(self, x: Tensor) -> Tensor:
        weight = self.backbone.embeddings.weight
        return F.linear(self.backbone.norm_f(x).to(weight.dtype), weight)  # (B, T, V)

    def memory(self, batch_size: int) -> TensorMemory:
        """Zeros: per layer the last K - 1 inputs of the convolution (B, E, K - 1) and the state (B, E, N)."""
        c, weight = self.config, self.backbone.embeddings.weight
        shapes = {"conv": c.conv_kernel - 1, "ssm": c.state_size}
        dtype = _wide_dtype(weight.dtype)
        return TensorMemory(
            (f"{kind}.{i}", torch.zeros(batch_size, c.inner, size, dtype=dtype, device=weight.device))
            for i in range(c.n_layer)
            for kind, size in shapes.items()
        )

    def advance(self, memory: TensorMemory, position: int, tokens: Tensor, keep: Keep) -> Tensor:
        """Read tokens (B, T); the memory's tensors are replaced, never written into, so autograd may pass through."""
        x = _wide(self.backbone.embeddings(tokens))
        for i, block in enumerate(cast(list[Block], self.backbone.layers)):
            out, conv, ssm = block.advance(x, memory[f"conv.{i}"], memory[f"ssm.{i}"], fresh=position == 0)
            memory[f"conv.{i}"], memory[f"ssm.{i}"] = conv, ssm
            x = x + out
        return self._head(x if keep == "all" else x[:, -1:])

    def state_bytes(self, batch_size: int, context: int) -> int:
        """The same at every context."""
        c = self.config
        itemsize = _wide_dtype(self.backbone.embeddings.weight.dtype).itemsize
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
        return "mamba-ssm" if _cuda_kernels(self.backbone.embeddings.weight.device.type) else "torch selective scan"

    def missing(self) -> str:
        """What the faster kernels would need, or "" where they can run."""
        packages = [name for name in ("mamba_ssm", "causal_conv1d") if not importlib.util.find_spec(name)]
        needs = [name.replace("_", "-") for name in packages]
        needs += [] if torch.cuda.is_available() else ["a CUDA device"]
        remedy = ": pip install 'bdh-bench[cuda]'" if packages else ""
        return " and ".join(filter(None, (", ".join(needs[:-1]), *needs[-1:]))) + remedy if needs else ""


class Backbone(nn.Module):
    """Everything but the output layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embeddings.weight, std=0.02)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = Norm(config.d_model)


class Norm(nn.Module):
    """RMSNorm, computed in the residual's precision."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Block(nn.Module):
    """Norm and mixer; the caller adds the residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = Norm(config.d_model)
        self.mixer = Mixer(config)

    def forward(self, x: Tensor) -> Tensor:
        return _wide(self.mixer(self._normed(x)))

    def advance(self, x: Tensor, conv: Tensor, ssm: Tensor, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
        out, conv, ssm = self.mixer.advance(self._normed(x), conv, ssm, fresh)
        return _wide(out), conv, ssm

    def _normed(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x).to(self.mixer.in_proj.weight.dtype)
        return normed


class Mixer(nn.Module):
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
        self.D = nn.Parameter(torch.ones(e))
        self.out_proj = nn.Linear(e, d, bias=False)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(r**-0.5), r**-0.5)
            step = torch.empty(e).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of the bias is the step
            self.out_proj.weight.div_(math.sqrt(config.n_layer))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D), from an empty state."""
        u, gate = self.in_proj(x).chunk(2, -1)  # (B, T, E) each
        if fused := _cuda_kernels(u.device.type):
            return self.out_proj(self._fused(fused, u, gate)[0])  # type: ignore[no-any-return]
        u = self._conv(u, None)
        y, _ = selective_scan(u, *self._selected(u), None)
        return self.out_proj(y.to(gate.dtype) * F.silu(gate))  # type: ignore[no-any-return]

    def advance(self, x: Tensor, conv: Tensor, ssm: Tensor, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The same from a state, and the state after it; ``fresh`` says that the state is empty."""
        raw, gate = self.in_proj(x).chunk(2, -1)  # (B, T, E) each
        kept = conv.shape[2]
        window = torch.cat((conv, raw.transpose(1, 2).to(conv.dtype)), 2)  # (B, E, K - 1 + T)
        after = window[:, :, window.shape[2] - kept :].clone()  # a copy: a view would keep the whole window alive
        fused = _cuda_kernels(raw.device.type)
        # their kernel takes no incoming state and gives the outgoing one no gradient
        if fused and fresh and not torch.is_grad_enabled():
            y, last = self._fused(fused, raw, gate)
            return self.out_proj(y), after, last
        u = self._conv(raw, conv.to(raw.dtype))
        delta, A, B, C, D = self._selected(u)
        if u.shape[1] == 1:
            row, ssm = selective_scan_step(u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, ssm)
            y = row.unsqueeze(1)
        else:
            y, ssm = selective_scan(u, delta, A, B, C, D, ssm)
        return self.out_proj(y.to(gate.dtype) * F.silu(gate)), after, ssm

    def _conv(self, u: Tensor, before: Tensor | None) -> Tensor:
        """Causal depthwise convolution and SiLU, (B, T, E), after the inputs ``before`` (B, E, K - 1) or zeros."""
        kernel, bias = self.conv1d.weight[:, 0].t(), cast(Tensor, self.conv1d.bias)  # (K, E), (E)
        kept = kernel.shape[0] - 1
        padded = F.pad(u, (0, 0, kept, 0)) if before is None else torch.cat((before.transpose(1, 2), u), 1)
        return F.silu(_ShiftedSum.apply(padded, kernel, bias))  # type: ignore[no-untyped-call]

    def _selected(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Δ (B, T, E), A (E, N), B and C (B, T, N), D (E), of which Δ, B and C depend on the input."""
        low, B, C = self.x_proj(u).split(self.split, -1)
        delta = F.softplus(_wide(self.dt_proj(low)))
        return delta, -torch.exp(_wide(self.A_log)), B, C, self.D

    def _fused(self, fused: tuple[Any, Any], u: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """The same by mamba_ssm's kernels: gated outputs (B, T, E), last state (B, E, N)."""
        convolve, scan = fused
        x = convolve(u.transpose(1, 2), self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu")  # (B, E, T)
        delta, A, B, C, D = self._selected(x.transpose(1, 2))
        streams = (x, delta.to(x.dtype).transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2), D.float())
        y, last = scan(*streams, z=gate.transpose(1, 2), return_last_state=True)
        return y.transpose(1, 2), last.float()


class _ShiftedSum(torch.autograd.Function):
    """The convolution as a sum of shifted inputs: padded (B, K - 1 + T, E), kernel (K, E), bias (E) → (B, T, E).

    On a CPU this takes less than half the time of a grouped convolution, without transposed copies. The gradient is
    written out because autograd's own makes one padded tensor of zeros per shift.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(padded, kernel)
        length = padded.shape[1] - kernel.shape[0] + 1
        total = torch.addcmul(bias, padded[:, :length], kernel[0])
        for k in range(1, kernel.shape[0]):
            total.addcmul_(padded[:, k : k + length], kernel[k])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        padded, kernel = ctx.saved_tensors
        length = dy.shape[1]
        dpadded = torch.zeros_like(padded, dtype=dy.dtype)
        dkernel = torch.empty_like(kernel, dtype=dy.dtype)
        for k in range(kernel.shape[0]):
            dpadded[:, k : k + length].addcmul_(dy, kernel[k])
            dkernel[k] = (dy * padded[:, k : k + length]).sum((0, 1))
        return dpadded.to(padded.dtype), dkernel.to(kernel.dtype), dy.sum((0, 1))


@cache
def _cuda_kernels(device: str) -> tuple[Any, Any] | None:
    """causal_conv1d_fn and selective_scan_fn, where both packages are installed; a broken one raises its own error."""
    packages = ("causal_conv1d", "mamba_ssm")
    if device != "cuda" or not all(importlib.util.find_spec(name) for name in packages):
        return None
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    return importlib.import_module("causal_conv1d").causal_conv1d_fn, scan


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    """At least float32: residuals, Δ and the states."""
    return x.to(_wide_dtype(x.dtype))


def _drop_tied_head(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """Accept the second name of the embedding; a head of its own stays and is refused as an unexpected key."""
    head, embeddings = state.get("lm_head.weight"), state.get("backbone.embeddings.weight")
    if head is not None and embeddings is not None and torch.equal(head, embeddings):
        del state["lm_head.weight"]
