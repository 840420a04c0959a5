"""How the agents of several nodes watch each other, and agree on what ended their job.

Each agent keeps a status in the store that node 0's agent hosts, and reads the statuses of all
others. A status is JSON: a counter that shows that the node lives, and at the end how its ranks
ended.

Once a link is cut, no call to the store is bounded, whatever timeout torch is given. So one thread
makes all these calls. Everything else here goes by the clock, and never waits for that thread
without a bound.

Bounds: a node that is silent for `Nodes.silence_s` is lost. The end of ranks elsewhere is known
after `_POLL_S`. At the end a node waits `_ENDS_S` for the statuses of the others, and `_LEAVE_S`
until they have read its own.
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
from moespan.parallel.beats import Place

_POLL_S = 0.5
_ENDS_S = 4.0
_LEAVE_S = 2.0

# A node that is silent for so long while others wait for its status at the end is the culprit.
_SUSPECT_S = 2.0


class Status(msgspec.Struct, frozen=True):
    """The status of one node, for the others.

    Attributes:
        beat: a counter that grows as long as the node lives.
        ended: its ranks have ended, or are being ended.
        failure: the cause, if it happened on this node.
        order: position of this end among the ends of all nodes.
        may_leave: the node needs nothing more from the others.
        announced: the front has announced the end of the job. Only node 0 learns that.
        places: where its ranks are in their work.
    """

    beat: int = 0
    ended: bool = False
    failure: Failure | None = None
    order: int = 0
    may_leave: bool = False
    announced: bool = False
    places: list[Place] = []


class Peers(Protocol):
    """The other nodes, as an agent deals with them."""

    def must_end(self) -> bool:
        """Whether the job has to end because of another node."""

    def show(self, places: list[Place]) -> None:
        """Publish where the ranks here are. Does not wait."""

    def places(self) -> list[Place]:
        """Where the ranks of all other nodes were, when they last said so."""

    def failures(self) -> list[Failure]:
        """The failures that other nodes have reported."""

    def announce(self) -> None:
        """Publish, on node 0, that the front has announced the end of the job. Does not wait."""

    def report(self, failure: Failure | None) -> None:
        """Publish, once, that the ranks here ended, and the failure here, if any. Does not wait."""

    def first_cause(self) -> Failure | None:
        """The failure that ended the job, on whatever node. Waits `_ENDS_S` at most."""

    def close(self) -> None:
        """Stay until the others have read this node's status, `_LEAVE_S` at most."""


class NoPeers:
    """The other nodes of a job that runs on one."""

    def __init__(self) -> None:
        self._failure: Failure | None = None

    def must_end(self) -> bool:
        """Never."""
        return False

    def show(self, places: list[Place]) -> None:
        """Nobody else wants to know."""

    def places(self) -> list[Place]:
        """There are no other ranks."""
        return []

    def failures(self) -> list[Failure]:
        """There are no other nodes."""
        return []

    def announce(self) -> None:
        """Nobody else wants to know."""

    def report(self, failure: Failure | None) -> None:
        """Keep the failure."""
        self._failure = failure

    def first_cause(self) -> Failure | None:
        """The failure that was reported."""
        return self._failure

    def close(self) -> None:
        """There are no other nodes to wait for."""


def write_first_statuses(store: Any, num_nodes: int) -> None:
    """Write empty statuses, because reading a missing one would wait for it."""
    for node in range(num_nodes):
        store.set(_key(node), msgspec.json.encode(Status()))


class Watch:
    """The other nodes of a job that runs on many.

    Args:
        nodes: this node's place among them.
        store: holds the statuses; nothing else may use this connection.
        addresses: of all nodes, for error messages.
        on_close: called when nothing needs the store any more.
    """

    def __init__(
        self,
        nodes: Nodes,
        store: Any,
        addresses: list[str],
        on_close: Callable[[], object] = lambda: None,
    ) -> None:
        self._nodes = nodes
        self._on_close = on_close
        self._store = store
        self._addresses = addresses
        self._others = [node for node in range(nodes.nnodes) if node != nodes.node_rank]
        self._statuses = [Status()] * nodes.nnodes
        self._changed_at = [time.monotonic()] * nodes.nnodes
        self._own = Status()
        self._places: list[Place] = []
        self._written: Status | None = None
        self._store_closed = False
        self._wake = threading.Event()
        self._is_over = False
        threading.Thread(target=self._exchange, name="moespan-watch", daemon=True).start()

    def must_end(self) -> bool:
        """Whether the job has to end because of another node."""
        return self._has_failed() or self._missing(self._nodes.silence_s) is not None

    def show(self, places: list[Place]) -> None:
        """Publish where the ranks here are. Does not wait."""
        self._places = places

    def places(self) -> list[Place]:
        """Where the ranks of all other nodes were, when they last said so."""
        return [place for node in self._others for place in self._statuses[node].places]

    def failures(self) -> list[Failure]:
        """The failures that other nodes have reported."""
        statuses = [self._statuses[node] for node in self._others]
        return [status.failure for status in statuses if status.failure is not None]

    def announce(self) -> None:
        """Publish, on node 0, that the front has announced the end of the job. Does not wait."""
        if not self._own.announced:
            self._own = msgspec.structs.replace(self._own, announced=True)
            self._wake.set()

    def report(self, failure: Failure | None) -> None:
        """Publish, once, that the ranks here ended, and the failure here, if any. Does not wait."""
        if failure is not None:
            node = failure.node or f"node {self._nodes.node_rank}"
            failure = msgspec.structs.replace(failure, node=node)
        else:
            failure = self._missing(self._nodes.silence_s)
        self._own = msgspec.structs.replace(self._own, ended=True, failure=failure)
        self._wake.set()

    def first_cause(self) -> Failure | None:
        """The failure that ended the job, on whatever node. Waits `_ENDS_S` at most.

        A failure of its own comes before lost nodes, and these before ranks that only missed their
        peers. Among equals, the earliest counts. If several nodes report the same failure, as of a
        step that hangs, their stacks are put together.
        """
        if not self._has_failed():
            # Ranks end well when the front closes, and also when it dies; node 0 knows which.
            _wait(
                _ENDS_S,
                lambda: self._ends_well() or self._has_failed() or self._is_accounted_for(0),
            )
        if self._ends_well():
            return None
        _wait(_ENDS_S, lambda: all(map(self._is_accounted_for, range(self._nodes.nnodes))))
        failures = self._failures()
        if not failures:
            return None
        _, first = min(
            failures, key=lambda one: (one[1].lost_peer, one[1].rank is not None, one[0])
        )
        if first.lost_peer and first.rank is not None:
            missing = self._missing(_SUSPECT_S)
            if missing is not None:
                missed = f"{first.to_error(starting=False)}"
                return msgspec.structs.replace(missing, traceback=missed)
        same = [
            one for _, one in failures if (one.node, one.message) == (first.node, first.message)
        ]
        return msgspec.structs.replace(first, traceback="".join(one.traceback for one in same))

    def close(self) -> None:
        """Stay until the others have read this node's status, `_LEAVE_S` at most."""
        if self._is_over:
            return
        self._own = leaving = msgspec.structs.replace(self._own, may_leave=True)
        self._wake.set()
        _wait(
            _LEAVE_S,
            lambda: (
                self._store_closed
                or (
                    self._written is leaving
                    # The store ends with node 0, so the others leave first.
                    and (self._nodes.node_rank != 0 or all(map(self._may_leave, self._others)))
                )
            ),
        )
        self._is_over = True
        self._wake.set()
        self._on_close()

    def _exchange(self) -> None:
        """Write this node's status and read all others, again and again. Any call may hang."""
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
                may_leave = own.may_leave or self._ends_well()
                status = msgspec.structs.replace(
                    own, beat=beat, order=order, may_leave=may_leave, places=self._places
                )
                self._store.set(own_key, msgspec.json.encode(status))
                for node, data in enumerate(self._store.multi_get(keys)):
                    try:
                        status = msgspec.json.decode(data, type=Status)
                    except msgspec.MsgspecError:
                        continue  # as if the node had said nothing
                    if status != self._statuses[node]:
                        self._changed_at[node] = time.monotonic()
                    self._statuses[node] = status
                self._written = own
                self._wake.wait(min(_POLL_S, self._nodes.silence_s / 10))
                self._wake.clear()
        except RuntimeError:  # all errors of torch's stores
            self._store_closed = True

    def _absence(self, node: int, limit_s: float) -> str:
        """How `node` was lost; empty if it was not, or has reported its end."""
        if self._statuses[node].ended:
            return ""
        if node == 0 and self._store_closed:
            return "has gone: its agent closed the connection"
        silent_s = time.monotonic() - self._changed_at[node]
        return f"has not been heard from for {silent_s:.0f} s" if silent_s > limit_s else ""

    def _missing(self, limit_s: float) -> Failure | None:
        """The first lost node, or this one if the others have ended long ago."""
        if not self._ends_well():
            lost = ((node, self._absence(node, limit_s)) for node in self._others)
            return next((self._node_failure(node, how) for node, how in lost if how), None)
        if self._own.ended or time.monotonic() - self._changed_at[0] < self._nodes.silence_s:
            return None
        message = f"has ranks that run on {self._nodes.silence_s:g} s after those of node 0 ended"
        failure = self._node_failure(self._nodes.node_rank, message)
        return msgspec.structs.replace(failure, lost_peer=False)

    def _known(self) -> list[Status]:
        """The statuses of all nodes; this node's own is the newest, even if the store lacks it."""
        statuses, at = list(self._statuses), self._nodes.node_rank
        statuses[at] = msgspec.structs.replace(self._own, order=statuses[at].order)
        return statuses

    def _failures(self) -> list[tuple[int, Failure]]:
        """All failures, each with the order of its end. Whoever only misses a peer does not fail
        once the end is announced: that peer may have ended first."""
        known = self._known()
        failures = ((status.order, status.failure) for status in known)
        return [
            (order, failure)
            for order, failure in failures
            if failure and not (failure.lost_peer and known[0].announced)
        ]

    def _has_failed(self) -> bool:
        return bool(self._failures())

    def _ends_well(self) -> bool:
        """Whether the front has announced the end. Node 0 may then leave with the store."""
        return self._known()[0].announced and not self._has_failed()

    def _node_failure(self, node: int, message: str) -> Failure:
        name = f"node {node} ({self._addresses[node]})"
        return Failure(rank=None, kind="", message=message, lost_peer=True, node=name)

    def _is_accounted_for(self, node: int) -> bool:
        return self._statuses[node].ended or bool(self._absence(node, self._nodes.silence_s))

    def _may_leave(self, node: int) -> bool:
        return self._statuses[node].may_leave or bool(self._absence(node, _SUSPECT_S))


def _key(node: int) -> str:
    return f"status/{node}"


def _wait(limit_s: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + limit_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
