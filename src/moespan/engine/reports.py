"""What every rank tells the leader when it is asked: traffic, memory, tokens of its experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from moespan.engine.questions import ExpertCounts, Memory, Traffic
from moespan.engine.step import Report
from moespan.engine.worker import Worker
from moespan.errors import RequestError
from moespan.parallel.counters import TrafficRows
from moespan.parallel.mesh import Mesh
from moespan.planner.memory import RankMemory

_Counts = dict[int, list[int]]

_TYPES: dict[str, Any] = {"traffic": TrafficRows, "memory": RankMemory, "experts": _Counts}


def answer_by_reports(
    question: Traffic | Memory | ExpertCounts, worker: Worker, broadcast: Callable[[Report], None]
) -> Any:
    """On the leader: answer a question that every rank has a part of.

    Raises:
        RequestError: the engine does not count what the question asks for.
    """
    if isinstance(question, ExpertCounts) and worker.model.counter is None:
        raise RequestError("the tokens of experts are not counted; start with --expert-stats")
    kinds = {Traffic: Report("traffic"), Memory: Report("memory"), ExpertCounts: Report("experts")}
    report = kinds[type(question)]
    broadcast(report)
    reports = collect_reports(worker, report)
    return _total_counts(reports) if isinstance(question, ExpertCounts) else reports


def own_report(worker: Worker, report: Report) -> Any:
    """What this rank answers."""
    if report.what == "memory":
        return worker.memory()
    return _own_counts(worker) if report.what == "experts" else worker.mesh.traffic.rows()


def send_report(worker: Worker, report: Report) -> None:
    """On a follower: send the answer to the leader."""
    worker.mesh.control.send(msgspec.msgpack.encode(own_report(worker, report)), "report")


def collect_reports(worker: Worker, report: Report) -> list[Any]:
    """On the leader: the answers of all ranks, in their order. The followers send theirs."""
    mesh: Mesh = worker.mesh
    own = own_report(worker, report)
    received = (mesh.control.receive(rank) for rank in range(1, mesh.layout.world_size))
    return [own, *(msgspec.msgpack.decode(one, type=_TYPES[report.what]) for one in received)]


def _own_counts(worker: Worker) -> _Counts:
    """The counts of this rank. All tp ranks hold the same tokens, so only the first has any."""
    counter = worker.model.counter
    return counter.read() if counter is not None and worker.mesh.at.tp == 0 else {}


def _total_counts(ranks: Iterable[_Counts]) -> _Counts:
    """Layer → tokens that chose each expert, over all ranks, in the order of layers."""
    totals: _Counts = {}
    for counts in ranks:
        for layer, row in counts.items():
            before = totals.get(layer, [0] * len(row))
            totals[layer] = [a + b for a, b in zip(before, row, strict=True)]
    return dict(sorted(totals.items()))
