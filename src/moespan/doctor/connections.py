"""Checks of the host's network: ports, and the address that leads to the other nodes."""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from collections.abc import Iterator

from moespan.doctor.host import Host
from moespan.doctor.job_spec import JobSpec
from moespan.doctor.report import Finding, ok, problem, skipped, warning
from moespan.machine.interfaces import address_towards
from moespan.machine.topology import format_list, parse_list

_BASE_PORT, _NUM_PORTS = 60000, 32
_CONNECT_S = 3.0


def ports(host: Host, job: JobSpec) -> Iterator[Finding]:
    if job.device == "npu":
        yield from _hccl_ports(host)
    if job.nodes.nnodes > 1:
        yield _master_port(job)
    elif job.device != "npu":
        yield ok("one node, no NPUs: ranks meet through a file and the loopback interface")


def interfaces(host: Host, job: JobSpec) -> Iterator[Finding]:
    outward = [
        (name, address)
        for name, address in host.interfaces
        if name != "lo" and not address.startswith("fe80")  # every card has a link-local address
    ]
    words = ", ".join(f"{name} {address}" for name, address in outward) or "none but lo"
    if job.nodes.nnodes == 1:
        yield ok(f"one node; addresses here: {words}")
        return
    master = job.nodes.master_addr
    own = master if job.nodes.node_rank == 0 else address_towards(master)
    if own is None:
        yield problem(
            f"no route from here to --master-addr {master}; addresses here: {words}",
            "give an address of node 0 on a network that both nodes are on",
        )
        return
    name = next((name for name, address in host.interfaces if address == own), None)
    if name == "lo" or _is_loopback(own):
        yield problem(
            f"--master-addr {master} is this machine itself",
            "give an address of node 0 that the other nodes can reach",
        )
    elif name is None:
        yield skipped(f"{own} leads to {master}; its interface is not known")
    else:
        first = sorted(name for name, _ in outward if not name.startswith("docker"))[0]
        note = "" if name == first else f"; by default HCCL would take {first}"
        yield ok(f"{name} {own} leads to the other nodes{note}; addresses here: {words}")


def _hccl_ports(host: Host) -> Iterator[Finding]:
    text = host.environ.get("HCCL_IF_BASE_PORT", str(_BASE_PORT))
    if not text.isdigit() or not 1024 <= int(text) <= 65535 - _NUM_PORTS:
        yield problem(
            f"HCCL_IF_BASE_PORT={text} is not a port with {_NUM_PORTS - 1} more above it",
            "unset it",
        )
        return
    first = int(text)
    last = first + _NUM_PORTS - 1
    taken = [port for port in range(first, last + 1) if not is_free(port)]
    if taken:
        yield problem(
            f"HCCL's ports {first}-{last}: {format_list(taken)} in use",
            "end the process that listens there (ss -ltnp), or set HCCL_IF_BASE_PORT to the same "
            "other port on all nodes",
        )
        return
    ephemeral = [int(part) for part in host.read("/proc/sys/net/ipv4/ip_local_port_range").split()]
    reserved = set(parse_list(host.read("/proc/sys/net/ipv4/ip_local_reserved_ports")))
    exposed = len(ephemeral) == 2 and any(
        ephemeral[0] <= port <= ephemeral[1] and port not in reserved
        for port in range(first, last + 1)
    )
    if exposed:
        yield warning(
            f"HCCL's ports {first}-{last} are free, but the kernel may give them to any connection",
            f"sysctl -w net.ipv4.ip_local_reserved_ports={first}-{last}",
        )
    else:
        yield ok(f"HCCL's ports {first}-{last} are free")


def _master_port(job: JobSpec) -> Finding:
    point = job.nodes.meeting_point
    if job.nodes.node_rank == 0:
        reason = _why_not_bound(job.nodes.master_addr, job.nodes.master_port)
        if reason is None:
            return ok(f"{point} is free for the nodes to meet")
        if reason == errno.EADDRINUSE:
            return problem(
                f"{point} is in use", "end the process that listens there, or use --master-port"
            )
        return problem(
            f"this node cannot listen at {point}: {errno.errorcode.get(reason, reason)}",
            "--master-addr must be an address of node 0",
        )
    started = time.monotonic()
    try:
        socket.create_connection((job.nodes.master_addr, job.nodes.master_port), _CONNECT_S).close()
        return ok(f"node 0 answers at {point} within {(time.monotonic() - started) * 1e3:.1f} ms")
    except ConnectionRefusedError:
        return ok(f"the machine of node 0 answers at {point}; no job is started there yet")
    except OSError as error:
        return problem(
            f"{point} cannot be reached: {error.strerror or error}",
            "check the address, the route and the firewall between the nodes",
        )


def is_free(port: int) -> bool:
    """Whether a program of this user could listen at `port` on every address."""
    return _why_not_bound("", port) is None


def _why_not_bound(address: str, port: int) -> int | None:
    try:
        family = socket.getaddrinfo(address or "0.0.0.0", port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            # The job's listener does the same; it does not take the port from another listener.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen()
        return None
    except OSError as error:
        return error.errno or errno.EADDRNOTAVAIL


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
