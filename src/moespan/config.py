"""What is run and how: the model's geometry, the layout, the engine's settings.

Typed, validated, and free of torch, so that everything which only plans or prints stays fast.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from moespan.errors import ConfigError, LayoutError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DISPATCHES = ("auto", "replicated", "all_gather", "all_to_all")

# No rank waits longer than this for another one inside a collective of the model.
COLLECTIVE_TIMEOUT_S = 600.0

ExpertTable = dict[str, list[list[int]]]
"""Layer number or `default` → for each ep rank, the experts that it holds."""


@dataclass(frozen=True)
class ModelConfig:
    """Geometry and numerics of one DeepSeek-MoE model (HF `model_type: deepseek`).

    Field names are those of the Hugging Face `config.json`; the defaults of the optional ones are
    those of its `DeepseekConfig`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    moe_intermediate_size: int = 0
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int = 0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_linear_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ModelConfig:
        """Read `config.json` (and the EOS ids of `generation_config.json`) in a checkpoint folder.

        Raises:
            ConfigError: the file is missing or not JSON, or names something not implemented.
        """
        raw = read_json(Path(path) / "config.json")
        generation = Path(path) / "generation_config.json"
        if generation.exists():
            eos = read_json(generation).get("eos_token_id")
            raw = {**raw, "eos_token_id": eos if eos is not None else raw.get("eos_token_id")}
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Build from the contents of an HF `config.json`; `auto_map` (remote code) is ignored.

        Raises:
            ConfigError: a key is missing, ill-typed, or asks for what is not implemented.
        """
        _refuse_unsupported(raw)
        heads = _integer(raw, "num_attention_heads")
        # HF: null means "no experts", and null KV heads mean as many as query heads.
        experts = _optional_integer(raw, "n_routed_experts")
        config = cls(
            vocab_size=_integer(raw, "vocab_size"),
            hidden_size=_integer(raw, "hidden_size"),
            intermediate_size=_integer(raw, "intermediate_size"),
            num_hidden_layers=_integer(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_optional_integer(raw, "num_key_value_heads") or heads,
            moe_intermediate_size=_integer(raw, "moe_intermediate_size") if experts else 0,
            n_routed_experts=experts,
            n_shared_experts=_optional_integer(raw, "n_shared_experts") if experts else None,
            num_experts_per_tok=_integer(raw, "num_experts_per_tok") if experts else 0,
            first_k_dense_replace=_integer(raw, "first_k_dense_replace", default=0, least=0),
            moe_layer_freq=_integer(raw, "moe_layer_freq", default=1),
            norm_topk_prob=_boolean(raw, "norm_topk_prob"),
            attention_bias=_boolean(raw, "attention_bias"),
            tie_word_embeddings=_boolean(raw, "tie_word_embeddings"),
            max_position_embeddings=_integer(raw, "max_position_embeddings", default=2048),
            rope_theta=_number(raw, "rope_theta", default=10000.0),
            rope_linear_factor=_rope_linear_factor(raw),
            rms_norm_eps=_number(raw, "rms_norm_eps", default=1e-6),
            dtype=_dtype(raw),
            eos_token_ids=_eos_token_ids(raw),
        )
        config._check()
        if raw.get("head_dim") not in (None, config.head_dim):
            raise ConfigError(
                f"head_dim={raw['head_dim']!r} other than hidden_size/num_attention_heads="
                f"{config.head_dim} is not implemented"
            )
        return config

    def _check(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"head size hidden_size/num_attention_heads={self.head_dim} is odd; "
                "rotary embedding needs an even one"
            )
        if heads % kv_heads:
            raise ConfigError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
            )
        if self.n_routed_experts and self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds "
                f"n_routed_experts={self.n_routed_experts}"
            )

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared-expert MLP; 0 when there is none."""
        return (self.n_shared_experts or 0) * self.moe_intermediate_size

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` (from 0) has routed experts instead of a dense MLP."""
        return (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )

    @property
    def num_moe_layers(self) -> int:
        """How many layers have routed experts."""
        return sum(self.is_moe(layer) for layer in range(self.num_hidden_layers))

    def kv_bytes_per_token(self, dtype: str | None = None) -> int:
        """Bytes of KV cache that one token takes over all layers and heads."""
        elements = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim
        return elements * DTYPE_BYTES[dtype or self.dtype]


# Ways out that one error names.
_MOST_ADVICE = 6


@dataclass(frozen=True)
class Coordinates:
    """Where one rank stands in a layout: its place along each axis."""

    pp: int
    dp: int
    sp: int
    tp: int


@dataclass(frozen=True)
class Layout:
    """Degree of parallelism on each axis. Ranks are laid out as (pp, dp, sp, tp), tp fastest.

    Attributes:
        tp: tensor parallelism: heads, MLP widths and the vocabulary are split; tokens replicated.
        ep: expert parallelism: whole routed experts are spread over the ranks of a stage. Either it
            divides tp, and each expert is cut over tp/ep ranks, or it is tp·k with k dividing
            sp·dp.
        pp: pipeline parallelism: layers are split into stages.
        sp: sequence parallelism (Ulysses): the tokens of a step are split; attention is by heads.
        dp: data parallelism: sequences are split over replicas.
        pipeline_layers: layers of each stage; None cuts by cost (`stages`).
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1
    sp: int = 1
    dp: int = 1
    pipeline_layers: tuple[int, ...] | None = None

    AXES: ClassVar = ("tp", "ep", "pp", "sp", "dp")

    def __post_init__(self) -> None:
        for axis, size in self.sizes.items():
            if size < 1:
                raise LayoutError(f"{axis}={size} must be at least 1")

    def __str__(self) -> str:
        parts = [f"{axis}={size}" for axis, size in self.sizes.items() if size > 1]
        return "×".join(parts) or "tp=1"

    @classmethod
    def make(
        cls,
        config: ModelConfig,
        *,
        tensor_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        sequence_parallel_size: int = 1,
        data_parallel_size: int = 1,
        enable_expert_parallel: bool = False,
        pipeline_layers: Sequence[int] | None = None,
    ) -> Layout:
        """A layout that fits the model, by the long names of the axes.

        Args:
            enable_expert_parallel: take the largest ep that the other axes allow.

        Raises:
            LayoutError: it does not fit.
        """
        layout = cls(
            tensor_parallel_size,
            expert_parallel_size,
            pipeline_parallel_size,
            sequence_parallel_size,
            data_parallel_size,
            None if pipeline_layers is None else tuple(pipeline_layers),
        )
        if enable_expert_parallel:
            layout = replace(layout, ep=max(layout._usable("ep", config), default=layout.ep))
        layout.check(config)
        return layout

    @property
    def sizes(self) -> dict[str, int]:
        """Axis → degree."""
        return {axis: getattr(self, axis) for axis in self.AXES}

    @property
    def world_size(self) -> int:
        """Number of ranks; ep adds none."""
        return self.pp * self.stage_size

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.dp * self.sp * self.tp

    @property
    def expert_slices(self) -> int:
        """How many parts each expert's width is cut into."""
        return self.tp // self.ep if self.ep < self.tp else 1

    @property
    def ep_blocks(self) -> int:
        """How many tp blocks, each with tokens of its own, one set of experts is spread over."""
        return max(self.ep // self.tp, 1)

    def coordinates(self, rank: int) -> Coordinates:
        """The place of `rank` (taken modulo the world) along each axis."""
        rank, tp = divmod(rank, self.tp)
        rank, sp = divmod(rank, self.sp)
        rank, dp = divmod(rank, self.dp)
        return Coordinates(rank % self.pp, dp, sp, tp)

    def rank(self, at: Coordinates) -> int:
        """The rank at a place; the inverse of `coordinates`."""
        return ((at.pp * self.dp + at.dp) * self.sp + at.sp) * self.tp + at.tp

    def ep_rank(self, rank: int) -> int:
        """Which of the ep sets of experts `rank` holds."""
        at = self.coordinates(rank)
        if self.ep < self.tp:
            return at.tp // self.expert_slices
        return (at.dp * self.sp + at.sp) % self.ep_blocks * self.tp + at.tp

    def stages(self, config: ModelConfig) -> list[range]:
        """The layers of each stage."""
        lengths = self.pipeline_layers or balanced_stages(config, self.pp)
        ends = list(itertools.accumulate(lengths))
        return [range(end - length, end) for end, length in zip(ends, lengths, strict=True)]

    def check(self, config: ModelConfig) -> None:
        """Raise `LayoutError` if the model cannot be cut this way, naming the layouts that work.

        Widths and vocabularies need no rule: they are padded with zeros, which is exact.
        """
        for problem, axes in self._broken_rules(config):
            advice = [
                f"{axis}={', '.join(map(str, usable))}"
                for axis in axes
                if (usable := sorted(self._usable(axis, config)[:_MOST_ADVICE]))
            ]
            raise LayoutError(problem + (f"; use {' or '.join(advice)}" if advice else ""))

    def _broken_rules(self, config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each broken rule, and the axes of which one can be changed to mend it."""
        for name, cut in (("tp", self.tp), ("tp·sp", self.tp * self.sp)):
            axes = ("tp",) if name == "tp" else ("tp", "sp")
            heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
            if heads % cut:
                yield f"{name}={cut} does not divide num_attention_heads={heads}", axes
            elif kv_heads % cut and cut % kv_heads:
                yield (
                    f"{name}={cut} and num_key_value_heads={kv_heads} do not divide one another",
                    axes,
                )
        experts = config.n_routed_experts or 0
        if self.ep > 1 and not experts:
            yield f"ep={self.ep}, but the model has no routed experts", ("ep",)
        elif self.ep > 1 and self.ep > experts:
            yield f"ep={self.ep} exceeds n_routed_experts={experts}", ("ep",)
        elif self.tp % self.ep and (self.ep % self.tp or self.sp * self.dp % self.ep_blocks):
            yield (
                f"ep={self.ep} neither divides tp={self.tp} nor is tp times a divisor of "
                f"sp·dp={self.sp * self.dp}",
                ("ep",),
            )
        layers = config.num_hidden_layers
        if self.pp > layers:
            yield (
                f"pp={self.pp} exceeds num_hidden_layers={layers}: a stage would be empty",
                ("pp",),
            )
        if self.pipeline_layers is not None:
            given = ",".join(map(str, self.pipeline_layers))
            if len(self.pipeline_layers) != self.pp:
                stages = len(self.pipeline_layers)
                yield f"pipeline_layers={given} has {stages} stages, not pp={self.pp}", ()
            elif min(self.pipeline_layers) < 1 or sum(self.pipeline_layers) != layers:
                yield (
                    f"pipeline_layers={given} must be positive and sum to "
                    f"num_hidden_layers={layers}",
                    (),
                )

    def _usable(self, axis: str, config: ModelConfig) -> list[int]:
        """The sizes of `axis` that fit while the other axes stay, nearest first."""
        most = max(config.num_attention_heads, config.num_hidden_layers, self.stage_size)
        sizes = [
            size
            for size in range(1, most + 1)
            if not any(self._with(axis, size)._broken_rules(config))
        ]
        return sorted(sizes, key=lambda size: abs(size - getattr(self, axis)))

    def _with(self, axis: str, size: int) -> Layout:
        change: dict[str, Any] = {axis: size}
        return replace(self, **change)

    @property
    def dispatches(self) -> tuple[str, ...]:
        """How tokens can meet experts here, the default first (`moespan.parallel.dispatch`)."""
        return ("replicated",) if self.ep_blocks == 1 else ("all_gather", "all_to_all")

    def check_dispatch(self, dispatch: str) -> None:
        """Raise `LayoutError` if `dispatch`, unless it is `auto`, does not apply here."""
        if dispatch not in ("auto", *self.dispatches):
            raise LayoutError(
                f"moe_dispatch={dispatch} does not apply to layout {self}; use auto or "
                f"{' or '.join(self.dispatches)}"
            )


def all_layouts(world_size: int, config: ModelConfig) -> list[Layout]:
    """Every layout of `world_size` ranks that the model can be cut into."""
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    return [
        layout
        for tp, pp, sp, dp in itertools.product(divisors, repeat=4)
        if tp * pp * sp * dp == world_size
        for ep in divisors
        if not any((layout := Layout(tp, ep, pp, sp, dp))._broken_rules(config))
    ]


# A decode step of this many sequences is what stages are balanced for: it reads nearly all experts,
# as every larger step does, and still reads each weight for few tokens.
_BALANCED_TOKENS = 32


def balanced_stages(config: ModelConfig, pp: int) -> list[int]:
    """Layers of each of `pp` stages such that the costliest stage costs the least.

    A layer costs the weights that a decode step of 32 sequences reads: of E experts, of which a
    token chooses K, E·(1 − (1 − K/E)^32) on average. The head counts as part of the last layer.
    Of cuts that are equal in this the evenest is taken.
    """
    costs = [_layer_cost(config, layer) for layer in range(config.num_hidden_layers)]
    costs[-1] += config.vocab_size * config.hidden_size
    sums = [0.0, *itertools.accumulate(costs)]
    # (cost of the costliest stage, sum of squares, lengths) of the best cut of the first layers.
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for _ in range(pp):
        longer = [
            (end, max(worst, cost), squares + cost**2, [*lengths, end - start])
            for start, (worst, squares, lengths) in best.items()
            for end in range(start + 1, len(sums))
            for cost in [sums[end] - sums[start]]
        ]
        best = {
            end: min(cut[1:] for cut in cuts)
            for end, cuts in itertools.groupby(sorted(longer), key=lambda cut: cut[0])
        }
    return best[len(costs)][2]


def _layer_cost(config: ModelConfig, layer: int) -> float:
    head_width = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    cost = float(config.hidden_size * head_width)
    if not config.is_moe(layer):
        return cost + 3 * config.hidden_size * config.intermediate_size
    experts = config.n_routed_experts or 0
    idle_share = (1 - config.num_experts_per_tok / experts) ** _BALANCED_TOKENS
    read = experts * (1 - idle_share) * config.moe_intermediate_size
    return cost + 3 * config.hidden_size * (read + config.shared_intermediate_size)


@dataclass(frozen=True)
class EngineConfig:
    """Everything that a rank needs to know to do its part. Plain values only: it travels as JSON.

    Attributes:
        model: checkpoint folder.
        layout: degree of parallelism on each axis.
        device: `cpu`, `cuda` or `npu`.
        dtype: of weights, activations and KV cache.
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
    """

    model: str
    layout: Layout = Layout()
    device: str = "cpu"
    dtype: str = "bfloat16"
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

    def __post_init__(self) -> None:
        choices = {
            "device": (self.device, ("cpu", "cuda", "npu")),
            "dtype": (self.dtype, tuple(DTYPE_BYTES)),
            "load_format": (self.load_format, ("safetensors", "dummy")),
            "moe_dispatch": (self.moe_dispatch, DISPATCHES),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`.

    Raises:
        ConfigError: the file is missing, unreadable, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; is {path.parent} a checkpoint folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Refuse by name whatever would change the model's function and is not implemented."""
    implemented = {"model_type": "deepseek", "scoring_func": "softmax", "hidden_act": "silu"}
    for key, value in implemented.items():
        found = raw.get(key, None if key == "model_type" else value)
        if found != value:
            raise ConfigError(f"{key}={found!r} is not implemented; only {value!r} is")
    must_be_absent = {
        "quantization_config": None,
        "routed_scaling_factor": 1.0,
        "rope_parameters": None,
    }
    for key, neutral in must_be_absent.items():
        if raw.get(key) not in (None, neutral):
            raise ConfigError(f"{key}={raw[key]!r} is not implemented")


def _rope_linear_factor(raw: Mapping[str, Any]) -> float:
    scaling = raw.get("rope_scaling")
    if scaling is None:
        return 1.0
    if not isinstance(scaling, dict):
        raise ConfigError(f"rope_scaling={scaling!r} must be null or an object")
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind == "default":
        return 1.0
    if kind != "linear":
        raise ConfigError(f"rope_scaling type {kind!r} is not implemented; only 'linear' is")
    return _number(scaling, "factor")


def _dtype(raw: Mapping[str, Any]) -> str:
    dtype = str(raw.get("torch_dtype") or raw.get("dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"torch_dtype={dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    return dtype


def _eos_token_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    value = raw.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if any(isinstance(id_, bool) or not isinstance(id_, int) or id_ < 0 for id_ in ids):
        raise ConfigError(f"eos_token_id={value!r} must be a token id or a list of them")
    return tuple(ids)


def _integer(raw: Mapping[str, Any], key: str, default: int | None = None, least: int = 1) -> int:
    value = raw.get(key, default)
    if value is None:
        raise ConfigError(f"config.json has no {key}")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{key}={value!r} must be an integer of at least {least}")
    return value


def _optional_integer(raw: Mapping[str, Any], key: str) -> int | None:
    return None if raw.get(key) is None else _integer(raw, key)


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ConfigError(f"{key}={value!r} must be a number above 0")
    return float(value)


def _boolean(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{key}={value!r} must be true or false")
    return bool(value)
