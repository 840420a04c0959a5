"""Builds a folder from which `import torch_npu` works without an NPU and without CANN.

    python build.py FOLDER [--torch-npu VERSION]

The released torch_npu wheel goes into FOLDER unchanged; with FOLDER on its PYTHONPATH, the Python
that ran this script has the package. A stand-in replaces the CANN libraries that the wheel is
linked against: fake_cann.c (a device in host memory, and HCCL between local processes), and an
empty function for every other symbol that the wheel needs, including all operator kernels
(`aclnn*`). The stand-in lies in FOLDER/torch_npu.libs, where the RPATH of the wheel looks first, so
that no LD_LIBRARY_PATH is needed. A `sitecustomize` in FOLDER starts the simulator with torch_npu.

Exit code 77: something needed is missing here; standard error says what.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = ("gcc", "nm", "ldd")
# torch_npu opens these by name at run time, so no ELF header lists them.
OPENED_BY_NAME = ["libopapi.so", "libnnopbase.so", "libhcomm.so", "libascend_hal.so"]
SITECUSTOMIZE = "import ascend_sim\n\nascend_sim.start_with_torch_npu()\n"


class MissingError(Exception):
    """The stand-in cannot be built on this machine."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch-npu", metavar="VERSION", help="(that of the installed torch)")
    args = parser.parse_args()
    try:
        check_machine()
        install(args.folder.resolve(), args.torch_npu or installed_torch())
    except MissingError as error:
        print(f"cannot build the stand-in for CANN: {error}", file=sys.stderr)
        sys.exit(77)
    print(build(args.folder.resolve()))


def check_machine() -> None:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise MissingError(f"there is no torch_npu for {sys.platform} {platform.machine()}")
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        raise MissingError(f"{', '.join(lacking)} not found; install gcc and binutils")


def installed_torch() -> str:
    """The version of the installed torch, without a local part such as `+cpu`."""
    try:
        return importlib.metadata.version("torch").partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        raise MissingError(f"{sys.executable} has no torch") from None


def install(folder: Path, version: str) -> None:
    """Install the wheel into `folder`, without torch, which this Python already has."""
    if not (folder / f"torch_npu-{version}.dist-info").exists():
        shutil.rmtree(folder, ignore_errors=True)
        # fmt: off
        pip = [
            sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--only-binary=:all:", "--no-deps", "--target", str(folder),
            f"torch-npu=={version}", *packages_of_torch_npu(),
        ]
        # fmt: on
        result = subprocess.run(pip, text=True, capture_output=True)
        if result.returncode:
            reason = result.stderr.strip().splitlines()[-1:] or ["pip failed"]
            raise MissingError(f"no wheel of torch-npu {version}: {reason[0]}")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)


def packages_of_torch_npu() -> list[str]:
    """The packages of the extra `ascend` beside torch_npu: no more than a user gets."""
    text = (HERE.parents[1] / "pyproject.toml").read_text()
    extra = re.search(r"^ascend = \[(.*)\]", text, re.MULTILINE)
    assert extra is not None, "pyproject.toml has no extra `ascend`"
    return [name for name in re.findall(r'"([^"]+)"', extra[1]) if not name.startswith("torch-npu")]


def build(folder: Path) -> str:
    """Compile the stand-in and link it under the names of the missing libraries."""
    target = folder / "torch_npu.libs"
    target.mkdir(exist_ok=True)
    for link in target.iterdir():
        if link.is_symlink():  # from an earlier build
            link.unlink()
    libraries, asked = missing(folder)
    source = HERE / "fake_cann.c"
    written = set(re.findall(r"^[a-z]\w*(?: \w+)* \**(\w+)\(", source.read_text(), re.MULTILINE))
    names = sorted((asked | kernels(folder)) - written)
    text = "long ascend_sim_called(const char *);\n"
    text += "int ascend_sim_atb_create(const void *, void **);\n"
    text += "int ascend_sim_atb_context(void **);\n" + "\n".join(map(stub, names)) + "\n"
    generated, library = target / "generated.c", target / "libfakecann.so"
    generated.write_text(text)
    run("gcc", "-shared", "-fPIC", "-O2", "-w", source, generated, "-o", library)
    for name in libraries:
        (target / name).symlink_to(library.name)
    return (
        f"stand-in for {', '.join(sorted(libraries))}: "
        f"{len(written)} written and {len(names)} generated functions"
    )


def missing(folder: Path) -> tuple[set[str], set[str]]:
    """The libraries that the wheel's shared objects lack here, and the symbols nobody defines."""
    torch = Path(str(importlib.metadata.distribution("torch").locate_file("torch/lib")))
    own = [*sorted(folder.glob("torch_npu/lib/*.so")), *sorted(folder.glob("torch_npu/_C.*.so"))]
    search = [str(torch), sysconfig.get_config_var("LIBDIR") or ""]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(search)}
    libraries, present = set(OPENED_BY_NAME), set(map(str, own))
    for shared_object in own:
        for line in run("ldd", shared_object, env=environment).splitlines():
            name, _, found = line.strip().partition(" => ")
            if "not found" in found:
                libraries.add(name)
            elif found.startswith("/"):
                present.add(found.split(" (")[0])
    asked = {
        name
        for shared_object in own
        for name, kind in symbols(shared_object, "--undefined-only").items()
        if kind == "U" and not re.match(r"_?Py", name)
    }
    return libraries, asked - {name for lib in present for name in symbols(lib, "--defined-only")}


def symbols(library: Path | str, which: str) -> dict[str, str]:
    """Dynamic symbols of a library, without version suffix → letter of their type."""
    rows = (line.split() for line in run("nm", "-D", which, library).splitlines())
    return {row[-1].split("@")[0]: row[-2] for row in rows}


def kernels(folder: Path) -> set[str]:
    """Names of the operator kernels, which are looked up at run time: constants in the library."""
    data = (folder / "torch_npu/lib/libtorch_npu.so").read_bytes()
    return {name.decode() for name in re.findall(rb"\0(aclnn[A-Z]\w*)(?=\0)", data)}


def stub(symbol: str) -> str:
    if symbol.startswith("_ZN3atb15CreateOperation"):
        return (
            f"int {symbol}(const void *p, void **out) {{ return ascend_sim_atb_create(p, out); }}"
        )
    if symbol.startswith("_ZN3atb13CreateContext"):
        return f"int {symbol}(void **out) {{ return ascend_sim_atb_context(out); }}"
    return f'long {symbol}(void) {{ return ascend_sim_called("{symbol}"); }}'


def run(*command: object, env: dict[str, str] | None = None) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE, env=env).stdout


if __name__ == "__main__":
    main()
