"""The memory that a model takes is counted from its config alone."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from moespan.checkpoint.experts import ExpertPlacement
from moespan.checkpoint.placement import (
    Placement,
    cache_bytes_per_token,
    count_parameters,
    place,
)
from moespan.checkpoint.presets import preset
from moespan.config import EngineConfig, Layout, ModelConfig, QuantizationConfig
from moespan.errors import ConfigError
from moespan.planner import memory, work
from moespan.planner.memory import fit, footprint

SIXTEEN_B = ModelConfig.from_dict(preset("16b", {}))
TINY = ModelConfig.from_dict(preset("tiny", {}))


def test_the_16b_model_in_numbers():
    found = footprint(EngineConfig(""), SIXTEEN_B)
    total, active = count_parameters(SIXTEEN_B)
    assert (found.parameters, found.active_parameters) == (total, active)
    assert (round(total / 1e9, 1), round(active / 1e9, 1)) == (16.4, 2.8)
    assert found.bytes["float32"] == 2 * found.bytes["bfloat16"] == 4 * total
    assert found.bytes["int4"] < found.bytes["int8"] == found.bytes["w8a8"]
    assert found.bytes["fp8"] == found.bytes["w8a8"] + 102400 * (2048 - 4)
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
    # The doctor counts the weights as they are held, and the rotary table.
    assert fit(config, TINY, 1 << 30).memory.weight_bytes > many


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


def test_equal_ranks_are_one_class_and_are_placed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    placed = []

    def counted(*args: Any, **kwargs: Any) -> Placement:
        placed.append(args)
        return place(*args, **kwargs)

    monkeypatch.setattr(memory, "place", counted)
    monkeypatch.setattr(work, "place", counted)
    # 64 experts over 48 ep ranks: 16 of them hold two. Two stages.
    layout = Layout(tp=2, pp=2, dp=240, ep=48)
    config = EngineConfig("", layout)
    classes = memory.rank_classes(config, SIXTEEN_B)
    assert len(classes) == 4
    assert len(placed) <= 2  # stages share what their layers are made of
    assert [one.num_ranks for one in classes] == [160, 320, 160, 320]
    footprint(config, SIXTEEN_B)
    assert len(placed) < 20


@pytest.mark.parametrize(
    "layout", [Layout(tp=4, ep=2), Layout(tp=2, ep=3, dp=3, pp=2), Layout(sp=2, dp=2, ep=4)]
)
def test_classes_hold_what_each_of_their_ranks_holds(layout: Layout) -> None:
    if layout.ep % layout.tp and layout.tp % layout.ep:
        layout = replace(layout, ep=6)
    config = EngineConfig("", layout, expert_placement="round_robin")
    ranks = range(layout.world_size)
    experts = ExpertPlacement.make("round_robin", TINY, layout)
    every = Counter(place(TINY, layout, rank, experts).num_bytes("bfloat16") for rank in ranks)
    found: Counter[int] = Counter()
    for one in memory.rank_classes(config, TINY):
        exact = place(TINY, layout, one.rank, experts).parameters
        assert list(one.parameters.items()) == list(exact.items())
        size = sum(parameter.num_bytes("bfloat16") for parameter in one.parameters.values())
        found[size] += one.num_ranks
    assert found == every


def test_the_cache_gets_all_but_what_steps_and_the_reserve_take() -> None:
    """On a card of 61 GiB the share of 85 % left 4 GiB or more unused."""
    room = int(61.0 * 2**30)
    more_bytes = {}
    for tp in (1, 8):
        config = EngineConfig("", Layout(tp=tp), device="npu", block_size=128)
        one = fit(config, SIXTEEN_B, room)
        taken = one.memory.total_bytes - one.memory.base_bytes
        weights = one.memory.weight_bytes + one.memory.communicator_bytes
        before = 0.85 * (room - weights)
        cache = one.cache_tokens * one.cache_bytes_per_token
        assert cache + taken + one.reserve_bytes < room
        more_bytes[tp] = cache - before
    assert more_bytes[1] > 1 * 2**30 and more_bytes[8] > 4.5 * 2**30
    half = fit(replace(config, memory_reserve=0.5), SIXTEEN_B, room)
    assert half.cache_tokens < one.cache_tokens / 1.8


def test_a_report_on_a_prompt_fits_into_the_reserve() -> None:
    (one,) = memory.memory_of_all(EngineConfig("", max_num_batched_tokens=8192), SIXTEEN_B)
    least = one.reserve_bytes(0.0, 1 << 40)
    logits = 8192 * SIXTEEN_B.vocab_size * 2
    assert least + one.activations.total_bytes > logits
    assert one.reserve_bytes(0.03, 1 << 40) == int(0.03 * (1 << 40))


def test_parts_of_rows_that_wait_for_their_scales_count_while_loading() -> None:
    whole = EngineConfig("", quantization="int8", load_format="dummy")
    cut = replace(whole, layout=Layout(tp=2))
    alone, half = (memory.loading_bytes(config, SIXTEEN_B, 0) for config in (whole, cut))
    # A third of the experts' weights are rows of `down`, kept as floats until all ranks know them.
    assert half > 0.5 * alone + 0.25 * SIXTEEN_B.num_moe_layers * 64 * 2048 * 1408


def test_counting_needs_no_torch():
    code = "import moespan.planner.memory, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
