"""How the agents of several nodes find each other, and make sure that all run the same.

Node 0's agent hosts torch's TCPStore on its loopback, and a gate to the store on master_addr and no
other address, for those who know the cluster key (`moespan.launch.tunnel`). The ranks use the store
to find each other, too. Every other agent writes a hello to it. Node 0 compares the hellos with its
own facts, and writes one verdict for all. Both are JSON.

Bounds: a port that is taken, or an address of another machine, is an error at once. A missing node
is an error after `Nodes.join_timeout_s`, on every node that is there. A peer that no longer answers
is given up after `Nodes.silence_s`, even if torch waits longer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import ipaddress
import math
import platform
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
from torch.distributed import PrefixStore, TCPStore

import moespan
from moespan.checkpoint.source import INDEX_FILE, SINGLE_FILE
from moespan.config import EngineConfig, Nodes, is_wildcard
from moespan.errors import JobOverError, MeetingError, UnreachableError
from moespan.files import open_regular, read_bytes
from moespan.launch.cluster_key import KEY_VARIABLE
from moespan.launch.tunnel import Door, Gate, NotTheGateError, loopback_listener
from moespan.launch.watch import Watch, write_first_statuses
from moespan.machine.interfaces import interfaces
from moespan.version import DIGEST_CHARACTERS, source_digest

_POLL_S = 0.1
_CONNECT_S = 2.0

# Node 0 waits this long with a verdict against a node, so that the others get it too.
_STRAGGLERS_S = 5.0
_VERDICT_READ_S = 2.0

# A node that waits longer than this for others says so.
_PATIENCE_S = 3.0

_LONGEST_VALUE = 60
_MOST_BYTES = 100 << 20  # of a file whose digest the nodes compare
_UNREADABLE = "cannot be read"

T = TypeVar("T")

Facts = dict[str, str]
"""Settings and versions that must be equal on all nodes: name -> value, both readable."""


class Hello(msgspec.Struct, frozen=True):
    """Another node to node 0."""

    node_rank: int
    address: str
    facts: Facts


class Verdict(msgspec.Struct, frozen=True):
    """Node 0 to all.

    Attributes:
        error: why the job cannot start; empty if it can.
        arrivals: number of the hello that was taken for each node.
        addresses: address of each node.
        is_over: the job does not start again; `error` says why, and is empty if it ends on purpose.
    """

    error: str
    arrivals: list[int]
    addresses: list[str]
    is_over: bool = False


@dataclass(frozen=True)
class Met:
    """The result of a meeting.

    Attributes:
        watch: watches the other nodes.
        master_addr: numeric address of node 0.
        address: this node's own, on the network that leads to node 0.
        store: address of the store, or of the door to it, on this node's loopback.
    """

    watch: Watch
    master_addr: str
    address: str
    store: tuple[str, int]


def facts(config: EngineConfig, nodes: Nodes) -> Facts:
    """The facts of this node. The checkpoint's folder and the binding to cores may differ."""
    folder = Path(config.model)
    settings = dataclasses.asdict(config)
    layout = settings.pop("layout")
    del settings["model"], settings["bind"]
    return {
        "nnodes": str(nodes.nnodes),
        "moespan": moespan.__version__,
        "moespan's source": source_digest(),
        "torch": str(torch.__version__),
        "torch_npu": _version("torch-npu"),
        "Python": ".".join(platform.python_version_tuple()[:2]),
        **{name: _short(str(value)) for name, value in {**layout, **settings}.items()},
        "config.json": _digest(folder / "config.json"),
        "list of tensors": _tensors_digest(folder),
    }


def meet(
    nodes: Nodes, own: Facts, key: bytes, say: Callable[[str], None] = lambda line: None
) -> Met:
    """Meet the agents of all other nodes.

    Args:
        own: the facts of this node.
        key: the secret of the job (`moespan.launch.cluster_key`).
        say: shows the user a line if the meeting takes long, or a stranger comes.

    Raises:
        MeetingError: a node is missing, or differs; the same error on all nodes that are there.
    """
    meeting = _Meeting(nodes, own, key, say)
    try:
        if nodes.node_rank == 0:
            listener = _listen(nodes)
            return meeting.run(lambda: meeting.host(listener))
        return meeting.run(meeting.join)
    except BaseException:
        meeting.close()
        raise


def say_over(
    nodes: Nodes, key: bytes, reason: str, say: Callable[[str], None] = lambda line: None
) -> None:
    """On node 0: tell the nodes that come to meet that the job is over. Returns when all know.

    Raises:
        MeetingError: not all have come in time.
    """
    meeting = _Meeting(nodes, {}, key, say)
    try:
        listener = _listen(nodes)
        meeting.run(lambda: meeting.dismiss(listener, reason))
    finally:
        meeting.close()


class _Meeting:
    """One node's part in the meeting. Calls to the store run in a thread that may hang."""

    def __init__(self, nodes: Nodes, own: Facts, key: bytes, say: Callable[[str], None]) -> None:
        self._nodes = nodes
        self._facts = own
        self._key = key
        self._tunnel: Gate | Door | None = None
        self._say = say
        self._deadline = time.monotonic() + nodes.join_timeout_s
        self._set_timeout("", nodes.join_timeout_s)

    def run(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread, and give up when it exceeds the timeout that it set last."""
        results: list[T | Exception] = []

        def target() -> None:
            try:
                results.append(work())
            except Exception as error:
                results.append(error)

        thread = threading.Thread(target=target, name="moespan-meeting", daemon=True)
        thread.start()
        while thread.is_alive() and time.monotonic() < self._timeout_at:
            thread.join(_POLL_S / 2)
        if not results:
            raise UnreachableError(self._timeout_error)
        if isinstance(results[0], MeetingError):
            raise results[0]
        if isinstance(results[0], Exception):
            reason = str(results[0]).partition("\n")[0]
            raise UnreachableError(f"{self._timeout_error} ({reason})") from results[0]
        return results[0]

    def close(self) -> None:
        """Leave the meeting without a result."""
        if self._tunnel is not None:
            self._tunnel.close()

    def host(self, listener: socket.socket) -> Met:
        """Node 0: take the hellos of the others, and write the verdict."""
        address = listener.getsockname()[0]
        store, at, gate = self._open(listener)
        taken = {0: Hello(0, address, self._facts)}
        arrivals = {0: 0}
        objections: list[str] = []
        arrived = ignored = 0
        patience_ends = time.monotonic() + _PATIENCE_S
        while arrived - ignored < self._nodes.nnodes - 1 and time.monotonic() < self._deadline:
            self._poll()
            if time.monotonic() > patience_ends:
                patience_ends = math.inf
                self._say(f"waiting for {self._missing(taken)} at {self._nodes.meeting_point}")
            if not store.check([f"hello/{arrived + 1}"]):
                continue
            arrived += 1
            try:
                hello = msgspec.json.decode(store.get(f"hello/{arrived}"), type=Hello)
            except msgspec.MsgspecError as malformed:
                ignored += 1
                self._say(f"ignored a malformed hello at {self._nodes.meeting_point}: {malformed}")
                continue
            found = _objections(taken, hello)
            if found:
                objections += found
                self._deadline = min(self._deadline, time.monotonic() + _STRAGGLERS_S)
            else:
                taken[hello.node_rank] = hello
                arrivals[hello.node_rank] = arrived
        error = ""
        if objections:
            error = "\n  - ".join(["the nodes do not fit together:", *objections])
        elif len(taken) < self._nodes.nnodes:
            error = (
                f"{self._missing(taken)} did not come to {self._nodes.meeting_point} within "
                f"{self._nodes.join_timeout_s:g} s{_loopback_hint(address)}"
            )
        nodes = sorted(taken)
        verdict = Verdict(
            error=error,
            arrivals=[arrivals[node] for node in nodes],
            addresses=[taken[node].address for node in nodes],
        )
        write_first_statuses(store, self._nodes.nnodes)
        store.set("verdict", msgspec.json.encode(verdict))
        if verdict.error:
            read_by = time.monotonic() + _VERDICT_READ_S
            while store.add("read", 0) < arrived - ignored and time.monotonic() < read_by:
                self._poll()
            raise MeetingError(verdict.error)
        watch = Watch(self._nodes, store, verdict.addresses, gate.close)
        return Met(watch, address, address, at)

    def dismiss(self, listener: socket.socket, reason: str) -> None:
        """Node 0: write the verdict that the job is over, and wait until all others know."""
        store, _, _ = self._open(listener)
        verdict = Verdict(error=reason, arrivals=[], addresses=[], is_over=True)
        store.set("verdict", msgspec.json.encode(verdict))
        while store.add("read", 0) < self._nodes.nnodes - 1:
            if time.monotonic() > self._deadline:
                raise MeetingError("not all nodes have come to hear that the job is over")
            self._poll()

    def _open(self, listener: socket.socket) -> tuple[PrefixStore, tuple[str, int], Gate]:
        """Node 0: the store, its address, and the gate to it at the meeting point."""
        self._set_timeout(f"the meeting point at {self._nodes.meeting_point} does not answer")
        inside = loopback_listener()
        at: tuple[str, int] = inside.getsockname()
        store = PrefixStore("nodes", self._connect(*at, inside))
        gate = self._tunnel = Gate(listener, at, self._key, self._refused)
        return store, at, gate

    def join(self) -> Met:
        """Every other node: write a hello, and read the verdict."""
        point = self._nodes.meeting_point
        address, master_addr = self._reach()
        self._set_timeout(
            f"what listens at {point} does not answer as node 0 would; if another program has "
            "that port, use another master_port"
        )
        door = self._tunnel = Door((master_addr, self._nodes.master_port), self._key)
        try:
            door.knock()
        except NotTheGateError:
            raise UnreachableError(self._timeout_error) from None
        except MeetingError as error:
            raise MeetingError(
                f"at {point}, {error}; give all nodes the same --cluster-key-file or {KEY_VARIABLE}"
            ) from None
        store = PrefixStore("nodes", self._connect(*door.address))
        arrival = store.add("arrivals", 1)
        hello = Hello(self._nodes.node_rank, address, self._facts)
        store.set(f"hello/{arrival}", msgspec.json.encode(hello))
        node_0 = f"node 0 ({master_addr})"
        hear_by = time.monotonic() + self._nodes.join_timeout_s + _STRAGGLERS_S
        while not store.check(["verdict"]):
            if time.monotonic() > hear_by:
                raise UnreachableError(f"{node_0} has not begun the job in time")
            self._set_timeout(
                f"{node_0} left before all nodes had come, or cannot be reached any more"
            )
            self._poll()
        verdict = msgspec.json.decode(store.get("verdict"), type=Verdict)
        if verdict.error or verdict.is_over:
            with contextlib.suppress(RuntimeError):  # node 0 may leave before it has answered
                store.add("read", 1)
            raise (JobOverError if verdict.is_over else MeetingError)(verdict.error)
        node = self._nodes.node_rank
        if node >= len(verdict.arrivals) or verdict.arrivals[node] != arrival:
            known = ", ".join(f"node {n} is {a}" for n, a in enumerate(verdict.addresses))
            raise MeetingError(
                f"the job at {point} runs already, without this node: {known}; give each node its "
                "own node_rank, and each job its own master_port"
            )
        watch = Watch(self._nodes, store, verdict.addresses, door.close)
        return Met(watch, master_addr, address, door.address)

    def _reach(self) -> tuple[str, str]:
        """Wait until something listens at the meeting point; → our address, and its own."""
        point = self._nodes.meeting_point
        # Only the system bounds the lookup of a name, which may take long.
        self._set_timeout(f"node 0 cannot be reached at {point}", self._nodes.join_timeout_s)
        patience_ends = time.monotonic() + _PATIENCE_S
        while True:
            try:
                with socket.create_connection(
                    (self._nodes.master_addr, self._nodes.master_port), _CONNECT_S
                ) as connected:
                    return connected.getsockname()[0], connected.getpeername()[0]
            except OSError as error:
                reason = error.strerror or str(error)
            if time.monotonic() > self._deadline:
                raise UnreachableError(
                    f"node 0 cannot be reached at {point} within "
                    f"{self._nodes.join_timeout_s:g} s: {reason}; is it running, and is this its "
                    f"address and port?{_loopback_hint(self._nodes.master_addr)}"
                )
            if time.monotonic() > patience_ends:
                patience_ends = math.inf
                self._say(f"waiting for node 0 at {point}: {reason}")
            time.sleep(_POLL_S)

    def _connect(self, address: str, port: int, listener: socket.socket | None = None) -> TCPStore:
        return TCPStore(
            address,
            port,
            is_master=listener is not None,
            # By default, the store would listen on every network of the machine.
            master_listen_fd=None if listener is None else listener.detach(),
            wait_for_workers=False,
            timeout=timedelta(seconds=self._nodes.silence_s),
        )

    def _refused(self, address: str) -> None:
        self._say(
            f"refused {address} at {self._nodes.meeting_point}: it does not know the cluster key"
        )

    def _poll(self) -> None:
        self._set_timeout(self._timeout_error)
        time.sleep(_POLL_S)

    def _set_timeout(self, error: str, most_s: float = 0) -> None:
        """Allow `most_s` plus `silence_s` for the next calls; after that, `error` is raised."""
        self._timeout_error = error
        self._timeout_at = time.monotonic() + most_s + self._nodes.silence_s

    def _missing(self, taken: dict[int, Hello]) -> str:
        missing = [str(node) for node in range(self._nodes.nnodes) if node not in taken]
        return f"node{'s' if len(missing) > 1 else ''} {', '.join(missing)}"


def _objections(taken: dict[int, Hello], hello: Hello) -> list[str]:
    """Reasons why `hello` cannot join the hellos already taken."""
    ours, theirs = taken[0].facts, hello.facts
    name = f"node {hello.node_rank} ({hello.address})"
    objections = [
        f"{fact} is {ours.get(fact, 'unknown')} on node 0 and {theirs.get(fact, 'unknown')} on "
        f"{name}"
        for fact in {**ours, **theirs}
        if ours.get(fact) != theirs.get(fact)
    ]
    twin = taken.get(hello.node_rank)
    if twin is not None:
        objections.append(
            f"two nodes have node_rank={hello.node_rank}: {twin.address} and {hello.address}"
        )
    return objections


def _listen(nodes: Nodes) -> socket.socket:
    """A socket at the meeting point, on that address only."""
    point = nodes.meeting_point
    try:
        family, _, _, _, target = socket.getaddrinfo(
            nodes.master_addr, nodes.master_port, type=socket.SOCK_STREAM
        )[0]
    except socket.gaierror as error:
        raise MeetingError(
            f"master_addr={nodes.master_addr!r} names no address: {error.strerror}"
        ) from None
    if is_wildcard(str(target[0])):
        raise MeetingError(
            f"master_addr={nodes.master_addr!r} means every network of the machine; give the one "
            "address of node 0 that the other nodes reach"
        )
    listener = socket.socket(family, socket.SOCK_STREAM)
    # A connection of the previous job must not keep the port. This allows no second listener.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(target)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise MeetingError(
                f"port {nodes.master_port} of {nodes.master_addr} is taken by another program; "
                "give all nodes another master_port, or this node its own node_rank if node 0 of "
                "this job runs here"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            own = ", ".join(f"{address} ({name})" for name, address in interfaces())
            raise MeetingError(
                f"master_addr={nodes.master_addr} is not an address of this machine, and node 0 "
                f"is where it must be; this machine has {own}"
            ) from None
        raise MeetingError(f"node 0 cannot listen at {point}: {error.strerror}") from None
    return listener


def _loopback_hint(address: str) -> str:
    try:
        is_loopback = ipaddress.ip_address(address).is_loopback
    except ValueError:
        return ""
    return f"; no other machine reaches {address}, which is a loopback address" * is_loopback


def _short(text: str) -> str:
    """The text, or a hash of it if it is too long for an error message."""
    if len(text) <= _LONGEST_VALUE:
        return text
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARACTERS]}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(read_bytes(path, _MOST_BYTES)).hexdigest()[:DIGEST_CHARACTERS]
    except FileNotFoundError:
        return "not there"
    except OSError:
        return _UNREADABLE


def _tensors_digest(folder: Path) -> str:
    """Digest of names, types, shapes and places of all tensors: from the index of the shards, or
    from the header of the only file."""
    if (folder / INDEX_FILE).exists() or not (folder / SINGLE_FILE).exists():
        return _digest(folder / INDEX_FILE)
    try:
        with open_regular(folder / SINGLE_FILE) as file:
            length = int.from_bytes(file.read(8), "little")
            head = file.read(min(length, _MOST_BYTES))
    except OSError:
        return _UNREADABLE
    return hashlib.sha256(head).hexdigest()[:DIGEST_CHARACTERS]
