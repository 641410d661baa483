"""Where is what outlives a run kept, and how does a new folder appear whole or not at all?

A new folder is written under another name beside its place, then renamed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bdh_bench.errors import SpecError


def cache_folder() -> Path:
    """``BDH_BENCH_CACHE``, else the user's cache folder."""
    if chosen := os.environ.get("BDH_BENCH_CACHE"):
        return Path(chosen)
    try:
        from platformdirs import user_cache_path
    except ModuleNotFoundError:  # bare GPU images
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdh-bench"
    return user_cache_path("bdh-bench")


def require_absent(path: Path) -> None:
    """Raise SpecError where something lies at ``path``: nothing is ever overwritten."""
    if path.exists() or path.is_symlink():
        raise SpecError(f"{path} exists already · expected a new folder", "choose another --output, or remove it")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """The folder to write into; it stands at ``path`` once the block ends without an error. Raises SpecError."""
    require_absent(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    except OSError as error:
        raise SpecError(f"cannot write {path}: {error.strerror or error}", "check the folder and its space") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
