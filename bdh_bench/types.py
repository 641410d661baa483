"""The nouns everything hangs on: what a model, a stream, a task and a measurement are.

Protocols and frozen dataclasses only; torch is imported for type checkers, never at run time, so that the reading
half can use the same nouns where torch is not installed.

Legend: B batch (streams), T tokens in this call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Keep = Literal["last", "all"]
Scalar = str | int | float | bool | None

#: Statuses with a value: measured, perhaps marked.
MEASURED_STATUSES = frozenset({"ok", "noisy", "unsteady", "throttled"})
#: Results without a value that are answers all the same (out of memory is a result).
RESULT_STATUSES = frozenset({"unsupported", "skipped", "oom_host", "oom_cuda"})
#: Not final: such a cell runs again on resume.
UNFINISHED_STATUSES = frozenset({"interrupted", "infra"})
#: Exit status of a process that measured and could not store what came out (EX_TEMPFAIL); its round is not final.
NOT_STORED_EXIT = 75


@dataclass(frozen=True)
class Encoding:
    """A text as tokens: ``ids`` (N,) and ``ends`` (N,), the byte offset at which the span of each token ends.

    Spans lie end to end from offset 0 and cover the text. Several tokens may share one byte: all but the last end where they start.
    """

    ids: NDArray[np.int64]
    ends: NDArray[np.int64]


class Tokenizer(Protocol):
    """Between raw bytes and token ids, with the span of every token in the raw bytes; never by decoding and encoding again."""

    def encode(self, content: bytes) -> Encoding:
        """Raises CorpusError for bytes whose spans this tokenizer cannot give."""
        ...

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes of these tokens; special tokens have none."""
        ...


class Session(Protocol):
    """One batch of streams and what the model remembers of them."""

    length: int

    def extend(self, tokens: Tensor, keep: Keep = "last") -> Tensor:
        """Read tokens (B, T ≥ 1); return logits (B, 1, V) after the last or (B, T, V) after each."""
        ...

    def detach(self) -> None:
        """Cut the autograd graph behind the state; all that carried-state training needs."""
        ...

    def state(self) -> list[Tensor]:
        """The live tensors that must survive until the next token, and nothing else."""
        ...

    def fork(self) -> Session:
        """An independent copy."""
        ...

    def save(self, path: str | Path, notes: Mapping[str, str] | None = None) -> None:
        """Write state, length, model fingerprint and the caller's notes as safetensors."""
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """A torch module that predicts the next token, with a stream form of the same arithmetic."""

    vocab_size: int
    tokenizer: Tokenizer | None  # None: the tokens are the 256 bytes
    max_positions: int | None
    start_symbol: int | None

    def logits(self, tokens: Tensor) -> Tensor:
        """Teacher forcing: tokens (B, T) → logits (B, T, V); differentiable; the truth for every session."""
        ...

    def session(self, batch_size: int = 1) -> Any:
        """A live stream with empty state at position 0."""
        ...

    def restore(self, path: str | Path) -> Any:
        """The session saved at ``path``. Raises SessionError for the file of another model."""
        ...

    def state_bytes(self, batch_size: int, context: int) -> int:
        """Theory: bytes of state after ``context`` tokens; a law compares it with the census exactly."""
        ...

    def parameter_count(self) -> int:
        """Unique trainable parameters."""
        ...

    def flops_per_token(self, context: int, mode: str = "recurrent") -> float:
        """Forward floating-point operations per token at ``context`` (2 per multiply-add)."""
        ...


@dataclass(frozen=True)
class Measurement:
    """One raw value from a task: no medians, no intervals; reduction happens when results are read.

    value       SI units; None when there is none, and then status and reason say why
    context     tokens each stream had read (0 where it has no meaning)
    axes        what else makes this a point of its own (target_hash, mode, …)
    sample      the unit of resampling (a document), or ""
    weight      weight of this sample in a ratio (bytes scored)
    repeat      index of the repetition within the process (a window)
    metric_id   the name with its protocol, e.g. ``bpb@c=4096,S=128``; different ids are never compared
    """

    metric: str
    value: float | None
    context: int
    batch_size: int = 1
    axes: Mapping[str, Scalar] = field(default_factory=dict)
    sample: str = ""
    weight: float = 1.0
    repeat: int = 0
    metric_id: str = ""
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class Arrays:
    """Raw arrays that a task wants kept beside its measurements, written as one compressed npz."""

    name: str
    arrays: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Record:
    """One stored measurement with the identity of its cell; what the reading half works on."""

    run: str
    cell: str
    attempt: int
    model: str
    family: str
    size: str
    task: str
    seed: int
    metric: str
    metric_id: str
    value: float | None
    context: int
    batch_size: int
    axes: Mapping[str, Scalar]
    sample: str
    weight: float
    repeat: int
    status: str
    reason: str
    weights: str
    facts: Mapping[str, Any]
    round: int = 1


@dataclass(frozen=True)
class Cell:
    """The smallest thing that is planned and counted: one model × task × seed (× context), measured ``rounds`` times.

    A round is one fresh process that measures the cell once; rounds run, fail and are resumed on their own.
    """

    key: str
    model: str
    task: str
    seed: int
    context: int | None = None
    rounds: int = 1


@dataclass(frozen=True)
class Apart:
    """What became of a part of a task that ran in a process of its own, under a cap on that process' memory.

    status      ok, oom_host or oom_cuda (it did not fit), or what else ended it; ``reason`` says why
    values      what the task's ``part`` returned, {} where it did not end well
    peak_bytes  the most that the process held, as far as is known
    """

    status: str
    reason: str
    values: Mapping[str, Any]
    peak_bytes: int


def _nowhere(request: Mapping[str, Scalar], cap_bytes: int) -> Apart:
    raise NotImplementedError("this task was given no way to run a part of itself apart")


@dataclass(frozen=True)
class TaskContext:
    """What a task is given beside its model: the cell, the text, a way to say how far it is and which gates were passed.

    ``context`` is the cell's own context (None where the task has no such axis), ``contexts`` all of the run.
    ``documents`` are held-out test documents, opened for evaluation only. ``state_protocol`` is carry, cold or window.
    ``passed(gate, error, bound)`` notes a gate of the task's own; one that fails is a LawError. ``note(name, value)`` adds to the cell's
    facts how it was measured. ``halfway()`` is the same model with the weights that it had at half of its training bytes, or None where
    there are none.
    ``apart(request, cap_bytes)`` runs the task's ``part(model, config, context, request)``, which returns values for JSON, in a fresh
    process that is ended as soon as it holds more than ``cap_bytes``.
    """

    seed: int
    context: int | None
    contexts: tuple[int, ...]
    train_context: int
    documents: tuple[Any, ...]
    weights: str
    smoke: bool
    progress: Callable[[str, float, Mapping[str, Scalar]], None]
    state_protocol: str = "carry"
    passed: Callable[[str, float, float], None] = lambda gate, error, bound: None
    note: Callable[[str, Any], None] = lambda name, value: None
    halfway: Callable[[], Any] = lambda: None
    apart: Callable[[Mapping[str, Scalar], int], Apart] = _nowhere


class Exercises(Protocol):
    """What a model practises before a task: generated examples, the same for every model.

    identity   names the generator and all its settings; part of the key of trained weights
    rows       examples in a batch
    cap        most examples that are practised; ``enough`` is the accuracy on validation batches at which practice ends
    share_of_text  of the steps go on with the text that the model was trained on before (0: only examples)
    learning_rate  where neither the model's name nor the run gives one
    """

    identity: str
    rows: int
    cap: int
    enough: float
    share_of_text: float
    learning_rate: float

    def batch(self, split: str, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens (rows, T) and answers (rows, T), -1 where a token is no answer; ``split`` is train, validation or test."""
        ...


class Task(Protocol):
    """A task module: a docstring (question, protocol, caveats), a frozen ``Config`` and ``run``."""

    def run(self, model: Any, config: Any, context: TaskContext) -> Iterator[Measurement | Arrays]:
        """Yield raw measurements; never print, store, seed globally or compute a median."""
        ...
