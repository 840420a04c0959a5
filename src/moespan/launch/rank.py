"""The program of one rank: the leader (rank 0) serves the front, the others follow the leader.

Started by the agent as `python -m moespan.launch.rank JOB_DIRECTORY AGENT_PID`. A rank never
outlives the agent: the kernel kills it with its parent.

Bounds: a collective waits `COLLECTIVE_TIMEOUT_S` for its peers. A step of the leader that hangs,
even in foreign code, ends after 1.25 times that, with its Python stack as the error. Idle followers
get a heartbeat every `HEARTBEAT_S`, so that they end once the leader is silent for
`COLLECTIVE_TIMEOUT_S`.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import msgspec

from moespan import log
from moespan.config import COLLECTIVE_TIMEOUT_S, EngineConfig
from moespan.engine.info import EngineInfo
from moespan.engine.questions import Question
from moespan.engine.request import OutputDelta, Request, refusal
from moespan.errors import MoespanError, RequestError
from moespan.launch.job import STACK_SIGNAL, Failure, Job
from moespan.launch.protocol import (
    Abort,
    Add,
    Answered,
    Ask,
    Connection,
    Deltas,
    FromFront,
    PeerGoneError,
    Ready,
    Reload,
)
from moespan.machine.binding import bind

if TYPE_CHECKING:
    import torch

HEARTBEAT_S = 5.0

_PR_SET_PDEATHSIG = 1


class LeaderEngine(Protocol):
    """The engine that serves the front's requests."""

    @property
    def info(self) -> EngineInfo: ...
    @property
    def has_unfinished(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[OutputDelta]: ...
    def answer(self, question: Question[Any]) -> Any: ...
    def heartbeat(self) -> None: ...
    def close(self, successor: EngineConfig | None = None) -> None: ...


Follow = Callable[["EngineConfig", "torch.device"], "EngineConfig | None"]
"""Run a follower until its engine ends; returns the config of the next engine, if any."""


def main() -> None:
    """The program of one rank of the real engine."""
    run_rank(_build_leader, _follow)


def _build_leader(config: EngineConfig, device: torch.device) -> LeaderEngine:
    from moespan.engine.build import build_leader
    from moespan.launch.distributed import make_mesh

    return build_leader(config, make_mesh(config, device))


def _follow(config: EngineConfig, device: torch.device) -> EngineConfig | None:
    from moespan.engine.build import follow
    from moespan.launch.distributed import make_mesh

    return follow(config, make_mesh(config, device))


def run_rank(
    build_leader: Callable[[EngineConfig, torch.device], LeaderEngine],
    follow: Follow,
    timeout_s: float | None = None,
) -> None:
    """Run this process as a rank of the job named on the command line, until the front has gone.

    `timeout_s` replaces `COLLECTIVE_TIMEOUT_S`. An error is written for the agent, and this process
    ends at once with exit code 1, without teardown that could hang.
    """
    as_rank(
        lambda job, rank, stack_file: _run(job, rank, build_leader, follow, timeout_s, stack_file)
    )


def as_rank(run: Callable[[Job, int, TextIO], None]) -> None:
    """Call `run(job, rank, file for stacks)` as the rank that the command line names.

    The process is bound to the rank's cores, and errors are written for the agent.
    """
    directory, agent_pid = sys.argv[1:3]
    _die_with_parent(int(agent_pid))
    log.set_up()
    job, rank = Job(directory), int(os.environ["RANK"])
    bind(job.read_binding().ranks[int(os.environ["LOCAL_RANK"])])
    stack_file = job.stack_path(rank).open("w")
    faulthandler.enable(stack_file)
    faulthandler.register(STACK_SIGNAL, stack_file)
    try:
        run(job, rank, stack_file)
    except Exception as error:
        job.write_failure(_failure(rank, error), rank)
        log.logger.debug("failed", exc_info=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _run(
    job: Job,
    rank: int,
    build_leader: Callable[[EngineConfig, torch.device], LeaderEngine],
    follow: Follow,
    timeout_s: float | None,
    stack_file: TextIO,
) -> None:
    import torch.distributed as dist

    from moespan.launch.distributed import init_distributed

    timeout_s = timeout_s or COLLECTIVE_TIMEOUT_S
    config: EngineConfig | None = job.read_config()
    assert config is not None
    # Ranks on many nodes find each other through the agents' store, which the environment names.
    store_path = job.store_path if job.read_nodes().nnodes == 1 else None
    device = init_distributed(config.device, store_path, timeout_s)
    front: Connection[FromFront] | None = None
    while config is not None:
        if rank > 0:
            config = follow(config, device)
            continue
        engine = build_leader(config, device)
        front = front or Connection(job.connect(), FromFront)
        watchdog = _Watchdog(1.25 * timeout_s, stack_file)
        config = serve_front(engine, front, min(HEARTBEAT_S, timeout_s / 4), watchdog)
        engine.close(config)
    dist.destroy_process_group()


def serve_front(
    engine: LeaderEngine,
    front: Connection[FromFront],
    heartbeat_s: float = HEARTBEAT_S,
    watchdog: _Watchdog | None = None,
) -> EngineConfig | None:
    """Serve the front's requests, with heartbeats to idle followers in between.

    Returns:
        The config that the front wants next; None when the front has gone.
    """
    try:
        front.send(Ready(engine.info))
        followers_heard_at = time.monotonic()
        while True:
            if watchdog is not None:
                watchdog.feed()
            for message in front.receive(0 if engine.has_unfinished else heartbeat_s):
                if isinstance(message, Reload):
                    return message.config
                _handle(engine, message, front)
                if watchdog is not None:
                    watchdog.feed()
            if engine.has_unfinished:
                deltas = engine.step()
                if deltas:
                    front.send(Deltas(deltas))
            elif time.monotonic() - followers_heard_at >= heartbeat_s:
                engine.heartbeat()
            else:
                continue
            followers_heard_at = time.monotonic()
    except PeerGoneError:
        return None
    finally:
        if watchdog is not None:
            watchdog.stop()


def _handle(engine: LeaderEngine, message: Add | Abort | Ask, front: Connection[FromFront]) -> None:
    """Carry out `message`; refusals go back to the front."""
    if isinstance(message, Abort):
        engine.abort(message.request_id)
    elif isinstance(message, Ask):
        try:
            answer = msgspec.msgpack.encode(engine.answer(message.question))
            front.send(Answered(message.number, answer))
        except RequestError as error:
            front.send(Answered(message.number, refusal=str(error)))
    else:
        try:
            engine.add(message.request)
        except RequestError as error:
            front.send(Deltas(refusal(message.request, error)))


class _Watchdog:
    """Ends this process, with its Python stack in a file, if it is not fed in time.

    Its thread is not Python's, so it works while foreign code holds the interpreter's lock.
    """

    def __init__(self, timeout_s: float, stack_file: TextIO) -> None:
        self._timeout_s = timeout_s
        self._stack_file = stack_file
        self._fed_at = -timeout_s

    def feed(self) -> None:
        """Restart the timer. Cheap: it restarts at most once in a hundredth of its time."""
        if time.monotonic() - self._fed_at > self._timeout_s / 100:
            self._fed_at = time.monotonic()
            faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=self._stack_file)

    def stop(self) -> None:
        """Stop the timer."""
        faulthandler.cancel_dump_traceback_later()


def _failure(rank: int, error: Exception) -> Failure:
    on_purpose = isinstance(error, MoespanError)
    kind = type(error).__name__
    return Failure(
        rank=rank,
        kind=kind,
        message=str(error) if on_purpose else f"failed with {kind}: {error}",
        traceback="" if on_purpose else traceback.format_exc(),
        lost_peer=_is_lost_peer(error),
        time_ns=time.time_ns(),
    )


def _is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because of another rank; some show it in their text only."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(
        library in str(error).lower() for library in ("gloo", "hccl", "nccl")
    )


def _die_with_parent(parent_pid: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # the parent died before this call
        os._exit(1)


if __name__ == "__main__":
    main()
