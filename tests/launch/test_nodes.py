"""Nodes of one job, several on this machine: how they meet, watch each other, and end together."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.multiprocessing import SignalException

from moespan import LLM, cli
from moespan.config import EngineConfig, Layout, Nodes
from moespan.errors import ConfigError, LayoutError, MeetingError
from moespan.front.start import warn_if_tp_crosses_nodes
from moespan.launch import agent, meeting, watch
from moespan.launch.job import Failure, Job
from moespan.launch.meeting import Met, facts, meet
from moespan.launch.tunnel import Door
from moespan.launch.watch import NoPeers, Watch, write_first_statuses
from moespan.machine.interfaces import interface_of, interface_towards, interfaces
from moespan.parallel.beats import Beats
from tests.support import DATA

FAKE_NODE = str(Path(__file__).with_name("fake_node.py"))
DEATH_S = 30.0  # the promise is 10 s, on a machine that is not busy
SILENCE_S = 3.0
FACTS = {"torch": "1", "tp": "4"}
KEY = b"k" * 32
ENVIRONMENT = {**os.environ, "MOESPAN_CLUSTER_KEY": "a secret of the tests"}


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Threads that hang in the store when Python ends would make it crash."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("moespan"):
            thread.join(5)
            assert not thread.is_alive(), thread.name


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def job(nnodes: int = 2, **settings: Any) -> list[Nodes]:
    """The nodes of one job, as each node is configured."""
    settings = {"master_port": free_port(), "join_timeout_s": 20.0, "silence_s": 2.0, **settings}
    return [Nodes(nnodes=nnodes, node_rank=rank, **settings) for rank in range(nnodes)]


def meet_all(*parts: tuple[Nodes, dict[str, str]]) -> list[Met | str]:
    """The result on each node, all at the same time; an error as its text."""

    def run(part: tuple[Nodes, dict[str, str]]) -> Met | str:
        try:
            return meet(*part, KEY)
        except MeetingError as error:
            return str(error)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, parts))


# Settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"nnodes": 0}, "nnodes=0"),
        ({"node_rank": 1}, "node_rank=1 must be from 0 to 0"),
        ({"nnodes": 2, "node_rank": -1}, "node_rank=-1"),
        ({"master_port": 0}, "master_port=0"),
        ({"master_port": 65536}, "master_port=65536"),
        ({"join_timeout_s": 0}, "join_timeout_s=0"),
        ({"join_timeout_s": float("nan")}, "join_timeout_s=nan"),
        ({"master_addr": "0.0.0.0"}, "every network"),
        ({"master_addr": "::"}, "every network"),
        ({"master_addr": "0:0:0:0:0:0:0:0"}, "every network"),
        ({"master_addr": ""}, "every network"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Nodes(**settings)


def test_every_node_runs_equally_many_ranks() -> None:
    assert Nodes(nnodes=4).ranks_per_node(Layout(8)) == 2
    with pytest.raises(LayoutError, match="nnodes=3 does not divide the 8 ranks of tp=8"):
        Nodes(nnodes=3).ranks_per_node(Layout(8))


def test_the_meeting_point_is_written_as_in_a_url() -> None:
    assert Nodes(master_addr="10.0.0.1").meeting_point == "10.0.0.1:29500"
    assert Nodes(master_addr="fd00::1").meeting_point == "[fd00::1]:29500"


def test_node_0_warns_of_tp_that_crosses_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    warn_if_tp_crosses_nodes(Layout(tp=4, dp=2), Nodes(nnodes=2))
    warn_if_tp_crosses_nodes(Layout(tp=4), Nodes(nnodes=2, node_rank=1))
    assert capsys.readouterr().err == ""
    warn_if_tp_crosses_nodes(Layout(tp=4), Nodes(nnodes=2))
    assert capsys.readouterr().err.startswith("moespan: tp=4 crosses nodes, each with 2 of the 4")


def test_the_command_line_takes_the_names_of_vllm_and_sglang() -> None:
    words = ["generate", "M", "--prompt", "x", "--nnodes", "2", "--node-rank", "1"]
    for address in (["--master-addr", "fd00::1", "--master-port", "7"], None):
        args = cli._parser().parse_args([*words, *(address or ["--dist-init-addr", "[fd00::1]:7"])])
        assert (args.nnodes, args.node_rank) == (2, 1)
        assert (args.master_addr, args.master_port) == ("fd00::1", 7)
    with pytest.raises(SystemExit):
        cli._parser().parse_args([*words, "--dist-init-addr", "fd00"])


def test_nodes_are_refused_in_a_program_that_torchrun_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="torchrun"):
        LLM(str(DATA / "oracle" / "tiny"), tensor_parallel_size=2, nnodes=2, device="cpu")


def test_interfaces_are_found_by_address() -> None:
    assert ("lo", "127.0.0.1") in interfaces()
    assert interface_of("127.0.0.2") == "lo"
    assert interface_of("203.0.113.9") is None
    assert interface_towards("127.0.0.1") == "lo"
    for name, address in interfaces():
        assert interface_of(address) == name


# What must be equal


def test_facts_name_what_differs_but_not_where_the_checkpoint_lies(tmp_path: Path) -> None:
    folder = DATA / "oracle" / "tiny"
    config = EngineConfig(str(folder), Layout(2))
    ours = facts(config, Nodes(nnodes=2))
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    moved = dataclasses.replace(config, model=str(tmp_path), bind="off")
    assert facts(moved, Nodes(nnodes=2, node_rank=1)) == ours
    assert {"nnodes", "torch", "Python", "moespan", "moespan's source", "tp", "seed"} <= set(ours)

    def differing(**changes: Any) -> list[str]:
        theirs = facts(dataclasses.replace(moved, **changes), Nodes(nnodes=2, node_rank=1))
        return [name for name in ours if ours[name] != theirs[name]]

    assert differing(layout=Layout(4), max_num_seqs=3) == ["tp", "max_num_seqs"]
    assert differing(expert_placement=[[list(range(64))]]) == ["expert_placement"]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert differing() == ["config.json", "list of tensors"]
    (tmp_path / "model.safetensors").write_bytes((5).to_bytes(8, "little") + b"head rest")
    one = facts(moved, Nodes(nnodes=2))["list of tensors"]
    (tmp_path / "model.safetensors").write_bytes((5).to_bytes(8, "little") + b"head other")
    assert facts(moved, Nodes(nnodes=2))["list of tensors"] == one != "not there"
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")  # nobody waits for what is no file
    assert facts(moved, Nodes(nnodes=2))["list of tensors"] == "cannot be read"


# Meeting


def test_nodes_meet_on_the_address_that_was_given_and_no_other() -> None:
    nodes = job(3, master_addr="127.0.0.2")
    met = meet_all(*((node, FACTS) for node in reversed(nodes)))
    assert [m.master_addr for m in met if isinstance(m, Met)] == ["127.0.0.2"] * 3
    port = f"{nodes[0].master_port:04X}"
    listening = [
        local
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        for _, local, _, state in [line.split()[:4]]
        if state == "0A" and local.endswith(f":{port}")
    ]
    assert listening == [f"0200007F:{port}"]
    # A node that comes late, or by mistake, does not disturb the others.
    assert meet_all((nodes[1], FACTS)) == [
        f"the job at 127.0.0.2:{nodes[0].master_port} runs already, without this node: node 0 is "
        "127.0.0.2, node 1 is 127.0.0.1, node 2 is 127.0.0.1; give each node its own node_rank, "
        "and each job its own master_port"
    ]
    watches = [m.watch for m in met if isinstance(m, Met)]
    assert not any(one.must_end() for one in watches)
    for one in reversed(watches):
        one.close()


def test_all_nodes_get_all_differences() -> None:
    nodes = job(3)
    started_at = time.monotonic()
    said = meet_all(
        (nodes[0], FACTS),
        (nodes[1], {**FACTS, "torch": "2"}),
        (nodes[2], {"torch": "1", "tp": "8", "new": "x"}),
    )
    assert time.monotonic() - started_at < 10
    assert len(set(said)) == 1
    first, *differences = str(said[0]).split("\n  - ")
    assert first == "the nodes do not fit together:"
    assert sorted(differences) == [
        "new is unknown on node 0 and x on node 2 (127.0.0.1)",
        "torch is 1 on node 0 and 2 on node 1 (127.0.0.1)",
        "tp is 4 on node 0 and 8 on node 2 (127.0.0.1)",
    ]


def test_a_node_with_another_key_is_told_and_node_0_shows_it() -> None:
    nodes = job(2, join_timeout_s=3.0)
    lines: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, nodes[0], FACTS, KEY, lines.append)
        with pytest.raises(MeetingError, match="node 0 has another cluster key than this node"):
            meet(nodes[1], FACTS, b"another")
        with pytest.raises(MeetingError, match="node 1 did not come"):
            first.result()
    point = nodes[0].meeting_point
    assert f"refused 127.0.0.1 at {point}: it does not know the cluster key" in lines


def test_malformed_hellos_and_statuses_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = job(2)
    lines: list[str] = []
    doors: list[Door] = []

    def forge(gate: tuple[str, int], key: bytes) -> Door:
        """The door of a node that first writes nonsense."""
        door = Door(gate, key)
        store = PrefixStore(
            "nodes",
            TCPStore(*door.address, is_master=False, wait_for_workers=False),
        )
        store.set(f"hello/{store.add('arrivals', 1)}", b"\xff{")
        doors.append(door)
        return door

    monkeypatch.setattr(meeting, "Door", forge)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, nodes[0], FACTS, KEY, lines.append)
        second = meet(nodes[1], FACTS, KEY)
        watches = [first.result().watch, second.watch]
    assert any(line.startswith("ignored a malformed hello") for line in lines)
    store = PrefixStore(
        "nodes", TCPStore(*doors[0].address, is_master=False, wait_for_workers=False)
    )
    for data in (b"", b"{", b'{"beat": "x"}', b"[]"):
        store.set("status/1", data)
        time.sleep(0.2)
        assert not any(one.must_end() for one in watches)
    for one in reversed(watches):
        one.close()


def test_two_nodes_with_the_same_rank_are_named_to_all() -> None:
    nodes = job(3)
    said = meet_all((nodes[0], FACTS), (nodes[1], FACTS), (nodes[1], FACTS))
    assert set(said) == {
        "the nodes do not fit together:\n  - two nodes have node_rank=1: 127.0.0.1 and 127.0.0.1"
    }


@pytest.mark.parametrize("theirs", [2, 4])
def test_nodes_with_different_nnodes_get_an_error(
    theirs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "_STRAGGLERS_S", 0.5)
    port = free_port()
    ours, other = job(3, master_port=port)[0], job(theirs, master_port=port)[-1]
    started_at = time.monotonic()
    said = meet_all(
        (ours, {"nnodes": "3"}),
        (other, {"nnodes": str(theirs)}),
    )
    assert time.monotonic() - started_at < 10
    assert len(set(said)) == 1
    assert f"nnodes is 3 on node 0 and {theirs} on node {theirs - 1}" in str(said[0])


def test_a_node_that_never_joins_is_named_to_all_that_did() -> None:
    nodes = job(4, join_timeout_s=1.5)
    started_at = time.monotonic()
    said = meet_all((nodes[0], FACTS), (nodes[2], FACTS))
    assert time.monotonic() - started_at < 10
    assert (
        said
        == [
            f"nodes 1, 3 did not come to 127.0.0.1:{nodes[0].master_port} within 1.5 s; no other "
            "machine reaches 127.0.0.1, which is a loopback address"
        ]
        * 2
    )


def test_a_node_that_waits_names_the_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_PATIENCE_S", 0.2)
    for rank, missing in enumerate(("node 1", "node 0")):
        node = job(2, join_timeout_s=0.8)[rank]
        lines: list[str] = []
        with pytest.raises(MeetingError):
            meet(node, FACTS, KEY, lines.append)
        assert len(lines) == 1
        assert lines[0].startswith(f"waiting for {missing} at 127.0.0.1:{node.master_port}")


def test_a_node_0_that_cannot_be_reached_is_an_error_after_the_join_timeout() -> None:
    node = job(2, join_timeout_s=1)[1]
    started_at = time.monotonic()
    (said,) = meet_all((node, FACTS))
    assert 1 <= time.monotonic() - started_at < 10
    assert str(said).startswith(
        f"node 0 cannot be reached at 127.0.0.1:{node.master_port} within 1 s: Connection refused"
    )


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("203.0.113.9", "master_addr=203.0.113.9 is not an address of this machine"),
        ("0", "every network"),
        ("no.such.host.invalid", "names no address"),
    ],
)
def test_an_address_that_node_0_cannot_listen_on_is_an_error_at_once(
    address: str, says: str
) -> None:
    started_at = time.monotonic()
    with pytest.raises(MeetingError, match=says):
        meet(job(2, master_addr=address)[0], FACTS, KEY)
    assert time.monotonic() - started_at < 10


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_a_taken_port_is_an_error_on_both_sides(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as foreign:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connected, _ = foreign.accept()
                    kept.append(connected)
                    connected.sendall(answer)

        kept: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        nodes = job(2, master_port=foreign.getsockname()[1])
        started_at = time.monotonic()
        with pytest.raises(MeetingError, match=r"port \d+ of 127.0.0.1 is taken"):
            meet(nodes[0], FACTS, KEY)
        assert time.monotonic() - started_at < 5
        with pytest.raises(MeetingError, match="does not answer as node 0 would"):
            meet(nodes[1], FACTS, KEY)
        assert time.monotonic() - started_at < 10
        foreign.shutdown(socket.SHUT_RDWR)
        for connected in kept:
            connected.close()


def test_a_port_can_be_used_again_as_soon_as_its_job_has_ended() -> None:
    node = job(2)[0]
    with (
        meeting._listen(node) as listener,
        socket.create_connection(listener.getsockname()) as connected,
    ):
        listener.accept()[0].close()  # the side that closes first keeps the port for a minute
        assert connected.recv(1) == b""
    meeting._listen(node).close()


# Watching


class Cable:
    """A connection to the store that can be cut: calls then block, as they do on a network."""

    def __init__(self, store: TCPStore) -> None:
        self._store = store
        self.cut = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            while self.cut:
                time.sleep(0.1)
            return getattr(self._store, name)(*arguments)

        return call


class Trio:
    """Three nodes that watch each other."""

    def __init__(self) -> None:
        timeout = timedelta(seconds=5)
        self.server = TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout)
        port = self.server.port
        write_first_statuses(self.server, 3)
        self.cables = [
            Cable(TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)) for _ in range(3)
        ]
        self.watches = [
            Watch(node, cable, ["10.0.0.1", "10.0.0.2", "10.0.0.3"])
            for node, cable in zip(job(3, silence_s=1.0), self.cables, strict=True)
        ]

    def wait_for_end(self, *nodes: int) -> None:
        deadline = time.monotonic() + 5
        while not all(self.watches[node].must_end() for node in nodes):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def causes(self, *nodes: int) -> list[str]:
        """The cause of the job's end, as each of these nodes reports it."""
        with ThreadPoolExecutor(3) as pool:
            found = pool.map(lambda node: self.watches[node].first_cause(), nodes)
            return [str(failure and failure.to_error(starting=False)) for failure in found]


@pytest.fixture
def trio(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trio]:
    monkeypatch.setattr(watch, "_ENDS_S", 1.0)
    monkeypatch.setattr(watch, "_SUSPECT_S", 0.5)
    monkeypatch.setattr(watch, "_LEAVE_S", 0.5)
    nodes = Trio()
    yield nodes
    for cable in nodes.cables:
        cable.cut = False
    for one in reversed(nodes.watches):
        one.close()


KILLED = Failure(rank=5, kind="", message="was killed by SIGKILL")
MISSED = Failure(rank=1, kind="RuntimeError", message="gloo: closed by peer", lost_peer=True)


def test_nodes_that_end_well_have_no_cause(trio: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_LEAVE_S", 30.0)
    time.sleep(0.3)
    for node in trio.watches:
        assert not node.must_end()
        node.report(None)
    assert trio.causes(0, 1, 2) == ["None"] * 3
    started_at = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(Watch.close, trio.watches))
    for node in trio.watches:
        node.close()
    assert time.monotonic() - started_at < 10


def test_the_cause_comes_before_what_followed_on_other_nodes(trio: Trio) -> None:
    trio.watches[0].report(MISSED)
    time.sleep(0.3)
    trio.watches[1].report(KILLED)
    trio.wait_for_end(0, 1, 2)
    trio.watches[2].report(None)
    assert trio.causes(0, 1, 2) == ["node 1, rank 5 was killed by SIGKILL"] * 3


def test_the_first_of_two_causes_is_named(trio: Trio) -> None:
    trio.watches[2].report(KILLED)
    time.sleep(0.3)
    trio.watches[1].report(msgspec.structs.replace(KILLED, rank=3))
    trio.watches[0].report(None)
    assert trio.causes(0, 1, 2) == ["node 2, rank 5 was killed by SIGKILL"] * 3


def test_a_node_that_is_silent_is_lost(trio: Trio) -> None:
    time.sleep(0.2)
    trio.cables[2].cut = True
    trio.wait_for_end(0, 1, 2)
    for node in trio.watches:
        node.report(None)
    assert trio.causes(0, 1) == ["node 2 (10.0.0.3) has not been heard from for 1 s"] * 2
    (alone,) = trio.causes(2)
    assert alone == "node 0 (10.0.0.1) has not been heard from for 1 s"
    started_at = time.monotonic()
    trio.watches[0].close()
    assert time.monotonic() - started_at < 10


def test_a_node_that_is_silent_at_the_end_is_the_cause_of_lost_peers(trio: Trio) -> None:
    time.sleep(0.2)
    trio.cables[2].cut = True
    trio.watches[0].report(MISSED)
    trio.watches[1].report(None)
    (cause,) = trio.causes(0)
    says = "node 2 (10.0.0.3) has not been heard from for 1 s\nnode 0, rank 1: gloo: closed by peer"
    assert cause == says.replace("rank 1:", "rank 1")


def test_a_lost_peer_is_the_cause_if_there_is_no_better_one(trio: Trio) -> None:
    trio.watches[0].report(MISSED)
    trio.wait_for_end(1, 2)
    trio.watches[1].report(None)
    trio.watches[2].report(None)
    assert trio.causes(0, 1, 2) == ["node 0, rank 1 gloo: closed by peer"] * 3


def test_the_end_of_the_store_is_the_end_of_node_0(trio: Trio) -> None:
    del trio.server
    trio.cables[0].cut = True
    trio.wait_for_end(1, 2)
    trio.watches[1].report(None)
    assert trio.causes(1) == ["node 0 (10.0.0.1) has gone: its agent closed the connection"]


def test_once_the_end_is_announced_it_is_no_failure_to_miss_a_peer(trio: Trio) -> None:
    trio.watches[0].announce()
    trio.watches[0].report(None)
    trio.watches[1].report(MISSED)
    trio.cables[2].cut = True
    assert trio.causes(0, 1) == ["None"] * 2
    trio.watches[1].report(KILLED)
    assert trio.causes(1) == ["node 1, rank 5 was killed by SIGKILL"]


def test_ranks_that_run_on_after_node_0_ended_well_are_named(trio: Trio) -> None:
    trio.watches[0].announce()
    for node in (0, 2):
        trio.watches[node].report(None)
    trio.watches[0].close()
    trio.cables[0].cut = True
    trio.wait_for_end(1)
    trio.watches[1].report(None)
    (cause,) = trio.causes(1)
    assert cause == "node 1 (10.0.0.2) has ranks that run on 1 s after those of node 0 ended"


@pytest.mark.parametrize("announced", [False, True])
def test_a_signal_after_the_front_has_announced_the_end_is_no_failure(
    announced: bool, trio: Trio, tmp_path: Path
) -> None:
    monitored = Job(tmp_path)
    (tmp_path / "beats").write_bytes(bytes(Beats.size_bytes(1)))
    if announced:
        monitored.beats().announce_end()
    refused = contextlib.nullcontext() if announced else pytest.raises(SignalException)
    with refused, agent._reported_to_peers(trio.watches[0], os.getppid(), monitored):
        raise SignalException("stopped", signal.SIGTERM)
    trio.watches[1].report(MISSED)
    assert trio.causes(1) == ["None" if announced else "node 0 was ended by SIGTERM"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_comes_inside_a_destructor_ends_the_agent_at_its_next_look() -> None:
    class Destroyed:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    stop = agent._Stop()
    stop.check()
    before = signal.signal(signal.SIGTERM, stop.take)
    try:
        Destroyed()
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(SignalException):
        stop.check()


def test_one_node_has_only_its_own_failures() -> None:
    alone = NoPeers()
    alone.report(KILLED)
    assert not alone.must_end()
    assert alone.first_cause() is KILLED
    assert str(KILLED.to_error(False)) == "rank 5 was killed by SIGKILL"


# Whole nodes, each with its front, agent and ranks


class Pair:
    """Two nodes, each with one rank of the fake engine."""

    def __init__(self, model: str = "fake") -> None:
        nodes = job(2, master_addr="127.0.0.2", silence_s=SILENCE_S)
        self.port = nodes[0].master_port
        self.fronts = [
            subprocess.Popen(
                [sys.executable, FAKE_NODE, msgspec.json.encode(node).decode(), "2", model],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=ENVIRONMENT,
            )
            for node in nodes
        ]

    def ready(self) -> Pair:
        assert self.line() == "ready"
        return self

    def ask(self, request: str) -> None:
        assert self.fronts[0].stdin is not None
        self.fronts[0].stdin.write(f"{request}\n")
        self.fronts[0].stdin.flush()

    def line(self) -> str:
        assert self.fronts[0].stdout is not None
        return self.fronts[0].stdout.readline().strip()

    def agent(self, node: int) -> int:
        (agent,) = children(self.fronts[node].pid)
        return agent

    def ends(self, within_s: float) -> list[tuple[int, str]]:
        """Exit code of each node, and its output except lines about waiting and joining."""
        deadline = time.monotonic() + within_s
        ends = []
        for front in self.fronts:
            _, said = front.communicate(timeout=max(0.1, deadline - time.monotonic()))
            words = [line for line in said.splitlines() if not line.startswith("moespan: ")]
            joined = [line for line in said.splitlines() if line.startswith("moespan: node")]
            assert len(joined) == (front is not self.fronts[0])
            ends.append((front.returncode, "\n".join(words)))
        return ends

    def close(self) -> None:
        for front in self.fronts:
            front.kill()
            front.communicate()


@pytest.fixture(scope="module")
def pairs(request: pytest.FixtureRequest) -> Iterator[Iterator[Pair]]:
    """A pair for each test that needs one. It starts while the previous test waits."""
    wanted = sum("pair" in getattr(item, "fixturenames", ()) for item in request.session.items)
    with contextlib.ExitStack() as cleanup:

        def supply() -> Iterator[Pair]:
            following = Pair()
            for left in reversed(range(wanted)):
                nodes = following
                cleanup.callback(nodes.close)
                if left:
                    following = Pair()
                yield nodes

        yield supply()


@pytest.fixture
def pair(pairs: Iterator[Pair]) -> Iterator[Pair]:
    with contextlib.closing(next(pairs)) as nodes:
        yield nodes


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]


def wait_until_gone(pids: list[int], limit_s: float = DEATH_S) -> None:
    """Wait until all of them have ended."""
    deadline = time.monotonic() + limit_s
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether it runs: one that its parent has not waited for does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_two_nodes_answer_and_end_well(pair: Pair) -> None:
    pair.ready().ask("one")
    assert pair.line() == "[3, 1, 4]"
    for node in (0, 1):
        (rank,) = children(pair.agent(node))
        environment = Path(f"/proc/{rank}/environ").read_text().split("\0")
        told = dict(entry.split("=", 1) for entry in environment if "=" in entry)
        assert told["RANK"] == told["GROUP_RANK"] == str(node)
        assert (told["LOCAL_RANK"], told["WORLD_SIZE"]) == ("0", "2")
        assert told["GLOO_SOCKET_IFNAME"] == "lo"
    started_at = time.monotonic()
    assert pair.ends(DEATH_S) == [(0, ""), (0, "")]
    assert time.monotonic() - started_at < 10


def test_a_dead_rank_ends_both_nodes_and_both_name_it(pair: Pair) -> None:
    pair.ready().ask("sigkill@1")
    words = "EngineDeadError: node 1, rank 1 was killed by SIGKILL from outside"
    assert pair.ends(DEATH_S) == [(1, words), (1, words)]


@pytest.mark.parametrize(
    ("victim", "says"),
    [
        (0, ("EngineDeadError: the agent", "EngineDeadError: node 0 (127.0.0.2) has gone")),
        (1, ("EngineDeadError: node 1 (127.0.0.1) has not", "EngineDeadError: the agent")),
    ],
)
def test_a_killed_agent_ends_both_nodes(pair: Pair, victim: int, says: tuple[str, str]) -> None:
    pair.ready()
    agent = pair.agent(victim)
    ranks = children(agent)
    os.kill(agent, signal.SIGKILL)
    wait_until_gone(ranks)
    pair.ask("one")
    for (code, words), said in zip(pair.ends(DEATH_S + SILENCE_S), says, strict=True):
        assert code == 1
        assert words.startswith(said)


def test_a_stopped_rank_ends_both_nodes_and_both_name_it(pair: Pair) -> None:
    pair.ready().ask("one")
    assert pair.line() == "[3, 1, 4]"
    pair.ask("sigstop@1")
    words = "EngineDeadError: node 1, rank 1 is stopped (SIGSTOP or a debugger) in step 2"
    for code, said in pair.ends(DEATH_S):
        assert (code, said.splitlines()[0]) == (1, words)


def test_a_stopped_agent_ends_both_nodes_and_each_names_what_it_knows(pair: Pair) -> None:
    pair.ready()
    agent = pair.agent(1)
    both = [pair.agent(0), agent]
    os.kill(agent, signal.SIGSTOP)
    wait_until_gone(both, 2 * DEATH_S)
    pair.ask("one")
    (_, first), (_, second) = ends = pair.ends(2 * DEATH_S)
    assert [code for code, _ in ends] == [1, 1]
    assert first == "EngineDeadError: node 1 (127.0.0.1) has not been heard from for 3 s"
    assert second == (
        f"EngineDeadError: node 1, the agent that watches the ranks (process {agent}) is stopped "
        "(SIGSTOP or a debugger)"
    )


def test_a_step_that_hangs_on_another_node_is_named_on_both_with_all_stacks(pair: Pair) -> None:
    pair.ready().ask("one")
    assert pair.line() == "[3, 1, 4]"
    pair.ask("sleep@1")
    for code, words in pair.ends(2 * DEATH_S):
        assert code == 1
        first, *lines = words.splitlines()
        assert first == (
            "EngineDeadError: node 1, rank 1 hangs in step 2: no rank has got further for 3 s "
            "(--step-timeout)"
        )
        assert "  rank 0: in step 2, in all_reduce over tp (fake), waits for rank 1" in lines
        assert {"rank 0 meanwhile:", "rank 1 meanwhile:"} <= set(lines)


def test_strangers_at_the_meeting_point_do_not_end_the_job(pair: Pair) -> None:
    pair.ready()
    forged = msgspec.json.encode(watch.Status(ended=True, failure=KILLED))
    for data in (b"", b"\0" * 64, b"\xff" * 5000, forged * 100, b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.2", pair.port), 10) as stranger:
            stranger.sendall(data)
    with pytest.raises(RuntimeError):
        TCPStore("127.0.0.2", pair.port, is_master=False, timeout=timedelta(seconds=1))
    pair.ask("one")
    assert pair.line() == "[3, 1, 4]"
    assert pair.ends(DEATH_S) == [(0, ""), (0, "")]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_front_ends_the_other_node(pair: Pair, victim: int) -> None:
    pair.ready()
    agents = [pair.agent(node) for node in (0, 1)]
    pair.fronts[victim].kill()
    wait_until_gone(agents)
    if victim == 1:
        pair.ask("one")
    code, words = pair.ends(DEATH_S)[1 - victim]
    assert (code, words) == (1, f"EngineDeadError: node {victim} lost its front")


def test_an_error_while_loading_keeps_its_class_on_both_nodes() -> None:
    with contextlib.closing(Pair("load-error@1")) as pair:
        ends = pair.ends(DEATH_S + 20)
    for code, words in ends:
        assert code == 1
        # Gloo reports a rank that is lost while others connect to it.
        said = "\n".join(line for line in words.splitlines() if "ProcessGroupGloo" not in line)
        assert said.startswith("CheckpointError: node 1, rank 1: the fake checkpoint is broken")


def leftovers(folder: Path) -> list[str]:
    """Names of what jobs have left behind."""
    return [path.name for path in folder.iterdir() if path.name.startswith("moespan-")]


def test_nodes_live_on_after_a_failure_until_node_0_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "TMPDIR", str(tmp_path))
    with contextlib.closing(Pair("lives")) as pair:
        pair.ready().ask("sigkill@1")
        assert pair.line() == "node 1, rank 1 was killed by SIGKILL from outside"
        agents = [front.pid for front in pair.fronts]
        pair.ask("again")
        pair.ready().ask("one")
        assert pair.line() == "[3, 1, 4]"
        assert [front.pid for front in pair.fronts] == agents
        ranks = children(pair.agent(0))
        os.kill(pair.agent(0), signal.SIGKILL)
        assert "the agent that watches the ranks" in pair.line()
        assert not any(map(is_alive, ranks))
        pair.ask("end it died twice")
        _, second = (front.communicate(timeout=60) for front in pair.fronts)
        assert [front.returncode for front in pair.fronts] == [0, 1]
    assert second[1].splitlines()[-1] == "JobOverError: it died twice"
    assert "this node waits for node 0 to start the ranks again" in second[1]
    assert leftovers(tmp_path) == []


def test_a_node_of_a_server_ends_with_node_0_and_not_at_the_first_sigterm() -> None:
    with contextlib.closing(Pair("lives")) as pair:
        pair.ready().fronts[1].send_signal(signal.SIGTERM)
        pair.ask("one")
        assert pair.line() == "[3, 1, 4]"
        for front in pair.fronts:
            _, said = front.communicate(timeout=60)
            assert (front.returncode, "Error" in said) == (0, False)


def test_a_node_that_gets_a_signal_names_it(pair: Pair) -> None:
    pair.ready()
    agents = [pair.agent(node) for node in (0, 1)]
    pair.fronts[1].send_signal(signal.SIGINT)
    wait_until_gone(agents)
    pair.ask("one")
    (code, words), _ = pair.ends(DEATH_S)
    assert (code, words) == (1, "EngineDeadError: node 1 was ended by SIGTERM")
