"""Profiles of machines: built in, from files, and files over a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moespan.device import DEVICES
from moespan.errors import ConfigError
from moespan.planner import profile
from moespan.planner.memory import MachineMemory
from moespan.planner.profile import Figure, Profile

SMALL: dict[str, Any] = {
    "schema": 1,
    "name": "mine",
    "device": {"kind": "cpu", "memory_bytes": {"value": 1e9, "from": "measured", "n": 3}},
}


def written(folder: Path, raw: dict[str, Any]) -> str:
    path = folder / "machine.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", profile.names())
def test_each_figure_of_a_built_in_profile_says_where_it_comes_from(name: str):
    found = profile.load(name)
    assert found.name == name
    leaves = list(found.leaves())
    assert len(leaves) > 20
    # A guess may have no source; all else names one.
    assert not [path for path, origin, source in leaves if origin != "guess" and not source]


@pytest.mark.parametrize("name", profile.names())
def test_a_built_in_profile_has_every_figure_that_a_step_needs(name: str):
    found = profile.load(name)
    device, launch = found.device, found.launch
    for figure in (device.bytes_per_s, device.floor_us, device.base_bytes, launch.eager_us):
        assert figure is not None and figure.value > 0
    assert {"float32", "int8"} < set(device.operations_per_s)
    assert found.host.step_us and found.host.sequence_us and found.host.broadcast
    assert all(level.bytes_per_s and level.latency_us for level in found.levels)
    assert found.relative_error == 0.4


def test_a_profile_comes_back_from_its_file_equal(tmp_path: Path):
    found = profile.load("910B3")
    profile.save(found, tmp_path / "a2.json")
    assert profile.load(str(tmp_path / "a2.json")) == found
    assert [file.name for file in tmp_path.iterdir()] == ["a2.json"]


def test_a_file_over_a_base_replaces_what_it_names_and_keeps_the_rest(tmp_path: Path):
    base = profile.load("h100")
    curve = {"kind": "all_gather", "level": "node", "ranks": 8, "bytes": [1], "us": [99.0]}
    raw = {
        "schema": 1,
        "name": "mine",
        "base": "H100",
        "device": {"bytes_per_s": {"value": 3.0e12, "from": "measured"}},
        "collectives": [curve],
    }
    found = profile.load(written(tmp_path, raw))
    assert found.device.bytes_per_s == Figure(value=3.0e12, origin="measured")
    assert found.device.memory_bytes == base.device.memory_bytes
    assert len(found.collectives) == len(base.collectives)
    times = {(c.kind, c.ranks, c.graph): c.us for c in found.collectives}
    assert times["all_gather", 8, False] == [99.0]
    assert times["all_gather", 8, True] == [10.6]


def test_a_file_may_be_put_over_a_built_in_profile_whose_links_it_does_not_know(tmp_path: Path):
    base = profile.load("910b3")
    one = written(tmp_path, {**SMALL, "device": {**SMALL["device"], "kind": "npu"}})
    assert profile.load(one).levels == []
    found = profile.load(f"910B3+{one}")
    assert found.levels == base.levels and found.collectives == base.collectives
    assert found.device.memory_bytes == Figure(value=1e9, origin="measured", n=3)
    node = {"name": "node", "devices": 4, "topology": "ring"}
    found = profile.load(f"910b3+{written(tmp_path, {**SMALL, 'levels': [node]})}")
    assert [level.topology for level in found.levels] == ["ring", "switch"]
    with pytest.raises(ConfigError, match="910b4"):
        profile.load("910b3+910b4")


def test_only_a_complete_calibration_counts_as_measured():
    raw = profile.load("zen4-2")
    curve = profile.Operation(op="linear", n=8, k=8, rows=[1], us=[1.0])
    link = profile.Collective(kind="all_reduce", level="node", ranks=2, bytes=[8], us=[1.0])
    parts = {f: getattr(raw, f) for f in raw.__struct_fields__}
    parts |= {"operations": [curve], "collectives": [link]}
    assert Profile(**{**parts, "made": profile.Made()}).relative_error == 0.15
    assert Profile(**{**parts, "made": profile.Made(complete=False)}).relative_error == 0.4
    assert (
        Profile(**{**parts, "error": Figure(value=0.07, origin="measured")}).relative_error == 0.07
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "schema=2 is not 1"),
        ({"speed": 1}, "unknown field `speed`"),
        ({"device": {"kind": "cpu", "memory_bytes": 5}}, r"\$.device.memory_bytes"),
        ({"operations": [{"op": "linear", "rows": [1, 2], "us": [1]}]}, "2 sizes and 1 times"),
        ({"operations": [{"op": "linear", "rows": [2, 1], "us": [1, 1]}]}, "must ascend"),
        ({"operations": [{"op": "linear", "rows": [1], "us": [0]}]}, "must be above 0"),
        ({"device": {**SMALL["device"], "kind": "tpu"}}, "kind='tpu' is not one of npu, cuda, cpu"),
        ({"base": "h10"}, "base='h10' is not one of"),
    ],
)
def test_a_broken_profile_is_named(tmp_path: Path, change: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        profile.load(written(tmp_path, {**SMALL, **change}))


def test_steps_on_a_cpu_take_as_much_as_was_measured_there():
    cpu = profile.load("epyc9004").device
    assert MachineMemory.of("cpu", cpu).slack == DEVICES["cpu"].slack == 1.4
    gpu = profile.load("h100").device
    assert gpu.allocator_slack is not None
    assert MachineMemory.of("cuda", gpu).slack == gpu.allocator_slack.value < 0.1


def test_hardware_that_nobody_described_is_named():
    with pytest.raises(ConfigError, match=r"hardware 'b200' is neither a \.json file nor one of"):
        profile.load("b200")
    with pytest.raises(ConfigError, match="cannot be read"):
        profile.load("nothing.json")
