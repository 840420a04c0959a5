"""Predicted beside measured, on this machine: memory by part, single steps, loads, all layouts.

    python benchmarks/plan_accuracy.py --device cpu --clock cpu --parts memory,steps,loads
    python benchmarks/plan_accuracy.py --device cpu --parts order --ranks 2

Every measured engine runs in a process of its own. What is predicted never comes from the run that
it is compared with: the base is that of a tiny model, times come from a calibration, and sizes and
lengths of loads differ from those that were calibrated. README.md explains the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from moespan.checkpoint.placement import cache_heads
from moespan.checkpoint.presets import preset
from moespan.config import EngineConfig, Layout, ModelConfig, all_layouts
from moespan.device import DEVICES
from moespan.machine.cores import usable_cores
from moespan.planner.activations import Step
from moespan.planner.cost import ReplicaStep, StepCost
from moespan.planner.expert_load import Routing
from moespan.planner.load import Load, drawn
from moespan.planner.memory import MachineMemory, RankMemory, loading_bytes, memory_of_rank
from moespan.planner.outcome import Outcome
from moespan.planner.profile import Profile
from moespan.planner.profile import load as load_profile
from moespan.planner.work import Chunk
from moespan.search.predict import predict
from moespan.search.simulate import simulate

if TYPE_CHECKING:
    from moespan import LLM

GIB = 1 << 30
HUGE_PAGE_BYTES = 2 << 20
LAYOUTS: dict[str, Layout] = {
    "one rank": Layout(),
    "tp=2": Layout(tp=2),
    "tp=2 ep=2": Layout(tp=2, ep=2),
    "pp=2": Layout(pp=2),
    "sp=2": Layout(sp=2),
    "dp=2": Layout(dp=2),
    "dp=2 ep=2": Layout(dp=2, ep=2),
}
OUTPUT_TOKENS = 8


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """An engine whose memory is measured."""

    layout: Layout = Layout()
    device: str = "cpu"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_num_batched_tokens: int = 1024
    geometry: dict[str, int] = {}
    preset: str = "16b-4l"

    @property
    def model(self) -> ModelConfig:
        """The model's geometry."""
        return ModelConfig.from_dict(preset(self.preset, dict(self.geometry)))

    @property
    def options(self) -> dict[str, Any]:
        """Options of the engine that is measured."""
        return {
            "device": self.device,
            "load_format": "dummy",
            "quantization": self.quantization,
            "kv_cache_dtype": self.kv_cache_dtype,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "max_num_seqs": 16,
            "max_model_len": 2 * self.max_num_batched_tokens,
            "num_blocks": 6 * self.max_num_batched_tokens // DEVICES[self.device].block_size,
            "enable_prefix_caching": False,
        }

    @property
    def engine(self) -> EngineConfig:
        """The configuration of its ranks."""
        block_size = DEVICES[self.device].block_size
        return EngineConfig("", self.layout, block_size=block_size, **self.options)


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Memory that the ranks of a case took."""

    ranks: list[RankMemory]


def run_case(case: Case) -> Measured:
    """Start the engine, run steps at its limits on every replica, and measure. In this process."""
    from moespan import LLM, SamplingParams
    from moespan.front.settings import FIELD_OF_AXIS

    with tempfile.TemporaryDirectory() as folder:
        raw = preset(case.preset, dict(case.geometry))
        Path(folder, "config.json").write_text(json.dumps(raw))
        sizes: dict[str, Any] = {
            FIELD_OF_AXIS[axis]: size for axis, size in case.layout.sizes.items()
        }
        with LLM(folder, **case.options, **sizes) as llm:
            draw = random.Random(0)
            params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
            length = case.max_num_batched_tokens
            for _ in range(2):
                requests = [
                    llm.request(draw.choices(range(500), k=length), params)
                    for _ in range(2 * case.layout.dp)
                ]
                for output in llm.stream(requests):
                    if output.error is not None:
                        raise RuntimeError(output.error)
            return Measured(ranks=llm.memory())


def predicted(case: Case, rank: int, machine: MachineMemory) -> RankMemory:
    """Memory that the planner counts for a rank."""
    config, model = case.engine, case.model
    one = memory_of_rank(config, model, rank, machine, Step(sampling="greedy"))
    parts = one.with_blocks(config.num_blocks or 0)
    readers = 1
    return msgspec.structs.replace(
        parts,
        touched_bytes=_touched_bytes(case, rank)
        if DEVICES[case.device].is_host
        else parts.cache_bytes,
        loading_bytes=loading_bytes(config, model, rank, readers),
    )


def _touched_bytes(case: Case, rank: int) -> int:
    """Pages of the cache that two sequences of a replica write, in huge pages of the host."""
    config, model = case.engine, case.model
    if not DEVICES[case.device].is_host:
        blocks = config.num_blocks or 0
        return memory_of_rank(config, model, rank).with_blocks(blocks).cache_bytes
    tokens = case.max_num_batched_tokens + OUTPUT_TOKENS
    blocks = 2 * -(-tokens // config.block_size)
    heads = cache_heads(model, config.layout, rank)
    layers = len(config.layout.stages(model)[config.layout.coordinates(rank).pp])
    head_bytes = [model.head_dim, 4] if config.cache_dtype == "int8" else [2 * model.head_dim]
    found = 0
    for one in head_bytes:
        written = blocks * config.block_size * heads * one
        whole = (config.num_blocks or 0) * config.block_size * heads * one
        pages = -(-written // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        found += 2 * layers * (min(pages, whole) if whole >= HUGE_PAGE_BYTES else written)
    return found


def in_own_process(case: Case) -> Measured:
    """`run_case` in a process of its own."""
    command = [sys.executable, __file__, "--one", msgspec.json.encode(case).decode()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Measured)


def memory_cases(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """The cases of the memory table."""
    geometry = _geometry(args)
    sizes = args.batched_tokens
    for name, layout in LAYOUTS.items():
        for tokens in sizes:
            case = Case(
                layout=layout,
                device=args.device,
                max_num_batched_tokens=tokens,
                geometry=geometry,
            )
            yield f"{name}, {tokens}", case
    changed: tuple[dict[str, Any], ...] = (
        {"quantization": "int8"},
        {"quantization": "int4"},
        {"kv_cache_dtype": "int8"},
    )
    for changes in changed:
        name = " ".join(f"{key}={value}" for key, value in changes.items())
        for tokens in sizes:
            case = Case(
                device=args.device, max_num_batched_tokens=tokens, geometry=geometry, **changes
            )
            yield f"{name}, {tokens}", case


PARTS = ("base", "weights", "cache", "steps", "all", "loading")


def _parts(memory: RankMemory) -> dict[str, int]:
    """Bytes by the columns of the table."""
    steps = memory.activation_bytes + memory.slack_bytes + memory.graph_bytes
    return {
        "base": memory.base_bytes + memory.communicator_bytes,
        "weights": memory.weight_bytes,
        "cache": memory.touched_bytes,
        "steps": steps,
        "all": memory.total_bytes,
        "loading": memory.loading_bytes,
    }


def memory_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all cases and print predicted / measured MiB by part, and the error of the whole."""
    bases = {}
    for ranks in (1, 2):
        tiny = Case(
            layout=Layout(tp=ranks),
            device=args.device,
            preset="tiny",
            max_num_batched_tokens=128,
        )
        found = in_own_process(tiny).ranks
        bases[ranks] = max(one.base_bytes + one.communicator_bytes for one in found)
    print(f"base of a rank: {bases[1] / 2**20:.0f} MiB alone, {bases[2] / 2**20:.0f} of two")
    print(f"{'case':<30}{'rank':>5}" + "".join(f"{name:>14}" for name in PARTS) + "   error of all")
    rows: list[dict[str, Any]] = []
    for name, case in memory_cases(args):
        if args.only and not any(part in name for part in args.only):
            continue
        base = bases[min(case.layout.world_size, 2)]
        default = MachineMemory.of(args.device)
        machine = MachineMemory(base, default.slack, default.recorded_bytes)
        measured = in_own_process(case).ranks
        for rank, one in enumerate(measured):
            expected, real = _parts(predicted(case, rank, machine)), _parts(one)
            error = expected["all"] / real["all"] - 1
            cells = "".join(
                f"{f'{expected[part] / 2**20:.0f}/{real[part] / 2**20:.0f}':>14}" for part in PARTS
            )
            print(f"{name:<30}{rank:>5}{cells}{error:>+13.1%}", flush=True)
            rows.append({"case": name, "rank": rank, "predicted": expected, "measured": real})
    errors = [abs(row["predicted"]["all"] / row["measured"]["all"] - 1) for row in rows]
    misses = sum(one > 0.03 for one in errors)
    print(f"{len(rows)} ranks: largest error {max(errors):.1%}, {misses} beyond 3 %")
    return rows


# Single steps of the worker, without the leader


STEPS: dict[str, tuple[list[int], list[int]]] = {
    "decode 1 after 200": ([1], [200]),
    "decode 8 after 200": ([1] * 8, [200] * 8),
    "decode 32 after 200": ([1] * 32, [200] * 32),
    "prefill 100": ([100], [0]),
    "prefill 230": ([230], [0]),
    "decode 10 after 300, prefill 150": ([1] * 10 + [150], [300] * 10 + [0]),
    "decode 100 after 200": ([1] * 100, [200] * 100),
    "prefill 500": ([500], [0]),
    "prefill 1500": ([1500], [0]),
}
"""Name → query and context lengths. Their sizes are not those that are calibrated."""


def step_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Calibrate, then measure and predict single steps of one rank, in this process."""
    import torch

    from moespan.checkpoint.loader import load_weights
    from moespan.checkpoint.placement import place
    from moespan.checkpoint.random import RandomSource
    from moespan.engine.worker import Worker
    from moespan.measure.operations import timed
    from moespan.ops import ops_for
    from moespan.parallel.mesh import Mesh

    config = _limits(args)
    model = _model(args)
    profile = calibrated(args, config, model)
    device, dtype = torch.device(args.device), torch.bfloat16
    ops = ops_for(args.device, config)
    source = RandomSource(model, dtype, 0, device)
    weights, _ = load_weights(
        place(model, Layout(), 0), source, dtype, device, new_builder=ops.builder
    )
    blocks = max(
        sum(-(-sum(one) // config.block_size) for one in zip(*lengths, strict=True))
        for lengths in STEPS.values()
    )
    worker = Worker(config, model, Mesh.create(Layout(), device), ops, weights, blocks)
    cost = StepCost(profile, model, config, Routing(model))
    print(f"{'step':<36}{'predicted ms':>14}{'measured ms':>14}{'p10 to p90':>18}{'error':>9}")
    rows = []
    for name, (queries, contexts) in STEPS.items():
        plans, plan = _plan(queries, contexts, config.block_size, model.vocab_size)

        def run(plans: Any = plans, plan: Any = plan) -> None:
            pending = worker.execute(plans, plan)
            assert pending is not None
            pending.wait()

        times = timed(run, device, clock=args.clock, least=5, most=15, seconds=2.0)
        decodes = [context for query, context in zip(queries, contexts, strict=True) if query == 1]
        chunks = tuple(
            Chunk(query, context)
            for query, context in zip(queries, contexts, strict=True)
            if query > 1
        )
        cached = sum(decodes) + len(decodes)
        step = ReplicaStep(sum(queries), len(queries), len(decodes), cached, chunks)
        expected = cost.stages_s([step])[0]
        error = expected / times.median_s - 1
        spread = f"{1e3 * times.quantile_s(0.1):.1f} to {1e3 * times.quantile_s(0.9):.1f}"
        figures = f"{1e3 * expected:>14.2f}{1e3 * times.median_s:>14.2f}"
        print(f"{name:<36}{figures}{spread:>18}{error:>+9.1%}", flush=True)
        rows.append({"step": name, "predicted_s": expected, "measured_s": times.median_s})
    return rows


def _model(args: argparse.Namespace) -> ModelConfig:
    """The geometry that is measured."""
    return ModelConfig.from_dict(preset("16b-4l", _geometry(args)))


def _geometry(args: argparse.Namespace) -> dict[str, int]:
    """The values of the config that differ from the preset."""
    return {"num_hidden_layers": args.layers, **args.geometry}


def _limits(args: argparse.Namespace, layout: Layout | None = None) -> EngineConfig:
    """Limits of the steps that are calibrated and measured."""
    return EngineConfig(
        "",
        layout or Layout(),
        args.device,
        block_size=DEVICES[args.device].block_size,
        max_num_batched_tokens=args.step_tokens,
        max_num_seqs=128,
        max_model_len=2048,
    )


def calibrated(
    args: argparse.Namespace,
    config: EngineConfig,
    model: ModelConfig,
    layouts: Sequence[Layout] = (),
) -> Profile:
    """The profile of an earlier call if `--reuse` is given, else of a calibration.

    Args:
        layouts: whose shapes are calibrated beside the config's own.
    """
    import torch

    from moespan.measure.calibrate import Calibration
    from moespan.measure.operations import CLOCKS

    if CLOCKS[args.clock].one_thread:
        torch.set_num_threads(1)
    if args.reuse:
        return load_profile(str(args.profile))
    args.profile.parent.mkdir(parents=True, exist_ok=True)
    calibration = Calibration(
        config, model, args.profile, args.seconds, args.clock, layouts=layouts
    )
    profile = calibration.run()
    seconds = profile.made.seconds if profile.made is not None else 0.0
    is_complete = profile.made is not None and profile.made.complete
    missing = "" if is_complete else ", the own layout's NOT COMPLETE"
    print(f"calibrated in {seconds:.0f} s, {len(profile.operations)} curves{missing}", flush=True)
    return profile


def _plan(
    queries: list[int], contexts: list[int], block_size: int, vocab_size: int
) -> tuple[Any, Any]:
    """The message of a step, and its plan for the only replica."""
    from moespan.engine.step import SampleRow, StepPlan, StepPlans

    draw = random.Random(1)
    tables, first = [], 0
    for query, context in zip(queries, contexts, strict=True):
        count = -(-(query + context) // block_size)
        tables.append(list(range(first, first + count)))
        first += count
    row = SampleRow(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=1)
    plan = StepPlan(
        step=0,
        token_ids=draw.choices(range(vocab_size), k=sum(queries)),
        query_lens=queries,
        context_lens=contexts,
        block_tables=tables,
        sampled=list(range(len(queries))),
        positions=[0] * len(queries),
        samples=[row] * len(queries),
    )
    return StepPlans.of([plan]), plan


# Loads: an engine under arrivals, beside the simulation of the same arrivals

STATISTICS = ("p50", "p90", "p99")


def load_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the capacity of an engine, then loads at shares of it; predict each."""
    layout, model = args.layout, _model(args)
    config = _load_config(args, layout)
    profile = calibrated(args, _limits(args, layout), model)
    sharers = 1 if args.clock == "cpu" else _sharers(profile, layout.world_size)
    cost = StepCost(profile, model, config, Routing(model), ranks_per_node=sharers)
    rows: list[dict[str, Any]] = []
    print(f"{'load':<12}{'':<16}{'predicted':>12}{'measured':>12}{'error':>9}   band")
    with _engine(args, layout) as llm:
        _run_load(llm, _load(args, 8, concurrency=8), args.clock)  # the first steps are slower
        number = max(args.requests, 5 * args.concurrency)
        full = _load(args, number, concurrency=args.concurrency)
        rate = _compared(args, llm, cost, "capacity", full, rows)
        for share in args.shares:
            load = _load(args, args.requests, rate=share * rate)
            _compared(args, llm, cost, f"{share:.0%}", load, rows)
    return rows


def _compared(
    args: argparse.Namespace,
    llm: LLM,
    cost: StepCost,
    name: str,
    load: Load,
    rows: list[dict[str, Any]],
) -> float:
    """Print and keep a load's figures; returns the requests per second that were measured."""
    model, config = _model(args), llm.config
    blocks = config.num_blocks or 0
    edges = [predict(cost, model, config, blocks, load, slower=by) for by in (1.0, 0.85, 1.15)]
    measured = _run_load(llm, load, args.clock)
    figures = [("tokens/s", [one.outcome.tokens_per_s for one in edges], measured.tokens_per_s)]
    if load.concurrency is None:
        for latency in ("ttft_s", "tpot_s"):
            for key in STATISTICS:
                values = [getattr(one.outcome, latency)[key].value for one in edges]
                real = getattr(measured, latency)[key].value
                figures.append((f"{latency[:4].upper()} {key}", values, real))
    for title, (value, *band), real in figures:
        inside = "inside" if min(band) <= real <= max(band) else "outside"
        error = f"{value / real - 1:>+9.1%}"
        print(f"{name:<12}{title:<16}{value:>12.4g}{real:>12.4g}{error}   {inside}", flush=True)
        rows.append({"load": name, "figure": title, "predicted": value, "measured": real})
    return measured.requests_per_s


def _load(
    args: argparse.Namespace,
    number: int,
    *,
    rate: float | None = None,
    concurrency: int | None = None,
) -> Load:
    return drawn(
        args.input, args.output, number, rate=rate, concurrency=concurrency, seed=3
    ).fitting(2048, clip=True)


def _load_config(args: argparse.Namespace, layout: Layout) -> EngineConfig:
    limits = {**_LOAD_LIMITS, "num_blocks": _LOAD_BLOCKS, "enable_prefix_caching": False}
    return replace(_limits(args, layout), **limits)


_LOAD_BLOCKS = 1024
_LOAD_LIMITS: dict[str, Any] = {"max_num_seqs": 24, "max_num_batched_tokens": 256}


@contextlib.contextmanager
def _engine(args: argparse.Namespace, layout: Layout) -> Iterator[LLM]:
    """An engine with random weights."""
    from moespan import LLM
    from moespan.front.settings import FIELD_OF_AXIS

    sizes: dict[str, Any] = {FIELD_OF_AXIS[axis]: size for axis, size in layout.sizes.items()}
    options = {**_LOAD_LIMITS, "num_blocks": _LOAD_BLOCKS, "max_model_len": 2048}
    with tempfile.TemporaryDirectory() as folder:
        raw = preset("16b-4l", _geometry(args))
        Path(folder, "config.json").write_text(json.dumps(raw))
        with LLM(
            folder,
            device=args.device,
            load_format="dummy",
            enable_prefix_caching=False,
            **options,
            **sizes,
        ) as llm:
            yield llm


def _run_load(llm: LLM, load: Load, clock: str = "wall") -> Outcome:
    """A load, measured. With the clock `cpu`, time is that of the busiest rank, without idle
    waits: of the engine, and of ranks for each other."""
    from moespan.measure.under_load import LoadRun

    class CpuRun(LoadRun):
        """Jumps to the next arrival where nothing is left to compute."""

        skipped_s = 0.0

        def _wait_s(self, due_s: float) -> float:
            wait_s = super()._wait_s(due_s)
            if self._num_open or not 0 < wait_s < math.inf:
                return wait_s
            self.skipped_s += wait_s
            return 0.0

    if clock == "wall":
        run = LoadRun(llm, load)
    else:
        cpu_s = busiest_cpu_s()
        run = jumping = CpuRun(llm, load, now=lambda: cpu_s() + jumping.skipped_s)
    return Outcome.of(run.run(), cut_end=load.concurrency is not None)


# The order of all layouts


def order_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Predicted and measured tokens/s of every layout of so many ranks, under the same load.

    With the clock `cpu` they are tokens per CPU second of the busiest rank, so that neighbours do
    not count. Nor do waits between ranks then, such as the idle time of pipeline stages. The
    quickest of some runs counts, because neighbours also slow CPU time down, by the caches and the
    memory that they use.
    """
    model = _model(args)
    layouts = [
        layout
        for layout in all_layouts(args.ranks, model)
        if not args.layouts or str(layout) in args.layouts
    ]
    # Nothing is calibrated beyond the sizes of these loads, for there are many shapes.
    limits = replace(_load_config(args, layouts[-1]), max_model_len=512)
    profile = calibrated(args, limits, model, layouts)
    # CPU time does not grow where ranks share cores.
    sharers = 1 if args.clock == "cpu" else _sharers(profile, args.ranks)
    load = _load(args, args.requests, concurrency=args.concurrency)
    tokens = sum(one.output_tokens for one in load.requests)
    print(f"{'layout':<24}{'predicted':>12}{'measured':>12}{'error':>9}   tokens/s, by wall time")
    rows: list[dict[str, Any]] = []
    for layout in layouts:
        config = _load_config(args, layout)
        cost = StepCost(profile, model, config, Routing(model), ranks_per_node=sharers)
        busy = BusyTime(cost)
        run = simulate(config, _LOAD_BLOCKS, model.vocab_size, busy, load)
        walled, cpu_s = 0.0, []
        with _engine(args, layout) as llm:
            _run_load(llm, _load(args, 4, concurrency=4))
            for _ in range(args.runs):
                taken_s = busiest_cpu_s()
                walled = max(walled, _run_load(llm, load).tokens_per_s)
                cpu_s.append(taken_s())
        if args.clock == "cpu":
            value = tokens / busy.most_s
            real = tokens / min(cpu_s)
        else:
            value = Outcome.of(run.times, cut_end=True).tokens_per_s
            real = walled
        figures = f"{value:>12.1f}{real:>12.1f}{value / real - 1:>+9.1%}"
        print(f"{layout!s:<24}{figures}{walled:>12.1f}", flush=True)
        rows.append({"layout": str(layout), "predicted": value, "measured": real})
    values, reals = ([row[key] for row in rows] for key in ("predicted", "measured"))
    regret = 1 - reals[values.index(max(values))] / max(reals)
    print(f"rank correlation {rank_correlation(values, reals):.2f}, regret {regret:.1%}")
    return rows


class BusyTime:
    """The times of steps, and what each stage of each replica has computed so far, without waits.
    The leader's time counts for the first stage of the first replica."""

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._busy_s: defaultdict[tuple[int, int], float] = defaultdict(float)

    @property
    def most_s(self) -> float:
        """Seconds of the busiest stage of any replica."""
        return max(self._busy_s.values())

    def stages_s(self, step: Sequence[ReplicaStep]) -> list[float]:
        """Seconds of each stage."""
        for replica in range(len(step)):
            for stage, seconds in enumerate(self._cost.computing_s(step, replica)):
                self._busy_s[replica, stage] += seconds
        return self._cost.stages_s(step)

    def launch_s(self, step: Sequence[ReplicaStep]) -> float:
        """As `StepCost`."""
        return self._cost.launch_s(step)

    def before_s(self, step: Sequence[ReplicaStep]) -> float:
        """As `StepCost`."""
        seconds = self._cost.before_s(step)
        self._busy_s[0, 0] += seconds
        return seconds

    def after_s(self, step: Sequence[ReplicaStep]) -> float:
        """As `StepCost`."""
        seconds = self._cost.after_s(step)
        self._busy_s[0, 0] += seconds
        return seconds


def busiest_cpu_s() -> Callable[[], float]:
    """A clock that begins now: CPU seconds of the busiest rank, or of this process if the engine
    runs in it."""
    # On Linux a process's number gives the clock of its CPU time.
    clocks = [(~pid << 3) | 2 for pid in _ranks()] or [time.CLOCK_PROCESS_CPUTIME_ID]
    started = [(clock, time.clock_gettime(clock)) for clock in clocks]
    return lambda: max(time.clock_gettime(clock) - start_s for clock, start_s in started)


def _ranks() -> list[int]:
    """The pids of ranks that descend from this process."""
    parents: dict[int, int] = {}
    ranks: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            pid, command = int(folder.name), (folder / "cmdline").read_bytes().split(b"\0")
            parents[pid] = int(fields[1])
            if command[1:3] == [b"-m", b"moespan.launch.rank"]:
                ranks.append(pid)

    def is_own(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return [pid for pid in ranks if is_own(pid)]


def _sharers(profile: Profile, ranks: int) -> int:
    """Ranks that share the cores that were calibrated with: with one thread of two cores, two ranks
    share nothing."""
    if not DEVICES[profile.device.kind].is_host:
        return ranks
    return max(1, -(-ranks * (profile.device.cores or 1) // usable_cores()))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: of the places of the same items in two orders."""
    places = [[sorted(values).index(one) for one in values] for values in (first, second)]
    return statistics.correlation(*places)


def _layout(text: str) -> Layout:
    """`tp=2,ep=2` as a layout."""
    pairs = (one.split("=") for one in text.split(","))
    sizes: dict[str, Any] = {name: int(size) for name, size in pairs}
    return Layout(**sizes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--layers", type=int, default=2, help="of the 16B geometry (2)")
    parser.add_argument("--geometry", type=json.loads, default={}, help="JSON of other sizes")
    parser.add_argument("--batched-tokens", type=int, nargs="+", default=(512, 2048))
    parser.add_argument("--parts", default="memory,steps")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--seconds", type=float, default=180.0, help="for the calibration (180)")
    parser.add_argument("--step-tokens", type=int, default=2048, help="largest step (2048)")
    parser.add_argument("--input", default="uniform:20:120", help="prompt tokens of loads")
    parser.add_argument("--output", default="uniform:8:32", help="output tokens of loads")
    parser.add_argument("--requests", type=int, default=60, help="requests of each load (60)")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=(0.3, 0.6, 0.8, 0.95, 1.3),
        help="of the measured capacity, as loads; above 1 is more than the engine can do",
    )
    parser.add_argument("--concurrency", type=int, default=12, help="of full engines (12)")
    parser.add_argument("--layouts", nargs="+", help="only these, such as tp=2×ep=2")
    parser.add_argument("--ranks", type=int, default=2, help="for the order of layouts (2)")
    parser.add_argument("--runs", type=int, default=2, help="of each layout for the order (2)")
    parser.add_argument(
        "--layout", type=_layout, default=Layout(), help="of the loads, such as tp=2 (one rank)"
    )
    parser.add_argument("--reuse", action="store_true", help="take the profile as it is")
    parser.add_argument("--profile", type=Path, default=Path("build/here.json"))
    parser.add_argument("--only", nargs="+", help="cases of memory with this in their names")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.one:
        print(msgspec.json.encode(run_case(msgspec.json.decode(args.one, type=Case))).decode())
        return
    report: dict[str, Any] = {}
    tables = {
        "memory": memory_table,
        "steps": step_table,
        "loads": load_table,
        "order": order_table,
    }
    for part in args.parts.split(","):
        print(
            f"\n{part}, {args.device}, {args.layers} layers of the 16B geometry, {args.clock} time"
        )
        report[part] = tables[part](args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
