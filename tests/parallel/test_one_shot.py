"""The choice of the one-shot sum, its arithmetic, and the fallback where it is not available.

Ranks are threads. Torch's symmetric memory is simulated on the CPU behind its real signatures:
`empty`, `rendezvous`, and the operator, with the checks and the order of additions of
CUDASymmetricMemoryOps.cu. No GPU is needed or tested.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d
from torch.distributed import _symmetric_memory

from moespan.config import EngineConfig, Layout
from moespan.errors import ConfigError
from moespan.launch.distributed import make_mesh
from moespan.parallel import one_shot
from moespan.parallel.control import Control
from moespan.parallel.counters import Traffic, sent_bytes
from moespan.parallel.mesh import Axis, Mesh
from moespan.parallel.one_shot import OneShotSum
from tests.support import CPU

Result = TypeVar("Result")

PATIENCE_S = 30.0
MOST_BYTES = 1 << 10


class ThreadControl(Control):
    """The control channel among threads."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def smallest(self, value: int) -> int:
        return min(self._machine.exchange(value))


class Machine:
    """GPUs as threads, all joined by NVLink unless `links` is changed.

    Attributes:
        calls: (function, rank), in any order among ranks.
        fails: (function, rank) pairs that raise.
        size: ranks of one machine.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.links = [[int(a != b) for b in range(size)] for a in range(size)]
        self.strangers: set[tuple[int, int]] = set()  # have no access to each other's memory
        self.calls: list[tuple[str, int]] = []
        self.fails: set[tuple[str, int]] = set()
        self.adds_wrongly = False
        self.heard: list[str] = []
        self._here = threading.local()
        self._barrier = threading.Barrier(size, timeout=PATIENCE_S)
        self._values: list[Any] = [None] * size
        self._memory: list[Tensor] = []

    def on_all_ranks(self, run: Callable[[int], Result]) -> list[Result]:
        def start(rank: int) -> Result:
            self._here.rank = rank
            return run(rank)

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(start, range(self.size)))

    def exchange(self, value: Any) -> list[Any]:
        self._values[self._here.rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def empty(self, num_bytes: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self._do("empty")
        return torch.full((num_bytes,), 0xFF, dtype=dtype)  # NaN, whatever it is read as

    def rendezvous(self, tensor: Tensor, group: str) -> None:
        self._do("rendezvous")
        self._memory = self.exchange(tensor)

    def one_shot_all_reduce(self, part: Tensor, reduce_op: str, group: str) -> Tensor:
        rank = self._here.rank
        assert reduce_op == "sum" and group == "a group" and part.is_contiguous()
        assert part.dtype in (torch.bfloat16, torch.float32)
        assert part.untyped_storage().data_ptr() == self._memory[rank].data_ptr()
        size = part.numel() * part.element_size()
        start = part.storage_offset() * part.element_size()
        assert start % 4 == size % 4 == 0
        self._barrier.wait()  # all ranks have written
        parts = [memory[start : start + size].view(part.dtype) for memory in self._memory]
        total = parts[0].clone()
        for other in parts[1:]:
            total += other
        self._barrier.wait()  # all ranks have read; only then may one write again
        return total.view(part.shape) + self.adds_wrongly * (rank == 1)

    def once(self, message: str, from_any_rank: bool) -> None:
        assert from_any_rank
        self.heard.append(f"{self._here.rank}: {message}")

    def _do(self, what: str) -> None:
        rank = self._here.rank
        self.calls.append((what, rank))
        if (what, rank) in self.fails:
            raise RuntimeError(f"CUDA driver error: {what}\nand much more")

    def join(self, rank: int, ranks_here: int | None = None) -> OneShotSum | None:
        ranks = range(self.size)
        control = ThreadControl(self)
        here = ranks_here or self.size
        return OneShotSum.join("a group", ranks, rank, here, CPU, MOST_BYTES, control)


@pytest.fixture(params=[2, 3, 8])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine(request.param)

    def stand_in(module: Any, name: str, function: Callable[..., Any]) -> None:
        fake = mock.create_autospec(getattr(module, name), side_effect=function)
        monkeypatch.setattr(module, name, fake)

    stand_in(_symmetric_memory, "empty", machine.empty)
    stand_in(_symmetric_memory, "rendezvous", machine.rendezvous)
    stand_in(
        torch.cuda, "can_device_access_peer", lambda a, b: not {(a, b), (b, a)} & machine.strangers
    )
    monkeypatch.setattr(
        _distributed_c10d,
        "_detect_dma_connectivity",
        lambda device, kind: SimpleNamespace(matrix=machine.links),
    )
    monkeypatch.setattr(one_shot, "once", machine.once)
    with torch.library._scoped_library("symm_mem", "IMPL") as library:
        library.impl("one_shot_all_reduce", machine.one_shot_all_reduce, "CPU")
        yield machine


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_ranks_get_the_parts_added_in_their_order(machine: Machine, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 128), (2, 8), (3, 64), (8,)]  # one message after another, of several sizes
    given = [
        [torch.randn(shape, generator=generator).to(dtype) for _ in range(machine.size)]
        for shape in shapes
    ]

    def run(rank: int) -> list[Tensor]:
        sums = machine.join(rank)
        assert sums is not None
        assert all(sums.takes(parts[rank]) for parts in given)
        return [sums(parts[rank]) for parts in given]

    found = machine.on_all_ranks(run)
    assert not machine.heard
    for i, parts in enumerate(given):
        expected = parts[0].clone()
        for part in parts[1:]:
            expected += part
        for totals in found:
            assert torch.equal(totals[i], expected) and totals[i].dtype == dtype


def test_a_sum_outlives_the_next_one_and_rows_need_not_be_contiguous(machine: Machine):
    def run(rank: int) -> list[Tensor]:
        sums = machine.join(rank)
        assert sums is not None
        columns = torch.arange(64.0).view(8, 8)[:, 4:]
        return [sums(columns), sums(torch.ones(8, 4))]

    for first, second in machine.on_all_ranks(run):
        assert torch.equal(first, machine.size * torch.arange(64.0).view(8, 8)[:, 4:])
        assert torch.equal(second, torch.full((8, 4), float(machine.size)))


@pytest.mark.parametrize(
    ("x", "taken"),
    [
        (torch.empty(MOST_BYTES // 4), True),
        (torch.empty(MOST_BYTES // 4 + 4), False),
        (torch.empty(MOST_BYTES // 2, dtype=torch.bfloat16), True),
        (torch.empty(MOST_BYTES // 2 + 8, dtype=torch.bfloat16), False),
        (torch.empty(8, dtype=torch.bfloat16), True),
        (torch.empty(12, dtype=torch.bfloat16), False),  # not of 16 bytes each
        (torch.empty(8, dtype=torch.float16), False),
        (torch.empty(8, dtype=torch.int32), False),
        (torch.empty(0, 8), False),
        (torch.empty(8, 8).t()[1:], True),  # however it lies: ranks must agree
    ],
    ids=lambda value: f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else "",
)
def test_size_and_dtype_decide(x: Tensor, taken: bool):
    assert OneShotSum("a group", 0, 2, CPU, MOST_BYTES).takes(x) == taken


def test_one_shot_needs_every_axis_on_one_machine(machine: Machine):
    joined = machine.on_all_ranks(lambda rank: machine.join(rank, ranks_here=1))
    assert joined == [None] * machine.size and machine.calls == []
    assert machine.heard == [
        "0: small all-reduces go through NCCL, which is slower: tp crosses machines"
    ]


@pytest.mark.parametrize("kind", ["links", "access"])
def test_a_pair_without_a_link_is_named(machine: Machine, kind: str):
    last = machine.size - 1
    if kind == "links":
        machine.links[0][last] = machine.links[last][0] = 0
        problem = f"no NVLink joins the GPUs 0 and {last}"
    else:
        machine.strangers.add((0, last))
        problem = f"GPU 0 cannot read the memory of GPU {last}"
    assert machine.on_all_ranks(machine.join) == [None] * machine.size
    assert machine.calls == []
    (heard,) = machine.heard
    assert heard.endswith(f"which is slower: {problem}")


@pytest.mark.parametrize("what", ["empty", "rendezvous"])
def test_a_failure_on_one_rank_stops_all_before_the_next_step_with_one_notice(
    machine: Machine, what: str
):
    # A rendezvous is a collective: it fails on all ranks.
    failing = range(machine.size) if what == "rendezvous" else [machine.size - 1]
    machine.fails = {(what, rank) for rank in failing}
    assert machine.on_all_ranks(machine.join) == [None] * machine.size
    steps = ["empty", "rendezvous"]
    expected = [(step, r) for step in steps[: steps.index(what) + 1] for r in range(machine.size)]
    assert sorted(machine.calls) == expected
    (heard,) = machine.heard
    assert heard.startswith(f"{failing[0]}: small all-reduces go through NCCL")
    assert heard.endswith(f"RuntimeError: CUDA driver error: {what}")


def test_a_kernel_with_wrong_sums_is_found_at_the_start(machine: Machine):
    machine.adds_wrongly = True
    assert machine.on_all_ranks(machine.join) == [None] * machine.size
    assert machine.heard == [
        "1: small all-reduces go through NCCL, which is slower: "
        "the one-shot kernel gives wrong sums on this machine"
    ]


def test_an_axis_sums_small_messages_in_one_shot_and_counts_them_alike(
    monkeypatch: pytest.MonkeyPatch,
):
    through_group: list[int] = []
    monkeypatch.setattr(dist, "all_reduce", lambda x, group: through_group.append(x.numel()))
    short = mock.create_autospec(OneShotSum, instance=True)
    short.takes.side_effect = lambda x: x.numel() <= 8
    short.side_effect = lambda x: 2 * x
    traffic = Traffic()
    axis = Axis("tp", range(2), 0, None, traffic, short)
    assert axis.all_reduce(torch.ones(8), "mlp").tolist() == [2.0] * 8
    assert axis.all_reduce(torch.ones(9), "mlp").tolist() == [1.0] * 9
    assert axis.all_reduce(torch.ones(0, 4), "mlp").shape == (0, 4)
    assert through_group == [9] and short.call_count == 1
    sent = sent_bytes("all_reduce", 2, 4 * 8) + sent_bytes("all_reduce", 2, 4 * 9)
    assert traffic.rows() == [("tp", "all_reduce", "mlp", 2, sent)]


@pytest.mark.parametrize(
    ("layout", "device", "most_bytes", "joined"),
    [
        (Layout(tp=2, sp=2), "cuda", 64, [(0, 1)]),
        (Layout(tp=2, dp=2), "cuda", 64, [(0, 1)]),
        (Layout(tp=2), "cuda", 0, []),
        (Layout(tp=2), "cpu", 64, []),
        (Layout(sp=2), "cuda", 64, []),
    ],
    ids=str,
)
def test_only_gpus_sum_in_one_shot_and_only_over_tp(
    monkeypatch: pytest.MonkeyPatch,
    layout: Layout,
    device: str,
    most_bytes: int,
    joined: list[tuple[int, ...]],
):
    found: list[tuple[int, ...]] = []
    group = SimpleNamespace(group_name="a group")
    monkeypatch.setattr(
        dist, "new_subgroups_by_enumeration", lambda lines, **_: (group, [group] * len(lines))
    )
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: layout.world_size)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)

    def join(name: str, ranks: tuple[int, ...], *rest: object) -> None:
        assert name == "a group"
        assert rest[:4] == (0, layout.world_size, torch.device(device), most_bytes)
        found.append(ranks)

    monkeypatch.setattr(OneShotSum, "join", mock.create_autospec(OneShotSum.join, side_effect=join))
    mesh = Mesh.create(layout, torch.device(device), one_shot_bytes=most_bytes)
    assert found == joined and mesh.tp.one_shot is None


def test_the_largest_message_is_the_engines_setting(monkeypatch: pytest.MonkeyPatch):
    create = mock.create_autospec(Mesh.create)
    monkeypatch.setattr(Mesh, "create", create)
    make_mesh(EngineConfig("", Layout(tp=2), "cuda", cuda_one_shot_bytes=4096), CPU)
    assert create.call_args.args[-1] == 4096
    with pytest.raises(ConfigError, match="cuda_one_shot_bytes=-1 must be a number of bytes, or 0"):
        EngineConfig("", cuda_one_shot_bytes=-1)
