"""Does the harness recover what is known beforehand? Toys through the real runner, their stored rows against the truth.

    evidence.py    what is run, and what came out: rows, plain loops over the same steps, processes that were left behind
    truths.py      one list of truths, each with its judge
    slopes.py      least-squares slopes and ratios with intervals
    overhead.py    what measuring costs, and whether equal and unequal things are told apart (--perf)
    proof.py       all of it, one after the other
    outcome.py     the last outcome, kept in the user's cache folder and written into every new run

A verdict is ``recovered``, ``not recovered`` or ``not decidable``: where a plain loop over the same steps, without any harness, scatters
more than the truth allows, no timing here could confirm or refute it.
"""
