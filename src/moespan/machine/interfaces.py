"""Network interfaces and addresses of this machine, and which of them lead to a host. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import socket
from collections.abc import Sequence

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
"""Variable with the interfaces that Gloo takes: names, with commas between them."""


class _IfAddrs(ctypes.Structure):
    """The head of libc's `struct ifaddrs`; the rest is not needed."""


_IfAddrs._fields_ = [
    ("next", ctypes.POINTER(_IfAddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]

# Family → offset of the address in its `struct sockaddr`, and size of the address, in bytes.
_ADDRESS_AT = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}


def interfaces() -> list[tuple[str, str]]:
    """Every address of this machine, IPv4 and IPv6, with the name of its interface before it."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = ctypes.POINTER(_IfAddrs)()
    if libc.getifaddrs(ctypes.byref(head)):
        raise OSError(ctypes.get_errno(), "getifaddrs failed")
    found = []
    entry = head
    while entry:
        if entry.contents.address:
            raw = entry.contents.address
            family = ctypes.c_ushort.from_address(raw).value
            if family in _ADDRESS_AT:
                start, size = _ADDRESS_AT[socket.AddressFamily(family)]
                data = ctypes.string_at(raw + start, size)
                found.append((entry.contents.name.decode(), str(ipaddress.ip_address(data))))
        entry = entry.contents.next
    libc.freeifaddrs(head)
    return found


def interface_of(address: str) -> str | None:
    """The interface that has `address`, or None. All of 127.0.0.0/8 is `lo`."""
    wanted = ipaddress.ip_address(address.partition("%")[0])
    for name, found in interfaces():
        if ipaddress.ip_address(found) == wanted:
            return name
    return "lo" if wanted.is_loopback else None


def wrong_interface(value: str, found: Sequence[tuple[str, str]]) -> str:
    """The fault of a value of `GLOO_SOCKET_IFNAME`; empty if it has none.

    Args:
        found: the addresses of this machine, as `interfaces` returns them.
    """
    if len(value) <= 1:  # torch ignores these
        return ""
    known = list(dict.fromkeys(name for name, _ in found))
    unknown = [name for name in value.split(",") if name not in known]
    if not unknown:
        return ""
    plain = "" if value.isascii() and value[0].isalnum() else ", and Gloo takes plain names only"
    return (
        f"{GLOO_INTERFACE}={value[:80]!r} names {unknown[0][:40]!r}, which no interface with an "
        f"address is called{plain}; this machine has {', '.join(known) or 'none'}"
    )


def address_towards(host: str) -> str | None:
    """This machine's address on the route to `host`; None if there is no route."""
    with contextlib.suppress(OSError):
        family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as unconnected:
            unconnected.connect(target)  # sends nothing: the kernel only looks up the route
            return str(unconnected.getsockname()[0])
    return None


def interface_towards(host: str) -> str | None:
    """The interface on the route to `host`; None if there is no route."""
    address = address_towards(host)
    return None if address is None else interface_of(address)
