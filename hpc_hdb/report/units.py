"""Numbers as people read them: three significant digits, and the unit that suits."""

from __future__ import annotations

import math
from collections.abc import Sequence


def format_number(value: float) -> str:
    """Three significant digits, without an exponent; never less than thousandths.

    >>> [format_number(x) for x in (0.0, 0.0004, 0.29, 9.898, 94.25, 2310.4)]
    ['0', '<0.001', '0.290', '9.90', '94.2', '2310']
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) < 0.001:
        return "<0.001"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 3)}f}"


def format_seconds(seconds: float) -> str:
    """A duration: 12.3 ms, 0.290 s, 9.90 s, 4 min 20 s, 2 h 05 min.

    >>> [format_seconds(x) for x in (0.0123, 0.29, 9.898, 260, 3599.9, 7500)]
    ['12.3 ms', '0.290 s', '9.90 s', '4 min 20 s', '1 h 00 min', '2 h 05 min']
    """
    if 0 < seconds < 0.1:
        return f"{format_number(seconds * 1e3)} ms"
    if seconds < 99.95:
        return f"{format_number(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    whole = round(seconds / 60)
    return f"{whole // 60} h {whole % 60:02d} min"


def format_together(seconds: Sequence[float]) -> str:
    """Durations to compare, in one unit.

    >>> format_together([0.0398, 0.0483]), format_together([0.398, 104.2])
    ('39.8 / 48.3 ms', '0.398 / 104 s')
    """
    scale, unit = (1e3, "ms") if max(seconds) < 0.1 else (1.0, "s")
    return " / ".join(format_number(value * scale) for value in seconds) + f" {unit}"


def format_count(number: int, noun: str) -> str:
    """A number with its noun: 1 worker, 2 workers."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def time_unit(longest: float) -> tuple[float, str]:
    """Seconds in a unit that suits an axis up to `longest` seconds, and the unit's symbol."""
    if longest <= 600:
        return 1.0, "s"
    return (60.0, "min") if longest <= 4 * 3600 else (3600.0, "h")
