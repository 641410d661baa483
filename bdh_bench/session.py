"""One stream for every model: length checks, fork, save, restore and the byte census.

A model brings two things: ``memory(batch_size)``, an empty memory, and ``advance(memory, position, tokens, keep)``, its
arithmetic on a piece of text, which leaves the memory at the end of the piece. All else that a session can do follows
from the memory's named tensors and is written here, once.

Legend: B batch, T tokens in this call, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bdh_bench.errors import PositionLimitError, SessionError
from bdh_bench.types import Keep, Tokenizer

_FORMAT = "bdh-bench/session/1"
_NOTE = "note."  # keeps a caller's names apart from ours in the file's metadata


class Memory(Protocol):
    """What a model remembers of a batch of streams."""

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by name; for a preallocated cache, views of the filled part."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over these tensors as the memory's content (they are not copied)."""
        ...

    def fork(self) -> Memory:
        """An independent copy."""
        ...


class TensorMemory(dict[str, Tensor]):
    """The memory of a recurrent model: a dictionary of tensors, replaced or updated in place by the model."""

    def tensors(self) -> dict[str, Tensor]:
        return dict(self)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.clear()
        self.update(tensors)

    def fork(self) -> TensorMemory:
        return type(self)({name: tensor.clone() for name, tensor in self.items()})


class Streaming:
    """What every model inherits: sessions over its ``memory`` and ``advance``, and plain defaults.

    A model with a last position overrides ``max_positions``; one without the shared start symbol sets it to None.
    """

    vocab_size: int
    max_positions: int | None = None
    start_symbol: int | None = 10  # the newline byte
    tokenizer: Tokenizer | None = None  # None: tokens are bytes

    if TYPE_CHECKING:

        def memory(self, batch_size: int) -> Memory:
            """An empty memory for ``batch_size`` streams."""
            ...

        def advance(self, memory: Any, position: int, tokens: Tensor, keep: Keep) -> Tensor:
            """Read tokens (B, T) at absolute ``position``; logits (B, 1, V) or (B, T, V)."""
            ...

    def session(self, batch_size: int = 1) -> StreamSession:
        """A live stream with empty state at position 0."""
        if batch_size < 1:
            raise SessionError(f"got batch_size {batch_size} · expected at least 1")
        return StreamSession(self, batch_size, self.memory(batch_size), 0)

    def restore(self, path: str | Path) -> StreamSession:
        """The session saved at ``path``. Raises SessionError for a damaged file or the file of another model."""
        with _saved(path) as file:
            meta = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if meta.get("fingerprint") != fingerprint(self):
            raise SessionError(
                f"{path} was saved by another model · expected fingerprint {fingerprint(self)[:12]}, "
                f"got {meta.get('fingerprint', 'none')[:12]}",
                "restore it with the model, options and weights that saved it",
            )
        batch_size, length = _number(path, meta, "batch_size", 1), _number(path, meta, "length", 0)
        memory = self.memory(batch_size)
        device = next((p.device for p in _module(self).parameters()), torch.device("cpu"))
        memory.load({name: tensor.to(device) for name, tensor in tensors.items()})
        return StreamSession(self, batch_size, memory, length)

    def parameter_count(self) -> int:
        """Unique trainable parameters; a tensor used in several places counts once."""
        return sum(p.numel() for p in {id(p): p for p in _module(self).parameters()}.values())


class StreamSession:
    """One batch of streams: the model's memory, and how many tokens it has read."""

    def __init__(self, model: Streaming, batch_size: int, memory: Memory, length: int) -> None:
        self.model = model
        self.batch_size = batch_size
        self.memory = memory
        self.length = length

    def extend(self, tokens: Tensor, keep: Keep = "last") -> Tensor:
        """Read tokens (B, T ≥ 1); return logits (B, 1, V) for keep="last", (B, T, V) for "all".

        Follows the caller's autograd mode. Raises SessionError for a wrong shape and PositionLimitError past the
        model's last position; in both cases the stream is unchanged.
        """
        if keep not in ("last", "all"):
            raise SessionError(f"got keep={keep!r} · expected 'last' or 'all'")
        if tokens.ndim != 2 or tokens.shape[0] != self.batch_size or tokens.shape[1] < 1:
            raise SessionError(
                f"got tokens of shape {tuple(tokens.shape)} · expected ({self.batch_size}, T) with T at least 1"
            )
        limit = self.model.max_positions
        if limit is not None and self.length + tokens.shape[1] > limit:
            raise PositionLimitError(
                f"got {self.length + tokens.shape[1]} positions · this model has {limit}",
                "use fewer tokens or a model with more positions; inputs are never truncated",
            )
        logits = self.model.advance(self.memory, self.length, tokens, keep)
        self.length += tokens.shape[1]
        return logits

    def detach(self) -> None:
        """Cut the graph behind the state (truncated back-propagation through time)."""
        self.memory.load({name: tensor.detach() for name, tensor in self.memory.tensors().items()})

    def state(self) -> list[Tensor]:
        """The live tensors that must survive until the next token."""
        return list(self.memory.tensors().values())

    @property
    def state_bytes(self) -> int:
        """Census: bytes of the live state, overlapping views counted once."""
        return live_bytes(self.state())

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the unique storages behind the live state."""
        return storage_bytes(self.state())

    def facts(self) -> dict[str, Any]:
        """What the memory says of how it was read (a path that was chosen, a density that was measured); mostly nothing."""
        tell = getattr(self.memory, "facts", None)
        return tell() if tell else {}

    def fork(self) -> StreamSession:
        """An independent copy: extending one never changes the other."""
        return StreamSession(self.model, self.batch_size, self.memory.fork(), self.length)

    def multiply(self, streams: int, room: int = 0) -> None:
        """Become a batch of so many copies of this one stream; a memory that grows gets room for ``room`` more tokens and no more.

        No more is held at any time than the batch, this stream twice, and two streams of a single token. Raises SessionError for a
        batch of several streams, or a memory whose tensors do not tell which dimension counts streams.
        """
        if self.batch_size != 1:
            raise SessionError(f"got a batch of {self.batch_size} streams · expected one stream to multiply")
        axes = _stream_axes(self.model, self.memory)
        lengths = {name: tensor.shape for name, tensor in self.memory.tensors().items()}
        single = self._reserve(room)
        self.memory = self.model.memory(streams)
        self.memory.load(
            {name: tensor for name, (tensor, _) in single.items()}
        )  # lets go of an empty state for all of them
        wide, filled = {}, {}
        for name, axis in axes.items():
            tensor, dim = single.pop(name)
            wide[name] = tensor.repeat([streams if d == axis else 1 for d in range(tensor.ndim)])
            filled[name] = wide[name] if dim is None else wide[name].narrow(dim, 0, lengths[name][dim])
        self.memory.load(wide)
        self.memory.load(filled)  # views of what was loaded just now: the room behind them is kept
        self.batch_size = streams

    def _reserve(self, room: int) -> dict[str, tuple[Tensor, int | None]]:
        """By name, the tensor with what the next ``room`` tokens would add to it, and the dimension along which they do."""
        found: dict[str, tuple[Tensor, int | None]] = {name: (t, None) for name, t in self.memory.tensors().items()}
        if not room:
            return found
        ahead, device = self.fork(), next((t.device for t in self.state()), torch.device("cpu"))
        ahead.extend(torch.zeros((1, room), dtype=torch.long, device=device))
        for name, later in ahead.memory.tensors().items():
            now = found[name][0]
            longer = [d for d in range(now.ndim) if later.shape[d] > now.shape[d]]
            if len(longer) == 1 and torch.equal(later.narrow(longer[0], 0, now.shape[longer[0]]), now):
                found[name] = (later, longer[0])
        return found

    def save(self, path: str | Path, notes: Mapping[str, str] | None = None) -> None:
        """Write state, length, fingerprint and the caller's ``notes`` to ``path`` (safetensors); ``saved_notes`` reads them back.

        The file appears complete or not at all. Raises SessionError where it cannot be written.
        """
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in self.memory.tensors().items()}
        meta = {
            "format": _FORMAT,
            "fingerprint": fingerprint(self.model),
            "length": str(self.length),
            "batch_size": str(self.batch_size),
            **{_NOTE + name: text for name, text in (notes or {}).items()},
        }
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, str(partial), metadata=meta)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink()
            raise SessionError(
                f"cannot write a session to {path}: {error}", "check the folder and its space"
            ) from error


def _stream_axes(model: Streaming, memory: Memory) -> dict[str, int]:
    """By name of one stream's tensors, the dimension that is twice as long for two streams. Raises SessionError where none is.

    Two streams of a single token are enough to compare with: what grows with the context is no longer there, never twice as long.
    """
    device = next((t.device for t in memory.tensors().values()), torch.device("cpu"))
    session = model.session(2)
    session.extend(torch.zeros((2, 1), dtype=torch.long, device=device))
    two = {name: tensor.shape for name, tensor in session.memory.tensors().items()}
    axes = {}
    for name, tensor in memory.tensors().items():
        doubled = [d for d, (a, b) in enumerate(zip(tensor.shape, two.get(name, ()), strict=False)) if b == 2 * a > 0]
        if len(doubled) != 1:
            raise SessionError(
                f"state {name!r} has no dimension that counts streams · expected one", "see Memory.tensors()"
            )
        axes[name] = doubled[0]
    return axes


def saved_notes(path: str | Path) -> dict[str, str]:
    """The notes that ``save`` was given for ``path``. Raises SessionError for a file that is no saved session."""
    with _saved(path) as file:
        return {k.removeprefix(_NOTE): v for k, v in file.metadata().items() if k.startswith(_NOTE)}


@contextmanager
def _saved(path: str | Path) -> Iterator[Any]:
    """The opened file of a session."""
    try:
        with safe_open(str(path), framework="pt") as file:
            if (file.metadata() or {}).get("format") != _FORMAT:
                raise SessionError(f"{path} is no saved session · expected format {_FORMAT}", "save it again")
            yield file
    except (OSError, SafetensorError) as error:
        raise SessionError(f"cannot read a session from {path}: {error}", "save it again") from error


def _number(path: str | Path, meta: Mapping[str, str], name: str, least: int) -> int:
    text = meta.get(name, "")
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise SessionError(
            f"{path} is damaged: got {name} {text or 'missing'!r} · expected a whole number of at least {least}",
            "save it again",
        )
    return int(text)


def _module(model: Streaming) -> nn.Module:
    """A streaming model is an nn.Module too; the two are joined in the model's own class."""
    assert isinstance(model, nn.Module)
    return model


def fingerprint(model: Streaming) -> str:
    """sha256 over the model's class and every named parameter and buffer: names, shapes, dtypes and values."""
    digest = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    digest.update(repr(getattr(model, "config", None)).encode())
    for name, tensor in sorted(_module(model).state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tuple(data.shape)}{data.dtype}".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def live_bytes(tensors: Iterable[Tensor]) -> int:
    """Σ numel · itemsize, where memory that several views (or a stride of 0) share is counted once."""
    by_storage: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    return sum(_bytes_in_storage(views) for views in by_storage.values())


def _bytes_in_storage(views: list[Tensor]) -> int:
    if len(views) == 1 and 0 not in views[0].stride():
        return views[0].numel() * views[0].itemsize
    touched = torch.zeros(views[0].untyped_storage().nbytes(), dtype=torch.bool)
    for view in views:
        size = (*view.shape, view.itemsize)
        stride = (*(s * view.itemsize for s in view.stride()), 1)
        touched.as_strided(size, stride, view.storage_offset() * view.itemsize).fill_(True)
    return int(touched.sum())


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the unique storages behind these tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
