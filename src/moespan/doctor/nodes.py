"""Comparison of code and clocks between the nodes of a job, while doctor runs on all of them.

Node 0 listens at the meeting point, on that address alone, and every other node connects. Each node
asks for node 0's time in a few rounds, then sends its version, its source digest and the offset of
its clock. Node 0 sends the facts of all nodes back to each of them, so that all reports agree. Each
message is one line of JSON, of bounded length and within bounded time. Imports no torch.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TypeVar

import msgspec

from moespan.config import Nodes
from moespan.doctor.report import Finding, ok, problem, warning
from moespan.version import __version__, source_digest

LARGEST_SKEW_S = 1.0
"""With a larger difference between clocks, the logs of two nodes cannot be put in order."""

_ROUNDS = 5
_ANSWER_S = 5.0
_RETRY_S = 0.2
_LONGEST_LINE = 1 << 16


_Value = TypeVar("_Value")


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of one node.

    Attributes:
        moespan: version.
        source: digest of the package's files.
        skew_s: how far the node's clock is ahead of node 0's.
        unsure_s: largest error of `skew_s`: half of the quickest round.
    """

    node: int
    address: str = ""
    moespan: str = __version__
    source: str = ""
    skew_s: float = 0.0
    unsure_s: float = 0.0


def findings(nodes: Nodes, clock: Callable[[], float] = time.time) -> list[Finding]:
    """Compare the nodes; waits up to `nodes.join_timeout_s` for them to connect."""
    own = NodeFacts(node=nodes.node_rank, source=source_digest())
    try:
        everyone = _ask_all(nodes, own, clock) if nodes.node_rank == 0 else _tell(nodes, own, clock)
    except (OSError, EOFError, msgspec.MsgspecError) as error:
        found = [
            problem(
                f"nothing was compared at {nodes.meeting_point}: {error or type(error).__name__}",
                "run the same command on all nodes at the same time; see the findings `ports` and "
                "`network`",
            )
        ]
    else:
        found = list(judge(everyone, nodes.nnodes))
    return [msgspec.structs.replace(one, check="nodes") for one in found]


def judge(everyone: list[NodeFacts], nnodes: int) -> Iterator[Finding]:
    """The findings about the nodes that connected; node 0 is always among them."""
    by_node = {one.node: one for one in everyone}
    first = by_node[0]
    missing = [str(node) for node in range(nnodes) if node not in by_node]
    if missing:
        yield problem(
            f"node {', '.join(missing)} of {nnodes} did not connect",
            "run the same command on all nodes at the same time, each with its own --node-rank",
        )
    others = [by_node[node] for node in sorted(by_node) if node]
    for one in others:
        if (one.moespan, one.source) != (first.moespan, first.source):
            yield problem(
                f"{_name(one)} has moespan {one.moespan} with source {one.source}, node 0 "
                f"{first.moespan} with {first.source}",
                "install the same moespan on both: a job of different versions is refused",
            )
        if abs(one.skew_s) - one.unsure_s > LARGEST_SKEW_S:
            ahead = "ahead of" if one.skew_s > 0 else "behind"
            yield warning(
                f"the clock of {_name(one)} is {abs(one.skew_s):.1f} s {ahead} node 0's: their "
                "logs cannot be put in order",
                "set the clocks by NTP on both: timedatectl set-ntp true, or chronyc makestep",
            )
    if others and not missing:
        largest_ms = max(abs(one.skew_s) + one.unsure_s for one in others) * 1e3
        same = len({(one.moespan, one.source) for one in everyone}) == 1
        if same and largest_ms <= LARGEST_SKEW_S * 1e3:
            yield ok(
                f"{nnodes} nodes with moespan {first.moespan}, source {first.source}; clocks "
                f"within {largest_ms:.1f} ms"
            )


def _name(one: NodeFacts) -> str:
    return f"node {one.node} ({one.address})"


def _ask_all(nodes: Nodes, own: NodeFacts, clock: Callable[[], float]) -> list[NodeFacts]:
    """On node 0: receive the facts of every other node, then send all facts to each of them."""
    deadline = time.monotonic() + nodes.join_timeout_s
    family = socket.getaddrinfo(nodes.master_addr, nodes.master_port, type=socket.SOCK_STREAM)[0][0]
    everyone = {0: own}
    with ExitStack() as stack:
        listener = stack.enter_context(
            socket.create_server((nodes.master_addr, nodes.master_port), family=family)
        )
        lines = []
        while len(everyone) < nodes.nnodes and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                connection, address = listener.accept()
            except TimeoutError:
                break
            line = _Line(stack.enter_context(connection))
            try:
                for _ in range(_ROUNDS):
                    line.receive(float)
                    line.send(clock())
                facts = line.receive(NodeFacts)
            except (OSError, EOFError, msgspec.MsgspecError):
                continue  # not a node of this job, or one that broke off
            lines.append(line)
            everyone[facts.node] = msgspec.structs.replace(facts, address=str(address[0]))
        for line in lines:
            line.send(list(everyone.values()))
    return list(everyone.values())


def _tell(nodes: Nodes, own: NodeFacts, clock: Callable[[], float]) -> list[NodeFacts]:
    """On any other node: compare clocks, send the own facts, and receive those of all nodes."""
    deadline = time.monotonic() + nodes.join_timeout_s
    while True:
        try:
            connection = socket.create_connection((nodes.master_addr, nodes.master_port), _ANSWER_S)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)
    with connection:
        line = _Line(connection)
        rounds = []
        for _ in range(_ROUNDS):
            before = clock()
            line.send(before)
            theirs = line.receive(float)
            after = clock()
            rounds.append(((after - before) / 2, (before + after) / 2 - theirs))
        unsure_s, skew_s = min(rounds)
        line.send(msgspec.structs.replace(own, skew_s=skew_s, unsure_s=unsure_s))
        connection.settimeout(nodes.join_timeout_s + _ANSWER_S)
        return line.receive(list[NodeFacts])


class _Line:
    """Sends and receives values over a socket, each as one line of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(_ANSWER_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._file = connection.makefile("rb")

    def send(self, value: object) -> None:
        self._connection.sendall(msgspec.json.encode(value) + b"\n")

    def receive(self, kind: type[_Value]) -> _Value:
        line = self._file.readline(_LONGEST_LINE)
        if not line.endswith(b"\n"):
            raise EOFError("the other side closed the connection, or is not a moespan doctor")
        return msgspec.json.decode(line, type=kind)
