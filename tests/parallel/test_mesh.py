"""The ranks that an axis joins; no group exists that no axis uses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist

from moespan.config import Layout, ModelConfig, all_layouts
from moespan.errors import LayoutError
from moespan.parallel.counters import Traffic, sent_bytes
from moespan.parallel.mesh import Axis, HostCollectives, Mesh, _axes
from tests.support import CPU, Oracle

SIXTEEN: ModelConfig = Oracle("sixteen").config
CASES = [
    (layout, dispatch)
    for world in (1, 2, 4, 8)
    for layout in all_layouts(world, SIXTEEN)
    for dispatch in ("auto", *layout.dispatches)
]


def test_the_lines_of_an_axis_have_its_size_and_partition_the_world():
    for layout, dispatch in CASES:
        for name, lines in _axes(layout, dispatch).items():
            size = layout.ep_tp_groups if name == "ep_tp_groups" else layout.sizes[name]
            assert {len(line) for line in lines} == {size}, (layout, name)
            assert sorted(itertools.chain(*lines)) == list(range(layout.world_size))


def test_along_an_axis_only_the_coordinate_of_that_axis_changes():
    for layout, dispatch in CASES:
        axes = _axes(layout, dispatch)
        for name in ("tp", "sp", "pp"):
            for line in axes[name]:
                coordinates = [layout.coordinates(rank) for rank in line]
                assert [getattr(at, name) for at in coordinates] == list(range(layout.sizes[name]))
                for other in {"tp", "sp", "pp", "dp"} - {name}:
                    assert len({getattr(at, other) for at in coordinates}) == 1


def test_ranks_of_an_ep_line_are_in_order_of_their_experts_and_of_one_stage():
    for layout, dispatch in CASES:
        for line in _axes(layout, dispatch).get("ep", []):
            assert [layout.ep_rank(rank) for rank in line] == list(range(layout.ep))
            assert len({layout.coordinates(rank).pp for rank in line}) == 1
        for line in _axes(layout, dispatch).get("ep_tp_groups", []):
            assert len({layout.coordinates(rank).tp for rank in line}) == 1


def test_ep_has_lines_only_across_tp_groups_and_for_dispatches_in_use():
    for layout, dispatch in CASES:
        found = set(_axes(layout, dispatch)) - {"tp", "sp", "pp"}
        across = {
            "auto": {"ep", "ep_tp_groups"},
            "all_gather": {"ep_tp_groups"},
            "all_to_all": {"ep"},
        }
        assert found == (across[dispatch] if layout.ep_tp_groups > 1 else set()), layout


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The lines for which `Mesh.create` makes groups, in a simulated world."""
    found: list[tuple[int, ...]] = []

    def new_subgroups(lines: list[tuple[int, ...]], **_: object) -> tuple[None, list[None]]:
        found.extend(lines)
        return None, [None for _ in lines]

    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", new_subgroups)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)  # the control channel's
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    return found


def create(
    monkeypatch: pytest.MonkeyPatch, layout: Layout, rank: int, dispatch: str = "auto"
) -> Mesh:
    monkeypatch.setattr(dist, "get_world_size", lambda: layout.world_size)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    return Mesh.create(layout, CPU, dispatch)


@pytest.mark.parametrize(
    ("layout", "dispatch", "expected"),
    [
        (Layout(tp=4), "auto", [(0, 1, 2, 3)]),
        (Layout(tp=4, ep=4), "auto", [(0, 1, 2, 3)]),
        (Layout(dp=4), "auto", []),
        (Layout(pp=4), "auto", [(0, 1, 2, 3)]),
        (Layout(tp=2, pp=2), "auto", [(0, 1), (2, 3), (0, 2), (1, 3)]),
        (Layout(sp=2, dp=2), "auto", [(0, 1), (2, 3)]),
        (Layout(ep=4, dp=4), "auto", [(0, 1, 2, 3)]),  # one group serves both dispatches
        (Layout(ep=2, dp=4), "all_to_all", [(0, 1), (2, 3)]),
        (Layout(tp=2, ep=4, sp=2), "all_gather", [(0, 1), (2, 3), (0, 2), (1, 3)]),
        (Layout(tp=2, ep=4, dp=2), "all_to_all", [(0, 1), (2, 3), (0, 1, 2, 3)]),
        (Layout(), "auto", []),
    ],
    ids=str,
)
def test_groups_are_made_only_for_axes_along_which_something_is_sent(
    monkeypatch: pytest.MonkeyPatch,
    made: list[tuple[int, ...]],
    layout: Layout,
    dispatch: str,
    expected: list[tuple[int, ...]],
):
    create(monkeypatch, layout, 0, dispatch)
    assert made == expected


def test_all_ranks_make_the_same_groups_in_the_same_order(
    monkeypatch: pytest.MonkeyPatch, made: list[tuple[int, ...]]
):
    for layout, dispatch in CASES:
        orders = set()
        for rank in range(layout.world_size):
            made.clear()
            create(monkeypatch, layout, rank, dispatch)
            orders.add(tuple(made))
        assert len(orders) == 1, layout
        (order,) = orders
        assert len(set(order)) == len(order) and all(len(line) > 1 for line in order)


def test_a_rank_knows_its_place_on_every_axis(
    monkeypatch: pytest.MonkeyPatch, made: list[tuple[int, ...]]
):
    layout = Layout(tp=2, ep=4, pp=2, dp=2)
    mesh = create(monkeypatch, layout, 7)
    assert (mesh.tp.rank, mesh.sp.rank, mesh.pp.rank) == (1, 0, 1)
    assert (mesh.ep.rank, mesh.ep_tp_groups.rank) == (3, 1)
    assert not mesh.is_leader and not mesh.is_first_stage and mesh.is_last_stage
    assert not mesh.is_speaker
    assert mesh.speakers == [4, 6]
    assert create(monkeypatch, layout, 6).is_speaker
    assert create(monkeypatch, layout, 0).is_leader


def test_a_world_of_another_size_is_refused(
    monkeypatch: pytest.MonkeyPatch, made: list[tuple[int, ...]]
):
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    with pytest.raises(LayoutError, match="layout tp=2 needs 2 ranks, but 3 were started"):
        Mesh.create(Layout(tp=2), CPU)


def test_without_other_ranks_there_is_one_rank():
    mesh = Mesh.create(Layout(), CPU)
    assert mesh.is_leader and mesh.is_speaker and mesh.is_first_stage and mesh.is_last_stage
    assert mesh.traffic.rows() == []
    with pytest.raises(LayoutError, match="needs 4 ranks, but 1 were started"):
        Mesh.create(Layout(pp=4), CPU)


class Doubling:
    """Collectives of two ranks that have the same numbers."""

    def takes(self, x: torch.Tensor) -> bool:
        return x.dtype == torch.float32

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def reduce_scatter(self, x: torch.Tensor, part: torch.Tensor) -> None:
        part.copy_(2 * x[: len(part)])

    def all_gather(self, x: torch.Tensor, gathered: torch.Tensor) -> None:
        gathered.copy_(torch.cat([x, x]))


def test_an_axis_of_one_machine_uses_its_memory_and_counts_alike(
    monkeypatch: pytest.MonkeyPatch,
):
    through_group: list[torch.dtype] = []
    monkeypatch.setattr(dist, "all_reduce", lambda x, group: through_group.append(x.dtype))
    traffic = Traffic()
    axis = Axis("tp", range(2), 0, None, traffic, host=Doubling())
    ones = torch.ones(4, 3)
    assert axis.all_reduce(ones, "mlp").unique().tolist() == [2.0]
    assert axis.reduce_scatter(ones, "mlp").tolist() == [[2.0] * 3] * 2
    assert axis.all_gather(ones, "mlp").shape == (8, 3)
    assert axis.all_gather(ones.int(), "mlp").dtype == torch.int32
    axis.all_reduce(ones.int(), "mlp")
    assert through_group == [torch.int32]
    sent = {name: sent_bytes(name, 2, 48) for name in ("all_gather", "all_reduce")}
    assert traffic.rows() == [
        ("tp", "all_gather", "mlp", 2, 2 * sent["all_gather"]),
        ("tp", "all_reduce", "mlp", 2, 2 * sent["all_reduce"]),
        ("tp", "reduce_scatter", "mlp", 1, sent_bytes("reduce_scatter", 2, 48)),
    ]


@pytest.mark.parametrize(
    ("layout", "ranks_here", "joined"),
    [
        (Layout(tp=2), 2, [(0, 1)]),
        (Layout(tp=2, sp=2), 4, [(0, 1), (0, 2)]),
        (Layout(tp=2, sp=2), 2, [(0, 1)]),  # sp crosses machines
        (Layout(tp=2, pp=2), 4, [(0, 1)]),  # a stage sends to one other rank
        (Layout(ep=4, dp=4), 4, [(0, 1, 2, 3)]),  # one group, one memory for both dispatches
        (Layout(ep=4, dp=4), 2, []),
        (Layout(dp=4), 4, []),
    ],
    ids=str,
)
def test_ranks_share_memory_along_axes_that_stay_on_a_machine(
    monkeypatch: pytest.MonkeyPatch,
    layout: Layout,
    ranks_here: int,
    joined: list[tuple[int, ...]],
):
    found: list[tuple[int, ...]] = []

    def join(group: object, ranks: Sequence[int], rank: int) -> HostCollectives:
        assert rank == 0
        found.append(tuple(ranks))
        return Doubling()

    def new_subgroups(lines: list[tuple[int, ...]], **_: object) -> tuple[str, list[str]]:
        return f"group of {lines}", []

    monkeypatch.setattr(dist, "new_subgroups_by_enumeration", new_subgroups)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: layout.world_size)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    mesh = Mesh.create(layout, CPU, ranks_here=ranks_here, join_host=join)
    assert found == joined
    assert (mesh.tp.host is not None) == ((0, 1) in joined and layout.tp == 2)
    assert mesh.pp.host is None
