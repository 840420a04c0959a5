"""The kernels are built once, by a compiler that may be missing, and loaded from nobody else."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest

from moespan.ops import CpuOps, ops_for
from moespan.ops.cpu.compiler import BuildError, library


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESPAN_CACHE", str(tmp_path))
    return tmp_path


def compiler(folder: Path, script: str) -> str:
    """A program that stands in for the compiler."""
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_plain_torch_does_the_work_and_says_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert type(ops_for("cpu")) is CpuOps
    said = capsys.readouterr().err
    assert "no-such-compiler" in said and "install g++, or set CXX" in said


def test_what_the_compiler_says_is_the_error_and_nothing_is_left(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo cannot do that >&2; exit 1"))
    with pytest.raises(BuildError, match="cannot do that"):
        library()
    assert not list(cache.glob("*.so"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_an_old_gcc_is_refused_with_the_reason(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script = f'exec {shutil.which("g++")} -U__GNUC__ -D__GNUC__=8 -fmax-errors=1 "$@"'
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    with pytest.raises(BuildError, match=r"older than 9.* set CXX to GCC 9 or newer"):
        library()


def test_it_is_built_once_and_not_loaded_when_others_may_write_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Writes no library, but the file that it was told to; and counts its runs.
    script = f'echo >> {tmp_path}/runs; while [ "$1" != -o ]; do shift; done; echo no > "$2"'
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    for _ in range(2):
        with pytest.raises(BuildError, match="does not load"):
            library()
    assert (tmp_path / "runs").read_text() == "\n"
    (built,) = cache.glob("*.so")
    built.chmod(built.stat().st_mode | stat.S_IWOTH)
    with pytest.raises(BuildError, match="others may write it"):
        library()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("CXX", compiler(tmp_path, "exit 1"))
    monkeypatch.setenv("MOESPAN_CACHE", str(file / "below"))
    with pytest.raises(BuildError, match="set MOESPAN_CACHE"):
        library()
