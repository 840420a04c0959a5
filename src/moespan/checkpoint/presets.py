"""Presets: configs of the geometries that are run with random weights. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moespan.config import ModelConfig
from moespan.errors import ConfigError, shortened, shown

_16B: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 102400,
}
PRESETS: dict[str, dict[str, Any]] = {
    "16b": _16B,
    "16b-4l": {**_16B, "num_hidden_layers": 4},
    "tiny": {
        **_16B,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_size": 128,
        "intermediate_size": 320,
        "max_position_embeddings": 512,
        "moe_intermediate_size": 64,
        "n_routed_experts": 16,
        "num_attention_heads": 8,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 8,
        "vocab_size": 512,
    },
}


def preset(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a preset with some keys replaced.

    Raises:
        ConfigError: there is no such preset or key, or the engine would refuse the config.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {shown(name)} is not one of {', '.join(PRESETS)}")
    known = PRESETS[name]
    for key in overrides:
        if key not in known:
            raise ConfigError(
                f"{shortened(key)} is not a key of preset {name}; keys: {', '.join(known)}"
            )
    raw = {**known, **overrides}
    ModelConfig.from_dict(raw)
    return raw
