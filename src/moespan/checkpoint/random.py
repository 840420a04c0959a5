"""Writes random checkpoints of any geometry in Hugging Face form, for trials and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from moespan.checkpoint.source import RandomSource
from moespan.checkpoint.writer import write_json, write_shards
from moespan.config import ModelConfig
from moespan.errors import ConfigError

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
        ConfigError: no such preset, no such key, or a config that the engine would refuse.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    known = PRESETS[name]
    for key in overrides:
        if key not in known:
            raise ConfigError(f"{key} is not a key of preset {name}; keys: {', '.join(known)}")
    raw = {**known, **overrides}
    ModelConfig.from_dict(raw)
    return raw


def make_checkpoint(
    folder: Path,
    raw: Mapping[str, Any],
    seed: int = 0,
    progress: Callable[[int], object] = lambda written_bytes: None,
) -> None:
    """Write `config.json`, shards and index of a random model into `folder`.

    Args:
        raw: the `config.json` to write, as `preset` gives it.
        seed: weights are a pure function of it and of each tensor's name.
        progress: called with the bytes of each shard written.

    Raises:
        ConfigError: `folder` already holds a checkpoint.
    """
    if folder.exists() and any(folder.glob("*.safetensors*")):
        raise ConfigError(f"{folder} already holds a checkpoint; choose another folder")
    config = ModelConfig.from_dict(raw)
    dtype = getattr(torch, config.dtype)
    source = RandomSource(config, dtype, seed)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in source.shapes.items()}
    write_shards(folder, sizes, lambda name: {name: source.draw(name)}, progress)
    # Last, so that a folder with a config is a whole checkpoint.
    generation = {"bos_token_id": raw["bos_token_id"], "eos_token_id": raw["eos_token_id"]}
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", raw)
