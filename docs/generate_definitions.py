"""Writes ``docs/definitions.md`` from the table of metrics.

    python docs/generate_definitions.py

``tests/test_docs.py`` compares the page with the table, so that it cannot rot.
"""

from __future__ import annotations

from pathlib import Path

from bdh_bench.metrics import METRICS

PAGE = Path(__file__).parent / "definitions.md"
_HEAD = """# Definitions

Generated from `bdh_bench/metrics.py`. Values are stored in base units (bytes, seconds, bits per byte); KiB and ms belong to the view.
*Better* is the direction that wins. How raw measurements become one number:

| reduction | meaning |
| --- | --- |
| ratio | sum of value · weight over sum of weights; the interval draws documents, those of one cluster together |
| share | the same over independent trials that succeeded or failed; Wilson's interval |
| median | over windows of one process, then over rounds (fresh processes); an interval needs three rounds |
| exact | an integer on which every repeat must agree; no interval |

| metric | unit | better | reduction | meaning |
| --- | --- | --- | --- | --- |
"""


def text() -> str:
    """The page."""
    rows = (f"| `{m.name}` | {m.unit} | {m.better} | {m.reduction} | {_cell(m.meaning)} |\n" for m in METRICS.values())
    return _HEAD + "".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
