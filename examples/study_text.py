"""How a study writes tables, numbers, shares and intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from study_statistics import Bounds, mean_and_std


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table.

    Example:
        >>> print(markdown(["method", "steps"], [["`ddpm`", "300"]]))
        | method | steps |
        |---|---|
        | `ddpm` | 300 |
        <BLANKLINE>
    """
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def number(value: float, digits: int = 3) -> str:
    """Write a number, a large one as a whole one; nothing for NaN.

    Example:
        >>> number(0.12345), number(1663.4), number(208.1, 2), number(float("nan"))
        ('0.123', '1663', '208', '')
    """
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e6 else f"{value:#.{digits}g}".rstrip(".")


def with_spread(values: Sequence[float]) -> str:
    """Write mean and standard deviation of what is finite, and how many are not.

    Example:
        >>> with_spread([1.0, 2.0, 3.0]), with_spread([1.0, 3.0, float("nan")]), with_spread([float("nan")])
        ('2.00 ± 1.0', '2.00 ± 1.4, 1 not finite', '1 not finite')
    """
    finite = [value for value in values if math.isfinite(value)]
    words = [f"{len(values) - len(finite)} not finite"] if len(finite) < len(values) else []
    if finite:
        mean, std = mean_and_std(finite)
        words.insert(0, number(mean) + ("" if math.isnan(std) else f" ± {number(std, 2)}"))
    return ", ".join(words)


def share(value: float) -> str:
    """Write a share in percent, a small one to a tenth.

    Example:
        >>> share(0.125), share(-0.0123), share(float("nan"))
        ('+12 %', '-1.2 %', 'unknown')
    """
    return f"{100 * value:+.{int(abs(value) < 0.095)}f} %" if math.isfinite(value) else "unknown"


def interval(bounds: Bounds, percent: bool = False) -> str:
    """Write bounds, as one number where they are one.

    Example:
        >>> interval((0.5, 0.5)), interval((0.25, 0.5)), interval((0.25, float("inf")))
        ('0.500', '0.250 to 0.500', '0.250 to unknown')
        >>> interval((0.1, 0.25), percent=True), interval((-float("inf"), 0.25), percent=True)
        ('+10 to +25 %', 'unknown to +25 %')
    """
    low, high = (share(end) if percent else number(end) if math.isfinite(end) else "unknown" for end in bounds)
    one = bounds[0] == bounds[1] or not any(map(math.isfinite, bounds))
    return low if one else f"{low.removesuffix(' %')} to {high}"
