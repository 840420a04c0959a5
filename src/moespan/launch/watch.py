"""How the agents of several nodes watch each other, and agree on what ended their job.

Each agent keeps one word in the store that node 0's agent hosts, and reads those of all others:
a beat that counts on, and in the end how its ranks ended. A word is JSON.

No call to the store is bounded once a link is cut, whatever timeout torch is given. So a thread of
its own makes them all, and everything else here goes by the clock and never waits for that thread
without a bound.

Bounds: a node that is silent for `Nodes.silence_s` is lost. How ranks ended elsewhere is known
after `_POLL_S`; at the end a node waits `_ENDS_S` for the word of the others, and `_LEAVE_S` until
they have read its own.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from moespan.config import Nodes
from moespan.launch.job import Failure

_POLL_S = 0.5
_ENDS_S = 4.0
_LEAVE_S = 2.0

# A node that says nothing for so long while others wait for its word at the end is the culprit.
_SUSPECT_S = 2.0


class Word(msgspec.Struct, frozen=True):
    """What one node says to the others.

    Attributes:
        beat: counts on as long as the node lives.
        ended: its ranks have ended, or are being ended.
        failure: what made them, if it happened on this node.
        order: place of this end among those of all nodes.
        is_free: it needs nothing more from the others.
    """

    beat: int = 0
    ended: bool = False
    failure: Failure | None = None
    order: int = 0
    is_free: bool = False


class Peers(Protocol):
    """The other nodes, as an agent deals with them."""

    def trouble(self) -> bool:
        """Whether the job has to end because of another node."""

    def tell(self, failure: Failure | None) -> None:
        """Say, once, how the ranks here ended: what failed here, or None. Does not wait."""

    def first_cause(self) -> Failure | None:
        """What ended the job, wherever it happened. Waits `_ENDS_S` at most."""

    def close(self) -> None:
        """Stay until the others know all that is known here, `_LEAVE_S` at most."""


class NoPeers:
    """The other nodes of a job that runs on one."""

    def __init__(self) -> None:
        self._failure: Failure | None = None

    def trouble(self) -> bool:
        """Never."""
        return False

    def tell(self, failure: Failure | None) -> None:
        """Keep it."""
        self._failure = failure

    def first_cause(self) -> Failure | None:
        """What was told."""
        return self._failure

    def close(self) -> None:
        """Nobody waits."""


def write_first_words(store: Any, num_nodes: int) -> None:
    """Make all words exist, since reading one that does not would wait for it."""
    for node in range(num_nodes):
        store.set(_key(node), msgspec.json.encode(Word()))


class Watch:
    """The other nodes of a job that runs on many.

    Args:
        nodes: this node's place among them.
        store: where the words are; nothing else may use this connection.
        addresses: of every node, for messages.
    """

    def __init__(self, nodes: Nodes, store: Any, addresses: list[str]) -> None:
        self._nodes = nodes
        self._store = store
        self._addresses = addresses
        self._others = [node for node in range(nodes.nnodes) if node != nodes.node_rank]
        self._words = [Word()] * nodes.nnodes
        self._heard_at = [time.monotonic()] * nodes.nnodes
        self._own = Word()
        self._told: Word | None = None
        self._store_closed = False
        self._wake = threading.Event()
        self._is_over = False
        threading.Thread(target=self._converse, name="moespan-watch", daemon=True).start()

    def trouble(self) -> bool:
        """Whether the job has to end because of another node."""
        return self._has_failed() or self._missing(self._nodes.silence_s) is not None

    def tell(self, failure: Failure | None) -> None:
        """Say, once, how the ranks here ended: what failed here, or None. Does not wait."""
        if failure is not None:
            failure = msgspec.structs.replace(failure, node=f"node {self._nodes.node_rank}")
        else:
            failure = self._missing(self._nodes.silence_s)
        self._own = Word(ended=True, failure=failure)
        self._wake.set()

    def first_cause(self) -> Failure | None:
        """What ended the job, wherever it happened. Waits `_ENDS_S` at most.

        Whatever failed by itself comes first, then nodes that are lost, then ranks that only
        missed their peers; of several, the earliest.
        """
        if not self._own.failure and not self._has_failed():
            # Ranks end well when the front closes, and also when it dies, which node 0 tells.
            _wait(_ENDS_S, lambda: self._has_failed() or self._is_accounted_for(0))
            if self._has_ended_well():
                return None
        _wait(_ENDS_S, lambda: all(map(self._is_accounted_for, range(self._nodes.nnodes))))
        words = list(self._words)
        if not words[self._nodes.node_rank].ended:  # the store did not take it any more
            words[self._nodes.node_rank] = self._own
        failures = [(word.order, word.failure) for word in words if word.failure]
        if not failures:
            return None
        _, first = min(failures, key=lambda it: (it[1].lost_peer, it[1].rank is not None, it[0]))
        if first.lost_peer and first.rank is not None:
            missing = self._missing(_SUSPECT_S)
            if missing is not None:
                missed = f"{first.to_error(starting=False)}"
                return msgspec.structs.replace(missing, traceback=missed)
        return first

    def close(self) -> None:
        """Stay until the others know all that is known here, `_LEAVE_S` at most."""
        self._own = leaving = msgspec.structs.replace(self._own, is_free=True)
        self._wake.set()
        _wait(
            _LEAVE_S,
            lambda: (
                self._store_closed
                or (
                    self._told is leaving
                    # The store goes with node 0, so the others go first.
                    and (self._nodes.node_rank != 0 or all(map(self._is_free, self._others)))
                )
            ),
        )
        self._is_over = True
        self._wake.set()

    def _converse(self) -> None:
        """Say our word and read the others', over and over. Any call may block for good."""
        own_key = _key(self._nodes.node_rank)
        keys = [_key(node) for node in range(self._nodes.nnodes)]
        order = 0
        try:
            for beat in itertools.count(1):
                if self._is_over:
                    return
                own = self._own
                if own.ended and not order:
                    order = self._store.add("ends", 1)
                is_free = own.is_free or self._has_ended_well()
                word = msgspec.structs.replace(own, beat=beat, order=order, is_free=is_free)
                self._store.set(own_key, msgspec.json.encode(word))
                for node, data in enumerate(self._store.multi_get(keys)):
                    word = msgspec.json.decode(data, type=Word)
                    if word != self._words[node]:
                        self._heard_at[node] = time.monotonic()
                    self._words[node] = word
                self._told = own
                self._wake.wait(min(_POLL_S, self._nodes.silence_s / 10))
                self._wake.clear()
        except RuntimeError:  # all errors of torch's stores
            self._store_closed = True

    def _absence(self, node: int, limit_s: float) -> str:
        """In which way `node` is lost; empty if it is not, or has said that it ended."""
        if self._words[node].ended:
            return ""
        if node == 0 and self._store_closed:
            return "has gone: its agent closed the connection"
        silent_s = time.monotonic() - self._heard_at[node]
        return f"has not been heard of for {silent_s:.0f} s" if silent_s > limit_s else ""

    def _missing(self, limit_s: float) -> Failure | None:
        """The first node that is lost, or this one, if the others have ended long ago."""
        if not self._has_ended_well():
            lost = ((node, self._absence(node, limit_s)) for node in self._others)
            return next((self._node_failure(node, how) for node, how in lost if how), None)
        if self._own.ended or time.monotonic() - self._heard_at[0] < self._nodes.silence_s:
            return None
        return self._node_failure(
            self._nodes.node_rank,
            f"has ranks that run on {self._nodes.silence_s:g} s after those of node 0 ended",
        )

    def _has_failed(self) -> bool:
        return any(word.failure for word in self._words)

    def _has_ended_well(self) -> bool:
        """Whether the job has: node 0, where the front is, says so. It may leave, and the store."""
        return self._words[0].ended and not self._has_failed()

    def _node_failure(self, node: int, message: str) -> Failure:
        name = f"node {node} ({self._addresses[node]})"
        return Failure(rank=None, kind="", message=message, lost_peer=True, node=name)

    def _is_accounted_for(self, node: int) -> bool:
        return self._words[node].ended or bool(self._absence(node, self._nodes.silence_s))

    def _is_free(self, node: int) -> bool:
        return self._words[node].is_free or bool(self._absence(node, _SUSPECT_S))


def _key(node: int) -> str:
    return f"word/{node}"


def _wait(limit_s: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
