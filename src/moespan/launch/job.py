"""The private directory that front, agent and ranks of one job share, and the record of a failure.

The room for failures, Python stacks and beats is allocated before the ranks start, so that the
cause of an end is kept even if the disk is full by then.

The processes themselves are in `agent`, `ranks` and `rank`. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import TextIO

import msgspec

from moespan import errors
from moespan.config import EngineConfig, Nodes
from moespan.errors import ConfigError, EngineDeadError, MoespanError
from moespan.machine.binding import Binding
from moespan.parallel.beats import Beats, Place

STACK_SIGNAL = signal.SIGUSR1
"""Makes a rank write its Python stack to `Job.stack_path`, even inside foreign code."""

_LONGEST_DIRECTORY = 80  # characters; the path of a local socket ends at 107

_RECORD_BYTES = 32 << 10  # of a failure or a stack
_LENGTH_BYTES = 8
_CUT = "\n[...]\n"


def module_arguments(name: str) -> tuple[str, ...]:
    """Arguments with which Python runs a module of ours, as `-m` does.

    Nothing is imported from whatever directory the user stands in: Python 3.11 and newer obey
    PYTHONSAFEPATH, which the starter sets; for Python 3.10 a line of code does the same.
    """
    if sys.version_info >= (3, 11):
        return ("-m", name)
    return (
        "-c",
        "import sys; sys.path.pop(0); import runpy; "
        f"runpy.run_module({name!r}, run_name='__main__', alter_sys=True)",
    )


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a rank: the rank writes it, the agent picks the first one, the front raises it.

    Attributes:
        rank: the rank that failed; None if something else did.
        kind: name of the error's class; empty for a rank that died without a report.
        message: the error's own message, or the fate of the rank ("was killed by SIGKILL").
        traceback: stack of the error; empty for errors that are raised on purpose.
        lost_peer: the rank only noticed that another one had gone, or did not answer.
        time_ns: time of the failure, by the clock that all ranks of one node share.
        node: the node that failed, or has the rank, if the job has several.
    """

    rank: int | None
    kind: str
    message: str
    traceback: str = ""
    lost_peer: bool = False
    time_ns: int = 0
    node: str = ""

    def to_error(self, starting: bool) -> MoespanError:
        """The error for the front's caller; while starting, it has the class the rank raised."""
        own_class = getattr(errors, self.kind, None)
        if not (isinstance(own_class, type) and issubclass(own_class, MoespanError)):
            return EngineDeadError(f"{self._who} {self.message}\n{self.traceback}".strip())
        is_plain = not self.node and not self.rank
        message = self.message if is_plain else f"{self._who}: {self.message}"
        return (own_class if starting else EngineDeadError)(message)

    @property
    def _who(self) -> str:
        rank = "" if self.rank is None else f"rank {self.rank}"
        return ", ".join(filter(None, (self.node, rank)))


FRONT_DIED = Failure(rank=None, kind="", message="lost its front")


class Job:
    """The directory of one job and the files in it. Only its owner may enter it (0700)."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    @classmethod
    def create(cls, config: EngineConfig, nodes: Nodes) -> Job:
        """Make the directory, with the config and the nodes for the agent and the ranks."""
        ranks = nodes.ranks_per_node(config.layout)
        directory, parent = "", "TMPDIR"
        try:
            parent = tempfile.gettempdir()
            parent = parent if len(parent) <= _LONGEST_DIRECTORY else "/tmp"
            directory = tempfile.mkdtemp(prefix="moespan-", dir=parent)
            job = cls(directory)
            (job.directory / "config.json").write_bytes(msgspec.json.encode(config))
            (job.directory / "nodes.json").write_bytes(msgspec.json.encode(nodes))
            job._reserve(nodes.node_rank, ranks)
        except OSError as error:
            shutil.rmtree(directory, ignore_errors=True)
            raise ConfigError(
                f"the private folder of the job cannot be made in {parent}: {error.strerror}; set "
                "TMPDIR to a folder with room for some megabytes"
            ) from None
        return job

    def _reserve(self, node_rank: int, ranks: int) -> None:
        """Allocate the files of failures, stacks and beats."""
        mine = range(node_rank * ranks, (node_rank + 1) * ranks)
        sizes = {self._failure_path(rank): _RECORD_BYTES for rank in (None, *mine)}
        sizes |= {self.stack_path(rank): _RECORD_BYTES for rank in mine}
        sizes[self._beats_path] = Beats.size_bytes(ranks + 2)
        for path, size_bytes in sizes.items():
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size_bytes)
            finally:
                os.close(descriptor)

    def beats(self) -> Beats:
        """The beats of the ranks of this node, by local rank, then of the agent and the front."""
        return Beats(self._beats_path)

    def read_config(self) -> EngineConfig:
        """The config that the front wrote."""
        data = (self.directory / "config.json").read_bytes()
        return msgspec.json.decode(data, type=EngineConfig)

    def read_nodes(self) -> Nodes:
        """The nodes of the job, as the front wrote them."""
        return msgspec.json.decode((self.directory / "nodes.json").read_bytes(), type=Nodes)

    def write_over(self, reason: str) -> None:
        """Let the agent start no ranks, but tell the other nodes that the job is over."""
        (self.directory / "over.json").write_bytes(msgspec.json.encode(reason))

    def read_over(self) -> str | None:
        """What `write_over` wrote; None if the agent is to start ranks."""
        path = self.directory / "over.json"
        return msgspec.json.decode(path.read_bytes(), type=str) if path.exists() else None

    def write_places(self, places: list[Place]) -> None:
        """Write where the ranks of other nodes are; nothing, if the disk is full."""
        draft = self.directory / "places.draft"
        with contextlib.suppress(OSError):
            draft.write_bytes(msgspec.msgpack.encode(places))
            draft.rename(self.directory / "places")

    def read_places(self) -> list[Place]:
        """What the agent wrote last."""
        try:
            data = (self.directory / "places").read_bytes()
        except OSError:
            return []
        return msgspec.msgpack.decode(data, type=list[Place])

    def write_binding(self, binding: Binding) -> None:
        """Write the cores and memory of the ranks, before they start."""
        (self.directory / "binding.json").write_bytes(msgspec.json.encode(binding))

    def read_binding(self) -> Binding:
        """The binding that the agent wrote."""
        data = (self.directory / "binding.json").read_bytes()
        return msgspec.json.decode(data, type=Binding)

    @property
    def store_path(self) -> Path:
        """File of the store with which the ranks of one node find each other."""
        return self.directory / "store"

    def stack_path(self, rank: int) -> Path:
        """File for the Python stack of a rank that crashes or hangs inside foreign code."""
        return self.directory / f"stack-{rank}.txt"

    def open_stack(self, rank: int) -> TextIO:
        """The file at `stack_path`, to be written from its start."""
        return self.stack_path(rank).open("r+")

    def read_stack(self, rank: int) -> str:
        """The stacks that a rank has written; empty if it has not written any."""
        try:
            return self.stack_path(rank).read_bytes().rstrip(b"\0").decode(errors="replace")
        except FileNotFoundError:
            return ""

    def listen(self) -> socket.socket:
        """The front's end: a local socket in the directory, for one peer."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.directory / "front"))
        listener.listen(1)
        return listener

    def connect(self) -> socket.socket:
        """The leader's end of the front's socket."""
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connected.connect(str(self.directory / "front"))
        return connected

    def write_failure(self, failure: Failure, rank: int | None = None) -> None:
        """Write the end of `rank`, or of the whole job (None). Readers see all of it or nothing."""
        room = _RECORD_BYTES - _LENGTH_BYTES
        data = msgspec.json.encode(failure)
        longest = room // 4
        while len(data) > room:
            failure = msgspec.structs.replace(
                failure,
                message=_cut(failure.message, longest),
                traceback=_cut(failure.traceback, longest),
            )
            data = msgspec.json.encode(failure)
            longest //= 2
        descriptor = os.open(self._failure_path(rank), os.O_WRONLY)
        try:
            os.pwrite(descriptor, data, _LENGTH_BYTES)
            os.pwrite(descriptor, len(data).to_bytes(_LENGTH_BYTES, "little"), 0)
        finally:
            os.close(descriptor)

    def read_failure(self, rank: int | None = None) -> Failure | None:
        """The failure that ended `rank`, or the whole job (None), if one was written."""
        try:
            data = self._failure_path(rank).read_bytes()
        except FileNotFoundError:  # the whole directory has gone
            return None
        end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        found = data[_LENGTH_BYTES:end]
        return msgspec.json.decode(found, type=Failure) if found else None

    @property
    def _beats_path(self) -> Path:
        return self.directory / "beats"

    def _failure_path(self, rank: int | None) -> Path:
        return self.directory / ("failure" if rank is None else f"failure-{rank}")


def _cut(text: str, most: int) -> str:
    """The start and the end of a text that is too long: both name causes."""
    if len(text) <= most:
        return text
    return text[: most // 2] + _CUT + text[-most // 2 :]
