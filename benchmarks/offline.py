"""Prefill and decode speed, beside the limits of the machine measured in the same run.

    python benchmarks/offline.py --preset 16b-4l --json build/offline.json
    python benchmarks/offline.py /data/deepseek_16B/ -tp 8

Prints one table and, with --json, writes all that was measured. README.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from limits import Probes, machine_name, step_work

from moespan import LLM, ModelConfig, SamplingParams, __version__
from moespan.checkpoint.random import PRESETS, preset

Engine = Callable[[list[list[int]], int], object]
"""Continues each prompt greedily by so many tokens, come what may. A peer is one more of these."""


@dataclass(frozen=True)
class Case:
    """`batch_size` prompts of `prompt_len` tokens; without `num_tokens` the prefill is measured."""

    phase: str
    batch_size: int
    prompt_len: int
    num_tokens: int = 0

    def measure(self, engine: Engine, new_prompts: Callable[[Case], list[list[int]]]) -> float:
        """Seconds; decoding is what `num_tokens` more tokens take than one token alone."""

        def seconds(num_tokens: int) -> float:
            prompts = new_prompts(self)
            started = time.perf_counter()
            engine(prompts, num_tokens)
            return time.perf_counter() - started

        first = seconds(1)
        return seconds(1 + self.num_tokens) - first if self.num_tokens else first

    @property
    def num_measured_tokens(self) -> int:
        """Tokens that the seconds were for."""
        return self.batch_size * (self.num_tokens or self.prompt_len)

    def work(self, config: ModelConfig, dtype: str) -> tuple[float, float]:
        """Operations and bytes that cannot be avoided."""
        if not self.num_tokens:
            return step_work(config, dtype, self.batch_size, self.prompt_len, 0)
        mean_context = self.prompt_len + (self.num_tokens - 1) / 2
        operations, num_bytes = step_work(config, dtype, self.batch_size, 1, mean_context)
        return operations * self.num_tokens, num_bytes * self.num_tokens


def run(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """Measure everything in turns, `args.repeats` times after a round that only warms up."""
    cases = [Case("prefill", 1, length) for length in args.prompt_lens]
    cases += [Case("decode", size, args.context, args.decode_tokens) for size in args.batch_sizes]
    with LLM(
        model,
        tensor_parallel_size=args.tp,
        device=args.device,
        dtype=args.dtype,
        load_format=args.load_format,
        max_model_len=max(*args.prompt_lens, args.context + args.decode_tokens) + 1,
        max_num_seqs=max(args.batch_sizes),
        # So that every prefill is one step.
        max_num_batched_tokens=max(*args.prompt_lens, max(args.batch_sizes) * args.context),
        enable_prefix_caching=False,
    ) as llm:
        config, device, dtype = llm.model_config, llm.config.device, llm.config.dtype
        probes = Probes(device, dtype, args.probe_mb, args.probe_width)
        draw = random.Random(0)

        def continue_all(prompts: list[list[int]], num_tokens: int) -> object:
            params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            return llm.generate(prompts, params)

        def new_prompts(case: Case) -> list[list[int]]:
            ids = range(config.vocab_size)
            return [draw.choices(ids, k=case.prompt_len) for _ in range(case.batch_size)]

        engines: dict[str, Engine] = {"moespan": continue_all}
        rounds, bandwidths, rates = [], [], []
        for _ in range(1 + args.repeats):
            rounds.append(
                {
                    (name, case): case.measure(engine, new_prompts)
                    for case in cases
                    for name, engine in engines.items()
                }
            )
            bandwidths.append(probes.bytes_per_s())
            rates.append(probes.operations_per_s())
    # Ranks on CPUs share one machine; elsewhere each has a device of its own.
    num_devices = 1 if device == "cpu" else llm.config.layout.world_size
    bandwidth = num_devices * statistics.median(bandwidths[1:])
    rate = num_devices * statistics.median(rates[1:])
    results = []
    for name, case in rounds[0]:
        seconds = [one[name, case] for one in rounds[1:]]
        operations, num_bytes = case.work(config, dtype)
        least_s = {"compute": operations / rate, "memory": num_bytes / bandwidth}
        bound = max(least_s, key=least_s.__getitem__)
        results.append(
            {
                "engine": name,
                **asdict(case),
                "seconds": seconds,
                "tokens_per_s": case.num_measured_tokens / statistics.median(seconds),
                "limit_tokens_per_s": case.num_measured_tokens / least_s[bound],
                "bound": bound,
                "operations": operations,
                "bytes": num_bytes,
            }
        )
    return {
        "model": args.preset or args.model,
        "dtype": dtype,
        "layout": asdict(llm.config.layout),
        "device": device,
        "machine": machine_name(device),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"moespan": __version__, "torch": torch.__version__},
        "limits": {"bytes_per_s": bandwidth, "operations_per_s": rate},
        "results": results,
    }


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report, line by line."""
    layout = ", ".join(f"{axis}={size}" for axis, size in report["layout"].items())
    yield f"{report['model']}, {report['dtype']}, {layout}"
    yield f"{report['device']}: {report['machine']}, {report['cores']} cores"
    bandwidth, rate = report["limits"].values()
    yield f"limits: {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOP/s in {report['dtype']}"
    yield ""
    yield (
        f"{'engine':<9}{'phase':<9}{'batch':>5}{'prompt':>8}{'tokens/s':>10}{'spread':>8}"
        f"{'limit':>10}{'reached':>9}  bound by"
    )
    for row in report["results"]:
        median_s = statistics.median(row["seconds"])
        spread = (max(row["seconds"]) - min(row["seconds"])) / median_s
        reached = row["tokens_per_s"] / row["limit_tokens_per_s"]
        yield (
            f"{row['engine']:<9}{row['phase']:<9}{row['batch_size']:>5}{row['prompt_len']:>8}"
            f"{row['tokens_per_s']:>10.1f}{spread:>8.0%}"
            f"{row['limit_tokens_per_s']:>10.1f}{reached:>9.1%}  {row['bound']}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="checkpoint folder")
    parser.add_argument("--preset", choices=PRESETS, help="random weights of this geometry")
    parser.add_argument("-tp", type=int, default=1, help="ranks of tensor parallelism")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights, no file")
    parser.add_argument("--prompt-lens", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=32, help="prompt tokens before decoding")
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--probe-mb", type=int, default=1024, help="tensor to read")
    parser.add_argument("--probe-width", type=int, default=4096, help="of the matrix to multiply")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    args = parser.parse_args(argv)
    if (args.model is None) == (args.preset is None):
        parser.error("give either a checkpoint folder or --preset")
    with tempfile.TemporaryDirectory() as folder:
        if args.preset:
            args.load_format = "dummy"
            Path(folder, "config.json").write_text(json.dumps(preset(args.preset, {})))
        report = run(args, args.model or folder)
    print(*table(report), sep="\n")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
