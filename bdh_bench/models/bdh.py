"""Baby Dragon Hatchling as published: a fixed memory over positive keys instead of a KV cache.

Source: the published implementation ``pathwaycom/bdh`` (commit 714bc80) of arXiv 2509.26507, in our own code. Per pass, with the
same weights in every pass:

    xs = relu(x · encoder)                          Dx   keys and queries, positive
    a  = LN(strict_lower(R(xs) R(xs)ᵀ) · x)         what the memory returns; values are the residual stream
    ys = relu(a · encoder_v)                        Dy
    x  = LN(x + LN((xs ⊙ ys) · decoder))            E

Four exact forms of the same numbers: ``parallel`` is the published one, T×T scores; ``chunked`` carries the memory S (H, N, D) of
each pass over chunks of text; ``recurrent`` reads one token and updates S in place; ``sparse`` does so on active neurons only. ``mode``
picks what ``logits`` runs (parallel, else chunked) and what one-token reading runs (recurrent or sparse). ``auto`` is chunked, and
per pass sparse or recurrent by the measured density of the keys.

Departures: dropout is 0 by default (the published script trains with 0.1; here every family sees each byte once, without).
The first token reads an empty memory, so every pass is the identity for it (position-0 edge).

Options that are ours and not the paper's: ``decay``, ``rope=off``, ``key_density``, ``key_sign=signed``, ``delta`` and
``attention=softmax``; their defaults leave the published form.

Legend: B batch, T tokens, V vocabulary, D width, H heads, N neurons per head, L passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bdh_bench.errors import SpecError
from bdh_bench.kernels import decode, rotary
from bdh_bench.kernels.bdh_pass import Form, Weights, bdh_pass, chunk_length, chunks, read_chunk, select
from bdh_bench.kernels.delta_rule import delta_rule
from bdh_bench.models import _bdh_reference
from bdh_bench.models._growing import GrowingMemory
from bdh_bench.session import Memory, Streaming, TensorMemory
from bdh_bench.types import Keep

DEFAULTS = {
    "learning_rate": 4e-3,
    "position_limit": "none",
    "kind": "recurrent",
    "architecture": "weights shared over layers; sparse positive keys through ReLU, rotary phases; no norm weights, no short convolution",
}

_MODES = ("auto", "parallel", "chunked", "recurrent", "sparse")
_STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

#: ``auto`` decodes a pass sparsely where fewer of its rows than this are active and its state is at least so large: below
#: that the dense step is faster (``make bench-engine`` prints where the two meet).
BREAK_EVEN_DENSITY = 0.4
_SPARSE_BYTES = 8 * 2**20
_LOOK_EVERY = 32  # tokens between two looks at the density


@dataclass(frozen=True)
class Config:
    """Published option names first; those from ``decay`` on are ours, not the paper's.

    n_layer                      passes through the one set of weights
    n_embd                       width D of the residual stream
    n_head                       heads
    mlp_internal_dim_multiplier  neurons of all heads together, as a multiple of the width
    vocab_size                   tokens; 256 are the bytes
    dropout                      of the published code, in training alone
    mode           what computes: parallel or chunked (a whole text), recurrent or sparse (one token), or auto
    chunk          tokens of a chunk; 0 means the rule of the kernel
    state_dtype    of the memory: float32, bfloat16 or float64
    checkpointing  recompute each pass in the backward pass instead of keeping its activations
    decay          nats per token by which the memory of the first head fades; head h fades 2^(−8h/H) times as fast (ALiBi's slopes)
    rope           off leaves keys unrotated, so that the memory does not know the order of what it has read
    key_density    share of the neurons of each head that may be active for a token, the largest ones
    key_sign       positive; signed takes the relu off the keys
    delta          the memory takes in only what it did not already answer, under keys of length 1
    attention      linear; softmax keeps every key and value in a KV cache and reads them with a softmax
    """

    n_layer: int = 6
    n_embd: int = 256
    n_head: int = 4
    mlp_internal_dim_multiplier: int = 128
    vocab_size: int = 256
    dropout: float = 0.0
    mode: str = "auto"
    chunk: int = 0
    state_dtype: str = "float32"
    checkpointing: bool = False
    decay: float = 0.0
    rope: bool = True
    key_density: float = 1.0
    key_sign: str = "positive"
    delta: bool = False
    attention: str = "linear"

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
        raise ValueError("the number of passes is not in the weights; add :n_layer=… or a config.json beside them")
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


_PUBLISHED = ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "vocab_size", "dropout")
_FORMS = ("mode", "chunk", "state_dtype", "checkpointing")  # ways to compute the same numbers


def to_published(model: Model) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and state_dict in the published layout. Raises SpecError for a model with options that it cannot say."""
    ours = [
        f"{f.name}={getattr(model.config, f.name)}"
        for f in fields(Config)
        if f.name not in (*_PUBLISHED, *_FORMS) and getattr(model.config, f.name) != f.default
    ]
    if ours:
        raise SpecError(
            f"got a bdh with {', '.join(ours)} · the published layout has no such option", "convert without it"
        )
    return {name: getattr(model.config, name) for name in _PUBLISHED}, model.state_dict()


class Rotary(nn.Module):
    """Holds the frequency table under its published name, ``attn.freqs`` (1, 1, 1, N).

    Its float32 values belong to the model. A state_dict without the table keeps the computed one.
    """

    freqs: Tensor

    def __init__(self, neurons: int) -> None:
        super().__init__()
        self.register_buffer("freqs", rotary.frequencies(neurons).view(1, 1, 1, neurons))

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
        if not torch.is_grad_enabled():
            return self.advance(self.memory(tokens.shape[0]), 0, tokens, "all")
        if self._plain:
            return self._read_plainly(self.memory(tokens.shape[0]), 0, tokens)
        return self._read_whole(None, 0, tokens)

    forward = logits

    def _parallel(self, tokens: Tensor) -> Tensor:
        """The published arithmetic, T×T scores and all; kept as the truth for every other form."""
        batch, length = tokens.shape
        x = _norm(self.embed(tokens)).unsqueeze(1)  # (B, 1, T, D)
        by = rotary.turn(self.attn.freqs, 0, length)
        cos, sin = (part.to(_at_least_float32(x)).repeat_interleave(2, -1) for part in by)  # (T, N)
        for _ in range(self.config.n_layer):
            keys = select(x @ self.encoder, self._form())  # (B, H, T, N)
            query = _rotate_pairs(keys, cos, sin) if self.config.rope else keys
            read = _norm(self._scores(query) @ x if not self.config.delta else _delta_truth(query, x))  # (B, H, T, D)
            gated = F.dropout(keys * F.relu(read @ self.encoder_v), self.config.dropout, self.training)
            merged = gated.transpose(1, 2).reshape(batch, 1, length, -1)  # (B, 1, T, H·N)
            x = _norm(x + _norm(merged @ self.decoder))
        return x.squeeze(1) @ self.lm_head

    def _scores(self, query: Tensor) -> Tensor:
        """What each token reads of each earlier one, (B, H, T, T); nothing of itself."""
        scores = query @ query.mT
        if self.config.attention == "softmax":
            return _softmax(scores, 0, self.config.neurons)
        if (slopes := self._slopes()) is not None:
            where = torch.arange(scores.shape[-1], device=scores.device)
            scores = scores * (-slopes.view(-1, 1, 1) * (where.view(-1, 1) - where)).clamp(max=0).exp().to(scores.dtype)
        return scores.tril(-1)

    def _read_whole(self, memory: TensorMemory | None, position: int, tokens: Tensor) -> Tensor:
        """All logits, differentiable, pass by pass over the whole text; ``memory`` is carried through where there is one."""
        x = _norm(self.embed(tokens))
        weights, by = self._weights(), self._turn(position, tokens.shape[1], x)
        form = self._form(carry=memory is not None)
        for i in range(self.config.n_layer):
            state = None if memory is None else memory[_name(i)]
            if self.config.checkpointing:
                x, state = checkpoint(_pass, x, weights, by, state, form, use_reentrant=False)
            else:
                x, state = _pass(x, weights, by, state, form)
            if memory is not None and state is not None:
                memory[_name(i)] = state
        return x @ self.lm_head

    # -- what every form shares --------------------------------------------------------------------------------------

    @property
    def _plain(self) -> bool:
        """Whether the memory is one of ours that has no kernel of its own."""
        return self.config.delta or self.config.attention == "softmax"

    def _weights(self) -> Weights:
        """The weights heads first and in split order, as the kernels want them; gradients flow back to the parameters."""
        decoder = self.decoder.view(self.config.n_head, self.config.neurons, -1)
        split = rotary.split_order
        return Weights(split(self.encoder), split(self.encoder_v), split(decoder.mT).mT.contiguous())

    def _form(self, carry: bool = True) -> Form:
        c = self.config
        return Form(
            chunk=c.chunk or chunk_length(c.n_embd),
            signed=c.key_sign == "signed",
            active=max(1, round(c.key_density * c.neurons)) if c.key_density < 1 else 0,
            decay=self._slopes(),
            dropout=c.dropout if self.training else 0.0,
            carry=carry,
        )

    def _slopes(self) -> Tensor | None:
        """Nats per token by which each head forgets, (H,), or None."""
        c = self.config
        if not c.decay:
            return None
        heads = torch.arange(c.n_head, device=self.embed.weight.device, dtype=_at_least_float32(self.embed.weight))
        return c.decay * 2 ** (-8 * heads / c.n_head)

    def _turn(self, position: int, length: int, x: Tensor) -> rotary.Turn | None:
        if not self.config.rope:
            return None
        return rotary.turn(self.attn.freqs, position, length).to(_at_least_float32(x))

    # -- streaming ---------------------------------------------------------------------------------------------------

    def memory(self, batch_size: int) -> Memory:
        """S = 0 for every pass; for softmax an empty cache of keys (B, H, S, N) and values (B, S, D)."""
        c = self.config
        if c.attention == "softmax":
            return GrowingMemory(
                {f"layer{i}.{kind}": dim for i in range(c.n_layer) for kind, dim in (("key", 2), ("value", 1))}
            )
        shape = (batch_size, c.n_head, c.neurons, c.n_embd)
        device = self.embed.weight.device
        return BdhMemory(
            {_name(i): torch.zeros(shape, dtype=self._state_dtype, device=device) for i in range(c.n_layer)}
        )

    @property
    def _state_dtype(self) -> torch.dtype:
        return torch.float64 if self.embed.weight.dtype == torch.float64 else _STATE_DTYPES[self.config.state_dtype]

    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Keep) -> Tensor:
        """Without gradients, chunks of text outermost and passes inside: what is held does not depend on the length of the prompt."""
        last = slice(None) if keep == "all" else slice(-1, None)
        if torch.is_grad_enabled():
            read = self._read_plainly if self._plain else self._read_whole
            return read(memory, position, tokens)[:, last]
        if tokens.shape[1] == 1 and not self._plain:
            return self._step(memory, position, tokens)
        kept: list[Tensor] = []
        for part in chunks(tokens.shape[1], self.config.chunk or chunk_length(self.config.n_embd)):
            text = tokens[:, part]
            x = self._read_chunk(memory, position + part.start, text)
            if keep == "all" or part.stop == tokens.shape[1]:
                kept.append(x[:, last] @ self.lm_head)
        return torch.cat(kept, 1)

    def _read_chunk(self, memory: Any, position: int, tokens: Tensor) -> Tensor:
        """The residual stream (B, C, D) behind the last pass; the memory is updated in place."""
        if self._plain:
            return self._plain_stream(memory, position, tokens)
        x = _norm(self.embed(tokens))
        weights, by, form = memory.weights(self), self._turn(position, tokens.shape[1], x), self._form()
        for state in memory.values():
            x = _norm(x + _norm(read_chunk(x, weights, by, state, form)[0]))
        return x

    @torch.no_grad()
    def observe(self, memory: BdhMemory, position: int, tokens: Tensor) -> list[Activity]:
        """Read tokens (B, T) into the memory and show, by pass, what was active. For the additive memory only."""
        if self._plain:
            raise SpecError("this memory has no kernel that shows its keys", "observe a bdh without delta and softmax")
        x = _norm(self.embed(tokens))
        weights, by, form = memory.weights(self), self._turn(position, tokens.shape[1], x), self._form()
        shape = (self.config.n_head, *tokens.shape, -1)
        seen = []
        for state in memory.values():
            z, keys, gates = read_chunk(x, weights, by, state, form)
            seen.append(Activity(keys.view(shape), gates.view(shape), state))
            x = _norm(x + _norm(z))
        return seen

    def _step(self, memory: BdhMemory, position: int, tokens: Tensor) -> Tensor:
        """One token per stream (B, 1) → (B, 1, V); read before write, the memory is updated in place."""
        x = _norm(self.embed(tokens[:, 0]))  # (B, D)
        weights, by, form = memory.weights(self), self._turn(position, 1, x), self._form()
        fade = None if form.decay is None else (-form.decay).exp()
        by = by and by.to(x.dtype)
        for i, state in enumerate(memory.values()):
            keys = select(torch.bmm(x.expand(self.config.n_head, *x.shape), weights.encoder), form)  # (H, B, N)
            query = rotary.rotate(keys, by) if by is not None else keys
            if memory.sparse(i, query, self.config.mode):
                read, density = decode.read_sparse(query, x, state)
                memory.density[i] = density
                z = decode.gate_sparse(keys, _norm(read), memory.rows_v(), weights.decoder)
            else:
                read = decode.read_dense(query, x, state, fade)
                z = decode.gate_dense(keys, _norm(read), weights.encoder_v, weights.decoder)
            x = _norm(x + _norm(z))
        return (x @ self.lm_head).unsqueeze(1)

    # -- the memories of ours, in plain differentiable torch -----------------------------------------------------------

    def _read_plainly(self, memory: Any, position: int, tokens: Tensor) -> Tensor:
        return self._plain_stream(memory, position, tokens) @ self.lm_head

    def _plain_stream(self, memory: Any, position: int, tokens: Tensor) -> Tensor:
        """The residual stream (B, T, D) with a delta rule or a softmax in place of the additive memory."""
        x = _norm(self.embed(tokens))
        batch, length, width = x.shape
        weights, by, form = self._weights(), self._turn(position, length, x), self._form()
        heads = self.config.n_head
        for i in range(self.config.n_layer):
            keys = select(torch.bmm(x.reshape(1, -1, width).repeat(heads, 1, 1), weights.encoder), form)  # (H, B·T, N)
            apart = keys.view(heads, batch, length, -1)
            query = (rotary.turned(apart, by) if by is not None else apart).transpose(0, 1)  # (B, H, T, N)
            answer = _norm(self._plain_read(memory, i, query, x)).transpose(0, 1).reshape(heads, -1, width)
            gated = F.dropout(keys * F.relu(torch.bmm(answer, weights.encoder_v)), self.config.dropout, self.training)
            z = torch.bmm(gated, weights.decoder).sum(0).view(x.shape)
            x = _norm(x + _norm(z))
        return x

    def _plain_read(self, memory: Any, i: int, query: Tensor, x: Tensor) -> Tensor:
        """Queries (B, H, T, N) → reads (B, H, T, D); the memory of pass i takes in the text."""
        if self.config.delta:
            chunk = self.config.chunk or chunk_length(self.config.n_embd)
            answers, memory[_name(i)] = delta_rule(query, x, memory[_name(i)], chunk)
            return answers
        past = memory.parts[f"layer{i}.key"].length
        keys = memory.parts[f"layer{i}.key"].append(query)
        values = memory.parts[f"layer{i}.value"].append(x)
        read: Tensor = _softmax(query @ keys.mT, past, self.config.neurons) @ values.unsqueeze(1)
        return read

    # -- theory ------------------------------------------------------------------------------------------------------

    def state_bytes(self, batch_size: int, context: int) -> int:
        """L·n·D elements per stream at every context; with softmax a key of n and a value of D per pass and token."""
        c = self.config
        if c.attention == "softmax":
            elements = context * (c.n_head * c.neurons + c.n_embd)
            return batch_size * c.n_layer * elements * self.embed.weight.dtype.itemsize
        return batch_size * c.n_layer * c.n_head * c.neurons * c.n_embd * self._state_dtype.itemsize

    def reference_check(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Stored logits of the published code against these options on this device; nothing where the options change the numbers."""
        known: dict[str, Any] = dict(_bdh_reference.CONFIG)
        changed = {f.name for f in fields(Config) if getattr(self.config, f.name) != f.default}
        if changed - {*_PUBLISHED, *_FORMS}:
            return
        small = Model(replace(self.config, **known, dropout=0.0, state_dtype="float32", chunk=5))
        small.load_state_dict(
            {name: _bdh_reference.weight(name, p.shape) for name, p in small.named_parameters()}, False
        )
        small = small.to(self.embed.weight.device).eval()
        tokens, expected = _bdh_reference.tokens().to(self.embed.weight.device), _bdh_reference.logits()
        yield "the whole text", small.logits(tokens), expected
        session = small.session()
        yield "token by token", torch.cat([session.extend(t) for t in tokens.split(1, 1)], 1), expected

    def phases(self, position: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Turns per token, cosine and sine of every pair at ``position``, as a stream uses them."""
        by = self._turn(position, 1, self.embed.weight)
        return by and (self.attn.freqs.flatten()[::2], by.cos[0], by.sin[0])

    def unrolled_parameter_count(self) -> int:
        """Parameters with the three shared matrices counted once per pass, as a model without sharing would hold them."""
        shared = sum(p.numel() for p in (self.encoder, self.encoder_v, self.decoder))
        return self.parameter_count() + (self.config.n_layer - 1) * shared

    def flops_per_token(self, context: int, mode: str = "recurrent") -> float:
        """Forward operations per token; ``parallel`` counts the masked half of the scores too, ``sparse`` counts as dense."""
        c = self.config
        n, d = c.n_head * c.neurons, c.n_embd
        chunk = c.chunk or chunk_length(d)
        whole = 2 * context * (n + c.n_head * d)
        memory = {
            "parallel": whole,
            "chunked": 4 * n * d + 2 * min(chunk, context) * (n + c.n_head * d),
            "recurrent": 4 * n * d,
            "sparse": 4 * n * d,
        }[mode]
        if c.attention == "softmax":
            memory = whole
        return float(c.n_layer * (6 * n * d + memory) + 2 * c.vocab_size * d)

    def kernels(self) -> str:
        """What runs here."""
        if self._plain:
            return "torch delta rule" if self.config.delta else "torch softmax over a growing cache"
        return "torch chunked linear attention, dense or sparse decoding"


class Activity(NamedTuple):
    """One pass over a piece: keys xs and gates ys (H, B, T, N), and the live state (B, H, N, D) after it."""

    keys: Tensor
    gates: Tensor
    state: Tensor


class BdhMemory(TensorMemory):
    """S of every pass, and beside it what makes reading fast: packed weights and the choice between dense and sparse.

    Only S is state. The packed copies are made at the first read without gradients, and again when a weight was changed in
    place since. ``density`` holds, by pass, the share of rows that were active when last measured.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.density: dict[int, float] = {}
        self._choice: dict[int, bool] = {}
        self._looked: dict[int, int] = {}
        self._packed: tuple[list[tuple[int, int]], Weights] | None = None
        self._rows_v: Tensor | None = None

    def weights(self, model: Model) -> Weights:
        """The model's weights in the order of the kernels, heads first."""
        now = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]
        if self._packed is None or self._packed[0] != now:
            with torch.no_grad():
                self._packed, self._rows_v = (now, Weights(*(w.contiguous() for w in model._weights()))), None
        return self._packed[1]

    def rows_v(self) -> Tensor:
        """encoder_v with one row per neuron, (H·N, D)."""
        assert self._packed is not None
        if self._rows_v is None:
            self._rows_v = self._packed[1].encoder_v.mT.flatten(0, 1).contiguous()
        return self._rows_v

    def sparse(self, layer: int, query: Tensor, mode: str) -> bool:
        """Whether this pass reads this token sparsely; in ``auto`` the density is looked at now and then."""
        if mode != "auto":
            self._choice[layer] = mode == "sparse"
            return self._choice[layer]
        waited = self._looked.get(layer, _LOOK_EVERY)
        if waited < _LOOK_EVERY:
            self._looked[layer] = waited + 1
            return self._choice[layer]
        self._looked[layer] = 1
        self.density[layer] = float(query.count_nonzero()) / query.numel()
        large = self[_name(layer)].nbytes >= _SPARSE_BYTES
        self._choice[layer] = large and self.density[layer] <= BREAK_EVEN_DENSITY
        return self._choice[layer]

    def facts(self) -> dict[str, Any]:
        """How the last tokens were decoded: ``path`` dense, sparse or mixed, and the measured density of rows by pass."""
        sparse = [self._choice.get(i, False) for i in range(len(self))] or [False]
        path = "sparse" if all(sparse) else ("mixed" if any(sparse) else "dense")
        return {"path": path, "row_density": dict(self.density)}

    def fork(self) -> BdhMemory:
        """An independent copy; the packed weights, which never change, are shared."""
        copy = BdhMemory({name: tensor.clone() for name, tensor in self.items()})
        copy._packed, copy._rows_v = self._packed, self._rows_v
        copy.density, copy._choice, copy._looked = dict(self.density), dict(self._choice), dict(self._looked)
        return copy


def _name(layer: int) -> str:
    return f"layer{layer}.state"


def _pass(
    x: Tensor, weights: Weights, by: rotary.Turn | None, state: Tensor | None, form: Form
) -> tuple[Tensor, Tensor | None]:
    """One pass over a piece of text: x (B, T, D) and the memory (B, H, N, D) before → both after."""
    z, state = bdh_pass(x, weights, by, state, form)
    return _norm(x + _norm(z)), state


def _rotate_pairs(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The published rotation of (…, T, N), members of a pair side by side."""
    crossed = torch.stack((-keys[..., 1::2], keys[..., ::2]), -1).flatten(-2)
    return (keys * cos).to(keys.dtype) + (crossed * sin).to(keys.dtype)


def _softmax(scores: Tensor, past: int, neurons: int) -> Tensor:
    """Softmax of scores (B, H, T, S) / √N over the tokens before each query; the very first reads nothing."""
    length, total = scores.shape[-2:]
    scores = scores * neurons**-0.5
    rows = torch.arange(past, past + length, device=scores.device).unsqueeze(1)
    seen = torch.arange(total, device=scores.device) < rows  # (T, S)
    share = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
    return share.masked_fill(~seen, 0)


def _delta_truth(query: Tensor, values: Tensor) -> Tensor:
    """The delta rule over the whole text at once: queries (B, H, T, N), values (B, 1, T, D) → reads (B, H, T, D)."""
    unit = F.normalize(query, dim=-1)
    system = (unit @ unit.mT).tril(-1)
    wide = values.expand(-1, query.shape[1], -1, -1)
    written: Tensor = torch.linalg.solve_triangular(system, wide, upper=False, unitriangular=True)
    return values - written


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _norm(x: Tensor) -> Tensor:
    """Layer norm without scale or bias over the last axis."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


def _check(config: Config) -> None:
    if config.mode not in _MODES:
        raise SpecError(f"got mode={config.mode} · expected one of {', '.join(_MODES)}")
    if config.state_dtype not in _STATE_DTYPES:
        raise SpecError(f"got state_dtype={config.state_dtype} · expected one of {', '.join(_STATE_DTYPES)}")
    if config.key_sign not in ("positive", "signed"):
        raise SpecError(f"got key_sign={config.key_sign} · expected positive or signed")
    if config.attention not in ("linear", "softmax"):
        raise SpecError(f"got attention={config.attention} · expected linear or softmax")
    if not 0 < config.key_density <= 1:
        raise SpecError(f"got key_density={config.key_density} · expected a share above 0 and up to 1")
    if not 0 <= config.dropout < 1 or not 0 <= config.decay < math.inf:
        raise SpecError(
            f"got dropout={config.dropout} decay={config.decay} · expected dropout in [0, 1) and a decay of 0 or more"
        )
    ours = [
        name
        for name, on in (("decay", config.decay), ("delta", config.delta), ("attention", config.attention == "softmax"))
        if on
    ]
    if len(ours) > 1:
        raise SpecError(f"got {' and '.join(ours)} together · expected one kind of memory", "drop one of the options")
    if config.mode == "sparse" and ours:
        raise SpecError(
            f"got mode=sparse with {ours[0]} · {ours[0]} touches every row of the memory", "drop mode=sparse"
        )
    for name in ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "vocab_size"):
        if getattr(config, name) < 1:
            raise SpecError(f"got {name}={getattr(config, name)} · expected at least 1")
    if config.neurons % 2 or config.mlp_internal_dim_multiplier * config.n_embd % config.n_head:
        raise SpecError(
            f"got {config.mlp_internal_dim_multiplier}·{config.n_embd} neurons on {config.n_head} heads · expected an even "
            "whole number per head (keys rotate in pairs)"
        )
