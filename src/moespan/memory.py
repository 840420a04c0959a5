"""Memory of the host and of devices: how much is free, and fresh zeroed tensors."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch

from moespan.cgroups import available_memory_bytes
from moespan.device import DEVICES

# What is smaller than a huge page gets ordinary ones; there is not much of it.
_HUGE_PAGE_BYTES = 2 << 20


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Like `torch.zeros`, but on a CPU the pages take no memory before they are written.

    It begins at a page, so that no vector lies in two cache lines, and lies in huge pages where the
    system has them: they are given a hundred times less often, and kernels read them faster.
    """
    if not is_host(device) or not math.prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch writes the zeros itself; the system gives pages that read as zero.
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if num_bytes >= _HUGE_PAGE_BYTES:
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


# Parts of one transfer begin at multiples of so many elements, as tensors of their own would.
_PART_ALIGNMENT = 128


def to_device(parts: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """CPU tensors of one dtype as they are on `device`: in one transfer, not waited for."""
    if is_host(device):
        return list(parts)
    lengths = [-(-part.numel() // _PART_ALIGNMENT) * _PART_ALIGNMENT for part in parts]
    packed = torch.zeros(sum(lengths), dtype=parts[0].dtype, pin_memory=True)
    for part, room in zip(parts, packed.split(lengths), strict=True):
        room[: part.numel()] = part.flatten()
    moved = packed.to(device, non_blocking=True).split(lengths)
    return [room[: part.numel()].view(part.shape) for part, room in zip(parts, moved, strict=True)]


def is_host(device: torch.device) -> bool:
    """Whether the device's memory is the host's."""
    return DEVICES[device.type].is_host


def on_host(tensor: torch.Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device."""
    return is_host(tensor.device)


class ToHost:
    """Copies of tensors on their way to the host, which need not wait for what is queued later.

    On a CPU they are the tensors themselves.
    """

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self._arrived: torch.Event | None = None
        self._parts = list(parts)
        if not parts or on_host(parts[0]):
            return
        self._parts = [
            torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(
                part, non_blocking=True
            )
            for part in parts
        ]
        self._arrived = torch.get_device_module(parts[0].device).Event()
        self._arrived.record()

    def wait(self) -> list[torch.Tensor]:
        """The tensors, once all of them are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._parts


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on `device`; for CPUs within the limits of cgroups."""
    if not is_host(device):
        free_bytes, _ = torch.get_device_module(device).mem_get_info(device)
        return int(free_bytes)
    available = _meminfo_bytes("MemAvailable")
    within_limits = available_memory_bytes()
    return available if within_limits is None else min(available, within_limits)


def reserved_bytes(device: torch.device) -> int:
    """Memory of `device` that this process's allocator holds; 0 for CPUs, where none is kept."""
    if is_host(device):
        return 0
    return int(torch.get_device_module(device).memory_reserved(device))


def _meminfo_bytes(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/meminfo has no {key}")
