"""Files of others are read as regular files only, and never beyond a limit."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from moespan.errors import MoespanError
from moespan.files import open_regular, parse_json, read_bytes, read_json, write


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "it is a FIFO, not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a regular file"),
        (lambda path: path.mkdir(), "it is a folder, not a regular file"),
        (make_socket, "No such device or address"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    ],
)
def test_what_is_no_regular_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], object], said: str
):
    make(tmp_path / "one")
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    with pytest.raises(OSError, match=said):
        open_regular(tmp_path / "one")
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_a_link_is_followed_only_if_it_may_be(tmp_path: Path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"text"
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        open_regular(tmp_path / "link", follow_links=False)


def test_a_file_is_read_up_to_its_limit(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    assert read_bytes(tmp_path / "file", 3_000_000) == b"x" * 3_000_000
    with pytest.raises(OSError, match="it has over 2999999 bytes"):
        read_bytes(tmp_path / "file", 2_999_999)


def test_bytes_are_counted_and_the_reported_size_is_not_believed(tmp_path: Path):
    assert Path("/proc/self/status").stat().st_size == 0
    assert b"VmRSS" in read_bytes("/proc/self/status", 100_000)
    with pytest.raises(OSError, match="it has over 100 bytes"):
        read_bytes("/proc/self/status", 100)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="it has over 1000 bytes"):
        read_bytes(tmp_path / "sparse", 1000)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff", b"\xff\xfe{\0}\0", b"[" * 100_000, b'{"a":' * 100_000, b"[0,0,0,0]"],
)
def test_what_is_not_json_of_a_bounded_size_is_refused(data: bytes, tmp_path: Path):
    (tmp_path / "file").write_bytes(data)
    for parse in (
        lambda: parse_json(data, most_values=200_000 if len(data) > 20 else 3),
        lambda: read_json(tmp_path / "file", most_values=3),
    ):
        with pytest.raises(ValueError):
            parse()


def test_json_is_read(tmp_path: Path):
    (tmp_path / "file").write_text('{"a": [1, "é"]}', encoding="utf-8")
    assert read_json(tmp_path / "file") == {"a": [1, "é"]}


def test_a_full_disk_is_named_with_its_file() -> None:
    with pytest.raises(MoespanError, match=r"^/dev/full cannot be written: No space left on dev"):
        write("/dev/full", "some text")
