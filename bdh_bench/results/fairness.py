"""Were two models given the same? The fairness card: what each had and kept, and which of it is matched.

The winner changes with the matching, so all four matchings are printed (parameters, training bytes and operations, wall-clock, state
bytes), and one axis is declared in the request before the run (``match``). On that axis two models must be within ±5 %; where they are
not, or where the value is not known, their comparison is *unranked*. A missing value is shown as missing, never filled in.

Everything comes from the worker's notes on a cell and from the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bdh_bench.results.contenders import Facts
from bdh_bench.results.display import GAP, count, number, quantity, signed
from bdh_bench.results.state_crossover import StateCrossover, state_crossovers
from bdh_bench.results.store import CellOutcome
from bdh_bench.results.tables import Entry, Table, finite
from bdh_bench.types import Scalar

TOLERANCE = 0.05
#: Declared axis → the row of the card that must match.
AXES = {
    "params": "parameters",
    "bytes": "training_bytes",
    "flops": "training_flops",
    "wallclock": "training_seconds",
    "state": "state_bytes_4T",
}
DEFAULT_AXIS = "params"
_STATE_CONTEXTS = (1, 4, 16)


@dataclass(frozen=True)
class Row:
    """One line of the card: its name, what a reader sees, its unit, and how it is read from a cell."""

    name: str
    label: str
    unit: str
    read: Callable[[CellOutcome], Scalar]


@dataclass(frozen=True)
class Card:
    """The card of a run: model → row name → value (None: missing). ``shared`` holds for every model, ``crossovers`` for two."""

    axis: str
    values: Mapping[str, Mapping[str, Scalar]]
    shared: Mapping[str, Scalar]
    crossovers: tuple[StateCrossover, ...] = ()

    def unmatched(self, first: str, second: str) -> str:
        """Why these two may not be ranked on the declared axis; nothing where they may."""
        name = AXES.get(self.axis)
        if name is None:
            return f"the declared axis {self.axis!r} is not one of {', '.join(AXES)}"
        one, two = (finite(self.values.get(model, {}).get(name)) for model in (first, second))
        label = _LABELS[name]
        if one is None or two is None:
            missing = ", ".join(m for m, v in ((first, one), (second, two)) if v is None)
            return f"{label} is the declared axis and is not known for {missing}"
        low, high = sorted((one, two))
        if high > (1 + TOLERANCE) * low:
            apart = " and ".join(_written(value, _UNITS.get(name, "")) for value in (one, two))
            return f"{label}, the declared axis, differ by more than 5 % ({apart})"
        return ""

    def ratios(self, first: str, second: str) -> dict[str, float | None]:
        """First over second on every axis: what each matching would say."""
        found: dict[str, float | None] = {}
        for axis, name in AXES.items():
            one, two = (finite(self.values.get(model, {}).get(name)) for model in (first, second))
            found[axis] = one / two if one is not None and two else None
        return found

    def as_json(self, *models: str) -> dict[str, Any]:
        """The card of these models (of all without any) as JSON values."""
        chosen = models or tuple(self.values)
        return {
            "match": self.axis,
            "shared": dict(self.shared),
            "models": {model: dict(self.values.get(model, {})) for model in chosen},
            "state_crossovers": [c.as_json() for c in self.crossovers if {c.first, c.second} <= set(chosen)],
        }


def card_of(facts: Facts) -> Card:
    """The card of all contenders of a run."""
    spec, manifest = facts.spec, facts.run.manifest
    corpus = manifest.get("corpus")
    environment = manifest.get("environment")
    shared: dict[str, Scalar] = {
        "train_context": facts.train_context,
        "regime": str(spec.get("regime", "crop")),
        "device": str(spec.get("device", "cpu")),
        "processor": str(environment.get("cpu", "")) if isinstance(environment, Mapping) else "",
        "seeds": _text([cell for cell in dict.fromkeys(c.seed for c in facts.run.cells)]),
        "data": str(corpus.get("name", "")) if isinstance(corpus, Mapping) else "",
        "data_sha256": str(corpus.get("digest", "")) if isinstance(corpus, Mapping) else "",
    }
    values = {}
    for model in facts.contenders:
        cell = _best_cell(facts, model)
        values[model] = {row.name: row.read(cell) if cell else None for row in rows_of(facts.train_context)}
    return Card(str(spec.get("match", DEFAULT_AXIS)), values, shared, state_crossovers(facts))


def _best_cell(facts: Facts, model: str) -> CellOutcome | None:
    """The cell that knows most of a model: one that trained it, else any with notes."""
    known = [cell for cell in facts.run.cells if cell.model == model and cell.facts]
    return min(
        known, key=lambda cell: ("training" not in cell.facts, cell.seed, _start_effect(cell) is None), default=None
    )


def _fact(*path: str) -> Callable[[CellOutcome], Scalar]:
    """Reads one value from the nested notes; anything that is not there is None."""

    def read(cell: CellOutcome) -> Scalar:
        value: Any = cell.facts
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return _scalar(value)

    return read


def _scalar(value: object) -> Scalar:
    if value is None or value == "" or isinstance(value, bool | str):
        return value or None if isinstance(value, str) else value
    return finite(value) if isinstance(value, int | float) else _text(value)


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _regime(cell: CellOutcome) -> Scalar:
    return _fact("training", "regime")(cell) or ("none" if cell.facts.get("weights") == "random" else None)


def _positions(cell: CellOutcome) -> Scalar:
    limit = finite(cell.facts.get("max_positions"))
    return "any" if limit is None and "max_positions" in cell.facts else limit


def _start_symbol(cell: CellOutcome) -> Scalar:
    if "start_symbol" not in cell.facts:
        return None
    symbol = cell.facts["start_symbol"]
    return "none" if symbol is None else _scalar(symbol)


def _tried(cell: CellOutcome) -> list[float]:
    known = cell.facts.get("learning_rate")
    rates = known.get("grid") if isinstance(known, Mapping) else None
    return [float(r) for rate in rates or () if (r := finite(rate)) is not None] if isinstance(rates, list) else []


def _grid(cell: CellOutcome) -> Scalar:
    return ", ".join(f"{rate:g}" for rate in _tried(cell)) or None


def _trials(cell: CellOutcome) -> Scalar:
    return len(_tried(cell)) or None


def _start_effect(cell: CellOutcome) -> Scalar:
    """Bits per byte with the start symbol and without it, on the documents that were read both ways."""
    on, off, saved = (finite(_fact("start_symbol_check", name)(cell)) for name in ("on", "off", "difference"))
    if on is None or off is None or saved is None:
        return None
    return f"{number(on)} with, {number(off)} without ({signed(saved)})"


def _convolved(cell: CellOutcome) -> Scalar:
    config = cell.facts.get("config")
    if not isinstance(config, Mapping):
        return None
    return _scalar(config["conv_kernel"]) if "conv_kernel" in config else "no such option"


def rows_of(train_context: int | None) -> tuple[Row, ...]:
    """Every line of the card; the state is read at T, 4T and 16T."""
    at = {k: str(k * train_context) if train_context else "" for k in _STATE_CONTEXTS}
    state = tuple(
        Row(_state_name(k), _LABELS[_state_name(k)], "byte", _fact("state_bytes", at[k])) for k in _STATE_CONTEXTS
    )
    training = (
        "context",
        "piece_bytes",
        "batch",
        "steps",
        "learning_rate",
        "optimiser",
        "schedule",
        "warm_up",
        "clip_norm",
        "weight_decay",
    )
    return (
        Row("parameters", _LABELS["parameters"], "", _fact("parameters")),
        Row("non_embedding_parameters", "parameters without embeddings", "", _fact("non_embedding_parameters")),
        Row("unrolled_parameters", "parameters unrolled over layers", "", _fact("unrolled_parameters")),
        *state,
        Row("training_bytes", _LABELS["training_bytes"], "", _fact("training", "bytes")),
        Row("training_flops", _LABELS["training_flops"], "", _fact("training", "flops")),
        Row("training_seconds", _LABELS["training_seconds"], "s", _fact("training", "seconds")),
        Row("regime", "training regime", "", _regime),
        *(Row(name, name.replace("_", " "), "", _fact("training", name)) for name in training),
        Row("dropout", "dropout", "", _fact("config", "dropout")),
        Row("learning_rate_source", "origin of the learning rate", "", _fact("learning_rate", "source")),
        Row("learning_rate_grid", "learning rates tried", "", _grid),
        Row("learning_rate_trials", "how many learning rates", "", _trials),
        Row("flops_per_token", "forward operations per byte at T", "", _fact("flops_per_token")),
        Row("start_symbol", "start symbol", "", _start_symbol),
        Row("start_symbol_effect", "bits per byte with and without the start symbol, 3 documents", "", _start_effect),
        Row("vocabulary", "vocabulary", "", _fact("vocab_size")),
        Row("positions", "positions", "", _positions),
        Row("dtype", "dtype of weights", "", _fact("dtype")),
        Row("precision", "dtype of products in training", "", _fact("training", "precision")),
        Row("kernels", "kernels", "", _fact("kernels")),
        Row("short_convolution", "tokens under a short convolution (1: none)", "", _convolved),
        Row("architecture", "architecture", "", _fact("architecture")),
        Row("checkpoint", "checkpoint sha256", "", _fact("checkpoint")),
    )


def _state_name(k: int) -> str:
    return f"state_bytes_{k}T" if k > 1 else "state_bytes_T"


_LABELS = {
    "parameters": "parameters",
    "training_bytes": "training bytes",
    "training_flops": "training operations (3 × forward at T/2)",
    "training_seconds": "training wall-clock",
    "state_bytes_T": "state bytes at T",
    "state_bytes_4T": "state bytes at 4T",
    "state_bytes_16T": "state bytes at 16T",
}
_UNITS = {"training_seconds": "s", **{_state_name(k): "byte" for k in _STATE_CONTEXTS}}


def fairness_table(card: Card, facts: Facts) -> Table:
    """The card as a table: a row per fact, a column per model; the declared axis is marked, a dash is a missing value."""
    names = tuple(card.values)
    body = tuple(
        (
            Entry(row.label + (" (declared axis)" if row.name == AXES.get(card.axis) else "")),
            *(_shown(card.values[name].get(row.name), row.unit) for name in names),
        )
        for row in rows_of(facts.train_context)
    )
    body = (*body, *_crossover_rows(card, facts, names))
    pairs = [(a, b, card.unmatched(a, b)) for a, b in facts.pairs()]
    unranked = [f"{facts.label(a)} and {facts.label(b)} are unranked: {why}" for a, b, why in pairs if why]
    shared = ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in card.shared.items() if value not in (None, "")
    )
    note = ". ".join([f"The same for all: {shared}", *unranked]) + "."
    meaning = "What each model had and kept. Two models are ranked only if they are within 5 % on the declared axis."
    return Table(
        "table-fairness", "Fairness card", meaning, ("fact", *(facts.label(name) for name in names)), body, note
    )


def _crossover_rows(card: Card, facts: Facts, names: Sequence[str]) -> Iterator[tuple[Entry, ...]]:
    """A row per model that others are set against: the context from which on it, or they, keep less."""
    for first in dict.fromkeys(c.first for c in card.crossovers):
        against = {c.second: c for c in card.crossovers if c.first == first}
        cells = (Entry(against[name].text, against[name].remark) if name in against else Entry(GAP) for name in names)
        yield (Entry(f"T*: state as large as that of {facts.label(first)}"), *cells)


def _shown(value: Scalar, unit: str) -> Entry:
    if value is None:
        return Entry(GAP, "missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Entry(str(value))
    return Entry(_written(value, unit))


def _written(value: float, unit: str) -> str:
    if unit:
        return quantity(value, unit)
    return count(value) if float(value).is_integer() else number(value)
