"""Reads files that others wrote: regular files only, and at most a given number of bytes.

A checkpoint from elsewhere may hold a FIFO, where a read waits without end, or a link to a device
that never ends. `open_regular` refuses both, and never waits. `read_bytes` counts the bytes that it
reads, because the size that the system reports may be wrong, and a file may grow.

All functions that read raise `OSError` for a file that cannot be read, and `ValueError` for its
contents. The caller knows what the file is, and names it. `write` names its file. Imports no torch.
"""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path
from typing import Any

from moespan.errors import MoespanError

MOST_JSON_BYTES = 4 << 20
"""Bytes of a JSON file of settings; the largest of a published model has a tenth."""

MOST_JSON_VALUES = 1 << 20
"""Values in such a file."""

_CHUNK_BYTES = 1 << 20

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(
    path: str | Path, *, folder: int | None = None, follow_links: bool = True
) -> io.FileIO:
    """Open a regular file to be read, unbuffered.

    Args:
        folder: descriptor of the folder that a relative `path` is in; None is the current one.
        follow_links: whether the file itself may be a symbolic link.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK  # a FIFO does not wait
    descriptor = os.open(path, flags | (0 if follow_links else os.O_NOFOLLOW), dir_fd=folder)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(f"it is {kind}, not a regular file")
    return io.FileIO(descriptor)


def read_bytes(path: str | Path, most_bytes: int) -> bytes:
    """The contents of a regular file.

    Raises:
        OSError: the file cannot be read, is not regular, or has more than `most_bytes`.
    """
    with open_regular(path) as file:
        return read_rest(file, most_bytes)


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8.

    Raises:
        MoespanError: the file cannot be written. The system's errors of a full disk name no file.
    """
    try:
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise MoespanError(f"{path} cannot be written: {error.strerror}") from None


def read_rest(file: io.FileIO, most_bytes: int) -> bytes:
    """The bytes of an open file from its position on.

    Raises:
        OSError: the file cannot be read, or has more than `most_bytes`.
    """
    chunks: list[bytes] = []
    left_bytes = most_bytes
    while chunk := file.read(_CHUNK_BYTES):
        left_bytes -= len(chunk)
        if left_bytes < 0:
            raise OSError(f"it has over {most_bytes} bytes, which no such file needs")
        chunks.append(chunk)
    return b"".join(chunks)


def read_json(
    path: str | Path, most_bytes: int = MOST_JSON_BYTES, most_values: int = MOST_JSON_VALUES
) -> Any:
    """The value that a JSON file holds.

    Raises:
        OSError: see `read_bytes`.
        ValueError: see `parse_json`.
    """
    return parse_json(read_bytes(path, most_bytes), most_values)


def parse_json(data: bytes, most_values: int = MOST_JSON_VALUES) -> Any:
    """The value that JSON in UTF-8 describes.

    Args:
        most_values: bound of the commas and opening brackets, and so of the memory for the value.

    Raises:
        ValueError: `data` is not JSON in UTF-8, or holds too many values, or values that are nested
            too deeply.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > most_values:
        raise ValueError(f"it holds over {most_values} values, which no such file needs")
    try:
        return json.loads(data.decode())
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:  # Python's limit of the digits that it converts
        raise ValueError("it holds an integer of too many digits") from None
