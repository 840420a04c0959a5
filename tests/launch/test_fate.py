"""What is said of processes that were killed, and what survives a full disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from moespan import cgroups
from moespan.config import EngineConfig, Layout, Nodes
from moespan.errors import ConfigError, EngineDeadError
from moespan.launch.fate import OomKills, is_stopped, signal_name
from moespan.launch.job import Failure, Job

FAKE_RANK = str(Path(__file__).with_name("fake_rank.py"))

FRONT = """
import sys
from moespan.config import EngineConfig, Layout
from moespan.engine.request import Request, SamplingParams
from moespan.errors import MoespanError
from moespan.launch.ranks import RanksClient
try:
    with RanksClient(EngineConfig("fake", Layout(tp=2)), program=[sys.argv[1]]) as client:
        params = SamplingParams()
        client.add(Request(id=sys.argv[2], prompt_token_ids=[3, 1, 4], params=params))
        client.receive(60)
except MoespanError as error:
    print(f"{type(error).__name__}: {error}")
"""


def front(deed: str, *prefix: str, **environ: str) -> str:
    """The error of a front whose fake engine does `deed`; `prefix` is a command that starts it."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", FRONT, FAKE_RANK, deed],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def events(root: Path, kills: int) -> None:
    """The files of a control group, as the kernel shows them."""
    group = root / "sys/fs/cgroup"
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.events").write_text(f"oom {kills}\noom_kill {kills}\n")
    (group / "memory.max").write_text(f"{3 << 29}\n")


def test_a_kill_while_the_group_ran_out_of_memory_says_so(tmp_path: Path) -> None:
    events(tmp_path, 4)
    kills = OomKills(tmp_path)
    assert kills.fate(9) == "was killed by SIGKILL from outside"
    events(tmp_path, 6)
    assert kills.count == 2
    said = kills.fate(9)
    assert "ran out of memory within its limit of 1.5 GiB" in said
    assert all(option in said for option in ("num_blocks", "max_num_seqs", "max_model_len"))
    assert kills.fate(11) == "was killed by SIGSEGV"  # no signal of the kernel's for memory


def test_a_kernel_that_counts_nothing_blames_nothing(tmp_path: Path) -> None:
    kills = OomKills(tmp_path)
    assert kills.count == 0
    assert kills.fate(9) == "was killed by SIGKILL from outside"


def test_signals_have_names() -> None:
    assert (signal_name(15), signal_name(99)) == ("SIGTERM", "signal 99")


def test_a_process_that_has_gone_is_not_stopped() -> None:
    assert not is_stopped(os.getpid())
    assert not is_stopped(2**22 + 1)


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group with a limit of 1.5 GiB of memory, v1 or v2."""
    for parent in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup"):
        group = Path(parent, f"moespan-test-{os.getpid()}")
        limit = "memory.limit_in_bytes" if parent.endswith("memory") else "memory.max"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(f"{3 << 29}")
            yield group
            return
        except OSError:
            continue
        finally:
            with contextlib.suppress(OSError):
                group.rmdir()
    pytest.skip("no control group can be made here")


def test_a_rank_that_the_kernel_kills_for_memory_is_named_with_what_to_lower(
    small_group: Path,
) -> None:
    enter = f'echo $$ > {small_group}/cgroup.procs && exec "$@"'
    said = front("eat@1", "sh", "-c", enter, "sh")
    assert said.startswith("EngineDeadError: rank 1 was killed by the kernel (SIGKILL), because")
    assert "within its limit of 1.5 GiB; lower num_blocks" in said


# A full disk


def test_a_failure_is_written_into_room_that_was_there_before() -> None:
    job = Job.create(EngineConfig("fake", Layout(tp=4)), Nodes(nnodes=2, node_rank=1))
    try:
        assert [job.read_failure(rank) for rank in (None, 2, 3)] == [None] * 3
        assert job.read_stack(2) == ""
        with job.open_stack(2) as file:
            file.write("at x\n")
        assert job.read_stack(2) == "at x\n"
        failure = Failure(rank=3, kind="ValueError", message="short", traceback="at y")
        job.write_failure(failure, 3)
        assert job.read_failure(3) == failure
        long = msgspec.structs.replace(
            failure, message="start" + "é" * 100_000 + "end", traceback="x" * 100_000 + "last line"
        )
        job.write_failure(long)
        found = job.read_failure()
        assert found is not None
        assert found.message.startswith("starté")
        assert found.message.endswith("éend")
        assert found.traceback.endswith("last line")
        assert {path.stat().st_size for path in job.directory.glob("failure*")} == {32 << 10}
    finally:
        shutil.rmtree(job.directory)
    assert job.read_failure() is None


def on_small_disk(size: str, deed: str) -> str:
    """The front's error, with a TMPDIR of `size` in a mount namespace of its own."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no `unshare` to mount a small disk with")
    mount = f'mount -t tmpfs -o size={size} tmpfs /mnt || exit 77; exec "$@"'
    try:
        return front(deed, unshare, "-m", "sh", "-c", mount, "sh", TMPDIR="/mnt")
    except AssertionError as error:
        if "Operation not permitted" in str(error) or "denied" in str(error):
            pytest.skip("mounting is not permitted here")
        raise


def test_the_cause_of_a_rank_that_dies_on_a_full_disk_is_kept() -> None:
    said = on_small_disk("8m", "fill@1")
    first, *stack = said.splitlines()
    assert (
        first == "EngineDeadError: rank 1 failed with ValueError: the fake engine fails on purpose"
    )
    assert any("in take_part" in line for line in stack)


def test_a_disk_that_is_full_from_the_start_is_named() -> None:
    # Python takes another folder if it cannot write a few bytes in TMPDIR.
    said = on_small_disk("64k", "nothing")
    assert said.startswith("ConfigError: the private folder of the job cannot be made in /mnt: No")
    assert "set TMPDIR to a folder with room" in said


def test_the_error_of_a_full_disk_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        Job.create(EngineConfig("fake", Layout(tp=2)), Nodes())
    assert list(tmp_path.iterdir()) == []


def test_an_agent_that_is_killed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    from moespan.launch.agent_process import _error

    counts = iter([3, 3, 4])
    monkeypatch.setattr(cgroups, "oom_kills", lambda root: next(counts))
    job = Job.create(EngineConfig("fake", Layout(tp=2)), Nodes())
    try:
        kills = OomKills()
        outside, memory = (_error(job, -9, False, kills) for _ in range(2))
        assert isinstance(outside, EngineDeadError)
        assert str(outside) == (
            "the agent that watches the ranks was killed by SIGKILL from outside"
        )
        assert "the ranks was killed by the kernel (SIGKILL), because" in str(memory)
        ended = _error(job, 3, False, kills)
        assert str(ended) == "the agent that watches the ranks ended with exit code 3"
    finally:
        shutil.rmtree(job.directory)
