"""How fast a running engine is, beside the limits of its machine measured right around each figure.

Through `LLM`, as a user would see it: scheduling, sampling and the front's part are in it.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from moespan.config import EngineConfig, ModelConfig
from moespan.device import DEVICES
from moespan.engine.request import OutputDelta, SamplingParams
from moespan.errors import ConfigError, MoespanError
from moespan.front.llm import LLM
from moespan.measure.probe import Probe, machine_name
from moespan.planner.work import Limits, Work, step_work
from moespan.version import __version__

Timeline = list[list[float]]
"""For each prompt, the seconds after the start at which each of its tokens came."""

FIRST_PROMPT_TOKENS = 16
"""Length of the prompt whose first token ends the start-up."""

# Threads of one process that wait for work busily (OpenMP) leave the cores to the other by then.
_SETTLE_S = 0.1


@dataclass(frozen=True)
class Workload:
    """What to measure.

    Attributes:
        prefill: lengths of the prompts, one after the other alone.
        decode_batch: numbers of sequences that decode together.
        context: prompt tokens of each of these.
        decode_tokens: tokens of each of these that are timed.
        repeats: how often everything is measured, after one round that only warms up.
    """

    prefill: tuple[int, ...] = (128, 512, 2048)
    decode_batch: tuple[int, ...] = (1, 8, 32)
    context: int = 128
    decode_tokens: int = 32
    repeats: int = 5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            values = value if isinstance(value, tuple) else (value,)
            if any(one < 1 for one in values):
                raise ConfigError(f"{name}={value} must be at least 1")
        if not self.prefill and not self.decode_batch:
            raise ConfigError("neither prefill nor decode_batch names anything to measure")


@dataclass(frozen=True)
class Speed:
    """One measurement.

    Attributes:
        seconds: of the whole prefill, or of one decode step.
        gaps_s: between two tokens of one sequence, for all sequences; empty for a prefill.
    """

    seconds: float
    gaps_s: tuple[float, ...] = ()


def timeline(llm: LLM, prompts: Sequence[list[int]], num_tokens: Sequence[int]) -> Timeline:
    """Continue each prompt greedily by its number of tokens, come what may; say when each came.

    Raises:
        MoespanError: a request failed.
    """
    times: dict[str, list[float]] = defaultdict(list)

    def note(delta: OutputDelta) -> None:
        times[delta.id] += [time.perf_counter() - started] * len(delta.token_ids)

    requests = [
        llm.request(prompt, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
        for prompt, count in zip(prompts, num_tokens, strict=True)
    ]
    started = time.perf_counter()
    for output in llm.stream(requests, note):
        if output.error is not None:
            raise MoespanError(f"a request of the benchmark failed: {output.error}")
    return [times[request.id] for _, request in requests]


def decode_speed(times: Timeline) -> Speed:
    """Of the time in which all sequences decode: from the last one's first token until one ends.

    Raises:
        MoespanError: there is no such time.
    """
    began = max(one[0] for one in times)
    ended = min(one[-1] for one in times)
    inside = [[at for at in one if began <= at <= ended] for one in times]
    gaps = tuple(b - a for one in inside for a, b in pairwise(one))
    num_tokens = sum(began < at <= ended for one in times for at in one)
    if not num_tokens or not gaps:
        raise MoespanError(
            f"{len(times)} sequences never decoded together; the KV cache or max_num_seqs is too "
            "small for them"
        )
    return Speed((ended - began) * len(times) / num_tokens, gaps)


@dataclass(frozen=True)
class Case:
    """`batch` prompts of `length` tokens; with `num_tokens` their decoding is measured, else the
    prefill of the one."""

    batch: int
    length: int
    num_tokens: int = 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens that `Speed.seconds` are for."""
        return self.batch if self.num_tokens else self.length

    def prompts(self, draw: random.Random, vocab_size: int) -> list[list[int]]:
        """Random ones."""
        return [draw.choices(range(vocab_size), k=self.length) for _ in range(self.batch)]

    def tokens_wanted(self, max_num_batched_tokens: int) -> int:
        """Tokens of each prompt's answer, so that all of them decode together for `num_tokens`
        steps, whoever's prefill comes first."""
        if not self.num_tokens:
            return 1
        room = max(max_num_batched_tokens - self.batch, 1)
        return 1 + self.num_tokens + -(-self.batch * self.length // room)

    def speed(self, times: Timeline) -> Speed:
        """Of the measurement that the tokens' times tell of."""
        return decode_speed(times) if self.num_tokens else Speed(times[0][0])

    def work(self, config: ModelConfig, engine: EngineConfig) -> Work:
        """What a prefill, or the middle one of the decode steps, cannot do without."""
        if not self.num_tokens:
            return step_work(config, engine, 1, self.length, 0)
        return step_work(config, engine, self.batch, 1, self.length + self.num_tokens / 2)

    def __str__(self) -> str:
        if not self.num_tokens:
            return f"prefill of {self.length} tokens"
        return f"decode batch {self.batch} after {self.length} tokens"


def measure(llm: LLM, case: Case, draw: random.Random) -> Speed:
    """Once, on fresh random prompts."""
    prompts = case.prompts(draw, llm.model_config.vocab_size)
    count = case.tokens_wanted(llm.config.max_num_batched_tokens)
    return case.speed(timeline(llm, prompts, [count] * case.batch))


def check_room(llm: LLM, case: Case) -> None:
    """Raise `ConfigError` if the engine has no room for `case`."""
    engine, info = llm.config, llm.info
    longest = case.length + case.tokens_wanted(engine.max_num_batched_tokens)
    if longest > engine.max_model_len:
        raise ConfigError(
            f"{case} needs sequences of {longest} tokens, and max_model_len is "
            f"{engine.max_model_len}; measure shorter ones, or raise --max-model-len"
        )
    per_replica = -(-case.batch // engine.layout.dp)
    if per_replica > engine.max_num_seqs:
        raise ConfigError(
            f"{case} needs {per_replica} sequences in a step, and max_num_seqs is "
            f"{engine.max_num_seqs}; raise --max-num-seqs"
        )
    wanted = per_replica * -(-longest // info.block_size)
    if wanted > info.num_blocks:
        raise ConfigError(
            f"{case} needs {wanted} blocks of KV cache, and there are {info.num_blocks}; "
            "measure less at once, or raise --num-blocks"
        )


def bench(llm: LLM, workload: Workload, nnodes: int = 1) -> dict[str, Any]:
    """Measure everything in turns, `workload.repeats` times after a round that only warms up.

    Token ids are random and new each time. The limits are those right before and after each
    measurement, so that a neighbour who takes bandwidth takes it from both. Of every figure it is
    the median of the repeats; the share of the limit is the median of each repeat's own share.

    Args:
        nnodes: machines that the engine runs on.

    Returns:
        What `moespan bench --json` prints, but for the start-up.

    Raises:
        ConfigError: the engine has no room for what is to be measured, or shares prefixes.
        MoespanError: a request failed.
    """
    if llm.config.enable_prefix_caching:
        raise ConfigError("the prefix cache would keep what is measured; start without it")
    cases = [
        *(Case(1, length) for length in workload.prefill),
        *(Case(batch, workload.context, workload.decode_tokens) for batch in workload.decode_batch),
    ]
    for case in cases:
        check_room(llm, case)
    engine, info = llm.config, llm.info
    draw = random.Random(0)
    speeds: dict[Case, list[Speed]] = {case: [] for case in cases}
    limits: dict[Case, list[Limits]] = {case: [] for case in cases}
    probes: list[Limits] = []
    for case in cases:
        measure(llm, case, draw)
    # Ranks on the host share one machine; elsewhere each has a device of its own.
    num_devices = nnodes if DEVICES[engine.device].is_host else engine.layout.world_size
    with Probe(engine.device, engine.dtype, num_devices) as probe:
        probes.append(probe())
        for _ in range(workload.repeats):
            for case in cases:
                time.sleep(_SETTLE_S)
                speeds[case].append(measure(llm, case, draw))
                time.sleep(_SETTLE_S)
                probes.append(probe())
                limits[case].append(Limits.mean(probes[-2], probes[-1]))
        peak_bytes = peak_rss_bytes(without=probe.pid)
    rows = {
        case: _row(case, case.work(llm.model_config, engine), speeds[case], limits[case])
        for case in cases
    }
    return {
        "model": engine.model,
        "device": engine.device,
        "machine": machine_name(engine.device),
        "cores": len(os.sched_getaffinity(0)),
        "dtype": engine.dtype,
        "quantization": info.quantization,
        "kv_cache_dtype": info.cache_dtype,
        "layout": engine.layout.sizes,
        "versions": versions(),
        "settings": asdict(workload),
        "prefill": {str(case.length): rows[case] for case in cases if not case.num_tokens},
        "decode": {str(case.batch): rows[case] for case in cases if case.num_tokens},
        "bandwidth_GBps": statistics.median(one.bytes_per_s for one in probes) / 1e9,
        "gemm_TFLOPs": statistics.median(one.operations_per_s for one in probes) / 1e12,
        "bandwidth_range_GBps": [
            pick(one.bytes_per_s for one in probes) / 1e9 for pick in (min, max)
        ],
        "peak_rss_bytes": peak_bytes,
        "weight_bytes": info.weight_bytes,
        "load_s": info.load_s,
    }


def first_token_s(llm: LLM) -> float:
    """Seconds from the start of this process until the engine has answered its first prompt.

    Call it once, right after the engine has started. What was done before it is in it.
    """
    timeline(llm, [[0] * FIRST_PROMPT_TOKENS], [1])
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def peak_rss_bytes(pid: int | None = None, without: int = 0) -> int:
    """Most memory that a process and those under it held, each at its own time, on this machine.

    Args:
        pid: number of the process; None is this one.
        without: number of a process that does not count.
    """
    children: dict[int, list[int]] = defaultdict(list)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        children[parent].append(int(process.name))

    def tree(pid: int) -> Iterator[int]:
        if pid != without:
            yield pid
            for child in children[pid]:
                yield from tree(child)

    return sum(map(_peak_rss_bytes_of, tree(pid or os.getpid())))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed."""
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    from importlib.metadata import version

    return {"moespan": __version__, "torch": version("torch")}


def _row(
    case: Case, work: Work, speeds: Sequence[Speed], limits: Sequence[Limits]
) -> dict[str, Any]:
    """One line of the table, as JSON holds it."""
    seconds = [speed.seconds for speed in speeds]
    median_s = statistics.median(seconds)
    shares = [work.least_s(one) / s for one, s in zip(limits, seconds, strict=True)]
    row: dict[str, Any] = {
        "tokens_per_s": case.tokens_per_step / median_s,
        "limit_share": statistics.median(shares),
        "bound": statistics.mode(work.bound(one) for one in limits),
        "spread": (max(seconds) - min(seconds)) / median_s,
    }
    if gaps := [gap for speed in speeds for gap in speed.gaps_s]:
        row |= {
            "inter_token_s": statistics.median(gaps),
            "inter_token_p99_s": percentile(gaps, 0.99),
        }
    else:
        row["first_token_s"] = median_s
    return row | {
        "seconds": seconds,
        "limit_shares": shares,
        "operations": work.operations,
        "bytes": work.num_bytes,
    }


def _peak_rss_bytes_of(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)
