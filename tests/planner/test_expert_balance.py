"""Placements from counts: every expert is there, ranks hold equally many, the busiest has less."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moespan.config import Layout, ModelConfig
from moespan.parallel.dispatch import Dispatch, PhysicalExperts
from moespan.parallel.mesh import Mesh
from moespan.parallel.tokens import split_evenly
from moespan.planner.expert_balance import balanced, rank_rows
from tests.parallel.threads import on_all_ranks, thread_meshes
from tests.support import CPU, geometry

counts_of_a_layer = st.lists(st.integers(0, 1000), min_size=4, max_size=24)


def contiguous(num_experts: int, ep: int) -> tuple[tuple[int, ...], ...]:
    sizes = split_evenly(num_experts, ep)
    starts = [sum(sizes[:rank]) for rank in range(ep)]
    return tuple(tuple(range(s, s + n)) for s, n in zip(starts, sizes, strict=True))


@given(counts_of_a_layer, st.integers(2, 4))
def test_ranks_hold_equally_many_experts_and_the_busiest_has_no_more_rows(
    counts: list[int], ep: int
):
    table = balanced(counts, ep)
    assert sorted(expert for held in table for expert in held) == list(range(len(counts)))
    assert sorted(map(len, table)) == sorted(split_evenly(len(counts), ep))
    before = max(rank_rows(counts, contiguous(len(counts), ep)))
    assert max(rank_rows(counts, table)) <= before
    assert sum(rank_rows(counts, table)) == pytest.approx(sum(counts))


@given(counts_of_a_layer, st.integers(2, 4), st.integers(0, 2))
def test_copies_lie_on_different_ranks_and_within_their_room(
    counts: list[int], ep: int, copies: int
):
    copies = min(copies, len(counts) - -(-len(counts) // ep))
    table = balanced(counts, ep, copies)
    assert set().union(*table) == set(range(len(counts)))
    assert all(len(set(held)) == len(held) for held in table)
    assert max(map(len, table)) <= -(-len(counts) // ep) + copies


def test_hot_neighbours_are_parted_and_a_copy_halves_the_hottest():
    counts = [100, 90, 80, 70, 1, 1, 1, 1]
    assert max(rank_rows(counts, contiguous(8, 2))) == 340
    assert max(rank_rows(counts, balanced(counts, 2))) == 172
    hot = [1000, 1, 1, 1, 1, 1, 1, 1]
    assert max(rank_rows(hot, balanced(hot, 2))) == 1003
    copied = balanced(hot, 2, copies=1)
    assert Counter(expert for held in copied for expert in held)[0] == 2
    assert max(rank_rows(hot, copied)) < 510


@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all"])
def test_predicted_rows_are_those_that_ranks_compute(dispatch: str):
    config, layout, num_chosen = ModelConfig.from_dict(geometry()), Layout(ep=2, dp=2), 2
    odds = torch.tensor([9.0, 8.0, 7.0, 0.5, 0.2, 0.1])  # a skewed router
    generator = torch.Generator().manual_seed(3)
    chosen = [
        torch.multinomial(odds.expand(n, 6), num_chosen, generator=generator) for n in (31, 50)
    ]
    counts = torch.cat(chosen).flatten().bincount(minlength=6).tolist()
    meshes = thread_meshes(layout, dispatch)
    busiest = []
    for table in (contiguous(6, 2), balanced(counts, 2)):
        experts = PhysicalExperts(table, 6, CPU)
        rows = [0, 0]

        def run(mesh: Mesh, experts: PhysicalExperts = experts, rows: list[int] = rows) -> None:
            send = Dispatch(config, mesh, dispatch, 4)
            send.begin_step([31, 50])
            first = experts.starts[mesh.rank]

            def compute(x: Tensor, weights: Tensor, physical_ids: Tensor) -> Tensor:
                rows[mesh.rank] += int(((physical_ids >= first) & (physical_ids < first + 3)).sum())
                return x

            own = chosen[mesh.rank]
            send(torch.zeros(len(own), 4), torch.ones(own.shape), own, experts, compute)

        on_all_ranks(meshes, run)
        assert rows == rank_rows(counts, table)
        busiest.append(max(rows))
    assert busiest[1] < 0.75 * busiest[0]
