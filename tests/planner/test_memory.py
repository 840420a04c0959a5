"""The memory that a model takes is counted from its config alone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from moespan.checkpoint.placement import cache_bytes_per_token, count_parameters, place
from moespan.checkpoint.presets import preset
from moespan.config import EngineConfig, Layout, ModelConfig, QuantizationConfig
from moespan.errors import ConfigError
from moespan.planner.memory import fit, footprint

SIXTEEN_B = ModelConfig.from_dict(preset("16b", {}))
TINY = ModelConfig.from_dict(preset("tiny", {}))


def test_the_16b_model_in_numbers():
    found = footprint(EngineConfig(""), SIXTEEN_B)
    total, active = count_parameters(SIXTEEN_B)
    assert (found.parameters, found.active_parameters) == (total, active)
    assert (round(total / 1e9, 1), round(active / 1e9, 1)) == (16.4, 2.8)
    assert found.bytes["float32"] == 2 * found.bytes["bfloat16"] == 4 * total
    assert found.bytes["int4"] < found.bytes["int8"] == found.bytes["w8a8"] - 102400 * (2048 - 4)
    assert found.kv_bytes_per_token["bfloat16"] == 2 * 28 * 2048 * 2
    assert found.kv_bytes_per_token["int8"] == 2 * 28 * (2048 + 16 * 4)
    assert found.pipeline_layers == [28] and found.quantization is None
    # The routers are held in float32.
    assert found.weight_bytes_per_rank == [2 * total + 27 * 64 * 2048 * 2]
    assert found.kv_bytes_per_token_per_rank == [found.kv_bytes_per_token["bfloat16"]]


def test_every_rank_has_its_own_weights_and_cache():
    layout = Layout(tp=2, pp=2, pipeline_layers=(3, 1))
    experts = "round_robin"
    config = EngineConfig("", layout, quantization="int8", kv_cache_dtype="int8")
    found = footprint(replace(config, expert_placement=experts), TINY)
    assert found.layout == {"tp": 2, "ep": 1, "pp": 2, "sp": 1, "dp": 1}
    assert found.pipeline_layers == [3, 1]
    assert (found.dtype, found.quantization, found.kv_cache_dtype) == ("bfloat16", "int8", "int8")
    for rank in range(4):
        held = place(TINY, layout, rank, quantization="int8")
        assert found.weight_bytes_per_rank[rank] == held.num_bytes("bfloat16")
        token_bytes = cache_bytes_per_token(TINY, layout, rank, "int8")
        assert found.kv_bytes_per_token_per_rank[rank] == token_bytes
    first, _, last, _ = found.kv_bytes_per_token_per_rank
    assert first == 3 * last


def test_uneven_experts_weigh_where_they_are():
    table = {"default": [[0], list(range(1, 16))]}
    config = EngineConfig("", Layout(tp=2, ep=2), expert_placement=table)
    few, many = footprint(config, TINY).weight_bytes_per_rank
    assert many - few == 14 * TINY.num_moe_layers * 3 * 128 * 64 * 2
    assert fit(config, TINY, 1 << 30).weight_bytes == many


def test_only_quantizations_that_the_model_can_run_with_are_listed():
    everything = footprint(EngineConfig(""), TINY).bytes
    assert {"int8", "w8a8", "fp8", "int4"} < everything.keys()
    narrow = ModelConfig.from_dict(preset("tiny", {"moe_intermediate_size": 48}))
    assert everything.keys() - footprint(EngineConfig(""), narrow).bytes.keys() == {"int4"}
    stored = replace(TINY, quantization=QuantizationConfig.of("w8a8"))
    found = footprint(EngineConfig(""), stored)
    assert found.quantization == "w8a8"
    assert found.bytes.keys() == {"float32", "bfloat16", "float16", "int8", "w8a8"}
    with pytest.raises(ConfigError, match="can be run as int8 or w8a8 only"):
        footprint(EngineConfig("", quantization="fp8"), stored)


def test_counting_needs_no_torch():
    code = "import moespan.planner.memory, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
