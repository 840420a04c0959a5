"""The doctor: each parser on recorded text, each check on made-up machines, good and bad."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from moespan.checkpoint.presets import preset
from moespan.cli import main
from moespan.config import EngineConfig, Layout, ModelConfig, Nodes
from moespan.doctor import ascend_tools, checks, collectives, nodes, report, serving
from moespan.doctor.checks import examine
from moespan.doctor.collectives import judge
from moespan.doctor.host import Host
from moespan.doctor.job_spec import JobSpec
from moespan.doctor.report import Finding
from moespan.doctor.variables import contradictions
from moespan.machine.cann import parse_key_values, parse_version_cfg
from moespan.measure.collectives import KINDS, WAITS, Timing, Wanted, measure
from moespan.parallel.counters import sent_bytes
from moespan.planner.memory import fit
from tests.support import QUICKSTART

MODEL = ModelConfig.from_dict(preset("16b", {}))

# Published by users of 910B3 servers; shortened to two NPUs.
SMI_910B = """\
+------------------------------------------------------------------------------------------------+
| npu-smi 25.0.rc1.1               Version: 25.0.rc1.1                                           |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 97.5        41                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3379 / 65536         |
+===========================+===============+====================================================+
| 1     910B3               | OK            | 93.9        40                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          3385 / 65536         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| No running processes found in NPU 0                                                            |
+===========================+===============+====================================================+
| No running processes found in NPU 1                                                            |
+===========================+===============+====================================================+
"""
# Published by users of 910C (A3) servers: two chips on a card, and one more column of processes.
SMI_910C = """\
+------------------------------------------------------------------------------------------------------------------+
| npu-smi 25.2.0                   Version: 25.2.0                                                                 |
+---------------------------+---------------+----------------------------------------------------------------------+
| NPU   Name                | Health        | Power(W)             Temp(C)                 Hugepages-Usage(page)   |
| Chip  Phy-ID              | Bus-Id        | AICore(%)            Memory-Usage(MB)        HBM-Usage(MB)           |
+===========================+===============+======================================================================+
| 7     Ascend910           | OK            | 178.5                36                      0    / 0                |
| 0     14                  | 0000:81:00.0  | 0                    0    / 0                31877/ 65536            |
+------------------------------------------------------------------------------------------------------------------+
| 7     Ascend910           | OK            | -                    35                      0    / 0                |
| 1     15                  | 0000:83:00.0  | 0                    0    / 0                31877/ 65536            |
+===========================+===============+======================================================================+
+---------------------------+---------------+----------------------------------------------------------------------+
| NPU     Chip              | Process id    | Process name       | Process memory(MB)    | Process id in container |
+===========================+===============+======================================================================+
| 7       0                 | 632268        | python3.1          | 197                   | NA                      |
+===========================+===============+======================================================================+
"""  # noqa: E501
# Published: a container whose NPUs another one holds.
SMI_HELD = """\
DrvMngGetConsoleLogLevel failed. (g_conLogLevel=3)
dcmi model initialized failed, because the device is used. ret is -8020
"""
# Published, of CANN 8.0.
TOOLKIT_INFO = """\
package_name=Ascend-cann-toolkit
version=8.5.0
innerversion=V100R001C20SPC001B251
arch=aarch64
os=linux
path=/usr/local/Ascend/ascend-toolkit/8.5.0/aarch64-linux
"""
# Written from the documented format, not recorded.
VERSION_CFG = """\
# version: 1.0
runtime_running_version=[7.7.0.1.238:8.3.RC1]
toolkit_running_version=[7.7.0.1.238:8.3.RC1]
toolkit_installed_version=[7.7.0.1.238:8.3.RC1]
"""
DRIVER_INFO = "Version=25.0.rc1.1\nascendhal_version=7.35.23\naicpu_version=1.0\n"
# Published.
TLS_OFF = (
    "dev_id:0, tls switch[0](0:disable, 1:enable), tls preconfigured[1](0:non-preset, 1:preset), "
    "tls alarm time threshold[60]days\n"
)
# Written from the documented format, not recorded.
LINK_UP, LINK_DOWN = "link status: UP\n", "link status: DOWN\n"
HEALTH_GOOD, HEALTH_BAD = "net health status: Success\n", "net health status: Receive timeout\n"
NETDETECT = "netdetect address: 192.168.100.1\n"
LLDP = "Chassis ID TLV\n\tMAC: 00:11\nSystem Name TLV\n\tswitch-7\nTime to Live TLV\n\t120\n"
LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max open files            {files}                524288               files
"""


def ip(number: int) -> str:
    return f"ipaddr:192.168.100.{number}\nnetmask:255.255.255.0\n"


# Parsers


def test_npu_smi_of_an_a2_server() -> None:
    read = ascend_tools.parse_npu_smi(SMI_910B)
    assert read.version == "25.0.rc1.1"
    assert [(npu.card, npu.name, npu.address) for npu in read.npus] == [
        (0, "910B3", "0000:C1:00.0"),
        (1, "910B3", "0000:C2:00.0"),
    ]
    assert {(npu.health, npu.total_mb) for npu in read.npus} == {("OK", 65536)}
    assert read.npus[1].used_mb == 3385
    assert read.processes == []


def test_npu_smi_of_an_a3_server_with_a_process() -> None:
    read = ascend_tools.parse_npu_smi(SMI_910C)
    assert [(npu.card, npu.chip, npu.used_mb) for npu in read.npus] == [
        (7, 0, 31877),
        (7, 1, 31877),
    ]
    (process,) = read.processes
    assert (process.card, process.pid, process.name, process.memory_mb) == (
        7,
        632268,
        "python3.1",
        197,
    )


def test_npu_smi_of_a_card_without_hbm() -> None:
    # Written from the documented format: 310P has a column of memory only.
    text = "| 0  310P3 | OK | NA 40 0 / 0 |\n| 0  0 | 0000:01:00.0 | 0  1856 / 44280 |\n"
    (npu,) = ascend_tools.parse_npu_smi(text).npus
    assert (npu.used_mb, npu.total_mb) == (1856, 44280)


@pytest.mark.parametrize(
    "text", ["", SMI_HELD, "| | |", "|x|y|z|", "| 1 2 | 3 |", "| 0 a | b | c |"]
)
def test_text_that_is_no_table_gives_no_npus(text: str) -> None:
    assert ascend_tools.parse_npu_smi(text).npus == []


def test_hccn_tool() -> None:
    assert ascend_tools.parse_link(LINK_UP) == "UP" and ascend_tools.parse_link(LINK_DOWN) == "DOWN"
    assert ascend_tools.parse_net_health(HEALTH_BAD) == "Receive timeout"
    assert ascend_tools.parse_netdetect(NETDETECT) == "192.168.100.1"
    assert ascend_tools.parse_ip(ip(101)) == ("192.168.100.101", "255.255.255.0")
    assert ascend_tools.parse_tls(TLS_OFF) == "0"
    assert ascend_tools.parse_lldp(LLDP) == "switch-7"
    for parse in (
        ascend_tools.parse_link,
        ascend_tools.parse_net_health,
        ascend_tools.parse_netdetect,
        ascend_tools.parse_tls,
        ascend_tools.parse_lldp,
    ):
        assert parse("hccn_tool: command failed") == ""
    assert ascend_tools.parse_ip("") == ("", "")


def test_version_files() -> None:
    assert parse_key_values(TOOLKIT_INFO)["version"] == "8.5.0"
    assert parse_key_values(DRIVER_INFO)["version"] == "25.0.rc1.1"
    assert parse_version_cfg(VERSION_CFG) == "8.3.RC1"
    assert parse_version_cfg("toolkit_running_version=[8.0.0]") == "8.0.0"
    assert parse_version_cfg("nothing") == ""


# A made-up machine


class Made:
    """A machine of files and fake programs; by default an A2 server with two healthy NPUs."""

    def __init__(self, root: Path, npus: int = 2) -> None:
        self.root = root
        self.bin = root / "bin"
        self.bin.mkdir()
        self.environ = {"PATH": str(self.bin), "ASCEND_HOME_PATH": "/usr/local/Ascend/cann"}
        self.packages = {
            "torch": "2.10.0+cpu",
            "torch-npu": "2.10.0.post4",
            "pyyaml": "6.0",
            "setuptools": "80.0",
        }
        self.interfaces = [("lo", "127.0.0.1"), ("eth0", "10.0.0.1"), ("eth1", "10.1.0.1")]
        self.npus = npus
        for name in ("davinci_manager", "devmm_svm", "hisi_hdc"):
            self.write(f"dev/{name}", "")
        for npu in range(npus):
            self.write(f"dev/davinci{npu}", "")
        self.cann("9.1.0")
        self.write("usr/local/Ascend/driver/version.info", DRIVER_INFO)
        self.write("usr/local/Ascend/firmware/version.info", "Version=7.7.0.1.231\n")
        self.write("proc/mounts", "shm /dev/shm tmpfs rw,nosuid,size=16777216k 0 0\n")
        self.write("proc/self/limits", LIMITS.format(files=65536))
        self.write("proc/meminfo", "MemTotal:       1056768000 kB\n")
        self.write("proc/sys/net/ipv4/ip_local_port_range", "32768\t60999\n")
        self.write("proc/sys/net/ipv4/ip_local_reserved_ports", "60000-60031\n")
        for node, cpus in ((0, "0-3"), (1, "4-7")):
            self.write(f"sys/devices/system/node/node{node}/cpulist", cpus)
        self.write("sys/devices/system/node/online", "0-1")
        self.write("sys/devices/system/node/has_memory", "0-1")
        self.program("npu-smi", {"info": SMI_910B, "info -t topo": TOPO})
        self.hccn()
        self.environ["HCCL_IF_BASE_PORT"] = str(_free_ports())
        first = int(self.environ["HCCL_IF_BASE_PORT"])
        self.write("proc/sys/net/ipv4/ip_local_reserved_ports", f"{first}-{first + 31}\n")
        self.python("[true, 2, 60000000000, 65000000000]")

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def cann(self, version: str) -> None:
        text = TOOLKIT_INFO.replace("8.5.0", version)
        self.write("usr/local/Ascend/cann/aarch64-linux/ascend_toolkit_install.info", text)

    def remove(self, path: str) -> None:
        (self.root / path).unlink()

    def program(self, name: str, answers: dict[str, str], default: str = "") -> None:
        """A program whose output depends on its arguments."""
        cases = "".join(
            f"  {arguments!r}) cat <<'END'\n{text}END\n  ;;\n"
            for arguments, text in {**answers}.items()
        )
        self.script(name, f'case "$*" in\n{cases}  *) echo {default!r}; exit 1;;\nesac\n')

    def script(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{body}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def python(self, says: str) -> None:
        self.script("python", f"echo '{says}'\n")

    def hccn(self, **changes: dict[int, str]) -> None:
        """`hccn_tool` of healthy NPUs, except for `changes`: query → NPU → output."""
        answers = {}
        for npu in range(self.npus):
            good = {
                "link": LINK_UP,
                "tls": TLS_OFF,
                "net_health": HEALTH_GOOD,
                "ip": ip(101 + npu),
            }
            for query, text in good.items():
                answer = changes.get(query, {}).get(npu, text)
                answers[f"-i {npu} -{query} -g"] = answer
        self.program("hccn_tool", answers)

    def host(self, **settings: Any) -> Host:
        return Host(
            self.root,
            self.environ,
            allowed=range(8),
            packages=self.packages,
            interfaces=self.interfaces,
            python=str(self.bin / "python"),
            architecture="aarch64",
            **{"command_s": 5.0, **settings},
        )

    def examine(self, job: JobSpec | None = None, **settings: Any) -> list[Finding]:
        return examine(self.host(**settings), job or npu_job())


TOPO = """\
\t   NPU0       NPU1       CPU Affinity
NPU0       X          HCCS       0-3
NPU1       HCCS       X          4-7
"""


def npu_job(layout: Layout | None = None, **settings: Any) -> JobSpec:
    return JobSpec(device="npu", layout=layout or Layout(tp=2), **settings)


def two_nodes(node_rank: int = 1, master_addr: str = "10.0.0.1", port: int = 29500) -> Nodes:
    return Nodes(nnodes=2, node_rank=node_rank, master_addr=master_addr, master_port=port)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening


def _free_ports() -> int:
    """The first of 32 free ports outside the range that the kernel hands out."""
    for first in range(20000, 32000, 32):
        try:
            for port in range(first, first + 32):
                with socket.socket() as one:
                    one.bind(("", port))
            return first
        except OSError:
            continue
    raise AssertionError("no free ports")


def of(findings: list[Finding], check: str, status: str | None = None) -> list[Finding]:
    return [
        one for one in findings if one.check == check and (status is None or one.status == status)
    ]


def only(findings: list[Finding], check: str, status: str) -> Finding:
    found = of(findings, check)
    assert [one.status for one in found] == [status], found
    assert bool(found[0].fix) == (status in (report.WARNING, report.PROBLEM))
    return found[0]


# All checks together


def test_a_healthy_server_has_no_warning_and_no_problem(made: Made) -> None:
    findings = made.examine(npu_job(model=MODEL, config=config_of(Layout(tp=2))))
    bad = [one for one in findings if one.status in (report.WARNING, report.PROBLEM)]
    assert bad == []
    assert {one.check for one in findings} == set(checks.CHECKS)
    for check, words in (
        ("torch_npu", "torch_npu 2.10.0.post4 and CANN 9.1.0, with torch 2.10.0+cpu"),
        ("driver", "driver 25.0.rc1.1, firmware 7.7.0.1.231"),
        ("devices", "2 × 910B3, 64 GB"),
        ("RoCE links", "2 RoCE links up, TLS off, addresses 192.168.100.101 to 192.168.100.102"),
        ("cores", "rank 0: NUMA 0, cores 0-3"),
        ("model", "full sequences"),
    ):
        assert any(words in one.found for one in of(findings, check)), of(findings, check)


def test_an_empty_machine_is_fine_for_cpus(tmp_path: Path) -> None:
    host = Host(tmp_path, {"PATH": ""}, packages={"torch": "2.13.0"}, interfaces=[])
    findings = examine(host, JobSpec(device="cpu"))
    assert not [one for one in findings if one.status == report.PROBLEM]
    assert only(findings, "devices", report.SKIPPED).found


def test_an_empty_machine_has_every_problem_for_npus(tmp_path: Path) -> None:
    host = Host(tmp_path, {"PATH": ""}, packages={}, interfaces=[])
    findings = examine(host, npu_job())
    for check in ("software", "torch_npu", "CANN", "driver", "devices"):
        only(findings, check, report.PROBLEM)


def test_a_check_that_raises_spoils_its_own_finding_only(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> list[Finding]:
        raise ValueError("odd")

    monkeypatch.setitem(checks.CHECKS, "limits", broken)
    findings = made.examine()
    assert "ValueError: odd" in only(findings, "limits", report.SKIPPED).found
    assert only(findings, "shared memory", report.OK)


def test_a_check_that_hangs_is_abandoned(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(*_: object) -> list[Finding]:
        time.sleep(60)
        return []

    monkeypatch.setattr(checks, "CHECKS", {"limits": hangs})
    started = time.monotonic()
    (finding,) = examine(made.host(), npu_job(), limit_s=0.2)
    assert time.monotonic() - started < 5
    assert finding.status == report.WARNING and "0.2 s" in finding.found


@pytest.mark.parametrize("tool", ["npu-smi", "hccn_tool"])
def test_a_program_that_hangs_costs_its_time_limit_only(made: Made, tool: str) -> None:
    # If only the shell were killed, its child would keep the pipe open.
    made.script(tool, "sleep 100\n")
    started = time.monotonic()
    findings = made.examine(command_s=0.5)
    assert time.monotonic() - started < 15
    check = "devices" if tool == "npu-smi" else "RoCE links"
    assert any("did not answer within 0.5 s" in one.found for one in of(findings, check))


# Software


@pytest.mark.parametrize(
    ("packages", "status", "words"),
    [
        ({}, "problem", "not installed"),
        ({"torch": "2.8.0", "torch-npu": "2.9.0"}, "problem", "built for torch 2.9.0"),
        ({"torch": "2.8.0", "torch-npu": "2.8.0.post4"}, "problem", "needs CANN 9.0.0, not 9.1.0"),
        ({"torch": "2.9.0", "torch-npu": "2.9.0"}, "problem", "not in the compatibility table"),
        ({"torch": "2.13.0", "torch-npu": "2.13.0"}, "warning", "newer than the compatibility"),
        ({"torch": "2.9.0", "torch-npu": "2.9.0.post8"}, "ok", "CANN 9.1.0"),
    ],
)
def test_torch_npu_is_compared_with_the_table(
    made: Made, packages: dict[str, str], status: str, words: str
) -> None:
    made.packages = {"pyyaml": "6.0", "setuptools": "80.0", **packages}
    assert words in only(made.examine(), "torch_npu", status).found


def test_packages_that_torch_npu_imports_are_missing(made: Made) -> None:
    del made.packages["pyyaml"]
    finding = only(made.examine(), "torch_npu", report.PROBLEM)
    assert "imports pyyaml" in finding.found and finding.fix == "pip install pyyaml"


@pytest.mark.parametrize("version", ["8.3.RC1", "8.5.0", "8.5.2"])
def test_a_cann_that_cannot_run_moespan(made: Made, version: str) -> None:
    made.cann(version)
    finding = only(made.examine(), "torch_npu", report.PROBLEM)
    assert f"CANN {version} is not supported" in finding.found and "CANN 9.1.0" in finding.fix


def test_cann_in_its_old_folder_without_set_env(made: Made) -> None:
    made.remove("usr/local/Ascend/cann/aarch64-linux/ascend_toolkit_install.info")
    made.write("usr/local/Ascend/ascend-toolkit/latest/version.cfg", VERSION_CFG)
    del made.environ["ASCEND_HOME_PATH"]
    findings = made.examine()
    finding = only(findings, "CANN", report.WARNING)
    assert "8.3.RC1" in finding.found and "set_env.sh" in finding.fix
    assert "CANN 8.3.RC1 is not supported" in only(findings, "torch_npu", report.PROBLEM).found


def test_a_home_of_cann_that_does_not_exist(made: Made) -> None:
    made.environ["ASCEND_HOME_PATH"] = "/opt/none"
    assert "does not exist" in only(made.examine(), "CANN", report.PROBLEM).found


def test_a_cann_that_is_newer_than_the_table(made: Made) -> None:
    made.cann("9.2.0")
    finding = only(made.examine(), "torch_npu", report.WARNING)
    assert "CANN 9.2.0 is newer than the compatibility table" in finding.found


def test_driver_and_npu_smi_of_different_hosts(made: Made) -> None:
    made.write("usr/local/Ascend/driver/version.info", "Version=24.1.0\n")
    assert "npu-smi has version 25.0.rc1.1" in only(made.examine(), "driver", report.WARNING).found


def test_old_torch_and_missing_torch(made: Made) -> None:
    made.packages = {"torch": "2.1.0"}
    assert only(made.examine(), "software", report.PROBLEM)
    made.packages = {}
    assert "missing" in only(made.examine(), "software", report.PROBLEM).found


# Devices


def test_npus_that_another_container_holds(made: Made) -> None:
    made.program("npu-smi", {"info": SMI_HELD})
    (finding,) = of(made.examine(), "devices", report.PROBLEM)
    assert "-8020" not in finding.fix and "another container" in finding.fix


def test_a_sick_npu_and_too_few_of_them(made: Made) -> None:
    made.program("npu-smi", {"info": SMI_910B.replace("| OK   ", "| Alarm", 1)})
    found = of(made.examine(npu_job(Layout(tp=8))), "devices", report.PROBLEM)
    words = " / ".join(one.found for one in found)
    assert "NPU 0 chip 0 (910B3) has health Alarm" in words
    assert "2 NPUs for 8 ranks" in words


def test_npus_in_use(made: Made) -> None:
    made.program("npu-smi", {"info": SMI_910C})
    (finding,) = of(made.examine(), "devices", report.WARNING)
    assert "7: python3.1 (632268)" in finding.found and "16666" in finding.fix
    made.program("npu-smi", {"info": SMI_910B.replace("3379 / 65536", "31000 / 65536")})
    (finding,) = of(made.examine(), "devices", report.WARNING)
    assert "0: 31000 MB" in finding.found


def test_a_container_without_the_managers_devices(made: Made) -> None:
    made.remove("dev/devmm_svm")
    (finding,) = of(made.examine(), "devices", report.PROBLEM)
    assert "/dev/devmm_svm" in finding.found


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ("ImportError: libascendcl.so: cannot open shared object file", "libascendcl"),
        ("[false, 0, 0, 0]", "sees 0 npu devices"),
        ("[true, 1, 5, 5]", "sees 1 npu devices for 2 ranks"),
        ("", "nothing"),
    ],
)
def test_torch_does_not_see_the_devices(made: Made, says: str, words: str) -> None:
    made.python(says)
    found = of(made.examine(), "devices", report.PROBLEM)
    assert [words in one.found for one in found] == [True]


# Links


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"link": {1: LINK_DOWN}}, "link of NPU 1 is down"),
        ({"net_health": {0: HEALTH_BAD}}, "0: Receive timeout"),
        ({"tls": {1: TLS_OFF.replace("switch[0]", "switch[1]")}}, "TLS is on for some"),
        ({"ip": {0: ""}}, "NPU 0 has no network address"),
    ],
)
def test_links_are_a_problem_between_servers_and_a_warning_on_one(
    made: Made, changes: dict[str, dict[int, str]], words: str
) -> None:
    made.hccn(**changes)
    (finding,) = of(made.examine(), "RoCE links", report.WARNING)
    assert words in finding.found
    (finding,) = of(made.examine(npu_job(nodes=two_nodes())), "RoCE links", report.PROBLEM)
    assert words in finding.found


def test_two_npus_with_one_address(made: Made) -> None:
    made.write("etc/hccn.conf", "address_0=192.168.100.101\naddress_1=192.168.100.101\n")
    assert "192.168.100.101" in of(made.examine(), "RoCE links", report.WARNING)[0].found


# Connections


def test_hccls_ports(made: Made) -> None:
    first = int(made.environ["HCCL_IF_BASE_PORT"])
    assert only(made.examine(), "ports", report.OK)
    with socket.socket() as taken:
        taken.bind(("", first + 3))
        taken.listen()
        finding = only(made.examine(), "ports", report.PROBLEM)
    assert f": {first + 3} in use" in finding.found
    made.write("proc/sys/net/ipv4/ip_local_port_range", f"{first} 65000")
    made.write("proc/sys/net/ipv4/ip_local_reserved_ports", "")
    fix = only(made.examine(), "ports", report.WARNING).fix
    assert fix == f"sysctl -w net.ipv4.ip_local_reserved_ports={first}-{first + 31}"
    made.environ["HCCL_IF_BASE_PORT"] = "70000"
    assert only(made.examine(), "ports", report.PROBLEM)


def test_the_master_port_on_node_0(made: Made, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    job = JobSpec("cpu", Layout(tp=2), nodes=two_nodes(0, "127.0.0.1", port))
    assert "in use" in only(made.examine(job), "ports", report.PROBLEM).found
    job = JobSpec("cpu", Layout(tp=2), nodes=two_nodes(0, "192.0.2.1", port))
    assert "address of node 0" in only(made.examine(job), "ports", report.PROBLEM).fix


def test_the_master_port_from_another_node(made: Made, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    job = JobSpec("cpu", Layout(tp=2), nodes=two_nodes(1, "127.0.0.1", port))
    assert "answers" in only(made.examine(job), "ports", report.OK).found
    listener.close()
    assert "no job is started" in only(made.examine(job), "ports", report.OK).found


def test_the_interface_that_leads_to_the_other_nodes(made: Made) -> None:
    job = npu_job(nodes=two_nodes(0, "10.1.0.1"))
    finding = only(made.examine(job), "network", report.OK)
    assert finding.found.startswith("eth1 10.1.0.1 leads to the other nodes")
    assert "HCCL would take eth0" in finding.found
    job = npu_job(nodes=two_nodes(0, "127.0.0.1"))
    assert "this machine itself" in only(made.examine(job), "network", report.PROBLEM).found


# The host


def test_shared_memory(made: Made) -> None:
    made.write("proc/mounts", "shm /dev/shm tmpfs rw,nosuid,size=65536k 0 0\n")
    finding = only(made.examine(), "shared memory", report.WARNING)
    assert "67.11 MB" in finding.found and "--shm-size" in finding.fix
    made.write("proc/mounts", "tmpfs /dev/shm tmpfs rw,nosuid 0 0\n")
    assert "541.07 GB" in only(made.examine(), "shared memory", report.OK).found
    made.write("proc/mounts", "")
    assert only(made.examine(), "shared memory", report.WARNING)


def test_open_files_and_huge_pages(made: Made) -> None:
    made.write("proc/self/limits", LIMITS.format(files=1024))
    assert "1024" in only(made.examine(), "limits", report.WARNING).found
    made.write("proc/self/limits", LIMITS.format(files=65536))
    made.environ["PYTORCH_NPU_ALLOC_CONF"] = "page_size:1g"
    assert of(made.examine(), "limits", report.WARNING)
    made.write("sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages", "4\n")
    assert only(made.examine(), "limits", report.OK)


def test_a_server_needs_its_extra_its_port_and_files(made: Made) -> None:
    assert "starlette" in only(made.examine(), "serving", report.SKIPPED).found
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        job = replace(npu_job(), port=port)
        lacking, busy = of(made.examine(job), "serving", report.PROBLEM)
        assert "uvicorn" in lacking.found and "pip install '.[serve]'" in lacking.fix
        assert f"port {port} is in use" in busy.found
    made.packages |= dict.fromkeys(serving.EXTRA, "1.0")
    made.write("proc/self/limits", LIMITS.format(files=4096))
    findings = of(made.examine(job), "serving")
    assert [one.status for one in findings] == [report.OK, report.OK, report.WARNING]
    assert f"port {port} is free" in findings[1].found and "4096" in findings[2].found


@pytest.mark.parametrize("port", ["70000", "-1"])
def test_a_port_that_cannot_be_is_refused(port: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--port", port])
    assert ended.value.code == 2 and f"--port {port} must be within" in caplog.text


def test_cores_and_quota(made: Made) -> None:
    made.write("sys/fs/cgroup/cpu.max", "200000 100000")
    made.write("proc/self/cgroup", "0::/\n")
    finding = only(made.examine(), "cores", report.WARNING)
    assert "quota leaves 2" in finding.found and "4 cores or more" in finding.fix
    finding = only(made.examine(npu_job(bind="0:9")), "cores", report.PROBLEM)
    assert "NUMA" in finding.found


def test_npus_of_unknown_nodes(made: Made) -> None:
    made.program("npu-smi", {"info": SMI_910B})
    finding = only(made.examine(), "cores", report.WARNING)
    assert "not known" in finding.found


def test_host_tuning(made: Made) -> None:
    made.write("proc/sys/kernel/numa_balancing", "1")
    made.write("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "powersave")
    fixes = {one.fix for one in of(made.examine(), "cores", report.WARNING)}
    assert fixes == {
        "sysctl -w kernel.numa_balancing=0",
        "cpupower frequency-set -g performance",
    }


def test_memory_of_the_container(made: Made) -> None:
    made.write("sys/fs/cgroup/memory.max", "64000000000")
    assert "may use 64.0" in only(made.examine(), "host memory", report.OK).found


def test_the_tightest_limit_of_all_groups_counts(made: Made) -> None:
    made.write("proc/self/cgroup", "0::/slurm/job\n")
    made.write("sys/fs/cgroup/slurm/job/memory.max", "max")
    made.write("sys/fs/cgroup/slurm/memory.max", "32000000000")
    assert "may use 32.0" in only(made.examine(), "host memory", report.OK).found
    made.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "16000000000")  # v1
    assert "may use 16.0" in only(made.examine(), "host memory", report.OK).found


# The model


def config_of(layout: Layout, device: str = "npu", **settings: Any) -> EngineConfig:
    return EngineConfig("unused", layout, device, **settings)


def test_the_16b_model_on_npus_of_64_gb(made: Made) -> None:
    job = npu_job(Layout(), model=MODEL, config=config_of(Layout()))
    finding = only(made.examine(job), "model", report.OK)
    assert "32.76 GB of weights" in finding.found and "224 KiB" in finding.found
    tp2 = npu_job(Layout(tp=2), model=MODEL, config=config_of(Layout(tp=2)))
    assert "52.43 MB of communicators" in only(made.examine(tp2), "model", report.OK).found


def test_a_model_that_does_not_fit(made: Made) -> None:
    made.program("npu-smi", {"info": SMI_910B.replace("65536", "32768")})
    job = npu_job(Layout(), model=MODEL, config=config_of(Layout()))
    finding = only(made.examine(job), "model", report.PROBLEM)
    assert "0 tokens of cache remain, but one sequence may have 4096" in finding.found
    made.program("npu-smi", {"info": SMI_910B.replace("65536", "38500")})
    assert only(made.examine(job), "model", report.WARNING)


def test_unknown_device_memory_is_not_guessed(made: Made) -> None:
    (made.bin / "npu-smi").unlink()
    job = npu_job(model=MODEL, config=config_of(Layout(tp=2)))
    assert "of 60.0 GB" in only(made.examine(job), "model", report.OK).found  # from torch
    made.python("ImportError")
    assert "not known here" in only(made.examine(job), "model", report.SKIPPED).found
    assert only(made.examine(), "model", report.SKIPPED).found == "no MODEL named"


def test_the_fullest_rank_decides() -> None:
    one = fit(config_of(Layout()), MODEL, 64 << 30)
    staged = fit(config_of(Layout(pp=2)), MODEL, 64 << 30)
    whole, half = one.memory.weight_bytes, staged.memory.weight_bytes
    assert whole / 2 < half < whole
    assert not one.has_communicators
    assert not fit(config_of(Layout(tp=2), "cpu"), MODEL, 1).has_communicators


# Variables that contradict each other


GOOD_ENVIRONMENTS: list[dict[str, str]] = [
    {},
    {"HCCL_EVENT_TIMEOUT": "600", "HCCL_EXEC_TIMEOUT": "500"},
    {"HCCL_EVENT_TIMEOUT": "0", "HCCL_EXEC_TIMEOUT": "500"},
    {"HCCL_EVENT_TIMEOUT": "100"},
    {"HCCL_IF_IP": "10.0.0.1", "HCCL_CONNECT_TIMEOUT": "120", "HCCL_BUFFSIZE": "120"},
    {"CPU_AFFINITY_CONF": "1,npu0:0-3", "HCCL_WHITELIST_DISABLE": "1"},
    {"CPU_AFFINITY_CONF": "1,force:1,npu0:64-67"},
    {"ASCEND_RT_VISIBLE_DEVICES": "0,1", "HCCL_OP_EXPANSION_MODE": "AIV"},
    {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True", "TASK_QUEUE_ENABLE": "2"},
    {"RANK": "0", "WORLD_SIZE": ""},
    {"RANK": "", "WORLD_SIZE": "8"},
]
BAD_ENVIRONMENTS: list[tuple[dict[str, str], str, str]] = [
    ({"PYTORCH_NPU_ALLOC_CONF": "a", "PYTORCH_ALLOC_CONF": "b"}, "problem", "both set"),
    ({"HCCL_EVENT_TIMEOUT": "500", "HCCL_EXEC_TIMEOUT": "500"}, "problem", "not longer"),
    ({"HCCL_EVENT_TIMEOUT": "400", "HCCL_EXEC_TIMEOUT": "500"}, "problem", "not longer"),
    ({"HCCL_EXEC_TIMEOUT": "1836"}, "warning", "torch's watchdog"),
    ({"HCCL_EXEC_TIMEOUT": "0"}, "warning", "torch's watchdog"),
    ({"HCCL_CONNECT_TIMEOUT": "60"}, "problem", "120 to 7200"),
    ({"HCCL_CONNECT_TIMEOUT": "long"}, "problem", "120 to 7200"),
    ({"HCCL_BUFFSIZE": "0"}, "problem", "number of MB"),
    ({"HCCL_INTRA_ROCE_ENABLE": "1", "HCCL_INTRA_PCIE_ENABLE": "1"}, "problem", "both 1"),
    ({"HCCL_WHITELIST_DISABLE": "0"}, "problem", "whitelist"),
    ({"HCCL_IF_IP": "10.9.9.9"}, "problem", "not an address of this machine"),
    ({"HCCL_IF_IP": "nonsense"}, "problem", "not an address of this machine"),
    ({"HCCL_IF_IP": "10.0.0.1", "HCCL_SOCKET_IFNAME": "eth0"}, "warning", "HCCL_IF_IP wins"),
    ({"ASCEND_LAUNCH_BLOCKING": "1"}, "warning", "graph"),
    ({"CPU_AFFINITY_CONF": "2,npu0:0-3,npu1:64-67"}, "warning", "64-67"),
    ({"ASCEND_RT_VISIBLE_DEVICES": "3"}, "problem", "fewer NPUs"),
    ({"ASCEND_RT_VISIBLE_DEVICES": ""}, "problem", "fewer NPUs"),
    ({"RANK": "0", "WORLD_SIZE": "8"}, "warning", "torchrun"),
    ({"RANK": "0", "WORLD_SIZE": "many"}, "warning", "torchrun"),
    ({"HCCL_OP_EXPANSION_MODE": "AIV", "HCCL_DETERMINISTIC": "true"}, "warning", "wins"),
]


def contradict(
    environ: dict[str, str], layout: Layout | None = None, nnodes: int = 1
) -> list[Finding]:
    return list(
        contradictions(environ, layout or Layout(tp=2), nnodes, range(8), ["127.0.0.1", "10.0.0.1"])
    )


@pytest.mark.parametrize("environ", GOOD_ENVIRONMENTS)
def test_good_environments(environ: dict[str, str]) -> None:
    assert contradict(environ) == []


@pytest.mark.parametrize(("environ", "status", "words"), BAD_ENVIRONMENTS)
def test_bad_environments(environ: dict[str, str], status: str, words: str) -> None:
    (finding,) = contradict(environ)
    assert finding.status == status and words in finding.found and finding.fix


def test_aiv_that_the_layout_forbids() -> None:
    aiv = {"HCCL_OP_EXPANSION_MODE": "AIV"}
    assert "tp, pp" in contradict(aiv, Layout(tp=2, pp=2))[0].found
    assert "several nodes" in contradict(aiv, Layout(tp=2), nnodes=2)[0].found


def test_aiv_beside_what_it_is_reported_to_hang_with() -> None:
    def said(config: EngineConfig, chip: str) -> list[str]:
        aiv = {"HCCL_OP_EXPANSION_MODE": "AIV"}
        found = contradictions(aiv, config.layout, 1, range(8), ["127.0.0.1"], config, chip)
        return [one.found for one in found]

    layout = Layout(tp=2)
    assert said(config_of(layout), "910B") == []
    assert "910C" in said(config_of(layout), "910C")[0]
    assert said(config_of(layout, enforce_eager=True), "910C") == []
    fused = config_of(layout, npu_fused_all_reduce=9)
    assert "vector cores" in said(fused, "910B")[0]


def test_aiv_is_suggested_where_it_is_allowed(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def suggested(chip: str = "910B", **options: Any) -> bool:
        monkeypatch.setattr("moespan.doctor.software.npu_chip", lambda root: chip)
        layout = options.pop("layout", Layout(tp=2))
        config = config_of(layout, **options)
        findings = made.examine(npu_job(layout, model=MODEL, config=config))
        return any("--npu-aiv" in one.found for one in of(findings, "environment", report.OK))

    assert suggested()
    assert not suggested("910C")
    assert not suggested(npu_aiv=True)
    assert not suggested(layout=Layout(pp=2))


def test_a_rank_table_that_does_not_exist(made: Made) -> None:
    made.environ["RANK_TABLE_FILE"] = "/etc/none.json"
    assert "none.json" in only(made.examine(), "environment", report.PROBLEM).found


# Collectives


def timing(ranks: int, gb_per_s: float) -> Timing:
    return Timing(
        axis="tp",
        ranks=ranks,
        message_bytes=64 << 20,
        median_s=0.001,
        bus_bytes_per_s=gb_per_s * 1e9,
    )


def test_collectives_are_compared_with_published_rates_on_npus_only() -> None:
    assert judge([timing(8, 70)], "npu").status == report.OK
    slow = judge([timing(8, 20)], "npu")
    assert slow.status == report.WARNING and "72 GB/s" in slow.found
    assert judge([timing(8, 20)], "cpu").status == report.OK
    assert judge([timing(3, 1)], "npu").status == report.OK


def test_a_collective_in_one_shot_is_marked() -> None:
    short = msgspec.structs.replace(timing(8, 70), message_bytes=8 << 10, one_shot=True)
    found = judge([short, timing(8, 70)], "cuda").found
    assert "8 KB 1000 µs (70.00 GB/s, one shot), 64 MB 1000 µs (70.00 GB/s)" in found


@pytest.mark.slow
def test_collectives_of_real_ranks() -> None:
    sizes, plans = (4 << 10, 64 << 10), (256, 20_000)
    wanted = Wanted(kinds=KINDS, message_bytes=sizes, plans_bytes=plans, clock="cpu", waits=True)
    timings = measure(config_of(Layout(tp=2, pp=2), "cpu"), wanted)
    *found, first, second, result = [one for one in timings if one.axis != WAITS]
    waits = [one for one in timings if one.axis == WAITS]
    assert [(one.kind, one.ranks) for one in waits] == [(kind, 2) for kind in KINDS]
    assert [(one.axis, one.kind, one.message_bytes) for one in found] == [
        (axis, kind, size) for axis in ("tp", "pp") for kind in KINDS for size in (4096, 65536)
    ]
    for one in found:
        sent = sent_bytes(one.kind, 2, one.message_bytes)
        assert one.bus_bytes_per_s == pytest.approx(sent / one.median_s)
        assert 0 < one.p10_s <= one.median_s <= one.p90_s
    assert [(one.axis, one.ranks) for one in (first, second, result)] == [("control", 4)] * 3
    assert result.kind == "send" and result.median_s > 0


def test_collectives_without_an_axis_or_with_nodes() -> None:
    for layout, nnodes in ((Layout(), 1), (Layout(tp=2), 2)):
        (finding,) = collectives.findings(config_of(layout, "cpu"), nnodes)
        assert finding.status == report.SKIPPED and finding.check == "collectives"


@pytest.mark.slow
def test_ranks_that_fail_are_a_problem() -> None:
    broken = config_of(Layout(tp=2), "cpu", bind="0:99,1:99")
    (finding,) = collectives.findings(broken)
    assert finding.status == report.PROBLEM and "NUMA node 99" in finding.found


# The verb

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def doctor(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as exit_:
            main(["doctor", *map(str, arguments)])
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, capsys.readouterr().out

    return doctor


def test_json_and_exit_codes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out = run(QUICKSTART, "-tp", 2, "--device", "cpu", "--json")
    printed = json.loads(out)
    assert code == (1 if printed["counts"]["problem"] else 0)
    assert printed["device"] == "cpu" and printed["layout"] == "tp=2"
    assert set(printed["counts"]) == {"ok", "warning", "problem", "skipped"}
    assert all(set(one) == {"check", "status", "found", "fix"} for one in printed["findings"])
    monkeypatch.setenv("HCCL_BUFFSIZE", "none")
    code, out = run("--device", "cpu")
    assert code == 1 and "problem  environment" in out and "→ unset it" in out


def test_the_doctor_checks_a_node_other_than_the_first(run: Run, listener: Any) -> None:
    port = listener.getsockname()[1]
    _, out = run(
        *("-tp", 2, "--device", "cpu", "--nnodes", 2, "--node-rank", 1),
        *("--master-addr", "127.0.0.1", "--master-port", port, "--json"),
    )
    assert of([Finding(**one) for one in json.loads(out)["findings"]], "ports", report.OK)


def test_print_env_starts_nothing(run: Run) -> None:
    code, out = run(QUICKSTART, "--device", "npu", "-tp", 4, "-pp", 2, "--print-env")
    assert code == 0
    assert re.search(r"^HCCL_CONNECT_TIMEOUT +600 +moespan", out, re.M)
    assert re.search(r"^P2P_HCCL_BUFFSIZE +2 +moespan", out, re.M)


def test_the_doctor_needs_no_torch() -> None:
    script = (
        "import sys\nfrom moespan.doctor import checks, collectives\n"
        "assert 'torch' not in sys.modules"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", script]) == 0


def compared(master_port: int, skew_s: float = 0.0) -> list[list[Finding]]:
    """The reports of both nodes, with node 1's clock ahead by `skew_s`."""
    places = [
        Nodes(nnodes=2, node_rank=node, master_port=master_port, join_timeout_s=10)
        for node in range(2)
    ]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(nodes.findings, places[0])
        second = pool.submit(nodes.findings, places[1], lambda: time.time() + skew_s)
        return [first.result(), second.result()]


def test_nodes_with_the_same_code_and_clock(free_port: int):
    first, second = compared(free_port)
    assert first == second
    assert [one.status for one in first] == ["ok"]
    assert "2 nodes with moespan" in first[0].found


@pytest.mark.parametrize(("skew_s", "words"), [(7.0, "7.0 s ahead of"), (-90.0, "90.0 s behind")])
def test_nodes_with_different_clocks(free_port: int, skew_s: float, words: str):
    first, second = compared(free_port, skew_s)
    assert first == second
    assert [one.status for one in first] == ["warning"]
    assert words in first[0].found and "NTP" in first[0].fix


def test_nodes_with_different_code():
    everyone = [
        nodes.NodeFacts(node=0, source="aa"),
        nodes.NodeFacts(node=1, source="bb", address="10.0.0.2"),
    ]
    (finding,) = nodes.judge(everyone, 2)
    assert finding.status == "problem"
    assert "node 1 (10.0.0.2)" in finding.found and "bb" in finding.found
    (finding,) = nodes.judge([everyone[0]], 3)
    assert "node 1, 2 of 3 did not connect" in finding.found


def test_a_node_alone_reports_the_missing_node(free_port: int):
    (finding,) = nodes.findings(
        Nodes(nnodes=2, node_rank=1, master_port=free_port, join_timeout_s=0.1)
    )
    assert finding.status == "problem" and "nothing was compared" in finding.found
    (finding,) = nodes.findings(
        Nodes(nnodes=2, node_rank=0, master_port=free_port, join_timeout_s=0.1)
    )
    assert "node 1 of 2 did not connect" in finding.found


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
