"""What do Mamba-1 and Mamba-2 share? Everything around the mixer: embedding, norms, residuals in float32, convolution, state.

Source: Gu & Dao (2023), Dao & Gu (2024), and their mamba_ssm code. Parameter names are those of transformers' classes for both
families. The output layer is the embedding, as in the published models; a ``lm_head.weight`` in a state_dict must be the same tensor.

Legend: B batch, T tokens in this call, V vocabulary, D width, W channels of the convolution, K its kernel.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bdh_bench.errors import SpecError
from bdh_bench.session import Streaming, TensorMemory
from bdh_bench.types import Keep

#: Layers up to a parameter target: about two blocks where a transformer has one, as in the papers' models.
_LAYERS = ((500_000, 6), (2_000_000, 8), (6_000_000, 12), (15_000_000, 16), (35_000_000, 20), (200_000_000, 24))
_LAYERS_BEYOND = 48
EPS = 1e-5


class Shape(Protocol):
    """What the frame reads of a family's Config."""

    @property
    def d_model(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


# -- sizes ------------------------------------------------------------------------------------------------------------

_C = TypeVar("_C")


def shapes(
    base: Any, target: int, pinned: Mapping[str, Any], count: Callable[[Any], int], unit: int = 1
) -> Iterator[Any]:
    """Configs near ``target`` parameters: the table's depth first, round widths before odd ones, multiples of ``unit`` only."""
    usual = next((layers for bound, layers in _LAYERS if target <= bound), _LAYERS_BEYOND)
    near = [usual + step for step in (0, 1, -1, 2, -2) if usual + step > 0]
    if "d_model" in pinned:
        fixed, per_layer = count(replace(base, n_layer=0)), count(replace(base, n_layer=1))
        near = [max(1, round((target - fixed) / (per_layer - fixed)))]
    for layers in [base.n_layer] if "n_layer" in pinned else near:
        config = replace(base, n_layer=layers)
        if "d_model" in pinned:
            yield config
            continue
        width = _width(config, target, count)
        for step in [step for step in (8, 4, 2, 1) if step % unit == 0] or [unit]:
            below = max(step, width // step * step)
            pair = [replace(config, d_model=below), replace(config, d_model=below + step)]
            yield from sorted(pair, key=lambda c: abs(count(c) - target))


def _width(config: Any, target: int, count: Callable[[Any], int]) -> int:
    """The greatest d_model with at most ``target`` parameters, at least 1."""
    low, high = 1, 2
    while count(replace(config, d_model=high)) <= target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if count(replace(config, d_model=middle)) <= target:
            low = middle
        else:
            high = middle
    return low


def check_least(family: str, config: Any, least: Mapping[str, int]) -> None:
    """Raise SpecError for an option below 1, or below its own least value."""
    for field in fields(config):
        got, wanted = getattr(config, field.name), least.get(field.name, 1)
        if got < wanted:
            raise SpecError(f"got {field.name}={got} for {family} · expected at least {wanted}")


def check_pinned(found: _C, pinned: Mapping[str, Any], automatic: Mapping[str, int]) -> _C:
    """The Config read from weights, unless options say otherwise; ``automatic`` has the values of options that may be 0."""
    for name, value in pinned.items():
        real = automatic.get(name, getattr(found, name))
        if value != real and not (name in automatic and value == 0):
            raise ValueError(f"{name}={value} was asked for, the tensors have {real}")
    return found


# -- folders of transformers --------------------------------------------------------------------------------------------


def published_config(model: Any, family: str) -> dict[str, Any]:
    """The part of a config.json that both families share; ``family`` is the class name without ``ForCausalLM``."""
    c = model.config
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layer,
        "state_size": c.state_size,
        "conv_kernel": c.conv_kernel,
        "expand": c.expand,
        "layer_norm_epsilon": EPS,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
        "tie_word_embeddings": True,
        "dtype": str(model.backbone.embeddings.weight.dtype).removeprefix("torch."),
        "bos_token_id": None,  # the published ids are ordinary bytes here
        "eos_token_id": None,
        "pad_token_id": None,
    }


def shape_from_published(config: Mapping[str, Any], family: str, defaults: Mapping[str, Any]) -> dict[str, int]:
    """The options of Config that both families share, from a config.json; ``defaults`` are the published ones of a field left out.

    Raises ValueError for what the frame cannot represent.
    """
    expected = {
        "model_type": family.lower(),
        "layer_norm_epsilon": EPS,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
        "tie_word_embeddings": True,
    }
    expect_published(config, expected, {**defaults, **expected, "tie_word_embeddings": defaults["tie_word_embeddings"]})
    names = {"hidden_size": "d_model", "num_hidden_layers": "n_layer"} | {
        name: name for name in ("vocab_size", "state_size", "conv_kernel", "expand")
    }
    return {ours: int(config.get(theirs, defaults[theirs])) for theirs, ours in names.items()}


def expect_published(config: Mapping[str, Any], expected: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError for the first field that has another value; ``defaults`` stand in for fields left out."""
    for name, value in expected.items():
        got = config.get(name, defaults[name])
        if got != value:
            raise ValueError(f"{name} is {got!r}, this model can only be {value!r}")


# -- the frame ----------------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """What a block needs of its mixer: both forms of its arithmetic, and the shapes of what it remembers of one stream."""

    in_proj: nn.Linear

    def advance(self, x: Tensor, conv: Tensor, ssm: Tensor, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) from a state → outputs (B, T, D) and the state after them; ``fresh`` says that the state is empty."""
        raise NotImplementedError

    def remembered(self) -> dict[str, tuple[int, ...]]:
        """conv (W, K - 1) and ssm (…)."""
        raise NotImplementedError


class StateSpaceModel(Streaming, nn.Module):
    """Embedding, n_layer residual mixers, norm; logits by the embedding."""

    def __init__(self, config: Shape, mixer: Callable[[], Mixer]) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.backbone = Backbone(config, mixer)
        self.register_load_state_dict_pre_hook(_drop_tied_head)  # type: ignore[no-untyped-call]

    def logits(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) → logits (B, T, V), from an empty state."""
        x = wide(self.backbone.embeddings(tokens))
        for block in self.backbone.layers:
            x = x + block(x)
        return self._head(x)

    def _head(self, x: Tensor) -> Tensor:
        weight = self.backbone.embeddings.weight
        return F.linear(self.backbone.norm_f(x).to(weight.dtype), weight)  # (B, T, V)

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", self.backbone.layers)

    def memory(self, batch_size: int) -> TensorMemory:
        """Zeros: per layer the last inputs of the convolution, and the state."""
        weight = self.backbone.embeddings.weight
        dtype = wide_dtype(weight.dtype)
        return TensorMemory(
            (f"{kind}.{i}", torch.zeros(batch_size, *size, dtype=dtype, device=weight.device))
            for i, block in enumerate(self._blocks())
            for kind, size in block.mixer.remembered().items()
        )

    def advance(self, memory: TensorMemory, position: int, tokens: Tensor, keep: Keep) -> Tensor:
        """Read tokens (B, T); the memory's tensors are replaced, never written into, so autograd may pass through."""
        x = wide(self.backbone.embeddings(tokens))
        for i, block in enumerate(self._blocks()):
            out, conv, ssm = block.advance(x, memory[f"conv.{i}"], memory[f"ssm.{i}"], fresh=position == 0)
            memory[f"conv.{i}"], memory[f"ssm.{i}"] = conv, ssm
            x = x + out
        return self._head(x if keep == "all" else x[:, -1:])

    def missing(self) -> str:
        """What the faster kernels would need, or "" where they can run."""
        packages = [name for name in ("mamba_ssm", "causal_conv1d") if not importlib.util.find_spec(name)]
        needs = [name.replace("_", "-") for name in packages]
        needs += [] if torch.cuda.is_available() else ["a CUDA device"]
        remedy = ": pip install 'bdh-bench[cuda]'" if packages else ""
        return " and ".join(filter(None, (", ".join(needs[:-1]), *needs[-1:]))) + remedy if needs else ""


class Backbone(nn.Module):
    """Everything but the output layer."""

    def __init__(self, config: Shape, mixer: Callable[[], Mixer]) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embeddings.weight, std=0.02)
        self.layers = nn.ModuleList(Block(config.d_model, mixer()) for _ in range(config.n_layer))
        self.norm_f = Norm(config.d_model)


class Norm(nn.Module):
    """RMSNorm, computed in the residual's precision."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.weight


class Block(nn.Module):
    """Norm and mixer; the caller adds the residual."""

    def __init__(self, width: int, mixer: Mixer) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return wide(self.mixer(self._normed(x)))

    def advance(self, x: Tensor, conv: Tensor, ssm: Tensor, fresh: bool) -> tuple[Tensor, Tensor, Tensor]:
        out, conv, ssm = self.mixer.advance(self._normed(x), conv, ssm, fresh)
        return wide(out), conv, ssm

    def _normed(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x).to(self.mixer.in_proj.weight.dtype)
        return normed


def step_bias(count: int) -> Tensor:
    """What softplus turns into steps Δ of 0.001 to 0.1, drawn log-uniformly."""
    step = torch.empty(count).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return step + torch.log(-torch.expm1(-step))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """At least float32: residuals, Δ and the states."""
    return x.to(wide_dtype(x.dtype))


def _drop_tied_head(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
    """Accept the second name of the embedding; a head of its own stays and is refused as an unexpected key."""
    head, embeddings = state.get("lm_head.weight"), state.get("backbone.embeddings.weight")
    if head is not None and embeddings is not None and torch.equal(head, embeddings):
        del state["lm_head.weight"]


# -- the convolution ------------------------------------------------------------------------------------------------------


def convolve(raw: Tensor, conv1d: nn.Conv1d, before: Tensor | None) -> Tensor:
    """Causal depthwise convolution and SiLU, (B, T, W) → (B, T, W), after the inputs ``before`` (B, W, K - 1) or zeros."""
    kernel, bias = conv1d.weight[:, 0].t(), cast(Tensor, conv1d.bias)  # (K, W), (W)
    kept = kernel.shape[0] - 1
    padded = (
        F.pad(raw, (0, 0, kept, 0)) if before is None else torch.cat((before.transpose(1, 2).to(raw.dtype), raw), 1)
    )
    return F.silu(_ShiftedSum.apply(padded, kernel, bias))  # type: ignore[no-untyped-call]


def last_inputs(raw: Tensor, before: Tensor) -> Tensor:
    """The inputs that the convolution needs at the next token, (B, W, K - 1): of raw (B, T, W), and of ``before`` where T is short."""
    kept = before.shape[2]  # 0 for a kernel of one token
    window = torch.cat((before, raw[:, max(0, raw.shape[1] - kept) :].transpose(1, 2).to(before.dtype)), 2)
    # a copy: a view would keep the whole window alive
    return window[:, :, window.shape[2] - kept :].clone()


class _ShiftedSum(torch.autograd.Function):
    """The convolution as a sum of shifted inputs: padded (B, K - 1 + T, W), kernel (K, W), bias (W) → (B, T, W).

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


# -- the authors' kernels -----------------------------------------------------------------------------------------------


def cuda_kernels(device: str, module: str, name: str, conv_kernel: int) -> tuple[Any, Any] | None:
    """causal_conv1d_fn and mamba_ssm's ``module.name``, where both packages are installed beside a CUDA device.

    Theirs convolves 2 to 4 tokens and no other number of them.
    A broken package raises its own error. No machine with a GPU has run what they return here.
    """
    if device != "cuda" or conv_kernel not in (2, 3, 4):
        return None
    if not all(importlib.util.find_spec(package) for package in ("causal_conv1d", "mamba_ssm")):
        return None
    scan = getattr(importlib.import_module(module), name)
    return importlib.import_module("causal_conv1d").causal_conv1d_fn, scan
