"""Which models and tasks exist, told without importing any of them.

The file name is the name: ``models/NAME.py`` is the model NAME, ``tasks/NAME.py`` the task NAME; a leading underscore
hides a file, and a file in ``models/`` that binds no name ``Model`` is theory about models and is not listed. Packages
outside add theirs by the entry-point groups ``bdh_bench.models`` and ``bdh_bench.tasks``.

What a listing needs is read from the source text (first docstring line, literal constants, the fields of ``Config``), so
that ``list``, ``--help`` and the checks before a run start without torch. A model file defines

    Config           frozen dataclass; its fields are the options, their defaults the defaults
    scaled(target)   candidates for a parameter target, as Configs (see sizing.py)
    Model(config)    nn.Module + Streaming
    DEFAULTS         literal dictionary: learning_rate, position_limit
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from bdh_bench.errors import SpecError, UnknownNameError
from bdh_bench.spec import WEIGHT_OPTIONS, ModelSpec

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """One registered model or task, as its source text describes it.

    origin    "built in", or the distribution that brings it; problem is a reason why it cannot be used, or ""
    options   option name → default, from the fields of ``Config``
    """

    kind: str
    name: str
    origin: str
    module: str
    summary: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def list_models() -> list[Entry]:
    """Every registered model, sorted by name; nothing is imported."""
    return [*_entries("models").values()]


def list_tasks() -> list[Entry]:
    """Every registered task, sorted by name; nothing is imported."""
    return [*_entries("tasks").values()]


def find(kind: str, name: str) -> Entry:
    """The entry of kind "models" or "tasks" called ``name``. Raises UnknownNameError, or SpecError if it is broken."""
    entries = _entries(kind)
    if name not in entries:
        raise UnknownNameError(kind[:-1], name, entries)
    entry = entries[name]
    if entry.problem:
        raise SpecError(f"{kind[:-1]} {name!r} from {entry.origin} cannot be used: {entry.problem}")
    return entry


def load(kind: str, name: str) -> ModuleType:
    """Import the file of this model or task. A broken file raises its own error."""
    return importlib.import_module(find(kind, name).module)


def check(spec: ModelSpec) -> Entry:
    """The entry for a model name, after checking word and option names without importing the model."""
    entry = find("models", spec.family)
    words = entry.defaults.get("words", ())
    if words and spec.name not in words:
        raise UnknownNameError(f"{spec.family} model", spec.name, words)
    for key, _ in spec.options:
        if key not in entry.options and key not in WEIGHT_OPTIONS:
            raise UnknownNameError(f"option of {spec.family}", key, [*entry.options, *WEIGHT_OPTIONS])
    return entry


@cache
def _entries(kind: str) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for path in sorted((_PACKAGE / kind).glob("[!_]*.py")):
        if kind != "models" or _may_hold_a_model(path):
            found[path.stem] = _describe(kind, path.stem, "built in", f"bdh_bench.{kind}.{path.stem}", path)
    for point in sorted(entry_points(group=f"bdh_bench.{kind}"), key=lambda p: p.name):
        origin = point.dist.name if point.dist else "unknown distribution"
        if point.name in found:
            other = found[point.name].origin
            found[f"{point.name} ({origin})"] = Entry(
                kind, point.name, origin, point.value, "", problem=f"the name is taken by {other}"
            )
        else:
            found[point.name] = _describe_plugin(kind, point, origin)
    return dict(sorted(found.items()))


def _may_hold_a_model(path: Path) -> bool:
    """Whether the file binds the name ``Model``; one that cannot be parsed may, and is listed with its problem."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return True
    return any("Model" in _bound(node) for node in tree.body)


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a file binds."""
    if isinstance(node, ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.ImportFrom | ast.Import):
        return {alias.asname or alias.name for alias in node.names}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


def _describe_plugin(kind: str, point: EntryPoint, origin: str) -> Entry:
    try:
        module = importlib.util.find_spec(point.module)
    except Exception as error:  # a plug-in's package may raise anything while it is looked up
        return Entry(kind, point.name, origin, point.value, "", problem=f"{type(error).__name__}: {error}")
    if module is None or module.origin is None:
        return Entry(kind, point.name, origin, point.value, "", problem=f"no module {point.module!r}")
    return _describe(kind, point.name, origin, point.module, Path(module.origin))


def _describe(kind: str, name: str, origin: str, module: str, path: Path) -> Entry:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        return Entry(kind, name, origin, module, "", problem=f"{type(error).__name__}: {error}")
    summary = (ast.get_docstring(tree) or "").split("\n", 1)[0]
    defaults: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "DEFAULTS" for t in node.targets):
            defaults = ast.literal_eval(node.value)
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            options = dict(_fields(node))
    return Entry(kind, name, origin, module, summary, defaults, options)


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            try:
                yield item.target.id, ast.literal_eval(item.value) if item.value else None
            except ValueError:
                yield item.target.id, None
