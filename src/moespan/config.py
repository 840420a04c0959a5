"""What is run and how: the model's geometry, the layout, the engine's settings.

Typed, validated, and free of torch, so that everything which only plans or prints stays fast.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moespan.errors import ConfigError, LayoutError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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


@dataclass(frozen=True)
class Layout:
    """Degree of parallelism on each axis.

    tp: tensor parallelism: heads, MLP widths and the vocabulary are split, tokens are replicated.
    """

    tp: int = 1

    def __post_init__(self) -> None:
        for axis, size in dataclasses.asdict(self).items():
            if size < 1:
                raise LayoutError(f"{axis}={size} must be at least 1")

    def __str__(self) -> str:
        return "×".join(f"{axis}={size}" for axis, size in dataclasses.asdict(self).items())

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp

    def check(self, config: ModelConfig) -> None:
        """Raise `LayoutError` if the model cannot be cut this way, naming the layouts that work.

        Widths and vocabularies need no rule: they are padded with zeros, which is exact.
        """
        usable = [tp for tp in range(1, config.num_attention_heads + 1) if _tp_fits(tp, config)]
        if self.tp not in usable:
            rule = (
                f"does not divide num_attention_heads={config.num_attention_heads}"
                if config.num_attention_heads % self.tp
                else f"and num_key_value_heads={config.num_key_value_heads} do not divide "
                "one another"
            )
            raise LayoutError(
                f"tp={self.tp} {rule}; use one of {', '.join(str(tp) for tp in usable)}"
            )


def _tp_fits(tp: int, config: ModelConfig) -> bool:
    kv_heads = config.num_key_value_heads
    return config.num_attention_heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)


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

    def __post_init__(self) -> None:
        choices = {
            "device": (self.device, ("cpu", "cuda", "npu")),
            "dtype": (self.dtype, tuple(DTYPE_BYTES)),
            "load_format": (self.load_format, ("safetensors", "dummy")),
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
    except (OSError, ValueError) as error:
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
