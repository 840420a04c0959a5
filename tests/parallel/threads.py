"""Ranks as threads of one process: axes whose collectives pass tensors from thread to thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from queue import Queue
from typing import Any, TypeVar

import torch
from torch import Tensor

from moespan.config import Layout
from moespan.parallel.mesh import Axis, Mesh, _axes
from tests.support import CPU

Result = TypeVar("Result")

PATIENCE_S = 30.0


class _Line:
    """State shared by the ranks of one line."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=PATIENCE_S)
        self.values: list[Any] = [None] * size
        # Made here for all pairs: otherwise sender and receiver could each make their own.
        self.queues: dict[tuple[int, int], Queue[Tensor]] = {
            pair: Queue() for pair in product(range(size), range(size))
        }


class ThreadAxis(Axis):
    """An `Axis` among threads. `sent` lists what this rank sent to others: (module, elements)."""

    def __init__(self, name: str, ranks: tuple[int, ...], rank: int, line: _Line) -> None:
        super().__init__(name, ranks, rank)
        self._line = line
        self.sent: list[tuple[str, int]] = []

    def all_reduce(self, x: Tensor, module: str) -> Tensor:
        return x.copy_(torch.stack(self._exchange(x.clone())).sum(0))

    def all_gather(self, x: Tensor, module: str) -> Tensor:
        return torch.cat(self._exchange(x))

    def reduce_scatter(self, x: Tensor, module: str) -> Tensor:
        total = torch.stack(self._exchange(x)).sum(0)
        return total.chunk(self.size)[self.rank] if len(x) else total

    def all_to_all(
        self, x: Tensor, send_rows: list[int], receive_rows: list[int], module: str
    ) -> Tensor:
        assert len(x) == sum(send_rows)
        parts = x.split(send_rows)
        elsewhere = sum(part.numel() for i, part in enumerate(parts) if i != self.rank)
        self.sent.append((module, elsewhere))
        received = [sent[self.rank] for sent in self._exchange(parts)]
        assert [len(part) for part in received] == receive_rows
        return torch.cat(received)

    def send(self, x: Tensor, to: int, module: str) -> None:
        self.sent.append((module, x.numel()))
        self._line.queues[self.rank, to].put(x)

    def receive(self, x: Tensor, source: int) -> Tensor:
        return x.copy_(self._line.queues[source, self.rank].get(timeout=PATIENCE_S))

    def _exchange(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order."""
        self._line.values[self.rank] = value
        self._line.barrier.wait()
        values = list(self._line.values)
        self._line.barrier.wait()
        return values


def thread_meshes(layout: Layout, moe_dispatch: str = "auto") -> list[Mesh]:
    """The mesh of every rank of `layout`, with the lines that `Mesh.create` would use."""
    meshes = [Mesh(layout, rank, CPU) for rank in range(layout.world_size)]
    for name, lines in _axes(layout, moe_dispatch).items():
        for ranks in lines:
            line = _Line(len(ranks))
            for place, rank in enumerate(ranks):
                if len(ranks) > 1:
                    setattr(meshes[rank], name, ThreadAxis(name, ranks, place, line))
    return meshes


def sent_over(axis: Axis) -> list[tuple[str, int]]:
    """What a rank gave to others over an axis of `thread_meshes`: (collective, elements)."""
    return axis.sent if isinstance(axis, ThreadAxis) else []


def on_all_ranks(meshes: list[Mesh], run: Callable[[Mesh], Result]) -> list[Result]:
    """Call `run` on all ranks at once, and return their results."""
    with ThreadPoolExecutor(len(meshes)) as pool:
        return list(pool.map(run, meshes))
