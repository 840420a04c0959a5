"""The devices that moespan runs on: one row of facts for each. Imports no torch.

Code outside `ops/` and `machine/` that depends on the device reads a field of its row, and never
compares names. A new device is a row here, a folder in `ops/`, and rules in `machine/` and
`doctor/` if it has any (`docs/extending.md`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    """Facts about one kind of device.

    Attributes:
        name: the device's name in torch.
        backend: back end of torch.distributed for collectives between such devices.
        driver_files: glob below `/dev` of the files that the driver makes, one for each device;
            empty for the host's own processor.
        visible_variable: environment variable that chooses a process's devices by number; empty if
            there is none.
        block_size: default tokens in one block of the KV cache.
        base_bytes: memory of a rank before it loads anything: of the host, Python and torch; of a
            device, the runtime's context. A calibrated profile knows better.
        slack: share of a step's tensors that the allocator holds beside them. The C library keeps
            freed memory of tensors below 32 MB: measured with the geometry of 16B, two layers.
        recorded_bytes: memory of one recorded decode step beside its tensors; a guess.
        group_bytes: memory of a process group where its buffers have no size that we choose; a
            guess, for the doctor and the planner only: the engine measures it.
        has_graphs: whether decode steps can be recorded as graphs.
        is_host: whether the device is the host's processor: its memory is the host's, all ranks of
            a node share both, and operations have finished when their call returns.
        has_one_shot_sum: whether small all-reduces may take one kernel of our own
            (`moespan.parallel.one_shot`).
        has_group_buffers: whether every process group allocates buffers whose size we choose
            (`moespan.parallel.buffers`).
        draws_weights: whether random weights are drawn on the device; elsewhere the host draws
            them.
        samples_in_integers: whether tokens are drawn by running sums of integers. An NPU sums
            float64 and searches sorted values on a few slow cores (its AI CPU), not on its vector
            cores.
        host_cores_per_rank: fewest cores that one rank needs on the host.
        most_rows_with_drafts: rows of a decode step up to which drafts are added
            (`moespan.engine.drafts`); with more, products wait for arithmetic, not for weights.
        own_options: options of the engine that are refused on every device without them.
        half_options: those of `own_options` that take 16-bit dtypes only.
        timed_bytes: message sizes in bytes for which the doctor times an all-reduce.
    """

    name: str
    backend: str
    driver_files: str
    block_size: int
    base_bytes: int
    slack: float = 0.0
    recorded_bytes: int = 0
    group_bytes: int = 0
    visible_variable: str = ""
    has_graphs: bool = False
    is_host: bool = False
    has_one_shot_sum: bool = False
    has_group_buffers: bool = False
    draws_weights: bool = False
    samples_in_integers: bool = False
    host_cores_per_rank: int = 1
    most_rows_with_drafts: int = 256
    own_options: tuple[str, ...] = ()
    half_options: tuple[str, ...] = ()
    timed_bytes: tuple[int, ...] = (8 << 10, 1 << 20, 64 << 20)


_NPU_HALF_OPTIONS = (
    "moe_dispatch=fused",
    "npu_fused_all_reduce",
    "npu_maskless_decode",
    "npu_scatter_prefill",
    "npu_weight_format",
)
NPU = Device(
    name="npu",
    backend="hccl",
    driver_files="davinci[0-9]*",
    visible_variable="ASCEND_RT_VISIBLE_DEVICES",
    block_size=128,
    base_bytes=512 << 20,
    recorded_bytes=4 << 20,
    has_graphs=True,
    has_group_buffers=True,
    samples_in_integers=True,
    # torch_npu launches kernels from a thread of its own.
    host_cores_per_rank=2,
    own_options=(
        *_NPU_HALF_OPTIONS,
        "npu_aiv",
        "npu_hierarchical_dispatch",
        "npu_overlap_shared",
        "npu_update_first",
    ),
    half_options=_NPU_HALF_OPTIONS,
)
CUDA = Device(
    name="cuda",
    backend="nccl",
    driver_files="nvidia[0-9]*",
    visible_variable="CUDA_VISIBLE_DEVICES",
    block_size=32,
    base_bytes=512 << 20,
    recorded_bytes=4 << 20,
    group_bytes=256 << 20,
    has_graphs=True,
    has_one_shot_sum=True,
    draws_weights=True,
)
CPU = Device(
    name="cpu",
    backend="gloo",
    driver_files="",
    block_size=32,
    base_bytes=256 << 20,
    slack=1.4,
    is_host=True,
    most_rows_with_drafts=64,
    own_options=("batch_invariant", "weight_cache_gb"),
    timed_bytes=(8 << 10, 1 << 20, 8 << 20),
)

DEVICES = {device.name: device for device in (NPU, CUDA, CPU)}
"""All devices by name, in the order in which `auto` prefers them."""
