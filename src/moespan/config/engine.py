"""The engine's settings, and the nodes that it runs on."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass

from moespan.config.layout import Layout
from moespan.config.model import DTYPE_BYTES
from moespan.config.schemes import KV_CACHE_DTYPES, QUANTIZATIONS
from moespan.errors import ConfigError, LayoutError

DISPATCHES = ("auto", "replicated", "all_gather", "all_to_all", "fused")
WEIGHT_FORMATS = ("nd", "nz")

# No rank waits longer than this for another one inside a collective of the model.
COLLECTIVE_TIMEOUT_S = 600.0

_ONE_RANK = Layout()

ExpertTable = dict[str, list[list[int]]]
"""Layer number or `default` → for each ep rank, the experts that it holds."""


@dataclass(frozen=True)
class EngineConfig:
    """Everything that a rank needs to know to do its part. Plain values only: it travels as JSON.

    Attributes:
        model: checkpoint folder.
        layout: degree of parallelism on each axis.
        device: `cpu`, `cuda` or `npu`.
        dtype: of weights, activations and KV cache, unless the next two say otherwise.
        quantization: one of `QUANTIZATIONS` for matrices of few bits, made while loading from a
            checkpoint that has none; None for what the checkpoint holds. One that holds integers
            can be run as `int8` or `w8a8`: they are the same, and only what is done to activations
            differs.
        kv_cache_dtype: `auto` for `dtype`, or `int8`.
        load_format: `safetensors`, or `dummy` for deterministic random weights without a file.
        seed: of dummy weights and of requests that bring no seed of their own.
        max_model_len: most tokens of one sequence, prompt and output together.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: most tokens in one step; longer prompts are prefilled in chunks.
        block_size: tokens in one block of the KV cache.
        num_blocks: blocks of the KV cache; None sizes it from the free memory.
        enable_prefix_caching: whether finished blocks are kept and shared by equal prefixes.
        check_finite: look for NaN and Inf in every weight while loading.
        moe_dispatch: how tokens meet experts (`moespan.parallel.dispatch`).
        expert_placement: `contiguous`, `round_robin`, or a table
            (`moespan.checkpoint.experts`).
        bind: ranks to cores and NUMA nodes: `auto`, `off`, or `local rank:node,...`.
        enforce_eager: never run decode steps as recorded graphs (`moespan.engine.graphs`).
        npu_fused_all_reduce: from how many rows on a matmul and its all-reduce are one operator of
            an NPU (`moespan.parallel.fused`); 0 is never.
        cuda_one_shot_bytes: up to what size GPUs joined by NVLink sum over tp in one kernel
            instead of NCCL's (`moespan.parallel.one_shot`); 0 is never.
        npu_weight_format: how matrices lie in an NPU's memory: `nd`, row after row, or `nz`, in
            tiles of 16 × 16.
        async_scheduling: plan a step while the one before runs; None does so on devices that work
            apart from the host. With pipeline stages it changes nothing: they have a plan each.
    """

    model: str
    layout: Layout = _ONE_RANK
    device: str = "cpu"
    dtype: str = "bfloat16"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    load_format: str = "safetensors"
    seed: int = 0
    max_model_len: int = 4096
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 32
    num_blocks: int | None = None
    enable_prefix_caching: bool = True
    check_finite: bool = False
    moe_dispatch: str = "auto"
    expert_placement: str | ExpertTable = "contiguous"
    bind: str = "auto"
    enforce_eager: bool = False
    npu_fused_all_reduce: int = 0
    # Up to where c10d's IntraNodeComm takes the same kernel (kOneShotThreshBytes), and vLLM kernels
    # of its own among 8 H100s. `benchmarks/all_reduce.py` measures it.
    cuda_one_shot_bytes: int = 256 << 10
    npu_weight_format: str = "nd"
    async_scheduling: bool | None = None

    def __post_init__(self) -> None:
        choices = {
            "device": (self.device, ("cpu", "cuda", "npu")),
            "dtype": (self.dtype, tuple(DTYPE_BYTES)),
            "quantization": (self.quantization, (None, *QUANTIZATIONS)),
            "kv_cache_dtype": (self.kv_cache_dtype, KV_CACHE_DTYPES),
            "load_format": (self.load_format, ("safetensors", "dummy")),
            "moe_dispatch": (self.moe_dispatch, DISPATCHES),
            "npu_weight_format": (self.npu_weight_format, WEIGHT_FORMATS),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(str, allowed))}")
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        self._check_npu_options()
        if self.cuda_one_shot_bytes < 0:
            raise ConfigError(
                f"cuda_one_shot_bytes={self.cuda_one_shot_bytes} must be a number of bytes, or 0"
            )
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_seqs={self.max_num_seqs} exceeds "
                f"max_num_batched_tokens={self.max_num_batched_tokens}: a step could not hold one "
                "token of every sequence; lower the first or raise the second"
            )
        if self.num_blocks is not None and self.num_blocks < self.blocks_per_sequence:
            raise ConfigError(
                f"num_blocks={self.num_blocks} of {self.block_size} tokens cannot hold one "
                f"sequence of max_model_len={self.max_model_len}; use num_blocks >= "
                f"{self.blocks_per_sequence} or a shorter max_model_len"
            )

    def _check_npu_options(self) -> None:
        """What an NPU alone has, and only for 16-bit types."""
        if self.npu_fused_all_reduce < 0:
            raise ConfigError(
                f"npu_fused_all_reduce={self.npu_fused_all_reduce} must be a number of rows, or 0"
            )
        asked = {
            "moe_dispatch=fused": self.moe_dispatch == "fused",
            f"npu_fused_all_reduce={self.npu_fused_all_reduce}": self.npu_fused_all_reduce > 0,
            f"npu_weight_format={self.npu_weight_format}": self.npu_weight_format != "nd",
        }
        for option in (option for option, is_asked in asked.items() if is_asked):
            if self.device != "npu":
                raise ConfigError(f"{option} is for device=npu, not {self.device}; leave it out")
            if DTYPE_BYTES[self.dtype] != 2:
                raise ConfigError(
                    f"{option} takes float16 and bfloat16, not dtype={self.dtype}; leave it out"
                )

    @property
    def cache_dtype(self) -> str:
        """Of the KV cache: `dtype` or `int8`."""
        return self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    @property
    def plans_ahead(self) -> bool:
        """Whether a sequence may be in the next plan before the result of the last is back."""
        wanted = self.async_scheduling
        return self.layout.pp == 1 and (self.device != "cpu" if wanted is None else wanted)

    @property
    def most_steps_in_flight(self) -> int:
        """Steps that are planned before the result of the oldest of them is needed."""
        return 2 if self.plans_ahead else self.layout.pp

    @property
    def blocks_per_sequence(self) -> int:
        """Blocks that one sequence of `max_model_len` tokens takes."""
        return -(-self.max_model_len // self.block_size)


@dataclass(frozen=True)
class Nodes:
    """Which of the machines that run one job together this one is, and where they meet.

    Every node is started with the same settings but for its `node_rank`. It runs as many
    consecutive ranks as any other; node 0 has rank 0, the front, and the meeting point.

    Attributes:
        nnodes: machines that run the job.
        node_rank: this one's number, from 0.
        master_addr: address of node 0 that the others reach: the only one it listens on.
        master_port: port of the meeting point.
        join_timeout_s: most seconds that a node waits for the others to come.
        silence_s: after how many seconds without a word a node counts as lost.
    """

    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    join_timeout_s: float = 300.0
    silence_s: float = 10.0

    def __post_init__(self) -> None:
        if self.nnodes < 1:
            raise ConfigError(f"nnodes={self.nnodes} must be at least 1")
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(
                f"node_rank={self.node_rank} must be from 0 to {self.nnodes - 1}: one of "
                f"nnodes={self.nnodes}"
            )
        if not 1 <= self.master_port <= 65535:
            raise ConfigError(f"master_port={self.master_port} must be from 1 to 65535")
        if not self.master_addr or is_wildcard(self.master_addr):
            raise ConfigError(
                f"master_addr={self.master_addr!r} is refused: it means every network of the "
                "machine, and whoever reaches the meeting point could take part; give the one "
                "address of node 0 that the other nodes reach"
            )
        for name in ("join_timeout_s", "silence_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be a number above 0")

    @property
    def meeting_point(self) -> str:
        """Host and port as they are written together."""
        host = f"[{self.master_addr}]" if ":" in self.master_addr else self.master_addr
        return f"{host}:{self.master_port}"

    def ranks_per_node(self, layout: Layout) -> int:
        """Ranks that each node runs; raises `LayoutError` if they cannot be spread evenly."""
        ranks, left_over = divmod(layout.world_size, self.nnodes)
        if left_over:
            raise LayoutError(
                f"nnodes={self.nnodes} does not divide the {layout.world_size} ranks of {layout}; "
                "every node runs equally many, so use a layout with a multiple of "
                f"{self.nnodes} ranks, or another nnodes"
            )
        return ranks


def is_wildcard(address: str) -> bool:
    """Whether `address` is 0.0.0.0 or ::, in whatever spelling; a name is not."""
    try:
        return ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return False
