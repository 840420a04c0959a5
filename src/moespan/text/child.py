"""A child process that answers lines of JSON, for work that others wrote, with limits.

The kernel enforces the limits: an alarm ends the child, RLIMIT_AS bounds its memory, and with
RLIMIT_NOFILE at 0 it can open neither a file nor a socket. A crash of the child harms nothing else.
The child imports the module of its work, so that module imports little.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import subprocess


_SILENCE_SECONDS: Final = 10.0  # for a child that is stopped, whose alarm waits with it


class Child:
    """The parent's handle on the process, which ends with this object.

    Args:
        module: its function `answer_in_child` gets the set-up, imports what it needs, and returns
            the function that answers requests.
        seconds: most seconds for one answer.
        memory_bytes: most memory beyond what the child maps when it is ready.
        most_reply_bytes: length of the longest answer as JSON.

    Raises:
        OSError: the process cannot be started, or cannot be set up.
    """

    def __init__(
        self,
        module: str,
        set_up: dict[str, Any],
        *,
        seconds: float,
        memory_bytes: int,
        most_reply_bytes: int,
    ) -> None:
        import subprocess

        # The child gets this process's search path, so that it finds the same modules. From the
        # environment it gets only what the interpreter and its clock need: no keys or tokens, no
        # preloaded libraries.
        path = [str(Path(__file__).resolve().parents[2]), *map(str, sys.path)]
        kept = ("LD_LIBRARY_PATH", "TZ")
        self._seconds = seconds
        self._most_reply_bytes = most_reply_bytes
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, module, *path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in kept if name in os.environ},
        )
        self._end = weakref.finalize(self, _end_process, self._process)
        reply = self.ask({"seconds": seconds, "memory_bytes": memory_bytes, **set_up})
        if reply:
            raise OSError(reply["fault"])

    @property
    def is_usable(self) -> bool:
        """Whether the child still runs. In a fork of this process it counts as ended."""
        return self._process.poll() is None

    def ask(self, request: object) -> dict[str, str]:
        """Sends a request and returns the reply to it. After a broken limit the child is unusable.

        The reply has one item: what `answer_in_child` says, or "fault".
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        deadline = threading.Timer(_SILENCE_SECONDS, self._process.kill)
        deadline.daemon = True
        deadline.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # then there is no reply either
                self._process.stdin.write(as_line(request))
                self._process.stdin.flush()
            line = self._process.stdout.readline(self._most_reply_bytes)
            reply: dict[str, str] = json.loads(line) if line.endswith(b"\n") else {"limit": ""}
        except BaseException:
            self._end()  # otherwise the late reply would answer the next request
            raise
        finally:
            deadline.cancel()
        if "limit" not in reply:
            return reply
        status = self._end()
        if status == -signal.SIGALRM:
            return {"fault": f"it takes longer than {self._seconds} s"}
        return {"fault": reply["limit"] or f"the process that works on it ended, status {status}"}


def as_line(value: object) -> bytes:
    """`value` as a line of JSON."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _end_process(process: subprocess.Popen[bytes]) -> int:
    """Ends the process if it still runs; returns its exit status."""
    process.kill()
    status = process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # unsent data cannot be flushed
            pipe.close()  # type: ignore[union-attr]
    return status


# The rest of this module runs in the child.
_PROGRAM: Final = (
    "import importlib, sys; module = sys.argv[1]; sys.path[:] = sys.argv[2:]; "
    "from moespan.text.child import serve; serve(importlib.import_module(module).answer_in_child)"
)

Answer = Callable[[Any], dict[str, str]]


def serve(answer_in_child: Callable[[dict[str, Any]], Answer]) -> None:
    """Sets itself up, reports that it is ready, and answers requests until the last.

    An answer may raise `MemoryError`, and `OverflowError` for another limit.
    """
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    set_up = json.loads(requests.readline())
    answer = answer_in_child(set_up)
    _limit_this_process(set_up["memory_bytes"])
    reply = as_line({})
    while True:
        replies.write(reply)
        replies.flush()
        request = requests.readline()
        if not request:
            return
        signal.setitimer(signal.ITIMER_REAL, set_up["seconds"])
        try:
            reply = as_line(answer(json.loads(request)))
        except MemoryError:
            reply = as_line({"limit": f"it needs over {set_up['memory_bytes'] >> 20} MiB"})
        except OverflowError as error:
            reply = as_line({"limit": str(error).rstrip(".")})
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_this_process(memory_bytes: int) -> None:
    """Limits this process to `memory_bytes` beyond what it maps now, to no new files, and to the
    time of its alarm."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    mapped_pages = int(Path("/proc/self/statm").read_text().split()[0])
    for limit, value in (
        (resource.RLIMIT_AS, mapped_pages * resource.getpagesize() + memory_bytes),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        ceiling = resource.getrlimit(limit)[1]
        value = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        resource.setrlimit(limit, (value, value))
