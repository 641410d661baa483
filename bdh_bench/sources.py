"""Which code made a number? A digest over a module's source and the sources that it imports from its own package and this one.

Editing documentation or the report does not invalidate a result; editing a kernel does, and so does editing a plug-in's file.
Nothing is imported to find out: a plug-in whose package raises while it is imported has a source all the same.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

_OURS = "bdh_bench"

#: Nouns and messages; they take no part in the arithmetic.
_INERT = {
    f"{_OURS}.{name}" for name in ("types", "errors", "metrics", "spec", "registry", "sizing", "loading", "sources")
}


def source_digest(*modules: str) -> str:
    """sha256 over these modules and every module of their packages and of this one that they import, followed to the end."""
    digest = hashlib.sha256()
    for name in sorted(_reachable(modules)):
        path = source_path(name)
        if path is not None:
            digest.update(f"{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def source_path(module: str) -> Path | None:
    """The ``.py`` file of a module, or None where there is none; its packages are not imported."""
    spec = _spec(module)
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _spec(module: str) -> ModuleSpec | None:
    """``importlib.util.find_spec`` without its side effect, which is to import the packages above."""
    package, _, _ = module.rpartition(".")
    if not package:
        return importlib.util.find_spec(module)
    above = _spec(package)
    if above is None or above.submodule_search_locations is None:  # "package.module.function" is asked for too
        return None
    return PathFinder.find_spec(module, list(above.submodule_search_locations))


def _reachable(modules: tuple[str, ...]) -> set[str]:
    own = {_OURS, *(name.partition(".")[0] for name in modules)}
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        top, _, below = name.partition(".")
        if name in found or name in _INERT or top not in own:
            continue
        found.add(name)
        waiting.extend(_imports(name))
        if below and top != _OURS:  # importing a plug-in's module runs the packages above it
            waiting.append(name.rpartition(".")[0])
    return found


@cache
def _imports(module: str) -> tuple[str, ...]:
    path = source_path(module)
    if path is None:
        return ()
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            origin = _absolute(node, module, is_package=path.name == "__init__.py")
            names += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return tuple(names)


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The full name of what ``from … import`` names, whose dots count from the package of ``module``."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])
