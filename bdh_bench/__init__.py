"""bdh-bench: does BDH match transformers and state-space models on long contexts without a KV cache?

    RunSpec ─► plan: cells ─► executor ─► worker process ─► runs/<id>/ ─► tables ─► figures ─► report.html
               model × task ×             model + task,      run.json      statistics          report.md
               context × seed             measurements       events/       claims              results.csv
                                                             cells/*.npz
    ◄───────────── measuring: needs torch, slow, has effects ─────────►│◄──── reading: no torch, instant, pure ────►

The files below ``runs/<id>/`` are the only hand-over. Public names, loaded on first use:

    load_model("bdh@1m:mode=chunked")   a LanguageModel in eval mode
    open_run("runs/<id>")               the records of a stored run
    list_models()                       what is registered, without importing any of it
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["list_models", "load_model", "open_run"]

_HOMES = {
    "list_models": "bdh_bench.registry",
    "load_model": "bdh_bench.loading",
    "open_run": "bdh_bench.results.store",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
