"""A calibration measures what the prediction of a step asks for, and keeps what it has."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from moespan.checkpoint.presets import preset
from moespan.config import EngineConfig, Layout, ModelConfig, Nodes
from moespan.errors import MeetingError, MoespanError
from moespan.measure import calibrate, collectives, operations
from moespan.measure.calibrate import Calibration
from moespan.measure.collectives import Timing
from moespan.planner import profile
from moespan.planner.cost import ReplicaStep, StepCost
from moespan.planner.expert_load import Routing
from moespan.planner.prices import Prices
from moespan.planner.profile import Figure, Level, Profile
from moespan.planner.work import Chunk, Limits

TINY = ModelConfig.from_dict(preset("tiny", {}))
CONFIG = EngineConfig("", max_num_batched_tokens=32, max_num_seqs=4, max_model_len=256)


class FixedProbe:
    """A machine with fixed limits."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> FixedProbe:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self) -> Limits:
        return Limits(1e9, 1e9)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few calls of small sizes."""
    timed = operations.timed
    monkeypatch.setattr(calibrate, "Probe", FixedProbe)
    monkeypatch.setattr(calibrate, "_LEAST_TURN_BYTES", 1)
    monkeypatch.setattr(calibrate, "last_level_cache_bytes", lambda: 0)
    monkeypatch.setattr(calibrate, "_BATCHES", (1, 2))

    def once(*args: Any, **kwargs: Any) -> operations.Times:
        return timed(*args, **{**kwargs, "least": 1, "seconds": 0.0})

    monkeypatch.setattr(calibrate, "timed", once)


def calibrated(out: Path, config: EngineConfig = CONFIG, **options: Any) -> tuple[Profile, str]:
    said: list[str] = []
    calibration = Calibration(config, TINY, out, say=said.append, **options)
    calibration.run()
    return profile.load(str(out)), "\n".join(said)


def sources(machine: Profile, config: EngineConfig, step: Sequence[ReplicaStep]) -> set[str]:
    cost = StepCost(machine, TINY, config, Routing(TINY))
    return {line.source for line in cost.lines(step) if line.kind == "operation"}


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_every_operation_of_a_step_is_measured(tmp_path: Path, scheme: str | None) -> None:
    config = EngineConfig(
        "", max_num_batched_tokens=32, max_num_seqs=4, max_model_len=256, quantization=scheme
    )
    machine, _ = calibrated(tmp_path / "here.json", config, clock="cpu")
    assert machine.made is not None and machine.made.complete and machine.made.clock == "cpu"
    assert machine.host.step_us is not None and machine.host.sequence_us is not None
    launch = machine.launch
    assert launch.step_us is not None and launch.step_us.value > 0
    assert launch.layer_us is not None and launch.layer_us.value > 0
    measured = {"moespan calibrate"}
    steps = ([ReplicaStep(4, 4, 4, 400)], [ReplicaStep(33, 2, 1, 100, (Chunk(32, 0),))])
    for step in steps:
        assert sources(machine, config, step) == measured
    if scheme is None:  # one rank calibrates the computing of other layouts
        links = Level(name="node", devices=8, bytes_per_s=Figure(value=1e9, origin="guess"))
        machine = msgspec.structs.replace(machine, levels=[links])
        for layout in (Layout(tp=2), Layout(tp=2, ep=2), Layout(dp=2, ep=2)):
            other = EngineConfig("", layout, max_num_batched_tokens=32, max_num_seqs=4)
            whole = [ReplicaStep(4, 4, 4, 400)] * layout.dp
            assert sources(machine, other, whole) == measured


@pytest.mark.usefixtures("fast")
def test_collectives_are_timed_by_the_calibrations_clock_alone_and_after_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measure(config: EngineConfig, wanted: collectives.Wanted) -> list[Timing]:
        asked.append(wanted)
        one = Timing(axis="tp", ranks=2, message_bytes=4096, median_s=5e-5, bus_bytes_per_s=1e9)
        plans = msgspec.structs.replace(one, axis="control", kind="broadcast")
        waits = msgspec.structs.replace(one, axis=collectives.WAITS, median_s=7e-5)
        results = msgspec.structs.replace(plans, kind="send", median_s=9e-5)
        return [one, plans, results, waits]

    monkeypatch.setattr(collectives, "measure", measure)
    monkeypatch.setattr(Calibration, "_measure_operations", lambda self: None)
    config = replace(CONFIG, layout=Layout(tp=2))
    machine, _ = calibrated(tmp_path / "two.json", config, clock="cpu")
    assert [(one.clock, one.waits) for one in asked] == [("cpu", True)]
    assert machine.launch.skew_us is not None
    assert machine.launch.skew_us.value == pytest.approx(70)
    cost = StepCost(machine, TINY, replace(config, max_num_seqs=1), Routing(TINY))
    sums = [line for line in cost.lines([ReplicaStep(1, 1, 1, 100)]) if "all_reduce" in line.part]
    assert sums and all(line.seconds == pytest.approx(line.count * 120e-6) for line in sums)
    assert machine.host.result_us is not None and machine.host.result_us.value == pytest.approx(90)
    assert [one.skew_us for one in machine.collectives] == [pytest.approx(70)]


@pytest.mark.usefixtures("fast")
def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, said = calibrated(tmp_path / "short.json", seconds=1e-6)
    assert "s are over" in said
    assert machine.levels == []  # one rank says nothing of links
    assert machine.made is not None and not machine.made.complete
    assert machine.host.step_us is not None and not machine.operations

    def interrupt(self: Calibration) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Calibration, "_measure_operations", interrupt)
    machine, said = calibrated(tmp_path / "cut.json")
    assert "interrupted" in said and machine.made is not None and not machine.made.complete
    assert machine.host.step_us is not None


def test_an_earlier_profile_stays_if_no_curve_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "earlier.json"
    path.write_text("{}")
    with pytest.raises(MoespanError, match=r"earlier\.json stays as it was"):
        calibrated(path, seconds=1e-6)
    assert path.read_text() == "{}"


def test_two_nodes_measure_what_joins_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_MESSAGES", (4096, 16384))
    monkeypatch.setattr(calibrate, "_PLANS", (256, 4096))
    monkeypatch.setattr(calibrate, "Probe", FixedProbe)
    monkeypatch.setattr(calibrate, "last_level_cache_bytes", lambda: 1 << 20)
    for part in ("_measure_host", "_measure_operations"):
        monkeypatch.setattr(Calibration, part, lambda self: None)
    config = replace(CONFIG, layout=Layout(dp=2))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    first, second = (
        Nodes(nnodes=2, node_rank=rank, master_port=port, no_cluster_key=True, join_timeout_s=60)
        for rank in range(2)
    )
    other = Calibration(config, TINY, tmp_path / "other.json", nodes=second)
    with ThreadPoolExecutor(1) as pool:
        assisted = pool.submit(other.assist)
        machine, said = calibrated(tmp_path / "nodes.json", config, nodes=first)
        assisted.result()
    assert "collectives over 2 ranks of 2 nodes" in said
    assert not (tmp_path / "other.json").exists()  # node 0 writes
    (level,) = machine.levels
    assert level.name == "cluster" and level.bytes_per_s and level.bytes_per_s.origin == "measured"
    assert {one.level for one in machine.collectives} == {"cluster"}
    assert {one.kind for one in machine.collectives} == set(collectives.KINDS)
    assert all(one.ranks == 2 and one.bytes == [4096, 16384] for one in machine.collectives)
    assert machine.host.broadcast is not None and machine.host.broadcast.ranks == [2]


def test_ranks_of_nodes_are_measured_one_of_each_and_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[int, list[tuple[Layout, tuple[str, ...], int]]] = {0: [], 1: []}

    def measure(
        config: EngineConfig, wanted: collectives.Wanted, nodes: Nodes | None = None
    ) -> list[Timing]:
        nodes = nodes or Nodes()
        asked[nodes.node_rank].append((config.layout, wanted.axes, nodes.nnodes))
        if nodes.node_rank:
            return []
        axis = wanted.axes[0]
        ranks = getattr(config.layout, axis)
        us = 50e-6 * ranks * nodes.nnodes
        sums = Timing(axis=axis, ranks=ranks, message_bytes=4096, median_s=us, bus_bytes_per_s=1.0)
        plans = [
            msgspec.structs.replace(sums, axis="control", kind=kind, ranks=config.layout.world_size)
            for kind in ["broadcast"] * len(wanted.plans_bytes) + ["send"]
            if wanted.plans_bytes
        ]
        waits = msgspec.structs.replace(sums, axis=collectives.WAITS)
        return [sums, *plans, *[waits] * wanted.waits]

    monkeypatch.setattr(collectives, "measure", measure)
    for part in ("_measure_host", "_measure_operations"):
        monkeypatch.setattr(Calibration, part, lambda self: None)
    monkeypatch.setattr(calibrate, "Probe", FixedProbe)
    config = replace(CONFIG, layout=Layout(tp=2, dp=2))
    machine, _ = calibrated(tmp_path / "four.json", config, nodes=Nodes(nnodes=2))
    between = [(Layout(sp=2, tp=2), ("sp",), 2), (Layout(tp=4), ("tp",), 2)]
    assert asked[0][:2] == between and [one[0] for one in asked[0][2:]] == [Layout(tp=2)]
    Calibration(config, TINY, tmp_path / "x", nodes=Nodes(nnodes=2, node_rank=1)).assist()
    assert asked[1] == between
    assert [(one.name, one.devices) for one in machine.levels] == [("node", 2), ("cluster", None)]
    assert machine.devices_per_node == 2
    assert machine.host.broadcast is not None and machine.host.broadcast.ranks == [2, 4]
    prices = Prices(machine, "bfloat16")
    cluster = prices.level_of(4)
    times = [
        prices.collective("all_reduce", cluster, ranks, 4096, False, 2).seconds
        for ranks in (2, 4, 8)
    ]
    assert times[:2] == pytest.approx([600e-6, 800e-6])  # with what they take after work
    assert times[2] > times[1]  # more nodes than were measured


def test_a_lost_node_leaves_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: Any, **__: Any) -> list[Timing]:
        raise MeetingError("node 1 is missing")

    monkeypatch.setattr(collectives, "measure", measure)
    monkeypatch.setattr(calibrate, "Probe", FixedProbe)
    out = tmp_path / "lost.json"
    config = replace(CONFIG, layout=Layout(dp=2))
    with pytest.raises(MeetingError, match="node 1 is missing"):
        Calibration(config, TINY, out, nodes=Nodes(nnodes=2)).run()
    machine = profile.load(str(out))
    assert machine.made is not None and not machine.made.complete
