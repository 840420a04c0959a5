"""Requests with constraints, which become ready in a thread.

Compiling a grammar and encoding bad words may take longer than a step. So a request with either
waits here until its constraint is made, and no other request waits for it. Whatever fails ends this
request only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from moespan import log
from moespan.engine.constraints import Constraint
from moespan.engine.request import Request
from moespan.errors import MoespanError, RequestError
from moespan.text.grammar import Grammars, deep_stack
from moespan.text.tokenizer import Tokenizer

# Compiling uses one core; a second thread lets a short grammar pass a long one.
_NUM_THREADS = 2
_LONGEST_WAIT_S = 0.01


@dataclass
class Prepared:
    """A request whose constraint is being made.

    Attributes:
        seed: holds if the request has none.
    """

    request: Request
    seed: int
    _constraint: Future[Constraint]

    @property
    def constraint(self) -> Constraint:
        """The constraint, once it is made.

        Raises:
            RequestError: why it cannot be made.
        """
        try:
            constraint = self._constraint.result(timeout=0)
        except MoespanError as error:
            raise RequestError(str(error)) from None
        except BaseException as error:  # the grammar library panics as a BaseException
            log.logger.warning("a constraint failed", exc_info=error)
            raise RequestError(f"the constraint failed with {type(error).__name__}") from None
        if constraint.error is not None:
            raise RequestError(constraint.error)
        return constraint


class Preparation:
    """All requests whose constraints are being made.

    Args:
        make: makes the constraint of a request, in any thread.
    """

    def __init__(self, make: Callable[[Request], Constraint]) -> None:
        self._make = make
        self._threads: ThreadPoolExecutor | None = None
        self._waiting: dict[str, Prepared] = {}

    @classmethod
    def of(
        cls, vocab_size: int, eos_token_ids: Iterable[int], tokenizer: Tokenizer | None
    ) -> Preparation:
        """For one checkpoint."""
        eos = tuple(eos_token_ids)
        grammars = Grammars.of(tokenizer, vocab_size, eos)
        return cls(lambda request: Constraint.of(request, vocab_size, eos, tokenizer, grammars))

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def start(self, request: Request, seed: int) -> None:
        """Begin to make the constraint of `request`; allowed ids alone are ready at once."""
        if request.params.structured_outputs is None and not request.params.bad_words:
            future: Future[Constraint] = Future()
            future.set_result(self._make(request))
        else:
            self._threads = self._threads or ThreadPoolExecutor(_NUM_THREADS, "constraints")
            with deep_stack():
                future = self._threads.submit(self._make, request)
        self._waiting[request.id] = Prepared(request, seed, future)

    def take(self, may_wait: bool) -> Iterator[Prepared]:
        """Take out the requests that are ready or have failed, in the order of arrival.

        With `may_wait` the first of them is given a moment, so that an idle engine does not spin.
        """
        if not self._waiting:
            return
        futures = [one._constraint for one in self._waiting.values()]
        done, _ = wait(futures, _LONGEST_WAIT_S if may_wait else 0, FIRST_COMPLETED)
        for one in list(self._waiting.values()):
            if one._constraint in done:
                yield self._waiting.pop(one.request.id)

    def drop(self, request_id: str) -> None:
        """Forget a request, if it is here."""
        dropped = self._waiting.pop(request_id, None)
        if dropped is not None:
            dropped._constraint.cancel()

    def close(self) -> None:
        """Forget all requests."""
        self._waiting.clear()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
