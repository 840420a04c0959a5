"""A stage gets the whole hidden state of the previous stage, and no part travels twice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moespan.config import Layout
from moespan.parallel.mesh import Mesh
from moespan.parallel.pipeline import StageLink
from tests.parallel.threads import on_all_ranks, sent_over, thread_meshes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_size", [8, 7])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 16])
def test_the_hidden_state_arrives_whole_and_each_tp_rank_sends_its_part(
    tp: int, num_tokens: int, hidden_size: int, dtype: torch.dtype
):
    x = torch.randn(num_tokens, hidden_size).to(dtype)
    meshes = thread_meshes(Layout(tp=tp, pp=3))

    def run(mesh: Mesh) -> Tensor:
        link = StageLink(mesh, hidden_size, dtype)
        here = x if mesh.is_first_stage else link.receive(num_tokens)
        if not mesh.is_last_stage:
            link.send(here)
        return here

    for here in on_all_ranks(meshes, run):
        assert here.dtype == dtype and torch.equal(here, x)
    part = -(-num_tokens * hidden_size // tp)
    for mesh in meshes:
        assert sent_over(mesh.pp) == ([] if mesh.is_last_stage else [("hidden", part)])


def test_steps_in_flight_arrive_in_their_order():
    states = [torch.full((step + 1, 4), float(step)) for step in range(3)]
    meshes = thread_meshes(Layout(tp=2, pp=2))

    def run(mesh: Mesh) -> list[Tensor]:
        link = StageLink(mesh, 4, torch.float32)
        if mesh.is_first_stage:
            for state in states:
                link.send(state)
            return states
        return [link.receive(len(state)) for state in states]

    for arrived in on_all_ranks(meshes, run):
        assert all(map(torch.equal, arrived, states))
