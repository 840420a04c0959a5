"""Threads for work that would hold up the event loop: decoding large bodies, templates, encoding.

Forms of outputs are tried in a pool of their own: each may take seconds, and must not hold up the
encoding of other requests.

`tokenizers` releases Python's lock while it encodes a long text, and a template is rendered by a
process of its own. So the event loop goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from moespan.serve.refusals import Refusal

P = ParamSpec("P")
T = TypeVar("T")

_NUM_THREADS = 4
_RETRY_S = 2


class Pool:
    """A few threads, and a bound on what waits for them.

    Args:
        most_waiting: most calls that wait or run.
        num_threads: calls that run at a time.
        purpose: what requests wait for, as clients are told.
        on_full: called with each refusal.
    """

    def __init__(
        self,
        most_waiting: int,
        num_threads: int = _NUM_THREADS,
        purpose: str = "their prompt to be encoded",
        on_full: Callable[[], object] = lambda: None,
    ) -> None:
        self._on_full = on_full
        self._threads = ThreadPoolExecutor(num_threads, "moespan-pool")
        self._purpose = purpose
        self._most_waiting = most_waiting
        self._lock = threading.Lock()
        self._num_waiting = 0

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `work`, which runs in a thread.

        Raises:
            Refusal: a 429 if too much waits.
        """
        with self._lock:
            if self._num_waiting >= self._most_waiting:
                self._on_full()
                raise Refusal(
                    429,
                    f"{self._num_waiting} requests wait for {self._purpose}; try again later",
                    code="queue_full",
                    retry_after_s=_RETRY_S,
                )
            self._num_waiting += 1
        future = self._threads.submit(work, *args, **kwargs)
        future.add_done_callback(self._leave)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Drop what waits; the threads end with their present work."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _leave(self, _: Future[T]) -> None:
        with self._lock:
            self._num_waiting -= 1
