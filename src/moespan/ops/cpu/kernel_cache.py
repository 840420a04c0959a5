"""The folder that keeps built kernels: only code that this user or root wrote is ever loaded.

The folder and all files in it are opened once, without following links, and checked by descriptor:
they must belong to this user or to root, and nobody else may write them. The library is loaded by
its descriptor too, so that nobody can exchange the file between check and load.

A library file ends with the SHA-256 of all bytes before it, which the system's loader ignores. A
file without its right checksum was cut or damaged: it counts as missing and is built again, because
a process that maps a cut library is killed by SIGBUS. Files get their names when they are complete.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from moespan.errors import shortened
from moespan.files import open_regular, read_rest

_MOST_BYTES = 256 << 20
_DIGEST_BYTES = hashlib.sha256().digest_size
_POLL_S = 0.05
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

# Checksum → the library of this process. The system's loader knows a library by its path, here
# /proc/self/fd/N. The descriptors therefore stay open, so that no other file gets the same N.
_loaded: dict[bytes, ctypes.CDLL] = {}


class BuildError(Exception):
    """The kernels cannot be built or loaded here; the text says why, and what would help."""


class KernelCache:
    """One folder of libraries; a context manager that holds its descriptor.

    Raises:
        BuildError: the folder cannot be made or opened, belongs to another user, may be written by
            others, or is on a file system from which nothing may be run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder = os.open(path, _FOLDER_FLAGS)
        except OSError as error:
            raise BuildError(
                f"{path} cannot be written ({error}); set MOESPAN_CACHE to a folder of your own"
            ) from None
        try:
            self._check(self._folder, path)
            if os.fstatvfs(self._folder).f_flag & os.ST_NOEXEC:
                raise BuildError(
                    f"{path} is on a file system that is mounted noexec, and libraries cannot be "
                    "loaded from it; set MOESPAN_CACHE to a folder where programs may run"
                )
        except BaseException:
            os.close(self._folder)
            raise

    def __enter__(self) -> KernelCache:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._folder)

    def load(self, name: str) -> ctypes.CDLL | None:
        """Load the library `name`; None if it is missing or damaged.

        Raises:
            BuildError: another user owns the file or could have written it, or the system's loader
                refuses it.
        """
        path = self.path / name
        try:
            file = open_regular(name, folder=self._folder, follow_links=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BuildError(f"{path} cannot be used ({error}); delete it") from None
        with file:
            self._check(file.fileno(), path)
            try:
                data = read_rest(file, _MOST_BYTES)
            except OSError as error:
                raise BuildError(f"{path} cannot be read ({error}); delete it") from None
            digest = data[-_DIGEST_BYTES:]
            if hashlib.sha256(data[:-_DIGEST_BYTES]).digest() != digest:
                return None
            if digest not in _loaded:
                kept = os.dup(file.fileno())
                try:
                    _loaded[digest] = ctypes.CDLL(f"/proc/self/fd/{kept}")
                except OSError as error:
                    os.close(kept)
                    raise BuildError(
                        f"{path} does not load ({shortened(error, 200)}); set CXX to another "
                        "compiler"
                    ) from None
            return _loaded[digest]

    def store(self, name: str, library: bytes) -> None:
        """Store a library with its checksum. Readers see all of the file or nothing.

        Raises:
            BuildError: the folder cannot be written.
        """
        draft = f".{name}-{os.getpid()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft, dir_fd=self._folder)  # of a process that was killed
            with os.fdopen(os.open(draft, flags, 0o755, dir_fd=self._folder), "wb") as file:
                os.fchmod(file.fileno(), 0o755)
                file.write(library + hashlib.sha256(library).digest())
            os.rename(draft, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(draft, dir_fd=self._folder)
            raise self._unwritable(error) from None

    @contextlib.contextmanager
    def locked(self, name: str, timeout_s: float) -> Iterator[None]:
        """Hold the lock `name`, which one process has at a time. The lock file stays empty.

        Raises:
            BuildError: the file cannot be made, is not ours, or another process holds the lock for
                longer than `timeout_s`.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            lock = os.open(name, flags, 0o600, dir_fd=self._folder)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            self._check(lock, self.path / name)
            deadline = time.monotonic() + timeout_s
            while not _try_lock(lock):
                if time.monotonic() > deadline:
                    raise BuildError(
                        f"another process holds {self.path / name} for over {timeout_s:g} s; end it"
                    )
                time.sleep(_POLL_S)
            yield
        finally:
            os.close(lock)

    def _unwritable(self, error: OSError) -> BuildError:
        return BuildError(
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
        raise BuildError(
            f"{path} {fault}, and code from it is never run; {fix}, or set MOESPAN_CACHE to a "
            "folder of your own"
        )


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
