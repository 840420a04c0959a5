"""Options that the fused operators cannot serve are refused before loading, with all reasons."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from moespan.checkpoint.experts import ExpertPlacement
from moespan.checkpoint.presets import preset
from moespan.config import EngineConfig, EngineOptions, Layout, ModelConfig
from moespan.device import NPU
from moespan.errors import ConfigError, LayoutError
from moespan.parallel import fused
from moespan.parallel.buffers import MB, fused_buffer_mb, group_buffers_mb, hccl_bytes
from moespan.parallel.mesh import _axes
from moespan.parallel.tokens import dispatch_of_step
from moespan.planner.traffic import StepSize, step_traffic
from tests.support import geometry

SIXTEEN_B = ModelConfig.from_dict(preset("16b", {}))
TWO_SERVERS = Layout(tp=2, dp=8, ep=16)


def config(layout: Layout = TWO_SERVERS, **settings: Any) -> EngineConfig:
    return EngineConfig("", layout, device="npu", **settings)


def check(
    asked: EngineConfig, model: ModelConfig = SIXTEEN_B, chip: str = "910B", **machine: int
) -> None:
    experts = ExpertPlacement.make(asked.expert_placement, model, asked.layout)
    fused.check(
        asked,
        model,
        experts,
        chip,
        machine.get("ranks_here", 8),
        machine.get("hccl_buffer_mb", 200),
    )


@pytest.mark.parametrize("chip", ["910B", "910C"])
def test_the_16b_model_on_two_servers_is_accepted(chip: str):
    check(config(moe_dispatch="fused"), chip=chip)
    check(config(Layout(tp=8, dp=2), npu_fused_all_reduce=512))


@pytest.mark.parametrize(
    ("layout", "model", "chip", "rule"),
    [
        (TWO_SERVERS, SIXTEEN_B, "310P", "for A2 and A3, not 310P"),
        (TWO_SERVERS, SIXTEEN_B, "", "not this device"),
        (Layout(dp=12, ep=12), SIXTEEN_B, "910B", "ep=2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256"),
        (
            Layout(dp=2, ep=2),
            ModelConfig.from_dict(geometry(hidden_size=48)),
            "910B",
            "steps of 32",
        ),
        (Layout(dp=2, ep=2), ModelConfig.from_dict(geometry()), "910C", "1024 to 8192, not 32"),
        (Layout(dp=5, ep=5), SIXTEEN_B, "910B", "equally many experts on each ep rank"),
    ],
)
def test_limits_of_the_fused_dispatch(layout: Layout, model: ModelConfig, chip: str, rule: str):
    with pytest.raises(
        ConfigError, match=r"^moe_dispatch=fused does not work here: .*; use "
    ) as it:
        check(config(layout, moe_dispatch="fused"), model, chip)
    assert rule in str(it.value)


@pytest.mark.parametrize(
    ("layout", "chip", "rule"),
    [
        (TWO_SERVERS, "910C", "with npu_hierarchical_dispatch it is for A2, not 910C"),
        (Layout(dp=8, ep=8), "910B", "ep=16, 32, 64, not 8"),
    ],
)
def test_limits_of_the_hierarchical_dispatch(layout: Layout, chip: str, rule: str):
    asked = config(layout, moe_dispatch="fused", npu_hierarchical_dispatch=True)
    with pytest.raises(ConfigError, match=rule):
        check(asked, chip=chip, hccl_buffer_mb=1000)
    check(config(moe_dispatch="fused", npu_hierarchical_dispatch=True))


def test_all_reasons_are_in_one_error():
    asked = config(Layout(tp=16, dp=2, ep=32), moe_dispatch="fused", npu_fused_all_reduce=1)
    with pytest.raises(ConfigError, match=r"HCCL_BUFFSIZE=\d+ or more, not 50"):
        check(asked, hccl_buffer_mb=50)
    with pytest.raises(ConfigError, match=r"tp=2, 4, 8, not 16; all fused operators .* share one"):
        check(asked, hccl_buffer_mb=300)


def test_limits_of_the_fused_all_reduce():
    with pytest.raises(ConfigError, match=r"npu_fused_all_reduce=512 .* for A2, not 910C"):
        check(config(Layout(tp=8), npu_fused_all_reduce=512), chip="910C")
    with pytest.raises(ConfigError, match="tp=8 crosses nodes of 4 ranks"):
        check(config(Layout(tp=8), npu_fused_all_reduce=512), ranks_here=4)
    with pytest.raises(ConfigError, match="16-bit types, not of integers; leave it out"):
        check(config(Layout(tp=8), npu_fused_all_reduce=512, quantization="int8"))


@pytest.mark.parametrize(
    "option",
    [
        {"moe_dispatch": "fused"},
        {"npu_fused_all_reduce": 9},
        {"npu_weight_format": "nz"},
        {"npu_maskless_decode": True},
        {"npu_scatter_prefill": 256},
    ],
    ids=str,
)
def test_options_of_npus_for_16_bits_are_refused_elsewhere(option: dict[str, Any]):
    with pytest.raises(ConfigError, match="for device=npu, not cpu; leave it out"):
        EngineConfig("", TWO_SERVERS, device="cpu", **option)
    with pytest.raises(ConfigError, match="not dtype=float32; leave it out"):
        EngineConfig("", TWO_SERVERS, device="npu", dtype="float32", **option)


@pytest.mark.parametrize("option", ["npu_aiv", "npu_update_first", "npu_overlap_shared"])
def test_options_of_npus_for_any_dtype_are_refused_elsewhere(option: str):
    options: dict[str, Any] = {option: True}
    with pytest.raises(ConfigError, match=f"{option}=True is for device=npu, not cuda"):
        EngineConfig("", TWO_SERVERS, device="cuda", **options)
    assert EngineConfig("", TWO_SERVERS, device="npu", dtype="float32", **options)


def test_every_option_of_npus_is_in_their_row():
    names = {field.name for field in fields(EngineOptions) if field.name.startswith("npu_")}
    assert names == {option for option in NPU.own_options if option.startswith("npu_")}
    assert {*NPU.half_options} <= {*NPU.own_options}


def test_options_that_need_or_exclude_another_one():
    with pytest.raises(ConfigError, match="npu_hierarchical_dispatch is for moe_dispatch=fused"):
        config(npu_hierarchical_dispatch=True)
    with pytest.raises(ConfigError, match="npu_overlap_shared does not go with npu_fused_all"):
        config(npu_overlap_shared=True, npu_fused_all_reduce=9)


def test_meaningless_settings_are_refused():
    with pytest.raises(ConfigError, match="npu_fused_all_reduce=-1"):
        config(npu_fused_all_reduce=-1)
    with pytest.raises(ConfigError, match="npu_scatter_prefill=-1 must be a number of tokens"):
        config(npu_scatter_prefill=-1)
    with pytest.raises(ConfigError, match="npu_weight_format='zn' is not one of nd, nz"):
        config(npu_weight_format="zn")
    Layout(dp=2, ep=2).check_dispatch("fused")
    with pytest.raises(LayoutError, match="moe_dispatch=fused does not apply to layout tp=2×ep=2"):
        Layout(tp=2, ep=2).check_dispatch("fused")


def test_the_buffer_follows_the_formula_of_the_operators_pages():
    # A2: 2·(256 tokens · 16 ranks · 4 experts · 2048 · 2 bytes + 2 MB) = 132 MB; A3 needs more.
    asked = config(moe_dispatch="fused")
    assert fused.buffer_bytes(asked, SIXTEEN_B) == 2 * (256 * 16 * 4 * 4608 + 6 * 256 * 4096)
    assert fused_buffer_mb(asked, SIXTEEN_B) == 156
    assert fused_buffer_mb(config(), SIXTEEN_B) == 0
    # (64 experts + 16 ranks / 4) · 256 tokens · (2048 · 2 bytes + 16 · 8 bytes) + 8 MB
    in_two_steps = config(moe_dispatch="fused", npu_hierarchical_dispatch=True)
    assert fused.buffer_bytes(in_two_steps, SIXTEEN_B) == 68 * 256 * 4224 + 8 * MB
    groups = group_buffers_mb(asked, SIXTEEN_B)
    assert "ep_tp_groups" not in groups
    assert hccl_bytes(asked, SIXTEEN_B) == 2 * MB * (sum(groups.values()) + 156)


def test_the_fused_dispatch_has_a_group_of_its_own():
    axes = _axes(TWO_SERVERS, "fused")
    assert axes["ep_fused"] == axes["ep"] == [tuple(range(16))]
    assert "ep_tp_groups" not in axes


def test_a_step_too_large_for_the_operators_uses_all_to_all():
    def dispatch(*tokens: int) -> str:
        return dispatch_of_step("fused", SIXTEEN_B, TWO_SERVERS, 2, tokens)

    assert dispatch(0, 512) == dispatch(0, 0) == "fused"
    assert dispatch(0, 513) == "all_to_all"


def test_every_rank_counts_the_rows_of_the_rank_with_most_tokens():
    step = StepSize([5, 0, 0, 0, 0, 0, 0, 0], [0] * 8)
    for rank in (0, 15):
        traffic = step_traffic(SIXTEEN_B, TWO_SERVERS, rank, "bfloat16", step, "fused")
        sent = 27 * 3 * 6 * 2048 * 2  # layers, rows of a rank, experts, hidden size, bytes
        assert traffic.sent_bytes["ep_fused", "dispatch", "moe"] == sent
        assert traffic.sent_bytes["ep_fused", "combine", "moe"] == sent
        assert traffic.calls["ep_fused", "combine", "moe"] == 27
