"""The private directory that front, agent and ranks of one job share, and the word for its end.

It holds no running code: who starts and watches whom is in `agent`, `client` and `rank`.
Imports no torch.
"""

from __future__ import annotations

import signal
import socket
import sys
import tempfile
from pathlib import Path

import msgspec

from moespan import errors
from moespan.config import EngineConfig, Nodes
from moespan.errors import EngineDeadError, MoespanError
from moespan.machine.binding import Binding

STACK_SIGNAL = signal.SIGUSR1
"""Makes a rank write its Python stack to `Job.stack_path`, whatever it is in."""

_LONGEST_DIRECTORY = 80  # characters; the path of a local socket ends at 107


def run_module(name: str) -> tuple[str, ...]:
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
    """What ended a rank: the rank writes it, the agent picks the first one, the front raises it.

    Attributes:
        rank: None if it was not a rank that failed.
        kind: name of the error's class; empty for a rank that died without a word.
        message: the error's own message, or what became of the rank ("was killed by SIGKILL").
        traceback: where; empty for errors that are raised on purpose.
        lost_peer: the rank only noticed that another one had gone, or did not answer.
        time_ns: when, by the clock that all ranks of one node share.
        node: whose rank it was, or who failed, if the job has many nodes.
    """

    rank: int | None
    kind: str
    message: str
    traceback: str = ""
    lost_peer: bool = False
    time_ns: int = 0
    node: str = ""

    def to_error(self, starting: bool) -> MoespanError:
        """The error for the front's caller: while starting, of the very class the rank raised."""
        own_class = getattr(errors, self.kind, None)
        if not (isinstance(own_class, type) and issubclass(own_class, MoespanError)):
            return EngineDeadError(f"{self._who} {self.message}\n{self.traceback}".rstrip())
        is_plain = not self.node and not self.rank
        message = self.message if is_plain else f"{self._who}: {self.message}"
        return (own_class if starting else EngineDeadError)(message)

    @property
    def _who(self) -> str:
        rank = "" if self.rank is None else f"rank {self.rank}"
        return ", ".join(filter(None, (self.node, rank)))


class Job:
    """Names and files inside the directory of one job, which only its owner may enter (0700)."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    @classmethod
    def create(cls, config: EngineConfig, nodes: Nodes) -> Job:
        """Make the directory and leave in it what the agent and the ranks need to know."""
        parent = tempfile.gettempdir()
        job = cls(
            tempfile.mkdtemp(
                prefix="moespan-", dir=parent if len(parent) <= _LONGEST_DIRECTORY else "/tmp"
            )
        )
        (job.directory / "config.json").write_bytes(msgspec.json.encode(config))
        (job.directory / "nodes.json").write_bytes(msgspec.json.encode(nodes))
        return job

    def read_config(self) -> EngineConfig:
        """The config that the front left."""
        data = (self.directory / "config.json").read_bytes()
        return msgspec.json.decode(data, type=EngineConfig)

    def read_nodes(self) -> Nodes:
        """The nodes of the job, as the front left them."""
        return msgspec.json.decode((self.directory / "nodes.json").read_bytes(), type=Nodes)

    def write_binding(self, binding: Binding) -> None:
        """Leave the binding to cores and memory for the ranks, before they start."""
        (self.directory / "binding.json").write_bytes(msgspec.json.encode(binding))

    def read_binding(self) -> Binding:
        """The binding that the agent left."""
        data = (self.directory / "binding.json").read_bytes()
        return msgspec.json.decode(data, type=Binding)

    @property
    def store_path(self) -> Path:
        """File through which the ranks of one node find each other."""
        return self.directory / "store"

    def stack_path(self, rank: int) -> Path:
        """File for the Python stack of a rank that crashes or hangs inside foreign code."""
        return self.directory / f"stack-{rank}.txt"

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
        """Leave word of what ended `rank`, or (None) the whole job. Readers see all or nothing."""
        path = self._failure_path(rank)
        draft = path.with_suffix(".draft")
        draft.write_bytes(msgspec.json.encode(failure))
        draft.rename(path)

    def read_failure(self, rank: int | None = None) -> Failure | None:
        """What ended `rank`, or (None) the whole job, if it left word."""
        try:
            return msgspec.json.decode(self._failure_path(rank).read_bytes(), type=Failure)
        except FileNotFoundError:
            return None

    def _failure_path(self, rank: int | None) -> Path:
        return self.directory / ("failure.json" if rank is None else f"failure-{rank}.json")
