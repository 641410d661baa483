"""What is each model, in one row: its size, its work, the bytes it keeps, its time, and its bits per byte where contexts end?

Only what rows or stored formulae say; what a run does not hold is a gap. A formula is read between the contexts at which it is stored
and never past them.
"""

from __future__ import annotations

from bdh_bench.results.answer import states_of
from bdh_bench.results.contenders import QUALITY, Facts
from bdh_bench.results.crossover import at
from bdh_bench.results.display import GAP, count, number, quantity
from bdh_bench.results.state_crossover import formula_of
from bdh_bench.results.tables import Entry, Table, finite

#: Contexts at which the state is read.
_PLACES = (1024, 65536)


def score_cards(facts: Facts) -> Table:
    """One row per model; columns in which nobody has a value are left out."""
    heads = (
        "parameters",
        "FLOPs per token",
        *(f"state at {count(c)}" for c in _PLACES),
        "TPOT, deepest",
        "bits per byte, longest",
    )
    rows = [(facts.titles[model], _row(facts, model)) for model in facts.models]
    used = [i for i in range(len(heads)) if any(row[i].text != GAP for _, row in rows)]
    return Table(
        "score-cards",
        "Score cards",
        "Each model in one row; state bytes per stream, counted where the run counted them, else by the model's formula.",
        ("model", *(heads[i] for i in used)),
        tuple((Entry(name), *(row[i] for i in used)) for name, row in rows) if used else (),
    )


def _row(facts: Facts, model: str) -> tuple[Entry, ...]:
    known = [cell.facts for cell in facts.run.cells if cell.model == model and cell.facts]
    size = next((value for one in known if (value := finite(one.get("parameters"))) is not None), None)
    work = next((value for one in known if (value := finite(one.get("flops_per_token"))) is not None), None)
    return (
        Entry(GAP if size is None else count(size)),
        Entry(GAP if work is None else number(work)),
        *(_state(facts, model, context) for context in _PLACES),
        _deepest(facts, model, "tpot_s"),
        _deepest(facts, model, QUALITY),
    )


def _state(facts: Facts, model: str, context: int) -> Entry:
    """Counted at this context, else by the formula where it reaches so far."""
    states = states_of(facts, model)
    if states is not None and context in states.at:
        return Entry(quantity(states.at[context], "byte"), "" if states.counted else "by formula")
    curve = formula_of(facts, model)
    if curve and min(curve) <= context <= max(curve):
        return Entry(quantity(at(curve, context), "byte"), "by formula")
    return Entry(GAP)


def _deepest(facts: Facts, model: str, metric: str) -> Entry:
    """The mean over seeds at the longest context, least batch, with that context as its note."""
    found = facts.select(model, metric)
    longest = [p for p in found if p.context == found[-1].context]
    values = [float(p.value or 0) for p in longest if p.batch_size == min(q.batch_size for q in longest)]
    if not values:
        return Entry(GAP)
    return Entry(quantity(sum(values) / len(values), longest[0].unit), f"at {count(longest[0].context)} bytes")
