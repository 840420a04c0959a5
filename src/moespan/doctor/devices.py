"""Checks of accelerators: health, memory, processes, and the NPUs' own network ports."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from moespan.device import DEVICES
from moespan.doctor import ascend_tools
from moespan.doctor.host import Host, Output, npu_smi
from moespan.doctor.job_spec import JobSpec
from moespan.doctor.report import Finding, ok, problem, skipped, warning
from moespan.machine.cann import parse_key_values
from moespan.machine.topology import format_list
from moespan.units import bytes_in_words

_IMPORT_S = 50.0
_BUSY_MB = 4096  # an idle 910B shows 3.1 to 3.5 GB in use

_IMPORT_SCRIPT = """
import json, torch
{extra}
module = getattr(torch, "{device}")
free, total = module.mem_get_info(0) if module.is_available() else (0, 0)
print(json.dumps([bool(module.is_available()), module.device_count(), free, total]))
"""


def devices(host: Host, job: JobSpec) -> Iterator[Finding]:
    if DEVICES[job.device].is_host:
        yield skipped("the job runs on CPUs")
        return
    if job.device == "npu":
        yield from _npus(host, job)
    if _can_ask_torch(host, job):
        yield _torch_sees(host, job)


def links(host: Host, job: JobSpec) -> Iterator[Finding]:
    """The NPUs' own network ports, which carry the traffic between servers."""
    if job.device != "npu":
        yield skipped("the job has no NPUs")
        return
    yield from _address_file(host, job)
    if host.ask("hccn_tool") is None:
        yield skipped(
            "hccn_tool was not found: in a container mount /usr/local/Ascend/driver/tools"
        )
        return
    smi = npu_smi(host)
    count = len(smi.npus) if smi and smi.npus else len(host.glob("/dev/davinci[0-9]*"))
    if not count:
        yield skipped("this machine has no NPUs")
        return
    ports = []
    for npu in range(count):
        port = _port(host, job, npu)
        if isinstance(port, Finding):
            yield port
            return
        ports.append(port)
    yield from _port_faults(ports, job)
    if all(port.is_usable for port in ports):
        tls = {"0": "off", "1": "on"}.get(ports[0].tls, "not known")
        yield ok(
            f"{count} RoCE links up, TLS {tls}, addresses {ports[0].address} to {ports[-1].address}"
        )
        if job.nodes.nnodes > 1:
            yield skipped(
                "whether they reach the NPUs of the other server was not tried: use hccn_tool -i N "
                "-ping -g address A, where A is an address of the other server; TLS must be the "
                "same there"
            )


@dataclass(frozen=True)
class _Port:
    """The state of an NPU's network port, by hccn_tool; an empty text is not known."""

    link: str
    tls: str
    health: str
    address: str

    @property
    def is_unwell(self) -> bool:
        return self.health.lower() not in ("", "success", "init")

    @property
    def is_usable(self) -> bool:
        return self.link != "DOWN" and not self.is_unwell and self.address != ""


def _link_fault(job: JobSpec, found: str, remedy: str) -> Finding:
    """A fault of the links, which a job on one server does without."""
    if job.nodes.nnodes > 1:
        return problem(found, remedy)
    return warning(f"{found} (needed between servers only)", remedy)


def _address_file(host: Host, job: JobSpec) -> Iterator[Finding]:
    configured = parse_key_values(host.read("/etc/hccn.conf"))
    addresses = Counter(value for key, value in configured.items() if key.startswith("address_"))
    doubled = sorted(address for address, times in addresses.items() if times > 1)
    if doubled:
        yield _link_fault(
            job,
            f"/etc/hccn.conf gives several NPUs the address {', '.join(doubled)}",
            "hccn_tool -i N -ip -s address A netmask M, with another A for each NPU",
        )


def _port(host: Host, job: JobSpec, npu: int) -> _Port | Finding:
    """The port of one NPU, or the finding that it does not answer."""
    texts = {}
    for query in ("link", "tls", "net_health", "ip"):
        answer = host.ask("hccn_tool", "-i", str(npu), f"-{query}", "-g")
        if answer is None or answer.code is None:
            return _link_fault(
                job,
                f"hccn_tool -i {npu} -{query} -g did not answer within {host.command_s:g} s",
                "the NPU's network firmware hangs: see dmesg",
            )
        texts[query] = answer.text
    return _Port(
        link=ascend_tools.parse_link(texts["link"]),
        tls=ascend_tools.parse_tls(texts["tls"]),
        health=ascend_tools.parse_net_health(texts["net_health"]),
        address=ascend_tools.parse_ip(texts["ip"])[0],
    )


def _port_faults(ports: list[_Port], job: JobSpec) -> Iterator[Finding]:
    down = [npu for npu, port in enumerate(ports) if port.link == "DOWN"]
    if down:
        yield _link_fault(
            job,
            f"the RoCE link of NPU {format_list(down)} is down",
            "check cable, transceiver and switch port: hccn_tool -i N -optical -g, -lldp -g",
        )
    unwell = [f"{npu}: {port.health}" for npu, port in enumerate(ports) if port.is_unwell]
    if unwell:
        yield _link_fault(
            job,
            f"the network health of NPUs is bad: {', '.join(unwell)}",
            "hccn_tool -i N -netdetect -g must show an address that answers: "
            "hccn_tool -i N -ping -g address A",
        )
    if len({port.tls for port in ports if port.tls}) > 1:
        yield _link_fault(
            job,
            f"TLS is on for some NPUs and off for others: {' '.join(port.tls for port in ports)}",
            "for i in 0 1 ...; do hccn_tool -i $i -tls -s enable 0; done, on every server",
        )
    nameless = [npu for npu, port in enumerate(ports) if not port.address]
    if nameless:
        yield _link_fault(
            job,
            f"NPU {format_list(nameless)} has no network address",
            "hccn_tool -i N -ip -s address A netmask M, with all NPUs of a server in one subnet",
        )


def _npus(host: Host, job: JobSpec) -> Iterator[Finding]:
    present = host.glob("/dev/davinci[0-9]*")
    managers = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
    missing = [path for path in managers if not host.exists(path)]
    if present and missing:
        yield problem(
            f"{len(present)} NPUs, but {', '.join(missing)} missing",
            "start the container with --device for each of them",
        )
    answer = host.ask("npu-smi", "info")
    if answer is None and not present:
        yield problem(
            "no NPU: neither /dev/davinci0 nor npu-smi was found",
            "load the driver; start the container with --device /dev/davinci0 and so on",
        )
        return
    if answer is None:
        yield warning(
            "npu-smi was not found, so the health and memory of the NPUs are not known",
            "in a container mount /usr/local/bin/npu-smi and /usr/local/dcmi",
        )
        return
    if answer.code is None:
        yield problem(
            f"npu-smi info did not answer within {host.command_s:g} s",
            "the driver hangs: see dmesg; reset the NPUs or reboot the server",
        )
        return
    report = ascend_tools.parse_npu_smi(answer.text)
    if not report.npus:
        first = next((line for line in answer.text.splitlines() if line.strip()), "nothing")
        held = "-8020" in answer.text or "device is used" in answer.text
        yield problem(
            f"npu-smi info shows no NPU: {first.strip()}",
            "another container holds the NPUs: end it, or give this container other NPUs"
            if held
            else "check that the driver is loaded: lsmod, dmesg",
        )
        return
    sick = [npu for npu in report.npus if npu.health.upper() != "OK"]
    for npu in sick:
        yield problem(
            f"NPU {npu.card} chip {npu.chip} ({npu.name}) has health {npu.health}",
            f"npu-smi info -t health -i {npu.card} shows the fault",
        )
    if len(report.npus) < job.ranks:
        yield problem(
            f"{len(report.npus)} NPUs for {job.ranks} ranks of this node",
            "use a smaller layout, or more nodes",
        )
    if report.processes:
        words = ", ".join(f"{one.card}: {one.name} ({one.pid})" for one in report.processes)
        yield warning(
            f"NPUs are in use: {words}",
            "end the processes of earlier jobs: they take memory, and their HCCL holds port 16666 "
            "of the NPU (EI0006, EJ0003)",
        )
    else:
        full = [npu for npu in report.npus if npu.used_mb > _BUSY_MB]
        if full:
            words = ", ".join(f"{npu.card}: {npu.used_mb} MB" for npu in full)
            yield warning(
                f"memory is in use by processes that are not visible from here: {words}",
                "look on the host: a container does not show the processes of others",
            )
    if not sick:
        totals = sorted({npu.total_mb for npu in report.npus})
        sizes = " or ".join(f"{total / 1024:g}" for total in totals)
        yield ok(f"{len(report.npus)} × {report.npus[0].name}, {sizes} GB, health OK")


def free_bytes(host: Host, job: JobSpec) -> int | None:
    """Free memory of the fullest NPU, else of the first device that torch sees; None if unknown."""
    if job.device == "npu" and (report := npu_smi(host)) and report.npus:
        return min(npu.total_mb - npu.used_mb for npu in report.npus) << 20
    if not _can_ask_torch(host, job):
        return None
    try:
        return int(json.loads(_ask_torch(host, job).text.strip().splitlines()[-1])[2]) or None
    except (ValueError, TypeError, IndexError):
        return None


def _can_ask_torch(host: Host, job: JobSpec) -> bool:
    return "torch" in host.packages and (job.device == "cuda" or "torch-npu" in host.packages)


def _ask_torch(host: Host, job: JobSpec) -> Output:
    extra = "import torch_npu" if job.device == "npu" else ""
    return host.python_says(_IMPORT_SCRIPT.format(extra=extra, device=job.device), _IMPORT_S)


def _torch_sees(host: Host, job: JobSpec) -> Finding:
    answer = _ask_torch(host, job)
    if answer.code is None:
        return problem(
            f"torch did not see its {job.device} devices within {_IMPORT_S:g} s",
            "the driver or another process blocks them: npu-smi info, dmesg",
        )
    lines = answer.text.strip().splitlines() or ["nothing"]
    try:
        available, count, free, total = json.loads(lines[-1])
    except (ValueError, TypeError):
        return problem(
            f"torch cannot be imported for {job.device}: {lines[-1]}",
            "source CANN's set_env.sh first, so that its libraries are found, and see the finding "
            "`torch_npu`"
            if job.device == "npu"
            else "install a torch that was built for this CUDA",
        )
    if not available or count < job.ranks:
        return problem(
            f"torch sees {count} {job.device} devices for {job.ranks} ranks of this node",
            "make more of them visible, or use a smaller layout",
        )
    return ok(
        f"torch sees {count} {job.device} devices, {bytes_in_words(free, 1)} of "
        f"{bytes_in_words(total, 1)} free on the first"
    )
