"""Checks of installed software: Python, torch, torch_npu, CANN, the driver; and of variables."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from moespan.doctor.host import Host, npu_smi
from moespan.doctor.job_spec import JobSpec
from moespan.doctor.report import Finding, ok, problem, skipped, warning
from moespan.doctor.variables import contradictions
from moespan.machine import cann as cann_versions
from moespan.machine.hccl import why_not_aiv
from moespan.machine.interfaces import GLOO_INTERFACE, wrong_interface
from moespan.machine.topology import npu_chip
from moespan.version import __version__

NEEDED_BY_TORCH_NPU = ("pyyaml", "setuptools")
"""Packages that torch_npu imports, but whose absence pip does not notice."""


def software(host: Host, job: JobSpec) -> Iterator[Finding]:
    version = sys.version_info
    torch = host.packages.get("torch", "")
    words = (
        f"Python {version.major}.{version.minor}.{version.micro}, torch {torch or 'missing'}, "
        f"moespan {__version__}, {host.architecture}"
    )
    if not torch:
        yield problem(words, "pip install torch, in the version that your torch_npu needs")
    elif not cann_versions.at_least(torch, cann_versions.LEAST_TORCH):
        yield problem(words, f"moespan needs torch {cann_versions.LEAST_TORCH} or later")
    elif not (3, 10) <= version[:2] < (3, 14):
        yield problem(words, "moespan needs Python 3.10 to 3.13")
    else:
        yield ok(words)


def torch_npu(host: Host, job: JobSpec) -> Iterator[Finding]:
    torch_npu, torch = host.packages.get("torch-npu"), host.packages.get("torch", "")
    if torch_npu is None:
        if job.device == "npu":
            yield problem(
                "torch-npu is not installed", "pip install torch-npu==VERSION: docs/ascend.md"
            )
        else:
            yield skipped("torch-npu is not installed, and the job does not need it")
        return
    base = cann_versions.release(torch_npu)
    if torch and cann_versions.release(torch) != base:
        yield problem(
            f"torch_npu {torch_npu} was built for torch {base}, but torch {torch} is installed",
            f"pip install torch=={base}",
        )
        return
    lacking = [name for name in NEEDED_BY_TORCH_NPU if name not in host.packages]
    if lacking:
        yield problem(
            f"torch_npu {torch_npu} imports {', '.join(lacking)}, which its wheel does not ask for",
            f"pip install {' '.join(lacking)}",
        )
        return
    cann, where = _installed_cann(host)
    verdict = cann_versions.judge(torch_npu, cann)
    words = verdict.found + (f" (found in {where})" if cann else "")
    if not verdict.is_supported:
        yield problem(words, verdict.fix)
    elif not verdict.is_listed:
        yield warning(words, verdict.fix)
    elif not cann:
        yield skipped(words)
    else:
        yield ok(f"{verdict.found}, with torch {torch}")


def cann(host: Host, job: JobSpec) -> Iterator[Finding]:
    home = host.environ.get("ASCEND_HOME_PATH")
    version, where = _installed_cann(host)
    if home and not host.exists(home):
        yield problem(
            f"ASCEND_HOME_PATH={home} does not exist, and torch_npu relies on it",
            "source set_env.sh of the installed CANN, or unset the variable",
        )
    elif not version:
        if job.device == "npu":
            yield problem(
                "no CANN below ASCEND_HOME_PATH or /usr/local/Ascend",
                "install CANN's toolkit and the kernels of your chip: docs/ascend.md",
            )
        else:
            yield skipped("no CANN here, and the job does not need it")
    elif not home:
        yield warning(
            f"CANN {version} in {where}, but ASCEND_HOME_PATH is not set",
            f"source {where}/set_env.sh before the start",
        )
    else:
        yield ok(f"CANN {version} in {where}")


def driver(host: Host, job: JobSpec) -> Iterator[Finding]:
    driver, firmware = (
        cann_versions.parse_key_values(host.read(f"/usr/local/Ascend/{part}/version.info")).get(
            "version"
        )
        for part in ("driver", "firmware")
    )
    smi = npu_smi(host)
    smi_version = smi.version if smi else ""
    if not driver and not smi_version:
        if job.device == "npu":
            yield problem(
                "no driver: neither /usr/local/Ascend/driver/version.info nor npu-smi",
                "install the driver; in a container mount both: docs/ascend.md",
            )
        else:
            yield skipped("no NPU driver here, and the job does not need it")
        return
    words = f"driver {driver or smi_version}, firmware {firmware or 'not readable here'}"
    if driver and smi_version and driver.lower() != smi_version.lower():
        yield warning(
            f"{words}, but npu-smi has version {smi_version}",
            "in a container mount version.info and npu-smi of the same host; on a host reinstall "
            "the driver",
        )
    else:
        yield ok(words)


def environment(host: Host, job: JobSpec) -> Iterator[Finding]:
    addresses = [address for _, address in host.interfaces]
    chip = npu_chip(host.root)
    nnodes = job.nodes.nnodes
    found = list(
        contradictions(host.environ, job.layout, nnodes, host.allowed, addresses, job.config, chip)
    )
    if wrong := wrong_interface(host.environ.get(GLOO_INTERFACE, ""), host.interfaces):
        found.append(warning(wrong, "unset it: moespan finds the interface itself"))
    table = host.environ.get("RANK_TABLE_FILE")
    if table is not None and not host.exists(table):
        found.append(
            problem(f"RANK_TABLE_FILE={table} does not exist", "unset it: moespan needs none")
        )
    yield from found or [ok("no variables contradict each other")]
    config, name = job.config, "HCCL_OP_EXPANSION_MODE"
    if config is None or job.device != "npu" or config.npu_aiv or name in host.environ:
        return
    if not why_not_aiv(config, chip, nnodes, host.environ)[0]:
        yield ok(
            f"{name}=AIV is not set; it may shorten decode steps of this layout: compare "
            "`moespan bench` with and without --npu-aiv"
        )


def _installed_cann(host: Host) -> tuple[str, str]:
    return cann_versions.installed_cann(host.environ, host.read, host.architecture)
