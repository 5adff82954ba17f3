"""Numbers as people read them: bytes, counts, durations, shares.

Code keeps bytes, seconds and fractions; only printing turns them into GiB,
minutes and per cent, and only here.
"""

from __future__ import annotations

KIB = 1024
MIB = 1024**2
GIB = 1024**3


def to_readable_bytes(num_bytes: float) -> str:
    """A size with the largest binary unit that keeps it at or above one.

    >>> to_readable_bytes(512), to_readable_bytes(3 * GIB), to_readable_bytes(1.5 * MIB)
    ('512 B', '3.00 GiB', '1.50 MiB')
    """
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= unit:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes:.0f} B"


def to_readable_count(number: float) -> str:
    """A count with three digits and K, M or B.

    >>> to_readable_count(999), to_readable_count(134_515_008), to_readable_count(7.2e9)
    ('999', '135M', '7.20B')
    """
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= unit:
            value = number / unit
            digits = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:.{digits}f}{name}"
    return f"{number:.0f}"


def to_readable_seconds(duration_s: float) -> str:
    """A duration in the two largest units that matter.

    >>> to_readable_seconds(0.25), to_readable_seconds(75), to_readable_seconds(7322)
    ('0.25 s', '1 min 15 s', '2 h 2 min')
    """
    if duration_s < 10:
        return f"{duration_s:.2f} s"
    if duration_s < 60:
        return f"{duration_s:.0f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def to_percent(fraction: float, *, digits: int = 1) -> str:
    """A fraction between 0 and 1 as per cent.

    >>> to_percent(0.9375)
    '93.8 %'
    """
    return f"{100 * fraction:.{digits}f} %"
