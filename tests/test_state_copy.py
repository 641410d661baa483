"""Are the costs of keeping a stream those of copies that really are the stream, and do they follow the state?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from bdh_bench import list_models, load_model
from bdh_bench.errors import LawError
from bdh_bench.measure.clock import now_s
from bdh_bench.models import toy
from bdh_bench.session import Memory, TensorMemory
from bdh_bench.tasks import state_copy
from bdh_bench.types import Measurement, TaskContext

_FAMILIES = [
    e.name for e in list_models() if not e.problem and not e.defaults.get("words") and not e.defaults.get("needs_name")
]


def _run(model: Any, context: int, **config: int) -> Iterator[Measurement]:
    told = TaskContext(0, context, (context,), context, (), "random", False, lambda *a: None)
    return state_copy.run(model, state_copy.Config(**config), told)


def _values(model: Any, context: int, metric: str, **config: int) -> list[float]:
    return [row.value for row in _run(model, context, **config) if row.metric == metric and row.value is not None]


@pytest.mark.parametrize("name", [*_FAMILIES, "toy:copy", "toy:linear_kv"])
def test_copies_of_every_model_go_on_bit_for_bit(name: str) -> None:
    model = load_model(name)
    (forked,) = _values(model, 70, "state_fork_bytes", repeats=1, batch_size=2)
    (on_disk,) = _values(model, 70, "state_file_bytes", repeats=1, batch_size=2)
    assert forked == model.state_bytes(2, 70)
    assert forked < on_disk < forked + 16_384  # names and shapes stand in the file too


class _Forgets(TensorMemory):
    def fork(self) -> TensorMemory:
        return _Forgets({name: torch.zeros_like(tensor) for name, tensor in self.items()})


class _Echo(toy.Model):
    """Logits are a running sum of the tokens; ``damage`` is where a copy loses it."""

    damage = ""

    def memory(self, batch_size: int) -> Memory:
        kind = _Forgets if self.damage == "fork" else TensorMemory
        return kind({"sum": torch.zeros(batch_size, 1)})

    def restore(self, path: str | Path) -> Any:
        session = super().restore(path)
        if self.damage == "restore":
            session.memory.load({"sum": session.state()[0] + 1e-4})
        if self.damage == "length":
            session.length -= 1
        return session

    def advance(self, memory: Any, position: int, tokens: Tensor, keep: Any) -> Tensor:
        memory["sum"] = memory["sum"] + tokens.float().mean(1, keepdim=True) / 256
        out: Tensor = memory["sum"].unsqueeze(-1).expand(-1, 1, self.vocab_size)
        return out


@pytest.mark.parametrize("damage", ["fork", "restore", "length"])
def test_a_copy_that_is_not_the_stream_stores_no_number(damage: str) -> None:
    model = _Echo(toy.Config())
    assert _values(model, 16, "state_fork_s", repeats=2)
    model.damage = damage
    with pytest.raises(LawError) as raised:
        next(_run(model, 16))
    assert raised.value.gate == "continuation"


def test_seconds_are_those_of_the_action() -> None:
    """A state of 24 MiB: a fork takes no less than a fifth of a plain copy of such a tensor, and saving takes longer than nothing."""
    size = 24 * 2**20
    model = load_model(f"toy:const_state:bytes={size}")
    plain = torch.ones(size, dtype=torch.uint8)
    copies = []
    for _ in range(5):
        started = now_s()
        plain.clone()
        copies.append(now_s() - started)
    small = load_model("toy:const_state:bytes=1024")
    ours, theirs = list(_run(model, 4)), list(_run(small, 4))
    for metric in ("state_fork_s", "state_save_s", "state_restore_s"):
        seconds, little = ([row.value or 0.0 for row in rows if row.metric == metric] for rows in (ours, theirs))
        assert len(seconds) == 5
        assert median(seconds) > 5 * median(little)
        if metric == "state_fork_s":
            assert median(seconds) > min(copies) / 5


def test_past_the_last_position_there_is_a_reason() -> None:
    (row,) = _run(load_model("gpt2:n_embd=8:n_layer=1:n_head=1:max_positions=64"), 60)
    assert (row.value, row.status) == (None, "unsupported")
    assert "64 positions" in row.reason
