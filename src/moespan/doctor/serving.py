"""Checks for a server: the libraries of its extra, its port, and files for its connections."""

from __future__ import annotations

from collections.abc import Iterator

from moespan.doctor.connections import is_free
from moespan.doctor.host import Host
from moespan.doctor.host_checks import open_files
from moespan.doctor.job_spec import JobSpec
from moespan.doctor.report import Finding, ok, problem, skipped, warning
from moespan.errors import install_hint

EXTRA = ("starlette", "uvicorn", "h11", "prometheus-client")
"""Packages of the extra `serve`."""

_LEAST_FILES = 8192  # 4096 connections, and everything else


def serving(host: Host, job: JobSpec) -> Iterator[Finding]:
    missing = ", ".join(name for name in EXTRA if name not in host.packages)
    if missing and job.port is None:
        yield skipped(f"no server here: {missing} missing ({install_hint('serve')})")
        return
    if missing:
        yield problem(f"moespan serve needs {missing}", install_hint("serve"))
    else:
        yield ok(", ".join(f"{name} {host.packages[name]}" for name in EXTRA))
    if job.port is None:
        return
    if is_free(job.port):
        yield ok(f"port {job.port} is free")
    else:
        yield problem(
            f"port {job.port} is in use, or needs rights that this user does not have",
            "end the process that listens there (ss -ltnp), or serve on another port",
        )
    files = open_files(host)
    if files is not None and files < _LEAST_FILES:
        yield warning(
            f"{files} open files for a process, and each connection is one",
            "ulimit -n 65536, or LimitNOFILE= of the unit",
        )
