"""Any causal language model of transformers, as published: ``hf:ID[@REVISION]`` or ``hf:./folder``.

It is evaluated as it is: never trained, its own tokenizer (``_hf_tokens``), its own weights (``_hf_files``), its own cache
(``_hf_state``) in the first way of reading that gives the numbers of the whole text (``_hf_paths``). That is measured before the
first session, once for each device and dtype, and every row says which way it was.

Positions: learned ones end; a position that the module refuses is the limit. So is the trained length where rotary angles depend on the
length of the text (types dynamic and longrope), because no stream can equal the whole text past it. Plain rotary and recurrent
models have no limit; what they were trained on is the fact ``trained_positions``, and what lies beyond is extrapolation.

Options: ``tokenizer=bytes`` for a checkpoint without tokenizer whose first 256 ids are the bytes; ``start=none|ID`` instead of the
tokenizer's own start symbol; ``cache=cached|stepwise|rowwise|recompute`` forces a way of reading, and one that is off is refused.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdh_bench.errors import CheckpointError, LawError, PositionLimitError, SpecError
from bdh_bench.models import _hf_files as files
from bdh_bench.models._growing import GrowingMemory
from bdh_bench.models._hf_paths import CACHED, TOLERANCE, Verification, verify
from bdh_bench.models._hf_shapes import Shapes
from bdh_bench.models._hf_state import Reader, memory_for
from bdh_bench.models._hf_tokens import ByteSpans
from bdh_bench.session import Memory, Streaming
from bdh_bench.types import Keep

DEFAULTS = {
    "learning_rate": 0.0,
    "position_limit": "the checkpoint's",
    "needs_name": True,
    "kind": "checkpoint",
    "architecture": "the checkpoint's own, see its config.json",
}

_WAYS = ("auto", *CACHED, "recompute")
_MOST_BYTE_IDS = 384  # 256 bytes and the special tokens of byte models
_NEWLINE = 10
_STRETCHED = ("dynamic", "longrope")  # rotary types whose angles depend on the length of the text


@dataclass(frozen=True)
class Config:
    """How a checkpoint is read.

    name       the folder or ID after ``hf:``
    revision   what follows the ``@``
    tokenizer  auto is the checkpoint's own; bytes for one without, whose first 256 ids are the bytes
    start      the symbol before every text: auto (the tokenizer's own), none, or the id of a token
    cache      way of reading: auto (the first that is exact), cached, stepwise, rowwise or recompute
    """

    name: str = ""
    revision: str = ""
    tokenizer: str = "auto"
    start: str = "auto"
    cache: str = "auto"


class Model(Streaming, nn.Module):
    """A transformers module under the laws of a session; weights are below ``model.``."""

    trainable = False
    origin = "pretrained"

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = config
        files.read_config(config.name, config.revision)
        self.model = files.load_module(config.name, config.revision)
        text = self.model.config.get_text_config(decoder=True)
        self.vocab_size = int(self.model.get_output_embeddings().weight.shape[0])
        self._text_config = text
        self.reader = Reader(self.model)
        self._verified: Verification | None = None
        self.tokenizer, own_start = self._tokens()
        self.start_symbol = self._start(own_start)
        self.trained_positions = _trained_positions(text)
        self.max_positions = self._position_limit()
        self._refuse_look_ahead()

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _tokens(self) -> tuple[ByteSpans | None, int | None]:
        """The tokenizer (None: tokens are bytes) and the start symbol that comes with it."""
        name, revision = self.config.name, self.config.revision
        if self.config.tokenizer == "bytes":
            if files.has_tokenizer(name):
                raise SpecError(
                    f"got tokenizer=bytes for {name}, which has a tokenizer of its own", "leave the option out"
                )
            if not 256 <= self.vocab_size <= _MOST_BYTE_IDS:
                raise SpecError(
                    f"got tokenizer=bytes for a vocabulary of {self.vocab_size} · expected 256 to {_MOST_BYTE_IDS} ids"
                )
            return None, _NEWLINE
        fast = files.load_tokenizer(name, revision)
        spans = ByteSpans(fast.backend_tokenizer, name)
        if spans.size > self.vocab_size:
            raise CheckpointError(
                f"{name}: the tokenizer has {spans.size} ids, the model {self.vocab_size} · expected no more ids than the model has",
                "give the tokenizer that the model was trained with",
            )
        declared = fast.bos_token_id if fast.bos_token_id is not None else self._text_config.bos_token_id
        return spans, declared

    def _start(self, own: int | None) -> int | None:
        if self.config.start == "none":
            return None
        if self.config.start == "auto":
            return own if own is not None and 0 <= own < self.vocab_size else None
        if not self.config.start.isdecimal() or int(self.config.start) >= self.vocab_size:
            raise SpecError(f"got start={self.config.start} · expected none, or an id below {self.vocab_size}")
        return int(self.config.start)

    # -- what is checked once ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _position_limit(self) -> int | None:
        """The first position that the module refuses, where that is the end of its table."""
        table = self.trained_positions
        if table is None:
            return None
        if _rotary_types(self._text_config) & set(_STRETCHED):
            return int(
                getattr(self._text_config, "original_max_position_embeddings", None)
                or _original(self._text_config)
                or table
            )
        if not self.reader.places:
            rows = [
                m.num_embeddings for n, m in self.model.named_modules() if isinstance(m, nn.Embedding) and "pos" in n
            ]
            return table if any(table <= r <= table + 2 for r in rows) else None
        beyond = torch.tensor([[table]])
        try:
            self.model(input_ids=torch.zeros_like(beyond), position_ids=beyond, use_cache=False)
        except (IndexError, RuntimeError):
            return table
        return None

    @torch.inference_mode()
    def _refuse_look_ahead(self) -> None:
        """Raise CheckpointError where a later token moves the logits of an earlier one."""
        tokens = torch.arange(12).unsqueeze(0) % self.vocab_size
        other = tokens.clone()
        other[0, -1] = (other[0, -1] + 1) % self.vocab_size
        a, b = self.reader.whole(tokens)[:, :-1], self.reader.whole(other)[:, :-1]
        seen = float((a - b).abs().max())
        if not seen <= TOLERANCE * max(1.0, float(a.std())):
            raise CheckpointError(
                f"{self.config.name}: the last token moves earlier logits by {seen:.3g} · expected a model that sees only the past",
                "use a causal checkpoint (is_decoder in config.json)",
            )

    @property
    def verification(self) -> Verification:
        """What the ways of reading measured here. Raises LawError where a forced one is off."""
        if self._verified is None:
            found = verify(self.reader, self.vocab_size, self.max_positions, self.config.cache)
            if self.config.cache not in ("auto", found.path):
                raise LawError(
                    f"{self.config.name}: cache={self.config.cache} does not give the numbers of the whole text: {found.told()}",
                    "leave the option out; the first exact way is used then",
                )
            self._verified = found
        return self._verified

    # -- the model -----------------------------------------------------------------------------------------------------

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, V), without a cache. Raises PositionLimitError past the last position."""
        if self.max_positions is not None and tokens.shape[1] > self.max_positions:
            raise PositionLimitError(
                f"got {tokens.shape[1]} positions · this model has {self.max_positions}",
                "use fewer tokens or a model with more positions; inputs are never truncated",
            )
        return self.reader.whole(tokens)

    forward = logits

    def memory(self, batch_size: int) -> Memory:
        """An empty memory for the way of reading that was found exact."""
        path = self.verification.path
        if path == "recompute":
            return _Text({"tokens": 1})
        return memory_for(path, self.reader, batch_size, next(self.parameters()).device)

    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Keep) -> Tensor:
        """Read a piece; with ``recompute``, the whole text."""
        if isinstance(memory, _Text):
            text = memory.parts["tokens"].append(tokens)
            return self.reader.whole(text, 1 if keep == "last" else tokens.shape[1])
        logits: Tensor = memory.read(position, tokens, keep)
        return logits

    def state_bytes(self, batch_size: int, context: int) -> int:
        """Fixed bytes and bytes per token of every state tensor, as ``verification`` found them."""
        return batch_size * self.verification.bytes_per_stream(context)

    def flops_per_token(self, context: int, mode: str = "recurrent") -> float:
        """An estimate: two operations for every weight that a token meets (of experts, those that are chosen), four for every
        feature of every query head and position seen, six for every element of a recurrent state."""
        found, c = self.verification, self._text_config
        weights = 2.0 * self._weights_met()
        width = c.num_attention_heads * _head_width(c) if getattr(c, "num_attention_heads", None) else 0
        attention, recurrent = 0.0, 0.0
        item = next(self.parameters()).itemsize
        for name, growth in found.growth.items():
            if growth.per_token and name.endswith("keys"):
                attention += 4.0 * width * (context if growth.window is None else min(context, growth.window))
            elif not growth.per_token:
                recurrent += 6.0 * growth.fixed / item
        again = context if found.path == "recompute" else 1
        return again * (weights + attention + recurrent)

    def _weights_met(self) -> float:
        c = self._text_config
        experts = next(
            (v for n in ("num_local_experts", "num_experts", "n_routed_experts") if (v := getattr(c, n, None))), 0
        )
        chosen = getattr(c, "num_experts_per_tok", None) or experts
        head, tables = self.model.get_output_embeddings().weight, {id(self.model.get_input_embeddings().weight)}
        tables |= {id(m.weight) for n, m in self.model.named_modules() if isinstance(m, nn.Embedding) and "pos" in n}
        met = 0.0
        for name, weight in self.named_parameters():
            if id(weight) in tables and weight is not head:
                continue  # a look-up is no product
            met += weight.numel() * (chosen / experts if experts and ".experts." in name else 1)
        return met

    def kernels(self) -> str:
        """What runs here, and how pieces are read."""
        from transformers import __version__

        attention = getattr(self.model.config, "_attn_implementation", None) or "eager"
        return (
            f"transformers {__version__} {type(self.model).__name__}, attention {attention}, {self.verification.told()}"
        )

    def facts(self) -> dict[str, Any]:
        """What rows of this model carry beside the usual."""
        found = self.verification
        return {
            "path": found.path,
            "path_errors": dict(found.errors),
            "past_moves_logits": found.moved,
            "trained_positions": self.trained_positions,
            "start_symbol": self.start_symbol,
            "checkpoint": files.checkpoint_digest(self.config.name, self.model),
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Model:
        exact = [
            (module, name, module._buffers[name])
            for module in self.model.modules()
            for name in module._non_persistent_buffers_set
            if module._buffers.get(name) is not None
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, before in exact:  # angles are computed, not published: they keep their own type
            now = module._buffers[name]
            if before is not None and now is not None and now.dtype != before.dtype:
                module._buffers[name] = before.to(now.device)
        self._verified = None
        return self


def without_weights(config: Config, dtype: torch.dtype) -> Shapes:
    """What the checkpoint needs, from its config and the headers of its weights."""
    return Shapes(config.name, config.revision, dtype)


class _Text(GrowingMemory):
    """The memory of ``recompute``: the token ids read so far."""

    def facts(self) -> dict[str, Any]:
        return {"path": "recompute"}

    def fork(self) -> _Text:
        twin = _Text({"tokens": 1})
        twin.load({name: tensor.clone() for name, tensor in self.tensors().items()})
        return twin


def _check(config: Config) -> None:
    if not config.name:
        raise SpecError("got hf without a checkpoint · expected hf:ID[@REVISION] or hf:./folder")
    if config.cache not in _WAYS:
        raise SpecError(f"got cache={config.cache} · expected one of {', '.join(_WAYS)}")
    if config.tokenizer not in ("auto", "bytes"):
        raise SpecError(f"got tokenizer={config.tokenizer} · expected auto or bytes")


def _trained_positions(config: Any) -> int | None:
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "context_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _rotary(config: Any) -> list[dict[str, Any]]:
    """The rotary settings: one for the model, or one for each kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    return [found, *(v for v in found.values() if isinstance(v, dict))] if isinstance(found, dict) else []


def _rotary_types(config: Any) -> set[str]:
    return {str(setting.get("rope_type")) for setting in _rotary(config)}


def _original(config: Any) -> int | None:
    return next(
        (
            int(s["original_max_position_embeddings"])
            for s in _rotary(config)
            if s.get("original_max_position_embeddings")
        ),
        None,
    )


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
