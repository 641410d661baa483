"""What can be written behind the name of a model or a task, and what does each option mean? Read from the docstring of its ``Config``.

Two ways of writing are understood: a line ``name, other   meaning`` (two spaces or more; further lines are indented), and a clause
of prose that names an option in ``double backticks``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

_LINE = re.compile(r"( *)(\w+(?:, \w+)*) {2,}(\S.*)")
_NAME = re.compile(r"``(\w+)``")


def meanings(docstring: str, names: Collection[str]) -> dict[str, str]:
    """Option → meaning, for those of ``names`` of which the docstring says something; a line of its own wins over prose."""
    lines: dict[str, str] = {}
    prose: list[str] = []
    current: list[str] = []
    margin = ""
    for line in docstring.splitlines():
        found = _LINE.fullmatch(line.rstrip())
        if found and set(found[2].split(", ")) <= set(names):
            margin, current = found[1] + "  ", found[2].split(", ")
            lines |= dict.fromkeys(current, found[3])
        elif current and line.startswith(margin):
            lines |= {name: f"{lines[name]} {line.strip()}" for name in current}
        else:
            current = []
            prose.append(line.strip())
    clauses = re.split(r"[.;](?:\s|$)", " ".join(prose))
    said = {name: _NAME.sub(r"\1", clause).strip() for clause in reversed(clauses) for name in _NAME.findall(clause)}
    return {name: text for name, text in {**said, **lines}.items() if name in names and text}


def rows(defaults: Mapping[str, Any], meant: Mapping[str, str]) -> list[dict[str, str]]:
    """One row per option as text."""
    return [
        {"option": name, "default": _text(value), "meaning": meant.get(name, "")} for name, value in defaults.items()
    ]


def _text(value: Any) -> str:
    """As it is written on the command line; a default that must be computed is not known here."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None else str(value)
