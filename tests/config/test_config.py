"""A config is read in full or refused by name; nothing that changes the model is ignored."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from moespan.checkpoint.placement import count_parameters
from moespan.checkpoint.presets import PRESETS
from moespan.config import EngineConfig, Layout, ModelConfig, all_layouts, layer_cost
from moespan.errors import ConfigError, LayoutError
from tests.support import ORACLES, Oracle, geometry

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "moe_intermediate_size",
    "num_experts_per_tok",
)
POSITIVE_INTEGERS = (*REQUIRED, "num_key_value_heads", "n_routed_experts", "n_shared_experts")


def refusal(**changes: Any) -> str:
    """The error message about a small config with `changes`."""
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({**geometry(), **changes})
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "deepseek_v2"),
        ("model_type", "llama"),
        ("model_type", None),
        ("scoring_func", "sigmoid"),
        ("hidden_act", "gelu"),
        ("routed_scaling_factor", 2.5),
        ("head_dim", 16),
    ],
)
def test_a_key_that_changes_the_model_and_is_not_implemented_is_refused(key: str, value: object):
    message = refusal(**{key: value})
    assert f"{key}={value!r}" in message
    assert "not implemented" in message


SCALINGS = pytest.mark.parametrize("scaling", ["rope_scaling", "rope_parameters"])


@SCALINGS
@pytest.mark.parametrize("kind", ["dynamic", "yarn", "llama3", "longrope", "", None, ["linear"]])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_rope_scaling_other_than_linear_is_refused(scaling: str, kind: object, key: str):
    message = refusal(**{scaling: {key: kind, "factor": 2.0}})
    assert f"{scaling} type {kind!r} is not implemented" in message


@SCALINGS
@pytest.mark.parametrize("kinds", [("linear", "yarn"), ("default", "linear")])
def test_two_types_of_one_rope_scaling_must_agree(scaling: str, kinds: tuple[str, str]):
    message = refusal(**{scaling: {"type": kinds[0], "rope_type": kinds[1], "factor": 2.0}})
    assert f"{scaling} type {kinds[1]!r} is not implemented" in message


@pytest.mark.parametrize(
    "scaling", [{}, {"factor": 2.0}, {"full_attention": {"rope_type": "default"}}]
)
def test_rope_scaling_without_a_type_is_refused_unless_it_scales_nothing(scaling: object):
    assert "rope_scaling type None" in refusal(rope_scaling=scaling)
    if scaling:
        assert "rope_parameters type None" in refusal(rope_parameters=scaling)


@SCALINGS
@pytest.mark.parametrize("value", ["linear", "default", [], 4.0])
def test_rope_scaling_that_is_not_an_object_is_refused(scaling: str, value: object):
    assert f"{scaling}={value!r} must be" in refusal(**{scaling: value})


@SCALINGS
@pytest.mark.parametrize("factor", [None, 0, -1.0, "2", True, math.inf, math.nan])
def test_linear_rope_scaling_needs_a_factor(scaling: str, factor: object):
    assert f"factor={factor!r}" in refusal(**{scaling: {"type": "linear", "factor": factor}})


@SCALINGS
def test_a_rotation_of_a_part_of_each_head_is_refused(scaling: str):
    value = {"rope_type": "default", "partial_rotary_factor": 0.5}
    assert f"{scaling}.partial_rotary_factor=0.5" in refusal(**{scaling: value})


def rope_of(remove: tuple[str, ...] = (), **keys: Any) -> tuple[float, float]:
    raw = {key: value for key, value in {**geometry(), **keys}.items() if key not in remove}
    config = ModelConfig.from_dict(raw)
    return config.rope_theta, config.rope_linear_factor


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 50000.0}, (50000.0, 1.0)),
        ({"rope_type": "linear", "rope_theta": 50000.0, "factor": 2.0}, (50000.0, 2.0)),
        ({"rope_theta": 50000}, (50000.0, 1.0)),
        ({"rope_type": "default"}, (10000.0, 1.0)),
        ({}, (10000.0, 1.0)),
    ],
)
def test_the_keys_of_transformers_5_mean_what_the_old_keys_mean(
    parameters: dict[str, object], expected: tuple[float, float]
):
    assert rope_of(("rope_theta", "rope_scaling"), rope_parameters=parameters) == expected
    if "rope_type" in parameters:
        assert rope_of(("rope_theta",), rope_scaling=parameters) == expected


def test_the_dtype_may_have_the_name_of_transformers_5():
    raw = {**geometry(), "torch_dtype": None, "dtype": "bfloat16"}
    assert ModelConfig.from_dict(raw).dtype == "bfloat16"
    assert "dtype='int8' is not one of" in refusal(torch_dtype=None, dtype="int8")


def test_a_rope_theta_in_two_places_must_be_the_same():
    inside = {"rope_type": "default", "rope_theta": 50000.0}
    assert rope_of(rope_theta=50000, rope_scaling=inside) == (50000.0, 1.0)
    message = refusal(rope_theta=10000.0, rope_parameters=inside)
    assert "rope_theta=10000 and rope_parameters.rope_theta=50000 contradict" in message
    linear = {"rope_type": "linear", "factor": 2.0}
    message = refusal(rope_scaling=linear, rope_parameters={**linear, "factor": 4.0})
    assert "rope_scaling.factor=2 and rope_parameters.factor=4 contradict" in message


# ---- Hostile values ----


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "n_routed_experts", "vocab_size", "hidden_size"]
)
@pytest.mark.parametrize("value", [10**9, 10**400])
def test_a_count_that_would_be_computed_for_ever_is_refused_at_once(key: str, value: int):
    message = refusal(**{key: value})
    assert message.startswith(f"{key}=") and "is too large; at most" in message
    assert len(message) < 120


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
def test_a_number_beyond_all_floats_is_refused(key: str):
    assert f"{key}=an integer of 1329 bits must be a number" in refusal(**{key: 10**400})


def test_many_layers_of_many_experts_are_refused():
    message = refusal(num_hidden_layers=500, n_routed_experts=1000)
    assert "n_routed_experts=1000 in num_hidden_layers=500 are too many" in message


def test_very_many_end_tokens_are_refused():
    assert "lists 2000 ids" in refusal(eos_token_id=[1] * 2000)


@pytest.mark.parametrize("value", ["x" * 1_000_000, ["x"] * 1_000_000, {"x" * 1_000_000: 1}])
@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "vocab_size",
        "rope_theta",
        "rope_scaling",
        "torch_dtype",
        "eos_token_id",
        "attention_bias",
        "head_dim",
        "routed_scaling_factor",
        "quantization_config",
    ],
)
def test_a_value_is_never_echoed_whole(key: str, value: object):
    raw = {**geometry(), key: value}
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(raw)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_that_is_no_regular_file_is_refused_at_once(tmp_path: Path, name: str):
    write(tmp_path, "config.json", geometry())
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (tmp_path / name).unlink(missing_ok=True)
        make(tmp_path / name)
        with pytest.raises(ConfigError, match=rf"{name} cannot be read .* not a regular file"):
            ModelConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"[" * (5 << 20), b"[" * (1 << 19), b"[" + b"0," * (1 << 21) + b"0]", b'{"a": ' + b"9" * 9999],
    ids=["too many bytes", "too deep", "too many values", "too many digits"],
)
def test_a_config_of_millions_of_values_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON") as caught:
        ModelConfig.from_pretrained(tmp_path)
    assert len(str(caught.value)) < 400


def test_neutral_settings_are_accepted():
    neutral = {
        "quantization_config": None,
        "routed_scaling_factor": 1.0,
        "rope_scaling": {"rope_type": "default"},
        "head_dim": 8,
        "aux_loss_alpha": 0.001,
        "use_cache": True,
        "pretraining_tp": 1,
    }
    plain = ModelConfig.from_dict(geometry())
    assert ModelConfig.from_dict({**geometry(), **neutral}) == plain


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str):
    raw = geometry()
    del raw[key]
    with pytest.raises(ConfigError, match=f"config.json has no {key}"):
        ModelConfig.from_dict(raw)


def test_a_missing_model_type_is_refused():
    raw = geometry()
    del raw["model_type"]
    with pytest.raises(ConfigError, match="model_type"):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize("key", POSITIVE_INTEGERS)
@pytest.mark.parametrize("value", ["32", 32.0, True, 0, -4, [32]])
def test_an_ill_typed_integer_is_refused_with_its_value(key: str, value: object):
    assert f"{key}={value!r} must be an integer" in refusal(**{key: value})


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
@pytest.mark.parametrize("value", ["1e-6", True, 0, -1.0, None, math.inf, math.nan])
def test_an_ill_typed_number_is_refused_with_its_value(key: str, value: object):
    assert f"{key}={value!r} must be a number" in refusal(**{key: value})


@pytest.mark.parametrize("key", ["norm_topk_prob", "attention_bias", "tie_word_embeddings"])
@pytest.mark.parametrize("value", ["true", 1, 0, 0.0, []])
def test_an_ill_typed_boolean_is_refused_with_its_value(key: str, value: object):
    assert f"{key}={value!r} must be true or false" in refusal(**{key: value})


@pytest.mark.parametrize("value", ["1", -1, True, 1.0, [1, "2"], [None]])
def test_an_ill_typed_eos_token_is_refused_with_its_value(value: object):
    assert f"eos_token_id={value!r}" in refusal(eos_token_id=value)


@pytest.mark.parametrize("value", ["int8", "float64", "auto", 16])
def test_an_unknown_dtype_is_refused(value: object):
    assert f"torch_dtype={value!r}" in refusal(torch_dtype=value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 33}, ["hidden_size=33", "num_attention_heads=4"]),
        ({"hidden_size": 12}, ["=3 is odd"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
        ({"num_experts_per_tok": 7}, ["num_experts_per_tok=7", "n_routed_experts=6"]),
    ],
)
def test_sizes_that_contradict_each_other_are_named(changes: dict[str, int], named: list[str]):
    message = refusal(**changes)
    assert all(part in message for part in named)


def test_optional_keys_have_the_defaults_of_the_hugging_face_config():
    raw = {
        key: value
        for key, value in geometry().items()
        if key in (*REQUIRED, "model_type", "n_routed_experts")
    }
    config = ModelConfig.from_dict(raw)
    assert config.num_key_value_heads == config.num_attention_heads == 4
    assert (config.n_shared_experts, config.shared_intermediate_size) == (None, 0)
    assert (config.first_k_dense_replace, config.moe_layer_freq) == (0, 1)
    assert (config.rope_theta, config.rms_norm_eps) == (10000.0, 1e-6)
    assert (config.max_position_embeddings, config.dtype) == (2048, "float32")
    assert not (config.norm_topk_prob or config.attention_bias or config.tie_word_embeddings)
    assert config.eos_token_ids == ()


def test_a_model_without_experts_counts_no_tokens_of_them():
    for dense in (geometry(n_routed_experts=None), geometry(first_k_dense_replace=99)):
        with pytest.raises(ConfigError, match="expert_stats: the model has no routed experts"):
            EngineConfig("", expert_stats=True).check(ModelConfig.from_dict(dense))


def test_null_routed_experts_make_a_dense_model():
    config = ModelConfig.from_dict(geometry(n_routed_experts=None))
    assert config.num_moe_layers == 0
    assert config.shared_intermediate_size == 0
    total, active = count_parameters(config)
    assert total == active


def test_null_shared_experts_mean_no_shared_experts():
    config = ModelConfig.from_dict(geometry(n_shared_experts=None))
    assert (config.num_moe_layers, config.shared_intermediate_size) == (2, 0)


@pytest.mark.parametrize(
    ("first", "every", "expected"),
    [(0, 1, [0, 1, 2, 3, 4]), (1, 1, [1, 2, 3, 4]), (1, 2, [2, 4]), (3, 3, [3]), (9, 1, [])],
)
def test_expert_layers_are_chosen_as_the_hugging_face_model_does(
    first: int, every: int, expected: list[int]
):
    config = ModelConfig.from_dict(
        geometry(first_k_dense_replace=first, moe_layer_freq=every, num_hidden_layers=5)
    )
    assert [layer for layer in range(5) if config.is_moe(layer)] == expected
    assert config.num_moe_layers == len(expected)


def test_grouped_query_heads_are_read_and_shrink_the_cache():
    config = ModelConfig.from_dict(geometry(num_key_value_heads=1))
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 1)
    whole = ModelConfig.from_dict(geometry())
    assert whole.kv_bytes_per_token() == 4 * config.kv_bytes_per_token() == 4 * 2 * 3 * 8 * 4


def test_linear_rope_scaling_is_read():
    raw = geometry(rope_scaling={"type": "linear", "factor": 4})
    assert ModelConfig.from_dict(raw).rope_linear_factor == 4.0


def test_the_16b_model_has_its_published_size():
    config = ModelConfig.from_dict(PRESETS["16b"])
    total, active = count_parameters(config)
    assert total == 16_375_728_128
    assert active == 2_828_650_496
    assert total * 2 == pytest.approx(32.75e9, rel=1e-3)
    assert config.kv_bytes_per_token() == 224 * 1024
    assert config.num_moe_layers == 27


@pytest.mark.parametrize("name", ORACLES)
def test_real_config_files_are_read(name: str):
    config = Oracle(name).config
    assert (config.dtype, config.eos_token_ids) == ("bfloat16", (1,))


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def test_eos_tokens_of_the_generation_config_replace_those_of_the_config(tmp_path: Path):
    write(tmp_path, "config.json", geometry(eos_token_id=5))
    assert ModelConfig.from_pretrained(tmp_path).eos_token_ids == (5,)
    write(tmp_path, "generation_config.json", {"eos_token_id": [7, 9]})
    assert ModelConfig.from_pretrained(tmp_path).eos_token_ids == (7, 9)
    write(tmp_path, "generation_config.json", {"temperature": 0.7})
    assert ModelConfig.from_pretrained(str(tmp_path)).eos_token_ids == (5,)


def test_remote_code_stays_inert(tmp_path: Path):
    sprung = tmp_path / "sprung"
    trap = f"open({str(sprung)!r}, 'w').close()\n"
    for name in ("configuration_trap", "modeling_trap", "__init__"):
        (tmp_path / f"{name}.py").write_text(trap)
    auto_map = {
        "AutoConfig": "configuration_trap.DeepseekConfig",
        "AutoModelForCausalLM": "modeling_trap.DeepseekForCausalLM",
    }
    write(tmp_path, "config.json", {**geometry(), "auto_map": auto_map})
    assert ModelConfig.from_pretrained(tmp_path) == ModelConfig.from_dict(geometry())
    assert not sprung.exists()
    assert not any("_trap" in module for module in sys.modules)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[1]", "holds a JSON list, not an object"),
        (b"", "cannot be read as JSON"),
    ],
)
def test_a_config_file_that_is_not_a_json_object_is_refused(
    tmp_path: Path, content: bytes | None, said: str
):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        ModelConfig.from_pretrained(tmp_path)


def test_a_folder_in_place_of_the_config_file_is_refused(tmp_path: Path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        ModelConfig.from_pretrained(tmp_path)


def config_of(heads: int, kv_heads: int) -> ModelConfig:
    return ModelConfig.from_dict(
        geometry(hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=kv_heads)
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "usable"),
    [
        (16, 16, [1, 2, 4, 8, 16]),
        (16, 2, [1, 2, 4, 8, 16]),
        (12, 4, [1, 2, 4, 12]),  # 3 and 6 divide the heads but not the KV heads
        (6, 3, [1, 3, 6]),
        (1, 1, [1]),
    ],
)
def test_a_layout_fits_exactly_where_heads_divide(heads: int, kv_heads: int, usable: list[int]):
    config = config_of(heads, kv_heads)
    for tp in range(1, 2 * heads + 1):
        if tp in usable:
            Layout(tp=tp).check(config)
        else:
            with pytest.raises(LayoutError) as caught:
                Layout(tp=tp).check(config)
            nearest = sorted(sorted(usable, key=lambda size: abs(size - tp))[:6])
            assert str(caught.value).startswith(f"tp={tp} ")
            assert str(caught.value).endswith("; use tp=" + ", ".join(map(str, nearest)))


def moe_config(experts: int = 8, layers: int = 4) -> ModelConfig:
    return ModelConfig.from_dict(
        geometry(
            num_hidden_layers=layers,
            n_routed_experts=experts,
            num_experts_per_tok=2,
            hidden_size=64,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
    )


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Layout(tp=6), "tp=6 does not divide num_attention_heads=8; use tp=1, 2, 4, 8"),
        (
            Layout(tp=4, sp=4),
            "tp·sp=16 does not divide num_attention_heads=8; use tp=1, 2 or sp=1, 2",
        ),
        (Layout(tp=8, ep=3), "ep=3 neither divides tp=8 nor is tp times a divisor of sp·dp=1; use"),
        (Layout(tp=2, dp=3, ep=4), "nor is tp times a divisor of sp·dp=3; use ep=1, 2, 6"),
        (Layout(dp=16, ep=16), "ep=16 exceeds n_routed_experts=8; use ep=1, 2, 4, 8"),
        (
            Layout(pp=5),
            "pp=5 exceeds num_hidden_layers=4: a stage would be empty; use pp=1, 2, 3, 4",
        ),
        (Layout(pp=2, pipeline_layers=(4,)), "pipeline_layers=4 is for pp=1, not pp=2"),
        (Layout(pp=2, pipeline_layers=(4, 0)), "pipeline_layers=4,0 must be positive and sum to"),
        (Layout(pp=2, pipeline_layers=(2, 1)), "pipeline_layers=2,1 must be positive and sum to"),
    ],
    ids=str,
)
def test_a_layout_error_names_the_broken_rule_and_the_nearest_fixes(layout: Layout, said: str):
    with pytest.raises(LayoutError, match=re.escape(said)):
        layout.check(moe_config())


def test_a_model_without_experts_has_no_expert_parallelism():
    config = ModelConfig.from_dict(geometry(n_routed_experts=None))
    with pytest.raises(LayoutError, match="ep=2, but the model has no routed experts; use ep=1"):
        Layout(tp=2, ep=2).check(config)


def layout_of(sizes: dict[str, Any]) -> Layout:
    """The layout whose axes have these sizes, by name."""
    return Layout(**sizes)


def test_a_layout_has_at_least_one_rank_on_every_axis():
    assert (Layout().world_size, Layout(tp=4).world_size) == (1, 4)
    for axis in Layout.AXES:
        with pytest.raises(LayoutError, match=f"{axis}=0 must be at least 1"):
            layout_of({axis: 0})


def test_every_listed_layout_fits_and_no_other_of_that_size_does():
    config = moe_config()
    listed = all_layouts(8, config)
    assert len(set(listed)) == len(listed) > 30
    for sizes in itertools.product((1, 2, 3, 4, 8), repeat=5):
        layout = layout_of(dict(zip(Layout.AXES, sizes, strict=True)))
        if layout.world_size != 8:
            continue
        try:
            layout.check(config)
        except LayoutError:
            assert layout not in listed
        else:
            assert layout in listed


@pytest.mark.parametrize("layout", all_layouts(8, moe_config()), ids=str)
def test_each_rank_has_its_own_place_with_tp_fastest_and_pp_slowest(layout: Layout):
    ranks = range(layout.world_size)
    places = [layout.coordinates(rank) for rank in ranks]
    assert [(at.pp, at.dp, at.sp, at.tp) for at in places] == list(
        itertools.product(*(range(layout.sizes[axis]) for axis in ("pp", "dp", "sp", "tp")))
    )
    assert [layout.rank(at) for at in places] == list(ranks)
    # Every set of experts is whole within one stage, on as many ranks as each expert has slices.
    for start in range(0, layout.world_size, max(layout.ep, layout.tp)):
        held = [layout.ep_rank(rank) for rank in ranks[start : start + max(layout.ep, layout.tp)]]
        assert held == sorted(list(range(layout.ep)) * layout.expert_slices)


def test_the_largest_ep_that_the_other_axes_and_the_model_allow_is_taken():
    def largest(experts: int = 8, **sizes: Any) -> int:
        return Layout(**sizes).with_largest_ep(moe_config(experts)).ep

    assert largest(tp=4) == 4
    assert largest(tp=2, dp=4) == 8
    assert largest(tp=2, dp=8) == 8  # as many as experts
    assert largest(dp=3) == 3
    assert largest(experts=5, sp=2, dp=2) == 4


@pytest.mark.parametrize("pp", range(1, 13))
def test_stages_are_cut_where_the_costliest_one_costs_the_least(pp: int):
    config = moe_config(layers=12)
    stages = Layout(pp=pp).stages(config)
    assert [layer for stage in stages for layer in stage] == list(range(12))
    assert len(stages) == pp and all(stages)

    def worst(lengths: tuple[int, ...]) -> float:
        costs = [layer_cost(config, layer) for layer in range(12)]
        costs[-1] += config.vocab_size * config.hidden_size
        left = iter(costs)
        return max(sum(itertools.islice(left, length)) for length in lengths)

    cuts = itertools.combinations(range(1, 12), pp - 1)
    all_lengths = (tuple(b - a for a, b in itertools.pairwise((0, *cut, 12))) for cut in cuts)
    assert worst(tuple(map(len, stages))) == pytest.approx(min(map(worst, all_lengths)))


def test_stages_of_the_16b_model_weigh_the_dense_layer_and_the_head():
    config = ModelConfig.from_dict(PRESETS["16b"])
    assert [len(stage) for stage in Layout(pp=4).stages(config)] == [8, 7, 7, 6]
    by_hand = Layout(pp=4, pipeline_layers=(7, 7, 7, 7))
    assert by_hand.stages(config)[1] == range(7, 14)


def test_a_layout_allows_the_dispatches_that_its_tp_groups_need():
    assert Layout(tp=4, ep=2).dispatches == ("replicated",)
    assert Layout(tp=4, ep=4, dp=2).dispatches == ("replicated",)
    assert Layout(tp=2, ep=4, dp=2).dispatches == ("all_gather", "all_to_all")
    with pytest.raises(LayoutError, match="moe_dispatch=all_to_all does not apply to layout tp=4"):
        Layout(tp=4, ep=4).check_dispatch("all_to_all")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "tpu"}, "device='tpu' is not one of npu, cuda, cpu"),
        ({"dtype": "int8"}, "dtype='int8' is not one of"),
        ({"load_format": "pickle"}, "load_format='pickle' is not one of safetensors, dummy"),
        ({"max_model_len": 0}, "max_model_len=0 must be at least 1"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_seqs=9 exceeds"),
        ({"max_model_len": 100, "block_size": 8, "num_blocks": 12}, "use num_blocks >= 13"),
    ],
)
def test_engine_settings_that_cannot_work_are_refused(settings: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as caught:
        EngineConfig("model", **settings)
    assert said in str(caught.value)


def test_the_least_engine_settings_that_work_are_accepted():
    config = EngineConfig("model", max_model_len=100, block_size=8, num_blocks=13)
    assert config.blocks_per_sequence == 13
    EngineConfig("model", max_num_seqs=8, max_num_batched_tokens=8)
