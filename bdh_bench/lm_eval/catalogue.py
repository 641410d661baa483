"""Which lm-eval tasks are there? Ours, those of a folder of one's own, and on request the package's thousands, which need a network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bdh_bench.errors import MissingExtraError, SpecError, UnknownNameError

OWN_TASKS = Path(__file__).parent / "tasks"


def require() -> None:
    """Raise MissingExtraError where lm-eval is not installed; nothing is imported."""
    if find_spec("lm_eval") is None:
        raise MissingExtraError(
            "the package lm_eval is not installed · expected lm-eval 0.4.13 or later",
            "pip install 'bdh-bench[lm-eval]'",
        )


def manager(include: str = "", stock: bool = False, metadata: dict[str, Any] | None = None) -> Any:
    """lm-eval's TaskManager over our tasks, the YAML files below ``include``, and with ``stock`` all of the package's."""
    require()
    from lm_eval.tasks import TaskManager

    paths = [OWN_TASKS]
    if include:
        folder = Path(include).expanduser()
        if not folder.is_dir():
            raise SpecError(f"no folder at {include} · expected one with lm-eval tasks in YAML files", "check include=")
        paths.append(folder)
    return TaskManager(include_path=paths, include_defaults=stock, metadata=metadata)


def check_names(names: Sequence[str], include: str = "", stock: bool = False) -> Any:
    """The TaskManager that knows all of ``names``. Raises UnknownNameError, MissingExtraError."""
    known = manager(include, stock)
    for name in names:
        if name not in known.all_tasks:
            nearby = UnknownNameError("lm-eval task", name, known.all_tasks) if len(known.all_tasks) < 100 else None
            raise nearby or SpecError(f"no lm-eval task called {name!r} · expected one of 'lm-eval ls tasks'")
    return known
