"""Jobs on two hosts: network namespaces with a cable between them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from moespan.config.nodes import Nodes
from tests.launch.netns import Host, two_hosts
from tests.support import DATA

ORACLE = DATA / "oracle" / "tiny"
DEATH_S = 30.0  # the promise is 10 s, on a machine that is not busy
SILENCE_S = Nodes().silence_s
PORT = "29500"
ENVIRONMENT = {**os.environ, "MOESPAN_CLUSTER_KEY": "a secret of the tests"}


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


def start(hosts: tuple[Host, Host], verb: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """The same command on both hosts, one rank on each."""
    command = ["-m", "moespan", verb, str(ORACLE), "--device", "cpu"]
    where = ["--nnodes", "2", "--dist-init-addr", f"{hosts[0].address}:{PORT}"]
    return [
        host.start(*command, *where, "--node-rank", str(rank), *arguments, env=ENVIRONMENT)
        for rank, host in enumerate(hosts)
    ]


def start_batch(hosts: tuple[Host, Host], folder: Path) -> list[subprocess.Popen[str]]:
    """A batch that takes minutes; returns after its first answers."""
    prompts, output = folder / "prompts.jsonl", folder / "answers.jsonl"
    prompts.write_text('{"prompt": [5, 6, 7]}\n' * 10_000)
    files = ("--input", str(prompts), "--output", str(output))
    fronts = start(hosts, "generate", "-tp", "2", *files, "--quiet")
    deadline = time.monotonic() + 60
    while not output.exists() or not output.read_text():
        assert time.monotonic() < deadline
        assert [front.poll() for front in fronts] == [None, None]
        time.sleep(0.1)
    return fronts


def ends(fronts: list[subprocess.Popen[str]], within_s: float) -> list[tuple[int, str]]:
    """Exit code and last line of each."""
    deadline = time.monotonic() + within_s
    found = []
    for front in fronts:
        _, said = front.communicate(timeout=max(0.1, deadline - time.monotonic()))
        found.append((front.returncode, said.splitlines()[-1]))
    return found


def kill_a_rank(folder: Path) -> None:
    with two_hosts() as hosts:
        fronts = start_batch(hosts, folder)
        inside = "127.0.0.1"  # of the store, and of the door to it
        assert [host.listeners() for host in hosts] == [{host.address, inside} for host in hosts]
        (rank,) = hosts[1].processes("moespan.launch.rank /")
        os.kill(rank, signal.SIGKILL)
        words = "moespan: node 1, rank 1 was killed by SIGKILL from outside"
        assert ends(fronts, DEATH_S) == [(1, words), (1, words)]
        assert [host.processes() for host in hosts] == [[], []]
    assert (folder / "answers.jsonl").read_text().endswith("}\n")


def cut_the_cable(folder: Path) -> None:
    with two_hosts() as hosts:
        fronts = start_batch(hosts, folder)
        hosts[0].pull_cable()
        found = ends(fronts, SILENCE_S + DEATH_S)
        for (code, words), other in zip(found, (1, 0), strict=True):
            name = f"node {other} ({hosts[other].address})"
            assert (code, words) == (
                1,
                f"moespan: {name} has not been heard from for {SILENCE_S:g} s",
            )
        assert [host.processes() for host in hosts] == [[], []]
    assert (folder / "answers.jsonl").read_text().endswith("}\n")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[None]]]:
    """Batches that fail, each on hosts of its own. They wait while other tests run."""
    with ThreadPoolExecutor() as pool:
        yield {
            how.__name__: pool.submit(how, tmp_path_factory.mktemp("batch"))
            for how in (kill_a_rank, cut_the_cable)
        }


def test_a_killed_rank_is_named_on_both_hosts(ended: dict[str, Future[None]]) -> None:
    ended["kill_a_rank"].result()


def test_every_layout_of_two_hosts_computes_what_one_rank_does(hosts: tuple[Host, Host]) -> None:
    reference = ORACLE / "ref" / "ref_logits.safetensors"
    fronts = start(
        hosts,
        "verify",
        *("--reference", str(reference), "--dtype", "float32", "--all-layouts", "2"),
    )
    outputs = [front.communicate(timeout=120) for front in fronts]
    assert [front.returncode for front in fronts] == [0, 0], outputs
    (report, _), (nothing, joined) = outputs
    assert report.endswith("all passed\n")
    assert nothing == ""
    assert joined == (
        f"moespan: node 1 of 2 ({hosts[1].address}, eth0) joined {hosts[0].address}:{PORT} "
        "with rank 1\n"
    )


# The host without the leader exits inside LLM(...).
TWO_RANKS_EACH = """
import sys
from moespan import LLM
from moespan.config import Layout
from moespan.measure.verify import Reference, verify

folder, address, node_rank = sys.argv[1:]
reference = Reference(folder + "/ref/ref_logits.safetensors")
nodes = {"nnodes": 2, "node_rank": int(node_rank), "master_addr": address}
layouts = [Layout(tp=2, pp=2), Layout(tp=2, dp=2, ep=4)]
with LLM(folder, tensor_parallel_size=4, device="cpu", dtype="float32", **nodes) as llm:
    for layout in layouts:
        for dispatch in layout.dispatches:
            llm.relayout(layout, dispatch)
            report = verify(llm, reference)
            print(layout, dispatch, *(report.failures or ["passed"]))
"""


def test_two_ranks_on_each_of_two_hosts_compute_what_one_rank_does(
    hosts: tuple[Host, Host],
) -> None:
    arguments = ["-c", TWO_RANKS_EACH, str(DATA / "oracle" / "sixteen"), hosts[0].address]
    fronts = [host.start(*arguments, str(rank), env=ENVIRONMENT) for rank, host in enumerate(hosts)]
    outputs = [front.communicate(timeout=240) for front in fronts]
    assert [front.returncode for front in fronts] == [0, 0], outputs
    assert outputs[0][0].splitlines() == [
        "tp=2×pp=2 replicated passed",
        "tp=2×ep=4×dp=2 all_gather passed",
        "tp=2×ep=4×dp=2 all_to_all passed",
    ]


def test_a_cut_cable_ends_both_hosts_and_each_names_the_other(
    ended: dict[str, Future[None]],
) -> None:
    ended["cut_the_cable"].result()
