"""Geometry and numerics of a model, read from a Hugging Face `config.json`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moespan import files
from moespan.config.schemes import SCALE_BYTES, QuantizationConfig
from moespan.errors import ConfigError, shown

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# The largest values that are read. Plans take time and memory in proportion to some of them, and a
# product of any two still fits 64 bits. The largest published models have a tenth or less.
_MOST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 22,
    "moe_intermediate_size": 1 << 22,
    "num_hidden_layers": 512,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "n_routed_experts": 1 << 12,
    "n_shared_experts": 1024,
    "num_experts_per_tok": 1 << 12,
    "max_position_embeddings": 1 << 28,
}
_MOST_BY_DEFAULT = 1 << 31
_MOST_EXPERTS_OF_ALL_LAYERS = 1 << 14
_MOST_EOS_TOKENS = 1024


@dataclass(frozen=True)
class ModelConfig:
    """Geometry and numerics of one DeepSeek-MoE model (HF `model_type: deepseek`).

    Fields have the names of the Hugging Face `config.json`. Optional fields have the defaults of
    Hugging Face's `DeepseekConfig`.

    Attributes:
        quantization: matrices that the checkpoint holds in 8 or 4 bits; None if it holds floats.
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
    quantization: QuantizationConfig | None = None

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ModelConfig:
        """Read `config.json` (and the EOS ids of `generation_config.json`) in a checkpoint folder.

        Raises:
            ConfigError: the file is missing, is not JSON, or asks for something that is not
                implemented.
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
            ConfigError: a key is missing or ill-typed, or asks for something that is not
                implemented.
        """
        _refuse_unsupported(raw)
        heads = _integer(raw, "num_attention_heads")
        # In HF, null routed experts mean a dense model, and null KV heads mean as many as query
        # heads.
        experts = _optional_integer(raw, "n_routed_experts")
        rope_theta, rope_linear_factor = _rope(raw)
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
            rope_theta=rope_theta,
            rope_linear_factor=rope_linear_factor,
            rms_norm_eps=_number(raw, "rms_norm_eps", default=1e-6),
            dtype=_dtype(raw),
            eos_token_ids=_eos_token_ids(raw),
            quantization=_quantization(raw),
        )
        config._check()
        if raw.get("head_dim") not in (None, config.head_dim):
            raise ConfigError(
                f"head_dim={shown(raw['head_dim'])} other than hidden_size/num_attention_heads="
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
        if (self.n_routed_experts or 0) * self.num_hidden_layers > _MOST_EXPERTS_OF_ALL_LAYERS:
            raise ConfigError(
                f"n_routed_experts={self.n_routed_experts} in num_hidden_layers="
                f"{self.num_hidden_layers} are too many; at most {_MOST_EXPERTS_OF_ALL_LAYERS} "
                "experts of all layers are read"
            )

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared-expert MLP; 0 without shared experts."""
        return (self.n_shared_experts or 0) * self.moe_intermediate_size

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` (counted from 0) has routed experts instead of a dense MLP."""
        return (
            self.n_routed_experts is not None
            and layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
        )

    @property
    def num_moe_layers(self) -> int:
        """Number of layers that have routed experts."""
        return sum(self.is_moe(layer) for layer in range(self.num_hidden_layers))

    def kv_bytes_per_token(self, dtype: str | None = None) -> int:
        """Bytes of KV cache that one token takes over all layers and heads."""
        heads = 2 * self.num_hidden_layers * self.num_key_value_heads
        return heads * self.kv_bytes_per_head(dtype or self.dtype)

    def kv_bytes_per_head(self, dtype: str) -> int:
        """Bytes of one token's key (or value) in one head; `int8` adds a float32 scale."""
        if dtype == "int8":
            return self.head_dim + SCALE_BYTES
        return self.head_dim * DTYPE_BYTES[dtype]


def read_json(path: Path, most_bytes: int = files.MOST_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a regular file of at most `most_bytes`.

    Raises:
        ConfigError: the file is missing, unreadable, too large, or not a JSON object.
    """
    try:
        value = files.read_json(path, most_bytes)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; is {path.parent} a checkpoint folder?") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a key that changes the model and is not implemented."""
    implemented = {"model_type": "deepseek", "scoring_func": "softmax", "hidden_act": "silu"}
    for key, value in implemented.items():
        found = raw.get(key, None if key == "model_type" else value)
        if found != value:
            raise ConfigError(f"{key}={shown(found)} is not implemented; only {value!r} is")
    if raw.get("routed_scaling_factor") not in (None, 1.0):
        raise ConfigError(
            f"routed_scaling_factor={shown(raw['routed_scaling_factor'])} is not implemented"
        )


def _rope(raw: Mapping[str, Any]) -> tuple[float, float]:
    """The base of the rotary embedding, and the factor that stretches its positions.

    transformers writes `rope_theta` and `rope_scaling` up to version 4. From version 5 on it writes
    `rope_parameters`, with `rope_theta` inside. Either object may hold the base; bases in several
    places must agree.
    """
    thetas = {"rope_theta": raw["rope_theta"]} if "rope_theta" in raw else {}
    factors = {}
    for key in ("rope_scaling", "rope_parameters"):
        scaling = raw.get(key)
        if scaling is None:
            continue
        if not isinstance(scaling, dict):
            raise ConfigError(f"{key}={shown(scaling)} must be null or an object")
        if scaling.get("rope_theta") is not None:
            thetas[f"{key}.rope_theta"] = scaling["rope_theta"]
        factors[f"{key}.factor"] = _rope_linear_factor(key, scaling)
    return _only_one(thetas, 10000.0), _only_one(factors, 1.0)


def _rope_linear_factor(key: str, scaling: Mapping[str, Any]) -> float:
    """The factor of `rope_scaling` or `rope_parameters`, which `key` names."""
    kinds = [scaling[name] for name in ("type", "rope_type") if name in scaling]
    if not kinds and key == "rope_parameters" and scaling.keys() <= {"rope_theta"}:
        kinds = ["default"]
    for kind in kinds or [None]:
        if kind not in ("default", "linear") or kind != kinds[0]:
            raise ConfigError(
                f"{key} type {shown(kind)} is not implemented; only 'default' and 'linear' are"
            )
    if scaling.get("partial_rotary_factor") not in (None, 1):
        raise ConfigError(
            f"{key}.partial_rotary_factor={shown(scaling['partial_rotary_factor'])} is not "
            "implemented; only 1 is"
        )
    return 1.0 if kinds[0] == "default" else _number(scaling, "factor")


def _only_one(found: Mapping[str, Any], default: float) -> float:
    """The one number that all entries of `found` have; `default` if `found` is empty.

    Raises:
        ConfigError: an entry is not a number above 0, or two entries differ.
    """
    given = {name: _number(found, name) for name in found}
    if len(set(given.values())) > 1:
        values = " and ".join(f"{name}={value:g}" for name, value in given.items())
        raise ConfigError(f"{values} contradict each other; keep one of them")
    return next(iter(given.values()), default)


def _dtype(raw: Mapping[str, Any]) -> str:
    """The value of `torch_dtype`, or of `dtype`, as transformers 5 calls it."""
    key = "torch_dtype" if raw.get("torch_dtype") is not None else "dtype"
    value = raw.get(key)
    dtype = "float32" if value is None else value
    if not isinstance(dtype, str) or dtype.removeprefix("torch.") not in DTYPE_BYTES:
        raise ConfigError(f"{key}={shown(dtype)} is not one of {', '.join(DTYPE_BYTES)}")
    return dtype.removeprefix("torch.")


def _quantization(raw: Mapping[str, Any]) -> QuantizationConfig | None:
    stored = raw.get("quantization_config")
    return None if stored is None else QuantizationConfig.from_dict(stored)


def _eos_token_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    value = raw.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if any(type(id_) is not int or not 0 <= id_ <= _MOST_BY_DEFAULT for id_ in ids):
        raise ConfigError(f"eos_token_id={shown(value)} must be a token id or a list of them")
    if len(ids) > _MOST_EOS_TOKENS:
        raise ConfigError(f"eos_token_id lists {len(ids)} ids; at most {_MOST_EOS_TOKENS} are read")
    return tuple(ids)


def _integer(raw: Mapping[str, Any], key: str, default: int | None = None, least: int = 1) -> int:
    value, most = raw.get(key, default), _MOST.get(key, _MOST_BY_DEFAULT)
    if value is None:
        raise ConfigError(f"config.json has no {key}")
    if type(value) is not int or not least <= value:
        raise ConfigError(f"{key}={shown(value)} must be an integer of at least {least}")
    if value > most:
        raise ConfigError(f"{key}={shown(value)} is too large; at most {most} is read")
    return value


def _optional_integer(raw: Mapping[str, Any], key: str) -> int | None:
    return None if raw.get(key) is None else _integer(raw, key)


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"{key}={shown(value)} must be a number above 0")
    return float(value)


def _boolean(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{key}={shown(value)} must be true or false")
    return bool(value)
