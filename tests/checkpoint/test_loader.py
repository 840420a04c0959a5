"""Each rank reads exactly its placement's bytes, and takes little more memory meanwhile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from moespan.checkpoint.building import Loaded
from moespan.checkpoint.loader import load_weights
from moespan.checkpoint.placement import Piece, checkpoint_tensors, place
from moespan.checkpoint.presets import preset
from moespan.checkpoint.random import make_checkpoint
from moespan.checkpoint.rounding import QuantizedWeight, round_groups, round_rows
from moespan.checkpoint.source import SafetensorsSource, Source
from moespan.config import QUANTIZATIONS, SCHEMES, Layout, ModelConfig
from moespan.errors import CheckpointError, LayoutError
from moespan.ops import Ops, ReferenceOps, ops_for
from tests.support import CPU, QUICKSTART, WHOLE_GROUPS, Oracle, altered_checkpoint, geometry

LAYOUTS = [
    Layout(),
    Layout(tp=8),
    Layout(tp=4, ep=2),
    Layout(tp=2, ep=4, sp=2, pp=2),
    Layout(pp=5),
    Layout(dp=4, ep=4),
]


class CountingSource(SafetensorsSource):
    """A source that counts the bytes that it yields."""

    def read(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
        for piece, values in super().read(pieces):
            self.read_bytes = getattr(self, "read_bytes", 0) + values.nbytes
            yield piece, values


def held_bytes(weight: torch.Tensor | QuantizedWeight) -> int:
    if isinstance(weight, QuantizedWeight):
        return weight.values.nbytes + weight.scales.nbytes
    return weight.nbytes


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_reads_its_slices_and_not_one_byte_more(layout: Layout):
    oracle = Oracle("sixteen")
    for rank in range(layout.world_size):
        placement = place(oracle.config, layout, rank)
        source = CountingSource(oracle.folder, oracle.config)
        weights, report = load_weights(placement, source, torch.float32, CPU, threads=1)
        # The file holds bfloat16.
        assert source.read_bytes == report.read_bytes == 2 * placement.num_elements_read
        assert report.held_bytes == sum(map(held_bytes, weights.values()))
        assert {name: tuple(w.shape) for name, w in weights.items()} == {
            name: parameter.shape for name, parameter in placement.parameters.items()
        }


def test_slices_of_all_ranks_together_are_the_whole_tensor():
    oracle = Oracle("sixteen")
    layout = Layout(tp=4, ep=4)
    source = oracle.source()
    (whole, _), *parts = (
        load_weights(place(oracle.config, one, rank), source, torch.float32, CPU)
        for one, rank in [(Layout(), 0), *((layout, rank) for rank in range(4))]
    )
    name = "layers.1.mlp.experts.down"
    assert torch.equal(torch.cat([weights[name] for weights, _ in parts]), whole[name])
    name = "layers.0.mlp.down"
    assert torch.equal(torch.cat([weights[name] for weights, _ in parts], 1), whole[name])


def spoil(weight: torch.Tensor) -> None:
    weight.view(-1)[0] = torch.nan


def test_weights_that_are_not_finite_are_all_named_on_request(tmp_path: Path):
    names = ["model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"]
    folder = Oracle("tiny").folder
    for number, name in enumerate(names):
        folder = altered_checkpoint(folder, tmp_path / str(number), name, spoil)
    config = Oracle("tiny").config
    source = SafetensorsSource(folder, config)
    placement = place(config, Layout(), 0)
    load_weights(placement, source, torch.float32, CPU)
    with pytest.raises(CheckpointError) as caught:
        load_weights(placement, source, torch.float32, CPU, check_finite=True)
    assert sorted(caught.value.problems) == sorted(f"{name} holds NaN or Inf" for name in names)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("scheme", QUANTIZATIONS)
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)], ids=str)
@pytest.mark.parametrize(
    "ops", [ReferenceOps(), ops_for("cpu")], ids=lambda ops: type(ops).__name__
)
def test_integers_do_not_hide_weights_that_are_not_finite(
    tmp_path: Path, layout: Layout, scheme: str, bad: float, ops: Ops
):
    names = [
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.1.mlp.experts.3.down_proj.weight",
    ]
    folder = QUICKSTART
    for number, name in enumerate(names):
        target = tmp_path / str(number)
        folder = altered_checkpoint(folder, target, name, lambda w: w.view(-1)[:1].fill_(bad))
    config = ModelConfig.from_pretrained(folder)
    placement = place(config, layout, 0, quantization=scheme)
    source = SafetensorsSource(folder, config)
    with pytest.raises(CheckpointError) as caught:
        load_weights(placement, source, torch.bfloat16, CPU, new_builder=ops.builder)
    assert caught.value.problems == sorted(f"{name} holds NaN or Inf" for name in names)


PROGRAM = """
import resource, sys, torch
from moespan.checkpoint.loader import load_weights
from moespan.checkpoint.placement import place
from moespan.checkpoint.source import SafetensorsSource
from moespan.config import Layout, ModelConfig

def peak_bytes():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

config = ModelConfig.from_pretrained(sys.argv[1])
placement = place(config, Layout(tp=2), 1, quantization=sys.argv[2] or None)
source = SafetensorsSource(sys.argv[1], config)
before = peak_bytes()
load_weights(placement, source, torch.bfloat16, torch.device("cpu"), threads=1)
print(peak_bytes() - before, placement.num_bytes("bfloat16"))
"""


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "model"
    wide = {"hidden_size": 1024, "n_routed_experts": 16, "moe_intermediate_size": 512}
    make_checkpoint(folder, preset("tiny", {**wide, "vocab_size": 20000}))
    return folder


@pytest.mark.parametrize("quantization", ["", "int8"])
def test_loading_takes_little_more_memory_than_the_weights(
    wide_checkpoint: Path, quantization: str
):
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(wide_checkpoint), quantization],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    grown_bytes, held_bytes = map(int, out.split())
    assert held_bytes > (50 if quantization else 80) << 20
    # Each thread maps one batch of 64 MiB at a time. Rows that are cut over ranks wait as they were
    # read: here, without ep, a third of the matrices.
    waiting_bytes = held_bytes // 3 if quantization else 0
    assert grown_bytes <= 1.1 * held_bytes + waiting_bytes + (96 << 20)


def read_of(weights: Loaded, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
    """The values [rows, columns] and scales [rows] that `piece` was put into."""
    weight = weights[piece.parameter]
    assert isinstance(weight, QuantizedWeight)
    return weight.values[piece.index], weight.scales[piece.index[:-1]]


def load_ranks_together(
    config: ModelConfig, source: Source, layout: Layout, quantization: str
) -> list[Loaded]:
    """The weights of all ranks of one stage, which exchange their maxima."""
    maxima_of_ranks: list[torch.Tensor] = []

    def collect(maxima: torch.Tensor) -> torch.Tensor:
        maxima_of_ranks.append(maxima.clone())
        return maxima

    loaded = []
    for maximum_over_tp in (collect, lambda _: torch.stack(maxima_of_ranks).amax(0)):
        loaded = [
            load_weights(
                place(config, layout, rank, quantization=quantization),
                source,
                torch.bfloat16,
                CPU,
                maximum_over_tp=maximum_over_tp,
            )[0]
            for rank in range(layout.tp)
        ]
    return loaded


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp=2), Layout(tp=4, ep=2), Layout(tp=8, ep=8)], ids=str
)
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_every_layout_rounds_whole_rows(layout: Layout, quantization: str):
    oracle = Oracle("sixteen")
    source, whole = oracle.source(), place(oracle.config, Layout(), 0, quantization=quantization)
    dtype = getattr(torch, SCHEMES[quantization].dtype)
    expected = {
        piece.tensor: round_rows(values, dtype=dtype)
        for batch in source.batches(whole.pieces)
        for piece, values in source.read(batch)
        if whole.parameters[piece.parameter].is_quantized
    }
    linear = [name for name in checkpoint_tensors(oracle.config) if "_proj" in name]
    head = ["lm_head.weight"] if quantization == "int8" else []
    assert sorted(expected) == sorted([*linear, *head])
    ranks = load_ranks_together(oracle.config, source, layout, quantization)
    for rank, weights in enumerate(ranks):
        placement = place(oracle.config, layout, rank, quantization=quantization)
        held = [weight for weight in weights.values() if isinstance(weight, QuantizedWeight)]
        num_bytes = sum(held_bytes(weight) for weight in held)
        num_bytes += sum(w.nbytes for w in weights.values() if isinstance(w, torch.Tensor))
        assert num_bytes == placement.num_bytes("bfloat16")
        for piece in placement.pieces:
            if placement.parameters[piece.parameter].is_quantized:
                values, scales = expected[piece.tensor]
                found_values, found_scales = read_of(weights, piece)
                assert found_values.dtype == dtype
                assert torch.equal(found_values.float(), values[piece.tensor_index].float())
                assert torch.equal(found_scales, scales[piece.tensor_index[0]])


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_norms_router_and_embedding_stay_floats_and_activations_are_rounded_by_the_scheme(
    scheme: str,
):
    oracle = Oracle("tiny")
    placement = place(oracle.config, Layout(), 0, quantization=scheme)
    weights, _ = load_weights(placement, oracle.source(), torch.bfloat16, CPU)
    bits = {
        name: weight.activation_bits
        for name, weight in weights.items()
        if isinstance(weight, QuantizedWeight)
    }
    modules = ("qkv", "out", "gate_up", "down")
    expected = {
        name: SCHEMES[scheme].activation_bits
        for name in weights
        if name.rpartition(".")[2] in modules
    }
    assert bits == expected | ({} if scheme == "fp8" else {"head": 16})
    assert scheme != "int4" or weights["head"].values.dtype == torch.int8


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=4, ep=2), Layout(tp=4, ep=4)], ids=str)
def test_every_layout_cuts_between_groups_and_rounds_as_one_rank_does(layout: Layout):
    oracle = Oracle("sixteen")
    source, whole = oracle.source(), place(oracle.config, Layout(), 0, quantization="int4")
    expected = {
        piece.tensor: round_groups(values, 32)
        for batch in source.batches(whole.pieces)
        for piece, values in source.read(batch)
        if "_proj" in piece.tensor
    }
    for rank in range(layout.tp):
        placement = place(oracle.config, layout, rank, quantization="int4")
        assert not placement.cut_rows
        weights, report = load_weights(placement, source, torch.bfloat16, CPU)
        assert report.held_bytes == sum(map(held_bytes, weights.values()))
        for piece in (piece for piece in placement.pieces if "_proj" in piece.tensor):
            weight = weights[piece.parameter]
            rows, columns = piece.tensor_index
            for per_column, found, theirs in zip(
                (8, 32), (weight.values, weight.scales), expected[piece.tensor], strict=True
            ):
                start, stop = columns.start // per_column, columns.stop // per_column
                here = (*piece.index[:-1], slice(0, stop - start))
                assert torch.equal(found[here], theirs[rows, start:stop])


def test_a_group_is_never_cut():
    with pytest.raises(LayoutError, match=r"tp=8 gives a rank 16 columns .*use tp of 1, 2, 4"):
        place(Oracle("sixteen").config, Layout(tp=8), 0, quantization="int4")


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_a_tied_head_is_not_quantised(scheme: str):
    config = ModelConfig.from_dict(geometry(tie_word_embeddings=True, **WHOLE_GROUPS))
    parameters = place(config, Layout(), 0, quantization=scheme).parameters
    assert not parameters["embed"].is_quantized
    assert "head" not in parameters
