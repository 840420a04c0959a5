"""What is given away: the source distribution, the container recipes, and shell scripts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    ROOT / "run.sh",
    ROOT / "test.sh",
    *sorted((ROOT / "scripts").glob("*.sh")),
    *sorted((ROOT / "tools").rglob("*.sh")),
]


def test_the_source_distribution_holds_the_package_and_no_part_of_the_tests(
    tmp_path: Path,
) -> None:
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("setuptools older than 77 does not build this project")
    copy = tmp_path / "copy"
    kept_out = shutil.ignore_patterns(".*", "models", "*.egg-info", "__pycache__", "data")
    shutil.copytree(ROOT, copy, ignore=kept_out)
    build = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build, tmp_path],
        cwd=copy,
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("moespan-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    kernels = {f"src/moespan/ops/cpu/kernels/{path.name}" for path in _kernels()}
    assert kernels | {"LICENSE", "pyproject.toml", "src/moespan/py.typed"} <= names
    assert not [name for name in names if name.startswith("tests")]


def _kernels() -> list[Path]:
    return list((ROOT / "src" / "moespan" / "ops" / "cpu" / "kernels").iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_each_script_parses(script: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    subprocess.run([bash, "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", "--severity=warning", script], check=True)


@pytest.mark.parametrize("recipe", sorted((ROOT / "deploy").glob("Dockerfile*")), ids=str)
def test_each_recipe_copies_what_is_there_and_the_build_is_sent(recipe: Path) -> None:
    sent = set(re.findall("^!(.*)", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied = re.findall(r"^COPY (.*) \S+$", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    assert copied
    for path in " ".join(copied).split():
        assert (ROOT / path).exists() and path in sent
    if shutil.which("hadolint"):
        subprocess.run(["hadolint", recipe], check=True)


def test_the_compose_file_has_the_devices_that_the_documentation_names() -> None:
    compose = (ROOT / "deploy" / "compose.ascend.yaml").read_text()
    managers = ("davinci_manager", "devmm_svm", "hisi_hdc")
    for device in (*(f"davinci{i}" for i in range(8)), *managers):
        assert f"      - /dev/{device}\n" in compose
    mounts = re.findall(r"-v (/\S+)", (ROOT / "docs" / "ascend.md").read_text(encoding="utf-8"))
    for mount in mounts:
        assert mount.startswith("/data/") or f"      - {mount}\n" in compose


def test_each_package_has_one_pin_that_its_lower_bound_allows() -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", constraints, re.MULTILINE))
    bounds = re.findall(r'^    "([\w-]+)>=([\d.]+)"', project, re.MULTILINE)
    assert {"torch", "safetensors", "msgspec"} <= {name for name, _ in bounds}
    for name, bound in bounds:
        if name in pins:
            numbers = [tuple(map(int, text.split("."))) for text in (bound, pins[name])]
            assert numbers[0] <= numbers[1], f"{name}>={bound}, but the pin is {pins[name]}"


@pytest.mark.parametrize("command", ["emulate.sh aarch64", "bare.sh trixie"])
def test_another_system_is_skipped_where_its_tools_are_missing(
    tmp_path: Path, command: str
) -> None:
    script, argument = command.split()
    for tool in ("bash", "dirname", "id"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "")
    done = subprocess.run(
        [tmp_path / "bash", ROOT / "tools" / script, argument],
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 77
    assert done.stderr.startswith("skipped: ") and done.stderr.count("\n") == 1


def test_the_lower_bounds_of_all_that_tests_import_are_tried() -> None:
    function = "eval \"$(sed -n '/^lower_bounds()/,/^}/p' tools/pythons.sh)\"; lower_bounds"
    done = subprocess.run(["bash", "-c", function], cwd=ROOT, capture_output=True, text=True)
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", done.stdout, re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    extras = re.findall(r"^(?:serve|grammar) = \[(.*)\]", project, re.MULTILINE)
    assert needed is not None and len(extras) == 2
    bounds = re.findall(r'"([\w-]+)>=([\d.]+)"', " ".join([needed[1], *extras]))
    assert len(bounds) >= 12 and dict(bounds).items() <= pins.items()


def test_a_python_that_is_promised_and_missing_fails_the_run(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", ROOT / "tools" / "pythons.sh", "3.99"],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    said = "moespan: Python 3.99 is not on this machine\nmoespan: failed: 3.99\n"
    assert (done.returncode, done.stderr) == (1, said)
