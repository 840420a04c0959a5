"""The folder `weights` of moespan's cache: packed weights of earlier starts, up to a bound.

A file belongs to one *key*: the code of this package, the kernels with compiler and processor, the
files of the checkpoint (their number, size and time of change), the dtype, and the placement. Ranks
that hold the same weights have the same key, and so one copy in memory.

- A file gets its name when it is complete. Until then it is a draft, which its writer has locked. A
  draft that nobody has locked is left from a killed process, and is removed.
- Files are removed, those first that were not used for longest, so that the folder keeps to its
  bound. A process that has mapped a removed file keeps its memory.
- A file used in the last ten minutes stays. Otherwise ranks whose weights do not fit together would
  remove each other's files at every start.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moespan.cache_folder import CacheError, CacheFolder, LockedError, try_lock
from moespan.checkpoint.building import Loaded
from moespan.log import logger, once
from moespan.ops.cpu.weight_file import Checksum, WeightWriter, read_weights
from moespan.units import bytes_in_words

_ENDING, _DRAFT_ENDING = ".weights", ".draft"
_RECENT_S = 600


@dataclass
class WeightCache:
    """The weights of one key. See `moespan.checkpoint.building.KeptWeights`.

    Attributes:
        path: the folder.
        made_from: text that says all that the weights follow from.
        expected_bytes: about the bytes of the weights.
        limit_bytes: bound of all files in the folder.
        checksum: of a tensor's memory.
        mapped_bytes: bytes of the weights that are mapped.
    """

    path: Path
    made_from: str
    expected_bytes: int
    limit_bytes: int
    checksum: Checksum
    mapped_bytes: int = 0

    @property
    def _key(self) -> bytes:
        return hashlib.sha256(self.made_from.encode()).digest()

    @property
    def _name(self) -> str:
        return self._key.hex()[:32]

    def find(self) -> Loaded | None:
        """The kept weights; None if there are none, or none that can be used."""
        name = self._name + _ENDING
        try:
            with CacheFolder(self.path) as folder:
                file = folder.open(name)
                if file is None:
                    return None
                with file:
                    found = read_weights(file, self._key, self.checksum)
                    if found is not None:
                        with contextlib.suppress(OSError):  # root's file
                            os.utime(file.fileno())
        except (CacheError, OSError) as error:
            once(f"packed weights cannot be mapped, and are loaded: {error}", True)
            return None
        if found is None:
            once(f"{self.path / name} is damaged; its weights are loaded and written again", True)
            return None
        weights, self.mapped_bytes = found
        return weights

    @contextlib.contextmanager
    def keeping(self) -> Iterator[Callable[[str, Any], Any]]:
        """Keep what is given to the function that this yields, when the block ends well.

        Nothing is kept, with a notice, if the weights do not fit, or the folder cannot be used; and
        silently, if another process is writing the same weights.
        """
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(CacheFolder(self.path))
                keeper = stack.enter_context(_Keeper.locked(self, folder, self._name, self._key))
            except LockedError:
                yield lambda name, weight: weight
                return
            except (CacheError, OSError) as error:
                _not_kept(error)
                yield lambda name, weight: weight
                return
            yield keeper.put
            keeper.finish()
            self.mapped_bytes = keeper.mapped_bytes


class _Keeper:
    """Writes one draft, and goes on without it after the first error."""

    def __init__(self, cache: WeightCache, folder: CacheFolder, writer: WeightWriter) -> None:
        self._cache, self._folder, self._writer = cache, folder, writer
        self._is_writing = True

    @classmethod
    @contextlib.contextmanager
    def locked(
        cls, cache: WeightCache, folder: CacheFolder, name: str, key: bytes
    ) -> Iterator[_Keeper]:
        """A keeper that holds the draft; afterwards the draft is removed, if it was not finished.

        Raises:
            LockedError: another process holds the draft.
            CacheError: the folder cannot be used, or has no room.
        """
        draft = name + _DRAFT_ENDING
        with folder.locked(draft, 0) as descriptor:
            if not folder.holds(draft, descriptor):
                raise LockedError(f"another process has just finished {folder.path / draft}")
            try:
                os.ftruncate(descriptor, 0)
                _make_room(folder, cache.expected_bytes, cache.limit_bytes, name)
                _check_disk(folder, cache.expected_bytes)
                logger.info(
                    "%s of packed weights go to %s, for later starts",
                    bytes_in_words(cache.expected_bytes),
                    folder.path,
                )
                file = io.FileIO(descriptor, "r+", closefd=False)
                yield cls(cache, folder, WeightWriter(file, key, cache.checksum))
            finally:
                if folder.holds(draft, descriptor):
                    folder.remove(draft)
                # The mappings keep the open file, and with it the lock.
                fcntl.flock(descriptor, fcntl.LOCK_UN)

    @property
    def mapped_bytes(self) -> int:
        return self._writer.mapped_bytes

    def put(self, name: str, weight: Any) -> Any:
        """Write a parameter and return it mapped; after an error, only return it."""
        if self._is_writing:
            try:
                return self._writer.put(name, weight)
            except OSError as error:
                self._is_writing = False
                _not_kept(error)
        return weight

    def finish(self) -> None:
        """Give the draft its name."""
        if not self._is_writing:
            return
        name, cache = self._cache._name, self._cache
        try:
            num_bytes = self._writer.finish()
            _make_room(self._folder, num_bytes, cache.limit_bytes, name)
            self._folder.rename(name + _DRAFT_ENDING, name + _ENDING)
        except (CacheError, OSError) as error:
            _not_kept(error)


def _not_kept(error: Exception) -> None:
    once(f"the packed weights are not kept for the next start: {error}", True)


def _make_room(folder: CacheFolder, num_bytes: int, limit_bytes: int, own: str) -> None:
    """Remove files until `num_bytes` more fit into the folder beside the others.

    Args:
        own: name of the weights to be kept: their draft, and a file to be replaced, do not count.

    Raises:
        CacheError: they do not fit.
    """
    others = []
    for name in folder.names():
        if name.startswith(own) or not name.endswith((_ENDING, _DRAFT_ENDING)):
            continue
        with contextlib.suppress(FileNotFoundError):
            if name.endswith(_DRAFT_ENDING) and _remove_if_left(folder, name):
                continue
            status = os.stat(name, dir_fd=folder.descriptor, follow_symlinks=False)
            others.append((status.st_mtime, name, status.st_blocks * 512))
    room = limit_bytes - sum(size for _, _, size in others)
    recent = time.time() - _RECENT_S
    for used_at, name, size in sorted(others):
        if room >= num_bytes:
            break
        if name.endswith(_ENDING) and used_at < recent:
            folder.remove(name)
            room += size
    if room < num_bytes:
        raise CacheError(
            f"{bytes_in_words(num_bytes)} do not fit into {folder.path} beside the files of the "
            f"last ten minutes; raise weight_cache_gb={limit_bytes / 1e9:g}"
        )


def _check_disk(folder: CacheFolder, num_bytes: int) -> None:
    """Refuse weights that would fill the disk.

    Raises:
        CacheError: the disk has no room for them.
    """
    status = os.fstatvfs(folder.descriptor)
    free_bytes = status.f_bavail * status.f_frsize
    if free_bytes < num_bytes:
        raise CacheError(
            f"the disk of {folder.path} has {bytes_in_words(free_bytes)} free, and they take "
            f"{bytes_in_words(num_bytes)}; set MOESPAN_CACHE to a folder on another disk"
        )


def _remove_if_left(folder: CacheFolder, draft: str) -> bool:
    """Remove a draft that nobody writes any more."""
    descriptor = os.open(
        draft, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder.descriptor
    )
    try:
        if not try_lock(descriptor) or not folder.holds(draft, descriptor):
            return False
        folder.remove(draft)
        return True
    finally:
        os.close(descriptor)
