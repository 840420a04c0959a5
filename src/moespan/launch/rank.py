"""The program of one rank: the leader (rank 0) serves the front, the others follow the leader.

Started by the agent as `python -m moespan.launch.rank JOB_DIRECTORY AGENT_PID`. A rank never
outlives the agent: the kernel kills it with its parent.

Each rank writes where it is to the job's file of beats (`moespan.parallel.beats`), and the agent
ends the job if a rank is stopped or a step hangs (`moespan.launch.stall`).

Bounds: a collective waits `COLLECTIVE_TIMEOUT_S` for its peers. Idle followers get a heartbeat
every `HEARTBEAT_S`, so that they end once the leader is silent for `COLLECTIVE_TIMEOUT_S`. The
front hears from the leader at least every `PULSE_S` between two steps.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from moespan import log
from moespan.config import COLLECTIVE_TIMEOUT_S, EngineConfig
from moespan.engine.info import PULSE_S, EngineInfo, Pulse
from moespan.engine.questions import Question
from moespan.engine.request import OutputDelta, Request, refusal
from moespan.errors import MoespanError, RequestError
from moespan.launch.fate import start_ticks
from moespan.launch.job import FRONT_DIED, STACK_SIGNAL, Failure, Job
from moespan.launch.protocol import (
    Abort,
    Add,
    Answered,
    Ask,
    Connection,
    FromFront,
    News,
    PeerGoneError,
    Ready,
    Reload,
)
from moespan.machine.binding import bind
from moespan.parallel.beats import Beat

if TYPE_CHECKING:
    import torch

HEARTBEAT_S = 5.0

_PR_SET_PDEATHSIG, _M_ARENA_MAX = 1, -8


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
    def pulse(self) -> Pulse: ...
    def heartbeat(self) -> None: ...
    def close(self, successor: EngineConfig | None = None) -> None: ...


BuildLeader = Callable[["EngineConfig", "torch.device", Beat], LeaderEngine]
"""Build the leader's engine, which writes to the beat where it is in a step."""

Follow = Callable[["EngineConfig", "torch.device", Beat], "EngineConfig | None"]
"""Run a follower until its engine ends; returns the config of the next engine, if any."""


def main() -> None:
    """The program of one rank of the real engine."""
    run_rank(_build_leader, _follow)


def _build_leader(config: EngineConfig, device: torch.device, beat: Beat) -> LeaderEngine:
    from moespan.engine.build import build_leader
    from moespan.launch.distributed import make_mesh

    return build_leader(config, make_mesh(config, device, beat=beat))


def _follow(config: EngineConfig, device: torch.device, beat: Beat) -> EngineConfig | None:
    from moespan.engine.build import follow
    from moespan.launch.distributed import make_mesh

    return follow(config, make_mesh(config, device, beat=beat))


def run_rank(
    build_leader: BuildLeader, follow: Follow, timeout_s: float = COLLECTIVE_TIMEOUT_S
) -> None:
    """Run this process as a rank of the job named on the command line, until the front has gone.

    `timeout_s` bounds collectives of the group of all ranks. An error is written for the agent, and
    this process ends at once with exit code 1, without teardown that could hang.
    """
    as_rank(lambda job, rank, beat: _run(job, rank, beat, build_leader, follow, timeout_s))


def as_rank(run: Callable[[Job, int, Beat], None]) -> None:
    """Call `run(job, rank, its beat)` as the rank that the command line names.

    The process is bound to the rank's cores, and errors are written for the agent.
    """
    directory, agent_pid = sys.argv[1:3]
    _die_with_parent(int(agent_pid))
    _allocate_from_one_arena()
    log.set_up()
    job, rank = Job(directory), int(os.environ["RANK"])
    local_rank = int(os.environ["LOCAL_RANK"])
    beat = job.beats().beat(local_rank)
    beat.is_of(os.getpid(), start_ticks(os.getpid()))
    bind(job.read_binding().ranks[local_rank])
    beat.starting()
    beat.start_pulse()
    stack_file = job.open_stack(rank)
    faulthandler.enable(stack_file)
    faulthandler.register(STACK_SIGNAL, stack_file)
    try:
        run(job, rank, beat)
    except Exception as error:
        job.write_failure(_failure(rank, error), rank)
        log.logger.debug("failed", exc_info=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _run(
    job: Job, rank: int, beat: Beat, build_leader: BuildLeader, follow: Follow, timeout_s: float
) -> None:
    import torch.distributed as dist

    from moespan.launch.distributed import init_distributed

    config: EngineConfig | None = job.read_config()
    assert config is not None
    # Ranks on many nodes find each other through the agents' store, which the environment names.
    store_path = job.store_path if job.read_nodes().nnodes == 1 else None
    device = init_distributed(config.device, store_path, timeout_s)
    # Else each full collection looks at all objects of torch, and all ranks wait 0.15 s for it.
    gc.collect()
    gc.freeze()
    front: Connection[FromFront] | None = None
    while config is not None:
        beat.starting()
        if rank > 0:
            config = follow(config, device, beat)
            beat.ending()
            continue
        engine = build_leader(config, device, beat)
        front = front or Connection(job.connect(), FromFront)
        config = serve_front(engine, front, min(HEARTBEAT_S, timeout_s / 4), beat)
        beat.ending()
        engine.close(config)
    dist.destroy_process_group()
    if rank == 0 and not job.beats().end_is_announced:
        raise PeerGoneError


def serve_front(
    engine: LeaderEngine,
    front: Connection[FromFront],
    heartbeat_s: float = HEARTBEAT_S,
    beat: Beat | None = None,
) -> EngineConfig | None:
    """Serve the front's requests, with heartbeats to idle followers in between.

    The rank is idle while it waits for the front, and busy otherwise. Pulses without deltas are
    left out while the front does not read.

    Returns:
        The config that the front wants next; None when the front has gone.
    """
    beat = beat or Beat()
    try:
        front.send(Ready(engine.info))
        followers_heard_at = front_heard_at = time.monotonic()
        while True:
            beat.idle()
            messages = front.receive(0 if engine.has_unfinished else min(heartbeat_s, PULSE_S))
            beat.busy()
            deltas: list[OutputDelta] = []
            for message in messages:
                beat.busy()  # many messages are progress, too
                if isinstance(message, Reload):
                    return message.config
                deltas += _handle(engine, message, front)
            if messages:
                front.send(News(deltas, engine.pulse()))
                deltas = []
            if engine.has_unfinished:
                deltas = engine.step()
                followers_heard_at = time.monotonic()
            elif time.monotonic() - followers_heard_at >= heartbeat_s:
                engine.heartbeat()
                followers_heard_at = time.monotonic()
            is_due = time.monotonic() - front_heard_at >= PULSE_S and not front.is_behind
            if deltas or is_due:
                front.send(News(deltas, engine.pulse()))
                front_heard_at = time.monotonic()
    except PeerGoneError:
        return None


def _handle(
    engine: LeaderEngine, message: Add | Abort | Ask, front: Connection[FromFront]
) -> list[OutputDelta]:
    """Carry out `message`; → the deltas of refused requests."""
    refused: list[OutputDelta] = []
    if isinstance(message, Abort):
        engine.abort(message.request_id)
    elif isinstance(message, Ask):
        try:
            answer = msgspec.msgpack.encode(engine.answer(message.question))
            front.send(Answered(message.number, answer))
        except RequestError as error:
            front.send(Answered(message.number, refusal=str(error)))
    else:
        for request in message.requests:
            try:
                engine.add(request)
            except RequestError as error:
                refused += refusal(request, error)
    return refused


def _failure(rank: int, error: Exception) -> Failure:
    if isinstance(error, PeerGoneError):
        return FRONT_DIED
    on_purpose = isinstance(error, MoespanError)
    kind = type(error).__name__
    return Failure(
        rank=rank,
        kind=kind,
        message=str(error) if on_purpose else f"failed with {kind}: {error}".removesuffix(": "),
        traceback="" if on_purpose else traceback.format_exc(),
        lost_peer=_is_lost_peer(error),
        time_ns=time.monotonic_ns(),
    )


def _is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because of another rank; some show it in their text only."""
    dist = sys.modules.get("torch.distributed")  # its import may be what failed
    return (dist is not None and isinstance(error, dist.DistError)) or any(
        library in str(error).lower() for library in ("gloo", "hccl", "nccl")
    )


def _die_with_parent(parent_pid: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # the parent died before this call
        os._exit(1)


def _allocate_from_one_arena() -> None:
    """Let all threads share the C library's first arena. What threads that load weights have freed
    on top of another one, up to 64 MiB, would never go back to the system."""
    with contextlib.suppress(AttributeError):  # a C library without arenas
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


if __name__ == "__main__":
    main()
