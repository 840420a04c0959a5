"""Which cores, how many threads and which memory each rank of one machine gets.

`choose_binding` decides, as a pure function of a `Topology`; `binding_here` decides for this
machine; `apply` binds the calling process. Imports no torch: a rank must be bound before OpenMP
reads the process's affinity mask. The rules as a table: docs/numa.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import itertools
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from moespan.errors import ConfigError
from moespan.log import logger
from moespan.machine.cores import usable_cores
from moespan.machine.topology import Topology, ask_npu_smi, format_list, parse_list, read_topology

_Item = TypeVar("_Item")

# These variables bind threads to cores by number; our mask could exclude those cores.
_BINDS_ITSELF = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_NPU_BINDS_ITSELF = "CPU_AFFINITY_CONF"

_LEAST_BESIDE = 2  # an event loop, and the threads that encode beside it

_MPOL_DEFAULT, _MPOL_PREFERRED = 0, 1
_SYSCALLS = {
    "set_mempolicy": {"x86_64": 238, "aarch64": 237},
    "get_mempolicy": {"x86_64": 239, "aarch64": 236},
}
_MASK_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)


class RankBinding(msgspec.Struct, frozen=True, kw_only=True):
    """The cores, threads and memory of one rank. Without `cpus` its cores are not bound."""

    local_rank: int
    threads: int
    numa_nodes: list[int] = []
    cpus: list[int] = []
    memory_node: int | None = None

    def describe(self) -> str:
        """One line, as in `rank 3: NUMA 0, cores 12-15, 4 threads, memory preferred 0`."""
        words = ["cores not bound"]
        if self.cpus:
            words = [f"NUMA {format_list(self.numa_nodes)}", f"cores {format_list(self.cpus)}"]
        words.append(f"{self.threads} thread{'s' if self.threads > 1 else ''}")
        if self.memory_node is not None:
            words.append(f"memory preferred {self.memory_node}")
        return f"rank {self.local_rank}: {', '.join(words)}"


class Binding(msgspec.Struct, frozen=True, kw_only=True):
    """The bindings of all local ranks, and notes for the user about them."""

    ranks: list[RankBinding]
    notes: list[str] = []

    def describe(self) -> list[str]:
        """One line per rank, then the notes."""
        return [*(rank.describe() for rank in self.ranks), *self.notes]

    def summary(self) -> list[str]:
        """`describe`, but with all ranks in one line if they share one NUMA node."""
        nodes = {node for rank in self.ranks for node in rank.numa_nodes}
        if len(nodes) > 1 or any(rank.memory_node is not None for rank in self.ranks):
            return self.describe()
        parts = [
            f"rank {rank.local_rank}: {format_list(rank.cpus)}" for rank in self.ranks if rank.cpus
        ]
        return [line for line in (", ".join(parts), *self.notes) if line] or ["not bound"]


def binding_here(bind: str, device: str, ranks: int) -> Binding:
    """`choose_binding` for this machine and for ranks that inherit this process's cores.

    Args:
        bind: `auto`, `off`, or a map such as `0:0,1:0,2:1,3:1` (local rank : NUMA node).

    Raises:
        ConfigError: `bind` is none of these, or does not fit this machine.
    """
    topology = read_topology(
        Path("/"),
        device,
        os.sched_getaffinity(0),
        os.environ,
        npu_topology=ask_npu_smi() if device == "npu" and bind == "auto" else "",
    )
    topology = msgspec.structs.replace(
        topology, usable_cores=usable_cores(), memory_refusal=_memory_refusal()
    )
    return choose_binding(topology, ranks, bind, os.environ)


def choose_binding(
    topology: Topology, ranks: int, bind: str = "auto", environ: Mapping[str, str] | None = None
) -> Binding:
    """Divide the cores among `ranks` ranks, in disjoint parts; or bind none, with a note why.

    Args:
        environ: of the ranks; variables by which the user binds threads are respected.

    Raises:
        ConfigError: `bind` is not `auto`, `off`, or a map that fits this machine.
    """
    environ = environ or {}
    if bind not in ("auto", "off"):
        wanted = _read_map(bind, ranks, topology)
    else:
        known = topology.device_nodes[:ranks]
        wanted = known + [[]] * (ranks - len(known))
    num_cores = sum(len(cores) for cores in topology.cores.values())
    if bind == "off" or ranks > num_cores:
        only = f"{num_cores} core{'s' if num_cores > 1 else ''}"
        notes = [] if bind == "off" else [f"{ranks} ranks on {only}: not bound"]
        threads = _threads(environ, num_cores // ranks, topology, ranks)
        parts = [RankBinding(local_rank=rank, threads=threads) for rank in range(ranks)]
        return Binding(ranks=parts, notes=notes)

    notes = []
    if topology.device != "cpu" and len(topology.cores) > 1 and not all(wanted):
        notes.append(
            f"the NUMA node of each {topology.device} device is not known; "
            "--bind 0:NODE,1:NODE,... sets it by hand"
        )
    places = _assign({node: len(cores) for node, cores in topology.cores.items()}, wanted)
    notes += [
        f"rank {rank}: no core left on NUMA {format_list(near)}, the node of its device"
        for rank, (near, nodes) in enumerate(zip(wanted, places, strict=True))
        if near and not set(nodes) <= set(near)
    ]
    bound_by_user = [name for name in _BINDS_ITSELF if environ.get(name)]
    if topology.device == "npu" and environ.get(_NPU_BINDS_ITSELF):
        bound_by_user.append(_NPU_BINDS_ITSELF)
    if bound_by_user:
        notes.append(f"{bound_by_user[0]} is set and binds the cores: moespan does not")
    if topology.memory_refusal and len(topology.memory_nodes) > 1:
        notes.append(f"no memory node is preferred: {topology.memory_refusal}")

    parts = []
    for rank, (nodes, cores) in enumerate(zip(places, _deal(topology.cores, places), strict=True)):
        part = RankBinding(
            local_rank=rank,
            threads=_threads(environ, len(cores), topology, ranks),
            numa_nodes=nodes,
            cpus=[] if bound_by_user else sorted(cpu for core in cores for cpu in core),
            memory_node=_memory_node(topology, nodes),
        )
        parts.append(part)
    return Binding(ranks=parts, notes=notes)


def bind(part: RankBinding) -> None:
    """Bind this rank as far as this machine permits, and warn of what it refuses."""
    os.environ.setdefault("OMP_NUM_THREADS", str(part.threads))
    for problem in apply(part):
        logger.warning(problem)


def apply(part: RankBinding) -> list[str]:
    """Bind the calling process and the threads it starts later; returns what failed.

    Memory is preferred, not bound: with MPOL_BIND, which is `numactl --membind`, a rank dies when
    its node is full, even if other nodes have free memory.
    """
    problems = []
    if part.cpus:
        try:
            keep_to(part.cpus)
        except OSError as error:
            problems.append(f"cores {format_list(part.cpus)} not bound: {error.strerror}")
    if part.memory_node is not None:
        words = part.memory_node // _MASK_BITS + 1
        mask = (ctypes.c_ulong * words)()
        mask[words - 1] = 1 << part.memory_node % _MASK_BITS
        # The kernel reads one bit less than this number.
        failed = _call(
            "set_mempolicy", _MPOL_PREFERRED, mask, ctypes.c_ulong(words * _MASK_BITS + 1)
        )
        if failed:
            problems.append(f"memory of NUMA {part.memory_node} not preferred: {failed}")
    return problems


def keep_to(cpus: Collection[int]) -> None:
    """Let all threads of this process, and those that they start later, run on `cpus` only.

    Raises:
        OSError: the kernel refuses.
    """
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # the thread has ended
            os.sched_setaffinity(int(thread.name), cpus)


def cpus_beside(binding: Binding, allowed: Collection[int]) -> set[int]:
    """The CPUs of `allowed` that no rank is bound to, for a process that works beside the ranks;
    all of them if fewer than two are left."""
    left = set(allowed).difference(*(rank.cpus for rank in binding.ranks))
    return left if len(left) >= _LEAST_BESIDE else set(allowed)


def _read_map(text: str, ranks: int, topology: Topology) -> list[list[int]]:
    """The NUMA node of each rank. A map describes a machine: entries for more ranks are allowed."""
    fix = "write LOCAL_RANK:NUMA_NODE for every rank, as in 0:0,1:0,2:1,3:1, or use --bind auto"
    node_of: dict[int, int] = {}
    for entry in text.split(","):
        found = re.fullmatch(r"\s*(\d+):(\d+)\s*", entry)
        if not found:
            raise ConfigError(f"bind={text!r}: {entry!r} is not an entry; {fix}")
        rank, node = int(found[1]), int(found[2])
        if rank in node_of:
            raise ConfigError(f"bind={text!r}: {entry!r} names rank {rank} again; {fix}")
        if rank < ranks and node not in topology.cores:
            raise ConfigError(
                f"bind={text!r}: {entry!r} names NUMA node {node}, of which this process may use "
                f"no core; use one of {format_list(list(topology.cores))}"
            )
        node_of[rank] = node
    missing = [rank for rank in range(ranks) if rank not in node_of]
    if missing:
        raise ConfigError(f"bind={text!r} has no entry for rank {format_list(missing)}; {fix}")
    for node, count in Counter(node_of[rank] for rank in range(ranks)).items():
        if count > len(topology.cores[node]):
            raise ConfigError(
                f"bind={text!r} puts {count} ranks on NUMA node {node}, of which this process may "
                f"use {len(topology.cores[node])} cores; spread them, or use --bind off"
            )
    return [[node_of[rank]] for rank in range(ranks)]


def _assign(room: Mapping[int, int], wanted: Sequence[Sequence[int]]) -> list[list[int]]:
    """The NUMA nodes of each rank.

    A rank gets a node with a free core: one of those it wants, or any node if it wants none.
    Neighbouring ranks with the same wish get neighbouring nodes. If a group of ranks may use more
    nodes than it has ranks, each rank gets several whole nodes, so that no cores lie idle.

    Args:
        room: cores of each node; together at least as many as ranks.
        wanted: for each rank the nodes near its device; empty if it has none, or if not known.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, near in enumerate(wanted):
        usable = tuple(node for node in near if node in room)
        groups.setdefault(usable or tuple(room), []).append(rank)
    taken: Counter[int] = Counter()
    places: dict[int, list[int]] = {}
    for nodes, ranks in sorted(
        groups.items(), key=lambda group: len(group[0])
    ):  # the ranks with the fewest nodes to choose from come first
        chosen = []
        for _ in ranks:
            free = [node for node in nodes if taken[node] < room[node]]
            free = free or [node for node in room if taken[node] < room[node]]
            best = max(free, key=lambda node: (room[node] / (taken[node] + 1), -node))
            taken[best] += 1
            chosen.append(best)
        places.update({rank: [node] for rank, node in zip(ranks, sorted(chosen), strict=True)})
    for nodes, ranks in groups.items():
        own = {places[rank][0] for rank in ranks}
        if all(taken[node] == 1 for node in own):
            whole = sorted(own | {node for node in nodes if not taken[node]})
            taken.update(set(whole) - own)
            places.update(zip(ranks, _split(whole, len(ranks)), strict=True))
    return [places[rank] for rank in range(len(wanted))]


def _deal(
    cores: Mapping[int, list[list[int]]], places: Sequence[Sequence[int]]
) -> list[list[list[int]]]:
    """The cores of each rank: an equal part of each of its nodes."""
    dealt: list[list[list[int]]] = [[] for _ in places]
    for node, own in cores.items():
        ranks = [rank for rank, nodes in enumerate(places) if node in nodes]
        for rank, part in zip(ranks, _split(own, len(ranks)), strict=True):
            dealt[rank] += part
    return dealt


def _split(items: list[_Item], parts: int) -> list[list[_Item]]:
    """`items` in order, cut into parts whose lengths differ by one at most."""
    ends = [len(items) * part // parts for part in range(parts + 1)] if parts else [0]
    return [items[start:end] for start, end in itertools.pairwise(ends)]


def _threads(environ: Mapping[str, str], cores: int, topology: Topology, ranks: int) -> int:
    """OpenMP threads of a rank: the user's number, else one per core within the CPU quota."""
    users = parse_list(environ.get("OMP_NUM_THREADS", "").partition(",")[0])
    if users:
        return users[0]
    num_cpus = sum(len(core) for cores in topology.cores.values() for core in cores)
    if topology.usable_cores is not None and topology.usable_cores < num_cpus:
        cores = min(cores, topology.usable_cores // ranks)
    return max(1, cores)


def _memory_node(topology: Topology, nodes: Sequence[int]) -> int | None:
    """The node to prefer; None if there is no choice, or if the rank has several nodes.

    The memory of several nodes fills by first touch.
    """
    if topology.memory_refusal or len(topology.memory_nodes) < 2 or len(nodes) != 1:
        return None
    return nodes[0] if nodes[0] in topology.memory_nodes else None


def _memory_refusal() -> str:
    """Why the memory policy of this process must not be changed; empty if it may be."""
    mode = ctypes.c_int()
    failed = _call("get_mempolicy", ctypes.byref(mode), None, ctypes.c_ulong(0), None, 0)
    if failed:  # Docker allows none of these calls without CAP_SYS_NICE
        return f"the kernel refuses a memory policy ({failed})"
    return "" if mode.value == _MPOL_DEFAULT else "this process has a memory policy already"


def _call(name: str, *arguments: object) -> str:
    """Call libnuma, or without it the kernel; returns the error, empty on success."""
    function = _function(name)
    if function is None:
        return os.strerror(errno.ENOSYS)
    return os.strerror(ctypes.get_errno()) if function(*arguments) else ""


def _function(name: str) -> Callable[..., int] | None:
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL("libnuma.so.1", use_errno=True), name)
        return function
    except (OSError, AttributeError):
        number = _SYSCALLS[name].get(platform.machine())
    if number is None:
        return None
    return functools.partial(ctypes.CDLL(None, use_errno=True).syscall, ctypes.c_long(number))
