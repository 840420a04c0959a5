"""With every dispatch, each token gets the weighted sum of the experts that its router chose."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moespan.checkpoint.experts import ExpertPlacement
from moespan.config import Layout, ModelConfig
from moespan.parallel.dispatch import Dispatch, PhysicalExperts
from moespan.parallel.mesh import Mesh
from tests.parallel.threads import on_all_ranks, sent_over, thread_meshes
from tests.support import CPU, assert_close, geometry
from tests.tiers import examples

NUM_EXPERTS, NUM_CHOSEN, HIDDEN = 6, 2, 4
CONFIG = ModelConfig.from_dict(geometry())
TABLE = {"default": [[5, 0], [1, 0, 2], [3, 5], [0, 4]]}

SPREAD = [
    Layout(ep=2, dp=2),
    Layout(ep=2, sp=4),
    Layout(ep=4, sp=2, dp=2),
    Layout(tp=2, ep=4, sp=2),
    Layout(tp=2, ep=4, dp=4),
    Layout(tp=4, ep=8, sp=2),
]


def physical(experts: list[list[int]], num_experts: int = NUM_EXPERTS) -> PhysicalExperts:
    return PhysicalExperts(experts, num_experts, CPU)


def test_physical_ids_of_contiguous_experts_are_their_numbers():
    chosen = torch.tensor([[5, 0], [3, 2]])
    table = physical([[0, 1], [2], [3, 4, 5]])
    assert table.of(chosen).tolist() == chosen.tolist()
    assert table.starts == [0, 2, 3]
    assert table.rank_of.tolist() == [0, 0, 1, 2, 2, 2]


def test_physical_experts_are_numbered_in_the_order_of_the_ranks():
    table = physical([[4, 1], [0, 5], [3, 2]])
    assert table.of(torch.tensor([[0, 1, 2, 3, 4, 5]])).tolist() == [[2, 1, 5, 4, 0, 3]]
    assert table.rank_of.tolist() == [0, 0, 1, 1, 2, 2]


def test_tokens_take_turns_on_the_copies_of_an_expert():
    table = physical([[0, 1], [0], [0, 2]], num_experts=3)
    chosen = torch.tensor([[0, 1]] * 6)
    assert table.of(chosen).tolist() == [[0, 1], [2, 1], [3, 1]] * 2


def compute_on(held: tuple[int, ...], first: int, seen: list[int]):
    """Expert e multiplies by e + 1; `seen` gets the number of tokens of each call."""

    def compute(x: Tensor, weights: Tensor, physical_ids: Tensor) -> Tensor:
        seen.append(len(x))
        local = physical_ids - first
        scales = torch.tensor(held, dtype=torch.float32) + 1
        here = (local >= 0) & (local < len(held))
        factors = torch.where(here, scales[local.clamp(0, len(held) - 1)] * weights, 0.0)
        return x * factors.sum(-1, keepdim=True)

    return compute


@st.composite
def steps(draw: st.DrawFn) -> tuple[Layout, str, str | dict[str, Any], list[int], int]:
    layout = draw(st.sampled_from(SPREAD))
    dispatch = draw(st.sampled_from(layout.dispatches))
    rules: list[str | dict[str, Any]]
    rules = ["contiguous", "round_robin", *([TABLE] if layout.ep == 4 else [])]
    if layout.ep > NUM_EXPERTS:
        rules = [{"default": [[rank % NUM_EXPERTS] for rank in range(layout.ep)]}]
    num_groups = layout.world_size // layout.tp
    tp_group_tokens = draw(st.lists(st.integers(0, 7), min_size=num_groups, max_size=num_groups))
    return (
        layout,
        dispatch,
        draw(st.sampled_from(rules)),
        tp_group_tokens,
        draw(st.integers(0, 999)),
    )


@settings(max_examples=examples(80))
@given(steps())
def test_every_token_gets_the_weighted_sum_of_its_experts(
    step: tuple[Layout, str, str | dict[str, Any], list[int], int],
):
    layout, dispatch, rule, tp_group_tokens, seed = step
    placement = ExpertPlacement.make(rule, CONFIG, layout)
    experts = placement.default
    generator = torch.Generator().manual_seed(seed)
    groups = [
        (
            torch.randn(count, HIDDEN, generator=generator),
            torch.rand(count, NUM_CHOSEN, generator=generator),
            torch.rand(count, NUM_EXPERTS, generator=generator).topk(NUM_CHOSEN).indices,
        )
        for count in tp_group_tokens
    ]
    table = physical([list(held) for held in experts])
    meshes = thread_meshes(layout, dispatch)
    seen: dict[int, list[int]] = {mesh.rank: [] for mesh in meshes}

    def run(mesh: Mesh) -> Tensor:
        send = Dispatch(CONFIG, mesh, dispatch, 4)
        group = mesh.rank // layout.tp
        first = group - group % layout.ep_tp_groups
        send.begin_step(tp_group_tokens[first : first + layout.ep_tp_groups])
        assert send.mode == dispatch
        rank = layout.ep_rank(mesh.rank)
        assert send.first_physical(table) == table.starts[rank]
        compute = compute_on(experts[rank], table.starts[rank], seen[mesh.rank])
        return send(*groups[group], table, compute)

    partial = on_all_ranks(meshes, run)
    for group, (x, weights, chosen) in enumerate(groups):
        total = torch.stack(partial[group * layout.tp : (group + 1) * layout.tp]).sum(0)
        expected = x * (weights * (chosen + 1)).sum(-1, keepdim=True)
        assert total.shape == expected.shape
        if len(x):
            assert_close(total.numpy(), expected.numpy(), 1e-5)

    if dispatch == "all_to_all":
        # A token goes once to each rank of another tp group that holds one of its experts.
        placed = [table.rank_of[table.of(chosen)] for _, _, chosen in groups]
        assert sum(map(sum, seen.values())) == sum(
            layout.tp * len(holders) for holders in placed
        ) + sum(num_met(holders, group, layout) for group, holders in enumerate(placed))


def num_met(holders: Tensor, group: int, layout: Layout) -> int:
    """Pairs of a token of tp group `group` and a rank of another group that holds one of its
    experts; `holders` are the ranks of all experts of each token."""
    own = group % layout.ep_tp_groups
    return sum(len({rank for rank in row if rank // layout.tp != own}) for row in holders.tolist())


def test_each_tp_rank_sends_its_part_of_the_tokens():
    layout = Layout(tp=2, ep=4, sp=2)
    meshes = thread_meshes(layout, "all_to_all")
    table = physical([[0], [1], [2], [3, 4, 5]])
    chosen = torch.tensor([[2, 3]] * 4)  # all experts of group 0's tokens are in group 1

    def run(mesh: Mesh) -> list[tuple[str, int]]:
        send = Dispatch(CONFIG, mesh, "all_to_all", 4)
        send.begin_step([4, 4])
        x = torch.ones(4, HIDDEN)
        held = ([0], [1], [2], [3, 4, 5])[layout.ep_rank(mesh.rank)]
        compute = compute_on(tuple(held), send.first_physical(table), [])
        send(x, torch.ones(4, 2), chosen, table, compute)
        return sent_over(mesh.ep)

    sent = on_all_ranks(meshes, run)
    # Each tp rank of group 0 sends 2 of the 4 tokens to both ranks of group 1 and gets them back;
    # group 1 sends none. The last call of each rank returns results.
    for rank in (0, 1):
        assert sent[rank][2] == ("moe", 2 * 2 * HIDDEN)
        assert sent[rank][3] == ("moe", 0)
    for rank in (2, 3):
        assert sent[rank][2] == ("moe", 0)
        assert sent[rank][3] == ("moe", 4 * HIDDEN)


def test_inside_tp_nothing_is_sent_and_the_ranks_parts_add_up():
    layout = Layout(tp=4, ep=2)
    x, weights = torch.randn(5, HIDDEN), torch.rand(5, NUM_CHOSEN)
    chosen = torch.tensor([[0, 5], [1, 2], [3, 4], [5, 1], [2, 0]])
    table, held = physical([[0, 1, 2], [3, 4, 5]]), ((0, 1, 2), (3, 4, 5))

    def run(mesh: Mesh) -> Tensor:
        send = Dispatch(CONFIG, mesh, "auto", 4)
        send.begin_step([5])
        assert send.mode == "replicated"
        # The two ranks that hold the same experts hold half of each.
        whole = compute_on(held[layout.ep_rank(mesh.rank)], send.first_physical(table), [])
        return send(x, weights, chosen, table, lambda *a: whole(*a) / layout.expert_slices)

    meshes = thread_meshes(layout)
    total = torch.stack(on_all_ranks(meshes, run)).sum(0)
    expected = x * (weights * (chosen + 1)).sum(-1, keepdim=True)
    assert_close(total.numpy(), expected.numpy(), 1e-5)
    assert all(sent_over(mesh.tp) == [] for mesh in meshes)
