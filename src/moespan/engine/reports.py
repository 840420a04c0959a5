"""Facts that every rank tells the leader when it is asked: its traffic, its memory."""

from __future__ import annotations

from typing import Any

import msgspec

from moespan.engine.step import Report
from moespan.engine.worker import Worker
from moespan.parallel.counters import TrafficRows
from moespan.parallel.mesh import Mesh
from moespan.planner.memory import RankMemory

_TYPES: dict[str, Any] = {"traffic": TrafficRows, "memory": RankMemory}


def own_report(worker: Worker, report: Report) -> Any:
    """What this rank answers."""
    return worker.memory() if report.what == "memory" else worker.mesh.traffic.rows()


def send_report(worker: Worker, report: Report) -> None:
    """On a follower: send the answer to the leader."""
    worker.mesh.control.send(msgspec.msgpack.encode(own_report(worker, report)), "report")


def collect_reports(worker: Worker, report: Report) -> list[Any]:
    """On the leader: the answers of all ranks, in their order. The followers send theirs."""
    mesh: Mesh = worker.mesh
    own = own_report(worker, report)
    received = (mesh.control.receive(rank) for rank in range(1, mesh.layout.world_size))
    return [own, *(msgspec.msgpack.decode(one, type=_TYPES[report.what]) for one in received)]
