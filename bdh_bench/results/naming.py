"""What is a model called where space is short? As little of its name as tells it from the other models of the run.

The family, and then only what differs between models of one family: the size, options, and the training regime in brackets, which is shown
for every model of a family that was trained under several (``bdh (crop)``, ``bdh (carried)``). Words of a name that are no options
(``toy:uniform``, ``hf:gpt2``) always belong to it. The whole name stands in the table of models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from bdh_bench.results.display import shortened
from bdh_bench.results.store import Run

MOST = 40
_COLONS = re.compile(r':(?=(?:[^"]*"[^"]*")*[^"]*$)')  # those outside quotes
_OPTION = re.compile(r"[A-Za-z_]\w*=")


@dataclass(frozen=True)
class _Parts:
    """A name taken apart: ``base`` is the family with its words."""

    base: str
    size: str
    options: Mapping[str, str]


def names_of(run: Run) -> dict[str, str]:
    """model → a short name that no other model of the run has."""
    spec = run.manifest.get("spec")
    usual = str(spec.get("regime") or "crop") if isinstance(spec, dict) else "crop"
    families = {cell.model: cell.family for cell in run.cells}
    parts = {model: _parts(model, family, usual) for model, family in families.items()}
    names = {model: shortened(_name(own, list(parts.values())), MOST) for model, own in parts.items()}
    taken = list(names.values())
    return {model: name if taken.count(name) == 1 else model for model, name in names.items()}


def without_regime(model: str) -> str:
    """The name of the model that was trained otherwise, or not at all: what its bytes and times depend on."""
    return ":".join(part for part in _COLONS.split(model) if not part.startswith("regime="))


def _parts(model: str, family: str, regime: str) -> _Parts:
    first, *rest = _COLONS.split(model)
    options = dict(part.split("=", 1) for part in rest if _OPTION.match(part))
    words = [part for part in rest if not _OPTION.match(part)]
    if "weights" not in options:  # what comes from a file has whatever regime it had
        options.setdefault("regime", regime)
    return _Parts(":".join((family, *words)), first.partition("@")[2], options)


def _name(own: _Parts, everyone: list[_Parts]) -> str:
    """The base, and each part in which its namesakes differ."""
    others = [one for one in everyone if one.base == own.base]
    name = own.base + (f"@{own.size}" if own.size and len({one.size for one in others}) > 1 else "")
    for option in dict.fromkeys(key for one in others for key in one.options):
        if option != "regime" and option in own.options and len({one.options.get(option) for one in others}) > 1:
            name += f":{option}={own.options[option].rstrip('/').rpartition('/')[2]}"
    differs = len({one.options.get("regime") for one in others} - {None}) > 1
    return f"{name} ({own.options['regime']})" if differs and "regime" in own.options else name
