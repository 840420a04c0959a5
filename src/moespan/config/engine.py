"""The engine's options, and the configuration that every rank gets. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from moespan.config.layout import Layout
from moespan.config.model import DTYPE_BYTES, ModelConfig
from moespan.config.schemes import KV_CACHE_DTYPES, QUANTIZATIONS
from moespan.device import DEVICES
from moespan.errors import ConfigError, shown

DISPATCHES = ("auto", "replicated", "all_gather", "all_to_all", "fused")
WEIGHT_FORMATS = ("nd", "nz")

COLLECTIVE_TIMEOUT_S = 600.0
"""Longest time in seconds that a rank waits for another one inside a collective of the model."""

_ONE_RANK = Layout()

ExpertTable = dict[str, list[list[int]]]
"""Layer number or `default` → for each ep rank, the experts that it holds."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The options that reach the ranks exactly as the user gives them.

    This is the only place that declares, documents and checks them. `Settings` (the options of a
    user) and `EngineConfig` (the configuration of a rank) both inherit them.

    Attributes:
        quantization: scheme in which matrices are held, one of `QUANTIZATIONS`. A checkpoint of
            floats is quantised while it is loaded. None keeps the form of the checkpoint. `int8`
            and `int4` hold weights as integers; `w8a8` (integers) and `fp8` (floats) also round the
            activations that multiply them. A checkpoint of 8-bit integers runs as `int8` or `w8a8`.
        kv_cache_dtype: dtype of the KV cache: `auto` for the engine's dtype, or `int8`.
        max_num_batched_tokens: most tokens in one step; longer prompts are prefilled in chunks.
        num_blocks: blocks of the KV cache; None sizes the cache from the free memory.
        memory_reserve: share of a device's memory, or of the host's, that stays free when the cache
            is sized. Weights, activations and graphs are counted beside it.
        enable_prefix_caching: whether finished blocks are kept and shared by equal prefixes.
        moe_dispatch: how tokens reach experts on other ranks (`moespan.parallel.dispatch`).
        seed: seed of dummy weights, and of the requests that bring no seed of their own.
        check_finite: look for NaN and Inf in every weight while loading.
        batch_invariant: whether the tokens of a request must be the same whatever else its steps
            compute: alone, in any batch, in any prefill chunks. For bfloat16 on CPUs.
        weight_cache_gb: most GB of disk for packed weights that a start keeps, and later starts of
            the same model on the same kind of processor map instead of loading
            (`moespan.ops.cpu.weight_cache`); 0 for none.
        bind: cores and NUMA node of each rank: `auto`, `off`, or a map `local rank:node,...`. For
            one rank in the user's own process `auto` binds nothing.
        enforce_eager: never run decode steps as recorded graphs (`moespan.engine.graphs`).
        async_scheduling: plan a step while the previous one runs. None does so on devices that
            compute apart from the host. With pp > 1 each stage has a plan in flight in any case.
        speculative_tokens: most tokens of a sequence that a step computes beside its last one, as
            drafts of what comes next, copied from its own text (`moespan.engine.drafts`); 0 for
            none. They never change a token.
        expert_stats: count the tokens of each expert and layer, for `LLM.expert_counts` and the
            server's heat map.
        step_timeout_s: seconds without progress of any rank after which a step counts as hanging,
            and the job ends (`moespan.launch.stall`). The first step of each kind, which may
            compile kernels, has five times as long. Only ranks that moespan starts are watched.
        npu_fused_all_reduce: fewest rows for which an NPU runs a matmul and its all-reduce as one
            operator (`moespan.parallel.fused`); 0 for never.
        npu_weight_format: how matrices lie in an NPU's memory: `nd`, row after row, or `nz`, in
            tiles of 16 × 16.
        npu_aiv: whether small collectives between NPUs run on their vector cores
            (`HCCL_OP_EXPANSION_MODE=AIV`), where the rules of HCCL allow it
            (`moespan.machine.hccl`).
        npu_update_first: whether the lengths in a recorded decode step are updated before its
            replay, instead of while it runs.
        npu_maskless_decode: whether attention of a decode step gets no mask on an NPU, which
            selects another kernel of CANN 9.1.
        npu_hierarchical_dispatch: whether `moe_dispatch=fused` sends tokens to another server once,
            and spreads them there (`comm_alg=hierarchy`), instead of once for each expert.
        npu_scatter_prefill: fewest tokens of a step whose keys and values an NPU writes by two
            calls of `npu_scatter_nd_update_` instead of one `npu_scatter_pa_kv_cache`; 0 for never.
        npu_overlap_shared: whether an NPU runs shared experts on a second stream, beside the
            dispatch and the routed experts.
        cuda_one_shot_bytes: largest message in bytes that GPUs joined by NVLink sum over tp in one
            kernel instead of NCCL's (`moespan.parallel.one_shot`); 0 for never.
    """

    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_num_batched_tokens: int = 2048
    num_blocks: int | None = None
    memory_reserve: float = 0.03
    enable_prefix_caching: bool = True
    moe_dispatch: str = "auto"
    seed: int = 0
    check_finite: bool = False
    batch_invariant: bool = False
    weight_cache_gb: float = 0.0
    bind: str = "auto"
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    speculative_tokens: int = 0
    expert_stats: bool = False
    step_timeout_s: float = 120.0
    npu_fused_all_reduce: int = 0
    npu_weight_format: str = "nd"
    npu_aiv: bool = False
    npu_update_first: bool = False
    npu_maskless_decode: bool = False
    npu_hierarchical_dispatch: bool = False
    npu_scatter_prefill: int = 0
    npu_overlap_shared: bool = False
    # c10d's IntraNodeComm takes the same kernel up to this size (kOneShotThreshBytes), and vLLM
    # takes its own kernel up to this size among 8 H100s. `benchmarks/all_reduce.py` measures it.
    cuda_one_shot_bytes: int = 256 << 10

    def __post_init__(self) -> None:
        check_choice("quantization", self.quantization, (None, *QUANTIZATIONS))
        check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        check_choice("moe_dispatch", self.moe_dispatch, DISPATCHES)
        check_choice("npu_weight_format", self.npu_weight_format, WEIGHT_FORMATS)
        check_positive("max_num_batched_tokens", self.max_num_batched_tokens)
        if not 0 <= self.memory_reserve < 1:
            raise ConfigError(
                f"memory_reserve={self.memory_reserve} must be a share from 0 to below 1, such as "
                "0.03"
            )
        if not 0 < self.step_timeout_s <= COLLECTIVE_TIMEOUT_S:
            raise ConfigError(
                f"step_timeout_s={self.step_timeout_s} must be above 0 and at most "
                f"{COLLECTIVE_TIMEOUT_S:g}, since collectives themselves wait no longer"
            )
        for name, unit in (
            ("npu_fused_all_reduce", "rows"),
            ("npu_scatter_prefill", "tokens"),
            ("speculative_tokens", "tokens"),
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be a number of {unit}, or 0")
        if self.npu_hierarchical_dispatch and self.moe_dispatch != "fused":
            raise ConfigError(
                "npu_hierarchical_dispatch is for moe_dispatch=fused, not "
                f"{self.moe_dispatch}; use moe_dispatch=fused, or leave it out"
            )
        if self.npu_overlap_shared and self.npu_fused_all_reduce:
            raise ConfigError(
                "npu_overlap_shared does not go with npu_fused_all_reduce, whose operator ends the "
                "shared experts only after the routed ones; leave one of them out"
            )
        if not 0 <= self.weight_cache_gb < float("inf"):
            raise ConfigError(
                f"weight_cache_gb={self.weight_cache_gb} must be a number of gigabytes, or 0"
            )
        if self.cuda_one_shot_bytes < 0:
            raise ConfigError(
                f"cuda_one_shot_bytes={self.cuda_one_shot_bytes} must be a number of bytes, or 0"
            )


@dataclass(frozen=True)
class EngineConfig(EngineOptions):
    """Everything that a rank needs to know to do its part. It is sent as JSON: plain values only.

    Attributes:
        model: checkpoint folder.
        layout: degree of parallelism on each axis.
        device: a name in `moespan.device.DEVICES`.
        dtype: dtype of weights, activations and KV cache, unless `quantization` or
            `kv_cache_dtype` says otherwise.
        load_format: `safetensors`, or `dummy` for deterministic random weights without a file.
        max_model_len: most tokens of one sequence, prompt and output together.
        max_num_seqs: most sequences in one step.
        block_size: tokens in one block of the KV cache.
        expert_placement: `contiguous`, `round_robin`, or a table (`moespan.checkpoint.experts`).
    """

    model: str
    layout: Layout = _ONE_RANK
    device: str = "cpu"
    dtype: str = "bfloat16"
    load_format: str = "safetensors"
    max_model_len: int = 4096
    max_num_seqs: int = 64
    block_size: int = 32
    expert_placement: str | ExpertTable = "contiguous"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("device", self.device, tuple(DEVICES))
        check_choice("dtype", self.dtype, tuple(DTYPE_BYTES))
        check_choice("load_format", self.load_format, ("safetensors", "dummy"))
        for name in ("max_model_len", "max_num_seqs", "block_size"):
            check_positive(name, getattr(self, name))
        self._check_device_options()
        self._check_batch_invariant()
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_seqs={self.max_num_seqs} exceeds "
                f"max_num_batched_tokens={self.max_num_batched_tokens}: a step could not hold one "
                "token of every sequence; lower the first or raise the second"
            )
        if self.speculative_tokens and self.speculative_tokens >= self.max_num_seqs:
            raise ConfigError(
                f"speculative_tokens={self.speculative_tokens} must be below max_num_seqs="
                f"{self.max_num_seqs}: a step has so many rows for sequences and their drafts; "
                "lower the first or raise the second"
            )
        if self.num_blocks is not None and self.num_blocks < self.blocks_per_sequence:
            raise ConfigError(
                f"num_blocks={self.num_blocks} of {self.block_size} tokens cannot hold one "
                f"sequence of max_model_len={self.max_model_len}; use num_blocks >= "
                f"{self.blocks_per_sequence} or a shorter max_model_len"
            )

    def _check_device_options(self) -> None:
        """Refuse options that only other devices have, or that need a 16-bit dtype."""
        for option in {name: None for one in DEVICES.values() for name in one.own_options}:
            field, _, value = option.partition("=")
            given = getattr(self, field)
            if str(given) != value if value else given == getattr(EngineOptions, field):
                continue
            shown = f"{field}={given}"
            takers = [one for one in DEVICES.values() if option in one.own_options]
            if self.device not in [one.name for one in takers]:
                raise ConfigError(
                    f"{shown} is for device={' or '.join(one.name for one in takers)}, not "
                    f"{self.device}; leave it out"
                )
            if DTYPE_BYTES[self.dtype] != 2 and option in DEVICES[self.device].half_options:
                raise ConfigError(
                    f"{shown} takes float16 and bfloat16, not dtype={self.dtype}; leave it out"
                )

    def _check_batch_invariant(self) -> None:
        """Refuse dtypes and layouts in which the rows of a step change each other's rounding."""
        if not self.batch_invariant:
            return
        if self.dtype != "bfloat16":
            raise ConfigError(
                f"batch_invariant is for dtype=bfloat16, not {self.dtype}; leave it out"
                + (": float32 gives the same tokens without it" if self.dtype == "float32" else "")
            )
        layout = self.layout
        if layout.tp > 2 or layout.sp > 1 or layout.tp % layout.ep:
            raise ConfigError(
                f"batch_invariant does not go with {layout}: sums over more than two ranks may add "
                "in an order that depends on the number of rows; use tp=1 or tp=2, sp=1, ep=1 or "
                "ep=tp, and any pp and dp"
            )
        if isinstance(self.expert_placement, dict) and layout.ep > 1:
            raise ConfigError(
                "batch_invariant with ep > 1 is for expert_placement=contiguous or round_robin, "
                "not a table: the place of a row would decide which copy of an expert computes it"
            )

    def check(self, model: ModelConfig) -> None:
        """Raise if `model` cannot run this way.

        Raises:
            LayoutError: the layout does not fit the model, or the dispatch the layout.
            ConfigError: `max_model_len` exceeds the model's limit, or there are no experts to
                count.
        """
        self.layout.check(model)
        self.layout.check_dispatch(self.moe_dispatch)
        if self.expert_stats and not model.num_moe_layers:
            raise ConfigError("expert_stats: the model has no routed experts; leave it out")
        if self.max_model_len > model.max_position_embeddings:
            raise ConfigError(
                f"max_model_len={self.max_model_len} exceeds the model's "
                f"max_position_embeddings={model.max_position_embeddings}"
            )

    @property
    def cache_dtype(self) -> str:
        """Dtype of the KV cache: `dtype` or `int8`."""
        return self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    @property
    def plans_ahead(self) -> bool:
        """Whether a sequence may be in the next plan before its previous result is back."""
        wanted = self.async_scheduling
        if wanted is None:
            wanted = not DEVICES[self.device].is_host
        return self.layout.pp == 1 and wanted

    @property
    def most_steps_in_flight(self) -> int:
        """Steps that are planned before the result of the oldest of them is needed."""
        return 2 if self.plans_ahead else self.layout.pp

    @property
    def most_rows_with_drafts(self) -> int:
        """Sequences and drafts of a step, up to which drafts are added."""
        return min(self.max_num_seqs, DEVICES[self.device].most_rows_with_drafts)

    @property
    def graph_sizes(self) -> list[int]:
        """Numbers of sequences to which decode steps are padded and recorded; none where steps are
        not recorded."""
        if self.enforce_eager or not DEVICES[self.device].has_graphs:
            return []
        return padded_sizes(self.max_num_seqs)

    @property
    def blocks_per_sequence(self) -> int:
        """Blocks that one sequence of `max_model_len` tokens takes."""
        return -(-self.max_model_len // self.block_size)


# Each graph takes streams for each communicator of the device, which has few streams.
_MOST_SIZES = 40
_SIZE_STEP = 8


def padded_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, and multiples of 8, or of more if these are too many, until all sequences fit."""
    step = -(-max_num_seqs // (_SIZE_STEP * (_MOST_SIZES - 3))) * _SIZE_STEP
    small = [1, 2, 4, *([_SIZE_STEP] if step > _SIZE_STEP else [])]
    sizes = [*small, *range(step, max_num_seqs + step, step)]
    fitting = next(i for i, size in enumerate(sizes) if size >= max_num_seqs)
    return sizes[: fitting + 1]


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{name}={shown(value)} is not one of {', '.join(map(str, allowed))}")


def check_positive(name: str, value: int) -> None:
    """Raise `ConfigError` unless `value` is at least 1."""
    if value < 1:
        raise ConfigError(f"{name}={value} must be at least 1")
