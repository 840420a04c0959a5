"""All-reduces over each axis of a layout, timed on its real ranks.

The doctor calls `measure`; each rank runs `main` of this file. The ranks are started by the same
agent, bound to the same cores and given the same environment as the ranks of an engine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable

import msgspec

from moespan.config import EngineConfig, Nodes
from moespan.device import DEVICES
from moespan.doctor.report import Finding, ok, problem, skipped, warning
from moespan.errors import EngineDeadError, MoespanError
from moespan.launch.agent_process import start_agent
from moespan.launch.job import Job, module_arguments
from moespan.parallel.beats import Beat

_RESULTS = "collectives.json"
_WARMUP, _REPEATS = 3, 9

# NPUs of one A2 server → published bytes per second over the bus (CANN 8.0).
_PUBLISHED = {2: 18e9, 4: 30e9, 8: 72e9}


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """The time of one all-reduce.

    Attributes:
        ranks: number of ranks of the axis, n.
        median_s: median on the slowest rank.
        bus_bytes_per_s: 2·(n − 1)/n of the message per `median_s`: the load of a link.
        one_shot: whether the ranks summed it in one kernel (`moespan.parallel.one_shot`).
    """

    axis: str
    ranks: int
    message_bytes: int
    median_s: float
    bus_bytes_per_s: float
    one_shot: bool = False


def measure(config: EngineConfig, timeout_s: float = 300.0) -> list[Timing]:
    """Start the ranks of `config`'s layout on its device, time them, and end them.

    Raises:
        MoespanError: the error of a rank, or `timeout_s` is over.
    """
    job = Job.create(config, Nodes())
    agent = start_agent(
        job, config.layout.world_size, module_arguments("moespan.doctor.collectives")
    )
    try:
        code = agent.wait(timeout_s)
        if failure := job.read_failure():
            raise failure.to_error(starting=True)
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


def findings(config: EngineConfig, nnodes: int = 1) -> list[Finding]:
    """One finding for each axis of `config`'s layout."""
    return [msgspec.structs.replace(one, check="collectives") for one in _findings(config, nnodes)]


def _findings(config: EngineConfig, nnodes: int) -> list[Finding]:
    if config.layout.world_size == 1:
        return [skipped("a single rank sends nothing: name a layout, such as -tp 8")]
    if nnodes > 1:
        return [skipped("timed on one node only: name a layout of one node")]
    try:
        timings = measure(config)
    except MoespanError as error:
        fix = "the last lines of the error say where; the findings above may say why"
        return [problem(f"all-reduces over {config.layout} failed: {error}", fix)]
    if not timings:
        return [skipped(f"{config.layout} has no axis with traffic")]
    axes = dict.fromkeys(timing.axis for timing in timings)
    return [judge([one for one in timings if one.axis == axis], config.device) for axis in axes]


def judge(timings: list[Timing], device: str) -> Finding:
    """The finding for one axis, from its timings in order of message size."""
    words = f"all-reduce over {timings[0].axis} of {timings[0].ranks}: " + ", ".join(
        f"{_size(one.message_bytes)} {one.median_s * 1e6:.0f} µs "
        f"({one.bus_bytes_per_s / 1e9:.2f} GB/s{', one shot' if one.one_shot else ''})"
        for one in timings
    )
    expected = _PUBLISHED.get(timings[0].ranks) if device == "npu" else None
    if expected is not None and timings[-1].bus_bytes_per_s < expected / 2:
        return warning(
            f"{words}; others have measured {expected / 1e9:.0f} GB/s",
            "end other jobs; npu-smi info -t topo must show HCCS between all NPUs",
        )
    return ok(words)


def _size(count: int) -> str:
    return f"{count >> 20} MB" if count >= 1 << 20 else f"{count >> 10} KB"


def main() -> None:
    """The program of one rank."""
    from moespan.launch.rank import as_rank

    as_rank(_play)


def _play(job: Job, rank: int, _: Beat) -> None:
    import torch
    import torch.distributed as dist

    from moespan.launch.distributed import init_distributed, make_mesh

    config = job.read_config()
    device = init_distributed(config.device, job.store_path)
    mesh = make_mesh(config, device)
    synchronize: Callable[[], object] = (
        (lambda: None)
        if DEVICES[device.type].is_host
        else torch.get_device_module(device).synchronize
    )
    timings = []
    for name in ("tp", "sp", "pp", "ep", "ep_tp_groups"):
        axis = getattr(mesh, name)
        for message_bytes in DEVICES[device.type].timed_bytes if axis.size > 1 else ():
            x = torch.zeros(message_bytes // 4, dtype=torch.float32, device=device)
            seconds = []
            for turn in range(_WARMUP + _REPEATS):
                x.fill_(1.0)
                synchronize()
                dist.barrier()
                started = time.perf_counter()
                total = axis.all_reduce(x, "doctor")
                synchronize()
                if turn >= _WARMUP:
                    seconds.append(time.perf_counter() - started)
            if not bool((total == axis.size).all()):
                raise RuntimeError(f"the all-reduce over {name} gave a wrong sum on rank {rank}")
            slowest = torch.tensor(statistics.median(seconds))
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            median_s = float(slowest)
            carried = 2 * (axis.size - 1) / axis.size * message_bytes
            timings.append(
                Timing(
                    axis=name,
                    ranks=axis.size,
                    message_bytes=message_bytes,
                    median_s=median_s,
                    bus_bytes_per_s=carried / median_s,
                    one_shot=axis.one_shot is not None and axis.one_shot.takes(x),
                )
            )
    if rank == 0:
        (job.directory / _RESULTS).write_bytes(msgspec.json.encode(timings))
    mesh.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
