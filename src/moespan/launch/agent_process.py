"""The agent of this node, as its front has it: started, watched, and proven gone.

The clients of the ranks (`ranks`, `async_ranks`) add the socket to the leader. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec

from moespan import log
from moespan.config import EngineConfig, Nodes
from moespan.engine.info import EngineInfo
from moespan.errors import EngineDeadError, MoespanError
from moespan.launch.fate import OomKills, state_of
from moespan.launch.job import Job, module_arguments
from moespan.launch.stall import AgentWatch
from moespan.machine.environment import BACKEND_AUTOLOAD
from moespan.parallel.beats import Place

START_TIMEOUT_S = 3600.0
PROGRAM = module_arguments("moespan.launch.rank")
"""Arguments of Python in each rank."""

_VERDICT_S = 8.0  # in less, the agent ends the ranks and writes the cause
_CLOSE_S = 5.0
_TERMINATE_S = 6.0
_GONE_S = 30.0  # for the kernel to free what killed ranks held
_LOOK_S = 0.02


class AgentProcess:
    """The agent of this node, its ranks, and the folder of their job, for one life of an engine.

    Only `wait`, `learn_death`, `end` and `wait_until_gone` wait.

    Attributes:
        job: the folder of the job.

    Args:
        program: arguments of Python in each rank.
        cleanup: gets what undoes the start, in order.
        over: start no ranks, but tell the nodes that wait for ranks that the job is over, and why.

    Raises:
        LayoutError: the nodes cannot have equally many ranks.
    """

    def __init__(
        self,
        config: EngineConfig,
        nodes: Nodes,
        program: Sequence[str],
        cleanup: contextlib.ExitStack,
        over: str | None = None,
    ) -> None:
        self._ranks = nodes.ranks_per_node(config.layout)
        self._first_rank = nodes.node_rank * self._ranks
        self.job = Job.create(config, nodes)
        cleanup.callback(shutil.rmtree, self.job.directory, ignore_errors=True)
        if over is not None:
            self.job.write_over(over)
        self._beats = self.job.beats()
        self._oom_kills = OomKills()
        self.listener = self.job.listen()
        cleanup.callback(self.listener.close)
        self._process = start_agent(self.job, self._ranks, program)
        # Ctrl-C may cut `end` short, but the agent may not outlive its folder.
        cleanup.callback(self._kill)
        cleanup.callback(self.end)
        name = f"node {nodes.node_rank}" if nodes.nnodes > 1 else ""
        self._watch = AgentWatch(self._beats, self._ranks, self.pid, name)

    @property
    def pid(self) -> int:
        """The agent's process."""
        return self._process.pid

    def terminate(self) -> None:
        """Ask the agent to end its ranks, which may be deaf as they load weights."""
        self._process.terminate()

    def check(self) -> None:
        """Call it again and again while waiting for anything that the ranks do.

        Raises:
            EngineDeadError: the agent is stopped, or does not run; it is killed.
        """
        try:
            self._watch.check()
        except EngineDeadError:
            self._process.kill()
            raise

    def check_start(self, deadline: float) -> None:
        """The same, while the ranks start.

        Raises:
            MoespanError: the ranks have ended; the error that one raised on purpose.
            EngineDeadError: they have ended otherwise, or `time.monotonic()` is past `deadline`.
        """
        if self._process.poll() is not None:
            raise self.learn_death(starting=True)
        self.check()
        if time.monotonic() > deadline:
            raise EngineDeadError(
                "the ranks were not ready in time; a larger start_timeout_s gives them longer"
            )

    def places(self) -> list[Place]:
        """Where each rank is in its work, without asking the ranks. What is known of other nodes is
        up to some seconds old, and comes on node 0 only."""
        return sorted([*self.own_places(), *self.job.read_places()], key=lambda place: place.rank)

    def own_places(self) -> list[Place]:
        """Where each rank of this node is."""
        ranks = range(self._first_rank, self._first_rank + self._ranks)
        return [self._beats.place(at, rank) for at, rank in enumerate(ranks)]

    def with_binding(self, info: EngineInfo) -> EngineInfo:
        """The facts of the engine, with those that only the agent knows."""
        return msgspec.structs.replace(info, binding=self.job.read_binding().summary())

    def wait(self, timeout_s: float) -> int:
        """The agent's exit code.

        Raises:
            subprocess.TimeoutExpired: the agent still runs.
        """
        return self._process.wait(timeout_s)

    def learn_death(self, starting: bool) -> MoespanError:
        """The cause of the ranks' end, from the agent, which first ends the remaining ranks."""
        try:
            code = self._process.wait(_VERDICT_S)
        except subprocess.TimeoutExpired:
            self._kill()
            return EngineDeadError(
                "the leader has gone, and the agent that watches the ranks did not say why within "
                f"{_VERDICT_S:g} s"
            )
        return _error(self.job, code, starting, self._oom_kills)

    def announce_end(self) -> None:
        """Say that the front ends on purpose. It must come before the socket to the leader closes:
        an end of the front without this word counts as its death, on all nodes."""
        self._beats.announce_end()

    def end(self, timeout_s: float = _CLOSE_S + _TERMINATE_S) -> int:
        """Wait for the orderly end that closing the socket has started, then use force.

        Returns:
            The exit code of the agent: 0 if all ranks of all nodes have ended well.
        """
        close_s = min(_CLOSE_S, timeout_s / 2)
        steps = ((close_s, self._process.terminate), (timeout_s - close_s, self._process.kill))
        for wait_s, use_force in steps:
            try:
                return self._process.wait(wait_s)
            except subprocess.TimeoutExpired:
                use_force()
        return self._process.wait()

    def wait_until_gone(self) -> list[int]:
        """Wait until no process of the ranks is left, nor anything that they held on devices.

        The agent must have ended. If the agent was killed, the kernel kills the ranks, but does not
        wait until they have gone.

        Returns:
            The processes that still run after `_GONE_S`; usually none.
        """
        deadline = time.monotonic() + _GONE_S
        while remaining := [pid for pid in self._rank_pids() if _is_left(*pid)]:
            if time.monotonic() > deadline:
                break
            time.sleep(_LOOK_S)
        return [pid for pid, _ in remaining]

    def _rank_pids(self) -> list[tuple[int, int]]:
        return [self._beats.process(at) for at in range(self._ranks)]

    def _kill(self) -> None:
        """Kill the agent, and with it the ranks, unless it has ended."""
        self._process.kill()
        self._process.wait()


def _error(job: Job, code: int, starting: bool, oom_kills: OomKills) -> MoespanError:
    """The error that the agent wrote before it ended with `code`."""
    failure = job.read_failure()
    if failure is not None:
        return failure.to_error(starting)
    fate = f"ended with exit code {code}" if code >= 0 else oom_kills.fate(-code)
    return EngineDeadError(f"the agent that watches the ranks {fate}")


def _is_left(pid: int, started: int) -> bool:
    """Whether a rank's process still holds anything. A zombie holds nothing any more.

    Where this process is the init of a container, orphans become its children. So it takes in
    their ends, or they would stay zombies.
    """
    state = state_of(pid, started)
    if state == "Z":
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return bool(state) and state not in "ZX"


def start_agent(job: Job, ranks: int, program: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start the agent, which starts `ranks` ranks that run `program` in Python."""
    arguments = [str(job.directory), str(ranks), str(os.getpid()), *program]
    return subprocess.Popen(
        [sys.executable, *module_arguments("moespan.launch.agent_program"), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log.stderr_descriptor(),  # libraries of the ranks print there, and answers are ours
        start_new_session=True,  # only the front gets Ctrl-C of the terminal
        env=_environment(),
    )


def _environment() -> dict[str, str]:
    # No module may be imported from the user's current directory.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", **log.variables()}
    environment.setdefault(BACKEND_AUTOLOAD, "0")  # the agent itself imports torch
    if log.level() != "debug":  # torch warns, for example, of addresses without a name
        environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return environment
