"""Checks of the host: cores, memory, shared memory, limits; and of the model's size."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from moespan.cgroups import memory_limit_bytes
from moespan.device import DEVICES
from moespan.doctor.devices import free_bytes
from moespan.doctor.host import Host
from moespan.doctor.job_spec import JobSpec
from moespan.doctor.report import Finding, ok, problem, skipped, warning
from moespan.errors import ConfigError, MoespanError
from moespan.machine.binding import choose_binding
from moespan.machine.cores import usable_cores
from moespan.machine.topology import read_topology
from moespan.planner.memory import Fit, fit
from moespan.units import bytes_in_words

_LEAST_SHM_BYTES = 1 << 30
_LEAST_FILES = 4096


def shared_memory(host: Host, job: JobSpec) -> Iterator[Finding]:
    mounts = (line.split() for line in host.read("/proc/mounts").splitlines())
    options = next(
        (mount[3] for mount in mounts if len(mount) > 3 and mount[1] == "/dev/shm"), None
    )
    if options is None:
        yield warning("/dev/shm is not mounted", "mount a tmpfs there; containers: --shm-size=16g")
        return
    size = next((part[5:] for part in options.split(",") if part.startswith("size=")), "")
    total = _meminfo_bytes(host) // 2 if not size else _bytes(size)
    words = f"/dev/shm has {bytes_in_words(total)}"
    if total < _LEAST_SHM_BYTES and job.layout.world_size > 1 and not DEVICES[job.device].is_host:
        yield warning(words, "start the container with --shm-size=16g or --ipc=host")
    else:
        yield ok(words)


def open_files(host: Host) -> float | None:
    """Most files that a process of this user may open; None if that cannot be read."""
    for line in host.read("/proc/self/limits").splitlines():
        if line.startswith("Max open"):
            for word in line.split():
                if word.isdigit():
                    return int(word)
                if word == "unlimited":
                    return math.inf
    return None


def limits(host: Host, job: JobSpec) -> Iterator[Finding]:
    files = open_files(host)
    if files is None:
        yield skipped("/proc/self/limits cannot be read")
    elif files < _LEAST_FILES:
        yield warning(
            f"{files} open files for a process", "ulimit -n 65536, or --ulimit nofile=65536"
        )
    else:
        yield ok(f"{'any number of' if files == math.inf else files} open files for a process")
    if "page_size:1g" in host.environ.get("PYTORCH_NPU_ALLOC_CONF", ""):
        pages = host.read("/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages")
        if not pages.isdigit() or int(pages) == 0:
            yield warning(
                "PYTORCH_NPU_ALLOC_CONF asks for pages of 1 GB, and the host has none free",
                "remove page_size:1g if allocation fails",
            )


def cores(host: Host, job: JobSpec) -> Iterator[Finding]:
    """Cores, CPU quota, and the binding of ranks to cores."""
    topology_says = ""
    if job.device == "npu" and job.bind == "auto":
        answer = host.ask("npu-smi", "info", "-t", "topo")
        topology_says = answer.text if answer is not None else ""
    topology = read_topology(host.root, job.device, host.allowed, host.environ, topology_says)
    quota = usable_cores(host.root, host.allowed)
    topology = msgspec.structs.replace(topology, usable_cores=quota)
    try:
        binding = choose_binding(topology, job.ranks, job.bind, host.environ)
    except ConfigError as error:
        yield problem(str(error), "see docs/numa.md")
        return
    words = "; ".join(binding.summary() if job.ranks > 1 else binding.notes)
    cpus = len(host.allowed)
    nodes = len(topology.cores)
    head = f"{cpus} CPUs in {nodes} NUMA node{'s' if nodes > 1 else ''}"
    if quota < cpus:
        head += f", of which the container's quota leaves {quota}"
    head += f": {words}" if words else ""
    least = DEVICES[job.device].host_cores_per_rank
    if quota < least * job.ranks:
        yield warning(
            head,
            f"give {job.ranks} ranks {least * job.ranks} cores or more: --cpus, --cpuset-cpus"
            + (", since a rank on an NPU launches kernels in a second thread" * (least > 1)),
        )
    elif binding.notes:
        yield warning(head, "see docs/numa.md; --bind 0:NODE,1:NODE,... sets it by hand")
    else:
        yield ok(head)
    if not DEVICES[job.device].is_host:
        yield from _host_tuning(host, nodes)


def memory(host: Host, job: JobSpec) -> Iterator[Finding]:
    total = _meminfo_bytes(host)
    limit = memory_limit_bytes(host.root)
    if limit is not None and limit < total:
        yield ok(
            f"{bytes_in_words(total, 1)} on the host, of which the container may use "
            f"{bytes_in_words(limit, 1)}"
        )
    elif total:
        yield ok(f"{bytes_in_words(total, 1)} on the host")
    else:
        yield skipped("/proc/meminfo cannot be read")


def model(host: Host, job: JobSpec) -> Iterator[Finding]:
    if job.config is None or job.model is None:
        yield skipped("no MODEL named")
        return
    try:
        fits = fit(job.config, job.model, _device_bytes(host, job))
    except MoespanError as error:
        yield problem(str(error), "use another layout")
        return
    yield _fit_finding(fits, job)


def _host_tuning(host: Host, nodes: int) -> Iterator[Finding]:
    if nodes > 1 and host.read("/proc/sys/kernel/numa_balancing") == "1":
        yield warning(
            "the kernel moves pages between NUMA nodes by itself, which slows some steps",
            "sysctl -w kernel.numa_balancing=0",
        )
    governor = host.read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor and governor != "performance":
        yield warning(
            f"the CPU frequency governor is {governor}, which slows the launch of kernels",
            "cpupower frequency-set -g performance",
        )


def _fit_finding(fits: Fit, job: JobSpec) -> Finding:
    parts = fits.memory
    communicators = f", {bytes_in_words(parts.communicator_bytes)} of communicators"
    words = (
        f"{job.layout}, per rank: {bytes_in_words(parts.weight_bytes)} of weights"
        + f", {bytes_in_words(parts.activation_bytes + parts.graph_bytes)} for steps"
        + communicators * fits.has_communicators
        + f", {fits.cache_bytes_per_token / 1024:g} KiB of KV cache a token"
    )
    if fits.room_bytes is None:
        return skipped(f"{words}; the memory of a device is not known here")
    words += f"; of {bytes_in_words(fits.room_bytes, 1)}"
    if fits.cache_tokens < fits.sequence_tokens:
        return problem(
            f"{words} {max(fits.cache_tokens, 0)} tokens of cache remain, but one sequence "
            f"may have {fits.sequence_tokens}",
            "use more ranks (-tp, -pp; -ep for experts), or a smaller --max-model-len",
        )
    sequences = fits.cache_tokens // fits.sequence_tokens
    words += f" {fits.cache_tokens} tokens of cache remain: {sequences} full sequences"
    if sequences < 4:
        return warning(
            words,
            "long requests will preempt each other: use more ranks, or a smaller --max-model-len",
        )
    return ok(words)


def _device_bytes(host: Host, job: JobSpec) -> int | None:
    """Memory available to one rank; None if it is not known."""
    if DEVICES[job.device].is_host:
        limit = memory_limit_bytes(host.root)
        total = _meminfo_bytes(host)
        return min(total, limit or total) // job.ranks if total else None
    return free_bytes(host, job)


def _meminfo_bytes(host: Host) -> int:
    for line in host.read("/proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def _bytes(size: str) -> int:
    units = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
    unit = units.get(size[-1:].lower(), 1)
    digits = size.rstrip("kKmMgG")
    return int(digits) * unit if digits.isdigit() else 0
