"""Cores and memory of ranks, on machines made of files, and on this one."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moespan.config import EngineConfig, Layout
from moespan.errors import ConfigError
from moespan.launch.job import Job
from moespan.launch.ranks import RanksClient
from moespan.machine import binding
from moespan.machine.binding import (
    Binding,
    RankBinding,
    binding_here,
    choose_binding,
    cpus_beside,
)
from moespan.machine.topology import (
    Topology,
    format_list,
    parse_list,
    parse_npu_topology,
    read_topology,
)

# Published by users of 910B servers: 8 NPUs, 4 sockets, 8 NUMA nodes of 24 cores.
# The legend is shortened.
TOPO_910B = """\
\t   NPU0       NPU1       NPU2       NPU3       NPU4       NPU5       NPU6       NPU7       CPU Affinity
NPU0       X          HCCS       HCCS       HCCS       HCCS       HCCS       HCCS       HCCS       144-167
NPU1       HCCS       X          HCCS       HCCS       HCCS       HCCS       HCCS       HCCS       144-167
NPU2       HCCS       HCCS       X          HCCS       HCCS       HCCS       HCCS       HCCS       96-119
NPU3       HCCS       HCCS       HCCS       X          HCCS       HCCS       HCCS       HCCS       96-119
NPU4       HCCS       HCCS       HCCS       HCCS       X          HCCS       HCCS       HCCS       0-23
NPU5       HCCS       HCCS       HCCS       HCCS       HCCS       X          HCCS       HCCS       0-23
NPU6       HCCS       HCCS       HCCS       HCCS       HCCS       HCCS       X          HCCS       48-71
NPU7       HCCS       HCCS       HCCS       HCCS       HCCS       HCCS       HCCS       X          48-71

Legend:

  X    = Self
  SYS  = Path traversing PCIe and NUMA nodes. Nodes are connected through SMP, such as QPI, UPI.
"""  # noqa: E501
# The PCI addresses that `npu-smi info` printed on that machine, in the order of the NPUs.
ADDRESSES_910B = ["c1", "c2", "81", "82", "01", "02", "41", "42"]
NODES_910B = [6, 6, 4, 4, 0, 0, 2, 2]

# Written from the documented format, not recorded: an x86 server with PCIe cards, SMT siblings in a
# second range, a terminal's escape codes, and a column after the one we read.
TOPO_X86 = """\
\x1b[4m\tNPU0    NPU1    CPU Affinity    NUMA Affinity\x1b[0m
NPU0     X      SYS     0-3,8-11        0
NPU1    SYS      X      4-7,12-15       1
"""
# Written, not recorded: a machine whose npu-smi shows no affinity.
TOPO_WITHOUT_AFFINITY = "\tNPU0    NPU1\nNPU0     X      SIO\nNPU1    SIO      X\n"


class Machine:
    """A tree of files as the kernel shows them."""

    def __init__(self, root: Path, nodes: Mapping[int, str], smt: Mapping[int, int] = {}) -> None:
        """`nodes`: CPUs of each NUMA node; `smt`: CPU → its sibling, for the first of the two."""
        self.root = root
        for node, cpus in nodes.items():
            self.write(f"sys/devices/system/node/node{node}/cpulist", cpus)
            for cpu in parse_list(cpus):
                self.write(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", cpu)
        for pair in smt.items():
            for cpu in pair:
                path = f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
                self.write(path, "{},{}".format(*pair))
        self.write("sys/devices/system/node/online", format_list(list(nodes)))
        self.write("sys/devices/system/node/has_memory", format_list(list(nodes)))
        self.cpus = {cpu for cpus in nodes.values() for cpu in parse_list(cpus)}

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def add_npus(
        self, nodes: Iterable[int], addresses: Iterable[str], *, numbered: bool = False
    ) -> None:
        for npu, (node, bus) in enumerate(zip(nodes, addresses, strict=True)):
            device = f"sys/bus/pci/devices/0000:{bus}:00.0"
            self.write(f"{device}/vendor", "0x19e5")
            self.write(f"{device}/class", "0x120000")
            self.write(f"{device}/numa_node", node)
            if numbered:
                self.write(f"{device}/dev_id", npu)
            self.write(f"dev/davinci{npu}", "")
        self.write("dev/davinci_manager", "")
        network_card = "sys/bus/pci/devices/0000:e5:00.0"
        self.write(f"{network_card}/vendor", "0x19e5")
        self.write(f"{network_card}/class", "0x020000")
        self.write(f"{network_card}/numa_node", 0)

    def add_gpu(self, address: str, node: int, minor: int) -> None:
        self.write(f"sys/bus/pci/devices/{address}/numa_node", node)
        self.write(
            f"proc/driver/nvidia/gpus/{address}/information",
            f"Model: \t\t NVIDIA H100\nGPU UUID: \t GPU-{minor}\nBus Location: \t {address}\n"
            f"Device Minor: \t {minor}",
        )
        self.write(f"dev/nvidia{minor}", "")

    def read(
        self,
        device: str = "cpu",
        allowed: Iterable[int] | None = None,
        environ: Mapping[str, str] = {},
        npu_topology: str = "",
    ) -> Topology:
        allowed = self.cpus if allowed is None else set(allowed)
        return read_topology(self.root, device, allowed, environ, npu_topology)


def two_sockets(root: Path) -> Machine:
    return Machine(root, {0: "0-15", 1: "16-31"})


def kunpeng(root: Path) -> Machine:
    machine = Machine(root, {node: f"{24 * node}-{24 * node + 23}" for node in range(8)})
    machine.add_npus(NODES_910B, ADDRESSES_910B)
    return machine


def cpus_of(found: Binding) -> list[str]:
    return [format_list(rank.cpus) for rank in found.ranks]


def memory_of(found: Binding) -> list[int | None]:
    return [rank.memory_node for rank in found.ranks]


def test_npus_of_a_socket_share_its_cores(tmp_path: Path) -> None:
    machine = two_sockets(tmp_path)
    machine.add_npus([0] * 4 + [1] * 4, [f"0{bus}" for bus in range(1, 9)], numbered=True)
    found = choose_binding(machine.read("npu"), 8)
    assert found.describe() == [
        "rank 0: NUMA 0, cores 0-3, 4 threads, memory preferred 0",
        "rank 1: NUMA 0, cores 4-7, 4 threads, memory preferred 0",
        "rank 2: NUMA 0, cores 8-11, 4 threads, memory preferred 0",
        "rank 3: NUMA 0, cores 12-15, 4 threads, memory preferred 0",
        "rank 4: NUMA 1, cores 16-19, 4 threads, memory preferred 1",
        "rank 5: NUMA 1, cores 20-23, 4 threads, memory preferred 1",
        "rank 6: NUMA 1, cores 24-27, 4 threads, memory preferred 1",
        "rank 7: NUMA 1, cores 28-31, 4 threads, memory preferred 1",
    ]
    assert found.summary() == found.describe()
    first_two = choose_binding(machine.read("npu"), 2)
    assert cpus_of(first_two) == ["0-7", "8-15"]


def test_npu_smi_gives_the_nodes_of_npus_on_a_four_socket_server(tmp_path: Path) -> None:
    topology = kunpeng(tmp_path).read("npu", npu_topology=TOPO_910B)
    found = choose_binding(topology, 8)
    assert [rank.numa_nodes for rank in found.ranks] == [[node] for node in NODES_910B]
    assert memory_of(found) == NODES_910B
    assert cpus_of(found)[:4] == ["144-155", "156-167", "96-107", "108-119"]
    assert found.notes == []


def test_without_npu_smi_the_driver_gives_the_nodes(tmp_path: Path) -> None:
    machine = kunpeng(tmp_path)
    machine.add_npus(NODES_910B, ADDRESSES_910B, numbered=True)
    assert machine.read("npu").device_nodes == [[node] for node in NODES_910B]


def test_addresses_alone_are_not_taken_for_the_order_of_npus(tmp_path: Path) -> None:
    topology = kunpeng(tmp_path).read("npu")
    assert topology.device_nodes == [[]] * 8
    found = choose_binding(topology, 8)
    assert len(found.notes) == 1 and "NUMA node of each npu device is not known" in found.notes[0]
    assert [len(rank.cpus) for rank in found.ranks] == [24] * 8


def test_on_one_node_the_order_of_npus_does_not_matter(tmp_path: Path) -> None:
    machine = two_sockets(tmp_path)
    machine.add_npus([1, 1], ["01", "02"])
    assert cpus_of(choose_binding(machine.read("npu"), 2)) == ["16-23", "24-31"]


@pytest.mark.parametrize("npu_topology", ["", TOPO_WITHOUT_AFFINITY, "npu-smi: error\n"])
def test_devices_without_a_node_are_bound_like_ranks_on_cpus(
    tmp_path: Path, npu_topology: str
) -> None:
    machine = two_sockets(tmp_path)
    machine.add_npus([-1, -1], ["01", "02"], numbered=True)
    found = choose_binding(machine.read("npu", npu_topology=npu_topology), 2)
    assert cpus_of(found) == ["0-15", "16-31"]
    assert len(found.notes) == 1


def test_visible_devices_choose_and_a_container_counts_from_0(tmp_path: Path) -> None:
    machine = kunpeng(tmp_path)
    environ = {"ASCEND_RT_VISIBLE_DEVICES": "4,0"}
    topology = machine.read("npu", environ=environ, npu_topology=TOPO_910B)
    assert topology.device_nodes == [[0], [6]]
    for npu in range(4):
        (tmp_path / f"dev/davinci{npu}").unlink()
    topology = machine.read("npu", npu_topology=TOPO_910B)
    assert topology.device_nodes == [[0], [0], [2], [2]]


def test_gpus_are_counted_by_address_and_chosen_by_index_or_uuid(tmp_path: Path) -> None:
    machine = two_sockets(tmp_path)
    machine.add_gpu("0000:81:00.0", 1, minor=0)
    machine.add_gpu("0000:01:00.0", 0, minor=1)
    machine.add_gpu("0000:82:00.0", -1, minor=2)
    assert machine.read("cuda").device_nodes == [[0], [1], []]
    environ = {"CUDA_VISIBLE_DEVICES": "GPU-0,0,MIG-x"}
    assert machine.read("cuda", environ=environ).device_nodes == [[1], [0], []]
    (tmp_path / "dev/nvidia1").unlink()  # another container's
    assert machine.read("cuda").device_nodes == [[1], []]


def test_smt_siblings_stay_together_and_count_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path, {0: "0-7"}, smt={0: 4, 1: 5, 2: 6, 3: 7})
    found = choose_binding(machine.read(), 2)
    assert cpus_of(found) == ["0-1,4-5", "2-3,6-7"]
    assert [rank.threads for rank in found.ranks] == [2, 2]
    assert memory_of(found) == [None, None]  # there is no choice
    assert found.summary() == ["rank 0: 0-1,4-5, rank 1: 2-3,6-7"]


def test_ranks_without_devices_share_whole_nodes(tmp_path: Path) -> None:
    topology = two_sockets(tmp_path).read()
    assert cpus_of(choose_binding(topology, 4)) == ["0-7", "8-15", "16-23", "24-31"]
    assert cpus_of(choose_binding(topology, 3)) == ["0-7", "8-15", "16-31"]
    assert cpus_of(choose_binding(topology, 2)) == ["0-15", "16-31"]
    alone = choose_binding(topology, 1)
    assert cpus_of(alone) == ["0-31"]
    assert memory_of(alone) == [None]  # both nodes fill, by first touch


def test_fewer_ranks_than_nodes_get_neighbouring_nodes(tmp_path: Path) -> None:
    topology = kunpeng(tmp_path).read()
    assert [rank.numa_nodes for rank in choose_binding(topology, 3).ranks] == [
        [0, 1],
        [2, 3, 4],
        [5, 6, 7],
    ]


@pytest.mark.parametrize(
    ("ranks", "cpus", "threads"),
    [(1, ["0-1"], 2), (2, ["0", "1"], 1), (4, [""] * 4, 1), (8, [""] * 8, 1)],
)
def test_a_box_of_two_cores(tmp_path: Path, ranks: int, cpus: list[str], threads: int) -> None:
    found = choose_binding(Machine(tmp_path, {0: "0-1"}).read(), ranks)
    assert cpus_of(found) == cpus
    assert {rank.threads for rank in found.ranks} == {threads}
    assert found.notes == ([f"{ranks} ranks on 2 cores: not bound"] if ranks > 2 else [])


def test_a_container_of_odd_cores(tmp_path: Path) -> None:
    machine = two_sockets(tmp_path)
    machine.add_npus([0] * 2 + [1] * 2, ["01", "02", "03", "04"], numbered=True)
    machine.write("proc/self/status", "Name:\tpython\nMems_allowed_list:\t1\nCpus:\t1")
    topology = machine.read("npu", allowed=range(1, 32, 2))
    assert topology.memory_nodes == [1]
    assert cpus_of(choose_binding(topology, 4)) == [
        "1,3,5,7",
        "9,11,13,15",
        "17,19,21,23",
        "25,27,29,31",
    ]


def test_ranks_get_another_node_when_theirs_has_no_core_left(tmp_path: Path) -> None:
    machine = two_sockets(tmp_path)
    machine.add_npus([0] * 4, ["01", "02", "03", "04"], numbered=True)
    found = choose_binding(machine.read("npu", allowed=[1, 2, 20, 21, 22]), 4)
    assert sorted(",".join(cpus_of(found)).split(",")) == ["1", "2", "20", "21-22"]
    assert [note[:30] for note in found.notes] == [
        "rank 2: no core left on NUMA 0",
        "rank 3: no core left on NUMA 0",
    ]
    elsewhere = choose_binding(machine.read("npu", allowed=range(20, 24)), 4)
    assert cpus_of(elsewhere) == ["20", "21", "22", "23"]
    assert len(elsewhere.notes) == 4


def test_offline_nodes_and_nodes_without_memory_or_cores(tmp_path: Path) -> None:
    machine = Machine(tmp_path, {0: "0-3", 2: "8-11", 3: ""})
    machine.write("sys/devices/system/node/node1/cpulist", "")  # offline
    machine.write("sys/devices/system/node/has_memory", "0,3")
    topology = machine.read()
    assert list(topology.cores) == [0, 2]
    assert memory_of(choose_binding(topology, 2)) == [0, None]


def test_a_kernel_that_shows_nothing(tmp_path: Path) -> None:
    topology = read_topology(tmp_path, "npu", {2, 3}, {})
    assert topology == Topology(cores={0: [[2], [3]]}, memory_nodes=[], device="npu")
    assert cpus_of(choose_binding(topology, 2)) == ["2", "3"]


def test_a_cpu_quota_limits_threads_only(tmp_path: Path) -> None:
    machine = two_sockets(tmp_path)
    topology = Topology(cores=machine.read().cores, memory_nodes=[0, 1], usable_cores=6)
    found = choose_binding(topology, 2)
    assert [rank.threads for rank in found.ranks] == [3, 3]
    assert cpus_of(found) == ["0-15", "16-31"]


def test_variables_of_the_user_are_respected(tmp_path: Path) -> None:
    machine = two_sockets(tmp_path)
    machine.add_npus([0, 1], ["01", "02"], numbered=True)
    topology = machine.read("npu")
    assert [
        r.threads for r in choose_binding(topology, 2, "auto", {"OMP_NUM_THREADS": "5,2"}).ranks
    ] == [
        5,
        5,
    ]
    found = choose_binding(topology, 2, "auto", {"CPU_AFFINITY_CONF": "1"})
    assert found.describe() == [
        "rank 0: cores not bound, 16 threads, memory preferred 0",
        "rank 1: cores not bound, 16 threads, memory preferred 1",
        "CPU_AFFINITY_CONF is set and binds the cores: moespan does not",
    ]
    assert (
        cpus_of(choose_binding(machine.read(), 2, "auto", {"CPU_AFFINITY_CONF": "1"}))[0] == "0-15"
    )
    assert cpus_of(choose_binding(machine.read(), 1, "auto", {"GOMP_CPU_AFFINITY": "0"})) == [""]


def test_off_binds_nothing_and_still_shares_the_cores(tmp_path: Path) -> None:
    found = choose_binding(two_sockets(tmp_path).read(), 4, "off")
    assert found.ranks[3] == RankBinding(local_rank=3, threads=8)
    assert found.summary() == ["not bound"]


def test_a_refused_memory_policy_is_one_note(tmp_path: Path) -> None:
    topology = two_sockets(tmp_path).read()
    topology = Topology(cores=topology.cores, memory_nodes=[0, 1], memory_refusal="EPERM")
    found = choose_binding(topology, 2)
    assert memory_of(found) == [None, None]
    assert cpus_of(found) == ["0-15", "16-31"]
    assert found.notes == ["no memory node is preferred: EPERM"]


def test_a_map_by_hand(tmp_path: Path) -> None:
    topology = kunpeng(tmp_path).read("npu")
    found = choose_binding(topology, 4, "0:0,1:0,2:0,3:0,4:1,5:1,6:1,7:1")
    assert cpus_of(found) == ["0-5", "6-11", "12-17", "18-23"]
    assert found.notes == []
    assert memory_of(choose_binding(topology, 2, " 0:7, 1:0")) == [7, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("on", "bind='on': 'on' is not an entry; write LOCAL_RANK:NUMA_NODE for every rank, as in"),
        ("0:0,1=1", "'1=1' is not an entry"),
        ("0:0,1:-1", "'1:-1' is not an entry"),
        ("0:0,0:1", "'0:1' names rank 0 again"),
        ("0:0", "has no entry for rank 1; write LOCAL_RANK:NUMA_NODE"),
        (
            "0:0,1:9",
            "'1:9' names NUMA node 9, of which this process may use no core; use one of 0-1",
        ),
    ],
)
def test_a_bad_map_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_binding(two_sockets(tmp_path).read(), 2, text)
    assert message in str(caught.value)


def test_a_map_that_crowds_a_node_is_an_error(tmp_path: Path) -> None:
    topology = Machine(tmp_path, {0: "0", 1: "1-4"}).read()
    with pytest.raises(ConfigError, match="puts 2 ranks on NUMA node 0, of which this process may"):
        choose_binding(topology, 2, "0:0,1:0")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (TOPO_910B, {npu: list(range(24 * n, 24 * n + 24)) for npu, n in enumerate(NODES_910B)}),
        (TOPO_X86, {0: [0, 1, 2, 3, 8, 9, 10, 11], 1: [4, 5, 6, 7, 12, 13, 14, 15]}),
        (TOPO_WITHOUT_AFFINITY, {}),
        ("", {}),
        ("  NPU4 NPU6 CPU Affinity\nNPU4 X HCCS NA\nNPU6 HCCS X 0-3\n", {6: [0, 1, 2, 3]}),
    ],
)
def test_the_affinity_column_of_npu_smi(text: str, found: dict[int, list[int]]) -> None:
    assert parse_npu_topology(text) == found


@given(st.sets(st.integers(0, 300), min_size=1))
def test_lists_are_read_as_they_are_written(numbers: set[int]) -> None:
    assert parse_list(format_list(list(numbers))) == sorted(numbers)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    smt = draw(st.integers(1, 3))
    cpu = 0
    cores: dict[int, list[list[int]]] = {}
    nodes = draw(st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True))
    for node in nodes:
        cores[node] = []
        for _ in range(draw(st.integers(1, 7))):
            cores[node].append(list(range(cpu, cpu + draw(st.integers(1, smt)))))
            cpu += smt
    near = st.lists(st.sampled_from([*nodes, 100]), max_size=3, unique=True)
    return Topology(
        cores=cores,
        memory_nodes=draw(st.lists(st.sampled_from(nodes), unique=True)),
        device=draw(st.sampled_from(["cpu", "cuda", "npu"])),
        device_nodes=draw(st.lists(near, max_size=12)),
        usable_cores=draw(st.none() | st.integers(1, 50)),
    )


@given(topologies(), st.integers(1, 20))
def test_parts_are_allowed_disjoint_and_non_empty_or_a_note_says_why_not(
    topology: Topology, ranks: int
) -> None:
    cores = [core for own in topology.cores.values() for core in own]
    found = choose_binding(topology, ranks)
    assert [rank.local_rank for rank in found.ranks] == list(range(ranks))
    assert all(rank.threads >= 1 for rank in found.ranks)
    if ranks > len(cores):
        assert not any(rank.cpus for rank in found.ranks)
        assert [note[-11:] for note in found.notes] == [": not bound"]
        return
    dealt = [cpu for rank in found.ranks for cpu in rank.cpus]
    assert len(dealt) == len(set(dealt))
    assert set(dealt) <= {cpu for core in cores for cpu in core}
    for rank in found.ranks:
        assert rank.cpus
        whole = [core for core in cores if set(core) <= set(rank.cpus)]
        assert sorted(cpu for core in whole for cpu in core) == rank.cpus  # no core is torn
        assert rank.threads <= len(whole)
        within = {c for n in rank.numa_nodes for core in topology.cores[n] for c in core}
        assert set(rank.cpus) <= within
        assert rank.memory_node is None or [rank.memory_node] == rank.numa_nodes
        if len(rank.numa_nodes) > 1:  # a rank spans nodes only if it has them to itself
            assert set(rank.cpus) == within
    if not any(topology.device_nodes[:ranks]):
        assert len(found.ranks) < len(topology.cores) or all(
            len(rank.numa_nodes) == 1 for rank in found.ranks
        )


POLICY = """
import sys, ctypes
from moespan.machine import binding
if sys.argv[1] == "kernel":
    binding.ctypes.CDLL = lambda name, real=ctypes.CDLL, **options: (
        real(name, **options) if name is None else real("no such library"))
assert binding._memory_refusal() == "", binding._memory_refusal()
assert binding.apply(binding.RankBinding(local_rank=0, threads=1, memory_node=0)) == []
print(binding._memory_refusal())
print(binding.apply(binding.RankBinding(local_rank=0, threads=1, memory_node=1000)))
"""


@pytest.mark.parametrize("library", ["libnuma", "kernel"])
def test_the_kernel_takes_the_memory_policy(library: str) -> None:
    if refusal := binding._memory_refusal():
        pytest.skip(refusal)
    done = subprocess.run(
        [sys.executable, "-c", POLICY, library], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "this process has a memory policy already",
        "['memory of NUMA 1000 not preferred: Invalid argument']",
    ]


def test_without_the_right_to_set_a_policy_only_cores_are_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(binding, "_function", lambda name: refuse)
    assert binding._memory_refusal() == (
        "the kernel refuses a memory policy (Operation not permitted)"
    )
    part = RankBinding(local_rank=0, threads=1, cpus=sorted(os.sched_getaffinity(0)), memory_node=0)
    assert binding.apply(part) == ["memory of NUMA 0 not preferred: Operation not permitted"]
    monkeypatch.setattr(binding, "_function", lambda name: None)
    assert binding.apply(part) == ["memory of NUMA 0 not preferred: Function not implemented"]


def test_another_process_gets_the_cores_that_no_rank_has(tmp_path: Path) -> None:
    machine = two_sockets(tmp_path)
    machine.add_npus([0] * 4, [f"0{bus}" for bus in range(1, 5)], numbered=True)
    ranks = choose_binding(machine.read("npu"), 4)  # all near node 0; node 1 has no device
    assert cpus_beside(ranks, range(32)) == set(range(16, 32))
    assert cpus_beside(choose_binding(machine.read("cpu"), 2), range(32)) == set(range(32))


def test_cores_that_do_not_exist_are_reported_and_not_fatal() -> None:
    part = RankBinding(local_rank=0, threads=1, cpus=[4000])
    assert binding.apply(part) == ["cores 4000 not bound: Invalid argument"]


FAKE_RANK = str(Path(__file__).parents[1] / "launch" / "fake_rank.py")


@pytest.mark.slow
def test_started_ranks_have_the_cores_of_their_binding() -> None:
    expected = binding_here("auto", "cpu", 2)
    config = EngineConfig("fake", Layout(tp=2))
    with RanksClient(config, start_timeout_s=60, program=[FAKE_RANK]) as client:
        assert client.info.binding == expected.summary()
        assert client.info.num_blocks == expected.ranks[0].threads  # reported by the fake engine
        assert Job(client._agent.job.directory).read_binding() == expected
        for part, pid in zip(expected.ranks, rank_pids(client._agent.pid), strict=True):
            masks = {
                frozenset(os.sched_getaffinity(int(thread.name)))
                for thread in Path(f"/proc/{pid}/task").iterdir()
            }
            assert masks == {frozenset(part.cpus or os.sched_getaffinity(0))}


@pytest.mark.slow
def test_a_bad_map_is_an_error_of_the_front() -> None:
    config = EngineConfig("fake", Layout(tp=2), bind="0:0,1:99")
    with pytest.raises(ConfigError, match="'1:99' names NUMA node 99"):
        RanksClient(config, start_timeout_s=60, program=[FAKE_RANK])


def rank_pids(agent_pid: int) -> list[int]:
    """The agent's children that are ranks, by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            environ = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((item[5:] for item in environ if item.startswith(b"RANK=")), None)
        if parent == agent_pid and rank is not None:
            found[int(rank)] = int(entry.name)
    return [found[rank] for rank in sorted(found)]
