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
from torch import Tensor

from moespan.checkpoint.presets import PRESETS, preset
from moespan.checkpoint.rounding import QuantizedWeight, quantize
from moespan.config import SCHEMES, EngineConfig, ModelConfig, Scheme
from moespan.device import DEVICES
from moespan.measure.probe import Probe, machine_name
from moespan.ops import ops_for
from moespan.ops.base import AttentionBatch, ExpertBank, KVCache, Ops, Weight
from moespan.planner.work import Limits, Work

_SCHEMES = {"none": None, **{name: SCHEMES[name] for name in ("int8", "w8a8", "int4")}}
_HALF = torch.bfloat16
# Bytes of the weights that are used in turn: more than caches hold.
_TURN_BYTES = 1 << 30


class Case(NamedTuple):
    """An operation at one size: the call, and the least work that it needs."""

    name: str
    tokens: int
    run: Callable[[], object]
    work: Work


def cases(
    ops: Ops, config: ModelConfig, sizes: list[int], scheme: Scheme | None, contexts: list[int]
) -> Iterator[Case]:
    """Yield all cases; the weights of each are made when it is taken."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    hidden, head_size = config.hidden_size, config.head_dim
    shared = (config.n_shared_experts or 0) * config.moe_intermediate_size
    yield from _matrix(ops, "qkv", ((heads + 2 * kv_heads) * head_size, hidden), sizes, scheme)
    yield from _matrix(ops, "out", (hidden, heads * head_size), sizes, scheme)
    yield from _mlp(ops, "shared", hidden, shared, sizes, scheme)
    yield from _mlp(ops, "dense", hidden, config.intermediate_size, sizes, scheme)
    yield from _experts(ops, config, sizes, scheme)
    yield from _attention(ops, config, sizes, contexts)
    of_head = SCHEMES[scheme.head] if scheme and scheme.head else scheme
    yield from _matrix(ops, "head", (config.vocab_size, hidden), sizes, of_head)


def _matrix(
    ops: Ops, name: str, shape: tuple[int, int], sizes: list[int], scheme: Scheme | None
) -> Iterator[Case]:
    weights = _in_turn(lambda: _prepared(ops, name, shape, scheme), _bytes(shape, scheme))
    for tokens in sizes:
        rows = _rows(tokens, shape[1])

        def run(x: Tensor = rows) -> Tensor:
            return ops.linear(x, next(weights))

        yield Case(name, tokens, run, Work(2 * tokens * shape[0] * shape[1], _bytes(shape, scheme)))


def _mlp(
    ops: Ops, name: str, hidden: int, width: int, sizes: list[int], scheme: Scheme | None
) -> Iterator[Case]:
    up, down = (2 * width, hidden), (hidden, width)
    size = _bytes(up, scheme) + _bytes(down, scheme)

    def make() -> tuple[Weight, Weight]:
        return _prepared(ops, "gate_up", up, scheme), _prepared(ops, "down", down, scheme)

    pairs = _in_turn(make, size)
    for tokens in sizes:
        rows = _rows(tokens, hidden)

        def run(x: Tensor = rows) -> Tensor:
            return ops.mlp(x, *next(pairs))

        yield Case(name, tokens, run, Work(2 * tokens * 3 * hidden * width, size))


def _experts(
    ops: Ops, config: ModelConfig, sizes: list[int], scheme: Scheme | None
) -> Iterator[Case]:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    number, chosen = config.n_routed_experts or 1, config.num_experts_per_tok
    up, down = (number, 2 * width, hidden), (number, hidden, width)
    bank = ExpertBank(
        _prepared(ops, "gate_up", up, scheme), _prepared(ops, "down", down, scheme), 0, number
    )
    router = ops.prepare("router", torch.randn(number, hidden))
    for tokens in sizes:
        x, weights = _rows(tokens, hidden), torch.rand(tokens, chosen)

        def route(x: Tensor = x) -> object:
            return ops.route(x, router, chosen, False)

        work = Work(2 * tokens * number * hidden, 4 * number * hidden)
        yield Case("route", tokens, route, work)
        turns = itertools.cycle(
            [torch.rand(tokens, number).topk(chosen).indices.int() for _ in range(16)]
        )

        def run(
            x: Tensor = x, weights: Tensor = weights, turns: Iterator[Tensor] = turns
        ) -> Tensor:
            return ops.experts(x, weights, next(turns), bank)

        met = number * (1 - (1 - chosen / number) ** tokens)
        size = (_bytes(up, scheme) + _bytes(down, scheme)) / number
        work = Work(2 * tokens * chosen * 3 * hidden * width, met * size)
        yield Case("experts", tokens, run, work)


def _attention(
    ops: Ops, config: ModelConfig, sizes: list[int], contexts: list[int]
) -> Iterator[Case]:
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    block = DEVICES["cpu"].block_size
    for tokens, context in itertools.product(sizes, contexts):
        if tokens > 256:
            continue  # not decoded in practice: their KV caches would not fit
        yield from _attention_case(ops, heads, kv_heads, size, block, [1] * tokens, context)
    for tokens in sizes:
        if tokens >= 128:
            yield from _attention_case(ops, heads, kv_heads, size, block, [tokens], 0)


def _attention_case(
    ops: Ops, heads: int, kv_heads: int, size: int, block: int, queries: list[int], context: int
) -> Iterator[Case]:
    blocks = -(-(context + queries[0]) // block)
    token_bytes = 2 * 2 * kv_heads * size
    one = len(queries) * (context + queries[0]) * token_bytes
    caches = _in_turn(
        lambda: KVCache(
            *(torch.randn(len(queries) * blocks, block, kv_heads, size).to(_HALF) for _ in "kv")
        ),
        one,
    )
    tables = torch.randperm(len(queries) * blocks).view(len(queries), blocks).tolist()
    contexts = [context] * len(queries)
    batch = AttentionBatch.build(queries, contexts, tables, block, torch.device("cpu"))
    tokens = sum(queries)
    q = torch.randn(tokens, heads, size).to(_HALF)
    pairs = tokens * (context + (queries[0] + 1) / 2)
    name = "attention, prefill" if len(queries) < tokens else f"attention after {context}"
    work = Work(4 * heads * size * pairs, one)
    yield Case(name, tokens, lambda: ops.attention(q, next(caches), batch, size**-0.5), work)


def _prepared(ops: Ops, name: str, shape: tuple[int, ...], scheme: Scheme | None) -> Weight:
    values = torch.empty(shape, dtype=_HALF).normal_(std=0.02)
    if scheme is None:
        return ops.prepare(name, values)
    dtype = getattr(torch, scheme.storage)
    parts = quantize(values.view(-1, shape[-1]), dtype=dtype, group_size=scheme.group_size)
    integers, scales = (part.view(*shape[:-1], *part.shape[1:]) for part in parts)
    return ops.prepare(name, QuantizedWeight(integers, scales, scheme.activation_bits))


def _in_turn(make: Callable[[], Any], num_bytes: float) -> Iterator[Any]:
    return itertools.cycle([make() for _ in range(max(1, round(_TURN_BYTES / num_bytes)))])


def _bytes(shape: tuple[int, ...], scheme: Scheme | None) -> float:
    row_bytes = 2 * shape[-1] if scheme is None else scheme.row_bytes(shape[-1])
    return float(torch.Size(shape[:-1]).numel() * row_bytes)


def _rows(tokens: int, width: int) -> Tensor:
    return torch.randn(tokens, width).to(_HALF)


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
    parser.add_argument("--quantization", choices=list(_SCHEMES), default="none")
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
        scheme = _SCHEMES[options.quantization]
        ops = ops_for("cpu", EngineConfig("", batch_invariant=options.batch_invariant))
        for case in cases(ops, config, sizes, scheme, contexts):
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
