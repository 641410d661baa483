"""How does what an older bdh-bench wrote become what this one reads? One pure function per step, for manifests and for events.

    1 → 2   a cell is measured in rounds, each a process of its own. What version 1 stored is round 1 of 1, and the files of its
            attempts lie in ``cells/<cell>/<attempt>``, which each event now says.

A step takes what was written whole and sound and gives a new value; fields that it does not know are kept. The version before the
current one is read, an older one is not, and neither is a newer one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

SCHEMA_VERSION = 2

Body = Mapping[str, Any]
Step = Callable[[Body], dict[str, Any]]


class Unreadable(Exception):
    """What was written cannot be what its version number says, or that version is none that is read."""


def _manifest_1(manifest: Body) -> dict[str, Any]:
    """``cells`` say how many rounds they want."""
    cells = [{"rounds": 1, **cell} for cell in manifest.get("cells", [])]
    return {**manifest, "v": 2, "cells": cells}


def _event_1(body: Body) -> dict[str, Any]:
    """Events carry ``round`` and where the files of their attempt are."""
    if "round" in body:  # version 1 had none: the version number of this line was damaged
        raise Unreadable("an event of version 1 with a round")
    return {**body, "round": 1, "files": f"{str(body.get('cell', ''))[:16]}/{body.get('attempt')}"}


_MANIFESTS: dict[int, Step] = {1: _manifest_1}
_EVENTS: dict[int, Step] = {1: _event_1}


def current_manifest(manifest: Body) -> dict[str, Any]:
    """The manifest as this version has it. Raises Unreadable."""
    return _climb(manifest, manifest.get("v"), _MANIFESTS)


def current_event(version: object, body: Body) -> dict[str, Any]:
    """The event as this version has it. Raises Unreadable."""
    return _climb(body, version, _EVENTS)


def _climb(value: Body, version: object, steps: Mapping[int, Step]) -> dict[str, Any]:
    if isinstance(version, bool) or not isinstance(version, int):
        raise Unreadable(f"schema version {version!r} is no number")
    if version != SCHEMA_VERSION and version not in steps:
        raise Unreadable(f"schema version {version}; {SCHEMA_VERSION - 1} and {SCHEMA_VERSION} are read")
    for at in range(version, SCHEMA_VERSION):
        value = steps[at](value)
    return dict(value)
