"""A tensor that forgets: the first K tokens and the last W − 1 stay, without copying the window at every token.

A token attends to itself and the W − 1 before it, so W − 1 must survive until the next one. They lie in a row in a buffer with
room behind them. A decoded token is written there in place and the view moves on by one; only when the room is used up does the
window move to the front, twice per token on average. The K sinks ride along in front of the view, onto the place of the token
that was forgotten.

With gradients on, or for a piece of several tokens, the content is concatenated and cut instead.

Legend: W window, K sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Smallest room behind the content, and the share of the content that is kept free.
_LEAST_ROOM = 16
_ROOM = 0.5


class WindowTensor:
    """The tokens along ``dim`` that the next token can see; ``filled`` is a view of the reserved buffer."""

    def __init__(self, dim: int, window: int, sinks: int = 0) -> None:
        self.dim = dim
        self.sinks = sinks
        self.limit = sinks + window - 1  # tokens that stay
        self.length = 0
        self._start = 0
        self._buffer: Tensor | None = None

    @property
    def filled(self) -> Tensor | None:
        """The part in use; None before anything was read."""
        return None if self._buffer is None else self._buffer.narrow(self.dim, self._start, self.length)

    def load(self, tensor: Tensor | None) -> None:
        """Take over ``tensor`` as the content. Room behind a view of the own buffer is kept (``detach`` hands one back)."""
        filled = self.filled
        if tensor is None:
            self._buffer, self._start, self.length = None, 0, 0
        elif filled is not None and self._buffer is not None and not tensor.requires_grad and _same(filled, tensor):
            self._buffer = self._buffer.detach()
        else:
            self._buffer, self._start, self.length = tensor, 0, tensor.shape[self.dim]

    def append(self, piece: Tensor) -> Tensor:
        """Add ``piece`` behind the content; returns all that its tokens may see. ``settle`` must follow once that was read."""
        filled, count = self.filled, piece.shape[self.dim]
        if torch.is_grad_enabled():
            joined = piece if filled is None else torch.cat((filled, piece), self.dim)
            self._take(self._cut(joined).clone(memory_format=torch.contiguous_format))
            return joined
        if count > 1:
            joined = piece if filled is None else torch.cat((filled, piece), self.dim)
            self._take(self._with_room(self._cut(joined)), min(self.limit, joined.shape[self.dim]))
            return joined
        if self._buffer is None or self._must_move(self._buffer):
            before = piece.narrow(self.dim, 0, 0) if filled is None else filled
            self._take(self._with_room(before), self.length)
        assert self._buffer is not None
        self._buffer.narrow(self.dim, self._start + self.length, 1).copy_(piece)
        self.length += 1
        return self._buffer.narrow(self.dim, self._start, self.length)

    def settle(self) -> None:
        """Forget what the next token cannot see: the sinks step over it."""
        over = self.length - self.limit
        if over <= 0 or self._buffer is None:
            return
        if self.sinks:
            kept = self._buffer.narrow(self.dim, self._start, self.sinks).clone()
            self._buffer.narrow(self.dim, self._start + over, self.sinks).copy_(kept)
        self._start, self.length = self._start + over, self.limit

    def _take(self, buffer: Tensor, length: int | None = None) -> None:
        self._buffer, self._start = buffer, 0
        self.length = buffer.shape[self.dim] if length is None else length

    def _cut(self, tokens: Tensor) -> Tensor:
        """The first K tokens and the last W − 1."""
        size = tokens.shape[self.dim]
        if size <= self.limit:
            return tokens
        last = self.limit - self.sinks
        recent = tokens.narrow(self.dim, size - last, last)
        return torch.cat((tokens.narrow(self.dim, 0, self.sinks), recent), self.dim) if self.sinks else recent

    def _must_move(self, buffer: Tensor) -> bool:
        # A tensor born in inference mode cannot be written outside of it, nor one that a graph still holds.
        foreign = buffer.is_inference() and not torch.is_inference_mode_enabled()
        return self._start + self.length >= buffer.shape[self.dim] or foreign or buffer.requires_grad

    def _with_room(self, content: Tensor) -> Tensor:
        shape = list(content.shape)
        held = shape[self.dim]
        shape[self.dim] += max(_LEAST_ROOM, int(held * _ROOM))
        buffer = content.new_empty(shape)
        buffer.narrow(self.dim, 0, held).copy_(content)
        return buffer


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
