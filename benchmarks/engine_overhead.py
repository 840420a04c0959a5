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
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moespan import SamplingParams, StructuredOutputsParams, __version__
from moespan.engine.constraints import Constraint
from moespan.engine.sampler import sample
from moespan.engine.step import SampleRow
from moespan.measure import overhead
from moespan.measure.overhead import LEADING, PARTS
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
    "greedy, mask": {"temperature": 0.0, "allowed": "half of all tokens"},
    "temperature": {},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 50": {"top_k": 50},
    "min_p 0.05": {"min_p": 0.05},
}


FORMS = {
    "json schema": StructuredOutputsParams(
        json={
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "tags": {"type": "array", "items": {"type": "string"}},
                "size": {"type": "number"},
            },
            "required": ["name", "tags", "size"],
        }
    ),
    "json object": StructuredOutputsParams(json_object=True),
    "regex": StructuredOutputsParams(regex=r"[a-z ]{1,200}\.[0-9]{4}"),
}


def measure(
    batch_size: int, sampling: str, num_replicas: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Microseconds of each part of a decode step and of the whole."""
    params = SamplingParams(max_tokens=None, ignore_eos=True, seed=1, **SAMPLINGS[sampling])
    parts = overhead.measure(
        MODEL,
        batch_size,
        params,
        context=args.context,
        num_steps=args.steps,
        warmup=args.warmup,
        now_ns=time.thread_time_ns,  # other programs disturb it less than the wall clock
        num_replicas=num_replicas,
    )
    leading = sum(parts[part] for part in LEADING) / (batch_size * num_replicas)
    return {
        "batch": batch_size,
        "replicas": num_replicas,
        "sampling": sampling,
        "total_us": parts.pop("total"),
        "front_us": parts.pop("front"),
        "leader_us_per_sequence": leading,
        "parts_us": parts,
    }


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
    if "allowed" in settings:
        settings["allowed"] = bytes([0b01010101]) * -(-logits.shape[-1] // 8)
    rows, positions = [SampleRow(**settings)] * len(logits), list(range(len(logits)))
    took_ms = []
    for _ in range(repetitions):
        started = time.perf_counter()
        sample(logits, rows, positions)
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


def words(count: int) -> list[bytes]:
    """A vocabulary like that of a language model: all bytes, then pieces of words, then JSON's."""
    generator = random.Random(0)
    tokens = [b"", b"<end>", *(bytes([byte]) for byte in range(256)), b'{"', b'":', b'", "', b"  "]
    known = set(tokens)
    while len(tokens) < count:
        letters = generator.choices("etaoinshrdlucmfwypvbgkqjxz", k=generator.randint(2, 9))
        token = (generator.choice([" ", " ", "", "_"]) + "".join(letters)).encode()
        if token not in known:
            known.add(token)
            tokens.append(token)
    return tokens


def measure_masks(batch_sizes: Sequence[int], vocab_size: int, steps: int) -> list[dict[str, Any]]:
    """Microseconds of the leader for the masks of a step, and of sampling with them."""
    from moespan.text.grammar import Grammars

    tokens = words(vocab_size)

    class Words:
        special_token_ids = frozenset({0, 1})

        def decode_bytes(self, token_ids: Sequence[int], skip_special_tokens: bool) -> bytes:
            return tokens[token_ids[0]]

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [2 + byte for byte in text.encode()]

    tokenizer: Any = Words()
    grammars = Grammars(tokenizer, vocab_size, [1])
    rows = []
    for name, form in FORMS.items():
        params = SamplingParams(structured_outputs=form)
        for batch_size in batch_sizes:
            choose = random.Random(1).choice
            first = Constraint(params, vocab_size, frozenset({1}), (), grammars.matcher(form))
            batch = [first.copy() for _ in range(batch_size)]
            took_us = []
            for _ in range(steps):
                chosen = [choose(allowed_ids(one)) for one in batch]
                started = time.perf_counter_ns()
                for one, token_id in zip(batch, chosen, strict=True):
                    one.append(token_id)
                took_us.append((time.perf_counter_ns() - started) / 1e3)
                batch = [first.copy() if one.is_complete else one for one in batch]
            rows.append(
                {
                    "form": name,
                    "batch": batch_size,
                    "step_us": statistics.median(took_us),
                    "worst_step_us": max(took_us),
                }
            )
    return rows


def allowed_ids(constraint: Constraint) -> list[int]:
    """The token ids that may come next, except EOS if there are others."""
    assert constraint.allowed is not None
    bits = np.unpackbits(np.frombuffer(constraint.allowed, np.uint8), bitorder="little")
    token_ids: list[int] = np.flatnonzero(bits).tolist()
    return [token_id for token_id in token_ids if token_id != 1] or token_ids


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all batch sizes and ways of sampling, one after the other."""
    torch.set_num_threads(1)  # one thread's work is measured
    return {
        "machine": machine_name("cpu"),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"moespan": __version__, "torch": torch.__version__},
        "context": args.context,
        "results": [
            *(
                measure(batch_size, sampling, 1, args)
                for sampling in args.sampling
                for batch_size in args.batch_sizes
            ),
            *(measure(max(args.batch_sizes), "greedy", dp, args) for dp in args.replicas),
        ],
        "vocab_size": args.vocab_size,
        "sampling": run_sampling(args),
        "masks": measure_masks(args.batch_sizes, args.vocab_size, args.steps),
    }


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report, line by line."""
    yield f"µs of CPU time per decode step without the model, context {report['context']}"
    yield f"{report['machine']}, {report['cores']} cores"
    yield ""
    names = (*PARTS, "rest")
    ends = ("total", "front", "each")
    yield f"{'sampling':<9}{'dp':>3}{'batch':>6}" + "".join(f"{one:>9}" for one in (*names, *ends))
    for row in report["results"]:
        told = [*(row["parts_us"][name] for name in names), row["total_us"], row["front_us"]]
        columns = "".join(f"{figure:>9.0f}" for figure in told)
        each = row["leader_us_per_sequence"]
        yield f"{row['sampling']:<9}{row['replicas']:>3}{row['batch']:>6}{columns}{each:>9.2f}"
    yield ""
    yield f"ms from bfloat16 logits of {report['vocab_size']} words to ids"
    yield ""
    yield f"{'sampling':<13}{'logits':<7}{'batch':>5}{'ms':>10}"
    for row in report["sampling"]:
        yield f"{row['way']:<13}{row['logits']:<7}{row['batch']:>5}{row['ms']:>10.2f}"
    yield ""
    yield f"µs of the leader for the masks of a step, of {report['vocab_size']} words"
    yield ""
    yield f"{'form':<13}{'batch':>12}{'median':>10}{'worst':>10}"
    for row in report["masks"]:
        figures = f"{row['step_us']:>10.0f}{row['worst_step_us']:>10.0f}"
        yield f"{row['form']:<13}{row['batch']:>12}{figures}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--replicas", type=int, nargs="*", default=[8], help="dp of further rows")
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
