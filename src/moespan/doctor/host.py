"""The machine as the checks see it: files below a root, an environment, and programs to ask.

Everything that a check learns goes through a `Host`, so that made-up machines can be examined like
this one. Nothing here waits without a bound.
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
"""What a program of the driver may take to answer; a healthy one needs less than two seconds."""

_REAP_S = 1.0

_DRIVER_TOOLS = "usr/local/Ascend/driver/tools"
_PACKAGES = ("torch", "torch-npu")


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """What a program said. `code` is None if it did not answer in time."""

    code: int | None
    text: str


class Host:
    """One machine.

    Args:
        root: below which /proc, /sys, /dev, /etc and /usr are looked for.
        environ: the environment, in which PATH says where programs are.
        allowed: CPUs of the affinity mask; None for this process's.
        packages: versions of installed Python packages; None for those of this interpreter.
        interfaces: name and address of every network address; None for this machine's.
        python: the interpreter that imports torch for us.
        architecture: as `uname -m` says it; None for this machine's.
        command_s: most seconds to wait for a program.
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
        """Whether there is such a file or folder."""
        return (self.root / path.lstrip("/")).exists()

    def glob(self, pattern: str) -> list[str]:
        """Paths that match, as seen from the root."""
        found = sorted(self.root.glob(pattern.lstrip("/")))
        return ["/" + str(path.relative_to(self.root)) for path in found]

    def ask(self, program: str, *arguments: str) -> Output | None:
        """What a program answers, asked once; None if there is no such program."""
        question = (program, *arguments)
        if question not in self._answers:
            path = self._find(program)
            self._answers[question] = None if path is None else self._run([path, *arguments])
        return self._answers[question]

    def python_says(self, script: str, seconds: float) -> Output:
        """What a Python program, run once in a process of its own, prints: imports may crash, or
        hang."""
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
            # It and what it has started. One that hangs in the driver survives even this, so
            # nobody waits long for its end.
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate(timeout=_REAP_S)
            return Output(code=None, text="")


def npu_smi(host: Host) -> ascend_tools.NpuReport | None:
    """What `npu-smi info` says; None without it."""
    answer = host.ask("npu-smi", "info")
    return None if answer is None else ascend_tools.parse_npu_smi(answer.text)


def _installed() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
