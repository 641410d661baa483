"""What a user asked for: model names and run requests, parsed once into inert values.

Model grammar: ``NAME[@SIZE][:key=value]…``, comma-separated. NAME is a family, ``toy:``word, or ``hf:``rest up to the next
``:key=`` (there ``@`` is the revision). Values with ``:`` or ``,`` may be double-quoted; commas split outside quotes only.

Keys are options of the family, and for every family ``weights``, ``regime`` and ``learning_rate``: where the weights come from. They
are no part of the architecture.

Tasks follow the same grammar without a size. ``lm_eval:``NAME takes a word too, and more of them: what follows it and is no task of
bdh-bench is one more name, ``lm_eval:a,b,memory`` is lm_eval:"a,b" and memory. Quotes decide where a name is the name of both.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bdh_bench.errors import SpecError, UnknownNameError

#: Parameter targets; every family is solved to within ±2 %.
SIZES: dict[str, int] = {
    "quick": 300_000,
    "1m": 1_000_000,
    "3m": 3_000_000,
    "10m": 10_000_000,
    "25m": 25_000_000,
    "50m": 50_000_000,
    "100m": 100_000_000,
    "350m": 350_000_000,
    "1b": 1_000_000_000,
}
DEFAULT_SIZE = "quick"
#: What takes a word behind its name.
_WORDED = ("toy", "hf", "lm_eval")

#: Options of every family: where weights come from.
WEIGHT_OPTIONS = {
    "weights": "a file of weights, or its folder; without it, a task that needs trained weights trains them",
    "regime": "of the training, for this model alone: crop, carried or crop+carried",
    "learning_rate": "of the training, for this model alone",
}

#: Where the state of a scored stream is emptied: at a document's end, every training context, before every stride.
STATE_PROTOCOLS = ("carry", "cold", "window")

#: How much is checked of a model before its numbers are stored (``runner.gates``).
GATES = ("standard", "full")

_OPTION = re.compile(r":(?=[A-Za-z_][A-Za-z0-9_]*=)")
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]*\Z")


@dataclass(frozen=True)
class ModelSpec:
    """One model as named on the command line. ``size`` is "" where none was given; options are text, unparsed."""

    family: str
    name: str = ""
    size: str = ""
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """Canonical form: options sorted, the default size left out, values quoted only where needed."""
        name = f'"{self.name}"' if "," in self.name else self.name
        head = f"{self.family}:{name}" if name else self.family
        size = f"@{self.size}" if self.size and (self.size != DEFAULT_SIZE or self.family == "hf") else ""
        return head + size + "".join(f":{key}={_quote(value)}" for key, value in sorted(self.options))

    def option(self, key: str) -> str | None:
        """The text given for option ``key``, or None."""
        return dict(self.options).get(key)

    def architecture(self) -> ModelSpec:
        """The same model without the options that say where its weights come from."""
        return replace(self, options=tuple(o for o in self.options if o[0] not in WEIGHT_OPTIONS))


def is_family(name: str) -> bool:
    """Whether ``name`` can stand as a family on the command line."""
    return _WORD.match(name) is not None


def _quote(value: str) -> str:
    return f'"{value}"' if ":" in value or "," in value else value


def _split_outside_quotes(text: str, separator: re.Pattern[str]) -> list[str]:
    quoted = [False]
    for char in text:
        quoted.append(quoted[-1] ^ (char == '"'))
    if quoted[-1]:
        raise SpecError(f"got {text!r} with an open quote · expected quotes in pairs", 'write key="value"')
    cuts = [m.start() for m in separator.finditer(text) if not quoted[m.start()]]
    starts, ends = [0, *(c + 1 for c in cuts)], [*cuts, len(text)]
    return [text[a:b] for a, b in zip(starts, ends, strict=True)]


def parse_model(text: str) -> ModelSpec:
    """One model name. Raises SpecError for a name that does not follow the grammar, UnknownNameError for a size."""
    head, *parts = _split_outside_quotes(text.strip(), _OPTION)
    options: dict[str, str] = {}
    for part in parts:
        key, value = part.split("=", 1)
        if key in options:
            raise SpecError(f"option {key!r} is given twice in {text!r} · expected once", "remove one")
        if not value.strip('"'):
            raise SpecError(f"option {key!r} in {text!r} is empty · expected {key}=VALUE")
        options[key] = value.strip('"')
    family, colon, name = head.partition(":")
    at = name if family == "hf" else head
    stem, _, size = at.partition("@")
    if family == "hf":
        name = stem
    elif colon:
        name = name.partition("@")[0].strip('"')
    else:
        family = stem
    if not _WORD.match(family) or (colon and not name) or ("@" in at and not size):
        raise SpecError(f"got model {text!r} · expected NAME[@SIZE][:key=value]…", "see 'bdh-bench list models'")
    if colon and family not in _WORDED:
        raise SpecError(
            f"got model {text!r} · expected key=value after ':' (only {', '.join(f'{w}:' for w in _WORDED)} take a word)",
            f"write {family}:key=value",
        )
    if size and family != "hf" and size not in SIZES:
        raise UnknownNameError("size", size, SIZES)
    return ModelSpec(family, name, size, tuple(sorted(options.items())))


def parse_models(text: str) -> tuple[ModelSpec, ...]:
    """A comma-separated list of distinct models. Raises SpecError for an empty list, an empty entry or a duplicate."""
    specs: list[ModelSpec] = []
    for part in _split_outside_quotes(text, re.compile(",")):
        if not part.strip():
            raise SpecError(f"got an empty name in the models list {text!r} · expected NAME,NAME")
        spec = parse_model(part)
        if any(str(spec) == str(other) for other in specs):
            raise SpecError(f"model {str(spec)!r} is listed twice · expected each model once", "remove one")
        specs.append(spec)
    return tuple(specs)


def parse_bytes(text: str) -> int:
    """``204800``, ``200KiB``, ``1MiB``. Raises SpecError."""
    found = re.fullmatch(r"\s*(\d+)\s*(|KiB|MiB|GiB)\s*", text)
    if not found:
        raise SpecError(f"got {text!r} · expected a number of bytes", "for example 204800, 200KiB or 1MiB")
    factor: int = 1024 ** ("", "KiB", "MiB", "GiB").index(found[2])
    return int(found[1]) * factor


def parse_tokens(text: str) -> int:
    """``4096``, ``128k`` (131,072) or ``1M``. Raises SpecError."""
    found = re.fullmatch(r"\s*(\d+)\s*(|k|K|M)\s*", text)
    if not found or not int(found[1]):
        raise SpecError(f"got {text!r} · expected a number of tokens", "for example 4096 or 128k")
    factor: int = {"": 1, "k": 1024, "K": 1024, "M": 1024**2}[found[2]]
    return int(found[1]) * factor


def parse_seconds(text: str) -> float:
    """``0.05``, ``50ms``, ``2s``, ``30m`` or ``2h``. Raises SpecError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|h|m|s|ms|us|µs)\s*", text)
    if not found or not float(found[1]):
        raise SpecError(f"got {text!r} · expected a time", "for example 50ms, 0.05s or 2h")
    return float(found[1]) * {"": 1.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}[found[2]]


def parse_tasks(text: str, known: Collection[str]) -> tuple[ModelSpec, ...]:
    """A comma-separated list of distinct tasks; ``known`` are the tasks there are. Raises SpecError as ``parse_models`` does."""
    parts: list[str] = []
    for part in _split_outside_quotes(text, re.compile(",")):
        word = part.strip().partition(":")[0]
        if word and word not in known and parts and parts[-1].strip().startswith("lm_eval:"):
            head, *options = _split_outside_quotes(parts[-1].strip(), _OPTION)
            more, *behind = _split_outside_quotes(part.strip(), _OPTION)
            names = [head.removeprefix("lm_eval:").strip('"'), more.strip('"')]
            parts[-1] = ":".join([f'lm_eval:"{",".join(names)}"', *options, *behind])
        else:
            parts.append(part)
    return parse_models(",".join(parts))


def parse_contexts(text: str) -> tuple[int, ...]:
    """``128-8192*2`` (from, to, factor) or ``128,512``; increasing, each at least 1. Raises SpecError."""
    wrong = SpecError(f"got contexts {text!r} · expected FROM-TO*FACTOR or a list", "for example 128-8192*2 or 128,512")
    span = re.fullmatch(r"\s*(\d+)-(\d+)\*(\d+)\s*", text)
    if span:
        start, stop, factor = map(int, span.groups())
        if start < 1 or stop < start or factor < 2:
            raise wrong
        values = [start]
        while values[-1] * factor <= stop:
            values.append(values[-1] * factor)
        return tuple(values)
    if not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", text):
        raise wrong
    listed = sorted({int(part) for part in text.split(",")})
    if listed[0] < 1:
        raise wrong
    return tuple(listed)


@dataclass(frozen=True)
class RunSpec:
    """Everything that determines the results of a run; its digest names the run's request.

    ``contexts`` empty means each task's own default; ``train_bytes`` and ``train_context`` are in bytes. ``match`` is the axis on which
    models are made equal; ``train_seconds`` is the training time of each with ``match="wallclock"``. ``equivalence_margin`` is the
    difference in bits per byte below which two models count as equal, declared before anything is measured. ``state_protocol`` says
    where the state of a scored stream is emptied; ``split_documents`` cuts longer documents into pieces of so many bytes (0: never);
    ``gate`` says how long the texts of the correctness gates are; ``rounds`` how often a cell of a task that repeats in rounds is
    measured, each time by a fresh process (0: as often as the task declares).
    Raises SpecError for a margin or a number of rounds that is none.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    data: str = "stdlib"
    contexts: tuple[int, ...] = ()
    train_bytes: int = 1_572_864
    train_context: int = 256
    seeds: tuple[int, ...] = (0,)
    device: str = "cpu"
    threads: int = 0
    learning_rate: float = 0.0
    documents: int = 10
    smoke: bool = False
    regime: str = "crop"
    state_protocol: str = "carry"
    split_documents: int = 0
    match: str = "params"
    train_seconds: float = 0.0
    equivalence_margin: float = 0.02
    gate: str = "standard"
    rounds: int = 0

    def __post_init__(self) -> None:
        require_positive(equivalence_margin=self.equivalence_margin)
        if not self.equivalence_margin < float("inf"):
            raise SpecError(
                f"got --equivalence-margin {self.equivalence_margin} · expected a finite number of bits per byte"
            )
        if type(self.rounds) is not int or self.rounds < 0:
            raise SpecError(f"got --rounds {self.rounds} · expected a whole number greater than 0")

    def digest(self) -> str:
        """sha256 of the canonical JSON of this request."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> RunSpec:
        """A spec from TOML or JSON values. Raises UnknownNameError for a field that does not exist."""
        for key in values:
            if key not in cls.__dataclass_fields__:
                raise UnknownNameError("run setting", key, cls.__dataclass_fields__)
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if isinstance(fields.get("split_documents"), str):
            fields["split_documents"] = parse_bytes(fields["split_documents"])
        return cls(**fields)


def to_toml(spec: RunSpec) -> str:
    """The request as TOML; ``from_toml`` reads it back unchanged."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(spec).items()}
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())


def from_toml(path: Path) -> RunSpec:
    """Read a recorded experiment. Raises SpecError where the file cannot be read as TOML."""
    import tomllib

    try:
        return RunSpec.from_mapping(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"cannot read {path} as TOML: {error}") from error


def require_positive(**values: float) -> None:
    """Raise SpecError for the first named value that is not greater than zero."""
    for name, value in values.items():
        if not value > 0:
            raise SpecError(f"got --{name.replace('_', '-')} {value} · expected a number greater than 0")
