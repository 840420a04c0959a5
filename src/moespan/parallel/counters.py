"""Traffic counters: calls and sent bytes of each axis, counted where collectives are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

TrafficRows = list[tuple[str, str, str, int, int]]
"""Rows (axis, collective, module, calls, sent bytes), as they are sent to the leader."""


def sent_bytes(collective: str, ranks: int, num_bytes: int) -> int:
    """Bytes that one of n = `ranks` ranks sends in the bandwidth-optimal algorithm.

    | collective       | `num_bytes`, b               | a rank sends    |
    |------------------|------------------------------|-----------------|
    | `all_reduce`     | its tensor                   | 2·(n-1) · ⌈b/n⌉ |
    | `all_gather`     | its part                     | (n-1) · b       |
    | `reduce_scatter` | its tensor                   | (n-1) · ⌈b/n⌉   |
    | `all_to_all`     | rows for other ranks         | b               |
    | `dispatch`       | a row for each chosen expert | b               |
    | `combine`        | a row for each chosen expert | b               |
    | `send`           | its tensor                   | b               |
    | `broadcast`      | the message, at its source   | (n-1) · b       |

    The formula holds whatever algorithm runs. In one shot (`moespan.parallel.one_shot`), for
    example, n-1 other ranks read the b bytes of a rank.

    `dispatch` and `combine` count all rows. Only the device knows how many of them stay on the same
    rank, and it is not asked.

    Over all ranks of an axis, sent bytes equal received bytes. The model never rounds up: tp and sp
    divide the heads, and with them the hidden size, and ranks that reduce-scatter rows have equally
    many.
    """
    others, part = ranks - 1, -(-num_bytes // ranks)
    return {
        "all_reduce": 2 * others * part,
        "all_gather": others * num_bytes,
        "reduce_scatter": others * part,
        "all_to_all": num_bytes,
        "dispatch": num_bytes,
        "combine": num_bytes,
        "send": num_bytes,
        "broadcast": others * num_bytes,
    }[collective]


@dataclass
class Traffic:
    """Calls and sent bytes of one rank by (axis, collective, module)."""

    calls: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    sent_bytes: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def count(self, axis: str, collective: str, module: str, sent_bytes: int) -> None:
        """Add one call."""
        self.calls[axis, collective, module] += 1
        self.sent_bytes[axis, collective, module] += sent_bytes

    def add(self, other: Traffic) -> None:
        """Add the counts of `other`."""
        self.calls.update(other.calls)
        self.sent_bytes.update(other.sent_bytes)

    def count_separately(self, run: Callable[[], object]) -> Traffic:
        """Run `run` and return what it counts, without adding it here."""
        calls, sent_bytes = self.calls, self.sent_bytes
        self.calls, self.sent_bytes = Counter(), Counter()
        try:
            run()
            return Traffic(self.calls, self.sent_bytes)
        finally:
            self.calls, self.sent_bytes = calls, sent_bytes

    def rows(self) -> TrafficRows:
        """All counts, sorted."""
        return [(*key, self.calls[key], self.sent_bytes[key]) for key in sorted(self.calls)]
