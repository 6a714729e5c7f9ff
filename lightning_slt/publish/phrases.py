"""Numbers and lists as the sentences about a run have them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional


def number(value: Optional[float], digits: int = 3) -> str:
    """A number for a person: so many significant digits, and thousands apart.

    Example:
        >>> number(12.3456), number(0.00012345), number(1234567.0), number(float("nan"))
        ('12.3', '0.000123', '1,230,000', 'n/a')
    """
    if value is None or not math.isfinite(value):
        return "n/a"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size > 8:
        return _scientific(value, digits)
    rounded = round(value, digits - 1 - size)
    return f"{rounded:,.{max(0, digits - 1 - size)}f}".replace("-", "−")


def _scientific(value: float, digits: int = 3) -> str:
    return f"{'−' if value < 0 else ''}{abs(value):.{digits - 1}e}"


def signed(value: float) -> str:
    """A change.

    Example:
        >>> signed(2.5), signed(-0.0361)
        ('+2.50', '−0.0361')
    """
    return f"{'+' if value > 0 else ''}{number(value)}"


_LARGE = 1e7
"""From here on a number and its error together are too wide for a column."""
_MOST_DIGITS = 6
"""Of such a number: it is to fit into a tile of the report."""


def with_error(value: float, error: float) -> str:
    """A number with its standard error, both to the digits that the error leaves.

    The error has one digit, and one more where that is a 1: rounding changes it by a fifth at the most.

    Example:
        >>> with_error(11.8234, 0.512), with_error(3.5, float("nan")), with_error(1234.5, 56.0)
        ('11.8 ± 0.5', '3.50', '1,230 ± 60')
        >>> with_error(11.8234, 0.142), with_error(149.2, 96.0)
        ('11.82 ± 0.14', '150 ± 100')
        >>> with_error(-1.0612e13, 4.7e11)
        '−1.06e+13 ± 5e+11'
        >>> with_error(2.0987e7, 3400.0)
        '2.0987e+07 ± 3e+03'
    """
    if not math.isfinite(value):
        return "n/a"
    if not (math.isfinite(error) and error > 0):
        return number(value)
    size = math.floor(math.log10(error))
    # rounding may carry over to the next power of ten
    carried = math.floor(math.log10(round(error, -size)))
    if max(abs(value), error) >= _LARGE:
        if abs(value) < _LARGE:
            return f"{number(value)} ± {error:.0e}"
        digits = min(max(3, 1 + math.floor(math.log10(abs(value))) - carried), _MOST_DIGITS)
        return f"{_scientific(value, digits)} ± {error:.0e}"
    last = carried - 1 if round(error, 1 - size) < 2 * 10.0**carried else carried
    places = max(0, -last)
    if places > 6:
        return f"{number(value)} ± {error:.0e}"
    rounded = round(value, -last) + 0.0  # no minus before a zero
    return f"{rounded:,.{places}f}".replace("-", "−") + f" ± {round(error, -last):,.{places}f}"


def listed(items: Sequence[str]) -> str:
    """Items as a person lists them.

    Example:
        >>> listed(["a"]), listed(["a", "b", "c"])
        ('a', 'a, b and c')
    """
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + f" and {items[-1]}" if items else ""


def count_of(count: int, one: str, many: Optional[str] = None) -> str:
    """A number of things.

    Example:
        >>> count_of(1, "estimate"), count_of(3, "estimate"), count_of(0, "estimate")
        ('1 estimate', '3 estimates', 'no estimates')
    """
    return f"{f'{count:,}' if count else 'no'} {one if count == 1 else many or one + 's'}"
