"""How a front talks to an engine, wherever its ranks are; and the client for one in this process.

The client for ranks in other processes is `moespan.launch.ranks.RanksClient`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from moespan.config import EngineConfig
from moespan.engine.engine import Engine
from moespan.engine.info import EngineInfo, EngineStats
from moespan.engine.request import OutputDelta, Request, refusal
from moespan.engine.trace import Observation
from moespan.errors import RequestError
from moespan.parallel.counters import TrafficRows


class EngineClient(Protocol):
    """Requests in, deltas out. What the engine refuses comes back as a delta with an error."""

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine."""

    def add(self, request: Request) -> None:
        """Hand over a request; does not wait."""

    def abort(self, request_id: str) -> None:
        """Drop a request; at most deltas that were on their way still come."""

    def receive(self, timeout_s: float | None = None) -> list[OutputDelta]:
        """Wait for deltas; nothing after `timeout_s` seconds.

        Raises:
            EngineDeadError: the ranks are gone.
        """

    def stats(self) -> EngineStats:
        """How the engine is doing; call it when nothing is under way."""

    def traffic(self) -> list[TrafficRows]:
        """What each rank of this engine has sent to others; call it when nothing is under way."""

    def trace(self, token_ids: list[int]) -> list[Observation]:
        """What the network computes inside for one prompt.

        Raises:
            RequestError: the engine is not idle, or the prompt does not fit into one step.
        """

    def reload(self, config: EngineConfig) -> None:
        """End the engine and build one of `config` on the same ranks; what is unfinished is lost.

        Raises:
            MoespanError: it cannot start, and why; the ranks are gone then.
        """

    def close(self) -> None:
        """End the ranks. Idempotent."""


class LocalClient:
    """An engine in this process: it computes while `receive` waits.

    Args:
        build: makes an engine of a config; the followers build theirs meanwhile.
        on_close: called once, after the followers are released.
    """

    def __init__(
        self,
        config: EngineConfig,
        build: Callable[[EngineConfig], Engine],
        on_close: Callable[[], object] = lambda: None,
    ) -> None:
        self._build = build
        self._engine = build(config)
        self._on_close = on_close
        self._refused: list[OutputDelta] = []

    def add(self, request: Request) -> None:
        """Queue a request."""
        try:
            self._engine.add(request)
        except RequestError as error:
            self._refused += refusal(request, error)

    def abort(self, request_id: str) -> None:
        """Drop a request."""
        self._engine.abort(request_id)

    def receive(self, timeout_s: float | None = None) -> list[OutputDelta]:
        """Run steps until one brings something; nothing if there is no work."""
        deltas, self._refused = self._refused, []
        while not deltas and self._engine.has_unfinished:
            deltas = self._engine.step()
        return deltas

    @property
    def info(self) -> EngineInfo:
        """Facts about the engine."""
        return self._engine.info

    def stats(self) -> EngineStats:
        """How the engine is doing."""
        return self._engine.stats

    def traffic(self) -> list[TrafficRows]:
        """What each rank of this engine has sent to others."""
        return self._engine.traffic()

    def trace(self, token_ids: list[int]) -> list[Observation]:
        """What the network computes inside for one prompt."""
        return self._engine.trace(token_ids)

    def reload(self, config: EngineConfig) -> None:
        """Replace the engine by one of `config`."""
        self._engine.close(config)
        self._engine = self._build(config)

    def close(self) -> None:
        """Release the followers. Idempotent."""
        self._engine.close()
        on_close, self._on_close = self._on_close, lambda: None
        on_close()
