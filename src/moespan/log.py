"""Messages to the user: the standard logger `moespan`, whose lines go to stderr.

stdout belongs to answers alone. Every part of the package speaks through `logger`, or through
`once` where a message might repeat.

Our own programs (the command line, the agent, the ranks) call `set_up`. It installs one handler on
stderr, and takes the level from its argument, else from `MOESPAN_LOG_LEVEL` (debug, info, warning,
error), else info. Processes that we start inherit the level: `level` is what they are told.

In a user's program the logger is the user's. Its level and handlers are left as they are, the root
logger is not touched, and `MOESPAN_LOG_LEVEL`, if it is set, becomes the level of the logger. Where
the program configures no logging at all, warnings and errors still reach stderr: the handler that
this module adds writes only while neither the root logger nor this one has another handler.

A line is `moespan: message`. In a job of several ranks it names the rank, and on several nodes the
node: `moespan: node 1, rank 3: message`. A message of `once` that holds for all ranks names none.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

from moespan.errors import ConfigError

LEVEL_VARIABLE = "MOESPAN_LOG_LEVEL"
_OLD_LEVEL_VARIABLE = "MOESPAN_LOG"  # read for one more release

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

logger = logging.getLogger("moespan")

_said: set[str] = set()


def set_up(level: str | None = None) -> None:
    """Make this process one of our own: lines from `level` on go to stderr, and nowhere else.

    Calling it again replaces the level.

    Args:
        level: a key of `LEVELS`; None for what the environment says, else info.

    Raises:
        ConfigError: there is no such level.
    """
    if level is not None and level not in LEVELS:
        raise ConfigError(f"log level {level!r} is not known; use one of {', '.join(LEVELS)}")
    _install(_Stderr(yields=False))
    logger.propagate = False  # a library that configures the root logger must not double our lines
    logger.setLevel(LEVELS[level or _level_in_environment() or "info"])


def level() -> str:
    """The level of the processes that this one starts: its own if one was chosen, else info."""
    own = logger.level or logging.INFO
    return next((name for name, value in LEVELS.items() if own <= value), "error")


def once(message: str, from_any_rank: bool = False) -> None:
    """Warn, but show the same message only once in this process.

    Without `from_any_rank` the message holds for every rank, and only rank 0 shows it.
    """
    if message not in _said and (from_any_rank or os.environ.get("RANK", "0") == "0"):
        logger.warning(message, stacklevel=2, extra={"holds_for_all_ranks": not from_any_rank})
    _said.add(message)


def keep_stdout_for_answers() -> None:
    """Let what libraries write to descriptor 1 go to stderr; `sys.stdout` still reaches stdout.

    C++ code writes to the descriptor: Gloo of torch 2.9 reports its connections there, between the
    answers. Nothing changes where `sys.stdout` was replaced, or where descriptor 1 or 2 is closed.
    """
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper) or out is not sys.__stdout__:
        return
    try:
        if out.fileno() != 1 or stderr_descriptor() != 2:
            return
        own = os.dup(1)
    except (OSError, ValueError):  # closed
        return
    out.flush()
    os.dup2(2, 1)
    sys.stdout = io.TextIOWrapper(
        os.fdopen(own, "wb"),  # open until the process ends
        encoding=out.encoding,
        errors=out.errors,
        line_buffering=out.line_buffering,
        write_through=out.write_through,
    )


@contextlib.contextmanager
def mute(*descriptors: int) -> Iterator[None]:
    """Drop what libraries write to `descriptors` (1, 2) meanwhile, unless the level is debug.

    For a call whose noise is known, and for no longer: answers to NCCL_DEBUG and its like are
    written there, too.
    """
    with contextlib.ExitStack() as stack:
        if level() != "debug":
            for descriptor in descriptors:
                stack.enter_context(_muted(descriptor))
        yield


@contextlib.contextmanager
def _muted(descriptor: int) -> Iterator[None]:
    try:
        own = os.dup(descriptor)
    except OSError:  # closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(own, descriptor)
        os.close(own)


def stderr_descriptor() -> int:
    """Where a child process is to send its stdout: descriptor 2, or nowhere if that is closed."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2


class _Stderr(logging.Handler):
    """Writes each line at once, so that none is lost when the process ends by `os._exit`.

    It writes to what `sys.stderr` is at that time. A handler that yields writes nothing while the
    user's program has a handler of its own for these lines.
    """

    def __init__(self, yields: bool) -> None:
        super().__init__()
        self._yields = yields

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is None or (self._yields and _has_other_handlers()):
            return
        try:
            sys.stderr.write(f"moespan: {_speaker(record)}{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _has_other_handlers() -> bool:
    others = [*logging.getLogger().handlers, *logger.handlers]
    return any(not isinstance(handler, _Stderr) for handler in others)


def _speaker(record: logging.LogRecord) -> str:
    """The node and rank of this process as torch's launcher numbers them, if there are several."""
    rank, num_ranks, node, num_nodes = (
        os.environ.get(name, "")
        for name in ("RANK", "WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
    )
    if not rank or num_ranks in ("", "1") or getattr(record, "holds_for_all_ranks", False):
        return ""
    return f"rank {rank}: " if num_nodes in ("", "1") else f"node {node}, rank {rank}: "


def _level_in_environment() -> str | None:
    for variable in (LEVEL_VARIABLE, _OLD_LEVEL_VARIABLE):
        value = os.environ.get(variable, "").lower()
        if value in LEVELS:
            if variable == _OLD_LEVEL_VARIABLE:
                once(f"{variable} is now {LEVEL_VARIABLE}; the next release ignores the old name")
            return value
        if value and variable == LEVEL_VARIABLE:
            once(
                f"{variable}={value!r} is not a level, and is ignored; use one of "
                f"{', '.join(LEVELS)}"
            )
    return None


def _install(handler: _Stderr) -> None:
    """Put `handler` in place of the one that this module has installed before."""
    for old in logger.handlers[:]:
        if isinstance(old, _Stderr):
            logger.removeHandler(old)
    logger.addHandler(handler)


_install(_Stderr(yields=True))
if (_name := _level_in_environment()) is not None:
    logger.setLevel(LEVELS[_name])
