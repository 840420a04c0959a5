"""The operations of the network, by device.

`base.py` states the protocol that the network is written against. `reference.py` defines what each
operation means, in plain torch. `cpu/`, `cuda/` (Triton) and `npu/` (torch_npu) are faster
implementations of the same numbers. `ops_for` chooses one.
"""

from __future__ import annotations

import importlib.util

from moespan.cache_folder import CacheError
from moespan.config import EngineConfig
from moespan.errors import ConfigError
from moespan.log import once
from moespan.ops.base import (
    AttentionBatch,
    ExpertBank,
    KVCache,
    Ops,
    Replay,
    Rotation,
    Weight,
)
from moespan.ops.cpu.plain import CpuOps, let_onednn_start
from moespan.ops.reference import ReferenceOps

__all__ = [
    "AttentionBatch",
    "CpuOps",
    "ExpertBank",
    "KVCache",
    "Ops",
    "ReferenceOps",
    "Replay",
    "Rotation",
    "Weight",
    "ops_for",
]


def ops_for(device_type: str, config: EngineConfig | None = None) -> Ops:
    """The fastest implementation that this machine has for a device type.

    Args:
        config: options of the device; None for their defaults.
    """
    if device_type == "cpu":
        return _cpu_ops() if config is None else _cpu_ops(config.dtype, config.batch_invariant)
    if device_type == "npu":
        from moespan.ops.npu.ops import NpuOps  # needs torch_npu

        return NpuOps() if config is None else NpuOps(options=config)
    if device_type == "cuda":
        if importlib.util.find_spec("triton") is None:
            once("all operations run in plain torch, which is slow: Triton is not installed")
            return ReferenceOps()
        from moespan.ops.cuda.ops import CudaOps  # needs Triton

        return CudaOps()
    return ReferenceOps()


def _cpu_ops(dtype: str = "bfloat16", batch_invariant: bool = False) -> CpuOps:
    let_onednn_start()
    if dtype != "bfloat16":
        return CpuOps()
    from moespan.ops.cpu.native import NativeCpuOps

    try:
        return NativeCpuOps(batch_invariant=batch_invariant)
    except CacheError as error:
        if batch_invariant:
            raise ConfigError(
                f"batch_invariant needs the kernels for CPUs, which cannot be built: {error}"
            ) from None
        once(f"CPU operations run in plain torch, which is slower: {error}")
        return CpuOps()
