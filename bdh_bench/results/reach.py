"""Where do pictures of quality leave what models were trained on? The region beyond the training context is shaded, and T is named.

T is the length of the pieces that a model learned on. It is one setting of a run, but a model with learned positions learns on pieces of
its whole table, and a model may come from elsewhere: where lengths differ the shortest begins the region, and its label names the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from bdh_bench.results.contenders import Facts
from bdh_bench.results.display import count, shortened
from bdh_bench.results.escaping import plain
from bdh_bench.results.figure import Band, Figure
from bdh_bench.results.tables import finite

BEYOND = "beyond the training context"


def trained_on(facts: Facts, models: Iterable[str]) -> dict[str, int]:
    """Model → bytes of one of its training pieces, for models that were trained in this run."""
    found: dict[str, int] = {}
    wanted = set(models) & set(facts.contenders)
    for cell in facts.run.cells:
        training = cell.facts.get("training")
        if cell.model in wanted and isinstance(training, Mapping):
            length = finite(training.get("piece_bytes")) or finite(training.get("context")) or facts.train_context
            if length:
                found.setdefault(cell.model, int(length))
    return found


def named(facts: Facts, lengths: Mapping[str, int]) -> str:
    """T = 256, or T = 256; gpt2: 384."""
    shortest = min(lengths.values())
    longer = [f"{plain(shortened(facts.label(m), 24))}: {count(n)}" for m, n in lengths.items() if n != shortest]
    return "; ".join([f"T = {count(shortest)}", *longer])


def shaded(facts: Facts, figure: Figure, models: Iterable[str]) -> Figure:
    """A figure over contexts in bytes, with the region beyond T shaded and T on its axis; as it is where nobody was trained."""
    lengths = trained_on(facts, models)
    if not lengths:
        return figure
    axis = replace(figure.x, unit="; ".join(part for part in (figure.x.unit, named(facts, lengths)) if part))
    longest = max((dot.x for line in figure.series for dot in line.points), default=0.0)
    start = float(min(lengths.values()))
    bands = (Band(start, longest, BEYOND),) if longest > start else ()
    return replace(figure, x=axis, bands=(*figure.bands, *bands))


def shaded_places(facts: Facts, figure: Figure, models: Iterable[str], begins: Sequence[int]) -> Figure:
    """The same for places at equal distances, of which each begins at so many bytes."""
    lengths = trained_on(facts, models)
    beyond = [i for i, low in enumerate(begins) if lengths and low >= min(lengths.values())]
    if not beyond:
        return figure
    band = Band(beyond[0] - 0.5, beyond[-1] + 0.5, f"{BEYOND}, {named(facts, lengths)}")
    return replace(figure, bands=(*figure.bands, band))
