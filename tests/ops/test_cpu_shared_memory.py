"""Collectives through shared memory give the sums of all ranks, the same bits everywhere, and
notice a rank that does not come. Ranks are threads with a mapping each, and once processes."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moespan import log
from moespan.cache_folder import CacheError
from moespan.ops.cpu import shared_memory
from moespan.ops.cpu.compiler import library
from moespan.ops.cpu.shared_memory import SharedMemory

Result = TypeVar("Result")

PATIENCE_S = 60.0
SLOT_ELEMENTS = (256 << 10) // 4
# Fewer elements than a vector, whole vectors, a part that ranks share, several slots and more.
COUNTS = [1, 15, 64, 1000, 16 << 10, 2 * SLOT_ELEMENTS + 77]


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no compiler")
    return library()


class Machine:
    """Ranks as threads of this process."""

    def __init__(self, kernels: ctypes.CDLL, size: int, timeout_s: float = PATIENCE_S) -> None:
        descriptor, memory, _ = shared_memory._make(SharedMemory.size_bytes(size))
        mappings = [memory]
        mappings += [mmap.mmap(descriptor, len(memory)) for _ in range(size - 1)]
        os.close(descriptor)
        self.size = size
        self.ranks = [
            SharedMemory(kernels, one, range(10, 10 + size), place, timeout_s)
            for place, one in enumerate(mappings)
        ]

    def on_all_ranks(self, run: Callable[[SharedMemory, int], Result]) -> list[Result]:
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(run, self.ranks, range(self.size)))


@pytest.fixture(params=[2, 3, 8])
def machine(request: pytest.FixtureRequest, kernels: ctypes.CDLL) -> Machine:
    return Machine(kernels, request.param)


def random(size: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Numbers of all ranks, [size, *shape]."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(size, *shape, generator=generator).to(dtype)


def in_order(parts: Tensor) -> Tensor:
    """The sum over dim 0 in float32, in its order, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ranks_get_the_sum_in_the_order_of_the_ranks(machine: Machine, dtype: torch.dtype):
    given = [random(machine.size, count, dtype=dtype) for count in COUNTS]

    def run(rank: SharedMemory, place: int) -> list[Tensor]:
        return [rank.all_reduce(parts[place].clone()) for parts in given]

    for totals in machine.on_all_ranks(run):
        for total, parts in zip(totals, given, strict=True):
            assert torch.equal(total, in_order(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_rank_gets_its_part_of_the_sum(machine: Machine, dtype: torch.dtype):
    size = machine.size
    given = [random(size, size * 3, count // 3 + 1, dtype=dtype) for count in COUNTS]

    def run(rank: SharedMemory, place: int) -> list[Tensor]:
        parts = [torch.empty_like(x[place, :3]) for x in given]
        for x, part in zip(given, parts, strict=True):
            rank.reduce_scatter(x[place], part)
        return parts

    for place, parts in enumerate(machine.on_all_ranks(run)):
        for part, x in zip(parts, given, strict=True):
            assert torch.equal(part, in_order(x)[3 * place : 3 * place + 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int8])
def test_all_ranks_get_what_all_ranks_gave(machine: Machine, dtype: torch.dtype):
    given = [(100 * random(machine.size, 1, n, dtype=torch.float32)).to(dtype) for n in COUNTS]

    def run(rank: SharedMemory, place: int) -> list[Tensor]:
        gathered = [torch.empty_like(x[:, 0]) for x in given]
        for x, to in zip(given, gathered, strict=True):
            rank.all_gather(x[place], to)
        return gathered

    for gathered in machine.on_all_ranks(run):
        for to, x in zip(gathered, given, strict=True):
            assert torch.equal(to, x[:, 0])


def test_many_small_collectives_of_all_kinds_never_meet_the_numbers_of_another(machine: Machine):
    size = machine.size

    def run(rank: SharedMemory, place: int) -> None:
        part, gathered = torch.empty(1), torch.empty(size)
        for i in range(300):
            assert rank.all_reduce(torch.tensor([float(i + place)])) == sum(range(i, i + size))
            rank.all_gather(torch.tensor([float(i * place)]), gathered)
            assert gathered.tolist() == [i * other for other in range(size)]
            rank.reduce_scatter(torch.arange(float(size)) + i, part)
            assert part == size * (place + i)

    machine.on_all_ranks(run)


def test_several_threads_of_a_rank_share_the_work(kernels: ctypes.CDLL):
    machine = Machine(kernels, 2)
    parts = random(2, 300_000, dtype=torch.bfloat16)

    def run(rank: SharedMemory, place: int) -> Tensor:
        torch.set_num_threads(3)
        return rank.all_reduce(parts[place].clone())

    try:
        for total in machine.on_all_ranks(run):
            assert torch.equal(total, in_order(parts))
    finally:
        torch.set_num_threads(1)


def test_rows_need_not_be_contiguous(kernels: ctypes.CDLL):
    machine = Machine(kernels, 2)
    columns = torch.arange(64.0).view(8, 8)[:, 4:]
    totals = machine.on_all_ranks(lambda rank, place: rank.all_reduce(columns))
    assert all(torch.equal(total, 2 * columns) for total in totals)


def test_dtypes_decide_what_is_summed(kernels: ctypes.CDLL):
    rank = Machine(kernels, 2).ranks[0]
    taken = [rank.takes(torch.empty(1, dtype=one)) for one in (torch.float32, torch.bfloat16)]
    others = [rank.takes(torch.empty(1, dtype=one)) for one in (torch.float16, torch.int32)]
    assert taken == [True, True] and others == [False, False]


def test_a_rank_that_does_not_come_is_named_in_bounded_time(kernels: ctypes.CDLL):
    rank = Machine(kernels, 3, timeout_s=0.2).ranks[0]
    with pytest.raises(dist.DistError, match=r"rank 11 has gone, or was not in .* within 0\.2 s"):
        rank.all_reduce(torch.ones(1))


def test_a_rank_that_sleeps_is_woken(kernels: ctypes.CDLL):
    machine = Machine(kernels, 2)

    def run(rank: SharedMemory, place: int) -> float:
        time.sleep(0.05 * place)
        return float(rank.all_reduce(torch.ones(1)))

    assert machine.on_all_ranks(run) == [2.0, 2.0]


RANK = """
import os, sys, time
import torch, torch.distributed as dist
from moespan.ops.cpu.compiler import library
from moespan.ops.cpu.shared_memory import SharedMemory
rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
group = dist.new_group([0, 1])
memory = SharedMemory.join(library, group, [0, 1], rank, 120)
print(float(memory.all_reduce(torch.ones(3))[0]), flush=True)
if rank == 1:
    time.sleep(120)
try:
    memory.all_reduce(torch.ones(3))
except dist.DistError as error:
    print(error, flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_processes_join_and_a_killed_one_is_noticed(kernels: ctypes.CDLL, tmp_path: Path):
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(i), str(tmp_path / "store")], stdout=subprocess.PIPE)
        for i in range(2)
    ]
    try:
        outputs = [rank.stdout for rank in ranks]
        assert outputs[0] is not None and outputs[1] is not None
        assert [out.readline() for out in outputs if out is not None] == [b"2.0\n", b"2.0\n"]
        killed_at = time.monotonic()
        ranks[1].send_signal(signal.SIGKILL)
        ranks[1].wait(PATIENCE_S)
        assert outputs[0].readline().startswith(b"rank 1 has gone")
        assert time.monotonic() - killed_at < 30
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


class Group:
    """A group of two ranks, of which one is here. The other tells where the memory is, or how the
    vote of all ends."""

    def __init__(self, told: list[int] | None, others_problem: bool = False) -> None:
        self.told, self.others_problem = told, others_problem

    def broadcast(self, x: Tensor, src: int, group: object) -> None:
        if self.told is not None:
            x.copy_(torch.tensor(self.told))

    def all_reduce(self, x: Tensor, op: object, group: object) -> None:
        if self.others_problem:
            x.clamp_(max=3)


@pytest.fixture
def join(monkeypatch: pytest.MonkeyPatch, kernels: ctypes.CDLL) -> Iterator[Callable[..., Any]]:
    monkeypatch.setattr(log, "_said", set())

    def join(group: Group, rank: int, load: Callable[[], ctypes.CDLL] = lambda: kernels) -> Any:
        monkeypatch.setattr(dist, "broadcast", group.broadcast)
        monkeypatch.setattr(dist, "all_reduce", group.all_reduce)
        return SharedMemory.join(load, group, [3, 4], rank, 1.0)

    yield join


def nameless_memories() -> int:
    """Descriptors of this process for memory that `join` has made."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of this very folder
            links.append(str(descriptor.readlink()))
    return sum(link.startswith("/memfd:moespan") for link in links)


def test_the_memory_has_no_name_and_its_descriptor_is_closed(join: Callable[..., Any]):
    before = nameless_memories()
    joined = join(Group(None), 3)
    assert joined is not None
    assert nameless_memories() == before + 1, "only the mapping keeps a descriptor"


def test_another_process_with_the_same_number_is_not_taken_for_the_first_rank(
    join: Callable[..., Any], capsys: pytest.CaptureFixture[str]
):
    descriptor, memory, nonce = shared_memory._make(SharedMemory.size_bytes(2))
    try:
        assert join(Group([os.getpid(), descriptor, nonce]), 4) is not None
        memory[:300] = bytes(300)
        for told in ([os.getpid(), descriptor, nonce + 1], [os.getpid(), 0, nonce]):
            log._said.clear()
            assert join(Group(told), 4) is None
            said = capsys.readouterr().err
            assert "ranks of this machine sum through sockets, which is slower: " in said
        assert memory[:300] == bytes(300), "nothing is written to memory that is not ours"
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("rank", [3, 4])
def test_all_ranks_do_without_if_one_cannot_and_only_that_one_says_why(
    rank: int, join: Callable[..., Any], capsys: pytest.CaptureFixture[str]
):
    assert join(Group(None, others_problem=True), 3 if rank == 4 else 4) is None
    assert "no compiler" not in capsys.readouterr().err

    def fail() -> ctypes.CDLL:
        raise CacheError("no compiler")

    assert join(Group(None), 3, fail) is None
    assert "rank" in (said := capsys.readouterr().err) and "no compiler" in said
