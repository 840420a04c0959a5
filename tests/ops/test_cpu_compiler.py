"""The kernels are built once, and a library that others may have written is not loaded."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest

from moespan.cache_folder import CacheError, cache_path
from moespan.ops import CpuOps, ops_for
from moespan.ops.cpu.compiler import BuildError, _compiler, library


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESPAN_CACHE", str(tmp_path))
    return tmp_path


def compiler(folder: Path, script: str) -> str:
    """A script that takes the place of the compiler."""
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_operations_run_in_plain_torch_with_a_notice(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert type(ops_for("cpu")) is CpuOps
    said = capsys.readouterr().err
    assert "no-such-compiler" in said and "install g++, or set CXX" in said


def test_the_compilers_message_is_the_error_and_no_file_is_left(
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


def test_a_build_has_as_many_seconds_as_the_environment_says(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", compiler(tmp_path, "exec sleep 60"))
    monkeypatch.setenv("MOESPAN_BUILD_TIMEOUT", "0.2")
    with pytest.raises(BuildError, match=r"no library after 0\.2 s; set MOESPAN_BUILD_TIMEOUT to"):
        library()
    for wrong in "0", "nan", "inf", "long":
        monkeypatch.setenv("MOESPAN_BUILD_TIMEOUT", wrong)
        with pytest.raises(BuildError, match=rf"MOESPAN_BUILD_TIMEOUT='{wrong}' is no number"):
            library()


# In place of the compiler: writes a file that is no library, and counts its runs.
NO_LIBRARY = 'while [ "$1" != -o ]; do shift; done; echo no > "$2"'


def test_the_library_is_built_once_and_refused_if_others_may_write_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", compiler(tmp_path, f"echo >> {tmp_path}/runs; {NO_LIBRARY}"))
    for _ in range(2):
        with pytest.raises(CacheError, match="does not load"):
            library()
    assert (tmp_path / "runs").read_text() == "\n"
    (built,) = cache.glob("*.so")
    built.chmod(built.stat().st_mode | stat.S_IWOTH)
    with pytest.raises(CacheError, match=r"may be written by others.*delete it, or set MOESPAN"):
        library()


def test_a_damaged_library_is_built_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", compiler(tmp_path, f"echo >> {tmp_path}/runs; {NO_LIBRARY}"))
    with pytest.raises(CacheError, match="does not load"):
        library()
    (built,) = cache.glob("*.so")
    whole = built.read_bytes()
    built.write_bytes(whole[:-1])
    with pytest.raises(CacheError, match="does not load"):
        library()
    assert built.read_bytes() == whole
    assert (tmp_path / "runs").read_text() == "\n\n"


def test_arguments_of_the_compiler_reach_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program = compiler(tmp_path, f'echo "$1|$2" >> {tmp_path}/words; {NO_LIBRARY}')
    monkeypatch.setenv("CXX", f"{program} -m64 '-DNAME=a b'")
    with pytest.raises(CacheError, match="does not load"):
        library()
    assert (tmp_path / "words").read_text() == "-m64|-DNAME=a b\n"


@pytest.mark.parametrize("folder", ["plain", "with a space"])
def test_a_compiler_may_be_a_path(
    folder: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / folder).mkdir()
    monkeypatch.setenv("CXX", compiler(tmp_path / folder, NO_LIBRARY))
    with pytest.raises(CacheError, match="does not load"):
        library()


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_variable_is_as_good_as_none(empty: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", empty)
    monkeypatch.setattr("shutil.which", {"c++": "/usr/bin/c++"}.get)
    assert _compiler() == ["/usr/bin/c++"]
    monkeypatch.setenv("MOESPAN_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/own")
    assert cache_path() == Path("/var/cache/own/moespan")


def test_words_of_the_compiler_that_cannot_be_split_are_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", "g++ 'x")
    with pytest.raises(BuildError, match="cannot be split into words"):
        library()


def test_an_unwritable_cache_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("CXX", compiler(tmp_path, "exit 1"))
    monkeypatch.setenv("MOESPAN_CACHE", str(file / "below"))
    with pytest.raises(CacheError, match="set MOESPAN_CACHE"):
        library()
