"""scripts/setup.sh: an environment is made, mended or used in whatever state the folder is found.

The interpreter is real and so are its environments; pip is a stand-in that notes what it is told.
"""

from __future__ import annotations

import http.server
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REAL = os.path.realpath(sys.executable)
HAS_NVIDIA = any(Path("/dev", name).exists() for name in ("nvidiactl", "nvidia0"))
PIN = "2.13.0"

# `python3` on the PATH. Environments that it makes have the stand-in for pip.
PYTHON3 = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
    shift 2
    [ -z "$FAIL_VENV" ] || exit 1
    {real} -m venv --without-pip "$@" || exit
    for folder; do :; done
    mkdir -p "$folder"/lib/python{version}/site-packages/pip
    cp "{bin}/pip.py" "$folder"/lib/python{version}/site-packages/pip/__main__.py
    exit
fi
exec {real} "$@"
"""

PIP = """
import os, re, site, sys
from pathlib import Path
line = " ".join(sys.argv[1:])
if "--version" in line:
    sys.exit()
with open(os.environ["PIP_LOG"], "a") as log:
    log.write(line + "\\n")
if os.environ.get("PIP_FAILS"):
    sys.exit("ERROR: no index")
packages = Path(site.getsitepackages()[0])
for version in re.findall("torch==([^ ]+)", line):
    folder = packages / f"torch-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: torch\\nVersion: {version}\\n")
if "--editable" in line:
    (packages / "moespan.pth").write_text(os.getcwd() + "/src\\n")
    program = Path(sys.prefix, "bin", "moespan")
    program.write_text(f"#!{sys.executable}\\nimport sys; print(sys.prefix)\\n")
    program.chmod(0o755)
"""


class Folder:
    """A copy of what the script needs, where names are as unkind as users' are."""

    def __init__(self, parent: Path, index: str) -> None:
        self.path = parent / "my 文件夹"
        self.path.mkdir(parents=True)
        for name in ("scripts", "pyproject.toml", "constraints.txt"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.path / name)
        self.bin = parent / "bin"
        self.bin.mkdir()
        for tool in ("cat", "cksum", "cp", "dirname", "env", "flock", "grep", "head", "mkdir"):
            self.link(tool)
        for tool in ("rm", "sed", "sh", "timeout", "touch", "bash"):
            self.link(tool)
        version = "{}.{}".format(*sys.version_info)
        self.program("python3", PYTHON3.format(real=REAL, version=version, bin=self.bin))
        self.program("uname", "#!/bin/sh\necho ${MACHINE:-x86_64}\n")
        (self.bin / "pip.py").write_text(PIP)
        self.log = parent / "pip.log"
        self.index = index

    def link(self, tool: str) -> None:
        (self.bin / tool).symlink_to(shutil.which(tool) or "/nonexistent")

    def program(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def setup(self, extras: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        """Source the script as run.sh does, then say which Python and which code would run."""
        show = "import os, sys; print(sys.executable); print(os.environ['PYTHONPATH'])"
        return subprocess.run(
            [
                str(self.bin / "bash"),
                "-euc",
                f'source scripts/setup.sh; setup "{extras}"; "$PYTHON" -c "{show}"',
            ],
            cwd=self.path,
            env={
                "PATH": str(self.bin),
                "PIP_LOG": str(self.log),
                "TORCH_INDEX": self.index,
                "LC_ALL": "C.UTF-8",
                **environ,
            },
            capture_output=True,
            text=True,
        )

    def change_requirements(self) -> None:
        path = self.path / "pyproject.toml"
        path.write_text(path.read_text() + "\n")

    def installs(self) -> list[str]:
        """What pip was told since this was last asked."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.write_text("")
        return lines

    @property
    def python(self) -> Path:
        return self.path / ".venv" / "bin" / "python"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path, "http://127.0.0.1:1/")


def ready(folder: Folder) -> Folder:
    done = folder.setup()
    assert done.returncode == 0, done.stderr
    folder.installs()
    return folder


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 1
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("moespan: ")
    assert all(part in done.stderr for part in parts), done.stderr


def assert_made_anew(folder: Folder, because: str) -> None:
    done = folder.setup()
    assert done.returncode == 0, done.stderr
    assert f"moespan: .venv {because}; it is made anew" in done.stderr
    assert any("--editable ." in line for line in folder.installs())
    assert folder.setup().stderr == ""


def test_the_first_run_installs_and_the_second_does_not(folder: Folder) -> None:
    done = folder.setup()
    assert done.stdout.splitlines() == [str(folder.python), f"{folder.path}/src"]
    torch, ours = folder.installs()
    assert f"torch=={PIN}" in torch and "--no-deps" in torch
    assert "--constraint constraints.txt --editable ." in ours
    again = folder.setup()
    assert (again.stdout, again.stderr) == (done.stdout, "")
    assert folder.installs() == []


def test_an_environment_for_tests_serves_runs_too(folder: Folder) -> None:
    assert folder.setup("[dev]").returncode == 0
    assert any("--editable .[dev]" in line for line in folder.installs())
    assert folder.setup().stderr == "" and folder.installs() == []


def test_new_requirements_are_installed_into_the_environment_that_is_there(folder: Folder) -> None:
    ready(folder)
    keep = folder.path / ".venv" / "kept"
    keep.touch()
    folder.change_requirements()
    done = folder.setup()
    assert done.stderr == "moespan: bringing .venv up to date\n"
    assert len(folder.installs()) == 1 and keep.exists()


# States of .venv that no run may stumble over


def test_a_python_that_is_gone(folder: Folder) -> None:
    ready(folder)
    folder.python.unlink()
    folder.python.symlink_to("/nonexistent/python3")
    assert_made_anew(folder, "has no Python that runs")


def test_no_pip_inside(folder: Folder) -> None:
    ready(folder)
    shutil.rmtree(next(folder.path.glob(".venv/lib/python*/site-packages/pip")))
    folder.change_requirements()
    assert_made_anew(folder, "has no pip")


def test_interrupted_half_way(folder: Folder) -> None:
    failed = folder.setup(PIP_FAILS="1")
    assert failed.returncode == 1
    error, last = failed.stderr.splitlines()[-2:]
    assert error == "ERROR: no index"
    assert last.startswith("moespan: pip could not install all packages")
    folder.installs()
    assert_made_anew(folder, "was left half-made")


def test_made_by_a_script_that_left_no_note_of_the_folder(folder: Folder) -> None:
    ready(folder)
    copy = Folder(folder.path.parent / "elsewhere", folder.index)
    shutil.copytree(folder.path / ".venv", copy.path / ".venv", symlinks=True)
    (copy.path / ".venv" / "moespan-").write_text("123 456\n")
    assert_made_anew(copy, "was made in another folder")


@pytest.mark.parametrize("old_folder_is_there", [True, False])
def test_copied_with_its_folder_it_runs_the_new_code_without_any_index(
    folder: Folder, old_folder_is_there: bool
) -> None:
    ready(folder)
    copy = Folder(folder.path.parent / "elsewhere", folder.index)
    shutil.copytree(folder.path / ".venv", copy.path / ".venv", symlinks=True)
    if not old_folder_is_there:
        shutil.rmtree(folder.path)
    done = copy.setup(PIP_FAILS="1")
    assert done.stdout.splitlines() == [str(copy.python), f"{copy.path}/src"]
    assert "its programs now point to this one" in done.stderr and copy.installs() == []
    program = copy.path / ".venv" / "bin" / "moespan"
    assert subprocess.check_output([program], text=True).strip() == str(copy.path / ".venv")
    (link,) = copy.path.glob(".venv/lib/python*/site-packages/moespan.pth")
    assert link.read_text() == f"{copy.path}/src\n"
    assert copy.setup().stderr == ""


# Pythons


def test_no_python_on_the_path(folder: Folder) -> None:
    (folder.bin / "python3").unlink()
    assert_one_line(folder.setup(), "3.10 to 3.13 is needed, and none is on the PATH", "PYTHON=")


def test_a_python_without_venv(folder: Folder) -> None:
    folder.program("python3", f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; esac\n{REAL} "$@"\n')
    assert_one_line(folder.setup(), "has no module venv", "apt install python3-venv")
    assert not (folder.path / ".venv").exists()


def test_the_environment_that_is_active_does_not_make_itself_anew(folder: Folder) -> None:
    ready(folder)
    (folder.path / ".venv" / "moespan-installing").touch()
    (folder.path / ".venv" / "moespan-").unlink()
    done = folder.setup(PATH=f"{folder.python.parent}:{folder.bin}")
    assert done.returncode == 0 and "was left half-made" in done.stderr


def test_an_environment_that_is_named_is_used_as_it_is(folder: Folder) -> None:
    done = folder.setup(PYTHON=sys.executable)
    assert done.stdout.splitlines() == [sys.executable, f"{folder.path}/src"]
    assert done.stderr == "" and not (folder.path / ".venv").exists()


def test_a_named_environment_without_the_dependencies(folder: Folder) -> None:
    subprocess.run([REAL, "-m", "venv", "--without-pip", folder.path / "bare"], check=True)
    python = str(folder.path / "bare" / "bin" / "python")
    assert_one_line(
        folder.setup(PYTHON=python), "lacks torch>=2.8, numpy", f"run: {python} -m pip install ."
    )
    assert_one_line(folder.setup("[dev]", PYTHON=python), "pytest", 'pip install ".[dev]"')


def test_a_named_environment_with_an_older_package(folder: Folder) -> None:
    subprocess.run([REAL, "-m", "venv", "--without-pip", folder.path / "bare"], check=True)
    (packages,) = folder.path.glob("bare/lib/python*/site-packages")
    (packages / "safetensors-0.5.3.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: safetensors\nVersion: 0.5.3\n"
    (packages / "safetensors-0.5.3.dist-info" / "METADATA").write_text(metadata)
    done = folder.setup(PYTHON=str(folder.path / "bare" / "bin" / "python"))
    assert_one_line(done, "safetensors>=0.6.2 (it has 0.5.3)")


def test_a_named_python_that_does_not_run(folder: Folder) -> None:
    assert_one_line(folder.setup(PYTHON="/nonexistent/python"), "does not run", "3.10 to 3.13")


def test_a_named_python_of_another_version(folder: Folder) -> None:
    old = folder.program("old", f'#!/bin/sh\n[ "$2" = "" ] || exit 1\nexec {REAL} "$@"\n')
    assert_one_line(folder.setup(PYTHON=str(old)), f"PYTHON={old} is not a Python 3.10 to 3.13")


# Which torch, and what is said before it is fetched


class Index(http.server.BaseHTTPRequestHandler):
    """An index with one wheel, of this machine and Python."""

    def do_GET(self) -> None:
        python = "cp{}{}".format(*sys.version_info)
        name = f"torch-{PIN}%2Bcpu-{python}-{python}-manylinux_2_28_{platform.machine()}.whl"
        self.send_response(200 if self.path == "/cpu/torch/" else 404)
        self.end_headers()
        self.wfile.write(f'<a href="/cpu/{name}#sha256=0">{name}</a>'.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def index() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


no_gpu = pytest.mark.skipif(HAS_NVIDIA, reason="this machine has an NVIDIA GPU")


@no_gpu
def test_x86_takes_the_cpu_build_of_an_index_that_has_it(tmp_path: Path, index: str) -> None:
    folder = Folder(tmp_path, f"{index}/cpu")
    said = folder.setup().stderr
    assert folder.installs()[0].endswith(f"--no-deps --index-url {index}/cpu torch=={PIN}+cpu")
    assert f"a CPU build from {index}/cpu: about 190 MB" in said


@no_gpu
@pytest.mark.parametrize("path", ["/none", ""])
def test_x86_takes_what_there_is_where_no_index_has_a_cpu_build(
    tmp_path: Path, index: str, path: str
) -> None:
    folder = Folder(tmp_path, f"{index}{path}" if path else "http://127.0.0.1:1")
    said = folder.setup().stderr
    assert folder.installs()[0].endswith(f"--no-deps torch=={PIN}")
    assert "about 2.9 GB" in said and "TORCH_INDEX" in said


@no_gpu
def test_aarch64_takes_the_version_whose_wheel_has_no_cuda(folder: Folder) -> None:
    said = folder.setup(MACHINE="aarch64").stderr
    assert folder.installs()[0].endswith("--no-deps torch==2.10.0")
    assert "torch 2.10.0, a CPU build: about 150 MB" in said


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_an_nvidia_gpu_gets_the_build_with_cuda(folder: Folder, machine: str) -> None:
    folder.program("nvidia-smi", "#!/bin/sh\n")
    said = folder.setup(MACHINE=machine).stderr
    assert folder.installs()[0].endswith(f"--no-deps torch=={PIN}")
    assert "with CUDA" in said and "about 2.9 GB" in said


@no_gpu
def test_an_index_that_does_not_answer_costs_seconds(tmp_path: Path) -> None:
    """A server that accepts and is silent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        folder = Folder(tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}")
        started = time.monotonic()
        assert folder.setup().returncode == 0
        assert time.monotonic() - started < 60  # pip itself would wait for minutes


@pytest.mark.parametrize("verb", [[], ["serve"]])
def test_a_model_after_the_script_is_refused_with_the_way_to_name_it(verb: list[str]):
    command = ["bash", str(ROOT / "run.sh"), *verb, "models/quickstart"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 2 and ran.stdout == ""
    assert f"MODEL=models/quickstart {' '.join(['bash run.sh', *verb])}" in ran.stderr
