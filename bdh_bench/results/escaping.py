"""How does text from a run become inert in each output? What a run holds may have been written by anybody.

Names, reasons and logs pass through ``plain`` (no control characters, no characters that reorder text) and then
through the escape of their output: Markdown, LaTeX, CSV, Plotly labels or JSON inside HTML. HTML itself is escaped by
the template engine.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

#: Embeddings, overrides, isolates and marks: they can make a line read as what it is not.
_REORDERING = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\Z")
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "[": "{[}", "]": "{]}", '"': r"\textquotedbl{}", "−": "$-$", "—": "---", "…": r"\dots{}",
    "µ": r"\textmu{}",
}  # fmt: skip
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$])")


def plain(value: object, keep_lines: bool = False) -> str:
    """Text without control, private, surrogate and reordering characters; line breaks become spaces unless kept."""
    text = _REORDERING.sub("", str(value))
    kept = (_visible(char, keep_lines) for char in text)
    return "".join(kept)


def _visible(char: str, keep_lines: bool) -> str:
    if char in "\n\t":
        return char if keep_lines else " "
    return "" if unicodedata.category(char) in ("Cc", "Cs", "Co", "Cn") else char


def markdown(value: object) -> str:
    """Text for a Markdown table or sentence: no markup, no HTML, no link."""
    text = plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", text)


def latex(value: object) -> str:
    """Text for LaTeX."""
    return "".join(_LATEX.get(char, char) for char in plain(value))


def csv(value: object) -> str:
    """Text for a spreadsheet cell: what would be read as a formula gets a leading apostrophe, numbers stay numbers."""
    text = plain(value)
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@") and not _NUMBER.match(text) else text


def plotly(value: object) -> str:
    """Text for a Plotly label, which would read a subset of HTML."""
    return plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def json_in_html(value: Any) -> str:
    """JSON that may stand between script tags. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text
