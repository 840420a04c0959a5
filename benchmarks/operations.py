"""Each operation of a layer alone, beside the limits of the machine, on CPUs.

    python benchmarks/operations.py --preset 16b --tokens 1,8,32,128,512,2048

Weights are random and have the preset's geometry. Several copies, more than the caches hold, are
used in turn. Limits are measured before and after each line. README.md explains the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moespan.checkpoint.presets import PRESETS, preset
from moespan.config import SCHEMES, EngineConfig, ModelConfig, Scheme
from moespan.measure.operations import TURN_BYTES, Operations, size_bytes
from moespan.measure.probe import Probe, machine_name
from moespan.ops import ops_for
from moespan.planner.work import Limits, Work

_SCHEMES = ("none", "int8", "w8a8", "int4")


class Case(NamedTuple):
    """An operation at one size: the call, and the least work that it needs."""

    name: str
    tokens: int
    run: Callable[[], object]
    work: Work


def cases(
    make: Operations, config: ModelConfig, sizes: list[int], scheme: str | None, contexts: list[int]
) -> Iterator[Case]:
    """Yield all cases; the weights of each are made when it is taken."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    hidden, head_size = config.hidden_size, config.head_dim
    shared = (config.n_shared_experts or 0) * config.moe_intermediate_size
    yield from _matrix(make, "qkv", ((heads + 2 * kv_heads) * head_size, hidden), sizes, scheme)
    yield from _matrix(make, "out", (hidden, heads * head_size), sizes, scheme)
    yield from _mlp(make, "shared", hidden, shared, sizes, scheme)
    yield from _mlp(make, "dense", hidden, config.intermediate_size, sizes, scheme)
    yield from _experts(make, config, sizes, scheme)
    yield from _attention(make, config, sizes, contexts)
    of_head = SCHEMES[scheme].head or scheme if scheme else None
    yield from _matrix(make, "head", (config.vocab_size, hidden), sizes, of_head)


def _matrix(
    make: Operations, name: str, shape: tuple[int, int], sizes: list[int], scheme: str | None
) -> Iterator[Case]:
    size = size_bytes(shape, _scheme(scheme))
    for tokens in sizes:
        run = make.run("linear", {"n": shape[0], "k": shape[1]}, scheme, tokens)
        yield Case(name, tokens, run, Work(2 * tokens * shape[0] * shape[1], size))


def _mlp(
    make: Operations, name: str, hidden: int, width: int, sizes: list[int], scheme: str | None
) -> Iterator[Case]:
    up, down = (2 * width, hidden), (hidden, width)
    size = size_bytes(up, _scheme(scheme)) + size_bytes(down, _scheme(scheme))
    for tokens in sizes:
        run = make.run("mlp", {"n": width, "k": hidden}, scheme, tokens)
        yield Case(name, tokens, run, Work(2 * tokens * 3 * hidden * width, size))


def _experts(
    make: Operations, config: ModelConfig, sizes: list[int], scheme: str | None
) -> Iterator[Case]:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    number, chosen = config.n_routed_experts or 1, config.num_experts_per_tok
    each = 3 * size_bytes((hidden, width), _scheme(scheme))
    for tokens in sizes:
        route = make.run("route", {"n": number, "k": hidden}, None, tokens)
        work = Work(2 * tokens * number * hidden, 4 * number * hidden)
        yield Case("route", tokens, route, work)
        met = number * (1 - (1 - chosen / number) ** tokens)
        shape = {"k": hidden, "n": width, "experts": number, "met": round(met)}
        run = make.run("experts", shape, scheme, tokens * chosen)
        yield Case(
            "experts", tokens, run, Work(2 * tokens * chosen * 3 * hidden * width, met * each)
        )


def _attention(
    make: Operations, config: ModelConfig, sizes: list[int], contexts: list[int]
) -> Iterator[Case]:
    for tokens, context in itertools.product(sizes, contexts):
        if tokens <= 256:  # more are not decoded in practice: their KV caches would not fit
            yield _attention_case(make, config, [1] * tokens, context)
    for tokens in sizes:
        if tokens >= 128:
            yield _attention_case(make, config, [tokens], 0)


def _attention_case(
    make: Operations, config: ModelConfig, queries: list[int], context: int
) -> Case:
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": size}
    run = make.attention(shape, None, queries, context)
    tokens = sum(queries)
    read = len(queries) * (context + queries[0]) * 2 * 2 * kv_heads * size
    pairs = tokens * (context + (queries[0] + 1) / 2)
    name = "attention, prefill" if len(queries) < tokens else f"attention after {context}"
    return Case(name, tokens, run, Work(4 * heads * size * pairs, read))


def _scheme(name: str | None) -> Scheme | None:
    return None if name is None else SCHEMES[name]


def measure(case: Case, probe: Probe, seconds: float) -> dict[str, Any]:
    """Median time of as many calls as fit into `seconds`, with the limits before and after."""
    case.run()
    before = probe()
    taken: list[float] = []
    while sum(taken) < seconds or len(taken) < 3:
        started = time.perf_counter()
        case.run()
        taken.append(time.perf_counter() - started)
    limits = Limits.mean(before, probe())
    median = statistics.median(taken)
    return {
        "operation": case.name,
        "tokens": case.tokens,
        "us": median * 1e6,
        "bytes": case.work.num_bytes,
        "operations": case.work.operations,
        "limits": {"bytes_per_s": limits.bytes_per_s, "operations_per_s": limits.operations_per_s},
        "bound": case.work.bound(limits),
        "limit_share": case.work.least_s(limits) / median,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write the JSON file if one is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="16b")
    parser.add_argument("--quantization", choices=_SCHEMES, default="none")
    parser.add_argument("--tokens", default="1,8,32,128,512,2048")
    parser.add_argument("--contexts", default="160,1024", help="tokens before those that decode")
    parser.add_argument("--only", help="operations whose name has this in it")
    parser.add_argument("--batch-invariant", action="store_true", help="as the engine's flag")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each line")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    config = ModelConfig.from_dict(preset(options.preset, {}))
    sizes = [int(size) for size in options.tokens.split(",")]
    contexts = [int(size) for size in options.contexts.split(",")]
    torch.manual_seed(0)
    print(f"{machine_name('cpu')}, {torch.get_num_threads()} threads, {options.quantization}")
    columns = f"{'operation':<22}{'tokens':>7}{'us':>10}{'GB/s':>8}{'TFLOP/s':>9}{'of limit':>10}"
    print(f"{columns}  bound by")
    lines = []
    with Probe("cpu", "bfloat16") as probe:
        scheme = None if options.quantization == "none" else options.quantization
        ops = ops_for("cpu", EngineConfig("", batch_invariant=options.batch_invariant))
        make = Operations(ops, config, torch.device("cpu"), turn_bytes=TURN_BYTES)
        for case in cases(make, config, sizes, scheme, contexts):
            if options.only and options.only not in case.name:
                continue
            line = measure(case, probe, options.seconds)
            lines.append(line)
            print(
                f"{case.name:<22}{case.tokens:>7}{line['us']:>10.0f}"
                f"{line['bytes'] / line['us'] / 1e3:>8.1f}"
                f"{line['operations'] / line['us'] / 1e6:>9.3f}"
                f"{line['limit_share']:>10.1%}  {line['bound']}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine_name("cpu"), "lines": lines}))


if __name__ == "__main__":
    main()
