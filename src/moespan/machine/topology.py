"""Cores and NUMA nodes that a process may use, and the NUMA nodes near each device.

Everything is read from files below a root, so that tests can read recorded machines. Only
`ask_npu_smi` runs a program. Imports no torch.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import msgspec

_NPU_VENDOR = "0x19e5"
_ACCELERATOR_CLASS = "0x1200"  # Huawei's network cards have the same vendor
_NPU_CHIPS = {"0xd802": "910B", "0xd803": "910C", "0xd801": "910", "0xd500": "310P"}


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """The part of one machine that this process may use.

    Attributes:
        cores: for each NUMA node its cores; a core is the list of its CPUs (SMT siblings).
        memory_nodes: NUMA nodes with memory.
        device: `cpu`, `cuda` or `npu`.
        device_nodes: NUMA nodes near each device, in the order of local ranks; an empty list if
            they are not known.
        usable_cores: number of CPUs within the CPU quotas; None without a quota.
        memory_refusal: why no memory node can be preferred; empty if one can.
    """

    cores: dict[int, list[list[int]]]
    memory_nodes: list[int]
    device: str = "cpu"
    device_nodes: list[list[int]] = []
    usable_cores: int | None = None
    memory_refusal: str = ""


def read_topology(
    root: Path,
    device: str,
    allowed: Collection[int],
    environ: Mapping[str, str],
    npu_topology: str = "",
) -> Topology:
    """The topology that /sys, /proc and /dev below `root` show.

    Args:
        root: `/`, or the folder of a recorded machine.
        allowed: CPUs of the affinity mask; the kernel keeps the mask inside the cgroup's cpuset.
        environ: of the ranks; its variables select the devices visible to them.
        npu_topology: output of `npu-smi info -t topo`; empty without it.
    """
    system = root / "sys/devices/system"
    online = parse_list(_read(system / "node/online"))
    node_cpus = {node: parse_list(_read(system / f"node/node{node}/cpulist")) for node in online}
    if not any(cpu in allowed for cpus in node_cpus.values() for cpu in cpus):
        node_cpus = {0: sorted(allowed)}  # a kernel without NUMA
    cores = {
        node: _group_siblings(system, [cpu for cpu in cpus if cpu in allowed])
        for node, cpus in node_cpus.items()
        if any(cpu in allowed for cpu in cpus)
    }
    memory_nodes = parse_list(_read(system / "node/has_memory"))
    found = re.search(r"^Mems_allowed_list:\s*(\S+)", _read(root / "proc/self/status"), re.M)
    if found:
        memory_nodes = [node for node in memory_nodes if node in parse_list(found[1])]

    device_nodes: list[list[int]] = []
    if device == "npu":
        near = {
            npu: [node for node, own in node_cpus.items() if not set(own).isdisjoint(cpus)]
            for npu, cpus in parse_npu_topology(npu_topology).items()
        }
        device_nodes = _select(
            environ.get("ASCEND_RT_VISIBLE_DEVICES"), _npus(root, near or _npu_nodes(root))
        )
    elif device == "cuda":
        device_nodes = _select(environ.get("CUDA_VISIBLE_DEVICES"), _gpus(root))
    return Topology(
        cores=cores,
        memory_nodes=memory_nodes,
        device=device,
        device_nodes=device_nodes,
    )


def parse_npu_topology(text: str) -> dict[int, list[int]]:
    """For each NPU the CPUs in the column `CPU Affinity` of `npu-smi info -t topo`.

    Without that column the result is empty.

    ```
               NPU0       NPU1       CPU Affinity
    NPU0       X          HCCS       144-167
    NPU1       HCCS       X          0-23
    ```
    """
    lines = [line.split() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    header = next((words for words in lines if {"CPU", "Affinity"} <= set(words)), None)
    if header is None:
        return {}
    column = header.index("CPU") + 1  # each row starts with a name, which the header lacks
    rows = [words for words in lines if len(words) > column and words[0] in header]
    found = {}
    for words in rows:
        number, cpus = re.sub(r"\D", "", words[0]), parse_list(words[column])
        if number and cpus:
            found[int(number)] = cpus
    return found


def parse_list(text: str) -> list[int]:
    """The numbers in the kernel's list format, such as `0-3,8`; [] if `text` is not in it."""
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not found:
            return []
        numbers += range(int(found[1]), int(found[2] or found[1]) + 1)
    return numbers


def format_list(numbers: Sequence[int]) -> str:
    """The kernel's list format: `0-3,8`."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def _group_siblings(system: Path, cpus: list[int]) -> list[list[int]]:
    cores: dict[str, list[int]] = {}
    for cpu in cpus:
        siblings = _read(system / f"cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(siblings or str(cpu), []).append(cpu)
    return list(cores.values())


def npu_chip(root: Path) -> str:
    """The NPU of this machine by PCI: `910B` (A2), `910C` (A3), ...; empty if none is known."""
    for path in _npu_devices(root):
        if (name := _NPU_CHIPS.get(_read(path / "device"))) is not None:
            return name
    return ""


def _npus(root: Path, near: Mapping[int, list[int]]) -> dict[str, list[int]]:
    """`near` with the numbers that programs use: the device files here, counted from 0."""
    files = [path.name.removeprefix("davinci") for path in (root / "dev").glob("davinci*")]
    present = sorted(int(name) for name in files if name.isdigit()) or sorted(near)
    return {str(index): near.get(npu, []) for index, npu in enumerate(present)}


def _npu_nodes(root: Path) -> dict[int, list[int]]:
    """NUMA nodes of each NPU, by its PCI device.

    The driver's file `dev_id` has the NPU's number, but may be readable for root only. The order of
    PCI addresses is no substitute: on a 910B server NPU 0 was seen at c1:00.0, NPU 4 at 01:00.0.
    Without the numbers, the nodes are known only if all NPUs have the same ones.
    """
    devices = _npu_devices(root)
    nodes = [parse_list(_read(path / "numa_node")) for path in devices]  # -1 means unknown: []
    numbers = [_read(path / "dev_id") for path in devices]
    if devices and all(number.isdigit() for number in numbers):
        return {int(number): node for number, node in zip(numbers, nodes, strict=True)}
    return dict(enumerate(nodes)) if all(node == nodes[0] for node in nodes) else {}


def _npu_devices(root: Path) -> list[Path]:
    return [
        path
        for path in sorted((root / "sys/bus/pci/devices").glob("*"))
        if _read(path / "vendor") == _NPU_VENDOR
        and _read(path / "class").startswith(_ACCELERATOR_CLASS)
    ]


def _gpus(root: Path) -> dict[str, list[int]]:
    """NUMA nodes of NVIDIA's GPUs, by index and by UUID.

    CUDA numbers equal GPUs by PCI address, even without CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    found: dict[str, list[int]] = {}
    index = 0
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*")):
        information = dict(
            line.split(":", 1) for line in _read(path / "information").splitlines() if ":" in line
        )
        if not (root / f"dev/nvidia{information.get('Device Minor', '').strip()}").exists():
            continue  # a GPU of another container
        numa_node = root / "sys/bus/pci/devices" / path.name.lower() / "numa_node"
        nodes = parse_list(_read(numa_node))
        found[str(index)] = found[information.get("GPU UUID", "").strip()] = nodes
        index += 1
    return found


def _select(visible: str | None, devices: Mapping[str, list[int]]) -> list[list[int]]:
    """The NUMA nodes of local rank 0, 1, ...: of all devices in order, or of those in `visible`."""
    if visible is None:
        return [nodes for name, nodes in devices.items() if name.isdigit()]
    return [devices.get(name.strip(), []) for name in visible.split(",")]


def ask_npu_smi() -> str:
    """Output of `npu-smi info -t topo`; empty if the program is missing or takes over 20 s."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            ["npu-smi", "info", "-t", "topo"], capture_output=True, text=True, timeout=20
        ).stdout
    return ""


def _read(path: Path) -> str:
    """The text of a file, stripped; empty if it cannot be read."""
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
