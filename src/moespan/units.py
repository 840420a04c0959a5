"""Numbers for people: bytes and counts in the largest unit that they fill."""

from __future__ import annotations

from collections.abc import Sequence

COUNTS = ("", " K", " M", " B")

_BYTES = (" B", " kB", " MB", " GB", " TB")


def scaled(number: float, units: Sequence[str], digits: int = 2) -> str:
    """`number` in the largest unit that it fills; each of `units` is 1000 of the previous one."""
    power = 0
    while round(number, digits) >= 1000 and power + 1 < len(units):
        number /= 1000
        power += 1
    return f"{number:.{digits if power else 0}f}{units[power]}"


def bytes_in_words(num_bytes: float, digits: int = 2) -> str:
    """`2.05 MB`, `32.75 GB`."""
    return scaled(num_bytes, _BYTES, digits)
