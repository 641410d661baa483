"""Is this machine fit to measure on, and what is missing here? One finding per line: name, what was found, verdict, what to do.

Verdicts: ``fine``; ``note``, which changes how far numbers carry; ``missing``, with the command that adds it; ``unfit``, where nothing
that is measured here should be believed until it is mended (exit code 7 under ``--strict-host``). Every check is one function in
``CHECKS``; the extras are those of the installed package, read from its own metadata.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from bdh_bench.folders import cache_folder
from bdh_bench.measure import host, noise, processor

FINE, NOTE, MISSING, UNFIT = "fine", "note", "missing", "unfit"

#: What a package of an extra adds; one without a line here is still reported.
ADDS = {
    "datasets": "texts of data sets (--data hf:NAME)",
    "lm-eval": "the tasks lm_eval:NAME",
    "mamba-ssm": "its CUDA kernels",
    "nvidia-ml-py": "energy on CUDA",
}
_NOT_FOR_USERS = {"dev"}
_LEAST_MEMORY, _LITTLE_MEMORY = 2**30, 4 * 2**30
_LEAST_DISK, _LITTLE_DISK = 2**28, 2 * 2**30
_HIGH_LOAD = 0.5  # of other processes, per core


@dataclass(frozen=True)
class Finding:
    """One line; ``do`` is what to do about it, or ""."""

    name: str
    found: str
    verdict: str = FINE
    do: str = ""


@dataclass(frozen=True)
class Examination:
    """All findings, and the numbers behind the noise grade."""

    findings: tuple[Finding, ...]
    noise: noise.Noise

    @property
    def fit(self) -> bool:
        return all(finding.verdict != UNFIT for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {"fit": self.fit, "noise": self.noise.as_json(), "findings": [asdict(f) for f in self.findings]}

    def as_rows(self) -> list[dict[str, str]]:
        return [{"name": f.name, "found": f.found, "verdict": f.verdict, "what to do": f.do} for f in self.findings]


def examine(duration_s: float = 2.0) -> Examination:
    """Every finding. Noise is measured first, before anything heavy is loaded."""
    measured = noise.measure_noise(duration_s)
    return Examination((*_noise(measured), *(f for check in CHECKS for f in check())), measured)


def _noise(measured: noise.Noise) -> Iterator[Finding]:
    verdict = {noise.NOISY: UNFIT, "usable": NOTE}.get(measured.grade, FINE)
    do = {UNFIT: "stop what else runs here, or take more rounds and trust ratios only", NOTE: "take more rounds"}
    parts = (("arithmetic", measured.arithmetic), ("sleep", measured.sleep))
    numbers = "; ".join(
        f"{name}: {100 * s.spread:.1f} % apart, {100 * s.interrupted:.1f} % interrupted" for name, s in parts
    )
    yield Finding("noise", f"{measured.grade} ({numbers})", verdict, do.get(verdict, ""))


def _versions() -> Iterator[Finding]:
    facts = host.environment()
    yield Finding("system", f"{facts['platform']}, python {facts['python']}")
    yield Finding("versions", ", ".join(f"{name} {found}" for name, found in facts["versions"].items()))


def _processor() -> Iterator[Finding]:
    known = processor.processor_facts()
    yield Finding("processor", f"{host.environment()['cpu']}, {known['usable_cores']} cores to use")
    if known["quota_cores"] is not None:
        short = known["quota_cores"] < known["usable_cores"]
        do = f"use --threads {max(1, int(known['quota_cores']))}" if short else ""
        yield Finding("processor quota", f"{known['quota_cores']:g} cores", NOTE if short else FINE, do)
    governor = known["governor"]
    if governor is not None and governor != "performance":
        yield Finding("governor", governor, NOTE, "sudo cpupower frequency-set --governor performance")
    elif governor is not None:
        yield Finding("governor", governor)
    if known["turbo"] is not None:
        yield Finding("turbo", "on" if known["turbo"] else "off", NOTE if known["turbo"] else FINE)
    if known["smt"] is not None:
        do = f"use --threads {max(1, known['usable_cores'] // 2)}: two threads of one core slow each other"
        yield Finding("SMT", "on" if known["smt"] else "off", *((NOTE, do) if known["smt"] else ()))
    if known["load_per_core"] is not None:
        busy = known["load_per_core"] > _HIGH_LOAD
        do = "wait until other work is done" if busy else ""
        yield Finding("load of a minute", f"{known['load_per_core']:g} per core", NOTE if busy else FINE, do)


def _memory() -> Iterator[Finding]:
    import psutil

    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    left = host.group_memory_left()
    limited = left is not None and left < free
    free = left if left is not None and limited else free
    verdict = UNFIT if free < _LEAST_MEMORY else NOTE if free < _LITTLE_MEMORY else FINE
    do = "" if verdict == FINE else "stop other programs, or keep contexts and models small"
    of = "left by the control group" if limited else f"of {_gib(total)} available"
    yield Finding("memory", f"{_gib(free)} {of}", verdict, do)


def _cache() -> Iterator[Finding]:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        do = "set BDH_BENCH_CACHE to a writable folder"
        yield Finding("cache folder", f"{_short(folder)}: {error.strerror or error}", UNFIT, do)
        return
    verdict = UNFIT if free < _LEAST_DISK else NOTE if free < _LITTLE_DISK else FINE
    do = "" if verdict == FINE else "free some space, or set BDH_BENCH_CACHE to another disk"
    yield Finding("cache folder", f"{_short(folder)}: writable, {_gib(free)} free", verdict, do)


def _devices() -> Iterator[Finding]:
    shown = Path("/dev/nvidia0").exists()
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", f"cannot be imported: {error}", MISSING, "pip install torch")
        return
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            used = total - free > total // 20
            found = f"{about.name}, {_gib(free)} of {_gib(total)} free, CUDA {torch.version.cuda}"
            do = "another process uses it: nvidia-smi names it" if used else ""
            yield Finding(f"cuda:{number}", found, NOTE if used else FINE, do)
    elif shown:
        do = "install the torch build for its driver: https://pytorch.org/get-started/locally/"
        yield Finding("cuda", f"an NVIDIA device is there, but torch {torch.__version__} cannot use it", MISSING, do)
    else:
        yield Finding("devices", f"cpu ({torch.get_num_threads()} threads); no NVIDIA device")


def _packages() -> Iterator[Finding]:
    """Core packages that are not there, and extras that are not."""
    try:
        wanted = requires("bdh-bench") or []
    except PackageNotFoundError:
        yield Finding("bdh-bench", "runs from its source; nothing says what it needs", NOTE, "pip install --editable .")
        return
    for extra, names in _by_extra(wanted).items():
        absent = [name for name in names if not _installed(name)]
        if not extra:
            for name in absent:
                yield Finding(name, "not installed", MISSING, f"pip install {name}")
        elif extra == "cuda" and not Path("/dev/nvidia0").exists():
            continue
        elif extra not in _NOT_FOR_USERS:
            found = f"no {', '.join(map(_about, absent))}" if absent else "installed"
            do = f"pip install 'bdh-bench[{extra}]'" if absent else ""
            yield Finding(f"extra {extra}", found, MISSING if absent else FINE, do)


def _by_extra(wanted: list[str]) -> dict[str, list[str]]:
    """Requirements as the metadata writes them → names by extra, "" for the core."""
    found: dict[str, list[str]] = {"": []}
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", requirement)
        if name:
            found.setdefault(extra[1] if extra else "", []).append(name[0])
    return found


def _about(name: str) -> str:
    return f"{name} ({ADDS[name]})" if name in ADDS else name


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _short(path: Path) -> str:
    """The user's own folder as ~: what is printed here is pasted into bug reports."""
    home = os.path.expanduser("~")
    text = str(path)
    return "~" + text.removeprefix(home) if home != "/" and text.startswith(home + "/") else text


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_versions, _processor, _memory, _cache, _devices, _packages)
