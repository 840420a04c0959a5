"""Hosts on one machine: network namespaces, joined by a virtual cable. Needs root and `ip`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_INTERFACE = "eth0"
# For documentation and tests only (RFC 5737): no network has it.
_NETWORK = "198.51.100"


class Host:
    """One namespace with one interface and one address.

    It has no name that could clash, and lasts as long as a process in it: first of all `cat`, which
    ends with this process.

    Attributes:
        address: where the other host reaches it.
    """

    def __init__(self, number: int) -> None:
        self.address = f"{_NETWORK}.{number + 1}"
        self.holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.holder.stdout is not None
        self.exists = self.holder.stdout.readline() == "\n"

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Run this Python with `arguments` on the host; its output comes through pipes."""
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [*self._enter, sys.executable, *arguments]
        return subprocess.Popen(command, text=True, **{**pipes, **options})

    def processes(self, part: str = "") -> list[int]:
        """Processes started on this host with `part` in their command line."""
        found = []
        own = Path(f"/proc/{self.holder.pid}/ns/net").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (
                    (process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                )
                if (process / "ns/net").readlink() == own and part in command:
                    found.append(int(process.name))
        return sorted(set(found) - {self.holder.pid})

    def listeners(self) -> set[str]:
        """Addresses on which anything on this host listens, without ports."""
        lines = self.run("ss", "-Hltn").splitlines()
        return {line.split()[3].rpartition(":")[0] for line in lines}

    def pull_cable(self) -> None:
        """Cut the link to the other host; no process of either gets a signal."""
        self.run("ip", "link", "set", _INTERFACE, "down")

    def plug_cable(self) -> None:
        """Join the link again."""
        self.run("ip", "link", "set", _INTERFACE, "up")

    def run(self, *command: str) -> str:
        """Run a command on this host; → its output."""
        return subprocess.run(
            [*self._enter, *command], check=True, capture_output=True, text=True, timeout=10
        ).stdout

    def remove(self) -> None:
        """Kill all processes on this host; the namespace ends with the last one."""
        with contextlib.suppress(OSError):
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.holder.communicate()

    @property
    def _enter(self) -> list[str]:
        return ["nsenter", "--target", str(self.holder.pid), "--net"]


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and nothing else; skips the test where that is forbidden."""
    for tool in ("ip", "unshare", "nsenter", "ss"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no `{tool}` to make network namespaces with")
    with contextlib.ExitStack() as cleanup:
        hosts = Host(0), Host(1)
        for host in hosts:
            cleanup.callback(host.remove)
        for host in hosts:
            if not host.exists:
                assert host.holder.stderr is not None
                reason = host.holder.stderr.read().strip()
                pytest.skip(f"network namespaces are not permitted here: {reason}")
        there = str(hosts[1].holder.pid)
        hosts[0].run(
            *("ip", "link", "add", _INTERFACE, "type", "veth"),
            *("peer", "name", _INTERFACE, "netns", there),
        )
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", _INTERFACE)
            for interface in ("lo", _INTERFACE):
                host.run("ip", "link", "set", interface, "up")
        yield hosts
