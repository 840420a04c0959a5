"""Builds the kernels of `kernels/` once for this machine's processor, and loads them with ctypes.

At first use the C++ compiler named by `CXX`, or `c++`, builds the library. The library goes to
`$MOESPAN_CACHE`, or `$XDG_CACHE_HOME/moespan`, or `~/.cache/moespan`. Its name depends on source,
compiler and processor, so that machines can share the folder. A build fails after 300 s.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_FOLDER = Path(__file__).with_name("kernels")
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w"]
_BUILD_TIMEOUT_S = 300


class BuildError(Exception):
    """The kernels cannot be built here; the text says why, and what would help."""


def library(*flags: str) -> ctypes.CDLL:
    """Load the library, and build it first if needed.

    Torch must have been imported before: the library uses its OpenMP.

    Args:
        flags: further compiler flags, such as `-march=x86-64-v3` for an older processor.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    command = [_compiler(), *_FLAGS, *flags]
    path = _path(command)
    if not path.exists():
        _build(path, command)
    _check_owner(path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(
            f"{path} does not load ({error}); delete it, so that it is built again"
        ) from None


def _compiler() -> str:
    wanted = os.environ.get("CXX", "c++")
    found = shutil.which(wanted)
    if found is None:
        raise BuildError(f"there is no C++ compiler {wanted!r}; install g++, or set CXX")
    return found


def _path(command: list[str]) -> Path:
    base = os.environ.get("MOESPAN_CACHE")
    if base is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        base = str(Path(home, "moespan"))
    settings = [os.path.realpath(command[0]), *command[1:], _processor()]
    made_of = [file.read_bytes() for file in sorted(_FOLDER.iterdir())]
    made_of += [setting.encode() for setting in settings]
    digest = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    return Path(base, f"kernels-{platform.machine()}-{digest}.so")


def _processor() -> str:
    """The lines of /proc/cpuinfo on which `-march=native` depends."""
    names = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.split("\t")[0].strip() in names)


def _build(path: Path, command: list[str]) -> None:
    """Build the library at `path`. Among ranks that start together, one builds and others wait."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise BuildError(f"{path.parent} cannot be written ({error}); set MOESPAN_CACHE") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            out = Path(folder, path.name)
            command = [*command, "-o", str(out), str(_FOLDER / "kernels.cpp")]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise BuildError(f"{' '.join(command)}: {error}") from None
            if done.returncode:
                lines = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
                raise BuildError(f"{' '.join(command)}: {lines[0]}")
            out.chmod(0o755)
            out.replace(path)


def _check_owner(path: Path) -> None:
    """Refuse a library that another user owns or could have written."""
    status = path.stat()
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022:
        raise BuildError(
            f"{path} belongs to another user, or others may write it; delete it, or set "
            "MOESPAN_CACHE to a folder of your own"
        )
