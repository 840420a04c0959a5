"""The lives of a job: its ranks may die and be started again, on all of its nodes.

Node 0 decides. Its program starts each life (`Lives`), and says when no other life follows. On
every other node `serve_node` runs the ranks of one life after the other.

| event | node 0 | the other nodes |
|---|---|---|
| node 0 closes a working engine | | end with code 0 |
| a failure before the first life is ready | raises the error | raise the same error |
| a failure later | may start the next life | wait for the next life |
| no life follows | tells the others | end; raise the reason if there is one |
| node 0 is away for `join_timeout_s` | | raise an error |

Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from moespan import log
from moespan.config import EngineConfig, Nodes
from moespan.errors import EngineDeadError, JobOverError, MoespanError, UnreachableError
from moespan.launch.agent_process import PROGRAM, AgentProcess
from moespan.launch.async_ranks import AsyncRanks, OnNews
from moespan.launch.cluster_key import keep_cluster_key
from moespan.machine.binding import cpus_beside, keep_to
from moespan.machine.topology import format_list

_LOOK_S = 0.5  # between two looks at the agent
_TELL_S = 15.0  # for the other nodes to come and hear that no life follows


class Lives:
    """Starts the ranks of one config, again and again, on node 0.

    If the nodes have no cluster key, it makes one, which holds for all lives. While ranks run, this
    process keeps to the cores that none of them is bound to, if there are some.
    """

    def __init__(
        self, config: EngineConfig, nodes: Nodes, *, program: Sequence[str] = PROGRAM
    ) -> None:
        keep_cluster_key(nodes, log.logger.warning)
        self._config, self._nodes, self._program = config, nodes, program
        self._newest: AsyncRanks | None = None
        self._cpus = os.sched_getaffinity(0)

    async def start(self, on_news: OnNews) -> AsyncRanks:
        """The next life; see `AsyncRanks.start`."""
        self._keep_to(self._cpus)  # the ranks share the cores that they inherit
        ranks = await AsyncRanks.start(
            self._config, nodes=self._nodes, on_news=on_news, program=self._program
        )
        self._newest = ranks
        self._keep_to(cpus_beside(ranks.binding, self._cpus))
        return ranks

    def _keep_to(self, cpus: set[int]) -> None:
        if cpus == os.sched_getaffinity(0):
            return
        try:
            keep_to(cpus)
        except OSError as error:
            log.logger.warning("the server keeps to no cores of its own: %s", error.strerror)
        else:
            log.logger.info("the server runs on cores %s", format_list(sorted(cpus)))

    def end(self, reason: str = "") -> None:
        """No life follows. Tells the other nodes, if they wait for one, and waits until they know,
        `_TELL_S` at most.

        Args:
            reason: why the job has failed; empty if it ends on purpose.
        """
        is_known = self._newest is None or self._newest.has_ended_well
        if is_known or self._nodes.nnodes == 1:
            return
        with contextlib.ExitStack() as cleanup, contextlib.suppress(subprocess.TimeoutExpired):
            agent = AgentProcess(self._config, self._nodes, self._program, cleanup, over=reason)
            cleanup.callback(agent.terminate)
            agent.wait(_TELL_S)


def serve_node(
    config: EngineConfig,
    nodes: Nodes,
    *,
    program: Sequence[str] = PROGRAM,
    comes_back: bool = False,
) -> NoReturn:
    """Run the ranks of a node other than node 0 until the job ends; then exit with code 0.

    Args:
        comes_back: run the ranks of the next life, too, if a life that was ready has failed. The
            first SIGTERM does not end a ready life, which ends with node 0; a second one does.

    Raises:
        LayoutError: the nodes cannot have equally many ranks.
        MeetingError: the nodes did not come together, or no life follows a failure.
        MoespanError: the failure that ended the job, on whatever node.
    """
    if comes_back:
        _Node(config, nodes, program).run_lives()
    else:
        _Node(config, nodes, program).run_life()
    sys.exit(0)


class _Node:
    """A node other than node 0."""

    def __init__(self, config: EngineConfig, nodes: Nodes, program: Sequence[str]) -> None:
        self._config, self._nodes, self._program = config, nodes, program
        self._agent: AgentProcess | None = None
        self._is_asked_to_end = False

    def run_lives(self) -> None:
        """Run one life after the other, until node 0 ends them."""
        signal.signal(signal.SIGTERM, self._take_sigterm)
        has_been_ready = False
        while True:
            try:
                return self.run_life()
            except JobOverError as over:
                if str(over):
                    raise
                return None
            except UnreachableError:
                raise
            except MoespanError as failure:
                has_been_ready = has_been_ready or self._is_ready
                if self._is_asked_to_end or not has_been_ready:
                    raise
                log.logger.error(f"{failure}\nthis node waits for node 0 to start the ranks again")

    def run_life(self) -> None:
        """Run the ranks until they end; nothing is left of them then.

        Raises:
            MoespanError: why they failed.
        """
        with contextlib.ExitStack() as cleanup:
            agent = self._agent = AgentProcess(self._config, self._nodes, self._program, cleanup)
            try:
                code = self._wait()
            except EngineDeadError:  # `check` has killed the agent
                agent.end()
                agent.wait_until_gone()
                raise
            except BaseException:
                agent.terminate()
                raise
            agent.wait_until_gone()
            if code:
                raise agent.learn_death(starting=not self._is_ready)

    def _wait(self) -> int:
        assert self._agent is not None
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._agent.wait(_LOOK_S)
            self._agent.check()

    @property
    def _is_ready(self) -> bool:
        """Whether the ranks of the newest life have loaded the model."""
        return self._agent is not None and all(one.is_ready for one in self._agent.own_places())

    def _take_sigterm(self, number: int, _: FrameType | None) -> None:
        if self._is_asked_to_end or not self._is_ready:
            sys.exit(128 + number)
        self._is_asked_to_end = True
        log.logger.info("this node ends with node 0, or at once at a second SIGTERM")
