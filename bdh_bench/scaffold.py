"""What does a stranger start from? A project outside this repository with one working model or task in it.

DIR/pyproject.toml          the entry point that registers the name
DIR/bdh_bench_NAME.py       the model or task, a copy of ``templates/``; complete, and meant to be changed
DIR/README.md               the commands
"""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

from bdh_bench import registry
from bdh_bench.errors import SpecError, UnknownNameError
from bdh_bench.folders import new_folder

KINDS = ("model", "task")
_TEMPLATES = Path(__file__).parent / "templates"


def create(kind: str, name: str, output: Path | None = None) -> list[Path]:
    """Write the project to ``output`` (./NAME without it); return its files. Raises SpecError, UnknownNameError."""
    if kind not in KINDS:
        raise UnknownNameError("kind of project", kind, KINDS)
    _check_name(kind, name)
    module = f"bdh_bench_{name}"
    values = {"name": name, "kind": kind, "module": module, "distribution": module.replace("_", "-").lower()}
    files = {
        "pyproject.toml": Template(_read("project.toml")).substitute(values),
        f"{module}.py": _read(f"{kind}.py"),
        "README.md": Template(_read(f"readme_{kind}.md")).substitute(values),
    }
    target = output or Path(name)
    with new_folder(target) as folder:
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
    return [target / file for file in files]


def _check_name(kind: str, name: str) -> None:
    if not name.isidentifier() or not name.isascii() or name.startswith("_") or keyword.iskeyword(name):
        better = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")
        usable = better.isidentifier() and not keyword.iskeyword(better)
        raise SpecError(
            f"got the name {name!r} · expected letters, digits and _, a letter first, and no word of Python",
            f"did you mean {better!r}?" if usable else "for example my_model",
        )
    for entry in registry.list_models() if kind == "model" else registry.list_tasks():
        if entry.name.lower() == name.lower():
            raise SpecError(
                f"the {kind} name {name!r} is taken ({entry.origin}) · expected a new name", f"for example my_{name}"
            )


def _read(file: str) -> str:
    return (_TEMPLATES / file).read_text(encoding="utf-8")
