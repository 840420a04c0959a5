"""A `quantization_config` is read in full, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from moespan.config import QUANTIZATIONS, EngineConfig, ModelConfig, QuantizationConfig
from moespan.errors import ConfigError
from tests.support import geometry


def written(scheme: str = "w8a8") -> dict[str, Any]:
    return QuantizationConfig.of(scheme).to_dict()


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_a_written_config_reads_back_the_same(scheme: str):
    config = ModelConfig.from_dict(geometry() | {"quantization_config": written(scheme)})
    assert config.quantization == QuantizationConfig.of(scheme)


def test_the_8_bit_integers_of_llm_compressor_are_read():
    integers = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
    stored = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**integers, "strategy": "channel", "dynamic": False},
                "input_activations": {**integers, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head", "model.layers.1.mlp.gate"],
        "version": "0.13.0",
    }
    assert QuantizationConfig.from_dict(stored) == QuantizationConfig(
        "w8a8", ("lm_head", "model.layers.1.mlp.gate")
    )


def test_the_8_bit_floats_of_llm_compressor_are_read():
    floats = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
    stored = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**floats, "strategy": "channel", "dynamic": False},
                "input_activations": {**floats, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head"],
    }
    assert QuantizationConfig.from_dict(stored) == QuantizationConfig("fp8", ("lm_head",))


@pytest.mark.parametrize(
    ("place", "key", "value", "complaint"),
    [
        (("group_0", "weights"), "type", "int", "type='int' is not implemented; only 'float'"),
        (("group_0", "weights"), "strategy", "tensor", "strategy='tensor' is not implemented"),
        (("group_0", "input_activations"), "dynamic", False, "dynamic=False is not implemented"),
        (("group_0",), "input_activations", None, "'float-quantized' without input_activations"),
    ],
)
def test_other_forms_of_8_bit_floats_are_refused(
    place: tuple[str, ...], key: str, value: object, complaint: str
):
    stored = written("fp8")
    inner = stored["config_groups"]
    for name in place:
        inner = inner[name]
    inner[key] = value
    with pytest.raises(ConfigError, match=complaint):
        QuantizationConfig.from_dict(stored)


def test_the_4_bit_integers_of_llm_compressor_are_read():
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "actorder": None,
        "dynamic": False,
    }
    stored = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}
        },
        "ignore": ["lm_head"],
    }
    assert QuantizationConfig.from_dict(stored) == QuantizationConfig("int4", ("lm_head",))


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_bits", 8), ("group_size", 128), ("symmetric", False), ("actorder", "group")],
)
def test_other_forms_of_4_bits_are_refused(key: str, value: object):
    stored = written("int4")
    stored["config_groups"]["group_0"]["weights"][key] = value
    with pytest.raises(ConfigError, match=f"{key}={value!r} is not implemented"):
        QuantizationConfig.from_dict(stored)


def test_4_bits_with_rounded_activations_are_refused():
    stored = written("int4")
    group = stored["config_groups"]["group_0"]
    group["input_activations"] = written("w8a8")["config_groups"]["group_0"]["input_activations"]
    with pytest.raises(ConfigError, match="'pack-quantized' with input_activations"):
        QuantizationConfig.from_dict(stored)


@pytest.mark.parametrize(
    ("scheme", "wanted", "running"),
    [("int8", "w8a8", "w8a8"), ("w8a8", "int8", "int8"), ("w8a8", None, "w8a8"),
     ("fp8", "fp8", "fp8"), ("fp8", None, "fp8"), ("int4", None, "int4")],
)  # fmt: skip
def test_a_checkpoint_runs_as_any_scheme_of_the_same_weights(
    scheme: str, wanted: str | None, running: str
):
    assert QuantizationConfig.of(scheme).running_as(wanted) == running


@pytest.mark.parametrize(
    ("scheme", "wanted"), [("fp8", "w8a8"), ("int8", "fp8"), ("int8", "int4"), ("int4", "int8")]
)
def test_a_checkpoint_runs_as_no_scheme_of_other_weights(scheme: str, wanted: str):
    with pytest.raises(ConfigError, match=f"quantization={wanted}.* holds weights of {scheme}"):
        QuantizationConfig.of(scheme).running_as(wanted)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ((), "quant_method", "awq"),
        ((), "format", "marlin-24"),
        ((), "kv_cache_scheme", {"num_bits": 8}),
        (("config_groups", "group_0"), "targets", ["Conv2d"]),
        (("config_groups", "group_0"), "output_activations", {}),
        (("config_groups", "group_0", "weights"), "num_bits", 4),
        (("config_groups", "group_0", "weights"), "type", "float"),
        (("config_groups", "group_0", "weights"), "symmetric", False),
        (("config_groups", "group_0", "weights"), "strategy", "group"),
        (("config_groups", "group_0", "weights"), "group_size", 128),
        (("config_groups", "group_0", "input_activations"), "strategy", "tensor"),
        (("config_groups", "group_0", "input_activations"), "dynamic", False),
    ],
)
def test_a_value_that_is_not_implemented_is_refused_by_name(
    place: tuple[str, ...], key: str, value: object
):
    stored = inner = written()
    for name in place:
        inner = inner[name]
    inner[key] = value
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(geometry() | {"quantization_config": stored})
    assert f"{key}={value!r} is not implemented" in str(caught.value)


@pytest.mark.parametrize(
    ("stored", "complaint"),
    [
        (7, "must be an object"),
        (written() | {"config_groups": {}}, "one group"),
        (written() | {"config_groups": {"a": {}}}, "no weights"),
        (written() | {"ignore": "lm_head"}, "must be a list"),
        (written() | {"ignore": ["re:(a+)+b"]}, "is refused"),
        (written() | {"ignore": ["re:.*a.*b.*c.*d"]}, "is refused"),
        (written() | {"ignore": ["re:.*gate"] * 65}, "ignore has 65 patterns; at most 64 are read"),
    ],
)
def test_a_malformed_config_or_a_slow_pattern_is_refused(stored: object, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        ModelConfig.from_dict(geometry() | {"quantization_config": stored})


def test_modules_are_ignored_by_name_and_by_pattern():
    stored = QuantizationConfig("w8a8", ("lm_head", r"re:.*self_attn\..*", "re:.*mlp.gate$"))
    layer = "model.layers.1."
    names = ("lm_head", layer + "self_attn.q_proj", layer + "mlp.gate", layer + "mlp.gate_proj")
    assert [stored.holds(name) for name in names] == [False, False, False, True]


@pytest.mark.parametrize("name", ["quantization", "kv_cache_dtype"])
def test_unknown_schemes_are_refused_with_the_known_ones(name: str):
    settings: dict[str, Any] = {name: "int3"}
    with pytest.raises(ConfigError, match=f"{name}='int3' is not one of .*int8"):
        EngineConfig("model", **settings)


def test_a_list_of_many_names_is_looked_up_and_not_searched():
    names = tuple(f"model.layers.{i}.x" for i in range(50_000))
    config = QuantizationConfig.from_dict(written() | {"ignore": [*names, "re:.*gate"]})
    held = [config.holds(f"model.layers.{i}.y") for i in range(50_000)]  # 5e9 comparisons if not
    assert all(held) and not config.holds(names[-1]) and not config.holds("model.mlp.gate")
