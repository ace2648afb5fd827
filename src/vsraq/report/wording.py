# SPDX-License-Identifier: Apache-2.0
"""How numbers are written."""

from collections.abc import Iterable, Sequence

from vsraq.report.schema import Interval

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with some significant digits, without an exponent if short."""
    if value is None:
        return NONE
    size = abs(value)
    if size and size < 1e-4:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        text = f"{mantissa}e{int(exponent)}"
    elif size >= 1000:
        text = f"{value:,.0f}"
    else:
        decimals = digits - 1
        while size and size < 1 and decimals < 7:
            size *= 10
            decimals += 1
        while size >= 10 and decimals:
            size /= 10
            decimals -= 1
        text = f"{value:.{decimals}f}"
    return text.replace("-", MINUS)


def fixed(value: float | None, decimals: int = 3) -> str:
    """Write a number with some decimals."""
    if value is None:
        return NONE
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def percent(share: float | None, decimals: int = 0) -> str:
    """Write a share in percent; only 0 and 1 are written as 0 % and 100 %."""
    if share is None:
        return NONE
    ends = (0.0, 100.0)
    while decimals < 4 and share not in (0, 1):
        if float(f"{100 * share:.{decimals}f}") not in ends:
            break
        decimals += 1
    return f"{100 * share:.{decimals}f} %".replace("-", MINUS)


def interval(found: Interval, factor: float = 1.0, decimals: int = 3) -> str:
    """Write the ends of an interval."""
    if found.low is None or found.high is None:
        return ""
    ends = (fixed(factor * end, decimals) for end in (found.low, found.high))
    return " to ".join(ends)


def overlap(one: Interval, other: Interval) -> bool:
    """Whether two intervals have a point in common."""
    ends = (one.low, one.high, other.low, other.high)
    if any(end is None for end in ends):
        return False
    low, high, other_low, other_high = (float(end or 0.0) for end in ends)
    return low <= other_high and other_low <= high


def listed(words: Iterable[str], most: int = 3) -> str:
    """Join words; those beyond the first few are counted."""
    every = list(words)
    if len(every) > most:
        every = [*every[:most], f"{len(every) - most} more"]
    if len(every) < 2:
        return "".join(every)
    return f"{', '.join(every[:-1])} and {every[-1]}"


def counted(count: int, one: str, many: str | None = None) -> str:
    """Write a count with its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def shortened(name: str, most: int = 22) -> str:
    """A name that fits into a legend: names of exports differ at the end."""
    if len(name) <= most:
        return name
    end = (most - 1) // 2
    return f"{name[: most - 1 - end]}\N{HORIZONTAL ELLIPSIS}{name[-end:]}"


def mean(values: Sequence[float]) -> float:
    """The mean of some values."""
    return sum(values) / len(values)
