"""How a front talks to an engine, wherever its ranks are; and the client for one in this process.

The client for ranks in other processes is `moespan.launch.client.RanksClient`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from moespan.engine.engine import Engine
from moespan.engine.info import EngineInfo
from moespan.engine.request import OutputDelta, Request, refusal
from moespan.errors import RequestError


class EngineClient(Protocol):
    """Requests in, deltas out. What the engine refuses comes back as a delta with an error."""

    info: EngineInfo

    def add(self, request: Request) -> None:
        """Hand over a request; does not wait."""

    def abort(self, request_id: str) -> None:
        """Drop a request; at most deltas that were on their way still come."""

    def receive(self, timeout_s: float | None = None) -> list[OutputDelta]:
        """Wait for deltas; nothing after `timeout_s` seconds.

        Raises:
            EngineDeadError: the ranks are gone.
        """

    def close(self) -> None:
        """End the ranks. Idempotent."""


class LocalClient:
    """An engine in this process: it computes while `receive` waits.

    Args:
        on_close: called once, after the followers are released.
    """

    def __init__(self, engine: Engine, on_close: Callable[[], object] = lambda: None) -> None:
        self.info = engine.info
        self._engine = engine
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

    def close(self) -> None:
        """Release the followers. Idempotent."""
        self._engine.close()
        on_close, self._on_close = self._on_close, lambda: None
        on_close()
