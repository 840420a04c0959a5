"""Small all-reduces between the GPUs of one machine, in one kernel over NVLink instead of NCCL.

In decode an all-reduce carries a few kilobytes, and its time is latency. In one shot every rank
copies its part to memory that all ranks can read, waits for the other ranks' signals, reads all
parts, and adds them in the order of the ranks. All ranks therefore get the same bits, in every run.
Each rank receives (n-1)·b bytes, where a ring brings 2·(n-1)/n·b: this is for small messages.

Memory and kernels are torch's, from 2.11 on: `torch.distributed._symmetric_memory`. The statements
below follow its sources, torch/csrc/distributed/c10d/symm_mem/CUDASymmetricMemoryOps.cu and
CUDASymmetricMemory-inl.cuh in pytorch/pytorch. Torch has four such all-reduces:

- `one_shot_all_reduce` is used here, after a copy on the same stream, as in c10d's IntraNodeComm;
- `one_shot_all_reduce_copy` copies in the same kernel. It signals the other ranks before all
  threads of a block have written, without the __syncthreads that "Pattern 1" of the header demands;
- `two_shot_all_reduce_` is for sizes where NCCL does well;
- `multimem_all_reduce_` adds in the switch, in an order that torch does not promise.

The kernels run on the current stream, and in recorded graphs once all ranks know the memory. Two of
them on two streams may wait for each other forever (pytorch issue 189228); a step uses one stream.
The kernels have no timeout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from moespan.errors import ConfigError, MoespanError
from moespan.log import once
from moespan.parallel.control import Control

# Bytes that a thread of the kernel reads at once. Multiples of 4 bytes would work, but slower.
_PIECE_BYTES = 16
_DTYPES = (torch.bfloat16, torch.float32)
_NO_RANK = 1 << 31


class OneShotSum:
    """Sums over the GPUs of one group, on one machine.

    Args:
        group: name of the group.
        place: index of this rank in the group.
        size: ranks in the group.
        most_bytes: largest message.
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
        """An instance over `group`; None, with a notice, unless all groups can have one.

        All ranks of the world call it together, each with its own group.

        Args:
            ranks: world ranks of the group, in order; `rank` is this one.
            ranks_here: ranks on each machine. World ranks are numbered machine after machine, and
                a rank uses the GPU with its index on the machine.
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
                # Any failure of torch, the driver or the container: NCCL works without it.
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
            # All ranks go on, or none: in the next step one would wait for the ranks that failed.
            first = control.smallest(rank if problem else _NO_RANK)
            if first == rank:
                once(f"small all-reduces go through NCCL, which is slower: {problem}", True)
            if first != _NO_RANK:
                return None
        return sums

    def takes(self, x: Tensor) -> bool:
        """Whether `x` can be summed here. Depends on its shape and dtype alone, so ranks agree."""
        num_bytes = x.numel() * x.element_size()
        fits = 0 < num_bytes <= self._most_bytes and num_bytes % _PIECE_BYTES == 0
        return fits and x.dtype in _DTYPES

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of `x` over all ranks, in new memory; each addition rounds to x's dtype.

        in: partial → out: replicated. When the result is complete, no rank reads this rank's part
        any more.
        """
        assert self._buffer is not None
        part = self._buffer[: x.numel() * x.element_size()].view(x.dtype).view(x.shape)
        part.copy_(x)
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce(part, "sum", self._group)
        return total

    def _allocate(self) -> None:
        """Allocate the memory that the other ranks will read."""
        from torch.distributed import _symmetric_memory

        self._buffer = _symmetric_memory.empty(
            self._most_bytes, dtype=torch.uint8, device=self._device
        )

    def _meet(self) -> None:
        """Exchange the memory handles of all ranks."""
        from torch.distributed import _symmetric_memory

        assert self._buffer is not None
        _symmetric_memory.rendezvous(self._buffer, self._group)

    def _prove(self) -> None:
        """Check sums of the largest messages, with numbers that both dtypes hold exactly.

        This also loads the kernels before a graph is recorded.
        """
        right = []
        for dtype in _DTYPES:
            count = self._most_bytes // _PIECE_BYTES * (_PIECE_BYTES // dtype.itemsize)
            numbers = torch.arange(count, device=self._device)
            given = torch.stack([(numbers + place) % 3 for place in range(self._size)])
            total = self(given[self._place].to(dtype))
            right.append(torch.equal(total, given.sum(0).to(dtype)))
        # Only after both sums: the other ranks wait in the next sum until this rank joins.
        if not all(right):
            raise ConfigError("the one-shot kernel gives wrong sums on this machine")


def _check_links(ranks: Sequence[int], ranks_here: int) -> None:
    """Refuse ranks whose GPUs are not all joined by NVLink.

    The kernel signals ranks by atomic operations on their memory, which PCIe need not carry.
    """
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
