"""Builds the kernels of `kernels/` once for this machine's processor, and loads them with ctypes.

At first use the C++ compiler named by `CXX`, or `c++`, builds the library. `CXX` may have arguments
(`ccache g++`, `g++ -m64`). The library goes to `$MOESPAN_CACHE`, or `$XDG_CACHE_HOME/moespan`, or
`~/.cache/moespan` (`kernel_cache` says which folders are trusted); an empty variable counts as not
set. The library's name depends on source, compiler and processor, so that machines can share the
folder. A build fails after 300 s.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from moespan.errors import shortened
from moespan.ops.cpu.kernel_cache import BuildError, KernelCache

__all__ = ["BuildError", "library"]

_FOLDER = Path(__file__).with_name("kernels")
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w"]
_BUILD_TIMEOUT_S = 300


def library(*flags: str) -> ctypes.CDLL:
    """Load the library, and build it first if it is missing or damaged.

    Torch must have been imported before: the library uses its OpenMP. Among ranks that start
    together, one builds and the others wait.

    Args:
        flags: further compiler flags, such as `-march=x86-64-v3` for an older processor.

    Raises:
        BuildError: there is no compiler, it fails, or the cache folder cannot be used.
    """
    command = [*_compiler(), *_FLAGS, *flags]
    name = _name(command)
    with KernelCache(_cache_folder()) as cache:
        loaded = cache.load(f"{name}.so")
        if loaded is not None:
            return loaded
        with cache.locked(f"{name}.lock", _BUILD_TIMEOUT_S):
            loaded = cache.load(f"{name}.so")
            if loaded is None:
                cache.store(f"{name}.so", _build(command))
                loaded = cache.load(f"{name}.so")
    if loaded is None:
        raise BuildError(f"{cache.path} does not keep what is written to it; set MOESPAN_CACHE")
    return loaded


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


def _cache_folder() -> Path:
    own = os.environ.get("MOESPAN_CACHE")
    if own:
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "moespan")
    except RuntimeError as error:
        raise BuildError(f"there is no home folder ({error}); set MOESPAN_CACHE") from None


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


def _build(command: list[str]) -> bytes:
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
                timeout=_BUILD_TIMEOUT_S,
            )
            if done.returncode:
                lines = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
                raise BuildError(f"{' '.join(command)}: {shortened(lines[0], 400)}")
            return out.read_bytes()
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{' '.join(command)}: {error}") from None
