"""Which code made a number? A digest over a module's source and the sources of this package that it imports.

Editing documentation or the report does not invalidate a result; editing a kernel does.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from functools import cache
from pathlib import Path

#: Nouns and messages; they take no part in the arithmetic.
_INERT = {
    f"bdh_bench.{name}" for name in ("types", "errors", "metrics", "spec", "registry", "sizing", "loading", "sources")
}


def source_digest(*modules: str) -> str:
    """sha256 over these modules and every module of the package that they import, followed to the end."""
    digest = hashlib.sha256()
    for name in sorted(_reachable(modules)):
        path = _path(name)
        if path is not None:
            digest.update(f"{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _reachable(modules: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in found and name not in _INERT:
            found.add(name)
            waiting.extend(_imports(name))
    return found


@cache
def _imports(module: str) -> tuple[str, ...]:
    path = _path(module)
    if path is None:
        return ()
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bdh_bench"):
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.startswith("bdh_bench")]
    return tuple(names)


@cache
def _path(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # "package.module.function" is asked for too
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None
