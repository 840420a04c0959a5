"""Small sums between the GPUs of one machine, each in one kernel over NVLink instead of NCCL's.

In decode an all-reduce carries a few kilobytes, and what it takes is latency. In one shot every
rank copies its part to where all can read, waits for the others' word, reads all parts and adds
them in the order of the ranks: so all ranks get the same bits, in every run. (n-1)·b bytes come to
each rank, where a ring brings 2·(n-1)/n·b: this is for small messages.

Memory and kernel are torch's, from 2.11 on: `torch.distributed._symmetric_memory`. What is said of
them here stands in pytorch/pytorch, torch/csrc/distributed/c10d/symm_mem: CUDASymmetricMemoryOps.cu
and CUDASymmetricMemory-inl.cuh. Of the four operators that all-reduce

- `one_shot_all_reduce` is used, after a copy on the same stream, as c10d's IntraNodeComm does;
- `one_shot_all_reduce_copy`, which copies in the same kernel, is not: it gives word to the others
  before all threads of a block have written, without the __syncthreads that "Pattern 1" of the
  header asks for;
- `two_shot_all_reduce_` is for sizes where NCCL does well;
- `multimem_all_reduce_` has the switch add, in an order that torch does not promise.

They run on the current stream, and in recorded graphs once the memory is known to all ranks. Two
at once on two streams may wait for each other for ever (pytorch issue 189228): a step has one
stream. They have no time limit of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from moespan.errors import ConfigError, MoespanError
from moespan.log import once
from moespan.parallel.control import Control

# What a thread of the kernel reads at once; it would take 4 bytes, but slower.
_PIECE_BYTES = 16
_DTYPES = (torch.bfloat16, torch.float32)
_NOBODY = 1 << 31


class OneShotSum:
    """Sums over the GPUs of one group, on one machine.

    Args:
        group: its name.
        place: of this rank in it.
        size: ranks in it.
        most_bytes: of a message.
    """

    def __init__(
        self, group: str, place: int, size: int, device: torch.device, most_bytes: int
    ) -> None:
        self._group, self._place, self._size = group, place, size
        self._device, self._most_bytes = device, most_bytes
        self._buffer: Tensor | None = None

    @classmethod
    def join(
        cls,
        group: str,
        ranks: Sequence[int],
        rank: int,
        ranks_here: int,
        device: torch.device,
        most_bytes: int,
        control: Control,
    ) -> OneShotSum | None:
        """One over `group`; None, and word of why, unless all groups of the world can have one.

        All ranks of the world call it together, each for the group that it is in.

        Args:
            ranks: of the group, in the world and in order; `rank` is this one.
            ranks_here: ranks on each machine, numbered through; each has the GPU of its place.
        """
        sums = cls(group, ranks.index(rank), len(ranks), device, most_bytes)
        steps: list[Callable[[], None]] = [
            lambda: _check_links(ranks, ranks_here),
            sums._allocate,
            sums._meet,
            sums._prove,
        ]
        for step in steps:
            problem = ""
            try:
                step()
            except MoespanError as error:
                problem = str(error)
            except Exception as error:
                # Whatever torch, a driver or a container finds wrong with it: NCCL works without.
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
            # Nobody goes on alone: in the next step it would wait for those who cannot.
            first = control.smallest(rank if problem else _NOBODY)
            if first == rank:
                once(f"small all-reduces go through NCCL, which is slower: {problem}", True)
            if first != _NOBODY:
                return None
        return sums

    def takes(self, x: Tensor) -> bool:
        """Whether `x` can be summed here: by its shape and dtype alone, so that ranks agree."""
        num_bytes = x.numel() * x.element_size()
        fits = 0 < num_bytes <= self._most_bytes and num_bytes % _PIECE_BYTES == 0
        return fits and x.dtype in _DTYPES

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, in new memory; each addition rounds to x's dtype.

        in: partial → out: replicated. Once it is there no rank still reads what this one gave.
        """
        assert self._buffer is not None
        part = self._buffer[: x.numel() * x.element_size()].view(x.dtype).view(x.shape)
        part.copy_(x)
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce(part, "sum", self._group)
        return total

    def _allocate(self) -> None:
        """Make the memory that the others will read."""
        from torch.distributed import _symmetric_memory

        self._buffer = _symmetric_memory.empty(
            self._most_bytes, dtype=torch.uint8, device=self._device
        )

    def _meet(self) -> None:
        """Make all ranks' memory known to all."""
        from torch.distributed import _symmetric_memory

        assert self._buffer is not None
        _symmetric_memory.rendezvous(self._buffer, self._group)

    def _prove(self) -> None:
        """Sum the largest messages, of numbers that both dtypes hold exactly; this also loads the
        kernels before a graph is recorded."""
        right = []
        for dtype in _DTYPES:
            count = self._most_bytes // _PIECE_BYTES * (_PIECE_BYTES // dtype.itemsize)
            numbers = torch.arange(count, device=self._device)
            given = torch.stack([(numbers + place) % 3 for place in range(self._size)])
            total = self(given[self._place].to(dtype))
            right.append(torch.equal(total, given.sum(0).to(dtype)))
        # Only now: the others are in the next sum until this rank is.
        if not all(right):
            raise ConfigError("the one-shot kernel gives wrong sums on this machine")


def _check_links(ranks: Sequence[int], ranks_here: int) -> None:
    """Refuse ranks whose GPUs are not all joined by NVLink: the kernel's word to the others is an
    atomic operation on their memory, which PCIe need not carry."""
    from torch._C._autograd import DeviceType
    from torch._C._distributed_c10d import (  # type: ignore[attr-defined,unused-ignore]
        _detect_dma_connectivity,
    )

    if len({rank // ranks_here for rank in ranks}) > 1:
        raise ConfigError("tp crosses machines")
    links = _detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix
    for one, other in combinations([rank % ranks_here for rank in ranks], 2):
        if not links[one][other]:
            raise ConfigError(f"no NVLink joins the GPUs {one} and {other}")
        if not torch.cuda.can_device_access_peer(one, other):
            raise ConfigError(f"GPU {one} cannot read the memory of GPU {other}")
