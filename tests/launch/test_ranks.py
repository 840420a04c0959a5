"""Real ranks with a fake engine: started, talked to, killed, and gone without a trace."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from moespan.config import EngineConfig, Layout
from moespan.engine.questions import Stats, Trace, Traffic
from moespan.engine.request import OutputDelta, Request, SamplingParams
from moespan.errors import CheckpointError, EngineDeadError, RequestError
from moespan.launch import stall
from moespan.launch.job import FRONT_DIED, Failure
from moespan.launch.ranks import RanksClient

FAKE_RANK = str(Path(__file__).with_name("fake_rank.py"))
DEATH_S = 30.0  # the promise is 10 s, on a machine that is not busy
ANSWER_S = 1.5  # of the fake engine, to `Traffic`


def start(
    model: str = "fake",
    *,
    ranks: int = 2,
    collective_timeout_s: int | None = None,
    step_timeout_s: float = 120.0,
) -> RanksClient:
    program = [FAKE_RANK, *([] if collective_timeout_s is None else [str(collective_timeout_s)])]
    config = EngineConfig(model, Layout(tp=ranks), step_timeout_s=step_timeout_s)
    return RanksClient(config, start_timeout_s=60, program=program)


def request(request_id: str, n: int = 1) -> Request:
    params = SamplingParams(n=n)
    return Request(id=request_id, prompt_token_ids=[3, 1, 4], params=params)


def warmed(client: RanksClient) -> RanksClient:
    """The client once all ranks have ended their first step, which may last longer than later ones.

    The leader answers as soon as its own part of the step has ended.
    """
    client.add(request("one"))
    assert client.receive(30) == [echo("one")]
    deadline = time.monotonic() + 30
    while {str(place) for place in client.places()} != {"idle after step 1"}:
        assert time.monotonic() < deadline, client.places()
        time.sleep(0.01)
    return client


def echo(request_id: str) -> OutputDelta:
    return OutputDelta(id=request_id, token_ids=[3, 1, 4], finish_reason="stop")


def descendants(pid: int) -> set[int]:
    """`pid` and all processes below it."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(entry.parent.name)] = int(fields[1])
    found = {pid}
    while below := {child for child, parent in parents.items() if parent in found} - found:
        found |= below
    return found


def alive(pids: set[int]) -> set[int]:
    """The running ones among `pids`, and zombies that this process has not waited for."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z" or int(parent) == os.getpid():
                found.add(pid)
    return found


def wait_until_gone(pids: set[int], limit_s: float) -> set[int]:
    deadline = time.monotonic() + limit_s
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive(pids)


def death_of(client: RanksClient, request_id: str, hangs_s: float = 0) -> str:
    """The client's error after the deed of a rank; it must come in time and leave nothing."""
    processes = descendants(client._agent.pid)
    asked_at = time.monotonic()
    with client:
        client.add(request(request_id))
        with pytest.raises(EngineDeadError) as caught:
            client.receive(60)
        assert time.monotonic() - asked_at < DEATH_S + hangs_s
        with pytest.raises(EngineDeadError):
            client.add(request("late"))
    assert wait_until_gone(processes, 5) == set()
    assert not client._agent.job.directory.exists()
    return str(caught.value)


@pytest.fixture(scope="module")
def client() -> Iterator[RanksClient]:
    """Two ranks, started by a thread that has ended since."""
    clients: list[RanksClient] = []
    thread = threading.Thread(target=lambda: clients.append(start()))
    thread.start()
    thread.join()
    with clients[0] as client:
        yield client


def test_requests_are_answered_by_both_ranks(client: RanksClient) -> None:
    assert client.info.layout == Layout(tp=2)
    for number in range(20):
        client.add(request(str(number)))
    deltas: list[OutputDelta] = []
    while len(deltas) < 20:
        deltas += client.receive(10)
    assert deltas == [echo(str(number)) for number in range(20)]
    assert client.receive(0.1) == []


def test_threads_add_while_another_receives(client: RanksClient) -> None:
    ids = [str(number) for number in range(12)]
    threads = [threading.Thread(target=client.add, args=[request(name)]) for name in ids]

    def start_all() -> None:
        for thread in threads:
            thread.start()

    timer = threading.Timer(0.3, start_all)
    timer.start()
    deltas = client.receive()  # waits before anything is asked
    while len(deltas) < 12:
        deltas += client.receive(10)
    assert sorted(delta.id for delta in deltas) == sorted(ids)


def test_a_refused_request_comes_back_as_error_and_the_engine_goes_on(client: RanksClient) -> None:
    client.add(request("bad", n=2), request("good"))
    refused = [
        OutputDelta(id="bad", index=index, finish_reason="error", error="this prompt is refused")
        for index in range(2)
    ]
    deltas: list[OutputDelta] = []
    while len(deltas) < 3:
        deltas += client.receive(10)
    assert deltas == [*refused, echo("good")]


def test_an_aborted_request_brings_no_delta(client: RanksClient) -> None:
    client.abort("unknown")
    client.add(request("kept"))
    assert client.receive(10) == [echo("kept")]


def test_deltas_that_come_during_a_question_are_kept_for_receive(client: RanksClient) -> None:
    for number in range(20):
        client.add(request(str(number)))
    assert client.ask(Stats()).num_waiting <= 20
    assert client.ask(Traffic()) == [[("fake", "send", "nothing", 0, 0)]]
    deltas: list[OutputDelta] = []
    while len(deltas) < 20:
        deltas += client.receive(10)
    assert deltas == [echo(str(number)) for number in range(20)]
    assert client.receive(0) == []


def test_threads_ask_while_another_receives(client: RanksClient) -> None:
    deltas: list[OutputDelta] = []

    def receive() -> None:
        while len(deltas) < 30:
            deltas.extend(client.receive(10))

    receiver = threading.Thread(target=receive)
    receiver.start()
    with ThreadPoolExecutor(6) as pool:
        for number in range(30):
            client.add(request(str(number)))
        answers = [pool.submit(client.ask, Stats()) for _ in range(60)]
        slow = pool.submit(client.ask, Traffic())
        assert all(answer.result(30).kv_usage == 0.0 for answer in answers)
        assert slow.result(30) == [[("fake", "send", "nothing", 0, 0)]]
    receiver.join(30)
    assert deltas == [echo(str(number)) for number in range(30)]
    assert not client._answers


def test_receive_keeps_its_timeout_while_another_thread_reads_for_it(client: RanksClient) -> None:
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(client.ask, Traffic())
        while not client._is_being_read:
            time.sleep(0.01)
        started = time.monotonic()
        assert client.receive(0.1) == []
        assert time.monotonic() - started < ANSWER_S
        assert asked.result(30)


def test_a_refused_question_raises_and_the_engine_goes_on(client: RanksClient) -> None:
    with pytest.raises(RequestError, match="this trace is refused"):
        client.ask(Trace([1]))
    assert client.ask(Stats()).num_waiting == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_that_closes_its_copy_leaves_the_ranks_alone(client: RanksClient) -> None:
    child = os.fork()
    if not child:
        signal.alarm(60)  # so that a child that hangs ends
        client.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    client.add(request("after"))
    assert client.receive(30) == [echo("after")]


def test_only_the_owner_may_enter_the_jobs_directory(client: RanksClient) -> None:
    assert stat.S_IMODE(client._agent.job.directory.stat().st_mode) == 0o700


def test_no_socket_listens_on_all_interfaces(client: RanksClient) -> None:
    sockets = {
        str(entry.readlink())
        for pid in descendants(client._agent.pid)
        for entry in Path(f"/proc/{pid}/fd").iterdir()
    }
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                listening.add(local.partition(":")[0])
    assert listening <= {"0100007F", "00000000000000000000000001000000"}  # 127.0.0.1 and ::1


def test_closing_leaves_no_process_and_no_directory(client: RanksClient) -> None:
    processes = descendants(client._agent.pid)

    def receive_until_closed() -> None:
        with pytest.raises(EngineDeadError, match="closed"):
            client.receive()

    waiting = threading.Thread(target=receive_until_closed)
    waiting.start()
    client.close()
    client.close()
    waiting.join(5)
    assert not waiting.is_alive()
    assert client._agent.wait(0) == 0
    assert alive(processes) == set()
    assert not client._agent.job.directory.exists()
    with pytest.raises(EngineDeadError, match="closed"):
        client.receive()


@pytest.mark.parametrize(
    ("deed", "says"),
    [
        ("sigkill@1", "rank 1 was killed by SIGKILL from outside"),
        ("raise@1", "rank 1 failed with ValueError: the fake engine fails on purpose"),
        ("crash@0", "rank 0 was killed by SIGSEGV"),
    ],
)
def test_a_dead_rank_ends_the_job_and_is_named(
    deed: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    message = death_of(start(), deed)
    assert message.startswith(says)
    if deed in ("raise@1", "crash@0"):
        assert "in take_part" in message
        assert message.count("fake_rank.py") >= 2
    assert capfd.readouterr() == ("", "")  # only the code that catches the error prints it


def test_a_death_while_asking_reaches_all_threads_and_deltas_sent_before_are_not_lost() -> None:
    with start() as client, ThreadPoolExecutor() as pool:
        client.add(request("before"))
        assert client.ask(Traffic())
        assert client.ask(Stats()).num_waiting == 0  # so its delta has been read
        failing = [pool.submit(client.ask, Trace([0])) for _ in range(3)]
        for future in failing:
            with pytest.raises(EngineDeadError, match="rank 0 failed with ValueError"):
                future.result(DEATH_S)
        assert client.receive(0) == [echo("before")]
        with pytest.raises(EngineDeadError):
            client.receive()
        with pytest.raises(EngineDeadError):
            client.ask(Stats())


def hang_alone() -> str:
    client = warmed(start(step_timeout_s=1, ranks=1))
    assert client.receive(3) == []  # being idle is not hanging
    return death_of(client, "sleep@0", hangs_s=1)


def stop_idle(rank: int) -> str:
    """The error after a rank that has nothing to do is stopped."""
    with warmed(start()) as client:
        os.kill(rank_pid(client, rank), signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(EngineDeadError) as caught:
            client.receive(60)
        assert time.monotonic() - started < DEATH_S
    return str(caught.value)


def rank_pid(client: RanksClient, rank: int) -> int:
    """The process of a rank."""
    for pid in descendants(client._agent.pid) - {client._agent.pid}:
        if f"\0RANK={rank}\0" in f"\0{Path(f'/proc/{pid}/environ').read_text()}":
            return pid
    raise AssertionError(rank)


@pytest.fixture(scope="module")
def hangs() -> Iterator[dict[str, Future[str]]]:
    """Errors of ranks that hang. The jobs wait while other tests run."""
    with ThreadPoolExecutor() as pool:
        yield {
            "stopped": pool.submit(lambda: death_of(start(), "sigstop@1")),
            "stopped while idle": pool.submit(stop_idle, 1),
            "stopped leader": pool.submit(stop_idle, 0),
            "asleep": pool.submit(
                lambda: death_of(warmed(start(step_timeout_s=2)), "sleep@1", hangs_s=2)
            ),
            "timed out": pool.submit(
                lambda: death_of(start(collective_timeout_s=3), "sleep@0", hangs_s=3)
            ),
            "alone": pool.submit(hang_alone),
        }


def test_a_lone_leader_that_hangs_ends_the_job_and_shows_where(
    hangs: dict[str, Future[str]],
) -> None:
    message = hangs["alone"].result()
    assert message.startswith(
        "rank 0 hangs in step 2: no rank has got further for 1 s (--step-timeout)\n"
        "  rank 0: in step 2\n\nrank 0 meanwhile:\n"
    )
    assert "in <lambda>" in message


def test_an_error_while_loading_arrives_as_the_same_class() -> None:
    with pytest.raises(CheckpointError) as caught:
        start("load-error@0")
    assert str(caught.value) == "the fake checkpoint is broken\n  - a.safetensors is truncated"


def test_an_error_names_its_rank_unless_it_is_the_leaders() -> None:
    follower = Failure(rank=1, kind="CheckpointError", message="broken")
    error = follower.to_error(starting=True)
    assert (type(error), str(error)) == (CheckpointError, "rank 1: broken")
    error = follower.to_error(starting=False)
    assert (type(error), str(error)) == (EngineDeadError, "rank 1: broken")
    foreign = Failure(rank=0, kind="KeyError", message="failed with KeyError: 1", traceback="at x")
    error = foreign.to_error(starting=True)
    assert (type(error), str(error)) == (EngineDeadError, "rank 0 failed with KeyError: 1\nat x")


def test_ranks_die_with_a_killed_front_and_its_directory_is_removed(tmp_path: Path) -> None:
    front = subprocess.Popen(
        [sys.executable, "-c", FRONT, FAKE_RANK, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert front.stdout is not None
    assert front.stdout.readline() == "ready\n"
    processes = descendants(front.pid) - {front.pid}
    assert len(processes) == 3
    front.send_signal(signal.SIGKILL)
    front.wait()
    front.stdout.close()
    assert wait_until_gone(processes, DEATH_S) == set()
    assert list(tmp_path.iterdir()) == []


def test_an_end_of_the_front_that_it_does_not_announce_counts_as_its_death() -> None:
    with start(ranks=1) as client:
        client._connection.close()
        assert client._agent.wait(DEATH_S) == 1
        assert client._agent.job.read_failure() == FRONT_DIED


def test_ranks_die_with_a_killed_agent() -> None:
    with start() as client:
        ranks = descendants(client._agent.pid) - {client._agent.pid}
        client._agent._process.kill()
        with pytest.raises(EngineDeadError, match="the agent that watches the ranks"):
            client.receive(60)
        assert wait_until_gone(ranks, DEATH_S) == set()


def test_a_start_that_hangs_ends_at_its_timeout() -> None:
    started_at = time.monotonic()
    with pytest.raises(EngineDeadError, match="start_timeout_s"):
        RanksClient(
            EngineConfig("fake", Layout(tp=2)), 1.0, program=["-c", "import time; time.sleep(60)"]
        )
    assert time.monotonic() - started_at < 15


def test_a_stopped_rank_ends_the_job_and_says_where_it_was(hangs: dict[str, Future[str]]) -> None:
    stopped = "is stopped (SIGSTOP or a debugger)"
    assert hangs["stopped"].result() == f"rank 1 {stopped} in step 1"
    assert hangs["stopped while idle"].result() == f"rank 1 {stopped} while idle after step 1"
    assert hangs["stopped leader"].result() == f"rank 0 {stopped} while idle after step 1"


def test_a_step_that_hangs_ends_the_job_and_says_who_waits_for_whom(
    hangs: dict[str, Future[str]],
) -> None:
    where, *stacks = hangs["asleep"].result().split("meanwhile:")
    assert where.splitlines() == [
        "rank 1 hangs in step 2: no rank has got further for 2 s (--step-timeout)",
        "  rank 0: in step 2, in all_reduce over tp (fake), waits for rank 1",
        "  rank 1: in step 2",
        "",
        "rank 0 ",
    ]
    assert "in all_reduce" in stacks[0]
    assert "in <lambda>" in stacks[1]


def test_a_stopped_agent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "STOPPED_S", 1.0)
    with start() as client:
        ranks = descendants(client._agent.pid)
        client._agent._process.send_signal(signal.SIGSTOP)
        with pytest.raises(EngineDeadError) as caught:
            client.receive(60)
        assert wait_until_gone(ranks - {client._agent.pid}, DEATH_S) == set()
        with pytest.raises(EngineDeadError, match="is stopped"):
            client.add(request("late"))
    assert str(caught.value) == (
        f"the agent that watches the ranks (process {client._agent.pid}) is stopped (SIGSTOP or a "
        "debugger)"
    )


def test_a_front_sees_where_its_ranks_are() -> None:
    with warmed(start()) as client:
        before = client.places()
        assert [(place.rank, place.step) for place in before] == [(0, 1), (1, 1)]
        deadline = time.monotonic() + 30
        while not all(
            now.alive > then.alive for now, then in zip(client.places(), before, strict=True)
        ):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_rank_that_hangs_ends_the_job_after_the_collective_timeout_and_shows_where(
    hangs: dict[str, Future[str]],
) -> None:
    message = hangs["timed out"].result()
    assert message.startswith("rank 1 failed with RuntimeError")
    assert "Timed out waiting 3000ms" in message
    _, meanwhile = message.split("rank 0 meanwhile:")
    assert "in <lambda>" in meanwhile
    assert "in serve_front" in meanwhile


def test_the_client_imports_no_torch() -> None:
    code = "import sys, moespan.launch.ranks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


FRONT = """
import sys, tempfile, time
from moespan.config import EngineConfig, Layout
from moespan.launch.ranks import RanksClient
tempfile.tempdir = sys.argv[2]
client = RanksClient(EngineConfig("fake", Layout(tp=2)), program=[sys.argv[1]])
print("ready", flush=True)
time.sleep(60)
"""


def test_memory_that_a_ranks_threads_freed_goes_back_to_the_system() -> None:
    code = """
import ctypes, threading
from moespan.launch.rank import _allocate_from_one_arena
if ARENA: _allocate_from_one_arena()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.malloc.argtypes, library.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
def load():
    library.free(library.malloc(30 << 20))  # the library then keeps up to 60 MiB at hand
    pieces = [library.malloc(100_000) for _ in range(500)]
    for piece in pieces:
        ctypes.memset(piece, 1, 100_000)
    for piece in pieces:
        library.free(piece)
def resident_kib():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])
before = resident_kib()
thread = threading.Thread(target=load)
thread.start(); thread.join()
library.malloc_trim(0)
print(resident_kib() - before)
"""
    grown = [
        int(subprocess.check_output([sys.executable, "-c", f"ARENA = {one}\n{code}"]))
        for one in (True, False)
    ]
    assert grown[0] < 4 << 10 < 16 << 10 < grown[1]
