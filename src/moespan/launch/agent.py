"""The agent: starts the ranks of one node through torch's elastic launcher and ends them together.

Started by the front through `moespan.launch.agent_program`. Agents of several nodes use `meeting`
and `watch`.

Bounds: a dead rank is seen within `_MONITOR_S`, a stopped rank or a step that hangs within those of
`moespan.launch.stall`. `_SETTLE_S` later all others get SIGTERM, and
`_GRACE_S` after that SIGKILL. When the front has gone, the ranks have `_ORPHAN_S` to end by
themselves, then they get the same signals. When the agent is killed, the kernel kills the ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import msgspec
from torch.distributed import HashStore
from torch.distributed.elastic.agent.server import WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from moespan import log
from moespan.config import EngineConfig, Nodes
from moespan.errors import ConfigError, MeetingError
from moespan.launch.cluster_key import cluster_key
from moespan.launch.fate import OomKills, is_stopped, signal_name
from moespan.launch.job import FRONT_DIED, STACK_SIGNAL, Failure, Job
from moespan.launch.stall import StallWatch
from moespan.launch.watch import NoPeers, Peers
from moespan.log import logger
from moespan.machine import environment
from moespan.machine.binding import Binding, binding_here
from moespan.machine.interfaces import interface_of
from moespan.parallel.beats import Place

_MONITOR_S = 0.1
_SETTLE_S = 0.3
_GRACE_S = 3.0
_ORPHAN_S = 3.0


def main(job: Job, ranks: int, front_pid: int, program: list[str]) -> int:
    """Run the job to its end; if a failure ended it, write the failure for the front.

    Args:
        ranks: the number of ranks on this node.
        program: arguments of Python in each rank.

    Returns:
        The exit code of the agent: 0 if all ranks ended well, on all nodes.
    """
    stop = _Stop()
    signal.signal(signal.SIGTERM, stop.take)
    job.beats().beat(ranks).start_pulse()
    threading.Thread(target=_end_with_front, args=(front_pid,), daemon=True).start()
    if log.level() != "debug":
        _silence("torch.distributed.elastic")
    try:
        return _run(job, ranks, front_pid, program, stop)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)


def _run(job: Job, ranks: int, front_pid: int, program: list[str], stop: _Stop) -> int:
    nodes, config = job.read_nodes(), job.read_config()
    try:
        if (over := job.read_over()) is not None:
            _say_over(nodes, over)
            return 0
        binding = binding_here(config.bind, config.device, ranks)
        job.write_binding(binding)
        peers, master = _meet(config, nodes, binding)
    except (ConfigError, MeetingError) as error:
        job.write_failure(Failure(rank=None, kind=type(error).__name__, message=str(error)))
        return 1
    with _reported_to_peers(peers, front_pid, job):
        stalls = StallWatch(
            config.step_timeout_s,
            range(nodes.node_rank * ranks, (nodes.node_rank + 1) * ranks),
            nodes.nnodes,
        )
        agent = _Agent(job, nodes, peers, master, ranks, stalls, stop, program)
        agent.run()
        if agent.failure is None:
            return 0
        job.write_failure(agent.failure)
        return 1
    return 0  # by a signal, after the front had announced the end


def _meet(
    config: EngineConfig, nodes: Nodes, binding: Binding
) -> tuple[Peers, RendezvousStoreInfo]:
    """The other nodes, and the store of the ranks. Sets the environment that the ranks inherit."""
    ranks, threads = len(binding.ranks), [part.threads for part in binding.ranks]
    if nodes.nnodes == 1:
        environment.apply(environment.environment_here(config, threads))
        return NoPeers(), RendezvousStoreInfo("localhost", 0)
    from moespan.launch import meeting

    key = cluster_key(nodes, logger.warning)
    met = meeting.meet(nodes, meeting.facts(config, nodes), key, logger.info)
    interface = interface_of(met.address) or ""
    environment.apply(
        environment.environment_here(config, threads, nodes.nnodes, met.address, interface)
    )
    if nodes.node_rank > 0:
        first = nodes.node_rank * ranks
        ours = f"rank {first}" if ranks == 1 else f"ranks {first} to {first + ranks - 1}"
        logger.info(
            f"node {nodes.node_rank} of {nodes.nnodes} ({met.address}, {interface}) joined "
            f"{nodes.meeting_point} with {ours}"
        )
    return met.watch, RendezvousStoreInfo(*met.store)


def _say_over(nodes: Nodes, reason: str) -> None:
    """Tell the other nodes that there are no more ranks to meet."""
    from moespan.launch import meeting

    meeting.say_over(nodes, cluster_key(nodes, logger.warning), reason, logger.info)


@contextlib.contextmanager
def _reported_to_peers(peers: Peers, front_pid: int, job: Job) -> Iterator[None]:
    """Leave the other nodes only when they know the end of this one, even if by a signal.

    A signal after the front has announced the end only makes the end quicker.
    """
    try:
        yield
    except SignalException as stopped:
        if job.beats().end_is_announced:
            peers.announce()
            return peers.report(None)
        end = f"was ended by {signal_name(int(stopped.sigval))}"
        is_orphan = os.getppid() != front_pid
        peers.report(FRONT_DIED if is_orphan else Failure(rank=None, kind="", message=end))
        raise
    finally:
        peers.close()


class _Agent(LocalElasticAgent):  # type: ignore[misc]  # torch is not typed
    """Torch's agent, with a short grace time for survivors; finds the rank that failed first.

    Attributes:
        failure: the failure that ended the job, on whatever node, if any.
    """

    def __init__(
        self,
        job: Job,
        nodes: Nodes,
        peers: Peers,
        master: RendezvousStoreInfo,
        ranks: int,
        stalls: StallWatch,
        stop: _Stop,
        program: list[str],
    ) -> None:
        spec = WorkerSpec(
            role="moespan",
            local_world_size=ranks,
            rdzv_handler=_Rendezvous(nodes, master),
            entrypoint=sys.executable,
            args=(*program, str(job.directory), str(os.getpid())),
            max_restarts=0,
            monitor_interval=_MONITOR_S,
        )
        super().__init__(spec, DefaultLogsSpecs(log_dir=str(job.directory / "elastic")))
        self._job = job
        self._peers = peers
        self._first_rank = nodes.node_rank * ranks
        self._beats = job.beats()
        self._stalls = stalls
        self._stop = stop
        self._oom_kills = OomKills()
        self._shown: list[Place] = []  # of other nodes, to the front
        self.failure: Failure | None = None

    def _monitor_workers(self, worker_group: Any) -> Any:
        self._stop.check()
        if self._beats.end_is_announced:
            self._peers.announce()
        ends = self._ends().values()
        own_failure = None
        if any(ends):
            time.sleep(_SETTLE_S)  # the rank that caused the end may end a little later
            own_failure = self._first_failure()
        elif None in ends and not self._peers.must_end():
            own_failure = self._stall()
            if own_failure is None:
                return RunResult(state=WorkerState.HEALTHY)
        else:
            own_failure = self._stall_seen_elsewhere()
        self._peers.report(own_failure)
        self._shutdown()
        self.failure = self._peers.first_cause()
        return super()._monitor_workers(worker_group)

    def _exit_barrier(self) -> None:
        """Nothing: torch would wait minutes for the other nodes, and `_peers` has bounds."""

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *_: Any, **__: Any) -> None:
        if self._pcontext:
            self._pcontext.close(death_sig, _GRACE_S)

    def _first_failure(self) -> Failure:
        """The cause of the end, and not what followed from it.

        An error of a rank's own comes before a rank that is stopped or died without a report, and
        these before a rank that missed its peers. Among equals, the earliest counts.
        """
        reports = {rank: self._job.read_failure(rank) for rank in self._pids()}
        failures = sorted(filter(None, reports.values()), key=lambda failure: failure.time_ns)
        own = [failure for failure in failures if not failure.lost_peer]
        if own:  # if several ranks report the same error, the lowest rank's is reported
            return min((f for f in own if f.message == own[0].message), key=lambda f: f.rank or 0)
        stopped = {
            rank: f"is stopped (SIGSTOP or a debugger) {self._place(rank)}"
            for rank in self._stopped()
        }
        silent = {rank: end for rank, end in self._ends().items() if end and not reports[rank]}
        for rank, message in (stopped or silent).items():
            stack = self._job.read_stack(rank)
            return Failure(rank=rank, kind="", message=message, traceback=stack)
        missed = failures[0]
        return msgspec.structs.replace(missed, traceback=missed.traceback + self._meanwhile())

    def _stall(self) -> Failure | None:
        """The failure of a rank that is stopped, or of a step that hangs, with the stacks here."""
        failure = self._look()
        if failure is None or self._stopped():
            return failure
        return msgspec.structs.replace(failure, traceback=self._meanwhile())

    def _stall_seen_elsewhere(self) -> Failure | None:
        """The hang that another node was quicker to report, with the stacks here."""
        failure = self._look(patience=0.5)
        if failure is None or failure.message not in {f.message for f in self._peers.failures()}:
            return None
        return msgspec.structs.replace(failure, traceback=self._meanwhile())

    def _look(self, patience: float = 1.0) -> Failure | None:
        places = [self._place(rank) for rank in self._pids()]
        self._peers.show(places)
        others = self._peers.places()
        if self._first_rank == 0 and others != self._shown:
            self._job.write_places(others)
            self._shown = others
        return self._stalls.look([*places, *others], patience)

    def _place(self, rank: int) -> Place:
        place = self._beats.place(rank - self._first_rank, rank)
        return msgspec.structs.replace(place, is_stopped=is_stopped(self._pids()[rank]))

    def _meanwhile(self) -> str:
        """Stacks of the ranks that still run; the others waited for one of them."""
        running = [rank for rank, end in self._ends().items() if end is None]
        for rank in running:
            os.kill(self._pids()[rank], STACK_SIGNAL)
        time.sleep(_SETTLE_S)
        stacks = ((rank, self._job.read_stack(rank)) for rank in running)
        return "".join(f"\nrank {rank} meanwhile:\n{stack}" for rank, stack in stacks)

    def _ends(self) -> dict[int, str | None]:
        """How each rank ended: None while it runs, empty if well. Does not reap the processes."""
        ends: dict[int, str | None] = {}
        for rank, pid in self._pids().items():
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                ends[rank] = None
            elif ended.si_code != os.CLD_EXITED:
                ends[rank] = self._oom_kills.fate(ended.si_status)
            else:
                code = ended.si_status
                ends[rank] = f"ended with exit code {code}" if code else ""
        return ends

    def _stopped(self) -> list[int]:
        """Ranks that a signal or a debugger has stopped, so that the others wait in vain."""
        return [rank for rank, pid in self._pids().items() if is_stopped(pid)]

    def _pids(self) -> dict[int, int]:
        return {self._first_rank + at: pid for at, pid in self._pcontext.pids().items()}


class _Rendezvous(RendezvousHandler):  # type: ignore[misc]  # torch is not typed
    """The result of the agents' meeting, in the form that torch asks for."""

    def __init__(self, nodes: Nodes, master: RendezvousStoreInfo) -> None:
        self._nodes = nodes
        self._master = master
        # All nodes have equally many ranks, so torch numbers its ranks without asking the others.
        os.environ["TORCH_ELASTIC_WORKER_IDENTICAL"] = "1"

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(HashStore(), self._nodes.node_rank, self._nodes.nnodes, self._master)

    @property
    def use_agent_store(self) -> bool:
        return self._nodes.nnodes > 1

    def get_backend(self) -> str:
        return "moespan"

    def get_run_id(self) -> str:
        return "moespan"

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None: ...

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True


class _Stop:
    """The end by a signal, as torch's agent does it, even before that agent exists.

    Python drops an exception that a signal raises inside a destructor. So `check` raises it again.
    """

    def __init__(self) -> None:
        self._number: int | None = None

    def take(self, number: int, _: FrameType | None) -> None:
        """The handler of the signal."""
        self._number = number
        self.check()

    def check(self) -> None:
        """Raise `SignalException` if the signal has come."""
        if self._number is not None:
            raise SignalException("stopped", signal.Signals(self._number))


def _silence(name: str) -> None:
    """Drop the records of loggers below `name`."""
    silenced = logging.getLogger(name)
    silenced.addHandler(logging.NullHandler())
    silenced.propagate = False


def _end_with_front(front_pid: int) -> None:
    """Wait until the front has gone, then end this process and with it the ranks.

    The kernel's parent-death signal does not fit: it follows the thread that started the agent.
    """
    while os.getppid() == front_pid:
        time.sleep(0.2)
    time.sleep(_ORPHAN_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * _GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
