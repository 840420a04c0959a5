"""The checks that the simulator's kernels share.

A call that CANN's kernels refuse, or whose result is undefined, raises a `RefusedError`; the limits
are those of their documents for an Atlas A2. A call that the simulator does not know raises a
`NotImplementedError`. Memory that an NPU leaves uninitialised is NaN or -2**31, so that a program
that reads it fails.

Some limits depend on the release of CANN, which `ASCEND_SIM_CANN` names. They follow CANN's
operator sources of that release (ops-transformer, branches 8.5.0, 9.0.0 and 9.1.0).
"""

from __future__ import annotations

import os
import sys

import torch

from moespan.machine.cann import RECOMMENDED_CANN

RELEASES = ("8.5.0", "9.0.0", "9.1.0")

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)

_libraries = {space: torch.library.Library(space, "IMPL") for space in ("npu", "atb")}


class RefusedError(RuntimeError):
    """An NPU would refuse this call, or its result would be undefined."""


def cann():
    """The simulated release of CANN."""
    release = os.environ.get("ASCEND_SIM_CANN", RECOMMENDED_CANN)
    if release not in RELEASES:
        raise NotImplementedError(
            f"ASCEND_SIM_CANN={release} is not simulated; use one of {', '.join(RELEASES)}"
        )
    return release


def is_old():
    """Whether the simulated CANN is 8.5.0, whose operators take less."""
    return cann() == "8.5.0"


def warn(text):
    """Print a warning once per process."""
    if text not in _warned:
        _warned.add(text)
        print(f"[ascend_sim] warning: {text}", file=sys.stderr, flush=True)


_warned: set[str] = set()


def kernel(name):
    """Register a function as the CPU kernel of `namespace::operator[.overload]`."""
    space, operator = name.split("::")

    def register(function):
        _libraries[space].impl(operator, function, "CPU")
        return function

    return register


def demand(holds, rule):
    """Refuse unless `rule` holds."""
    if not holds:
        raise RefusedError(rule)


def one_dtype(name, allowed, *tensors):
    dtypes = [tensor.dtype for tensor in tensors if tensor is not None]
    demand(
        dtypes[0] in allowed and len(set(dtypes)) == 1,
        f"{name} takes {', '.join(map(str, allowed))}, one for all of its tensors, not {dtypes}",
    )


def plain(name, *tensors):
    """Refuse empty and non-contiguous tensors."""
    for tensor in tensors:
        demand(tensor.numel(), f"{name} takes no empty tensor: {tuple(tensor.shape)}")
        demand(tensor.is_contiguous(), f"{name} takes contiguous tensors only: {tensor.stride()}")


def unknown(**arguments):
    """Refuse arguments that are not simulated, unless their value has no effect."""
    for name, value in arguments.items():
        if value not in (None, 0, False, "", []):
            raise NotImplementedError(f"the simulator does not know {name}={value}")


def poison_of(dtype):
    """The value of unwritten memory, which must not be read."""
    if dtype.is_floating_point:
        return float("nan")
    return max(-(2**31), torch.iinfo(dtype).min) if dtype != torch.bool else False


def uninitialised(shape, dtype):
    return torch.full(shape, poison_of(dtype), dtype=dtype)
