"""Which run would decide what this one does not? Its request with something changed, as a command line.

Everything that was asked for is repeated, so that nothing else differs; a smoke run is asked for again without ``--smoke``.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from bdh_bench.results.escaping import plain

#: Fields of a request that a command repeats, by the name of their option.
_OPTIONS = {
    "data": "--data",
    "contexts": "--contexts",
    "train_bytes": "--train-bytes",
    "train_context": "--train-context",
    "seeds": "--seeds",
    "documents": "--documents",
    "regime": "--regime",
    "match": "--match",
    "device": "--device",
    "threads": "--threads",
    "rounds": "--rounds",
}
#: What only training and quality depend on.
_OF_QUALITY = ("train_bytes", "documents", "regime", "match")


def next_run(spec: Mapping[str, Any], models: Sequence[str], tasks: Sequence[str], **changes: object) -> str:
    """``bdh-bench run`` with these models and tasks; ``changes`` are fields of the request, None leaves one out."""
    asked = {**spec, **changes}
    parts = ["bdh-bench", "run", "--models", ",".join(models), "--task", ",".join(tasks)]
    for name, option in _OPTIONS.items():
        value = asked.get(name)
        if isinstance(value, list | tuple):
            value = len(value) if name == "seeds" else ",".join(str(one) for one in value)
        if isinstance(value, str | int) and value:
            parts += [option, str(value)]
    return plain(shlex.join(parts))


def measured_again(spec: Mapping[str, Any], models: Sequence[str], task: str, **changes: object) -> str:
    """A run of a task that trains nothing."""
    unused: dict[str, object] = dict.fromkeys((*_OF_QUALITY, "seeds", "train_context"))
    return next_run(spec, models, [task], **{**unused, **changes})
