"""The list of checks, in the order of the report, and the time limit of each.

A check is a function of (host, job) that yields findings. An exception inside a check becomes a
finding, so that a broken tool spoils one line of the report only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import msgspec

from moespan.doctor import connections, devices, host_checks, serving, software
from moespan.doctor.host import Host
from moespan.doctor.job_spec import JobSpec
from moespan.doctor.report import Finding, skipped, warning

CHECK_S = 60.0
"""Time limit of one check, including all programs that it runs."""

Check = Callable[[Host, JobSpec], Iterable[Finding]]

CHECKS: dict[str, Check] = {
    "software": software.software,
    "torch_npu": software.torch_npu,
    "CANN": software.cann,
    "driver": software.driver,
    "devices": devices.devices,
    "RoCE links": devices.links,
    "ports": connections.ports,
    "network": connections.interfaces,
    "shared memory": host_checks.shared_memory,
    "limits": host_checks.limits,
    "cores": host_checks.cores,
    "host memory": host_checks.memory,
    "environment": software.environment,
    "model": host_checks.model,
    "serving": serving.serving,
}


def examine(host: Host, job: JobSpec, limit_s: float = CHECK_S) -> list[Finding]:
    """Run all checks, each for at most `limit_s`; the findings carry the names of their checks."""
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        found = _bounded(check, host, job, limit_s)
        findings += [msgspec.structs.replace(one, check=name) for one in found]
    return findings


def _bounded(check: Check, host: Host, job: JobSpec, limit_s: float) -> list[Finding]:
    results: list[list[Finding]] = []

    def run() -> None:
        try:
            results.append(list(check(host, job)))
        except Exception as error:
            results.append([skipped(f"the check failed: {type(error).__name__}: {error}")])

    # A daemon thread: a check that hangs in the kernel must not keep the program from ending.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    late = warning(
        f"no answer within {limit_s:g} s", "find out what hangs: dmesg, or the driver's tools"
    )
    return results[0] if results else [late]
