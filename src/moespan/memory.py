"""Memory of the host and of devices: free bytes, zeroed tensors, transfers to and from devices."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch

from moespan.cgroups import available_memory_bytes, memory_limit_bytes
from moespan.device import DEVICES

# Tensors smaller than a huge page get ordinary pages; they take little memory in all.
_HUGE_PAGE_BYTES = 2 << 20


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Like `torch.zeros`, but on a CPU the pages take no memory before they are written.

    The tensor begins at a page boundary, so that no vector crosses two cache lines. It lies in huge
    pages where the system has them: page faults are a hundred times rarer, and kernels read faster.
    """
    if not is_host(device) or not math.prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros would write the zeros; fresh pages of the system read as zero without that.
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if num_bytes >= _HUGE_PAGE_BYTES:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


# Each part of a transfer begins at a multiple of this many elements, as a separate tensor would.
_PART_ALIGNMENT = 128


def to_device(parts: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copy CPU tensors of one dtype to `device`, in one transfer that is not waited for.

    On a CPU the tensors themselves are returned.
    """
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
    """Whether the values of `tensor` can be read without waiting for a device."""
    return is_host(tensor.device)


class ToHost:
    """Copies of tensors on their way to the host.

    Waiting for them does not wait for work that is queued on the device later. On a CPU they are
    the tensors themselves.
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
        """The tensors, once all of them have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._parts


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on `device`; for a CPU, within the limits of cgroups."""
    if not is_host(device):
        free_bytes, _ = torch.get_device_module(device).mem_get_info(device)
        return int(free_bytes)
    available = _meminfo_bytes("MemAvailable")
    within_limits = available_memory_bytes()
    return available if within_limits is None else min(available, within_limits)


def total_bytes(device: torch.device) -> int:
    """Memory of `device`; for a CPU, of the host, within the limits of cgroups."""
    if not is_host(device):
        _, total = torch.get_device_module(device).mem_get_info(device)
        return int(total)
    total, limit = _meminfo_bytes("MemTotal"), memory_limit_bytes()
    return total if limit is None else min(total, limit)


def reserved_bytes(device: torch.device) -> int:
    """Memory of `device` that torch's caching allocator holds; 0 for CPUs, which have none."""
    if is_host(device):
        return 0
    return int(torch.get_device_module(device).memory_reserved(device))


def allocated_bytes(device: torch.device) -> int:
    """Memory of this process's tensors on `device`; for a CPU, all of this process's memory."""
    if is_host(device):
        return _own_bytes("VmRSS")
    return int(torch.get_device_module(device).memory_allocated(device))


def most_allocated_bytes(device: torch.device) -> int:
    """The most that `allocated_bytes` has been since `forget_most_allocated`."""
    if is_host(device):
        return _own_bytes("VmHWM")
    return int(torch.get_device_module(device).max_memory_allocated(device))


def forget_most_allocated(device: torch.device) -> None:
    """Begin to look for `most_allocated_bytes` anew."""
    if not is_host(device):
        torch.get_device_module(device).reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # not allowed in some containers: the peak is then older
        Path("/proc/self/clear_refs").write_text("5")


def return_freed_memory() -> None:
    """Give memory of the host that was freed back to the system, if the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a whole tensor that are in memory: on the host, of the pages that were written."""
    num_bytes = int(tensor.untyped_storage().nbytes())
    if not on_host(tensor) or not num_bytes:
        return num_bytes
    page = mmap.PAGESIZE
    start = tensor.untyped_storage().data_ptr() // page * page
    length = tensor.untyped_storage().data_ptr() + num_bytes - start
    pages = torch.empty(-(-length // page), dtype=torch.uint8)
    library = ctypes.CDLL(None, use_errno=True)
    arguments = ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_void_p(pages.data_ptr())
    if library.mincore(*arguments):
        raise OSError(ctypes.get_errno(), "mincore failed")
    return min(int(pages.bitwise_and_(1).sum()) * page, num_bytes)


def _own_bytes(key: str) -> int:
    return _kib_line(Path("/proc/self/status"), key)


def _meminfo_bytes(key: str) -> int:
    return _kib_line(Path("/proc/meminfo"), key)


def _kib_line(path: Path, key: str) -> int:
    """Bytes in the line `key: N kB`."""
    for line in path.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no {key}")
