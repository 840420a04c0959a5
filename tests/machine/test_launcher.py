"""The variables of a launcher: what makes this process a rank, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moespan.errors import ConfigError
from moespan.machine.interfaces import interfaces, wrong_interface
from moespan.machine.launcher import Launched, is_launched, launched
from tests.support import QUICKSTART

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_the_ranks_of_a_launcher_are_known() -> None:
    assert launched(TORCHRUN) == Launched(3, 4, 1, 2)
    assert launched({**TORCHRUN, "LOCAL_WORLD_SIZE": ""}) == Launched(3, 4, 1, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": " "},
        {"RANK": ""},
        {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""},
        {"WORLD_SIZE": "1", "LOCAL_RANK": ""},
        {"WORLD_SIZE": "0"},
    ],
)
def test_empty_variables_and_a_world_of_one_mean_no_launcher(changes: dict[str, str]) -> None:
    assert launched({**TORCHRUN, **changes}) is None
    assert launched({}) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"LOCAL_RANK": ""}, r"RANK=3 and WORLD_SIZE=4 .* LOCAL_RANK is not set; .* torchrun"),
        ({"LOCAL_RANK": "", "MASTER_PORT": ""}, "LOCAL_RANK and MASTER_PORT are not set"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many' is not a number"),
        ({"RANK": "-1"}, "RANK='-1' is not a number"),
        ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK='1.5' is not a number"),
        ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE='two' is not a number"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='9{40}' is not a number"),
    ],
)
def test_half_a_launcher_is_one_error(changes: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        launched({**TORCHRUN, **changes})


FOUND = [("lo", "127.0.0.1"), ("eth0", "10.0.0.1"), ("lo", "::1"), ("br-1", "10.1.0.1")]


@pytest.mark.parametrize("value", ["", "l", "lo", "eth0", "eth0,br-1"])
def test_interfaces_that_exist_are_taken(value: str) -> None:
    assert wrong_interface(value, FOUND) == ""


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("eth9", "GLOO_SOCKET_IFNAME='eth9' names 'eth9', which no interface with an address is"),
        ("eth0,eth9", "names 'eth9'"),
        ("eth0,", "names ''"),
        ("^lo,docker", "names '^lo', which no interface with an address is called, and Gloo takes"),
        ("=eth0", "Gloo takes plain names only; this machine has lo, eth0, br-1"),
    ],
)
def test_interfaces_that_do_not_exist_are_named(value: str, says: str) -> None:
    assert says in wrong_interface(value, FOUND)


def generate(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    return subprocess.run(
        [
            *(sys.executable, "-m", "moespan", "generate", str(QUICKSTART), "--quiet"),
            *("--device", "cpu", "--prompt", "681+734=", *arguments),
        ],
        env={**environ, **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_wrong_interface_is_one_line_of_the_command() -> None:
    done = generate("-tp", "2", GLOO_SOCKET_IFNAME="^lo,docker")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("moespan: ")  # and the rank that found it first, unless it is rank 0
    assert "GLOO_SOCKET_IFNAME='^lo,docker' names '^lo'" in line
    assert line.endswith("unset it: moespan finds the interface itself")
    assert all(name in line for name, _ in interfaces())


def test_half_a_launcher_is_one_line_of_the_command() -> None:
    done = generate("-tp", "2", RANK="0", WORLD_SIZE="2", MASTER_ADDR="::1", MASTER_PORT="29577")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("moespan: rank 0: RANK=0 and WORLD_SIZE=2")


def test_an_empty_world_size_is_none() -> None:
    done = generate(RANK="0", WORLD_SIZE="")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1415" in done.stdout


@pytest.mark.parametrize(
    ("environ", "is_one"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "0", "WORLD_SIZE": "1"}, False),
        ({"RANK": "", "WORLD_SIZE": "2"}, False),
        ({"RANK": "0", "WORLD_SIZE": ""}, False),
        ({"RANK": "0", "WORLD_SIZE": "x"}, False),
        ({}, False),
    ],
)
def test_empty_variables_and_words_are_no_launcher(environ: dict[str, str], is_one: bool) -> None:
    assert is_launched(environ) is is_one
