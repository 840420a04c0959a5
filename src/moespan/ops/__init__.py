"""Operations by device. Only this package and `launch` know which device it is."""

from __future__ import annotations

import importlib.util

import torch

from moespan.notice import notice
from moespan.ops.base import AttentionBatch, KVCache, Ops, Replay, Weight
from moespan.ops.cpu import CpuOps
from moespan.ops.reference import ReferenceOps

__all__ = [
    "AttentionBatch",
    "CpuOps",
    "KVCache",
    "Ops",
    "ReferenceOps",
    "Replay",
    "Weight",
    "ops_for",
]


def ops_for(device_type: str, dtype: torch.dtype = torch.bfloat16) -> Ops:
    """The fastest implementation for a device type and a dtype of activations."""
    if device_type == "cpu":
        return _cpu_ops(dtype)
    if device_type == "npu":
        from moespan.ops.npu import NpuOps  # needs torch_npu

        return NpuOps()
    if device_type == "cuda":
        if importlib.util.find_spec("triton") is None:
            notice("every operation goes through plain torch, and is slow: Triton is not installed")
            return ReferenceOps()
        from moespan.ops.cuda import CudaOps  # needs Triton

        return CudaOps()
    return ReferenceOps()


def _cpu_ops(dtype: torch.dtype) -> CpuOps:
    if dtype != torch.bfloat16:
        return CpuOps()
    from moespan.ops.native.ops import BuildError, NativeCpuOps

    try:
        return NativeCpuOps()
    except BuildError as error:
        notice(f"CPU operations go through plain torch, which is slower: {error}")
        return CpuOps()
