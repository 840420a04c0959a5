"""The kernel cache loads what this user wrote, whole and unchanged, and nothing else."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moespan.cache_folder import CacheError
from moespan.ops.cpu.kernel_cache import KernelCache

NAME = "kernels.so"
STRANGER = 54321


def library_bytes() -> bytes:
    """A small library that every machine has."""
    return next(
        Path(line.split()[-1]).read_bytes()
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "/libm.so" in line or "/libm-" in line
    )


@pytest.fixture(autouse=True)
def libm() -> ctypes.CDLL:
    return ctypes.CDLL("libm.so.6")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    with KernelCache(folder) as cache:
        cache.store(NAME, library_bytes())
    return folder


def test_what_is_stored_is_loaded(folder: Path):
    with KernelCache(folder) as cache:
        loaded = cache.load(NAME)
        assert loaded is not None and loaded.cos is not None
        assert cache.load(NAME) is loaded
        assert cache.load("other.so") is None
    assert [*folder.iterdir()] == [folder / NAME]


def test_a_new_folder_is_for_its_owner_only(folder: Path):
    assert folder.stat().st_mode & 0o777 == 0o700


def test_another_library_is_loaded_though_its_descriptor_may_have_the_same_number(folder: Path):
    with KernelCache(folder) as cache:
        first = cache.load(NAME)
        cache.store("other.so", library_bytes() + b"\0")
        second = cache.load("other.so")
    assert first is not None and second is not None and first._name != second._name


@pytest.mark.parametrize("kept", [0, 1, 31, 32, 4096, -1])
def test_a_cut_library_is_not_loaded(folder: Path, kept: int):
    data = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(data[:kept])
    with KernelCache(folder) as cache:
        assert cache.load(NAME) is None
        cache.store(NAME, library_bytes())
        assert cache.load(NAME) is not None


def test_a_changed_byte_is_found(folder: Path):
    data = bytearray((folder / NAME).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / NAME).write_bytes(data)
    with KernelCache(folder) as cache:
        assert cache.load(NAME) is None


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_folder_that_others_may_write_is_refused(folder: Path, mode: int):
    folder.chmod(mode)
    with pytest.raises(CacheError, match=r"may be written by others.*chmod go-w.*MOESPAN_CACHE"):
        KernelCache(folder)


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_library_that_others_may_write_is_refused(folder: Path, mode: int):
    (folder / NAME).chmod(mode)
    with (
        KernelCache(folder) as cache,
        pytest.raises(CacheError, match=r"may be written by others.*delete it, or set"),
    ):
        cache.load(NAME)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
@pytest.mark.parametrize("what", ["folder", "library", "lock"])
def test_what_belongs_to_a_stranger_is_refused(folder: Path, what: str):
    (folder / "lock").touch()
    path = {"folder": folder, "library": folder / NAME, "lock": folder / "lock"}[what]
    os.chown(path, STRANGER, -1)
    with (
        pytest.raises(CacheError, match="belongs to another user, and nothing from it is used"),
        KernelCache(folder) as cache,
    ):
        cache.load(NAME)
        with cache.locked("lock", 1):
            raise AssertionError


@pytest.mark.parametrize("what", ["link", "FIFO", "folder"])
def test_what_is_no_file_is_refused_at_once(folder: Path, tmp_path: Path, what: str):
    (folder / NAME).rename(tmp_path / NAME)
    if what == "link":
        (folder / NAME).symlink_to(tmp_path / NAME)
    elif what == "FIFO":
        os.mkfifo(folder / NAME)
    else:
        (folder / NAME).mkdir()
    with KernelCache(folder) as cache, pytest.raises(CacheError, match="cannot be used"):
        cache.load(NAME)


def test_a_lock_is_neither_followed_nor_truncated(folder: Path, tmp_path: Path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (folder / "lock").symlink_to(precious)
    with (
        KernelCache(folder) as cache,
        pytest.raises(CacheError, match="cannot be written"),
        cache.locked("lock", 1),
    ):
        raise AssertionError
    (folder / "lock").unlink()
    (folder / "lock").write_text("kept")
    with KernelCache(folder) as cache, cache.locked("lock", 1):
        pass
    assert precious.read_text() == "precious" and (folder / "lock").read_text() == "kept"


def test_one_process_at_a_time_holds_the_lock_and_waits_for_it_in_bounded_time(folder: Path):
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with KernelCache(folder) as cache, cache.locked("lock", 60):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    with (
        KernelCache(folder) as cache,
        pytest.raises(CacheError, match=r"another process holds .*lock for over 0\.1 s; end it"),
        cache.locked("lock", 0.1),
    ):
        raise AssertionError
    done.set()
    with KernelCache(folder) as cache, cache.locked("lock", 60):
        pass
    thread.join()


def test_a_draft_that_a_killed_process_left_does_no_harm(folder: Path):
    (folder / f".{NAME}-{os.getpid()}").write_bytes(b"half")
    with KernelCache(folder) as cache:
        cache.store(NAME, library_bytes())
        assert cache.load(NAME) is not None
    assert [*folder.iterdir()] == [folder / NAME]


NOEXEC = """
import sys
from pathlib import Path
from moespan.cache_folder import CacheError
from moespan.ops.cpu.kernel_cache import KernelCache
try:
    KernelCache(Path(sys.argv[1]))
except CacheError as error:
    print(error)
"""


def test_a_folder_from_which_nothing_may_be_run_is_named_before_anything_is_built(tmp_path: Path):
    mount = f"mount -t tmpfs -o noexec,mode=700,size=1m tmpfs {tmp_path}"
    script = f'{mount} || exit 77; exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", NOEXEC]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip("file systems cannot be mounted here")
    assert f"{tmp_path} is on a file system that is mounted noexec" in done.stdout
    assert "set MOESPAN_CACHE to a folder where programs may run" in done.stdout
