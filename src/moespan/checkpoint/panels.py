"""The sizes of matrices that the CPU kernels read in panels. Imports no torch.

`moespan.ops.cpu.packing` packs the matrices; `ops/cpu/kernels/packing.h` describes the panels.
"""

from __future__ import annotations

import math

from moespan.checkpoint.placement import Parameter
from moespan.config import DTYPE_BYTES

PANEL = 32
"""Output channels of one panel."""

INT4_GROUP = 32
"""Weights that share one scale, in the only form of 4 bits that the kernels take."""

_LINEAR = ("qkv", "out", "gate_up", "down", "head")


def padded(out: int, is_gate_up: bool) -> int:
    """Channels of the panels that hold `out` channels. In a gate-up matrix, gate and up are padded
    separately."""
    halves = 2 if is_gate_up else 1
    return PANEL * -(-out // halves // (PANEL // halves))


def leaf(name: str) -> str:
    """The last part of a parameter's name."""
    return name.rpartition(".")[2]


def is_matrix(name: str) -> bool:
    """Whether the kernels read the parameter `name` in panels, if they take its numbers."""
    return leaf(name) in _LINEAR


def takes_rows(name: str, shape: tuple[int, ...], item_bytes: int) -> bool:
    """Whether the kernels take rows of this length: one instruction reads four bytes of a row.

    The rows of `down` come from gate_up's outputs.
    """
    *_, out, width = shape
    rows = [width, out // 2 if leaf(name) == "gate_up" else 0]
    return not any(row * item_bytes % 4 for row in rows)


def is_packed(name: str, parameter: Parameter, dtype: str) -> bool:
    """Whether the kernels read the parameter in panels, when the engine's dtype is `dtype`."""
    if not is_matrix(name) or dtype != "bfloat16":
        return False
    scheme = parameter.scheme
    if scheme is not None and scheme.weight_bits < 8:
        return scheme.group_size == INT4_GROUP
    if scheme is not None and scheme.dtype != "int8":
        return False
    return takes_rows(name, parameter.shape, 2 if scheme is None else 1)


def held_bytes(name: str, parameter: Parameter, dtype: str) -> int:
    """Bytes of a parameter as the kernels hold it.

    Channels are padded to whole panels. 8-bit integers also have a float32 scale and an int32 sum
    for each channel.
    """
    if not is_packed(name, parameter, dtype):
        return parameter.num_bytes(dtype)
    *bank, out, width = parameter.shape
    channels = math.prod(bank) * padded(out, leaf(name) == "gate_up")
    scheme = parameter.scheme
    if scheme is None:
        return channels * width * DTYPE_BYTES[dtype]
    if scheme.weight_bits < 8:
        return channels * scheme.row_bytes(width)
    return channels * (width + 4 + 4)
