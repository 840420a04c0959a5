"""How long steps take, as the leader sees them. Imports no torch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from moespan.engine.info import StepFigures
from moespan.engine.step import StepPlans

_MOST_KEPT = 1024  # of the latest steps, where nobody takes them


class Pace:
    """Measures steps, which end in the order in which they start.

    Attributes:
        num_steps: steps that have ended.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._in_flight: deque[tuple[StepPlans, float]] = deque()
        self._ended_at = 0.0
        self._figures: deque[StepFigures] = deque(maxlen=_MOST_KEPT)
        self.num_steps = 0

    def start(self, plans: StepPlans) -> None:
        """A step starts."""
        self._in_flight.append((plans, self._clock()))

    def end(self) -> None:
        """The oldest step in flight has ended."""
        plans, started_at = self._in_flight.popleft()
        before, self._ended_at = max(started_at, self._ended_at), self._clock()
        kind = "decode" if plans.is_decode else "prefill"
        self._figures.append(StepFigures(kind, sum(plans.num_tokens), self._ended_at - before))
        self.num_steps += 1

    def take(self) -> list[StepFigures]:
        """The steps that have ended since the last call, at most the latest `_MOST_KEPT`."""
        figures = list(self._figures)
        self._figures.clear()
        return figures
