"""Models with a known answer, to test the instruments: a uniform guesser, a perfect copyist, a sleeper, and ways to fail.

    uniform       every byte equally likely: 8 bits per byte
    copy          certain that the byte ``period`` positions earlier comes again; uniform before there is one
    sleep         uniform, ``seconds`` per extend
    alloc         uniform, touches ``bytes`` of transient memory per extend (default 100 MiB)
    slow_warmup   uniform; each of its first ``slow_calls`` calls takes 100 · ``seconds``, every later one no time
    const_state   uniform, with a state of ``bytes`` per stream (default 1 MiB) that it reads at every call
    linear_kv     uniform, with a state of ``bytes_per_token`` per token, all of which it reads at every call
    oom           asks for 2⁶⁰ bytes
    hang          never returns, nor do its ``children``, processes of their own
    nan           logits that are not numbers
    segfault      kills its own process

Nothing here learns: ``trainable`` is False and there are no weights.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdh_bench.errors import SpecError
from bdh_bench.models._growing import GrowingMemory
from bdh_bench.session import Memory, Streaming, TensorMemory
from bdh_bench.types import Keep

DEFAULTS = {
    "words": (
        "uniform",
        "copy",
        "sleep",
        "alloc",
        "slow_warmup",
        "const_state",
        "linear_kv",
        "oom",
        "hang",
        "nan",
        "segfault",
    ),
    "learning_rate": 0.0,
    "position_limit": "none",
    "kind": "control",
    "architecture": "a known truth, nothing is learned",
}

_BYTES = {"alloc": 104_857_600, "const_state": 1_048_576}
_CERTAIN = 1e4  # exp(-1e4) is 0 in every float type, and unlike an infinite gap it makes no NaN


@dataclass(frozen=True)
class Config:
    """What the words above take.

    name             the word after ``toy:``
    vocab_size       tokens; 256 are the bytes
    period           positions back that copy looks
    seconds          that sleep takes per extend; slow_warmup takes a hundred times as long at first
    bytes            of alloc and const_state; 0 means the word's own default
    bytes_per_token  of state, for linear_kv
    slow_calls       of slow_warmup
    children         of hang
    """

    name: str = "uniform"
    vocab_size: int = 256
    period: int = 64
    seconds: float = 0.001
    bytes: int = 0
    bytes_per_token: int = 1024
    slow_calls: int = 1
    children: int = 0

    @property
    def size(self) -> int:
        return self.bytes or _BYTES.get(self.name, 0)


class Model(Streaming, nn.Module):
    """One of the words above."""

    trainable = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.vocab_size = config.vocab_size
        # No elements: it only carries the device and dtype that the model was moved to.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)
        self.calls = 0

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, V)."""
        self._misbehave(tokens.device)
        before = tokens[:, :0]
        return self._copy(before, tokens) if self.config.name == "copy" else self._uniform(tokens)

    forward = logits

    def memory(self, batch_size: int) -> Memory:
        """What the word says that it remembers."""
        device = self.place.device
        if self.config.name == "copy":
            return TensorMemory({"recent": torch.empty((batch_size, 0), dtype=torch.long, device=device)})
        if self.config.name == "const_state":  # ones, not zeros: untouched pages would not be resident
            return TensorMemory({"state": torch.ones((batch_size, self.config.size), dtype=torch.uint8, device=device)})
        return GrowingMemory({"bytes": 1}) if self.config.name == "linear_kv" else TensorMemory()

    def advance(self, memory: Memory, position: int, tokens: Tensor, keep: Keep) -> Tensor:
        """Misbehave, remember, predict."""
        self._misbehave(tokens.device)
        self._take_time(memory)
        if self.config.name == "alloc":
            torch.ones(self.config.size, dtype=torch.uint8, device=tokens.device)
        if isinstance(memory, GrowingMemory):
            shape = (tokens.shape[0], tokens.shape[1] * self.config.bytes_per_token)
            memory.parts["bytes"].append(torch.ones(shape, dtype=torch.uint8, device=tokens.device))
        predicted = tokens if keep == "all" else tokens[:, -1:]  # no logits are made that nobody wants
        if self.config.name != "copy":
            return self._uniform(predicted)
        known = torch.cat((memory.tensors()["recent"], tokens), 1)
        memory.load({"recent": known[:, -self.config.period :].clone()})
        return self._copy(known[:, : -predicted.shape[1]], predicted)

    def _uniform(self, tokens: Tensor) -> Tensor:
        value = float("nan") if self.config.name == "nan" else 0.0
        shape = (*tokens.shape, self.vocab_size)
        return torch.full(shape, value, dtype=self.place.dtype, device=tokens.device)  # (B, T, V)

    def _copy(self, before: Tensor, tokens: Tensor) -> Tensor:
        """After the token at position t comes position t + 1, and with it the token of t + 1 − period, where there is one."""
        out = self._uniform(tokens)
        known = torch.cat((before, tokens), 1)
        first = max(0, self.config.period - 1 - before.shape[1])  # the first of these tokens whose answer is known
        answers = tokens.shape[1] - first
        if answers > 0:
            start = before.shape[1] + first + 1 - self.config.period
            seen = known[:, start : start + answers]  # (B, answers)
            out[:, first:] = -_CERTAIN
            out[:, first:].scatter_(2, seen.unsqueeze(2), 0.0)
        return out

    def _take_time(self, memory: Memory) -> None:
        """As long as a call of the word takes: by the clock, or by what is in memory."""
        self.calls += 1
        if self.config.name == "sleep":
            time.sleep(self.config.seconds)
        if self.config.name == "slow_warmup" and self.calls <= self.config.slow_calls:
            time.sleep(100 * self.config.seconds)
        if self.config.name in ("const_state", "linear_kv"):
            for tensor in memory.tensors().values():
                tensor.max()

    def _misbehave(self, device: torch.device) -> None:
        if self.config.name == "oom":
            torch.empty(2**60, dtype=torch.uint8, device=device)
        if self.config.name == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.config.name == "hang":
            forever = [sys.executable, "-c", "import time; time.sleep(1e6)"]
            self.kept = [subprocess.Popen(forever) for _ in range(self.config.children)]
        while self.config.name == "hang":
            time.sleep(3600)

    def state_bytes(self, batch_size: int, context: int) -> int:
        """Nothing for most words."""
        c = self.config
        per_stream = {
            "copy": 8 * min(context, c.period),
            "const_state": c.size,
            "linear_kv": c.bytes_per_token * context,
        }
        return batch_size * per_stream.get(c.name, 0)

    def flops_per_token(self, context: int, mode: str = "recurrent") -> float:
        """No arithmetic."""
        return 0.0

    def kernels(self) -> str:
        """What runs here."""
        return "none"


def _check(config: Config) -> None:
    if config.name not in DEFAULTS["words"]:  # type: ignore[operator]
        raise SpecError(f"got toy:{config.name} · expected one of {', '.join(DEFAULTS['words'])}")  # type: ignore[arg-type]
    for name in ("vocab_size", "period", "bytes_per_token"):
        if getattr(config, name) < 1:
            raise SpecError(f"got {name}={getattr(config, name)} · expected at least 1")
    for name in ("bytes", "seconds", "slow_calls", "children"):
        if getattr(config, name) < 0:
            raise SpecError(f"got {name}={getattr(config, name)} · expected 0 or more")
