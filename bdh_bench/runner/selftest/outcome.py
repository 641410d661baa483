"""What did the last selftest find, when, on which machine, with which code? Kept beside the checkpoints, shown with every later run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdh_bench import __version__
from bdh_bench.folders import cache_folder
from bdh_bench.measure.host import environment, fingerprint
from bdh_bench.results.store import canonical, write_atomically
from bdh_bench.sources import source_digest

if TYPE_CHECKING:
    from bdh_bench.runner.selftest.truths import Finding

NOT_RUN = "not run"


def keep(findings: Sequence[Finding]) -> dict[str, Any]:
    """Write these findings as the last outcome, and return what was written."""
    made = {
        "result": summary(findings),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "code": _code(),
        "host": fingerprint(environment()),
        "verdicts": {finding.name: finding.verdict for finding in findings},
    }
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, canonical(made, indent=1))
    return made


def summary(findings: Sequence[Finding]) -> str:
    """How many of each verdict, in one line."""
    counts = Counter(finding.verdict for finding in findings)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def last(now: Mapping[str, Any]) -> dict[str, Any]:
    """The last outcome as run.json carries it, ``now`` being the environment of the run: of another machine or of other code says so."""
    try:
        kept = json.loads(_path().read_text(encoding="utf-8"))
        known = {name: str(kept[name]) for name in ("result", "time", "version", "code", "host")}
        verdicts = {str(name): str(verdict) for name, verdict in kept["verdicts"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {"result": NOT_RUN}
    reasons = [
        reason
        for reason, other in (
            ("another machine", known["host"] != fingerprint(now)),
            ("other code", known["code"] != _code()),
        )
        if other
    ]
    return {**known, "of": " and ".join(reasons) or "this machine and code", "verdicts": verdicts}


def _path() -> Path:
    return cache_folder() / "selftest.json"


def _code() -> str:
    """Of everything that measures and stores: what a selftest proves holds for this code alone."""
    return source_digest("bdh_bench.runner.worker", "bdh_bench.runner.local", "bdh_bench.runner.selftest.truths")[:16]
