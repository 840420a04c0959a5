"""This machine's network addresses, and the one that leads to a host. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915
_NAME_BYTES = 15


def interfaces() -> list[tuple[str, str]]:
    """Name and IPv4 address of every interface that has one."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:_NAME_BYTES])
            with contextlib.suppress(OSError):  # it has no address
                answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, request)
                found.append((name, socket.inet_ntoa(answer[20:24])))
    return found


def address_towards(host: str) -> str | None:
    """This machine's own address on the way to `host`; None if there is no way."""
    with contextlib.suppress(OSError):
        family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as unconnected:
            unconnected.connect(target)  # sends nothing: the kernel only looks up the way
            return str(unconnected.getsockname()[0])
    return None
