"""The environment of the ranks: which variables are set; those of the user are never changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moespan.checkpoint.presets import preset
from moespan.config import COLLECTIVE_TIMEOUT_S, EngineConfig, Layout, ModelConfig, Nodes
from moespan.launch.distributed import make_mesh
from moespan.machine import environment
from moespan.machine.environment import rank_environment
from moespan.machine.setting import Machine, Setting
from moespan.machine.topology import npu_chip
from moespan.parallel.buffers import (
    DEFAULT_BUFFER_MB,
    MB,
    group_buffers_mb,
    hccl_bytes,
    largest_messages,
    p2p_buffer_mb,
)
from moespan.parallel.mesh import Mesh
from tests.support import QUICKSTART

MODEL = ModelConfig.from_dict(preset("16b", {}))
A2 = Machine(architecture="aarch64", chip="910B", threads=(12,) * 8)
OURS = {
    "GLOO_SOCKET_IFNAME",
    "HCCL_BUFFSIZE",
    "HCCL_CONNECT_TIMEOUT",
    "HCCL_EVENT_TIMEOUT",
    "HCCL_EXEC_TIMEOUT",
    "HCCL_IF_IP",
    "HCCL_OP_EXPANSION_MODE",
    "LD_PRELOAD",
    "OMP_NUM_THREADS",
    "P2P_HCCL_BUFFSIZE",
    "PYTORCH_NPU_ALLOC_CONF",
    "TASK_QUEUE_ENABLE",
}


def config(layout: Layout, device: str = "npu", **settings: object) -> EngineConfig:
    return EngineConfig("unused", layout, device, **settings)  # type: ignore[arg-type]


def settings(
    layout: Layout,
    device: str = "npu",
    machine: Machine = A2,
    user: dict[str, str] | None = None,
    **options: object,
) -> dict[str, Setting]:
    found = rank_environment(config(layout, device, **options), MODEL, machine, user or {})
    assert len({one.name for one in found}) == len(found)
    return {one.name: one for one in found}


def values(*arguments: object, **named: object) -> dict[str, str | None]:
    return {
        name: one.value
        for name, one in settings(*arguments, **named).items()  # type: ignore[arg-type]
        if one.value is not None
    }


# What is set


def test_an_a2_server_with_tp_gets_the_whole_set() -> None:
    assert values(Layout(tp=8, ep=8)) == {
        "OMP_NUM_THREADS": "12",
        "GLOO_SOCKET_IFNAME": "lo",
        "HCCL_CONNECT_TIMEOUT": "600",
        "HCCL_EXEC_TIMEOUT": "544",
        "HCCL_EVENT_TIMEOUT": "680",
        "TASK_QUEUE_ENABLE": "1",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
    }


def test_every_setting_has_a_reason() -> None:
    machine = replace(A2, nnodes=2, address="10.0.0.1", interface="eth1", libgomp="/libgomp.so")
    found = settings(Layout(tp=4, pp=2, dp=2, ep=8), machine=machine)
    assert found.keys() >= OURS
    assert all(one.why for one in found.values())


def test_cpu_and_cuda_get_what_their_backends_read() -> None:
    assert values(Layout(tp=2), "cpu", Machine(threads=(4, 4))) == {
        "OMP_NUM_THREADS": "4",
        "OMP_WAIT_POLICY": "passive",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    assert values(Layout(tp=2), "cuda", Machine()) == {
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    assert values(Layout(), "cpu", Machine()) == {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_whoever_says_how_threads_wait_is_obeyed(name: str) -> None:
    found = settings(Layout(), "cpu", Machine(), user={name: "1"})
    assert (found[name].value, found[name].set_by) == ("1", "you")
    assert found["OMP_WAIT_POLICY"].value in (None, "1")


def test_torch_npu_beside_another_device_is_not_loaded() -> None:
    machine = Machine(has_torch_npu=True)
    assert values(Layout(), "cpu", machine)["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    assert values(Layout(), "npu", machine)["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"


def test_a_variable_that_this_process_has_set_is_not_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "_set_here", set())
    monkeypatch.delenv(environment.BACKEND_AUTOLOAD, raising=False)
    environment.keep_torch_npu_out()
    names = [one.name for one in environment.environment_here(config(Layout(), "cpu"))]
    assert environment.BACKEND_AUTOLOAD not in names  # no torch-npu here
    monkeypatch.setattr(environment, "_set_here", set())
    environment.keep_torch_npu_out()  # now the variable existed before
    (found,) = (
        one
        for one in environment.environment_here(config(Layout(), "cpu"))
        if one.name == environment.BACKEND_AUTOLOAD
    )
    assert found.set_by == "you"


def test_one_npu_rank_needs_nothing_of_hccl() -> None:
    machine = Machine(chip="910B")
    assert values(Layout(), machine=machine) == {
        "TASK_QUEUE_ENABLE": "1",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
    }


def test_ranks_with_different_cores_set_their_own_threads() -> None:
    found = settings(Layout(tp=2), "cpu", Machine(threads=(2, 3)))["OMP_NUM_THREADS"]
    assert found.per_rank and found.value == "2 or 3"


def test_several_nodes_use_the_interface_that_connects_them() -> None:
    machine = replace(A2, nnodes=2, address="10.0.0.7", interface="enp1")
    found = values(Layout(tp=16), machine=machine)
    assert found["GLOO_SOCKET_IFNAME"] == "enp1"
    assert found["HCCL_IF_IP"] == "10.0.0.7"
    cuda = values(Layout(tp=16), "cuda", machine)
    assert cuda["NCCL_SOCKET_IFNAME"] == "=enp1"


def test_under_the_users_launcher_the_network_is_not_chosen() -> None:
    found = values(Layout(tp=16), machine=replace(A2, nnodes=2, interface=""))
    assert not {"GLOO_SOCKET_IFNAME", "HCCL_IF_IP"} & found.keys()


def test_libgomp_is_preloaded_on_aarch64_only() -> None:
    arm = replace(A2, libgomp="/torch.libs/libgomp.so.1")
    assert values(Layout(), machine=arm)["LD_PRELOAD"] == "/torch.libs/libgomp.so.1"
    assert "LD_PRELOAD" not in values(Layout(), machine=replace(arm, architecture="x86_64"))
    assert "LD_PRELOAD" not in values(Layout(), "cpu", machine=arm)


@pytest.mark.parametrize(
    ("layout", "machine", "user", "why"),
    [
        (Layout(tp=8), replace(A2, chip="310P"), {}, "for A2"),
        (Layout(tp=8), replace(A2, chip=""), {}, "for A2"),
        (Layout(tp=8), replace(A2, chip="910C"), {}, "reported to hang"),
        (Layout(tp=16), replace(A2, nnodes=2), {}, "one server"),
        (Layout(tp=4, pp=2), A2, {}, "tp, pp"),
        (Layout(tp=2, dp=4, ep=8), A2, {}, "tp, ep"),
        (Layout(tp=4, sp=2), A2, {}, "tp, sp"),
        (Layout(pp=8), A2, {}, "no collectives"),
        (Layout(dp=8), A2, {}, "no collectives"),
        (Layout(tp=8), A2, {"HCCL_DETERMINISTIC": "true"}, "HCCL_DETERMINISTIC"),
    ],
)
def test_aiv_is_not_set_where_its_rules_forbid_it(
    layout: Layout, machine: Machine, user: dict[str, str], why: str
) -> None:
    found = settings(layout, machine=machine, user=user, npu_aiv=True)["HCCL_OP_EXPANSION_MODE"]
    assert found.value is None and found.set_by == "nobody"
    assert why in found.why


def test_aiv_is_not_set_unasked_nor_beside_the_fused_all_reduce() -> None:
    name = "HCCL_OP_EXPANSION_MODE"
    assert "--npu-aiv sets it" in settings(Layout(tp=8))[name].why
    both = settings(Layout(tp=8), npu_aiv=True, npu_fused_all_reduce=512)[name]
    assert both.value is None and "vector cores" in both.why


@pytest.mark.parametrize(
    "layout", [Layout(tp=8), Layout(tp=8, ep=4), Layout(sp=4), Layout(dp=8, ep=8)]
)
def test_aiv_is_set_for_a_single_communicator(layout: Layout) -> None:
    assert values(layout, npu_aiv=True)["HCCL_OP_EXPANSION_MODE"] == "AIV"


# Timeouts


def test_hccls_timeout_is_shorter_than_torchs_and_its_events_longer() -> None:
    found = values(Layout(tp=8))
    execute, event = int(found["HCCL_EXEC_TIMEOUT"] or 0), int(found["HCCL_EVENT_TIMEOUT"] or 0)
    assert execute < COLLECTIVE_TIMEOUT_S < event
    assert execute % 68 == 0  # older chips round down to this


@given(st.sampled_from(["HCCL_EXEC_TIMEOUT", "HCCL_EVENT_TIMEOUT"]), st.integers(2, 5000))
def test_a_timeout_of_the_user_decides_the_other_one(name: str, seconds: int) -> None:
    found = values(Layout(tp=8), user={name: str(seconds)})
    assert found[name] == str(seconds)
    assert int(found["HCCL_EXEC_TIMEOUT"] or 0) < int(found["HCCL_EVENT_TIMEOUT"] or 0)


def test_no_timeout_of_the_user_means_none_of_ours() -> None:
    assert values(Layout(tp=8), user={"HCCL_EXEC_TIMEOUT": "0"})["HCCL_EVENT_TIMEOUT"] == "0"


# What the user has set


@given(
    st.sets(st.sampled_from(sorted(OURS | {"NCCL_SOCKET_IFNAME"}))),
    st.sampled_from(["cpu", "cuda", "npu"]),
    st.sampled_from([Layout(), Layout(tp=8), Layout(tp=4, pp=2, dp=2, ep=8)]),
    st.text(max_size=5),
)
def test_variables_of_the_user_are_not_changed(
    names: set[str], device: str, layout: Layout, value: str
) -> None:
    machine = replace(A2, nnodes=2, address="10.0.0.1", libgomp="/libgomp.so")
    found = settings(layout, device, machine, dict.fromkeys(names, value))
    for name in names:
        assert found[name].value == value
        assert found[name].set_by == "you"


def test_variables_that_exclude_ours_leave_them_unset() -> None:
    machine = replace(A2, nnodes=2, address="10.0.0.1")
    for name, ours in (
        ("PYTORCH_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF"),
        ("HCCL_SOCKET_IFNAME", "HCCL_IF_IP"),
        ("ASCEND_LAUNCH_BLOCKING", "TASK_QUEUE_ENABLE"),
    ):
        found = settings(Layout(tp=16), machine=machine, user={name: "1"})[ours]
        assert found.value is None and found.why == f"{name} is set"


def test_other_variables_of_the_user_are_shown_if_they_concern_us() -> None:
    found = settings(Layout(), "cpu", Machine(), {"HCCL_ALGO": "x", "HOME": "/", "MY_KEY": "y"})
    assert found.keys() == {"OMP_WAIT_POLICY", "HCCL_ALGO"}
    assert found["HCCL_ALGO"] == Setting(name="HCCL_ALGO", value="x", set_by="you")


def test_only_our_own_settings_are_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    monkeypatch.setattr(os, "environ", dict(before))
    environment.apply(
        [
            Setting(name="M_OURS", value="1", set_by="moespan"),
            Setting(name="M_USERS", value="1", set_by="you"),
            Setting(name="M_LEFT", value=None, set_by="nobody"),
            Setting(name="M_OWN", value="2 or 3", set_by="moespan", per_rank=True),
        ]
    )
    assert dict(os.environ) == {**before, "M_OURS": "1"}


def test_the_table_has_a_line_for_each_variable() -> None:
    found = rank_environment(config(Layout(tp=8)), MODEL, A2, {"TASK_QUEUE_ENABLE": "2"})
    lines = environment.describe(found)
    assert len(lines) == len(found) + 1
    line = next(line for line in lines if line.startswith("TASK_QUEUE_ENABLE"))
    assert line.split()[1:3] == ["2", "you"]


# Buffers


def test_buffers_hold_the_largest_message_of_the_layout() -> None:
    # 2048 tokens × 2048 × 2 bytes = 8 MB; 64 rows of logits × 102400 × 4 = 25 MB.
    assert largest_messages(config(Layout(tp=8)), MODEL) == {"tp": 64 * 102400 * 4}
    assert group_buffers_mb(config(Layout(tp=8)), MODEL) == {"tp": 25}
    prefill = config(Layout(tp=8), max_num_batched_tokens=16384)
    assert group_buffers_mb(prefill, MODEL) == {"tp": 64}
    both = largest_messages(config(Layout(tp=2, dp=4, ep=8)), MODEL)
    assert both["ep_tp_groups"] == 4 * 8 * MB
    assert both["ep"] == 4 * MB * 6  # each token of a rank's half to six ranks
    assert largest_messages(config(Layout(sp=4)), MODEL)["sp"] == 512 * 3 * 2048 * 2
    assert largest_messages(config(Layout(tp=4, pp=2)), MODEL)["pp"] == 2 * MB


def test_groups_of_another_dispatch_get_no_buffer() -> None:
    layout = Layout(tp=2, dp=4, ep=8)
    gather = largest_messages(config(layout, moe_dispatch="all_gather"), MODEL)
    to_all = largest_messages(config(layout, moe_dispatch="all_to_all"), MODEL)
    assert gather.keys() == {"tp", "ep_tp_groups"} and to_all.keys() == {"tp", "ep"}


@given(
    st.sampled_from([Layout(tp=8), Layout(tp=2, dp=4, ep=8), Layout(sp=4, pp=2), Layout(pp=8)]),
    st.integers(64, 1 << 20),
)
def test_no_buffer_is_larger_than_hccls_own(layout: Layout, tokens: int) -> None:
    settings = config(layout, max_num_batched_tokens=tokens)
    sizes = group_buffers_mb(settings, MODEL)
    assert all(1 <= size <= DEFAULT_BUFFER_MB for size in sizes.values())
    assert p2p_buffer_mb(settings, MODEL) <= 20
    neighbours = min(layout.pp - 1, 2)
    expected = sum(sizes.values()) + neighbours * p2p_buffer_mb(settings, MODEL)
    assert hccl_bytes(settings, MODEL) == 2 * MB * expected


def test_each_group_has_a_buffer_and_hccl_buffsize_is_left_to_the_user() -> None:
    found = settings(Layout(tp=2, dp=4, ep=8))["HCCL_BUFFSIZE"]
    assert found.value is None and "tp 25 MB, ep 24 MB, ep_tp_groups 32 MB" in found.why
    assert values(Layout(tp=4, pp=2))["P2P_HCCL_BUFFSIZE"] == "2"


class FakeOptions:
    """The one field of torch_npu's group options that we use."""

    hccl_config: dict[str, int]


def test_each_npu_group_gets_its_buffer_size(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("torch_npu._C._distributed_c10d")
    backend = type("ProcessGroupHCCL", (), {"Options": FakeOptions})
    monkeypatch.setattr(module, "ProcessGroupHCCL", backend, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    npu: Any = SimpleNamespace(type="npu")  # torch knows no such device here
    mesh = Mesh(Layout(tp=2, pp=2), 0, npu, {"tp": 25})
    assert mesh._options("tp").hccl_config == {"hccl_buffer_size": 25}
    assert mesh._options("pp") is None
    assert Mesh(Layout(tp=2), 0, torch.device("cpu"), {"tp": 25})._options("tp") is None


@pytest.mark.parametrize("users", [None, "120"])
def test_a_buffer_size_of_the_user_holds_for_all_groups(
    monkeypatch: pytest.MonkeyPatch, users: str | None
) -> None:
    given: list[Mapping[str, int]] = []
    monkeypatch.setattr(Mesh, "create", lambda *arguments, **_: given.append(arguments[5]))
    if users is None:
        monkeypatch.delenv("HCCL_BUFFSIZE", raising=False)
    else:
        monkeypatch.setenv("HCCL_BUFFSIZE", users)
    make_mesh(EngineConfig(str(QUICKSTART), Layout(tp=2), "npu"), torch.device("cpu"))
    assert given == [{"tp": 16} if users is None else {}]


# This machine


def test_the_chip_is_known_by_pci(tmp_path: Path) -> None:
    def device(address: str, vendor: str, kind: str, number: str) -> None:
        folder = tmp_path / "sys/bus/pci/devices" / address
        folder.mkdir(parents=True)
        for name, text in (("vendor", vendor), ("class", kind), ("device", number)):
            (folder / name).write_text(text + "\n")

    assert npu_chip(tmp_path) == ""
    device("0000:01:00.0", "0x19e5", "0x020000", "0xd802")  # Huawei's network card
    assert npu_chip(tmp_path) == ""
    device("0000:c1:00.0", "0x19e5", "0x120000", "0xd802")
    assert npu_chip(tmp_path) == "910B"


@pytest.mark.slow
def test_ranks_get_the_environment_that_is_printed(tmp_path: Path) -> None:
    """A fake rank writes its environment to a file."""
    program = tmp_path / "rank.py"
    program.write_text(
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "from moespan.launch.rank import as_rank\n"
        "def play(job, rank, _):\n"
        f"    Path({str(tmp_path)!r}, f'{{rank}}.json').write_text(json.dumps(dict(os.environ)))\n"
        "as_rank(play)\n"
    )
    from moespan.launch.agent_process import start_agent
    from moespan.launch.job import Job

    job = Job.create(EngineConfig(str(QUICKSTART), Layout(tp=2), dtype="float32"), Nodes())
    assert start_agent(job, 2, [str(program)]).wait(120) == 0
    printed = subprocess.run(
        [
            *(sys.executable, "-m", "moespan", "generate", str(QUICKSTART)),
            *("-tp", "2", "--device", "cpu", "--print-env"),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    table, _ = printed.split("\n\n")  # the nodes of the job follow
    rows = [line.split()[:3] for line in table.splitlines()[1:]]
    assert ["GLOO_SOCKET_IFNAME", "lo", "moespan"] in rows
    for rank in range(2):
        has = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, value, set_by in rows:
            if set_by != "nobody":
                assert has[name] == value
