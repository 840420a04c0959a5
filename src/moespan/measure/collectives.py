"""Collectives over each axis of a layout, timed on its real ranks.

`measure` starts the ranks; each runs `main` of this file. The ranks are started by the same agent,
bound to the same cores and given the same environment as the ranks of an engine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from moespan.config import EngineConfig, Nodes
from moespan.device import DEVICES
from moespan.errors import EngineDeadError
from moespan.launch.agent_process import start_agent
from moespan.launch.job import Job, module_arguments
from moespan.parallel.beats import Beat
from moespan.parallel.counters import sent_bytes

if TYPE_CHECKING:
    import torch

    from moespan.parallel.mesh import Axis, Mesh

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")
"""Collectives that can be timed, as `moespan.parallel.counters` names them."""

WAITS = "waits"
"""Axis of the timings that say what a collective takes longer after work than alone."""

_RESULTS, _WANTED = "collectives.json", "wanted.json"
_WARMUP, _REPEATS = 3, 9
_WAITS_BYTES, _RESULT_BYTES = 16 << 10, 256
# Read before a collective that is timed after work.
_LEAST_WORK_BYTES, _MOST_WORK_BYTES, _TURNS = 8 << 20, 64 << 20, 40


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What the ranks time.

    Attributes:
        kinds: some of `KINDS`.
        message_bytes: sizes; None is the device's own.
        graphs: time recorded collectives, too, where the device records them.
        axes: axes over which they are timed, as far as these have several ranks.
        plans_bytes: sizes of the leader's broadcast on the CPU.
        clock: one of `moespan.measure.operations.CLOCKS`.
        waits: time what collectives of tp take longer when ranks come to them from their work.
    """

    kinds: tuple[str, ...] = ("all_reduce",)
    message_bytes: tuple[int, ...] | None = None
    graphs: bool = False
    axes: tuple[str, ...] = ("tp", "sp", "pp", "ep", "ep_tp_groups")
    plans_bytes: tuple[int, ...] = ()
    clock: str = "wall"
    waits: bool = False


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """The time of one collective.

    Attributes:
        axis: `tp`, `sp`, ...; `control` for the leader's broadcast; `WAITS`.
        ranks: number of ranks of the axis, n.
        message_bytes: as `sent_bytes` means them.
        median_s, p10_s, p90_s: of the calls, on the slowest rank.
        bus_bytes_per_s: what a rank sends per `median_s`: the load of a link.
        one_shot: whether the ranks summed it in one kernel (`moespan.parallel.one_shot`).
        graph: whether it was recorded.
    """

    axis: str
    kind: str = "all_reduce"
    ranks: int
    message_bytes: int
    median_s: float
    p10_s: float = 0.0
    p90_s: float = 0.0
    bus_bytes_per_s: float
    one_shot: bool = False
    graph: bool = False


def measure(
    config: EngineConfig,
    wanted: Wanted | None = None,
    timeout_s: float = 300.0,
    nodes: Nodes | None = None,
) -> list[Timing]:
    """Start the ranks of `config`'s layout on its device, time them, and end them.

    Args:
        nodes: the machines that share the ranks; each of them calls this, and node 0 gets the
            timings. None: this machine has all ranks.

    Raises:
        MeetingError: the nodes did not come together.
        MoespanError: the error of a rank, or `timeout_s` is over.
    """
    nodes = nodes or Nodes()
    job = Job.create(config, nodes)
    (job.directory / _WANTED).write_bytes(msgspec.json.encode(wanted or Wanted()))
    ranks = nodes.ranks_per_node(config.layout)
    agent = start_agent(job, ranks, module_arguments(__name__))
    if nodes.nnodes > 1:
        timeout_s += nodes.join_timeout_s
    try:
        code = agent.wait(timeout_s)
        if failure := job.read_failure():
            raise failure.to_error(starting=True)
        if nodes.node_rank > 0 and not code:
            return []
        results = job.directory / _RESULTS
        if code or not results.exists():
            raise EngineDeadError(f"the agent that watches the ranks ended with exit code {code}")
        return msgspec.json.decode(results.read_bytes(), type=list[Timing])
    except subprocess.TimeoutExpired:
        raise EngineDeadError(f"the ranks were not done within {timeout_s:g} s") from None
    finally:
        if agent.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)  # the kernel then kills the ranks
            agent.wait()
        shutil.rmtree(job.directory, ignore_errors=True)


def main() -> None:
    """The program of one rank."""
    from moespan.launch.rank import as_rank

    as_rank(_play)


def _play(job: Job, rank: int, _: Beat) -> None:
    import torch.distributed as dist

    from moespan.launch.distributed import init_distributed, make_mesh

    config = job.read_config()
    wanted = msgspec.json.decode((job.directory / _WANTED).read_bytes(), type=Wanted)
    # Ranks of many nodes find each other through the agents' store, which the environment names.
    store_path = job.store_path if job.read_nodes().nnodes == 1 else None
    device = init_distributed(config.device, store_path)
    mesh = make_mesh(config, device)
    clock = _Clock(config, mesh, wanted.clock)
    timings = []
    sizes = wanted.message_bytes or DEVICES[device.type].timed_bytes
    for name in wanted.axes:
        axis = getattr(mesh, name)
        for kind in wanted.kinds if axis.size > 1 else ():
            for message_bytes in sizes:
                timings += clock.time(axis, kind, message_bytes, wanted.graphs)
    timings += [clock.time_plans(size) for size in wanted.plans_bytes]
    if wanted.plans_bytes and config.layout.world_size > 1:
        timings.append(clock.time_results())
    if wanted.waits and mesh.tp.size > 1:
        timings += [clock.time_waits(mesh.tp, kind) for kind in wanted.kinds]
    if rank == 0:
        (job.directory / _RESULTS).write_bytes(msgspec.json.encode(timings))
    mesh.close()
    dist.destroy_process_group()


class _Clock:
    """Times calls that all ranks make together."""

    def __init__(self, config: EngineConfig, mesh: Mesh, clock: str) -> None:
        import torch

        from moespan.measure.operations import CLOCKS, synchronizer

        self._config, self._mesh = config, mesh
        self._synchronize = synchronizer(mesh.device)
        self._now = CLOCKS[clock].now
        if CLOCKS[clock].one_thread:
            torch.set_num_threads(1)

    def time(self, axis: Axis, kind: str, message_bytes: int, graphs: bool) -> list[Timing]:
        """Eager calls, and recorded ones with `graphs`."""
        run, x = _call(axis, kind, message_bytes, self._mesh.device)
        one_shot = kind == "all_reduce" and axis.one_shot is not None and axis.one_shot.takes(x)
        seconds = self._slowest(run)
        if kind == "all_reduce":
            x.fill_(1.0)
            if not bool((axis.all_reduce(x, "doctor") == axis.size).all()):
                raise RuntimeError(f"the all-reduce over {axis.name} gave a wrong sum")
        found = [_timing(axis, kind, message_bytes, seconds, one_shot)]
        if graphs and kind != "send":
            from moespan.measure.operations import in_graph
            from moespan.ops import ops_for

            calls = 8
            replay = in_graph(ops_for(self._config.device, self._config), run, calls)
            if replay is not None:
                each = [one / calls for one in self._slowest(replay)]
                timing = _timing(axis, kind, message_bytes, each, one_shot)
                found.append(msgspec.structs.replace(timing, graph=True))
        return found

    def time_plans(self, num_bytes: int) -> Timing:
        """The leader's broadcast of a message."""
        control, message = self._mesh.control, bytes(num_bytes)
        run = (
            (lambda: control.broadcast(message, "plans"))
            if self._mesh.is_leader
            else control.receive_broadcast
        )
        seconds = self._slowest(run)
        ranks = self._mesh.layout.world_size
        return Timing(
            axis="control",
            kind="broadcast",
            ranks=ranks,
            message_bytes=num_bytes,
            median_s=statistics.median(seconds),
            bus_bytes_per_s=num_bytes / statistics.median(seconds),
        )

    def time_results(self) -> Timing:
        """The last rank's results on their way to the leader."""
        control, message = self._mesh.control, bytes(_RESULT_BYTES)
        ranks = self._mesh.layout.world_size

        def run() -> None:
            if self._mesh.is_leader:
                control.receive(ranks - 1)
            elif self._mesh.rank == ranks - 1:
                control.send(message, "result")

        median_s = statistics.median(self._slowest(run))
        return Timing(
            axis="control",
            kind="send",
            ranks=ranks,
            message_bytes=_RESULT_BYTES,
            median_s=median_s,
            bus_bytes_per_s=_RESULT_BYTES / median_s,
        )

    def time_waits(self, axis: Axis, kind: str) -> Timing:
        """The extra time of a collective after work, the mean over ranks: they do not
        come at the same time, and find their caches cold. The work reads as much memory as caches
        hold, as operations do."""
        import torch
        import torch.distributed as dist

        from moespan.measure.probe import last_level_cache_bytes

        run, _ = _call(axis, kind, _WAITS_BYTES, self._mesh.device)
        size = min(max(last_level_cache_bytes(), _LEAST_WORK_BYTES), _MOST_WORK_BYTES)
        numbers = torch.ones(size // 4, device=self._mesh.device)
        alone = statistics.median(self._slowest(run))
        seconds = []
        for _ in range(_WARMUP + _TURNS):
            numbers.sum()
            self._synchronize()
            started = self._now()
            run()
            self._synchronize()
            seconds.append(self._now() - started)
        total = torch.tensor(seconds[_WARMUP:], dtype=torch.float64)
        dist.all_reduce(total)
        after_work = float(total.median()) / dist.get_world_size()
        return Timing(
            axis=WAITS,
            kind=kind,
            ranks=axis.size,
            message_bytes=_WAITS_BYTES,
            median_s=max(after_work - alone, 0.0),
            bus_bytes_per_s=0.0,
        )

    def _slowest(self, run: Callable[[], object]) -> list[float]:
        """Seconds of each call on the rank that was slowest in it."""
        import torch
        import torch.distributed as dist

        seconds = []
        for turn in range(_WARMUP + _REPEATS):
            self._synchronize()
            dist.barrier()
            started = self._now()
            run()
            self._synchronize()
            if turn >= _WARMUP:
                seconds.append(self._now() - started)
        slowest = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return [float(one) for one in slowest]


def _call(
    axis: Axis, kind: str, message_bytes: int, device: torch.device
) -> tuple[Callable[[], object], torch.Tensor]:
    """A call of a collective, and its tensor: as many bytes as `sent_bytes` counts."""
    import torch

    size = axis.size
    elements = max(message_bytes // 4, size)
    if kind == "reduce_scatter":
        elements = -(-elements // size) * size
    if kind == "all_to_all":
        each = -(-elements // (size - 1))
        elements = each * size
    x = torch.ones(elements, dtype=torch.float32, device=device)
    parts: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: axis.all_reduce(x, "measure"),
        "all_gather": lambda: axis.all_gather(x, "measure"),
        "reduce_scatter": lambda: axis.reduce_scatter(x, "measure"),
        "broadcast": lambda: axis.broadcast(x, "measure"),
        "all_to_all": lambda: axis.all_to_all(
            x, [elements // size] * size, [elements // size] * size, "measure"
        ),
        "send": lambda: axis.pass_on(x),
    }
    return parts[kind], x


def _timing(
    axis: Axis, kind: str, message_bytes: int, seconds: Sequence[float], one_shot: bool
) -> Timing:
    median_s = statistics.median(seconds)
    ordered = sorted(seconds)
    return Timing(
        axis=axis.name,
        kind=kind,
        ranks=axis.size,
        message_bytes=message_bytes,
        median_s=median_s,
        p10_s=ordered[len(ordered) // 10],
        p90_s=ordered[len(ordered) * 9 // 10],
        bus_bytes_per_s=sent_bytes(kind, axis.size, message_bytes) / median_s,
        one_shot=one_shot,
    )


if __name__ == "__main__":
    main()
