"""Who is compared with whom in a run, on which rows, and by which of its declared rules?

Roles come from the ``kind`` of a planned cell, which a model's file declares: ``transformer``, ``recurrent``, ``control`` (a known truth)
or ``yardstick`` (no learning: it shows what the corpus' context is worth). Controls and yardsticks are measured and drawn, and compete
with nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from bdh_bench.results import statistics
from bdh_bench.results.blocks import blocks_of
from bdh_bench.results.decisions import EQUIVALENCE_MARGIN
from bdh_bench.results.naming import names_of, without_regime
from bdh_bench.results.store import Run
from bdh_bench.results.tables import Point, clusters_of, finite, frozen_axes, samples_of
from bdh_bench.types import Record

SUBJECT = "bdh"
CONTROLS = frozenset({"toy"})
QUALITY = "bits_per_byte"
TRANSFORMER, YARDSTICK, CONTROL = "transformer", "yardstick", "control"
_Samples = dict[str, tuple[float, float]]


class Facts:
    """The points and records of a run by what the rules ask for; only points of single seeds."""

    def __init__(self, run: Run, points: Sequence[Point]) -> None:
        self.clusters = clusters_of(run)
        blocks = blocks_of(run, self.clusters)
        self.run, self.blocks = blocks.run, blocks.documents
        self.points = [point for point in points if point.seed is not None]
        self.models = list(dict.fromkeys(cell.model for cell in run.cells))
        self.family = {cell.model: cell.family for cell in run.cells}
        self.kind = {cell.model: cell.model_kind for cell in run.cells}
        self.names = names_of(run)
        self.seeds = len({cell.seed for cell in run.cells})
        aside = {m for m in self.models if self.kind[m] in (CONTROL, YARDSTICK) or self.family[m] in CONTROLS}
        self.contenders = [m for m in self.models if m not in aside]
        own = [m for m in self.contenders if self.family[m] == SUBJECT]
        self.subjects = own or self.contenders[:1]
        spec = run.manifest.get("spec")
        self.spec: dict[str, Any] = dict(spec) if isinstance(spec, dict) else {}

    @property
    def train_context(self) -> int | None:
        """T, the bytes of one training piece."""
        value = finite(self.spec.get("train_context"))
        return int(value) if value else None

    @property
    def margin(self) -> float:
        """δ, fixed in the request before the run, in bits per byte."""
        value = finite(self.spec.get("equivalence_margin"))
        return EQUIVALENCE_MARGIN if value is None else float(value)

    @property
    def primary_contexts(self) -> tuple[int, ...]:
        """T and 4T: where the primary metrics are read."""
        return (self.train_context, 4 * self.train_context) if self.train_context else ()

    def of_kind(self, kind: str) -> list[str]:
        """The models of one kind."""
        return [model for model in self.models if self.kind[model] == kind]

    def label(self, model: str) -> str:
        """The short name of a model in this run."""
        return self.names[model]

    @property
    def titles(self) -> dict[str, str]:
        """Short names for tables, where what does not compete must say so."""
        return {m: f"{name} (yardstick)" if self.kind[m] == YARDSTICK else name for m, name in self.names.items()}

    def regime(self, model: str) -> str:
        """How the model was trained: by its own report, else as the request says; weights that were not trained here have none."""
        for cell in self.run.cells:
            training = cell.facts.get("training")
            if cell.model == model and isinstance(training, Mapping):
                return str(training.get("regime") or self.spec.get("regime") or "crop")
        return ""

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Each subject with each other contender, once."""
        for subject in self.subjects:
            yield from ((subject, other) for other in self.contenders if other not in self.subjects)
        yield from pairwise(self.subjects)

    def machines(self) -> list[str]:
        """The contenders whose bytes and times are their own: of several that differ in training only, the first."""
        return list({without_regime(model): model for model in reversed(self.contenders)}.values())[::-1]

    def select(self, model: str, metric: str) -> list[Point]:
        """Points of one model and metric that have a value, by context."""
        found = [p for p in self.points if p.model == model and p.metric == metric and p.value is not None]
        return sorted(found, key=lambda p: p.context)

    def documents(self, point: Point) -> _Samples:
        """The samples (documents, prompts) behind a point."""
        return self._samples.get(_key(point, point.seed), {})

    def counted(self, samples: Iterable[str]) -> tuple[int, int]:
        """How many documents (or prompts) these samples are, and how many of them are independent; blocks are not counted."""
        names = {self.blocks.get(sample, sample) for sample in samples}
        return len(names), statistics.cluster_count(names, self.clusters)

    def documents_over_seeds(self, point: Point) -> _Samples:
        """The same documents, each with its mean over the seeds."""
        rows = self._by_seed.get(_key(point, None), {})
        return statistics.merge_samples(
            (name, value, weight) for s in rows.values() for name, (value, weight) in s.items()
        )

    def stopped(self, model: str) -> Point | None:
        """The first point of a quality sweep that the model could not take."""
        gone = [p for p in self.points if p.model == model and p.metric == QUALITY and p.status == "unsupported"]
        return min(gone, key=lambda p: p.context, default=None)

    @cached_property
    def gate_failed(self) -> frozenset[str]:
        """Models of which a correctness gate failed, in whatever cell."""
        cells = {cell.model for cell in self.run.cells if cell.status == "gate_failed"}
        return frozenset(cells | {record.model for record in self.run.records if record.status == "gate_failed"})

    @cached_property
    def _samples(self) -> dict[tuple[Any, ...], _Samples]:
        rows: dict[tuple[Any, ...], list[Record]] = {}
        for record in self.run.records:
            if record.sample:
                rows.setdefault(_key(record, record.seed), []).append(record)
        return {key: samples_of(group) for key, group in rows.items()}

    @cached_property
    def _by_seed(self) -> dict[tuple[Any, ...], dict[Any, _Samples]]:
        found: dict[tuple[Any, ...], dict[Any, _Samples]] = {}
        for (*key, seed), samples in self._samples.items():
            found.setdefault((*key, None), {})[seed] = samples
        return found


def _key(row: Point | Record, seed: int | None) -> tuple[Any, ...]:
    axes = row.axes if isinstance(row.axes, tuple) else frozen_axes(row.axes)
    return (row.model, row.task, row.metric, row.metric_id, row.context, row.batch_size, axes, seed)
