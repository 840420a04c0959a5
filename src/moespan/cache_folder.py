"""Moespan's own folder of files that can be made again: built kernels, packed weights.

Only files that this user or root wrote are used. The folder and all files in it are opened once,
without following links, and checked by descriptor: they must belong to this user or to root, and
nobody else may write them. Files get their names when they are complete.

The folder is `$MOESPAN_CACHE`, or `$XDG_CACHE_HOME/moespan`, or `~/.cache/moespan`; an empty
variable counts as not set. Imports no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from moespan.files import open_regular

_POLL_S = 0.05
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_Own = TypeVar("_Own", bound="CacheFolder")
_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class CacheError(Exception):
    """The folder or a file in it cannot be used; the text says why, and what would help."""


class LockedError(CacheError):
    """Another process holds a lock."""


def cache_path() -> Path:
    """The folder that the environment names.

    Raises:
        CacheError: it names none, and there is no home folder.
    """
    own = os.environ.get("MOESPAN_CACHE")
    if own:
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "moespan")
    except RuntimeError as error:
        raise CacheError(f"there is no home folder ({error}); set MOESPAN_CACHE") from None


class CacheFolder:
    """One folder; a context manager that holds its descriptor.

    Raises:
        CacheError: the folder cannot be made or opened, belongs to another user, or may be written
            by others.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.descriptor = os.open(path, _FOLDER_FLAGS)
        except OSError as error:
            raise self.unwritable(error) from None
        try:
            self._check(self.descriptor, path)
        except BaseException:
            self.close()
            raise

    def __enter__(self: _Own) -> _Own:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the folder's descriptor."""
        os.close(self.descriptor)

    def open(self, name: str) -> io.FileIO | None:
        """Open the file `name` to be read; None if it is missing.

        Raises:
            CacheError: it is no regular file, or another user owns it or could have written it.
        """
        path = self.path / name
        try:
            file = open_regular(name, folder=self.descriptor, follow_links=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CacheError(f"{path} cannot be used ({error}); delete it") from None
        try:
            self._check(file.fileno(), path)
        except BaseException:
            file.close()
            raise
        return file

    @contextlib.contextmanager
    def locked(self, name: str, timeout_s: float) -> Iterator[int]:
        """Hold the lock `name`, which one process has at a time. Its contents are left alone.

        Yields:
            The descriptor of the file.

        Raises:
            LockedError: another process holds the lock for longer than `timeout_s`.
            CacheError: the file cannot be made, or is not ours.
        """
        try:
            lock = os.open(name, _LOCK_FLAGS, 0o600, dir_fd=self.descriptor)
        except OSError as error:
            raise self.unwritable(error) from None
        try:
            self._check(lock, self.path / name)
            deadline = time.monotonic() + timeout_s
            while not try_lock(lock):
                if time.monotonic() >= deadline:
                    raise LockedError(
                        f"another process holds {self.path / name} for over {timeout_s:g} s; end it"
                    )
                time.sleep(_POLL_S)
            yield lock
        finally:
            os.close(lock)

    def names(self) -> list[str]:
        """Names of all files, sorted."""
        return sorted(os.listdir(self.descriptor))  # noqa: PTH208 (a descriptor has no Path)

    def holds(self, name: str, descriptor: int) -> bool:
        """Whether `name` is the name of the open file `descriptor`."""
        try:
            status = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(status, os.fstat(descriptor))

    def rename(self, old: str, new: str) -> None:
        """Give the file `old` the name `new`, in place of a file that has it."""
        os.rename(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def remove(self, name: str) -> None:
        """Remove the file `name`, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def unwritable(self, error: OSError) -> CacheError:
        """The error for a folder that cannot be written."""
        return CacheError(
            f"{self.path} cannot be written ({error}); set MOESPAN_CACHE to a folder of your own"
        )

    @staticmethod
    def _check(descriptor: int, path: Path) -> None:
        """Refuse a file or folder that another user owns or could have written."""
        status = os.fstat(descriptor)
        if status.st_uid not in (os.geteuid(), 0):
            fault = "belongs to another user"
        elif status.st_mode & _OTHERS_MAY_WRITE:
            fault = "may be written by others"
        else:
            return
        fix = "run `chmod go-w` on it" if stat.S_ISDIR(status.st_mode) else "delete it"
        raise CacheError(
            f"{path} {fault}, and nothing from it is used; {fix}, or set MOESPAN_CACHE to a "
            "folder of your own"
        )


def try_lock(descriptor: int) -> bool:
    """Lock an open file, unless another process has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
