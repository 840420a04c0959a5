"""The standard streams of the command line, however the shell has set them up.

stdout belongs to answers. A character that its encoding lacks is escaped, and never ends a run. An
error of stdout names stdout. Lines that libraries write there go to stderr. A stream that is closed
does not hand its descriptor to another file.
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any

from moespan import log
from moespan.errors import MoespanError


def prepare() -> None:
    """Open the streams that are closed, and make stdout escape and name its errors.

    stdin and stderr then read and write nothing, and stdout refuses the first line. A stdout that
    the program has replaced is left alone.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed; `open` takes the lowest free descriptor
            os.open(os.devnull, os.O_WRONLY if descriptor == 2 else os.O_RDONLY)
            os.set_inheritable(descriptor, True)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    log.keep_stdout_for_answers()  # before stdout is replaced here
    if type(sys.stdout) is not io.TextIOWrapper:
        return
    old = sys.stdout
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Stdout(old)),
        encoding=old.encoding,
        errors="backslashreplace",
        line_buffering=old.line_buffering,
        write_through=old.write_through,
    )


def finish() -> MoespanError | OSError | None:
    """Flush both streams, so that nothing fails at exit; → the error of stdout, if any."""
    failure = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (MoespanError, OSError) as error:
            failure = failure or (error if stream is sys.stdout else None)
            # Python flushes once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return failure


class _Stdout(io.FileIO):
    """The descriptor of stdout.

    Args:
        old: the stream that had the descriptor; kept, as the descriptor may be closed with it.
    """

    def __init__(self, old: io.TextIOWrapper) -> None:
        super().__init__(old.fileno(), "w", closefd=False)
        self._old = old

    def write(self, data: Any) -> int:
        """Write; waits where another program has made the descriptor non-blocking.

        Raises:
            BrokenPipeError: the reader is gone.
            MoespanError: stdout cannot be written, and why.
        """
        try:
            while (count := super().write(data)) is None:
                select.select([], [self], [])
        except BrokenPipeError:
            raise
        except OSError as error:
            raise MoespanError(f"stdout cannot be written: {error.strerror}") from None
        return count
