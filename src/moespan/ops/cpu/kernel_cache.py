"""The folder that keeps built kernels: only code that this user or root wrote is ever loaded.

`moespan.cache_folder` says which files are trusted. The library is loaded by its descriptor, so
that nobody can exchange the file between check and load.

A library file ends with the SHA-256 of all bytes before it, which the system's loader ignores. A
file without its right checksum was cut or damaged: it counts as missing and is built again, because
a process that maps a cut library is killed by SIGBUS.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
from pathlib import Path

from moespan.cache_folder import CacheError, CacheFolder
from moespan.errors import shortened
from moespan.files import read_rest

_MOST_BYTES = 256 << 20
_DIGEST_BYTES = hashlib.sha256().digest_size

# Checksum → the library of this process. The system's loader knows a library by its path, here
# /proc/self/fd/N. The descriptors therefore stay open, so that no other file gets the same N.
_loaded: dict[bytes, ctypes.CDLL] = {}


class KernelCache(CacheFolder):
    """One folder of libraries; a context manager that holds its descriptor.

    Raises:
        CacheError: see `CacheFolder`; or the folder is on a file system from which nothing may be
            run.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if os.fstatvfs(self.descriptor).f_flag & os.ST_NOEXEC:
            self.close()
            raise CacheError(
                f"{path} is on a file system that is mounted noexec, and libraries cannot be "
                "loaded from it; set MOESPAN_CACHE to a folder where programs may run"
            )

    def load(self, name: str) -> ctypes.CDLL | None:
        """Load the library `name`; None if it is missing or damaged.

        Raises:
            CacheError: another user owns the file or could have written it, or the system's loader
                refuses it.
        """
        path, file = self.path / name, self.open(name)
        if file is None:
            return None
        with file:
            try:
                data = read_rest(file, _MOST_BYTES)
            except OSError as error:
                raise CacheError(f"{path} cannot be read ({error}); delete it") from None
            digest = data[-_DIGEST_BYTES:]
            if hashlib.sha256(data[:-_DIGEST_BYTES]).digest() != digest:
                return None
            if digest not in _loaded:
                kept = os.dup(file.fileno())
                try:
                    _loaded[digest] = ctypes.CDLL(f"/proc/self/fd/{kept}")
                except OSError as error:
                    os.close(kept)
                    raise CacheError(
                        f"{path} does not load ({shortened(error, 200)}); set CXX to another "
                        "compiler"
                    ) from None
            return _loaded[digest]

    def store(self, name: str, library: bytes) -> None:
        """Store a library with its checksum. Readers see all of the file or nothing.

        Raises:
            CacheError: the folder cannot be written.
        """
        draft = f".{name}-{os.getpid()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self.remove(draft)  # of a process that was killed
            with os.fdopen(os.open(draft, flags, 0o755, dir_fd=self.descriptor), "wb") as file:
                os.fchmod(file.fileno(), 0o755)
                file.write(library + hashlib.sha256(library).digest())
            self.rename(draft, name)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.remove(draft)
            raise self.unwritable(error) from None
