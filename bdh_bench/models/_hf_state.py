"""What does a causal LM of transformers remember, as named tensors?

transformers has one cache for most models (``past_key_values`` or ``cache_params``: layers of keys and values, of convolution and
recurrent states, or of both), and older ways beside it: xLSTM's own cache, RWKV's list ``state``, and tensors that a module keeps in
an attribute (RecurrentGemma). All of them are nested objects with tensors inside. This file walks them:

    state      a tensor that grows in proportion to the batch; what a session counts, copies and saves
    counter    a whole number (or a tensor of one) that equals the tokens read; set from the session's position
    the rest   flags, widths, windows: the same for every non-empty stream, made anew by reading one token

Legend: B batch, T tokens in this call, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bdh_bench.errors import SessionError
from bdh_bench.types import Keep

#: Arguments under which a model takes and returns what it remembers; the first one that it knows is used.
_ARGUMENTS = ("past_key_values", "cache_params", "state")

_Path = tuple[Any, ...]


def leaves(thing: Any, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """Every tensor and whole number inside nested lists, tuples, dictionaries and cache objects of transformers."""
    if isinstance(thing, Tensor) or (isinstance(thing, int) and not isinstance(thing, bool)):
        yield path, thing
    elif isinstance(thing, Mapping):
        for key, item in thing.items():
            yield from leaves(item, (*path, key))
    elif isinstance(thing, list | tuple):
        for index, item in enumerate(thing):
            yield from leaves(item, (*path, index))
    elif _is_cache(thing):
        for key, item in vars(thing).items():
            yield from leaves(item, (*path, key))


def _is_cache(thing: Any) -> bool:
    if isinstance(thing, type | nn.Module) or not type(thing).__module__.startswith("transformers."):
        return False
    return hasattr(thing, "__dict__") and not hasattr(thing, "model_type")  # a configuration is no state


def put(thing: Any, path: _Path, value: Any) -> Any:
    """``thing`` with ``value`` at ``path``; changed in place except where it is a tuple."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(thing, tuple):
        return (*thing[:head], put(thing[head], rest, value), *thing[head + 1 :])
    if isinstance(thing, dict | list):
        thing[head] = put(thing[head], rest, value)
    else:
        setattr(thing, head, put(getattr(thing, head), rest, value))
    return thing


class UnknownStateError(Exception):
    """What this model remembers cannot be told apart from what it merely keeps; the message is the reason."""


class Reader:
    """A transformers module, and where it keeps what it remembers.

    argument    the keyword of its cache, or "" where it has none
    held        attributes of inner modules that hold state: (module, name, value of an empty stream)
    counters    leaves that equal the tokens read; fixed: tensors that are no state
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        known = inspect.signature(module.forward).parameters
        self.argument = next((name for name in _ARGUMENTS if name in known), "")
        self.places = "position_ids" in known
        self._keeps = "logits_to_keep" in known
        self._makes_own = self.argument != "past_key_values"  # the model makes its cache, and no shared one fits
        # Before anything was read: what a module holds in an attribute then is an empty stream.
        self._fresh = {(id(m), name): value for m in module.modules() for name, value in vars(m).items()}
        self.held: list[tuple[nn.Module, str, Any]] = []
        self.counters: frozenset[_Path] = frozenset()
        self.fixed: frozenset[_Path] = frozenset()

    def whole(self, tokens: Tensor, keep: int = 0) -> Tensor:
        """Logits (B, T, V) of a text read from its start without a cache, or those of the last ``keep`` tokens."""
        options: dict[str, Any] = {"logits_to_keep": keep} if keep and self._keeps else {}
        out: Tensor = self.module(input_ids=tokens, use_cache=False, **options).logits
        return out[:, -keep:] if keep else out

    def read(self, content: dict[str, Any] | None, position: int, tokens: Tensor, keep: Keep) -> tuple[Tensor, Any]:
        """Logits, and the content afterwards. ``content`` None is an empty stream; it may be changed in place."""
        options: dict[str, Any] = {"use_cache": True}
        if self.places:
            places = torch.arange(position, position + tokens.shape[1], device=tokens.device)
            options["position_ids"] = places.expand(tokens.shape[0], -1)  # (B, T)
        if self._keeps and keep == "last":
            options["logits_to_keep"] = 1
        options[self.argument] = self._empty() if content is None else content["cache"]
        for index, (module, name, empty) in enumerate(self.held):
            setattr(module, name, empty if content is None else content["held"][index])
        try:
            out = self.module(input_ids=tokens, **options)
            held = [getattr(module, name) for module, name, _ in self.held]
        finally:
            for module, name, empty in self.held:
                setattr(module, name, empty)
        cache = getattr(out, self.argument, None)
        if cache is None:
            cache = options[self.argument]
        logits: Tensor = out.logits
        return logits[:, -1:] if keep == "last" else logits, {"cache": cache, "held": held}

    def _empty(self) -> Any:
        if self._makes_own:
            return None
        from transformers import DynamicCache

        return DynamicCache(config=self.module.config)

    @torch.inference_mode()
    def learn(self, device: torch.device) -> None:
        """Find counters and held state by reading a few tokens. Raises UnknownStateError for a form it cannot save."""
        if not self.argument:
            raise UnknownStateError("the model takes no cache that is known here")
        try:
            self._after(1, 2, device)
        except ValueError:  # "a cache of its own"
            self._makes_own = True
        self.held = []  # while it is unknown, it stays where the model puts it
        self.held = [*self._find_held(device)]
        seen = {(batch, n): dict(leaves(self._after(batch, n, device))) for batch, n in ((1, 3), (1, 4), (3, 4))}
        short, long, wide = seen[1, 3], seen[1, 4], seen[3, 4]
        if not short.keys() == long.keys() == wide.keys():
            raise UnknownStateError("the form of its cache depends on the text")
        self.counters = frozenset(p for p in short if _number(short[p]) == 3 and _number(long[p]) == 4)
        fixed = set()
        for path in short.keys() - self.counters:
            a, b, c = short[path], long[path], wide[path]
            if isinstance(b, Tensor) and c.numel() == 3 * b.numel():
                continue
            same = torch.equal(a, b) and torch.equal(b, c) if isinstance(a, Tensor) else a == b == c
            if not same:
                raise UnknownStateError(f"{'.'.join(map(str, path))} of its cache is neither per stream nor a position")
            fixed.add(path)
        self.fixed = frozenset(fixed)

    def _find_held(self, device: torch.device) -> Iterator[tuple[nn.Module, str, Any]]:
        """Attributes of modules that a cached forward replaces by tensors with the batch in front."""
        found: dict[int, set[tuple[int, str]]] = {}
        for batch in (2, 3):
            self._after(batch, 4, device)
            for module in self.module.modules():
                for name, value in vars(module).items():
                    per_stream = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch
                    if per_stream and value is not self._fresh.get((id(module), name)):
                        found.setdefault(batch, set()).add((id(module), name))
        both = found.get(2, set()) & found.get(3, set())
        for module in self.module.modules():
            for name in vars(module):
                if (id(module), name) in both:
                    empty = self._fresh.get((id(module), name))
                    setattr(module, name, empty)
                    yield module, name, empty

    def _after(self, batch: int, length: int, device: torch.device) -> dict[str, Any]:
        """The content of ``batch`` streams that have read ``length`` tokens, one by one after the first two."""
        tokens = (
            torch.arange(batch * length, device=device).view(batch, length)
            % self.module.config.get_text_config().vocab_size
        )
        content: dict[str, Any] | None = None
        for start, stop in ((0, 2), *((i, i + 1) for i in range(2, length))):
            _, content = self.read(content, start, tokens[:, start:stop], "last")
        assert content is not None
        return content

    @torch.no_grad()
    def form(self, batch: int, device: torch.device) -> Any:
        """A content of the right form for ``batch`` streams, whose tensors are to be replaced."""
        return self.read(None, 0, torch.zeros((batch, 1), dtype=torch.long, device=device), "last")[1]

    def state(self, content: Any) -> dict[_Path, Tensor]:
        """The tensors of a content that are state."""
        found = leaves(content)
        return {p: t for p, t in found if isinstance(t, Tensor) and t.numel() and p not in self.counters | self.fixed}

    def place(self, content: Any, position: int) -> Any:
        """``content`` with its counters at ``position``."""
        for path, value in [(p, v) for p, v in leaves(content) if p in self.counters]:
            content = put(content, path, torch.full_like(value, position) if isinstance(value, Tensor) else position)
        return content


def _number(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return int(value) if value.numel() == 1 and not value.is_floating_point() else None
    return value if isinstance(value, int) else None


class CacheMemory:
    """The memory of a model with a cache; ``stepwise`` reads every piece token by token."""

    def __init__(self, reader: Reader, batch_size: int, device: torch.device, stepwise: bool) -> None:
        self.reader, self.batch_size, self.device, self.stepwise = reader, batch_size, device, stepwise
        self.content: Any = None

    def read(self, position: int, tokens: Tensor, keep: Keep) -> Tensor:
        """Logits (B, 1, V) or (B, T, V)."""
        pieces = tokens.split(1, 1) if self.stepwise else (tokens,)
        self._make_writable()
        if self.content is not None:
            self.content = self.reader.place(self.content, position)
        kept: list[Tensor] = []
        for offset, piece in zip(range(len(pieces)), pieces, strict=True):
            logits, self.content = self.reader.read(self.content, position + offset, piece, keep)
            kept.append(logits)
        return kept[-1] if keep == "last" else torch.cat(kept, 1)

    def _make_writable(self) -> None:
        """Tensors born in inference mode cannot be written outside of it."""
        if self.content is None or torch.is_inference_mode_enabled():
            return
        for path, value in [*leaves(self.content)]:
            if isinstance(value, Tensor) and value.is_inference():
                self.content = put(self.content, path, value.clone())

    def tensors(self) -> dict[str, Tensor]:
        """``cache.layers.0.keys``, …: nothing before the first token."""
        return {_name(path): tensor for path, tensor in self.reader.state(self.content).items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over these tensors as the content. Raises SessionError for names that this model does not have."""
        if not tensors:
            self.content = None
            return
        if self.content is None:
            self.content = self.reader.form(self.batch_size, self.device)
        paths = {_name(path): path for path in self.reader.state(self.content)}
        if paths.keys() != tensors.keys():
            wrong = sorted(paths.keys() ^ tensors.keys())
            raise SessionError(f"got a state with other tensors · {', '.join(wrong[:3])}", "save it again")
        for name, tensor in tensors.items():
            self.content = put(self.content, paths[name], tensor)

    def fork(self) -> CacheMemory:
        """An independent copy."""
        twin = CacheMemory(self.reader, self.batch_size, self.device, self.stepwise)
        config = self.reader.module.config
        memo: dict[int, Any] = {id(config): config}
        memo |= {id(t): t.clone() for _, t in leaves(self.content) if isinstance(t, Tensor)}
        twin.content = copy.deepcopy(self.content, memo)
        return twin

    def facts(self) -> dict[str, Any]:
        return {"path": "stepwise" if self.stepwise else "cached"}


class RowsMemory:
    """The memory of a model that mixes the rows of a batch: one cache for each stream, read in turn."""

    def __init__(self, reader: Reader, batch_size: int, device: torch.device) -> None:
        self.rows = [CacheMemory(reader, 1, device, stepwise=False) for _ in range(batch_size)]

    def read(self, position: int, tokens: Tensor, keep: Keep) -> Tensor:
        """Logits (B, 1, V) or (B, T, V)."""
        texts = tokens.split(1, 0)
        return torch.cat([row.read(position, text, keep) for row, text in zip(self.rows, texts, strict=True)])

    def tensors(self) -> dict[str, Tensor]:
        """``row0.cache.0``, …"""
        return {f"row{i}.{name}": t for i, row in enumerate(self.rows) for name, t in row.tensors().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over these tensors as the content."""
        for i, row in enumerate(self.rows):
            own = f"row{i}."
            row.load({name.removeprefix(own): t for name, t in tensors.items() if name.startswith(own)})

    def fork(self) -> RowsMemory:
        """An independent copy."""
        twin = copy.copy(self)
        twin.rows = [row.fork() for row in self.rows]
        return twin

    def facts(self) -> dict[str, Any]:
        return {"path": "rowwise"}


def memory_for(path: str, reader: Reader, batch_size: int, device: torch.device) -> CacheMemory | RowsMemory:
    """An empty memory for one of the ways of reading over a cache: cached, stepwise or rowwise."""
    if path == "rowwise":
        return RowsMemory(reader, batch_size, device)
    return CacheMemory(reader, batch_size, device, stepwise=path == "stepwise")


def _name(path: _Path) -> str:
    return ".".join(map(str, path))
