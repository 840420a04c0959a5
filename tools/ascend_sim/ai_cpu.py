"""The ledger of operations that a 910B runs on its AI CPU instead of its AI cores.

An AI CPU is a slow ARM core of the chip, so that such an operation takes tens of microseconds at
best. The rules follow CANN's sources (ops-math, branches 8.5.0 and 9.1.0): Invert has AI-core
kernels for 16-bit integers and bool only, Cumsum none for float64 and int64, SearchSorted none at
all. With `ASCEND_SIM_AICPU=1` each operation is printed when it is called or recorded.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType

import torch
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
HERE = Path(__file__).parent
SEARCHES = {aten.searchsorted, aten.bucketize}
CUMULATIVE = {aten.cumsum, aten.cumsum_}
INVERTED = (torch.bool, torch.int16, torch.uint16)
SUMMED = (torch.float32, torch.float16, torch.bfloat16, torch.int32)
# They move or fill memory, whatever the dtype.
MOVING = {aten._to_copy, aten.copy_, aten.clone, aten.fill_, aten.zero_, aten.zeros, aten.full}

calls: list[str] = []
"""The operations so far, each as `name(dtype): where`; clear it to begin anew."""


def note(func, args, kwargs):
    """Add the operation to the ledger if a 910B runs it on its AI CPU."""
    why = reason(func.overloadpacket, args, kwargs)
    if why is None:
        return
    calls.append(f"{func}: {why}, at {_caller()}")
    if os.environ.get("ASCEND_SIM_AICPU") == "1":
        print(f"[aicpu] {calls[-1]}", file=sys.stderr, flush=True)


def reason(packet, args, kwargs):
    """Why an operation has no kernel for AI cores; None if it has one."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.dim()]
    dtypes = {x.dtype for x in tensors} | {kwargs.get("dtype")}
    if packet in SEARCHES:
        return "no kernel for any dtype"
    if torch.float64 in dtypes and packet not in MOVING:
        return "torch.float64"
    if not tensors:
        return None
    first = tensors[0].dtype
    if packet in (aten.bitwise_not, aten.bitwise_not_) and first not in INVERTED:
        return str(first)
    if packet in CUMULATIVE and (kwargs.get("dtype") or _promoted(first)) not in SUMMED:
        return str(kwargs.get("dtype") or _promoted(first))
    if packet in (aten.masked_fill, aten.masked_fill_) and first == torch.int64:
        return str(first)
    if packet == aten.sort:
        dim = kwargs.get("dim", next((x for x in args[1:] if type(x) is int), -1))
        if not first.is_floating_point or tensors[0].size(dim) == 1:
            return f"{first} {tuple(tensors[0].shape)} along {dim}"
    return None


def _promoted(dtype):
    """The dtype of a sum of `dtype` without a `dtype` argument."""
    return dtype if dtype.is_floating_point else torch.int64


def _caller():
    """File and line of the innermost call outside torch and the simulator."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent != HERE and not {"torch", "torch_npu"} & set(path.parts):
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
