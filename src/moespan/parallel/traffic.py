"""What goes over each axis: calls and bytes, counted where the collectives are called."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

TrafficRows = list[tuple[str, str, str, int, int]]
"""(axis, collective, module, calls, sent bytes), plain values to send to the leader."""


@dataclass
class Traffic:
    """Calls and sent bytes of one rank by (axis, collective, module).

    Sent bytes are those of the bandwidth-optimal algorithm, with n ranks on the axis and a tensor
    of b bytes on each rank before the call:

    | collective     | a rank sends          |
    |----------------|-----------------------|
    | all_reduce     | 2·(n-1)/n · b         |
    | all_gather     | (n-1) · b             |
    | reduce_scatter | (n-1)/n · b           |
    | all_to_all     | what is not its own   |
    | send           | b                     |
    """

    calls: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    sent_bytes: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def count(self, axis: str, collective: str, module: str, sent_bytes: int) -> None:
        """Add one call."""
        self.calls[axis, collective, module] += 1
        self.sent_bytes[axis, collective, module] += sent_bytes

    def rows(self) -> TrafficRows:
        """Everything counted, sorted."""
        return [(*key, self.calls[key], self.sent_bytes[key]) for key in sorted(self.calls)]
