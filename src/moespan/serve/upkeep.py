"""What a running server does beside answering: signals, load lines, systemd, the loop's delay."""

from __future__ import annotations

import asyncio
import signal

from moespan import log
from moespan.serve.life import Life, State
from moespan.serve.metrics import Metrics
from moespan.serve.systemd import Notifier

LOAD_LINE_S = 10.0
"""Seconds between two lines of load."""

_TICK_S = 0.1


def obey_signals(life: Life) -> None:
    """SIGTERM drains, a second one forces the end, and so does SIGINT; for the running loop."""
    loop = asyncio.get_running_loop()

    def terminate() -> None:
        if life.state in (State.DRAINING, State.ENDED):
            life.force()
        else:
            log.logger.info("SIGTERM: draining; %d requests are unfinished", life.num_live)
            life.drain()

    loop.add_signal_handler(signal.SIGTERM, terminate)
    loop.add_signal_handler(signal.SIGINT, life.force)


class Upkeep:
    """Looks at the server again and again."""

    def __init__(self, life: Life, metrics: Metrics, notifier: Notifier | None = None) -> None:
        self._life = life
        self._metrics = metrics
        self._notifier = Notifier() if notifier is None else notifier
        self._told: str | None = None  # the state that systemd knows
        self._counted = (0, 0)  # prompt and generated tokens at the last line of load

    async def run(self) -> None:
        """Run until cancelled."""
        loop = asyncio.get_running_loop()
        line_at = alive_at = loop.time()
        watchdog_s = self._notifier.watchdog_s
        while True:
            before = loop.time()
            await asyncio.sleep(_TICK_S)
            now = loop.time()
            self._metrics.event_loop_lag.observe(max(0.0, now - before - _TICK_S))
            self._tell_state()
            if now - line_at >= LOAD_LINE_S:
                self._log_load(now - line_at)
                self._log_start()
                line_at = now
            if watchdog_s is not None and now - alive_at >= watchdog_s / 3:
                alive_at = now
                self._tell_alive()

    def _tell_state(self) -> None:
        state, word = self._life.state, self._life.reason or "ready"
        if word == self._told:
            return
        if state is State.READY and self._told in (None, State.STARTING.value):
            self._notifier.ready()
        if state is State.DRAINING:
            self._notifier.stopping()
        self._told = word
        self._notifier.status(f"{word}: {self._life.trouble}" if self._life.trouble else word)

    def _log_start(self) -> None:
        """Say that a start goes on; the leader says how much it has read."""
        state = self._life.state
        if state in (State.STARTING, State.RECOVERING):
            log.logger.info("the engine is %s, for %.0f s", state.value, self._life.away_s)

    def _tell_alive(self) -> None:
        """The watchdog hears nothing while the engine is stalled: then systemd restarts all.

        States that end by themselves are well: a start, a restart with its own limit, a drain.
        """
        if not self._life.trouble:
            self._notifier.alive()

    def _log_load(self, seconds: float) -> None:
        counted = self._metrics.num_prompt_tokens, self._metrics.num_generation_tokens
        rates = [
            (now - before) / seconds for now, before in zip(counted, self._counted, strict=True)
        ]
        self._counted = counted
        if not (self._life.num_live or any(rates)):
            return
        stats = None if self._life.pulse is None else self._life.pulse.stats
        fields = {
            "live_requests": self._life.num_live,
            "running": stats.num_running if stats else 0,
            "waiting": stats.num_waiting if stats else 0,
            "kv_usage": round(stats.kv_usage, 4) if stats else 0.0,
            "prompt_tokens_per_s": round(rates[0], 1),
            "generated_tokens_per_s": round(rates[1], 1),
        }
        log.logger.info(
            "load: %(running)d running, %(waiting)d waiting, KV cache %(percent).1f%%, tokens/s: "
            "%(prompt_tokens_per_s).1f of prompts, %(generated_tokens_per_s).1f generated",
            {**fields, "percent": 100 * float(fields["kv_usage"])},
            extra={"fields": fields},
        )
