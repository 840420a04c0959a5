"""The tokens of each expert, as the page and the metrics show them."""

from __future__ import annotations

import asyncio
import contextlib
import math

from moespan.engine.questions import ExpertCounts
from moespan.serve.life import Life, Unavailable
from moespan.serve.metrics import Metrics

FRESH_S = 1.0
"""Age in seconds up to which an answer serves everybody who looks."""

METRICS_S = 10.0
"""Seconds after which the metrics get new counts, unless no step has run."""


class ExpertWatch:
    """Asks the engine for its counts, at most once in `FRESH_S`, however many look.

    Each answer also goes to the metrics, so that a scrape asks nothing.
    """

    def __init__(self, life: Life, metrics: Metrics) -> None:
        self._life, self._metrics = life, metrics
        self._asking = asyncio.Lock()
        self._counts: dict[int, list[int]] = {}
        self._answered_at = -math.inf

    async def counts(self) -> dict[int, list[int]]:
        """Layer → how many tokens chose each expert since the start of the running engine.

        Raises:
            Unavailable: no engine runs.
        """
        loop = asyncio.get_running_loop()
        async with self._asking:
            if loop.time() - self._answered_at >= FRESH_S:
                self._counts = await self._life.ask(ExpertCounts())
                self._answered_at = loop.time()
                self._metrics.count_experts(self._counts)
            return self._counts

    async def run(self) -> None:
        """Keep the metrics true while nobody looks, until cancelled."""
        seen = (0, 0)
        while True:
            await asyncio.sleep(METRICS_S)
            pulse = self._life.pulse
            now = (self._life.num_restarts, pulse.num_steps if pulse is not None else 0)
            if pulse is not None and now != seen:
                with contextlib.suppress(Unavailable):
                    await self.counts()
                    seen = now
