"""Messages to the user: the standard logger `moespan`, whose lines go to stderr.

stdout is for answers only. The whole package logs through `logger`, and through `once` where a
message might repeat.

Our own programs (the command line, the agent, the ranks) call `set_up`. It installs one handler on
stderr and sets the level: its argument, else `MOESPAN_LOG_LEVEL` (debug, info, warning, error),
else info. The agent and the ranks inherit the level through that variable.

In a user's program the user configures logging. The root logger is not touched, and the logger
`moespan` gets a level only if `MOESPAN_LOG_LEVEL` is set. A program that configures no logging
still sees warnings and errors on stderr: the handler that this module adds writes only while
neither the root logger nor `moespan` has another handler.

A line is `moespan: message`. In a job of several ranks it names the rank, and on several nodes also
the node: `moespan: node 1, rank 3: message`. A message that holds for all ranks names none. Control
characters of a message, which may quote a file, are escaped.

With the format `json` (an argument of `set_up`, else `MOESPAN_LOG_FORMAT`) a line is an object with
`time` (UTC), `level` and `message`; `node` and `rank` in a job of several; and the fields that the
caller gives: `logger.info("...", extra={"fields": {...}})`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone

from moespan.errors import ConfigError, printable

LEVEL_VARIABLE = "MOESPAN_LOG_LEVEL"
_OLD_LEVEL_VARIABLE = "MOESPAN_LOG"  # read for one more release

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

FORMAT_VARIABLE = "MOESPAN_LOG_FORMAT"
FORMATS = ("text", "json")

logger = logging.getLogger("moespan")

_said: set[str] = set()


def set_up(level: str | None = None, form: str | None = None) -> None:
    """Send messages of `level` and above to stderr, and nowhere else; for our own programs.

    Another call replaces the level and the format.

    Args:
        level: a key of `LEVELS`; None for the level in the environment, else info.
        form: one of `FORMATS`; None for the format in the environment, else text.

    Raises:
        ConfigError: there is no such level or format.
    """
    if level is not None and level not in LEVELS:
        raise ConfigError(f"log level {level!r} is not known; use one of {', '.join(LEVELS)}")
    if form is not None and form not in FORMATS:
        raise ConfigError(f"log format {form!r} is not known; use one of {', '.join(FORMATS)}")
    _install(_Stderr(yields=False, is_json=(form or os.environ.get(FORMAT_VARIABLE)) == "json"))
    logger.propagate = False  # a library that configures the root logger must not double our lines
    logger.setLevel(LEVELS[level or _level_in_environment() or "info"])


def level() -> str:
    """The level for processes that this one starts: its own level if one was set, else info."""
    own = logger.level or logging.INFO
    return next((name for name, value in LEVELS.items() if own <= value), "error")


def variables() -> dict[str, str]:
    """The environment variables that give a child process the level and format of this one."""
    is_json = any(isinstance(one, _Stderr) and one.is_json for one in logger.handlers)
    return {LEVEL_VARIABLE: level(), FORMAT_VARIABLE: "json" if is_json else "text"}


def once(message: str, from_any_rank: bool = False) -> None:
    """Warn, but only the first time that this process has this message.

    Only rank 0 shows the message, for all ranks; with `from_any_rank` each rank shows its own.
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
    """Writes and flushes each line to the current `sys.stderr`, so that `os._exit` loses none.

    A handler that yields writes nothing while the user's program has another handler for the line.
    """

    def __init__(self, yields: bool, is_json: bool = False) -> None:
        super().__init__()
        self._yields = yields
        self.is_json = is_json

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is None or (self._yields and _has_other_handlers()):
            return
        try:
            text = printable(self.format(record))
            line = (
                _json_line(record, text) if self.is_json else f"moespan: {_speaker(record)}{text}"
            )
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _has_other_handlers() -> bool:
    others = [*logging.getLogger().handlers, *logger.handlers]
    return any(not isinstance(handler, _Stderr) for handler in others)


def _speaker(record: logging.LogRecord) -> str:
    """The node and rank of this process in words; empty for a single rank."""
    words = ", ".join(f"{name} {number}" for name, number in _numbers(record).items())
    return f"{words}: " if words else ""


def _numbers(record: logging.LogRecord) -> dict[str, str]:
    """The node and rank of this process, numbered by torch's launcher, if there are several."""
    rank, num_ranks, node, num_nodes = (
        os.environ.get(name, "")
        for name in ("RANK", "WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
    )
    if not rank or num_ranks in ("", "1") or getattr(record, "holds_for_all_ranks", False):
        return {}
    return {"rank": rank} if num_nodes in ("", "1") else {"node": node, "rank": rank}


def _json_line(record: logging.LogRecord, text: str) -> str:
    time = datetime.fromtimestamp(record.created, timezone.utc)
    line = {
        "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "message": text,
        **{name: int(number) for name, number in _numbers(record).items()},
        **getattr(record, "fields", {}),
    }
    return json.dumps(line, default=str)


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
    """Replace the handler that this module installed earlier by `handler`."""
    for old in logger.handlers[:]:
        if isinstance(old, _Stderr):
            logger.removeHandler(old)
    logger.addHandler(handler)


_install(_Stderr(yields=True))
if (_name := _level_in_environment()) is not None:
    logger.setLevel(LEVELS[_name])
