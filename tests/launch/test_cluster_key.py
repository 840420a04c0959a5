"""Where the secret of a job comes from."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moespan import cli
from moespan.cli.flags import settings_of
from moespan.config import Nodes
from moespan.errors import ConfigError, MeetingError
from moespan.launch.cluster_key import KEY_VARIABLE, cluster_key

SECRET = "a secret of sixteen or more"


def key(node_rank: int = 0, environ: dict[str, str] | None = None, **options: Any) -> bytes:
    nodes = Nodes(nnodes=2, node_rank=node_rank, join_timeout_s=0.5, **options)
    return cluster_key(nodes, lambda line: None, environ or {})


def test_node_0_makes_a_key_and_shows_how_to_use_it() -> None:
    lines: list[str] = []
    made = [cluster_key(Nodes(nnodes=2), lines.append, {}) for _ in range(2)]
    assert made[0] != made[1]
    for line, one in zip(lines, made, strict=True):
        shown = line.partition(f"{KEY_VARIABLE}=")[2].split()[0]
        assert line.startswith(f"the cluster key of this job is {shown};")
        assert key(1, {KEY_VARIABLE: shown}) == one


def test_another_node_without_a_key_is_told_where_to_find_it() -> None:
    with pytest.raises(ConfigError) as caught:
        key(1)
    for word in (KEY_VARIABLE, "node 0", "--cluster-key-file", "--no-cluster-key"):
        assert word in str(caught.value)


def test_all_nodes_take_the_key_of_the_environment() -> None:
    assert key(0, {KEY_VARIABLE: SECRET}) == key(1, {KEY_VARIABLE: f" {SECRET}\n"})
    assert key(0, {KEY_VARIABLE: SECRET}) != key(0, {KEY_VARIABLE: SECRET.upper()})
    assert len(key(0, {KEY_VARIABLE: SECRET})) == 32


def test_without_a_key_only_on_purpose() -> None:
    off = key(0, {KEY_VARIABLE: SECRET}, no_cluster_key=True)
    assert off == key(1, no_cluster_key=True)
    assert off != key(0, {KEY_VARIABLE: SECRET})
    with pytest.raises(ConfigError, match="contradict"):
        Nodes(no_cluster_key=True, cluster_key_file="x")


def test_node_0_makes_the_file_and_the_others_wait_for_it(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with ThreadPoolExecutor() as pool:
        nodes = [
            Nodes(nnodes=3, node_rank=rank, join_timeout_s=30.0, cluster_key_file=str(path))
            for rank in (2, 1, 0)
        ]
        found = set(pool.map(lambda node: cluster_key(node, lambda line: None, {}), nodes))
    assert len(found) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    assert {key(0, {KEY_VARIABLE: SECRET}, cluster_key_file=str(path))} == found


def test_a_file_that_never_comes_is_named(tmp_path: Path) -> None:
    with pytest.raises(MeetingError, match=r"key is missing or empty on this node; node 0 makes"):
        key(1, cluster_key_file=str(tmp_path / "key"))
    with pytest.raises(ConfigError, match="No such file"):
        key(0, cluster_key_file=str(tmp_path / "none" / "key"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    path.write_text(SECRET)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="by others; chmod 600"):
        key(0, cluster_key_file=str(path))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"short", "has 5 characters, and must have from 16 to 4096"),
        (b"x" * 5000, "has 4097 characters"),
        (b"\xff" * 40, "is not a text"),
    ],
)
def test_a_file_with_anything_else_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    for node in (0, 1):
        with pytest.raises(ConfigError, match=says):
            key(node, cluster_key_file=str(path))


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(ConfigError, match=r"not a regular file|Is a directory"):
            key(0, cluster_key_file=str(path))


def test_a_short_key_of_the_environment_is_refused_without_being_shown() -> None:
    with pytest.raises(ConfigError, match="in MOESPAN_CLUSTER_KEY has 6 characters") as caught:
        key(1, {KEY_VARIABLE: "hunter"})
    assert "hunter" not in str(caught.value)


def test_the_flags_reach_the_nodes() -> None:
    words = ["generate", "M", "--prompt", "x", "--nnodes", "2"]
    parse = cli._parser().parse_args
    assert settings_of(parse([*words, "--cluster-key-file", "f"])).cluster_key_file == "f"
    assert settings_of(parse([*words, "--no-cluster-key"])).no_cluster_key
    assert not settings_of(parse(words)).no_cluster_key
