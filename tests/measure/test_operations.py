"""Operations are timed with cold caches, and calls that a neighbour disturbed do not count."""

from __future__ import annotations

import pytest
import torch

from moespan.measure import operations
from moespan.measure.operations import Sweep, TimeSource, timed


class Machine:
    """A clock, an operation of one second, and sweeps of one second; some sweeps, and the calls
    after them, take ten times as long."""

    least_s = 1.0

    def __init__(self, disturbed: list[bool]) -> None:
        self.now_s, self._disturbed, self._factor = 0.0, disturbed, 1.0
        self.calls = 0

    def sweep(self) -> float:
        slow = self._disturbed.pop(0) if self._disturbed else False
        self._factor = 10.0 if slow else 1.0
        self.now_s += self._factor
        return self._factor

    def run(self) -> None:
        self.calls += 1
        self.now_s += self._factor


def times_of(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> tuple[float, ...]:
    source = TimeSource(lambda: machine.now_s, lambda: int(machine.now_s * 1e9), False)
    monkeypatch.setitem(operations.CLOCKS, "made", source)
    sweep = Sweep(4, "made")
    monkeypatch.setattr(Sweep, "__call__", lambda self: machine.sweep())
    sweep.least_s = 1.0
    cpu = torch.device("cpu")
    options = {"clock": "made", "least": 3, "most": 4, "seconds": 100.0}
    return timed(machine.run, cpu, sweep=sweep, **options).seconds  # type: ignore[arg-type]


def test_calls_beside_a_busy_neighbour_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([True, False, True, False])
    assert times_of(machine, monkeypatch) == (1.0,) * 4
    assert machine.calls == 1 + 6  # the first one warms up


def test_on_a_machine_that_is_always_busy_the_quietest_calls_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine([True] * 5 + [False] + [True] * 10)
    assert times_of(machine, monkeypatch) == (1.0, 10.0, 10.0)
    assert machine.calls == 1 + 2 * 4


def test_a_sweep_reads_its_memory_and_knows_its_quickest_turn() -> None:
    sweep = Sweep(1 << 20)
    assert min(sweep() for _ in range(3)) >= sweep.least_s > 0
