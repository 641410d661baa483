"""Does the shape of the code hold: imports one way, no drawer modules, a docstring for every file?"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

_PACKAGE = Path(__file__).parent.parent / "bdh_bench"
_FILES = sorted(_PACKAGE.rglob("*.py"))

#: What each layer may import of the package, besides itself.
_MAY_IMPORT = {
    "types": set(),
    "errors": set(),
    "metrics": {"errors"},
    "spec": {"errors"},
    "registry": {"errors", "options", "spec", "sources"},
    "options": set(),
    "sources": set(),
    "weights": {"errors"},
    "columns": set(),
    "folders": {"errors"},
    "templates": {"types", "session"},
    "scaffold": {"errors", "folders", "registry"},
    "checking": {"errors", "spec", "registry", "loading", "laws"},
    "conversion": {"errors", "folders", "spec", "registry", "loading"},
    "details": {"errors", "spec", "registry", "loading"},
    "session": {"errors", "types"},
    "laws": {"errors", "types", "session", "loading"},
    "kernels": {"errors"},
    "measure": {"errors"},
    "data": {"errors"},
    "sizing": {"errors", "spec"},
    "loading": {"errors", "spec", "registry", "sizing", "weights"},
    "footprint": {"errors", "spec", "registry", "loading", "weights", "results"},
    "generation": {"errors", "spec", "registry", "loading", "session"},
    "models": {"errors", "types", "session", "kernels"},
    # tasks/lm_eval.py asks the adapter, and the adapter scores with tasks/_scoring.py: no circle between files (tested below)
    "tasks": {"errors", "types", "spec", "session", "data", "measure", "lm_eval"},
    "lm_eval": {"errors", "types", "spec", "sources", "session", "loading", "weights", "data", "tasks"},
    "training": {"errors", "folders", "data", "measure", "types"},
    "results": {"errors", "types", "metrics"},
    "progress": {"types"},
}


def _layer(path: Path) -> str:
    parts = path.relative_to(_PACKAGE).with_suffix("").parts
    return parts[0]


def _imported_layers(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" if node.module == "bdh_bench" else node.module for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("bdh_bench.")}
    return found


@pytest.mark.parametrize("path", _FILES, ids=lambda p: str(p.relative_to(_PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    layer = _layer(path)
    imported = _imported_layers(path) - {layer, "__init__"}
    assert "cli" not in imported
    if layer in _MAY_IMPORT:
        assert imported <= _MAY_IMPORT[layer]


def test_no_file_imports_itself_through_others() -> None:
    names = {".".join(("bdh_bench", *p.relative_to(_PACKAGE).with_suffix("").parts)): p for p in _FILES}
    imports = {name: _imported_files(path) & names.keys() for name, path in names.items()}
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def _imported_files(path: Path) -> set[str]:
    """Modules that the file imports whenever it is itself imported."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bdh_bench"):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", _FILES, ids=lambda p: str(p.relative_to(_PACKAGE)))
def test_each_file_says_which_question_it_answers(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert path.stem not in {"utils", "util", "common", "misc", "helpers", "manager", "base"}


def test_tasks_and_measuring_never_name_a_model() -> None:
    families = {p.stem for p in (_PACKAGE / "models").glob("[!_]*.py")} - {"toy"}
    for folder in ("tasks", "measure", "training", "runner"):
        for path in (_PACKAGE / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    assert node.value not in families, f"{path.name} names {node.value!r}"


def test_the_reading_half_runs_without_torch() -> None:
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'safetensors'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import importlib, pkgutil, bdh_bench.results as r\n"
        "[importlib.import_module(m.name) for m in pkgutil.walk_packages(r.__path__, 'bdh_bench.results.')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_the_documented_ones() -> None:
    import bdh_bench

    assert bdh_bench.__all__ == ["list_models", "load_model", "open_run"]
    assert all(callable(getattr(bdh_bench, name)) for name in bdh_bench.__all__)
    with pytest.raises(AttributeError):
        bdh_bench.nothing  # noqa: B018
