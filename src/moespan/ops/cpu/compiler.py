"""Builds the kernels of `kernels/` once for this machine's processor, and loads them with ctypes.

At first use the C++ compiler named by `CXX`, or `c++`, builds the library. `CXX` may have arguments
(`ccache g++`, `g++ -m64`). The library goes to moespan's cache folder (`moespan.cache_folder`). Its
name depends on source, compiler and processor, so that machines can share the folder. A build fails
after `MOESPAN_BUILD_TIMEOUT` seconds (300), which an emulated or busy processor may need more of.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moespan.cache_folder import CacheError, cache_path
from moespan.errors import shortened, shown
from moespan.ops.cpu.kernel_cache import KernelCache

_FOLDER = Path(__file__).with_name("kernels")
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-pthread", "-fPIC", "-shared", "-w"]
_BUILD_TIMEOUT_S = 300.0
_MOST_TIMEOUT_S = 86400.0


class BuildError(CacheError):
    """The kernels cannot be built here; the text says why, and what would help."""


def library(*flags: str) -> ctypes.CDLL:
    """Load the library, and build it first if it is missing or damaged.

    Among ranks that start together, one builds and the others wait.

    Args:
        flags: further compiler flags, such as `-march=x86-64-v3` for an older processor.

    Raises:
        BuildError: there is no compiler, or it fails.
        CacheError: the cache folder cannot be used.
    """
    command = _command(flags)
    name = _name(command)
    timeout_s = _timeout_s()
    with KernelCache(cache_path()) as cache:
        loaded = cache.load(f"{name}.so")
        if loaded is not None:
            return loaded
        with cache.locked(f"{name}.lock", timeout_s):
            loaded = cache.load(f"{name}.so")
            if loaded is None:
                cache.store(f"{name}.so", _build(command, timeout_s))
                loaded = cache.load(f"{name}.so")
    if loaded is None:
        raise BuildError(f"{cache.path} does not keep what is written to it; set MOESPAN_CACHE")
    return loaded


def library_name(*flags: str) -> str:
    """What `library` loads, by a name that depends on source, compiler, flags and processor."""
    return _name(_command(flags))


def _command(flags: Sequence[str]) -> list[str]:
    return [*_compiler(), *_FLAGS, *flags]


def _compiler() -> list[str]:
    """The compiler's path and the arguments that `CXX` gives it."""
    wanted = os.environ.get("CXX", "").strip() or "c++"
    found = shutil.which(wanted)  # a path may have spaces
    if found is not None:
        return [found]
    try:
        program, *arguments = shlex.split(wanted)
    except ValueError as error:
        raise BuildError(f"CXX={wanted!r} cannot be split into words: {error}") from None
    found = shutil.which(program)
    if found is None:
        raise BuildError(f"there is no C++ compiler {program!r}; install g++, or set CXX")
    return [found, *arguments]


def _name(command: list[str]) -> str:
    settings = [os.path.realpath(command[0]), *command[1:], _processor()]
    made_of = [file.read_bytes() for file in sorted(_FOLDER.iterdir())]
    made_of += [setting.encode() for setting in settings]
    digest = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
    return f"kernels-{platform.machine()}-{digest}"


def _processor() -> str:
    """The lines of /proc/cpuinfo on which `-march=native` depends."""
    names = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.split("\t")[0].strip() in names)


def _timeout_s() -> float:
    said = os.environ.get("MOESPAN_BUILD_TIMEOUT", "").strip()
    try:
        timeout_s = float(said or _BUILD_TIMEOUT_S)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s <= _MOST_TIMEOUT_S:
        raise BuildError(
            f"MOESPAN_BUILD_TIMEOUT={shown(said)} is no number of seconds above 0 and up to "
            f"{_MOST_TIMEOUT_S:g}; unset it for {_BUILD_TIMEOUT_S:g}"
        )
    return timeout_s


def _build(command: list[str], timeout_s: float) -> bytes:
    """The library that the compiler makes."""
    try:
        with tempfile.TemporaryDirectory(prefix="moespan-") as folder:
            out = Path(folder, "kernels.so")
            command = [*command, "-o", str(out), str(_FOLDER / "kernels.cpp")]
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
            )
            if done.returncode:
                lines = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
                raise BuildError(f"{' '.join(command)}: {shortened(lines[0], 400)}")
            return out.read_bytes()
    except subprocess.TimeoutExpired:
        raise BuildError(
            f"{' '.join(command)}: no library after {timeout_s:g} s; set MOESPAN_BUILD_TIMEOUT to "
            "more seconds if this machine is that slow"
        ) from None
    except OSError as error:
        raise BuildError(f"{' '.join(command)}: {error}") from None
