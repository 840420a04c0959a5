"""The authenticated connections between agents: who gets through, and what forgeries do."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from moespan.errors import MeetingError
from moespan.launch import tunnel
from moespan.launch.tunnel import Door, Gate, NotTheGateError, loopback_listener

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
PATIENCE_S = 30.0


class Echo:
    """A plain server behind the gate that sends back what it gets, and counts connections."""

    def __init__(self) -> None:
        self.listener = loopback_listener()
        self.connections = 0
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        address: tuple[str, int] = self.listener.getsockname()
        return address

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connected, _ = self.listener.accept()
                self.connections += 1
                threading.Thread(target=self._answer, args=[connected], daemon=True).start()

    def _answer(self, connected: socket.socket) -> None:
        with connected, contextlib.suppress(OSError):
            while data := connected.recv(65536):
                connected.sendall(data)


class Ends:
    """A gate with an echo behind it, and a door."""

    def __init__(self, door_key: bytes = KEY) -> None:
        self.echo = Echo()
        self.refused: list[str] = []
        self.listener = loopback_listener()
        self.point: tuple[str, int] = self.listener.getsockname()
        self.gate = Gate(self.listener, self.echo.address, KEY, self.refused.append)
        self.door = Door(self.point, door_key)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.door.address, PATIENCE_S)

    def close(self) -> None:
        self.door.close()
        self.gate.close()
        with contextlib.suppress(OSError):
            self.echo.listener.shutdown(socket.SHUT_RDWR)
        self.echo.listener.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    with contextlib.closing(Ends()) as both:
        yield both


def receive(sock: socket.socket, size: int) -> bytes:
    """`size` bytes, or fewer if the other end closes."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while len(found) < size and (data := sock.recv(size - len(found))):
            found += data
    return found


def test_bytes_get_through_in_both_directions(ends: Ends) -> None:
    ends.door.knock()
    data = os.urandom(3 << 20)
    with ends.connect() as sock:
        threading.Thread(target=sock.sendall, args=[data], daemon=True).start()
        assert receive(sock, len(data)) == data
        with ends.connect() as second:
            second.sendall(b"two")
            assert receive(second, 3) == b"two"
    assert ends.refused == []


def test_the_end_of_one_side_is_the_end_of_the_other(ends: Ends) -> None:
    with ends.connect() as sock:
        sock.sendall(b"one")
        assert receive(sock, 3) == b"one"
        ends.gate.close()
        assert receive(sock, 1) == b""


def test_a_store_works_through_the_door() -> None:
    inside = loopback_listener()
    timeout = timedelta(seconds=PATIENCE_S)
    host, port = inside.getsockname()
    store = TCPStore(
        host,
        port,
        is_master=True,
        master_listen_fd=inside.detach(),
        wait_for_workers=False,
        timeout=timeout,
    )
    listener = loopback_listener()
    point = listener.getsockname()
    with (
        contextlib.closing(Gate(listener, (host, port), KEY)),
        contextlib.closing(Door(point, KEY)) as door,
    ):
        through = TCPStore(*door.address, is_master=False, wait_for_workers=False, timeout=timeout)
        through.set("big", "x" * 200_000)
        assert store.get("big") == b"x" * 200_000
        assert [store.add("counter", 1), through.add("counter", 1)] == [1, 2]
        del through


def test_another_key_is_refused_on_both_sides_and_reaches_no_store() -> None:
    with contextlib.closing(Ends(OTHER_KEY)) as ends:
        for _ in range(2):
            with pytest.raises(MeetingError, match="another cluster key than this node"):
                ends.door.knock()
        with ends.connect() as sock:
            assert receive(sock, 1) == b""
        assert ends.refused == ["127.0.0.1"]  # shown once
        assert ends.echo.connections == 0


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x", b""])
def test_what_is_no_gate_is_named(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "_HANDSHAKE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as foreign:

        def serve() -> None:
            connected, _ = foreign.accept()
            kept.append(connected)
            connected.sendall(answer)

        kept: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        with (
            contextlib.closing(Door(foreign.getsockname(), KEY)) as door,
            pytest.raises(NotTheGateError),
        ):
            door.knock()
        for connected in kept:
            connected.close()


def test_a_gate_that_does_not_know_the_key_is_found_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as forger:

        def serve() -> None:
            connected, _ = forger.accept()
            kept.append(connected)
            connected.sendall(b"moespan1" + bytes(32))
            receive(connected, 64)
            connected.sendall(b"\1" + bytes(32))

        kept: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        with (
            contextlib.closing(Door(forger.getsockname(), KEY)) as door,
            pytest.raises(MeetingError, match="does not know the cluster key"),
        ):
            door.knock()
        for connected in kept:
            connected.close()


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\n",
        b"GET / HTTP/1.1\r\n\r\n" * 10,
        bytes(64),
        bytes(100_000),
        b"\xff" * 64,
        b'{"beat": 1, "ended": true}\n' * 5,
    ],
)
def test_strangers_reach_no_store_and_disturb_nobody(ends: Ends, said: bytes) -> None:
    with ends.connect() as sock:
        sock.sendall(b"one")
        assert receive(sock, 3) == b"one"
        with socket.create_connection(ends.point, PATIENCE_S) as stranger:
            with contextlib.suppress(ConnectionError):
                stranger.sendall(said)
                stranger.shutdown(socket.SHUT_WR)
            assert len(receive(stranger, 1000)) <= len(b"moespan1") + 32 + 1
        sock.sendall(b"two")
        assert receive(sock, 3) == b"two"
    assert ends.echo.connections == 1


class Between:
    """Passes a connection on to the gate, and may change what the door sends after its proof."""

    def __init__(self, gate: tuple[str, int], change: Callable[[bytes], bytes]) -> None:
        self.listener = loopback_listener()
        self._gate = gate
        self._change = change
        self.address: tuple[str, int] = self.listener.getsockname()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._thread.join(PATIENCE_S)

    def _serve(self) -> None:
        connected, _ = self.listener.accept()
        self.listener.close()
        with connected, socket.create_connection(self._gate) as gate, contextlib.suppress(OSError):
            connected.sendall(receive(gate, 40))
            gate.sendall(receive(connected, 64))
            connected.sendall(receive(gate, 33))
            back = threading.Thread(target=self._back, args=[gate, connected], daemon=True)
            back.start()
            while data := connected.recv(65536):
                gate.sendall(self._change(data))
            gate.shutdown(socket.SHUT_RDWR)
            back.join()

    def _back(self, gate: socket.socket, connected: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := gate.recv(65536):
                connected.sendall(data)
            connected.shutdown(socket.SHUT_RDWR)


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "arrives"),
    [
        (lambda data: data, [1000]),
        (lambda data: data + data, [0, 100]),  # replayed: only the first frame is right
        (flipped, [0]),
        (lambda data: b"\xff\xff\xff\xff" + data[4:], [0]),
        (lambda data: b"\0\0\0\0" + data[4:], [0]),
        (lambda data: data[:20] + flipped(data[20:30]) + data[30:], [0]),
    ],
)
def test_changed_or_repeated_frames_end_the_connection(
    ends: Ends, change: Callable[[bytes], bytes], arrives: list[int]
) -> None:
    with (
        contextlib.closing(Between(ends.point, change)) as between,
        contextlib.closing(Door(between.address, KEY)) as door,
        socket.create_connection(door.address, PATIENCE_S) as sock,
    ):
        found = b""
        for _ in range(10):
            with contextlib.suppress(OSError):
                sock.sendall(b"x" * 100)
            found += receive(sock, 100)
        assert len(found) in arrives
    ends.door.knock()  # others are not disturbed


def test_a_recorded_connection_cannot_be_played_again(ends: Ends) -> None:
    recorded: list[bytes] = []

    def record(data: bytes) -> bytes:
        recorded.append(data)
        return data

    with (
        contextlib.closing(Between(ends.point, record)) as between,
        contextlib.closing(Door(between.address, KEY)) as door,
        socket.create_connection(door.address, PATIENCE_S) as sock,
    ):
        sock.sendall(b"secret")
        assert receive(sock, 6) == b"secret"
    connections = ends.echo.connections
    with socket.create_connection(ends.point, PATIENCE_S) as stranger:
        receive(stranger, 40)
        # Its own nonce differs, so the old proof is not valid any more.
        stranger.sendall(bytes(64) + b"".join(recorded))
        assert receive(stranger, 1) == b"\0"
    assert ends.echo.connections == connections


def test_a_silent_stranger_is_let_go(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "_HANDSHAKE_S", 0.3)
    with socket.create_connection(ends.point, PATIENCE_S) as stranger:
        assert len(receive(stranger, 1000)) == 40


def test_closing_ends_all_threads(ends: Ends) -> None:
    socks = [ends.connect() for _ in range(20)]
    for number, sock in zip(itertools.count(), socks, strict=False):
        sock.sendall(b"%d" % (number % 10))
        assert receive(sock, 1)
    ends.door.close()
    ends.gate.close()
    ends.door.close()
    deadline = time.monotonic() + PATIENCE_S
    while any(thread.name == "moespan-tunnel" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for sock in socks:
        assert receive(sock, 1) == b""
        sock.close()


def test_closing_while_connections_end_leaves_no_connection_open() -> None:
    for _ in range(10):
        with contextlib.closing(Ends()) as ends, contextlib.ExitStack() as clients:
            for _ in range(20):
                sock = clients.enter_context(ends.connect())
                sock.sendall(b"x")
                assert receive(sock, 1) == b"x"
            ends.door.close()  # while the gate takes all connections apart
            ends.gate.close()
        gc.collect()  # warns of each connection that nobody closed, and a warning fails the test
