"""Host time of the engine itself in a decode step, without the model; and of sampling alone.

    python benchmarks/engine_overhead.py --json build/engine_overhead.json

The engine, its worker, and the socket to a front are the real ones, on the quickstart model's
tokenizer and geometry. Only the network is replaced, by a function that returns fixed logits.
Sampling is then measured alone, with the vocabulary of DeepSeek-MoE-16B. README.md explains the
tables.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from moespan import SamplingParams, __version__
from moespan.engine.sampler import sample
from moespan.engine.step import SampleRow
from moespan.measure import overhead
from moespan.measure.overhead import PARTS
from moespan.measure.probe import machine_name

MODEL = Path(__file__).parents[1] / "models" / "quickstart"
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.7, "top_p": 0.9},
    "penalty": {"temperature": 0.0, "presence_penalty": 0.5},
}
# Ways of sampling, at temperature 1 unless another is given.
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 50": {"top_k": 50},
    "min_p 0.05": {"min_p": 0.05},
}


def measure(batch_size: int, sampling: str, args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of each part of a decode step and of the whole."""
    params = SamplingParams(max_tokens=None, ignore_eos=True, seed=1, **SAMPLINGS[sampling])
    parts = overhead.measure(
        MODEL,
        batch_size,
        params,
        context=args.context,
        num_steps=args.steps,
        warmup=args.warmup,
    )
    total = parts.pop("total")
    return {"batch": batch_size, "sampling": sampling, "total_us": total, "parts_us": parts}


def language_logits(num_rows: int, vocab_size: int) -> torch.Tensor:
    """Bfloat16 [num_rows, vocab_size], distributed by Zipf's law: from rows in which few tokens
    matter (exponent 3) to some in which thousands do (1.2)."""
    generator = torch.Generator().manual_seed(0)
    exponents = 1.2 + 1.8 * torch.rand(num_rows, 1, generator=generator)
    logits = -exponents * torch.arange(1, vocab_size + 1).log()
    for row in logits:
        row.copy_(row[torch.randperm(vocab_size, generator=generator)])
    return logits.bfloat16()


def measure_sampling(
    way: str, distribution: str, logits: torch.Tensor, repetitions: int
) -> dict[str, Any]:
    """Milliseconds from logits to ids, the best of some repetitions."""
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 1}
    settings = {**neutral, **WAYS[way]}
    rows = [SampleRow(sequence=i, position=i, **settings) for i in range(len(logits))]
    took_ms = []
    for _ in range(repetitions):
        started = time.perf_counter()
        sample(logits, rows)
        took_ms.append((time.perf_counter() - started) * 1e3)
    return {"way": way, "logits": distribution, "batch": len(logits), "ms": min(took_ms)}


def run_sampling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all ways of sampling at all batch sizes, and a top_p that keeps nearly all tokens."""
    most = max(args.batch_sizes)
    zipf = language_logits(most, args.vocab_size)
    flat = torch.randn(most, args.vocab_size, generator=torch.Generator().manual_seed(0))
    cases = [(way, "zipf", zipf) for way in WAYS] + [("top_p 0.95", "flat", flat.bfloat16())]
    return [
        measure_sampling(way, name, logits[:batch_size], args.repetitions)
        for way, name, logits in cases
        for batch_size in args.batch_sizes
    ]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all batch sizes and ways of sampling, one after the other."""
    torch.set_num_threads(1)  # one thread's work is measured
    return {
        "machine": machine_name("cpu"),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"moespan": __version__, "torch": torch.__version__},
        "context": args.context,
        "results": [
            measure(batch_size, sampling, args)
            for sampling in args.sampling
            for batch_size in args.batch_sizes
        ],
        "vocab_size": args.vocab_size,
        "sampling": run_sampling(args),
    }


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report, line by line."""
    yield f"µs per decode step without the model, context {report['context']}"
    yield f"{report['machine']}, {report['cores']} cores"
    yield ""
    names = (*PARTS, "rest")
    yield f"{'sampling':<9}{'batch':>5}" + "".join(f"{name:>10}" for name in names) + "     total"
    for row in report["results"]:
        parts = "".join(f"{row['parts_us'][name]:>10.0f}" for name in names)
        yield f"{row['sampling']:<9}{row['batch']:>5}{parts}{row['total_us']:>10.0f}"
    yield ""
    yield f"ms from bfloat16 logits of {report['vocab_size']} words to ids"
    yield ""
    yield f"{'sampling':<13}{'logits':<7}{'batch':>5}{'ms':>10}"
    for row in report["sampling"]:
        yield f"{row['way']:<13}{row['logits']:<7}{row['batch']:>5}{row['ms']:>10.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--sampling", nargs="+", choices=SAMPLINGS, default=list(SAMPLINGS))
    parser.add_argument("--context", type=int, default=384, help="prompt tokens before decoding")
    parser.add_argument("--steps", type=int, default=60, help="measured ones")
    parser.add_argument("--warmup", type=int, default=20, help="steps before them")
    parser.add_argument("--vocab-size", type=int, default=102400, help="of sampling by itself")
    parser.add_argument("--repetitions", type=int, default=5, help="of sampling by itself")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    args = parser.parse_args(argv)
    report = run(args)
    print(*table(report), sep="\n")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
