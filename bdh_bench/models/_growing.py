"""A tensor that gets longer without copying itself at every token.

Room grows geometrically and a token is written in place. With gradients on, an in-place write would damage the graph; pieces
are then concatenated, and gradients flow through the carried state.

Legend: S tokens kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: Smallest room, and how fast it grows: at most a third of a large room is unused, and a token is moved twice on average.
_FIRST_ROOM = 64
_GROWTH = 1.5


class GrowingTensor:
    """A tensor that gets longer along one dimension; ``filled`` is the part in use, a view of the reserved buffer."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.length = 0
        self._buffer: Tensor | None = None

    @property
    def filled(self) -> Tensor | None:
        """The part in use; None before anything was read."""
        return None if self._buffer is None else self._buffer.narrow(self.dim, 0, self.length)

    def load(self, tensor: Tensor | None) -> None:
        """Take over ``tensor`` as the content. Room behind a view of the own buffer is kept (``detach`` hands one back)."""
        if tensor is None:
            self._buffer, self.length = None, 0
            return
        own = self._buffer
        same = own is not None and own.data_ptr() == tensor.data_ptr() and own.stride() == tensor.stride()
        self.length = tensor.shape[self.dim]
        self._buffer = own.detach() if same and own is not None and not tensor.requires_grad else tensor

    def append(self, piece: Tensor) -> Tensor:
        """Add ``piece`` behind the content; returns all of it. In place where gradients are off."""
        filled, before = self.filled, self.length
        self.length += piece.shape[self.dim]
        if torch.is_grad_enabled():
            # A clone for the first piece too: it may be a view into the projection of queries, keys and values.
            first = piece.clone(memory_format=torch.contiguous_format)
            self._buffer = first if filled is None else torch.cat((filled, piece), self.dim)
            return self._buffer
        if self._buffer is None or self._must_move(self._buffer):
            self._buffer = self._larger(filled, piece)
        self._buffer.narrow(self.dim, before, piece.shape[self.dim]).copy_(piece)
        return self._buffer.narrow(self.dim, 0, self.length)

    def _must_move(self, buffer: Tensor) -> bool:
        # A tensor born in inference mode cannot be written outside of it, nor one that a graph still holds.
        foreign = buffer.is_inference() and not torch.is_inference_mode_enabled()
        return self.length > buffer.shape[self.dim] or foreign or buffer.requires_grad

    def _larger(self, filled: Tensor | None, piece: Tensor) -> Tensor:
        shape = list(piece.shape)
        reserved = 0 if self._buffer is None else self._buffer.shape[self.dim]
        shape[self.dim] = max(self.length, _FIRST_ROOM, int(reserved * _GROWTH))
        buffer = torch.empty(shape, dtype=piece.dtype, device=piece.device)
        if filled is not None:
            buffer.narrow(self.dim, 0, filled.shape[self.dim]).copy_(filled)
        return buffer


class GrowingMemory:
    """The memory of a model that keeps everything: growing tensors by name. ``dims`` says along which dimension each grows."""

    def __init__(self, dims: Mapping[str, int]) -> None:
        self.parts = {name: GrowingTensor(dim) for name, dim in dims.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Views of the filled parts; nothing before the first token."""
        return {name: filled for name, part in self.parts.items() if (filled := part.filled) is not None}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over these tensors as the content; a name that is missing means an empty part."""
        for name, part in self.parts.items():
            part.load(tensors.get(name))

    def fork(self) -> GrowingMemory:
        """An independent copy."""
        copy = GrowingMemory({name: part.dim for name, part in self.parts.items()})
        copy.load({name: tensor.clone() for name, tensor in self.tensors().items()})
        return copy
