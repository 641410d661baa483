"""Baby Dragon Hatchling as published: a fixed memory over positive keys instead of a KV cache.

Source: the published implementation ``pathwaycom/bdh`` (commit 714bc80) of arXiv 2509.26507, in our own code. Per pass, with the
same weights in every pass:

    xs = relu(x · encoder)                    Dx   keys and queries, positive
    a  = LN(strict_lower(R(xs) R(xs)ᵀ) · x)         what the memory returns; values are the residual stream
    ys = relu(a · encoder_v)                  Dy
    x  = LN(x + LN((xs ⊙ ys) · decoder))      E

Three exact forms of the same numbers: ``parallel`` is the published one, T×T scores; ``chunked`` carries the memory
S (H, N, D) per layer over chunks of text; ``recurrent`` reads one token and updates S in place. ``mode`` picks what ``logits``
runs (parallel or chunked) and what one-token reading runs (recurrent); ``auto`` means chunked and recurrent.

Departures: dropout is 0 by default (the published script trains with 0.1; here every family sees each byte once, without).
The first token reads an empty memory, so every pass is the identity for it (position-0 edge).

Legend: B batch, T tokens, V vocabulary, D width, H heads, N neurons per head, L passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdh_bench.errors import SpecError
from bdh_bench.kernels.linear_attention import chunk_length, frequencies, linear_attention, rotate, rotations
from bdh_bench.session import Streaming, TensorMemory
from bdh_bench.types import Keep

DEFAULTS = {"learning_rate": 4e-3, "position_limit": "none"}

_MODES = ("auto", "parallel", "chunked", "recurrent")
_STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Config:
    """Published option names; ``chunk`` 0 means the rule of the kernel."""

    n_layer: int = 6
    n_embd: int = 256
    n_head: int = 4
    mlp_internal_dim_multiplier: int = 128
    vocab_size: int = 256
    dropout: float = 0.0
    mode: str = "auto"
    chunk: int = 0
    state_dtype: str = "float32"

    @property
    def neurons(self) -> int:
        """N, neurons per head."""
        return self.mlp_internal_dim_multiplier * self.n_embd // self.n_head


def parameters(config: Config) -> int:
    """3·n·D + 2·V·D with n = H·N."""
    return (3 * config.n_head * config.neurons + 2 * config.vocab_size) * config.n_embd


def scaled(target: int, **pinned: Any) -> Iterator[Config]:
    """As in the paper, width and passes stay and only the number of neurons grows; small models have a small width."""
    shapes = ((64, 4), (128, 4), (256, 6), (512, 6))
    first = next(i for i, limit in enumerate((2e6, 2e7, 6e8, float("inf"))) if target <= limit)
    for width, passes in (*shapes[first:], *reversed(shapes[:first])):
        width, passes = pinned.get("n_embd", width), pinned.get("n_layer", passes)
        heads, vocabulary = pinned.get("n_head", 4), pinned.get("vocab_size", 256)
        middle = max(1, round((target / width - 2 * vocabulary) / (3 * width)))
        for multiplier in (middle, middle + 1, max(1, middle - 1)):
            yield Config(passes, width, heads, multiplier, vocabulary)


def config_from_weights(tensors: Mapping[str, Tensor], pinned: Mapping[str, Any]) -> Config:
    """Widths from the tensors; ``n_layer`` must be pinned because passes share their weights. Raises ValueError."""
    missing = {"embed.weight", "encoder", "encoder_v", "decoder", "lm_head"} - set(tensors)
    if missing:
        raise ValueError(f"missing tensors {', '.join(sorted(missing))}")
    if tensors["encoder"].ndim != 3:
        raise ValueError(f"encoder has shape {tuple(tensors['encoder'].shape)}, expected (heads, width, neurons)")
    if "n_layer" not in pinned:
        raise ValueError("the number of passes is not in the weights; add :n_layer=…")
    heads, width, neurons = tensors["encoder"].shape
    if heads * neurons % width:
        raise ValueError(f"{heads} heads of {neurons} neurons are no whole multiple of the width {width}")
    found = {
        "n_embd": width,
        "n_head": heads,
        "mlp_internal_dim_multiplier": heads * neurons // width,
        "vocab_size": tensors["embed.weight"].shape[0],
    }
    for name, value in found.items():
        if pinned.get(name, value) != value:
            raise ValueError(f"{name}={pinned[name]} was asked for, the tensors have {value}")
    return Config(**{**found, **pinned})


class Rotary(nn.Module):
    """Holds the frequency table under its published name, ``attn.freqs`` (1, 1, 1, N).

    Its float32 values belong to the model. A state_dict without the table keeps the computed one.
    """

    freqs: Tensor

    def __init__(self, neurons: int) -> None:
        super().__init__()
        self.register_buffer("freqs", frequencies(neurons).view(1, 1, 1, neurons))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(prefix + "freqs", self.freqs)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn: Any, recurse: bool = True) -> Rotary:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.freqs = self.freqs.float()  # a change of the model's dtype must not change its phases
        return self


class Model(Streaming, nn.Module):
    """The published form; attributes and state_dict carry the published names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.vocab_size = config.vocab_size
        width, heads, neurons = config.n_embd, config.n_head, config.neurons
        self.embed = nn.Embedding(config.vocab_size, width)
        self.encoder = nn.Parameter(torch.empty(heads, width, neurons))
        self.encoder_v = nn.Parameter(torch.empty(heads, width, neurons))
        self.decoder = nn.Parameter(torch.empty(heads * neurons, width))
        self.lm_head = nn.Parameter(torch.empty(width, config.vocab_size))
        self.attn = Rotary(neurons)
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    # -- teacher forcing ---------------------------------------------------------------------------------------------

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, V), in the form that ``mode`` names."""
        if self.config.mode == "parallel":
            return self._parallel(tokens)
        x = _norm(self.embed(tokens))
        encoder = self._joint_encoder()
        for _ in range(self.config.n_layer):
            x, _ = self._pass(x, encoder, 0, None)
        return x @ self.lm_head

    forward = logits

    def _parallel(self, tokens: Tensor) -> Tensor:
        """The published arithmetic, T×T scores and all; kept as the truth for every other form."""
        batch, length = tokens.shape
        x = _norm(self.embed(tokens)).unsqueeze(1)  # (B, 1, T, D)
        turn = rotations(self.attn.freqs, 0, length)
        for _ in range(self.config.n_layer):
            keys = F.relu(x @ self.encoder)  # (B, H, T, N)
            query = rotate(keys.transpose(1, 2), turn)
            read = _norm((query @ query.mT).tril(-1) @ x)  # (B, H, T, D)
            gated = F.dropout(keys * F.relu(read @ self.encoder_v), self.config.dropout, self.training)
            merged = gated.transpose(1, 2).reshape(batch, 1, length, -1)  # (B, 1, T, H·N)
            x = _norm(x + _norm(merged @ self.decoder))
        return x.squeeze(1) @ self.lm_head

    def _joint_encoder(self) -> Tensor:
        """The encoders of all heads side by side, so that one product serves them: (D, H·N)."""
        return self.encoder.transpose(0, 1).flatten(1)

    def _pass(self, x: Tensor, encoder: Tensor, position: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """One pass over a piece of text: x (B, T, D) and the memory (B, H, N, D) before → both after."""
        batch, length, _ = x.shape
        heads, neurons = self.config.n_head, self.config.neurons
        keys = F.relu(x @ encoder).view(batch, length, heads, neurons)
        chunk = self.config.chunk or chunk_length(self.config.n_embd)
        read, state = linear_attention(keys, x, self.attn.freqs, position, state, chunk)
        read = _norm(read).transpose(0, 1).reshape(heads, batch * length, -1)  # (H, B·T, D)
        gates = F.relu(torch.bmm(read, self.encoder_v.to(read.dtype)))  # (H, B·T, N)
        gated = keys * gates.view(heads, batch, length, neurons).permute(1, 2, 0, 3)  # (B, T, H, N)
        gated = F.dropout(gated, self.config.dropout, self.training)
        return _norm(x + _norm(gated.reshape(batch, length, -1) @ self.decoder)), state

    # -- streaming ---------------------------------------------------------------------------------------------------

    def memory(self, batch_size: int) -> TensorMemory:
        """S = 0 for every pass."""
        c = self.config
        shape = (batch_size, c.n_head, c.neurons, c.n_embd)
        dtype = _STATE_DTYPES[c.state_dtype] if self.embed.weight.dtype != torch.float64 else torch.float64
        device = self.embed.weight.device
        return TensorMemory(
            {f"layer{i}.state": torch.zeros(shape, dtype=dtype, device=device) for i in range(c.n_layer)}
        )

    def advance(self, memory: TensorMemory, position: int, tokens: Tensor, keep: Keep) -> Tensor:
        """Chunks of text outermost, passes inside: what is held does not depend on the length of the prompt."""
        if tokens.shape[1] == 1 and not torch.is_grad_enabled():
            return self._step(memory, position, tokens)
        encoder = self._joint_encoder()
        piece = self.config.chunk or chunk_length(self.config.n_embd)
        kept: list[Tensor] = []
        for start in range(0, tokens.shape[1], piece):
            x = _norm(self.embed(tokens[:, start : start + piece]))
            for name, state in memory.items():
                x, memory[name] = self._pass(x, encoder, position + start, state)
            if keep == "all" or start + piece >= tokens.shape[1]:
                kept.append((x if keep == "all" else x[:, -1:]) @ self.lm_head)
        return torch.cat(kept, 1)

    def _step(self, memory: TensorMemory, position: int, tokens: Tensor) -> Tensor:
        """One token per stream (B, 1) → (B, 1, V); read before write, the memory is updated in place."""
        x = _norm(self.embed(tokens))  # (B, 1, D)
        turn = rotations(self.attn.freqs, position, 1)
        for state in memory.values():
            keys = F.relu(torch.einsum("bd,hdn->bhn", x[:, 0], self.encoder)).unsqueeze(1)  # (B, 1, H, N)
            query = rotate(keys, turn)  # (B, H, 1, N)
            read = _norm((query.to(state.dtype) @ state).to(x.dtype))  # (B, H, 1, D)
            state += (query.mT * x.unsqueeze(1)).to(state.dtype)
            gates = F.relu(torch.einsum("bhd,hdn->bhn", read[:, :, 0], self.encoder_v))
            x = _norm(x + _norm((keys[:, 0] * gates).flatten(1).unsqueeze(1) @ self.decoder))
        return x @ self.lm_head

    # -- theory ------------------------------------------------------------------------------------------------------

    def state_bytes(self, batch_size: int, context: int) -> int:
        """L·n·D elements per stream at every context."""
        c = self.config
        item = 8 if self.embed.weight.dtype == torch.float64 else _STATE_DTYPES[c.state_dtype].itemsize
        return batch_size * c.n_layer * c.n_head * c.neurons * c.n_embd * item

    def flops_per_token(self, context: int, mode: str = "recurrent") -> float:
        """Forward operations per token; ``parallel`` counts the masked half of the scores too."""
        c = self.config
        n, d = c.n_head * c.neurons, c.n_embd
        chunk = c.chunk or chunk_length(d)
        memory = {
            "parallel": 2 * context * (n + c.n_head * d),
            "chunked": 4 * n * d + 2 * min(chunk, context) * (n + c.n_head * d),
            "recurrent": 4 * n * d,
        }[mode]
        return float(c.n_layer * (6 * n * d + memory) + 2 * c.vocab_size * d)

    def kernels(self) -> str:
        """What runs here."""
        return "torch chunked linear attention"


def _norm(x: Tensor) -> Tensor:
    """Layer norm without scale or bias over the last axis."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


def _check(config: Config) -> None:
    if config.mode not in _MODES:
        raise SpecError(f"got mode={config.mode} · expected one of {', '.join(_MODES)}")
    if config.state_dtype not in _STATE_DTYPES:
        raise SpecError(f"got state_dtype={config.state_dtype} · expected one of {', '.join(_STATE_DTYPES)}")
    for name in ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "vocab_size"):
        if getattr(config, name) < 1:
            raise SpecError(f"got {name}={getattr(config, name)} · expected at least 1")
    if config.neurons % 2 or config.mlp_internal_dim_multiplier * config.n_embd % config.n_head:
        raise SpecError(
            f"got {config.mlp_internal_dim_multiplier}·{config.n_embd} neurons on {config.n_head} heads · expected an even "
            "whole number per head (keys rotate in pairs)"
        )
