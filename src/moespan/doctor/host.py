"""The machine as the checks see it: files below a root, an environment, and programs to run.

A check learns everything through a `Host`, so that tests can examine made-up machines. Every wait
has a time limit.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import msgspec

from moespan.doctor import ascend_tools
from moespan.machine.interfaces import interfaces as own_interfaces

COMMAND_S = 10.0
"""Time limit for a program of the driver; a healthy one answers within two seconds."""

_REAP_S = 1.0

_DRIVER_TOOLS = "usr/local/Ascend/driver/tools"
_PACKAGES = (
    *("torch", "torch-npu", "pyyaml", "setuptools"),
    *("starlette", "uvicorn", "h11", "prometheus-client"),
)


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """The output and exit code of a program. `code` is None if it did not end in time."""

    code: int | None
    text: str


class Host:
    """One machine.

    Args:
        root: folder that contains /proc, /sys, /dev, /etc and /usr.
        environ: the environment; its PATH is searched for programs.
        allowed: CPUs of the affinity mask; None for the mask of this process.
        packages: versions of installed Python packages; None for those of this interpreter.
        interfaces: name and address of every network address; None for this machine's.
        python: the interpreter that imports torch, in a process of its own.
        architecture: as `uname -m` prints it; None for this machine's.
        command_s: time limit for a program, in seconds.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        environ: Mapping[str, str] | None = None,
        *,
        allowed: Collection[int] | None = None,
        packages: Mapping[str, str] | None = None,
        interfaces: Sequence[tuple[str, str]] | None = None,
        python: str = sys.executable,
        architecture: str | None = None,
        command_s: float = COMMAND_S,
    ) -> None:
        self.root = root
        self.environ = os.environ if environ is None else environ
        self.allowed = sorted(os.sched_getaffinity(0) if allowed is None else allowed)
        self.packages = _installed() if packages is None else packages
        self.interfaces = own_interfaces() if interfaces is None else interfaces
        self.python = python
        self.architecture = architecture or platform.machine()
        self.command_s = command_s
        self._answers: dict[tuple[str, ...], Output | None] = {}
        self._said: dict[str, Output] = {}

    def read(self, path: str) -> str:
        """The text of a file; empty if it cannot be read."""
        try:
            return (self.root / path.lstrip("/")).read_text(errors="replace").strip()
        except (OSError, ValueError):
            return ""

    def exists(self, path: str) -> bool:
        """Whether the file or folder exists."""
        return (self.root / path.lstrip("/")).exists()

    def glob(self, pattern: str) -> list[str]:
        """Paths that match `pattern`; `/` is the root of this host."""
        found = sorted(self.root.glob(pattern.lstrip("/")))
        return ["/" + str(path.relative_to(self.root)) for path in found]

    def ask(self, program: str, *arguments: str) -> Output | None:
        """The output of a program, which is run once only; None if it was not found."""
        question = (program, *arguments)
        if question not in self._answers:
            path = self._find(program)
            self._answers[question] = None if path is None else self._run([path, *arguments])
        return self._answers[question]

    def python_says(self, script: str, seconds: float) -> Output:
        """The output of a Python script, run once only.

        It has a process of its own, because imports may crash or hang.
        """
        if script not in self._said:
            self._said[script] = self._run([self.python, "-c", script], seconds)
        return self._said[script]

    def _find(self, program: str) -> str | None:
        path = self.environ.get("PATH", os.defpath)
        tools = str(self.root / _DRIVER_TOOLS)
        return shutil.which(program, path=f"{path}{os.pathsep}{tools}")

    def _run(self, argv: Sequence[str], seconds: float | None = None) -> Output:
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=dict(self.environ),
                start_new_session=True,
            )
        except OSError as error:
            return Output(code=127, text=str(error))
        try:
            text, _ = process.communicate(timeout=seconds or self.command_s)
            return Output(code=process.returncode, text=text)
        except subprocess.TimeoutExpired:
            # Kill the program and its children. A process that hangs in the driver survives even
            # SIGKILL, so the wait for its end is short.
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate(timeout=_REAP_S)
            return Output(code=None, text="")


def npu_smi(host: Host) -> ascend_tools.NpuReport | None:
    """The contents of `npu-smi info`; None if the program was not found."""
    answer = host.ask("npu-smi", "info")
    return None if answer is None else ascend_tools.parse_npu_smi(answer.text)


def _installed() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
