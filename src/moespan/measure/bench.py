"""Measures the speed of a running engine beside the limits of its machine.

The limits are measured right before and after each figure. The engine is measured through `LLM`, as
a user sees it: the figures include scheduling, sampling and the front's share.
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

import msgspec

from moespan.config import EngineConfig, ModelConfig
from moespan.device import DEVICES
from moespan.engine.request import OutputDelta, SamplingParams
from moespan.errors import ConfigError, MoespanError
from moespan.front.llm import LLM
from moespan.measure.probe import Probe, machine_name
from moespan.planner.memory import RankMemory
from moespan.planner.work import Limits, Work, step_work
from moespan.version import __version__

Timeline = list[list[float]]
"""For each prompt, the time at which each of its tokens came, in seconds after the start."""

FIRST_PROMPT_TOKENS = 16
"""Length of the prompt whose first token ends the start-up time."""

# OpenMP threads busy-wait for work. After this time the threads of one process have left the cores
# to the other process.
_SETTLE_S = 0.1


@dataclass(frozen=True)
class Workload:
    """Prefills and decodes to measure.

    Attributes:
        prefill: lengths of single prompts, which run one after another.
        decode_batch: numbers of sequences that decode together.
        context: prompt tokens of each decoding sequence.
        decode_tokens: timed tokens of each decoding sequence.
        repeats: measurements of each figure, after one warm-up round.
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
        seconds: duration of the whole prefill, or of one decode step.
        gaps_s: times between two tokens of one sequence, for all sequences; empty for a prefill.
    """

    seconds: float
    gaps_s: tuple[float, ...] = ()


def timeline(llm: LLM, prompts: Sequence[list[int]], num_tokens: Sequence[int]) -> Timeline:
    """Continue each prompt greedily by exactly its number of tokens; EOS does not end it.

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
    """Speed while all sequences decode: from the latest first token until a sequence ends.

    Raises:
        MoespanError: the sequences never decode all at once.
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
    """One row of the table: a single prefill, or a batch that decodes.

    Attributes:
        batch: number of prompts; 1 for a prefill.
        length: tokens of each prompt.
        num_tokens: timed decode tokens of each prompt; 0 measures the prefill.
    """

    batch: int
    length: int
    num_tokens: int = 0

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens that are processed in `Speed.seconds`."""
        return self.batch if self.num_tokens else self.length

    def prompts(self, draw: random.Random, vocab_size: int) -> list[list[int]]:
        """Random prompts."""
        return [draw.choices(range(vocab_size), k=self.length) for _ in range(self.batch)]

    def tokens_wanted(self, max_num_batched_tokens: int) -> int:
        """Number of tokens to generate from each prompt.

        It is large enough for all prompts to decode together for `num_tokens` steps, although the
        first prompts decode while the others are still prefilled.
        """
        if not self.num_tokens:
            return 1
        room = max(max_num_batched_tokens - self.batch, 1)
        return 1 + self.num_tokens + -(-self.batch * self.length // room)

    def speed(self, times: Timeline) -> Speed:
        """The speed that the times of the tokens show."""
        return decode_speed(times) if self.num_tokens else Speed(times[0][0])

    def work(self, config: ModelConfig, engine: EngineConfig) -> Work:
        """Least work of the prefill, or of the middle decode step."""
        if not self.num_tokens:
            return step_work(config, engine, 1, self.length, 0)
        return step_work(config, engine, self.batch, 1, self.length + self.num_tokens / 2)

    def __str__(self) -> str:
        if not self.num_tokens:
            return f"prefill of {self.length} tokens"
        return f"decode batch {self.batch} after {self.length} tokens"


def measure(llm: LLM, case: Case, draw: random.Random) -> Speed:
    """Measure `case` once, on fresh random prompts."""
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
            f"{engine.max_model_len}; measure shorter sequences, or raise --max-model-len"
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
    """Measure all cases in turns, `workload.repeats` times after one warm-up round.

    Token ids are random, and new in each measurement. Each figure is the median of the repeats.
    The limits are measured right before and after each measurement, so that a neighbour who takes
    bandwidth takes it from both. The share of the limit is the median of the shares of the repeats.

    Args:
        nnodes: number of machines on which the engine runs.

    Returns:
        The object that `moespan bench --json` prints, except the start-up times.

    Raises:
        ConfigError: the engine has no room for a case, or has a prefix cache.
        MoespanError: a request failed.
    """
    if llm.config.enable_prefix_caching:
        raise ConfigError(
            "enable_prefix_caching=True is refused: the prefix cache would keep the measured "
            "prompts; start without it"
        )
    cases = [
        *(Case(1, length) for length in workload.prefill),
        *(Case(batch, workload.context, workload.decode_tokens) for batch in workload.decode_batch),
    ]
    for case in cases:
        check_room(llm, case)
    # Ranks on the host share one machine; elsewhere each rank has a device of its own.
    is_host = DEVICES[llm.config.device].is_host
    num_devices = nnodes if is_host else llm.config.layout.world_size
    return _report(llm, workload, _measure_all(llm, cases, workload.repeats, num_devices))


@dataclass
class _Measurements:
    """Everything that is measured.

    Attributes:
        speeds: speeds of each case, one for each repeat.
        limits: mean of the limits before and after each of `speeds`.
        probes: all measurements of the limits, in their order.
        peak_bytes: peak memory of the engine on this machine.
        memory: what each rank takes, by part.
        drafted: drafts that steps computed, and those of them that were right.
    """

    speeds: dict[Case, list[Speed]]
    limits: dict[Case, list[Limits]]
    probes: list[Limits]
    peak_bytes: int = 0
    memory: Sequence[RankMemory] = ()
    drafted: tuple[int, int] = (0, 0)


def _measure_all(llm: LLM, cases: list[Case], repeats: int, num_devices: int) -> _Measurements:
    """Measure `cases` in turns, with the limits of `num_devices` devices in between."""
    draw = random.Random(0)
    for case in cases:
        measure(llm, case, draw)
    found = _Measurements({case: [] for case in cases}, {case: [] for case in cases}, [])
    with Probe(llm.config.device, llm.config.dtype, num_devices) as probe:
        found.probes.append(probe())
        for _ in range(repeats):
            for case in cases:
                time.sleep(_SETTLE_S)
                found.speeds[case].append(measure(llm, case, draw))
                time.sleep(_SETTLE_S)
                found.probes.append(probe())
                found.limits[case].append(Limits.mean(*found.probes[-2:]))
        found.peak_bytes = peak_rss_bytes(without=probe.pid)
    found.memory, stats = llm.memory(), llm.stats()
    found.drafted = (stats.num_draft_tokens, stats.num_accepted_tokens)
    return found


def _report(llm: LLM, workload: Workload, found: _Measurements) -> dict[str, Any]:
    """All figures as a JSON object."""
    engine, info = llm.config, llm.info
    rows = {
        case: _row(case, case.work(llm.model_config, engine), speeds, found.limits[case])
        for case, speeds in found.speeds.items()
    }
    bandwidths = [one.bytes_per_s for one in found.probes]
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
        "prefill": {str(case.length): row for case, row in rows.items() if not case.num_tokens},
        "decode": {str(case.batch): row for case, row in rows.items() if case.num_tokens},
        "bandwidth_GBps": statistics.median(bandwidths) / 1e9,
        "gemm_TFLOPs": statistics.median(one.operations_per_s for one in found.probes) / 1e12,
        "bandwidth_range_GBps": [min(bandwidths) / 1e9, max(bandwidths) / 1e9],
        "peak_rss_bytes": found.peak_bytes,
        "weight_bytes": info.weight_bytes,
        "memory": msgspec.to_builtins(found.memory),
        "load_s": info.load_s,
        "draft_tokens": found.drafted[0],
        "accepted_tokens": found.drafted[1],
    }


def first_token_s(llm: LLM) -> float:
    """Seconds from the start of this process until the engine has answered its first prompt.

    Call it once, right after the engine has started. All earlier work of the process counts.
    """
    timeline(llm, [[0] * FIRST_PROMPT_TOKENS], [1])
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def peak_rss_bytes(pid: int | None = None, without: int = 0) -> int:
    """Sum of the peak memory of a process and of its descendants on this machine.

    Each process may reach its peak at another time.

    Args:
        pid: id of the process; None is this process.
        without: id of a process that does not count, nor do its descendants.
    """
    children: dict[int, list[int]] = defaultdict(list)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # the process has ended meanwhile
            continue
        children[parent].append(int(process.name))

    def tree(pid: int) -> Iterator[int]:
        if pid != without:
            yield pid
            for child in children[pid]:
                yield from tree(child)

    return sum(map(_peak_rss_bytes_of, tree(pid or os.getpid())))


def percentile(values: Sequence[float], share: float) -> float:
    """Smallest of `values` such that at least `share` of all values are not larger."""
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


def versions() -> dict[str, str]:
    """Versions of the software on which the figures depend."""
    from importlib.metadata import version

    return {"moespan": __version__, "torch": version("torch")}


def _row(
    case: Case, work: Work, speeds: Sequence[Speed], limits: Sequence[Limits]
) -> dict[str, Any]:
    """One row of the table, as a JSON object."""
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
