"""A file of finished parameters, which later starts map into memory instead of loading them.

The file holds the memory of every tensor as the kernels read it, then a table, then the table's
length, its SHA-256, and the key. Tensors of 2 MiB and more begin at multiples of 2 MiB and are
mapped: all processes that map them share one copy, and the system may put them into huge pages (it
does on Linux 6.18 with ext4). Smaller tensors are read.

Every tensor has a checksum. A file that is cut, damaged, or of another key counts as missing. A
mapped page that the disk cannot deliver would kill the process by SIGBUS. The checksum therefore
asks the system for all pages first, which reports such a page as an error (Linux 5.14 and newer).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import mmap
import os
import struct
import warnings
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch import Tensor

from moespan.checkpoint.building import Loaded
from moespan.checkpoint.rounding import QuantizedWeight
from moespan.ops.cpu.packing import PackedWeight

Checksum = Callable[[Tensor], int]
"""The checksum of a tensor's memory. Raises `OSError` if it cannot be read."""

_HUGE_PAGE_BYTES, _LINE_BYTES = 2 << 20, 64
_WRITE_BYTES = 32 << 20  # large writes get large pages of the page cache
_MOST_TABLE_BYTES = 64 << 20
_END = struct.Struct("<Q32s32s")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.int8,
        torch.uint8,
        torch.int32,
    )
}
_KINDS: dict[str, type[Any]] = {"packed": PackedWeight, "quantized": QuantizedWeight}


class _Part(msgspec.Struct, frozen=True, array_like=True):
    """A tensor: the offset of its first byte, and its form."""

    begin: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    checksum: int

    @property
    def num_elements(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def num_bytes(self) -> int:
        return self.num_elements * int(_DTYPES[self.dtype].itemsize)


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    """A parameter: a tensor, whose part is named "", or the fields of a class of `_KINDS`."""

    kind: str
    parts: dict[str, _Part]
    numbers: dict[str, int]


class WeightWriter:
    """Writes a new file, parameter by parameter.

    Args:
        file: empty, open to be read and written.
        key: 32 bytes that say what the file is made from.

    Attributes:
        mapped_bytes: bytes of the tensors that are mapped.
    """

    def __init__(self, file: io.FileIO, key: bytes, checksum: Checksum) -> None:
        self._file, self._key, self._checksum = file, key, checksum
        self._table: dict[str, _Entry] = {}
        self._end = 0
        self.mapped_bytes = 0

    def put(self, name: str, weight: Any) -> Any:
        """Write a parameter and return it, with its large tensors mapped: their own memory can go.

        Raises:
            OSError: the file cannot be written.
        """
        if isinstance(weight, Tensor):
            part, kept = self._put(weight)
            self._table[name] = _Entry("", {"": part}, {})
            return kept
        kind = next(kind for kind, form in _KINDS.items() if isinstance(weight, form))
        parts: dict[str, _Part] = {}
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, int] = {}
        for field in dataclasses.fields(weight):
            value = getattr(weight, field.name)
            if isinstance(value, Tensor):
                parts[field.name], tensors[field.name] = self._put(value)
            elif value is not None:
                numbers[field.name] = value
        self._table[name] = _Entry(kind, parts, numbers)
        return dataclasses.replace(weight, **tensors)

    def finish(self) -> int:
        """Write the table, which makes the file valid, and return the file's bytes."""
        table = msgspec.msgpack.encode(self._table)
        end = _END.pack(len(table), hashlib.sha256(table).digest(), self._key)
        self._write(memoryview(table + end), self._end)
        return self._end + len(table) + len(end)

    def _put(self, tensor: Tensor) -> tuple[_Part, Tensor]:
        flat = _flat(tensor)
        if flat is None:
            return self._put(tensor.contiguous())
        data = flat.view(torch.uint8)
        alignment = _HUGE_PAGE_BYTES if _is_mapped(len(data)) else _LINE_BYTES
        begin = -(-self._end // alignment) * alignment
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape, strides = tuple(tensor.shape), tensor.stride()
        part = _Part(begin, dtype, shape, strides, self._checksum(data))
        self._write(memoryview(data.numpy()), begin)
        self._end = begin + len(data)
        if not _is_mapped(len(data)):
            return part, tensor
        self.mapped_bytes += len(data)
        return part, _tensor(part, _mapped(self._file, part))

    def _write(self, data: memoryview, begin: int) -> None:
        if not data:
            return
        # A full disk shows here, not when the system writes the pages later.
        os.posix_fallocate(self._file.fileno(), begin, len(data))
        written = 0
        while written < len(data):
            some = data[written : written + _WRITE_BYTES]
            written += os.pwrite(self._file.fileno(), some, begin + written)


def read_weights(file: io.FileIO, key: bytes, checksum: Checksum) -> tuple[Loaded, int] | None:
    """The parameters of a file, and the bytes of those that are mapped.

    Returns:
        None if the file is damaged or has another key.

    Raises:
        OSError: the file cannot be read.
    """
    table = _read_table(file, key)
    if table is None:
        return None
    weights: Loaded = {}
    mapped_bytes = 0
    for name, entry in table.items():
        tensors: dict[str, Tensor] = {}
        for field, part in entry.parts.items():
            is_mapped = _is_mapped(part.num_bytes)
            data = _mapped(file, part) if is_mapped else _read(file, part)
            if checksum(data) != part.checksum:
                return None
            mapped_bytes += part.num_bytes if is_mapped else 0
            tensors[field] = _tensor(part, data)
        form = _KINDS.get(entry.kind)
        weights[name] = form(**tensors, **entry.numbers) if form else tensors[""]
    return weights, mapped_bytes


def _read_table(file: io.FileIO, key: bytes) -> dict[str, _Entry] | None:
    size = os.fstat(file.fileno()).st_size
    if size < _END.size:
        return None
    num_bytes, digest, own_key = _END.unpack(os.pread(file.fileno(), _END.size, size - _END.size))
    begin = size - _END.size - num_bytes
    if own_key != key or num_bytes > _MOST_TABLE_BYTES or begin < 0:
        return None
    data = os.pread(file.fileno(), num_bytes, begin)
    if hashlib.sha256(data).digest() != digest:
        return None
    table = msgspec.msgpack.decode(data, type=dict[str, _Entry])
    parts = [part for entry in table.values() for part in entry.parts.values()]
    return table if all(part.begin + part.num_bytes <= begin for part in parts) else None


def _is_mapped(num_bytes: int) -> bool:
    return num_bytes >= _HUGE_PAGE_BYTES


def _flat(tensor: Tensor) -> Tensor | None:
    """The memory of a dense tensor as a vector, in whatever order its dims lie; None if not dense.

    A tensor whose dims are all there, only in another order, has a contiguous permutation.
    """
    order = sorted(range(tensor.dim()), key=lambda dim: tensor.stride(dim), reverse=True)
    permuted = tensor.permute(order)
    return permuted.reshape(-1) if permuted.is_contiguous() else None


def _mapped(file: io.FileIO, part: _Part) -> Tensor:
    """The bytes of `part`, uint8, in memory that must not be written."""
    length = part.num_bytes
    memory = mmap.mmap(
        file.fileno(), length, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=part.begin
    )
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(memory, dtype=torch.uint8)


def _read(file: io.FileIO, part: _Part) -> Tensor:
    data = torch.empty(part.num_bytes, dtype=torch.uint8)
    if len(data) and os.preadv(file.fileno(), [data.numpy()], part.begin) != len(data):
        raise OSError("it ends too early")
    return data


def _tensor(part: _Part, data: Tensor) -> Tensor:
    return data.view(_DTYPES[part.dtype]).as_strided(part.shape, part.strides)
