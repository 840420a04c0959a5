"""Collectives between CPU ranks of one machine, through shared memory (`kernels/shared.h`).

The first rank of a group makes the memory. It has no name in any file system: the other ranks open
it as a descriptor of the first rank's process, which the system allows to the same user only. The
memory ends with a random number that the ranks tell each other, so that a process of another
machine or container with the same number is not taken for the first rank.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from ctypes import c_int, c_int64, c_void_p

import torch
import torch.distributed as dist
from torch import Tensor

from moespan.cache_folder import CacheError
from moespan.log import once

_LINE_BYTES = 128
_SLOT_BYTES = 256 << 10  # two areas of some slots stay in a core's second-level cache
_ALL_REDUCE = {torch.float32: 0, torch.bfloat16: 1}
_REDUCE_SCATTER = {torch.float32: 2, torch.bfloat16: 3}
_ALL_GATHER = 4
_NO_RANK = 1 << 31


class SharedMemory:
    """One rank's end of a group's memory. See `moespan.parallel.mesh.HostCollectives`.

    Args:
        kernels: the library.
        memory: the shared memory, as `size_bytes` says.
        ranks: world ranks of the group, in order.
        place: index of this rank among them.
        timeout_s: longest time to wait for another rank.
    """

    def __init__(
        self,
        kernels: ctypes.CDLL,
        memory: mmap.mmap,
        ranks: Sequence[int],
        place: int,
        timeout_s: float,
    ) -> None:
        self._call = kernels.moespan_collective
        self._call.restype = None
        self._call.argtypes = [
            *(c_int, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int),
            *(c_void_p, c_int64, c_void_p, c_void_p),
        ]
        self._memory, self._ranks, self._timeout_s = memory, ranks, timeout_s
        self._view = ctypes.c_char.from_buffer(memory)  # holds the mapping
        self._late = c_int()
        self._group = (
            ctypes.addressof(self._view),
            place,
            len(ranks),
            _SLOT_BYTES,
            int(timeout_s * 1e9),
        )
        at = place * _LINE_BYTES + 4
        memory[at : at + 4] = os.getpid().to_bytes(4, "little")

    @staticmethod
    def size_bytes(num_ranks: int) -> int:
        """Bytes of a group's memory."""
        return (num_ranks + 1) * _LINE_BYTES + 2 * num_ranks * _SLOT_BYTES

    @classmethod
    def join(
        cls,
        load_kernels: Callable[[], ctypes.CDLL],
        group: dist.ProcessGroup,
        ranks: Sequence[int],
        rank: int,
        timeout_s: float,
    ) -> SharedMemory | None:
        """An instance over `group`, whose ranks call it together; None, with a notice, unless all
        of them can have the memory.

        Args:
            load_kernels: loads the library, or raises `CacheError`.
            rank: this rank, one of `ranks`.
        """
        place, problem, own = ranks.index(rank), "", -1
        memory: mmap.mmap | None = None
        joined: SharedMemory | None = None
        try:
            told = torch.zeros(3, dtype=torch.int64)
            if place == 0:
                try:
                    own, memory, nonce = _make(cls.size_bytes(len(ranks)))
                    told = torch.tensor([os.getpid(), own, nonce])
                except OSError as error:
                    problem = str(error)
            dist.broadcast(told, ranks[0], group=group)
            pid, descriptor, nonce = map(int, told)
            if place > 0 and pid:
                try:
                    memory = _open(pid, descriptor, nonce, cls.size_bytes(len(ranks)))
                except OSError as error:
                    problem = str(error)
            if memory is not None:
                try:
                    joined = cls(load_kernels(), memory, ranks, place, timeout_s)
                except CacheError as error:
                    problem = str(error)
            # All go on, or none, and the first rank that has a problem names it.
            first = torch.tensor(rank if problem else _NO_RANK)
            dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
            if int(first) == _NO_RANK:
                return joined
            if int(first) == rank:
                once(f"ranks of this machine sum through sockets, which is slower: {problem}", True)
            return None
        finally:
            if own >= 0:
                os.close(own)

    def takes(self, x: Tensor) -> bool:
        """Whether sums of `x` can be made here. Depends on its dtype alone, so ranks agree."""
        return x.dtype in _ALL_REDUCE

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks, in place if `x` is contiguous."""
        x = x.contiguous()
        self._run(_ALL_REDUCE[x.dtype], x, x.nbytes, None)
        return x

    def reduce_scatter(self, x: Tensor, part: Tensor) -> None:
        """Set `part` to this rank's part of the sum of `x` [ranks, ...] over the ranks."""
        self._run(_REDUCE_SCATTER[x.dtype], x.contiguous(), part.nbytes, part)

    def all_gather(self, x: Tensor, gathered: Tensor) -> None:
        """Set `gathered` [ranks, ...] to all ranks' `x`, of any dtype."""
        self._run(_ALL_GATHER, x.contiguous(), x.nbytes, gathered)

    def _run(self, kind: int, x: Tensor, num_bytes: int, result: Tensor | None) -> None:
        self._call(
            kind,
            *self._group,
            torch.get_num_threads(),
            x.data_ptr(),
            num_bytes,
            None if result is None else result.data_ptr(),
            ctypes.byref(self._late),
        )
        if self._late.value >= 0:
            raise dist.DistError(
                f"rank {self._ranks[self._late.value]} has gone, or was not in the same collective "
                f"within {self._timeout_s:g} s"
            )


def _make(size_bytes: int) -> tuple[int, mmap.mmap, int]:
    """Descriptor of new memory, the memory, and the number that it ends with."""
    descriptor = os.memfd_create("moespan", os.MFD_CLOEXEC)
    try:
        # All pages now: a store into one that the system has no room for would kill the process.
        os.posix_fallocate(descriptor, 0, size_bytes)
        memory = mmap.mmap(descriptor, size_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    nonce = secrets.randbits(62)
    memory[-8:] = nonce.to_bytes(8, "little")
    return descriptor, memory, nonce


def _open(pid: int, descriptor: int, nonce: int, size_bytes: int) -> mmap.mmap:
    """The memory that process `pid` has made."""
    own = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if os.fstat(own).st_size != size_bytes:
            raise OSError("the first rank is on another machine or in another container")
        memory = mmap.mmap(own, size_bytes)
    finally:
        os.close(own)
    if memory[-8:] != nonce.to_bytes(8, "little"):
        raise OSError("the first rank is on another machine or in another container")
    return memory
