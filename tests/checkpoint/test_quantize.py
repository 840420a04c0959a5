"""A quantised checkpoint equals quantisation while loading, and is complete or absent."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moespan.checkpoint.loader import load_weights
from moespan.checkpoint.placement import Piece, place
from moespan.checkpoint.quantize import quantize_checkpoint
from moespan.checkpoint.random import make_checkpoint
from moespan.checkpoint.rounding import QuantizedWeight, round_rows
from moespan.checkpoint.source import INDEX_FILE, SafetensorsSource
from moespan.config import QUANTIZATIONS, Layout, ModelConfig
from moespan.errors import CheckpointError, ConfigError
from tests.support import CPU, QUICKSTART, WHOLE_GROUPS, Oracle, altered_checkpoint, geometry


def written(tmp_path: Path, source: Path, scheme: str = "int8") -> Path:
    quantize_checkpoint(source, tmp_path / "out", scheme)
    return tmp_path / "out"


def load(folder: Path, layout: Layout, rank: int, quantization: str | None = None):
    config = ModelConfig.from_pretrained(folder)
    placement = place(config, layout, rank, quantization=quantization)
    source = SafetensorsSource(folder, config)
    weights, report = load_weights(placement, source, torch.bfloat16, CPU)
    assert report.read_bytes == sum(map(source.num_bytes, placement.pieces))
    return placement, weights


def assert_same(ours: torch.Tensor | QuantizedWeight, theirs: torch.Tensor | QuantizedWeight):
    if isinstance(theirs, QuantizedWeight):
        assert isinstance(ours, QuantizedWeight)
        assert ours.activation_bits == theirs.activation_bits
        assert_same(ours.values, theirs.values)
        assert_same(ours.scales, theirs.scales)
    else:
        assert isinstance(ours, torch.Tensor)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.float(), theirs.float())  # torch.equal takes no 8-bit floats


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True, "attention_bias": True}])
def test_it_loads_as_weights_that_are_quantised_while_loading(
    tmp_path: Path, overrides: dict[str, bool], scheme: str
):
    make_checkpoint(tmp_path / "in", geometry(torch_dtype="bfloat16", **WHOLE_GROUPS, **overrides))
    out = written(tmp_path, tmp_path / "in", scheme)
    _, stored = load(out, Layout(), 0)
    _, made = load(tmp_path / "in", Layout(), 0, scheme)
    assert stored.keys() == made.keys()
    for name, weight in made.items():
        assert_same(stored[name], weight)


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        *itertools.product(["int8", "fp8", "int4"], [Layout(tp=4, ep=2), Layout(pp=2, dp=2, ep=2)]),
        ("int8", Layout(tp=8)),
    ],
    ids=str,
)
def test_ranks_read_their_slices_of_numbers_and_scales(tmp_path: Path, layout: Layout, scheme: str):
    oracle = Oracle("sixteen")
    out = written(tmp_path, oracle.folder, scheme)
    whole = {
        key: value for file in out.glob("*.safetensors") for key, value in load_file(file).items()
    }

    def expected(piece: Piece) -> torch.Tensor:
        values = whole[piece.tensor]
        if piece.is_scale and len(piece.tensor_index) == 1:
            values = values[:, 0]
        return values[piece.tensor_index]

    for rank in range(layout.world_size):
        placement, weights = load(out, layout, rank)
        assert not placement.cut_rows
        for piece in placement.pieces:
            weight, theirs = weights[piece.parameter], expected(piece)
            if isinstance(weight, QuantizedWeight):
                weight = weight.scales if piece.is_scale else weight.values
                if piece.tensor == "lm_head.weight" and scheme == "int4":
                    theirs, _ = round_rows(theirs)
            assert_same(weight[piece.index], theirs.to(weight.dtype))


def test_integers_can_be_run_with_activations_rounded_or_not(tmp_path: Path):
    out = written(tmp_path, Oracle("tiny").folder, "w8a8")
    for scheme, bits in (("int8", 16), ("w8a8", 8), (None, 8)):
        placement, weights = load(out, Layout(), 0, scheme)
        qkv = weights["layers.0.attention.qkv"]
        assert isinstance(qkv, QuantizedWeight)
        assert qkv.activation_bits == bits
        # The file holds the head as floats, which are rounded while loading.
        head = placement.parameters["head"].scheme
        assert head is not None and (head.dtype, head.activation_bits) == ("int8", 16)


def test_8_bit_integers_are_in_the_form_that_others_read(tmp_path: Path):
    out = written(tmp_path, QUICKSTART, "w8a8")
    names = {file.name for file in out.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        INDEX_FILE,
        "tokenizer.json",
        "tokenizer_config.json",
    }
    raw = json.loads((out / "config.json").read_text())
    group = raw["quantization_config"]["config_groups"]["group_0"]
    assert raw["quantization_config"]["format"] == "int-quantized"
    assert "lm_head" in raw["quantization_config"]["ignore"]
    assert (group["weights"]["num_bits"], group["weights"]["strategy"]) == (8, "channel")
    assert group["input_activations"]["dynamic"] is True
    with safe_open(str(out / "model-00001-of-00001.safetensors"), "pt") as file:
        name = "model.layers.1.mlp.experts.3.down_proj.weight"
        assert file.get_slice(name).get_dtype() == "I8"
        scale = file.get_slice(name + "_scale")
        assert (scale.get_dtype(), scale.get_shape()) == ("F32", [128, 1])
        assert file.get_slice("model.layers.1.mlp.gate.weight").get_dtype() == "BF16"
        assert file.get_slice("lm_head.weight").get_dtype() == "BF16"
    index = json.loads((out / INDEX_FILE).read_text())
    assert index["weight_map"][name + "_scale"] == "model-00001-of-00001.safetensors"


def test_8_bit_floats_are_in_the_form_that_others_read(tmp_path: Path):
    out = written(tmp_path, QUICKSTART, "fp8")
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    group = stored["config_groups"]["group_0"]
    assert (stored["format"], stored["ignore"]) == (
        "float-quantized",
        ["re:.*mlp.gate$", "lm_head"],
    )
    kinds = [group[name] for name in ("weights", "input_activations")]
    assert [(kind["num_bits"], kind["type"]) for kind in kinds] == [(8, "float")] * 2
    assert [kind["strategy"] for kind in kinds] == ["channel", "token"]
    with safe_open(str(out / "model-00001-of-00001.safetensors"), "pt") as file:
        name = "model.layers.1.mlp.experts.3.down_proj.weight"
        assert file.get_slice(name).get_dtype() == "F8_E4M3"
        scale = file.get_slice(name + "_scale")
        assert (scale.get_dtype(), scale.get_shape()) == ("F32", [128, 1])
        assert file.get_slice("lm_head.weight").get_dtype() == "BF16"


def test_4_bits_are_in_the_form_that_others_read(tmp_path: Path):
    out = written(tmp_path, QUICKSTART, "int4")
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    group = stored["config_groups"]["group_0"]
    assert (stored["format"], stored["ignore"]) == ("pack-quantized", ["re:.*mlp.gate$", "lm_head"])
    keys = ("num_bits", "type", "symmetric", "strategy", "group_size")
    assert [group["weights"][key] for key in keys] == [4, "int", True, "group", 32]
    assert group["input_activations"] is None
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensors = load_file(out / "model-00001-of-00001.safetensors")
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    packed, scales = tensors[name + "_packed"], tensors[name + "_scale"]
    assert (packed.dtype, packed.shape) == (torch.int32, (128, 64 // 8))
    assert (scales.dtype, scales.shape) == (torch.bfloat16, (128, 64 // 32))
    assert tensors[name + "_shape"].tolist() == [128, 64]
    # Unpacked as compressed-tensors does: eight in an int32, the first in the lowest bits, minus 8.
    integers = torch.stack([(packed >> 4 * i & 15) - 8 for i in range(8)], -1).flatten(1)
    weights = integers * scales.float().repeat_interleave(32, 1)
    original = load_file(QUICKSTART / "model.safetensors")[name].float()
    # The error is half a step and the change of the outermost value, 8, by the rounded scale; or,
    # at the other end of the range, the missing step.
    steps = scales.float().abs().repeat_interleave(32, 1)
    assert ((weights - original).abs() <= 1.05 * steps).all()
    assert (weights - original).square().mean() < 0.01 * original.square().mean()


def test_groups_must_divide_rows(tmp_path: Path):
    make_checkpoint(tmp_path / "in", geometry(intermediate_size=72, moe_intermediate_size=32))
    with pytest.raises(ConfigError, match="groups of 32, and intermediate_size=72 is no multiple"):
        written(tmp_path, tmp_path / "in", "int4")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_nan_and_integers_in_place_of_8_bit_floats_are_refused(tmp_path: Path):
    out = written(tmp_path, Oracle("tiny").folder, "fp8")
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name].view(torch.uint8)[3, 5] = 0x7F  # NaN
    save_file(tensors, file, metadata={"format": "pt"})
    config = ModelConfig.from_pretrained(out)
    source, placement = SafetensorsSource(out, config), place(config, Layout(), 0)
    with pytest.raises(CheckpointError) as caught:
        load_weights(placement, source, torch.bfloat16, CPU, check_finite=True)
    assert caught.value.problems == [f"{name} holds NaN or Inf"]
    save_file(tensors | {name: tensors[name].view(torch.int8)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        SafetensorsSource(out, config)
    assert f"{name} has dtype I8, not one of F8_E4M3" in caught.value.problems[0]


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("scheme", QUANTIZATIONS)
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.experts.3.up_proj.weight", "model.norm.weight"]
)
def test_weights_that_are_not_finite_are_named_and_nothing_is_written(
    tmp_path: Path, name: str, scheme: str, bad: float
):
    spoiled = tmp_path / "in"
    altered_checkpoint(QUICKSTART, spoiled, name, lambda w: w.view(-1)[7:8].fill_(bad))
    with pytest.raises(CheckpointError) as caught:
        written(tmp_path, spoiled, scheme)
    assert caught.value.problems == [f"{name} holds NaN or Inf"]
    assert [*tmp_path.iterdir()] == [spoiled]


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_stored_scales_that_are_not_finite_are_named(tmp_path: Path, scheme: str):
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale"
    out = written(tmp_path, QUICKSTART, scheme)
    spoiled = tmp_path / "spoiled"
    altered_checkpoint(out, spoiled, name, lambda w: w.view(-1)[:1].fill_(torch.inf))
    config = ModelConfig.from_pretrained(spoiled)
    source, placement = SafetensorsSource(spoiled, config), place(config, Layout(), 0)
    with pytest.raises(CheckpointError) as caught:
        load_weights(placement, source, torch.bfloat16, CPU)
    assert caught.value.problems == [f"{name} holds NaN or Inf"]


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["FIFO", "device"]
)
def test_what_is_no_file_is_not_copied(tmp_path: Path, make: Callable[[Path], object]):
    shutil.copytree(QUICKSTART, tmp_path / "in")
    make(tmp_path / "in" / "LICENSE")
    with pytest.raises(CheckpointError, match=r"in/LICENSE cannot be copied: .*not a regular file"):
        written(tmp_path, tmp_path / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_scales_of_other_shape_and_dtype_are_read_and_floats_in_place_of_integers_refused(
    tmp_path: Path,
):
    oracle = Oracle("tiny")
    out = written(tmp_path, oracle.folder)
    (file,) = out.glob("*.safetensors")

    def rewritten(change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        tensors = {name: change(name, value) for name, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})

    rewritten(lambda name, x: x[:, 0].bfloat16() if name.endswith("_scale") else x)
    _, weights = load(out, Layout(tp=2), 1)
    out_scales = weights["layers.0.attention.out"].scales
    expected = load_file(file)["model.layers.0.self_attn.o_proj.weight_scale"]
    assert torch.equal(out_scales, expected.float())
    rewritten(lambda name, x: x.float() if name == "lm_head.weight" else x)
    with pytest.raises(CheckpointError, match="1 problem") as caught:
        load(out, Layout(), 0)
    assert "lm_head.weight has dtype F32, not one of I8" in caught.value.problems[0]


def test_nothing_is_overwritten_and_integers_are_not_quantised_again(tmp_path: Path):
    source = Oracle("tiny").folder
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="exists; choose another folder"):
        written(tmp_path, source)
    (tmp_path / "out").rmdir()
    out = written(tmp_path, source)
    with pytest.raises(ConfigError, match="is quantised already"):
        quantize_checkpoint(out, tmp_path / "again", "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path):
    shutil.copytree(QUICKSTART, tmp_path / "in")

    def fail(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tmp_path / "in", tmp_path / "out", "int8", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
