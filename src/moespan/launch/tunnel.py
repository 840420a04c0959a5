"""The authenticated connections between the agents of a job, which carry the traffic of its store.

Torch's TCPStore believes everyone who reaches its port. So it listens on node 0's loopback only.
Node 0's agent has a `Gate` at the meeting point, and each other agent has a `Door` on its own
loopback. Agent and ranks of a node connect to the door (on node 0, to the store itself), and each
of these connections becomes one from the door to the gate, and from the gate to the store.

Both ends of a connection prove that they know the cluster key before a byte reaches the store:

| from | what |
|---|---|
| gate | `_MAGIC`, 32 random bytes g |
| door | 32 random bytes d, HMAC(key, "door" g d) |
| gate | `_REFUSED` and the end, or `_WELCOME` and HMAC(key, "gate" g d) |

Then each direction has frames: a length of 4 bytes, HMAC(k, number length data), the data. `number`
counts the frames, and k = HMAC(key, direction g d). So no frame can be forged, changed, repeated,
left out, or taken from another connection. A wrong one ends the connection that brought it, and
nothing else. The data themselves are not encrypted.

All of it runs in one thread with an event loop. Bounds: connecting and the handshake take
`_HANDSHAKE_S` each at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, NamedTuple

from moespan.errors import MeetingError

_MAGIC = b"moespan1"
_REFUSED, _WELCOME = b"\0", b"\1"
_NONCE_BYTES = 32
_TAG_BYTES = 32
_LENGTH_BYTES = 4
_LARGEST_FRAME = 1 << 20
_READ_BYTES = 64 << 10
_HANDSHAKE_S = 5.0
_CANCEL_S = 1.0
_MOST_STRANGERS = 16  # that are shown to the user

# Before Python 3.11, asyncio has a TimeoutError of its own. `close` cancels.
_ENDED = (asyncio.TimeoutError, asyncio.CancelledError)

_Reader = asyncio.StreamReader
_Writer = asyncio.StreamWriter


class NotTheGateError(Exception):
    """The peer at the address does not speak the protocol of a gate."""


class _Link(NamedTuple):
    """An authenticated connection, and the keys of its two directions."""

    reader: _Reader
    writer: _Writer
    sending: bytes
    receiving: bytes


class _Tunnel:
    """A thread that serves one end, until `close`."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._loop = asyncio.new_event_loop()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._serve, name="moespan-tunnel", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all connections and the thread. Idempotent."""
        if not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        self._loop.run_forever()
        if self._server is not None:
            self._server.close()
        # A socket that asyncio has just accepted has an owner from the next turn on.
        self._loop.run_until_complete(asyncio.sleep(0))
        # Again, as `asyncio.wait_for` may swallow a cancellation before Python 3.12.
        while tasks := asyncio.all_tasks(self._loop):
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.wait(tasks, timeout=_CANCEL_S))
        self._loop.run_until_complete(asyncio.sleep(0))  # closed connections leave their sockets
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of `work`, which the thread of the tunnel does."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self, listener: socket.socket) -> None:
        self._server = await asyncio.start_server(self._accept, sock=listener)

    def _accept(self, reader: _Reader, writer: _Writer) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            self._connections.discard(task)
            writer.close()

        task = self._loop.create_task(self._serve_one(reader, writer))
        self._connections.add(task)  # the loop itself keeps weak references only
        task.add_done_callback(ended)  # runs also where the task is cancelled before its start

    async def _serve_one(self, reader: _Reader, writer: _Writer) -> None:
        # An error ends this connection only, whatever the peer is.
        with contextlib.suppress(OSError, EOFError, *_ENDED):
            await self._connected(reader, writer)

    async def _connected(self, reader: _Reader, writer: _Writer) -> None:
        raise NotImplementedError


class Gate(_Tunnel):
    """Node 0's end: lets those who know the key through to the store.

    Args:
        listener: listens at the meeting point.
        store: address of the store on this machine.
        refused: called with the address of everyone who does not know the key.
    """

    def __init__(
        self,
        listener: socket.socket,
        store: tuple[str, int],
        key: bytes,
        refused: Callable[[str], None] = lambda address: None,
    ) -> None:
        super().__init__(key)
        self._store = store
        self._refused = refused
        self._strangers: set[str] = set()
        self._run(self._listen(listener))

    async def _connected(self, reader: _Reader, writer: _Writer) -> None:
        link = await asyncio.wait_for(self._greet(reader, writer), _HANDSHAKE_S)
        if link is not None:
            async with _opened(self._store) as store:
                await _join(link, *store)

    async def _greet(self, reader: _Reader, writer: _Writer) -> _Link | None:
        gate = secrets.token_bytes(_NONCE_BYTES)
        writer.write(_MAGIC + gate)
        door = await reader.readexactly(_NONCE_BYTES)
        proof = await reader.readexactly(_TAG_BYTES)
        nonces = gate + door
        if not hmac.compare_digest(proof, _tag(self._key, b"door", nonces)):
            self._refuse(writer.get_extra_info("peername"))
            writer.write(_REFUSED)
            await writer.drain()
            return None
        writer.write(_WELCOME + _tag(self._key, b"gate", nonces))
        sending, receiving = (_tag(self._key, way, nonces) for way in (b"inward", b"outward"))
        return _Link(reader, writer, sending, receiving)

    def _refuse(self, peer: tuple[Any, ...] | None) -> None:
        address = str(peer[0]) if peer else "unknown"
        if address not in self._strangers and len(self._strangers) < _MOST_STRANGERS:
            self._strangers.add(address)
            self._refused(address)


class Door(_Tunnel):
    """Another node's end: takes connections on the loopback through to the gate.

    Attributes:
        address: address on the loopback that stands for the store.
    """

    def __init__(self, gate: tuple[str, int], key: bytes) -> None:
        super().__init__(key)
        self._gate = gate
        listener = loopback_listener()
        self.address: tuple[str, int] = listener.getsockname()
        self._run(self._listen(listener))

    def knock(self) -> None:
        """Connect once, to see that the gate is there and knows the key.

        Raises:
            NotTheGateError: no gate answers.
            MeetingError: the gate has another key.
        """

        async def knock() -> None:
            async with _opened(self._gate) as gate:
                await asyncio.wait_for(self._greet(*gate), _HANDSHAKE_S)

        try:
            self._run(knock())
        except (OSError, EOFError, asyncio.TimeoutError) as error:
            raise NotTheGateError(str(error)) from None

    async def _connected(self, reader: _Reader, writer: _Writer) -> None:
        with contextlib.suppress(NotTheGateError, MeetingError):
            async with _opened(self._gate) as gate:
                link = await asyncio.wait_for(self._greet(*gate), _HANDSHAKE_S)
                await _join(link, reader, writer)

    async def _greet(self, reader: _Reader, writer: _Writer) -> _Link:
        if await reader.readexactly(len(_MAGIC)) != _MAGIC:
            raise NotTheGateError("another protocol")
        door = secrets.token_bytes(_NONCE_BYTES)
        nonces = await reader.readexactly(_NONCE_BYTES) + door
        writer.write(door + _tag(self._key, b"door", nonces))
        answer = await reader.readexactly(1)
        if answer == _REFUSED:
            raise MeetingError("node 0 has another cluster key than this node")
        proof = await reader.readexactly(_TAG_BYTES)
        if not hmac.compare_digest(proof, _tag(self._key, b"gate", nonces)):
            raise MeetingError("what answers there does not know the cluster key")
        sending, receiving = (_tag(self._key, way, nonces) for way in (b"outward", b"inward"))
        return _Link(reader, writer, sending, receiving)


def loopback_listener() -> socket.socket:
    """A socket that listens on the loopback, at a port that the system chooses."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    listener.listen(socket.SOMAXCONN)
    return listener


@contextlib.asynccontextmanager
async def _opened(address: tuple[str, int]) -> AsyncIterator[tuple[_Reader, _Writer]]:
    """A connection to `address`, which is closed in every case."""
    reader, writer = await asyncio.wait_for(asyncio.open_connection(*address), _HANDSHAKE_S)
    try:
        yield reader, writer
    finally:
        writer.close()


async def _join(link: _Link, reader: _Reader, writer: _Writer) -> None:
    """Pass everything on between a link and a plain connection, until one of them ends."""
    for one in (link.writer, writer):
        one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ways = [
        asyncio.ensure_future(_outward(reader, link)),
        asyncio.ensure_future(_inward(link, writer)),
    ]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _outward(reader: _Reader, link: _Link) -> None:
    """Put what the plain connection brings into frames."""
    number = 0
    while data := await reader.read(_READ_BYTES):
        link.writer.write(_frame(link.sending, number, data))
        number += 1
        await link.writer.drain()


async def _inward(link: _Link, writer: _Writer) -> None:
    """Check frames, and pass on their data. Ends at the first one that is wrong."""
    number = 0
    while True:
        length = await link.reader.readexactly(_LENGTH_BYTES)
        tag = await link.reader.readexactly(_TAG_BYTES)
        size = int.from_bytes(length, "big")
        if size > _LARGEST_FRAME:
            return
        data = await link.reader.readexactly(size)
        if not hmac.compare_digest(tag, _frame_tag(link.receiving, number, data)):
            return
        number += 1
        writer.write(data)
        await writer.drain()


def _frame(key: bytes, number: int, data: bytes) -> bytes:
    length = len(data).to_bytes(_LENGTH_BYTES, "big")
    return length + _frame_tag(key, number, data) + data


def _frame_tag(key: bytes, number: int, data: bytes) -> bytes:
    return _tag(key, number.to_bytes(8, "big"), len(data).to_bytes(_LENGTH_BYTES, "big"), data)


def _tag(key: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"".join(parts), "sha256")
