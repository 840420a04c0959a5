"""Each rank reads exactly its placement's bytes, and holds little more while it does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from moespan.checkpoint.loader import load_weights
from moespan.checkpoint.placement import Piece, place
from moespan.checkpoint.random import make_checkpoint, preset
from moespan.checkpoint.source import SafetensorsSource
from moespan.config import Layout
from moespan.errors import CheckpointError
from tests.support import CPU, Oracle, altered_checkpoint

LAYOUTS = [
    Layout(),
    Layout(tp=8),
    Layout(tp=4, ep=2),
    Layout(tp=2, ep=4, sp=2, pp=2),
    Layout(pp=5),
    Layout(dp=4, ep=4),
]


class CountingSource(SafetensorsSource):
    """Counts the bytes that leave it."""

    def read(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
        for piece, values in super().read(pieces):
            self.read_bytes = getattr(self, "read_bytes", 0) + values.nbytes
            yield piece, values


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_reads_its_slices_and_not_one_byte_more(layout: Layout):
    oracle = Oracle("sixteen")
    for rank in range(layout.world_size):
        placement = place(oracle.config, layout, rank)
        source = CountingSource(oracle.folder, oracle.config)
        weights, report = load_weights(placement, source, torch.float32, CPU, threads=1)
        # The file holds bfloat16.
        assert source.read_bytes == report.read_bytes == 2 * placement.num_elements_read
        assert report.held_bytes == placement.num_bytes("float32")
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


PROGRAM = """
import resource, sys, torch
from moespan.checkpoint.loader import load_weights
from moespan.checkpoint.placement import place
from moespan.checkpoint.source import SafetensorsSource
from moespan.config import Layout, ModelConfig

def peak_bytes():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

config = ModelConfig.from_pretrained(sys.argv[1])
placement = place(config, Layout(tp=2), 1)
source = SafetensorsSource(sys.argv[1], config)
before = peak_bytes()
load_weights(placement, source, torch.bfloat16, torch.device("cpu"), threads=1)
print(peak_bytes() - before, placement.num_bytes("bfloat16"))
"""


def test_loading_takes_little_more_memory_than_the_weights(tmp_path: Path):
    folder = tmp_path / "model"
    wide = {"hidden_size": 1024, "n_routed_experts": 16, "moe_intermediate_size": 512}
    make_checkpoint(folder, preset("tiny", {**wide, "vocab_size": 20000}))
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], check=True, capture_output=True, text=True
    ).stdout
    grown_bytes, held_bytes = map(int, out.split())
    assert held_bytes > 80 << 20
    # One batch of 64 MiB is mapped at a time by each thread.
    assert grown_bytes <= 1.1 * held_bytes + (96 << 20)
