"""Random weights are a pure function of seed and name, with and without files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from moespan.checkpoint.loader import load_weights
from moespan.checkpoint.placement import checkpoint_tensors, place
from moespan.checkpoint.random import RandomSource, make_checkpoint
from moespan.checkpoint.source import INDEX_FILE, SafetensorsSource
from moespan.config import Layout, ModelConfig
from moespan.errors import ConfigError
from tests.support import CPU, geometry

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# More rows than one chunk, and cuts inside chunks.
TALL = ModelConfig.from_dict(geometry(vocab_size=901, num_hidden_layers=1))


def draw_all(
    config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    source = RandomSource(config, dtype, seed)
    return {name: source.draw(name) for name in source.shapes}


@pytest.mark.parametrize("tp", [2, 4])
def test_every_layout_gets_slices_of_the_same_model(tp: int):
    whole = draw_all(TALL, seed=7)
    source = RandomSource(TALL, torch.float32, seed=7)
    for rank in range(tp):
        for batch in source.batches(place(TALL, Layout(tp=tp), rank).pieces):
            for piece, values in source.read(batch):
                assert torch.equal(values, whole[piece.tensor][piece.tensor_index])


@given(
    start=st.integers(0, 900),
    length=st.integers(1, 901),
    columns=st.tuples(st.integers(0, 31), st.integers(1, 32)),
)
def test_any_slice_is_that_of_the_whole_tensor(start: int, length: int, columns: tuple[int, int]):
    index = (slice(start, min(start + length, 901)), slice(columns[0], sum(columns)))
    source = RandomSource(TALL, torch.bfloat16, seed=7)
    assert torch.equal(source.draw(EMBED, index), source.draw(EMBED)[index])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dummy_weights_are_those_of_the_checkpoint_with_the_same_seed(tmp_path: Path, dtype: str):
    raw = geometry(torch_dtype=dtype, vocab_size=300, attention_bias=True)
    make_checkpoint(tmp_path / "made", raw, seed=5)
    config = ModelConfig.from_pretrained(tmp_path / "made")
    torch_dtype = getattr(torch, dtype)
    placement = place(config, Layout(tp=2), 1)
    loaded, report = load_weights(
        placement, SafetensorsSource(tmp_path / "made", config), torch_dtype, CPU
    )
    dummy, dummy_report = load_weights(
        placement, RandomSource(config, torch_dtype, seed=5), torch_dtype, CPU
    )
    assert loaded.keys() == dummy.keys()
    assert all(torch.equal(loaded[name], dummy[name]) for name in loaded)
    assert report.read_bytes == dummy_report.read_bytes


def test_weights_differ_by_name_and_by_seed():
    first, second = draw_all(TALL, seed=0), draw_all(TALL, seed=1)
    drawn = [name for name in first if not name.endswith("norm.weight")]
    assert not any(torch.equal(first[name], second[name]) for name in drawn)
    starts = {tuple(first[name].flatten()[:8].mul(1e6).long().tolist()) for name in drawn}
    assert len(starts) == len(drawn)
    # Chunks of rows of one tensor differ as well.
    assert not torch.equal(first[EMBED][:256], first[EMBED][256:512])


def test_norms_are_one_and_deviations_keep_activations_near_one():
    raw = geometry(vocab_size=901, hidden_size=128, intermediate_size=70, num_hidden_layers=2)
    for name, values in draw_all(ModelConfig.from_dict(raw), seed=0).items():
        if name.endswith("norm.weight"):
            assert torch.equal(values, torch.ones(128))
            continue
        expected = 1.0 if name == EMBED else values.shape[1] ** -0.5
        assert float(values.std()) == pytest.approx(expected, rel=0.1), name
        assert abs(float(values.mean())) < 0.1 * expected, name


def test_a_made_checkpoint_is_whole_and_names_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shard_bytes = 20_000
    monkeypatch.setattr("moespan.checkpoint.writer._SHARD_BYTES", shard_bytes)
    raw = geometry()
    written: list[int] = []
    make_checkpoint(tmp_path, raw, seed=2, progress=written.append)
    config = ModelConfig.from_pretrained(tmp_path)
    assert config == ModelConfig.from_dict(raw)
    assert json.loads((tmp_path / "config.json").read_text()) == raw
    SafetensorsSource(tmp_path, config)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert list(index["weight_map"]) == list(checkpoint_tensors(config))
    files = sorted({*index["weight_map"].values()})
    assert files == sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) == len(written) > 3
    sizes = [
        sum(tensor.numel() * 4 for tensor in load_file(tmp_path / file).values()) for file in files
    ]
    assert sizes == written
    assert max(sizes) <= shard_bytes
    assert index["metadata"]["total_size"] == sum(sizes)


def test_a_folder_that_holds_a_checkpoint_is_never_overwritten(tmp_path: Path):
    make_checkpoint(tmp_path, geometry(), seed=0)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="already holds a checkpoint; choose another folder"):
        make_checkpoint(tmp_path, geometry(), seed=1)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
