"""What does a model write after a prompt, token by token, with no more memory than its state?

A text is held as a session that has read all of it but the last token, and that token, which is still to be read. The logits behind
a text are nowhere else, so a text that was saved at any length goes on exactly as one that never stopped. It begins with the model's
start symbol, as in training and scoring. The noise of a sampled token depends on the seed and its position alone. Where a model has a
tokenizer, a prompt is encoded as a whole, and what is written are the bytes of its tokens.

Legend: V vocabulary, T tokens of a piece.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdh_bench import registry
from bdh_bench.errors import SessionError, SpecError, UnknownNameError
from bdh_bench.loading import load_model
from bdh_bench.session import StreamSession, saved_notes
from bdh_bench.spec import ModelSpec, parse_model

PIECE = 512  # tokens per extend: bounds what is held of a prompt, changes no byte

_NOISE = 0x6E01  # sets this sequence of random numbers apart from others of the same seed


@dataclass(frozen=True)
class Request:
    """What to write, checked when made (SpecError). ``prompt_file`` ``-`` is stdin; ``threads`` 0 is what torch chooses."""

    model: str
    prompt: str | None = None
    prompt_file: Path | None = None
    max_bytes: int = 256
    temperature: float = 0.0
    seed: int = 0
    save_state: Path | None = None
    load_state: Path | None = None
    device: str = "cpu"
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("max_bytes", "seed", "threads"):
            if getattr(self, name) < 0:
                raise SpecError(f"got --{name.replace('_', '-')} {getattr(self, name)} · expected 0 or more")
        _check_temperature(self.temperature)
        if self.prompt is not None and self.prompt_file is not None:
            raise SpecError("got --prompt and --prompt-file · expected one or the other")
        if self.device not in ("cpu", "cuda"):
            raise UnknownNameError("device", self.device, ("cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SpecError("got --device cuda · torch finds no such device here", "use --device cpu")
        target = self.save_state
        if target is not None and (target.is_dir() or not target.parent.is_dir()):
            raise SpecError(f"got --save-state {target} · expected a file in a folder that exists")


def _check_temperature(temperature: float) -> None:
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise SpecError(f"got --temperature {temperature:g} · expected 0 (greedy) or a positive number")


class Text:
    """A text that a model goes on writing: ``session`` has read all of it but its last token, ``pending``.

    Raises SpecError for a model whose tokens stand for no bytes.
    """

    def __init__(self, model: Any, session: StreamSession, pending: int | None) -> None:
        if model.vocab_size != 256 and model.tokenizer is None:
            raise SpecError(
                f"got a model with {model.vocab_size} tokens and no tokenizer · expected one whose 256 tokens are the bytes",
                "use a model without vocab_size=…",
            )
        self.model, self.session, self.pending = model, session, pending
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))

    @classmethod
    def empty(cls, model: Any) -> Text:
        """Nothing but the start symbol, where the model has one."""
        return cls(model, model.session(1), model.start_symbol)

    @classmethod
    def load(cls, model: Any, path: str | Path) -> Text:
        """The text saved at ``path``. Raises SessionError for a damaged file or that of another model."""
        session = model.restore(path)
        if session.batch_size != 1:
            raise SessionError(f"{path} holds {session.batch_size} streams · expected one")
        note = saved_notes(path).get("next_token", "")
        if not (note.isascii() and note.isdigit() and int(note) < model.vocab_size):
            raise SessionError(
                f"{path} names {note or 'nothing'!r} as its next token · expected a number below {model.vocab_size}",
                "save it again with generate",
            )
        return cls(model, session, int(note))

    def save(self, path: str | Path) -> None:
        """Write the text's state to ``path``, completely or not at all. Raises SessionError."""
        if self.pending is None:
            raise SessionError("nothing was read yet · expected at least one token", "read a prompt first")
        self.session.save(path, {"next_token": str(self.pending)})

    @torch.inference_mode()
    def read(self, pieces: Iterable[bytes]) -> None:
        """Append these bytes; of a prompt of bytes no more than a piece is held at once. Raises PositionLimitError."""
        texts: Iterable[Sequence[int]] = pieces if self.model.tokenizer is None else self._encoded(pieces)
        for piece in texts:
            for start in range(0, len(piece), PIECE):
                part = list(piece[start : start + PIECE])
                known = part if self.pending is None else [self.pending, *part]
                if len(known) > 1:
                    self.session.extend(self._tokens(known[:-1]))
                self.pending = known[-1]

    @torch.inference_mode()
    def write(self, count: int, temperature: float = 0.0, seed: int = 0) -> Iterator[int]:
        """Append ``count`` tokens and yield each as it is chosen; between two of them the text can be saved.

        Raises PositionLimitError past the model's last position, where the text is left as it was.
        """
        _check_temperature(temperature)
        for _ in range(count):
            if self.pending is None:
                raise SpecError("got no prompt for a model without a start symbol · expected at least one byte")
            logits = self.session.extend(self._tokens([self.pending]))
            self.pending = None  # it is read: should the choice fail, it must not be read again
            self.pending = choose(logits[0, -1], temperature, seed, self.session.length)
            yield self.pending

    def write_bytes(self, count: int, temperature: float = 0.0, seed: int = 0) -> Iterator[bytes]:
        """Yield the bytes of each token until ``count`` of them are written, or as many tokens; the last token is written whole."""
        written = 0
        for token in self.write(count, temperature, seed):  # no more tokens than bytes: special ones have none
            data = bytes([token]) if self.model.tokenizer is None else self.model.tokenizer.decode([token])
            written += len(data)
            yield data
            if written >= count:
                return

    def _encoded(self, pieces: Iterable[bytes]) -> Iterator[list[int]]:
        """All pieces as one text: where it may be cut only the tokenizer knows."""
        yield self.model.tokenizer.encode(b"".join(pieces)).ids.tolist()

    def _tokens(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self._device)  # (1, T)


def choose(logits: Tensor, temperature: float, seed: int, position: int) -> int:
    """The token at ``position`` from logits (V,): the first largest at temperature 0, else one drawn from softmax(logits / temperature).

    Drawn through the cumulative distribution by one number of (seed, position), so that rounding in the logits hardly ever
    changes the token. Raises SpecError for logits that are no numbers.
    """
    scores = logits.double().cpu()
    top = scores.max()  # NaN where any is
    if not top.isfinite():
        raise SpecError(f"the logits before position {position} are not finite · expected numbers", "use other weights")
    if temperature == 0:
        return int(scores.argmax())
    cumulative = ((scores - top) / temperature).exp().cumsum(0)
    point = np.random.default_rng([seed, position, _NOISE]).random() * cumulative[-1]
    return int(torch.searchsorted(cumulative, point, right=True))


def begin(request: Request, warn: Callable[[str], None]) -> Text:
    """The text of a request with its prompt read. Raises SpecError, SessionError, CheckpointError, PositionLimitError."""
    if request.threads:
        torch.set_num_threads(request.threads)
    spec = parse_model(request.model)
    # --seed is the seed of the noise: were it that of random weights too, a saved state would be bound to it
    model = load_model(spec, device=request.device)
    text = Text.empty(model) if request.load_state is None else Text.load(model, request.load_state)
    if getattr(model, "trainable", True) and not spec.option("weights"):
        warn(
            "warning: these weights are random, and so are the bytes · "
            f"bdh-bench train {spec} prints a path; then use {_with_weights(spec, model)}"
        )
    text.read(_prompt(request))
    return text


def _with_weights(spec: ModelSpec, model: Any) -> str:
    """How this model is named with weights. Where its shape is read from them, they need not hold the number of passes."""
    options = dict(spec.options)
    entry = registry.find("models", spec.family)
    if "n_layer" in entry.options and hasattr(registry.load("models", spec.family), "config_from_weights"):
        options.setdefault("n_layer", str(model.config.n_layer))
    return str(replace(spec, options=tuple({**options, "weights": "PATH"}.items())))


def _prompt(request: Request) -> Iterator[bytes]:
    """The prompt in pieces, a file's never all at once. Raises SpecError where it cannot be read."""
    if request.prompt_file is None:
        yield os.fsencode(request.prompt or "")  # the bytes that the shell gave, whatever their encoding
        return
    path = request.prompt_file
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file:
            while piece := file.read(PIECE):
                yield piece
    except OSError as error:
        raise SpecError(f"cannot read the prompt {path}: {error.strerror}", "check --prompt-file") from error
