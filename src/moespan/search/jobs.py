"""Independent pieces of work on all cores, by forked processes that answer over pipes.

Nothing is pickled: answers are msgpack, and so is the text of a refusal. A child inherits what it
works on, so this must be called before threads exist. Imports no torch.
"""

from __future__ import annotations

import gc
import os
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from moespan.errors import ConfigError, MoespanError
from moespan.machine.cores import usable_cores

T = TypeVar("T")

_TOLD_EVERY_S, _READ_BYTES = 1.0, 1 << 20

_REFUSED = 2
"""Exit status of a child that answers with the text of a `ConfigError`."""


def run_all(
    work: Callable[[int], T],
    number: int,
    kind: Any,
    jobs: int | None = None,
    waiting: Callable[[], None] = lambda: None,
) -> list[T]:
    """`[work(0), ..., work(number - 1)]`, on `jobs` cores (None: on those that this process has).

    Args:
        kind: the type of an answer, which msgspec can encode.
        waiting: called before each piece of work here, or each second while others work.

    Raises:
        ConfigError: `work` raised it.
        MoespanError: a process died.
    """
    jobs = min(jobs or usable_cores(), number)
    if jobs <= 1:
        return [_here(work, index, waiting) for index in range(number)]
    children = [_fork(work, range(job, number, jobs)) for job in range(jobs)]
    answers: dict[int, T] = {}
    problems, refusals = [], []
    for pid, pipe in children:
        data = _read(pipe, waiting)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == _REFUSED:
            refusals.append(msgspec.msgpack.decode(data, type=str))
        elif code:
            problems.append(pid)
        else:
            answers |= msgspec.msgpack.decode(data, type=dict[int, kind])
    if problems:
        raise MoespanError("a process of the search died; its error is above")
    if refusals:
        raise ConfigError(refusals[0])
    return [answers[index] for index in range(number)]


def _here(work: Callable[[int], T], index: int, waiting: Callable[[], None]) -> T:
    waiting()
    return work(index)


def _read(pipe: int, waiting: Callable[[], None]) -> bytes:
    """All that a child sends until it closes the pipe."""
    data = bytearray()
    with os.fdopen(pipe, "rb", buffering=0) as reader:
        while True:
            while not select.select([reader], [], [], _TOLD_EVERY_S)[0]:
                waiting()
            part = reader.read(_READ_BYTES)
            if not part:
                return bytes(data)
            data += part


def _fork(work: Callable[[int], T], mine: Sequence[int]) -> tuple[int, int]:
    """A child that works on `mine`: its pid, and the pipe that it answers over."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Threads of numerical libraries exist, and no child uses them.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    status = 1
    try:
        gc.disable()  # a child is short-lived, and makes many objects without cycles
        os.close(reading)
        found, answer = _answer(work, mine)
        with os.fdopen(writing, "wb") as writer:
            writer.write(msgspec.msgpack.encode(answer))
        status = found
    except KeyboardInterrupt:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _answer(work: Callable[[int], T], mine: Sequence[int]) -> tuple[int, dict[int, T] | str]:
    """The exit status of a child, and what it sends: its answers, or why it refuses."""
    try:
        return 0, {index: work(index) for index in mine}
    except ConfigError as error:
        return _REFUSED, str(error)
