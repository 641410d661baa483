"""How is a number written for a reader? Base units are stored; prefixes, minus signs and gaps belong to the view."""

from __future__ import annotations

import math

GAP = "—"
_DECIMAL = ("", "k", "M", "G", "T", "P", "E", "Z")
_BYTES = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def count(value: int | float) -> str:
    """1,234,567"""
    return f"{value:,.0f}"


def quantity(value: float | None, unit: str = "") -> str:
    """The value with its unit in the nearest prefix; a dash where there is none (never 0)."""
    if value is None or not math.isfinite(value):
        return GAP
    if unit == "byte":
        return _bytes(value)
    if unit == "s":
        return _seconds(value)
    if unit == "FLOP":
        return _operations(value)
    return number(value, unit)


def number(value: float | None, unit: str = "") -> str:
    """The bare number: three decimals for bits per byte and for shares of at least a hundredth, else four digits."""
    if value is None or not math.isfinite(value):
        return GAP
    fixed = unit == "bit/byte" or (unit == "share" and abs(value) >= 0.01)
    text = f"{value:.3f}" if fixed else f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.removeprefix("-")


def signed(value: float) -> str:
    """+0.012 or −0.012, with a minus sign that is not a hyphen."""
    return f"{value:+.3f}".replace("-", "−")


def interval(low: float | None, high: float | None, unit: str = "") -> str:
    """[low, high], or nothing."""
    return "" if low is None or high is None else f"[{quantity(low, unit)}, {quantity(high, unit)}]"


def signed_interval(low: float | None, high: float | None) -> str:
    """[−0.080, −0.020], or a remark that there is none."""
    return "(no interval)" if low is None or high is None else f"[{signed(low)}, {signed(high)}]"


def tick(context: float) -> str:
    """128, 1k, 2k …: labels of a context axis."""
    return f"{context / 1024:g}k" if context >= 1024 and context % 1024 == 0 else f"{context:g}"


def shortened(text: str, most: int = 48) -> str:
    """The text, cut in the middle so that both ends of a long name stay readable."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]}…{text[-(most // 3 - 1) :]}"


def _bytes(value: float) -> str:
    power = 0
    while abs(value) >= 1024 and power < len(_BYTES) - 1:
        value, power = value / 1024, power + 1
    return f"{value:,.0f} {_BYTES[power]}" if value == int(value) else f"{value:,.2f} {_BYTES[power]}"


def _seconds(value: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return "0 s" if value == 0 else f"{value / 1e-9:.3g} ns"


def _operations(value: float) -> str:
    """7.2e11 → 720 GFLOP."""
    power = 0
    while abs(value) >= 1000 and power < len(_DECIMAL) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {_DECIMAL[power]}FLOP"
