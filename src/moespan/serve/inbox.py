"""`Inbox`: the output of one request between the engine and the handler that sends it on.

An inbox never holds more than the request's own limits allow: at most `n` continuations of
`max_model_len` tokens. A handler that is slow gets fewer, larger deltas; it does not slow the
engine or other requests. All methods belong to the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from moespan.engine.request import OutputDelta, Request
from moespan.errors import EngineDeadError


class CutOffError(EngineDeadError):
    """The server ends before the request is finished; no engine follows."""


class Inbox:
    """The deltas of one request that its handler has not taken yet.

    An inbox ends once: every continuation has its finish reason, or the engine died, or the handler
    closed the inbox. Deltas that came before a death are told before the death is.

    Args:
        on_close: called once with the reason if `close` comes before the engine has finished the
            request.
    """

    def __init__(self, request: Request, on_close: Callable[[Inbox, str], None]) -> None:
        self.request = request
        self._on_close = on_close
        self._running = set(range(request.params.n))
        self._untold: dict[int, list[OutputDelta]] = {}  # by index of the continuation
        self._death: EngineDeadError | None = None
        self._is_closed = False
        self._waker: asyncio.Future[None] | None = None

    @property
    def is_finished(self) -> bool:
        """Whether nothing more comes: each continuation has ended, and `next` has told so."""
        return self._is_closed or not (self._running or self._untold or self._death)

    async def next(self) -> list[OutputDelta]:
        """Wait for deltas: all since the last call, one for each continuation that has some.

        One handler at a time may wait. A finished inbox returns [].

        Raises:
            EngineDeadError: the engine died before it finished the request.
        """
        while not (self._untold or self._death or self.is_finished):
            self._waker = asyncio.get_running_loop().create_future()
            try:
                await self._waker
            finally:
                self._waker = None
        if self._untold:
            untold, self._untold = self._untold, {}
            return [joined(deltas) for deltas in untold.values()]
        if self._death is not None:
            raise self._death
        return []

    def close(self, reason: str = "abort") -> None:
        """The handler wants no more; aborts the request if it is unfinished. Idempotent.

        Args:
            reason: what metrics count unfinished continuations as, of `metrics.FINISH_REASONS`.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._untold.clear()
        self._wake()
        if self.is_running:
            self._on_close(self, reason)

    # The engine's side, for `Life`.

    @property
    def is_running(self) -> bool:
        """Whether the engine may still add deltas."""
        return bool(self._running) and self._death is None

    @property
    def unfinished(self) -> list[int]:
        """Continuations without a finish reason."""
        return sorted(self._running)

    def put(self, delta: OutputDelta) -> None:
        """Take in a delta of this request."""
        if self._is_closed or not self.is_running:
            return
        self._untold.setdefault(delta.index, []).append(delta)
        if delta.finish_reason is not None:
            self._running.discard(delta.index)
        self._wake()

    def fail(self, death: EngineDeadError) -> None:
        """The engine died; ends the inbox unless it has ended before."""
        if self.is_running:
            self._death = death
            self._wake()

    def _wake(self) -> None:
        if self._waker is not None and not self._waker.done():
            self._waker.set_result(None)


def joined(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """Successive deltas of one continuation as one. Every token keeps its own log probabilities."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    return OutputDelta(
        id=last.id,
        index=last.index,
        text="".join(delta.text for delta in deltas),
        token_ids=[token for delta in deltas for token in delta.token_ids],
        logprobs=[entry for delta in deltas for entry in delta.logprobs],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        error=last.error,
        prompt_logprobs=[entry for delta in deltas for entry in delta.prompt_logprobs],
        prompt_logits=b"".join(delta.prompt_logits for delta in deltas),
        num_cached_tokens=max(delta.num_cached_tokens for delta in deltas),
        timing=next((delta.timing for delta in deltas if delta.timing is not None), None),
    )
