"""Everything that one GPU can tell about the CUDA path, in one command of at most ten minutes.

    python benchmarks/gpu.py --json build/gpu.json
    python benchmarks/gpu.py --device cpu --preset tiny        # its logic, where there is no card

The parts run in this order while time is left: every operation against the reference, on new random
inputs, with uninitialised memory poisoned; `verify` on the small checkpoints of the tests; the
limits of the card; decode and prefill of the model with random weights, drawn on the card; the same
through the scheduler; transformers, if it is installed. Lines come as they are measured, and all of
them once more as a table.

A decode or prefill is one step of a worker: the leader's message, the graph or the kernels, and
sampling, up to the token on the host. Its limit is the longer of two times: that of the bytes to be
read at the copy bandwidth, and that of the operations at the rate of large matrix products. Both
rates are measured here.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from old_triton import read_scalars
from poison import Poisoned
from torch import Tensor

from moespan import LLM, ModelConfig, SamplingParams, __version__
from moespan.checkpoint.loader import load_weights
from moespan.checkpoint.placement import place
from moespan.checkpoint.presets import PRESETS, preset
from moespan.checkpoint.random import RandomSource
from moespan.checkpoint.rounding import QuantizedWeight, quantize
from moespan.config import QUANTIZATIONS, SCHEMES, EngineConfig, Layout
from moespan.device import DEVICES
from moespan.engine.engine import Engine
from moespan.engine.info import EngineInfo
from moespan.engine.memory import fitting_blocks
from moespan.engine.request import Request
from moespan.engine.step import SampleRow, StepPlan, StepPlans
from moespan.engine.worker import Worker
from moespan.measure.probe import machine_name
from moespan.measure.verify import Reference, verify
from moespan.ops import (
    AttentionBatch,
    ExpertBank,
    KVCache,
    Ops,
    ReferenceOps,
    Rotation,
    Weight,
    ops_for,
)
from moespan.parallel.mesh import Axis, Mesh
from moespan.planner.work import Limits, Work, step_work

ORACLES = Path(__file__).parents[1] / "tests" / "data" / "oracle"
# Share of the largest value: the order of operations differs, and with it the rounding.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# At least this much where activations are rounded: a value on the other side of a half moves
# by a step, of integers 1/127 of the row's largest, of floats up to an eighth of itself.
ROUNDED = {"w8a8": 2e-3, "fp8": 2e-2}
# Tokens of a decode that are timed through the scheduler and in transformers.
DECODE_TOKENS = 32


class Clock:
    """The time left of the limit for the whole program."""

    def __init__(self, budget_s: float) -> None:
        self._ends_at = time.perf_counter() + budget_s

    def left_s(self) -> float:
        """Seconds that are left."""
        return self._ends_at - time.perf_counter()


@dataclass(frozen=True)
class Sizes:
    """Sizes to measure, with a GPU and without one."""

    check_tokens: tuple[int, ...]
    check_blocks: int
    decode_batch: tuple[int, ...]
    contexts: tuple[int, ...]
    prefill: tuple[int, ...]
    engine_batch: tuple[int, ...]
    copy_bytes: int
    product_width: int
    repeats: int


ON_A_CARD = Sizes(
    check_tokens=(1, 3, 8, 65, 257),
    check_blocks=20,
    decode_batch=(1, 8, 32, 128, 256),
    contexts=(512, 4096),
    prefill=(512, 2048, 4096),
    engine_batch=(1, 32, 128),
    copy_bytes=4 << 30,
    product_width=8192,
    repeats=20,
)
ELSEWHERE = Sizes(
    check_tokens=(1, 5),
    check_blocks=4,
    decode_batch=(1, 3),
    contexts=(8, 24),
    prefill=(8,),
    engine_batch=(2,),
    copy_bytes=1 << 20,
    product_width=64,
    repeats=2,
)


# Is it right?


class Inputs:
    """Random tensors for the operations, and the results of both implementations side by side.

    Every input is drawn anew. Uninitialised memory is poisoned.
    """

    def __init__(self, ops: Ops, dtype: torch.dtype, device: torch.device) -> None:
        self._ops, self._reference = ops, ReferenceOps()
        self._dtype, self._device = dtype, device

    def draw(self, *shape: int, kind: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """A tensor of normally distributed numbers."""
        return (torch.randn(*shape, device=self._device) * scale).to(kind or self._dtype)

    def matrix(self, quantization: str | None, *shape: int) -> Weight:
        """A matrix [..., out, in] whose products keep the magnitude of their inputs."""
        drawn = self.draw(*shape, scale=shape[-1] ** -0.5)
        if quantization is None:
            return drawn
        scheme = SCHEMES[quantization]
        values, scales = quantize(drawn.flatten(0, -2), dtype=getattr(torch, scheme.dtype))
        return QuantizedWeight(values.view(shape), scales.view(shape[:-1]), scheme.activation_bits)

    def both(self, name: str, run: Callable[[Any], Tensor]) -> tuple[str, Tensor, Tensor]:
        """Yield (name, result of the operations, result of the reference) on the same device."""
        with Poisoned():
            ours = run(self._ops)
        return name, ours, run(self._reference)


def product_checks(
    ops: Ops,
    config: ModelConfig,
    dtype: torch.dtype,
    quantization: str | None,
    num_tokens: int,
    device: torch.device,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Results as `Inputs.both` yields them, for products with matrices of the model's sizes."""
    inputs = Inputs(ops, dtype, device)
    width, inner = config.hidden_size, config.moe_intermediate_size
    num_experts, num_chosen = config.n_routed_experts or 1, config.num_experts_per_tok
    x, residual = inputs.draw(num_tokens, width), inputs.draw(num_tokens, width)
    projection = inputs.matrix(quantization, 2 * width, width)
    yield inputs.both("linear", lambda o: o.linear(x, projection))
    pair = [inputs.matrix(quantization, *shape) for shape in ((2 * inner, width), (width, inner))]
    yield inputs.both("mlp", lambda o: o.mlp(x, *pair))
    yield inputs.both("mlp, added", lambda o: o.mlp_sum(x, *pair, Axis(), "mlp", residual.clone()))
    gate_up, down = [
        inputs.matrix(quantization, num_experts, *shape)
        for shape in ((2 * inner, width), (width, inner))
    ]
    order = torch.rand(num_tokens, num_experts, device=device).argsort(-1)
    weights, chosen = torch.rand(num_tokens, num_chosen, device=device), order[:, :num_chosen]
    one = torch.zeros_like(chosen)
    held = max(1, num_experts // 2)
    for name, physical_ids, first in (
        ("experts", chosen, 0),
        ("experts, all tokens on one", one, 0),
        ("experts, half of them here", chosen, held),
    ):
        bank = ExpertBank(gate_up[first:], down[first:], first, num_experts)
        yield inputs.both(
            name,
            lambda o, ids=physical_ids, bank=bank: o.experts(  # type: ignore[misc]
                x, weights, ids, bank
            ),
        )


def operation_checks(
    ops: Ops,
    config: ModelConfig,
    dtype: torch.dtype,
    num_tokens: int,
    most_blocks: int,
    device: torch.device,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Results as `Inputs.both` yields them, for all other operations.

    Contexts of attention have fewer than `most_blocks` blocks.
    """
    inputs = Inputs(ops, dtype, device)
    draw, both = inputs.draw, inputs.both
    width, num_experts = config.hidden_size, config.n_routed_experts or 1
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    x, residual, norm = draw(num_tokens, width), draw(num_tokens, width), draw(width)
    yield both("rms_norm", lambda o: o.rms_norm(x, norm, 1e-6))
    yield both("add_rms_norm", lambda o: o.add_rms_norm(x, residual, norm, 1e-6)[0])
    router = draw(num_experts, width, kind=torch.float32, scale=width**-0.5)
    route = (router, config.num_experts_per_tok, config.norm_topk_prob)
    yield both("route", lambda o: o.route(x, *route)[0])

    head_size, block_size = config.head_dim, DEVICES["cuda"].block_size
    draws = random.Random(num_tokens)
    for name, query_lens in (("decode", [1] * num_tokens), ("mixed", [num_tokens, 1, 2])):
        context_lens = [draws.randrange(most_blocks * block_size) for _ in query_lens]
        counts = [
            -(-(query + context) // block_size)
            for query, context in zip(query_lens, context_lens, strict=True)
        ]
        blocks = draws.sample(range(sum(counts)), sum(counts))
        tables = [[blocks.pop() for _ in range(count)] for count in counts]
        batch = AttentionBatch.build(query_lens, context_lens, tables, block_size, device)
        total = sum(query_lens)
        shape = (sum(counts), block_size, kv_heads, head_size)
        stored = [draw(*shape) for _ in range(2)]
        qkv = draw(total, heads + 2 * kv_heads, head_size)
        angles = draw(total, head_size // 2, kind=torch.float32)

        def attend(
            o: Any,
            qkv: Tensor = qkv,
            angles: Tensor = angles,
            stored: list[Tensor] = stored,
            batch: AttentionBatch = batch,
        ) -> Tensor:
            cache = KVCache(*(part.clone() for part in stored))
            rotation = Rotation(heads, kv_heads, angles.cos(), angles.sin())
            q = o.rope_to_cache(qkv.clone(), rotation, cache, batch.slots)
            out: Tensor = o.attention(q, cache, batch, head_size**-0.5)
            return out

        yield both(f"rope, cache and attention, {name}", attend)


def check_operations(
    ops: Ops,
    config: ModelConfig,
    dtypes: Sequence[torch.dtype],
    quantizations: Sequence[str],
    sizes: Sizes,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Check every operation: a row for each dtype, quantization and number of tokens."""
    found = []

    def note(check: tuple[str, Tensor, Tensor], limit: float, **row: Any) -> None:
        name, ours, theirs = check
        difference = (ours.float() - theirs.float()).abs().max()
        worst = float(difference / theirs.float().abs().max().clamp(1e-6))
        # Written so that a NaN fails.
        passed = worst <= limit
        found.append({"operation": name, **row, "worst": worst, "limit": limit, "passed": passed})

    for dtype, num_tokens in itertools.product(dtypes, sizes.check_tokens):
        row = {"dtype": str(dtype), "tokens": num_tokens}
        for check in operation_checks(ops, config, dtype, num_tokens, sizes.check_blocks, device):
            note(check, TOLERANCE[dtype], **row)
        for quantization in (None, *quantizations):
            limit = max(TOLERANCE[dtype], ROUNDED.get(quantization or "", 0.0))
            for check in product_checks(ops, config, dtype, quantization, num_tokens, device):
                note(check, limit, quantization=quantization, **row)
    return found


def verify_oracles(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare the small checkpoints, with graphs, with the logits of the Hugging Face model."""
    found = []
    for folder in sorted(path for path in ORACLES.iterdir() if path.is_dir()):
        for dtype in ("float32", "bfloat16"):
            with LLM(
                str(folder),
                device=args.device,
                dtype=dtype,
                quantization=args.quantization,
                kv_cache_dtype=args.kv_cache_dtype,
            ) as llm:
                reference = Reference(folder / "ref" / "ref_logits.safetensors")
                report = verify(llm, reference)
            found.append(
                {
                    "checkpoint": folder.name,
                    "dtype": dtype,
                    "passed": not report.failures,
                    "failures": report.failures,
                    "max_relative": report.max_relative_diff,
                    "mean_kl": report.mean_kl,
                    "top1": report.top1,
                }
            )
    return found


# How fast could it be?


def measure_limits(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Limits:
    """Measure the bytes per second of a copy, and the operations per second of a matrix product."""
    source = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy_s = _best_s(lambda: target.copy_(source), device)
    width = sizes.product_width
    # Random numbers: a GPU multiplies zeros and ones faster than it can sustain.
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    product_s = _best_s(lambda: torch.mm(left, right), device)
    return Limits(2 * sizes.copy_bytes / copy_s, 2 * width**3 / product_s)


def _best_s(run: Callable[[], object], device: torch.device, times: int = 10) -> float:
    best = float("inf")
    for _ in range(times + 2):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


# How fast is it?


@dataclass
class Row:
    """One figure: `new` tokens of each of `batch` sequences, after `context` tokens each."""

    engine: str
    phase: str
    batch: int
    context: int
    new: int
    seconds: float | None
    note: str = ""

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens of all sequences in a second."""
        return self.batch * self.new / self.seconds if self.seconds else None

    def work(self, config: ModelConfig, engine: EngineConfig) -> Work:
        """The least work of the step."""
        return step_work(config, engine, self.batch, self.new, self.context)


class Rows:
    """The figures so far, each told as it comes.

    Args:
        limits: of the card; None if they could not be measured.
    """

    def __init__(self, config: ModelConfig, engine: EngineConfig, limits: Limits | None) -> None:
        self._config, self._engine, self._limits = config, engine, limits
        self.entries: list[dict[str, Any]] = []

    def add(self, row: Row) -> None:
        """Take in a figure."""
        entry = {**asdict(row), "tokens_per_s": row.tokens_per_s}
        if self._limits is not None:
            work = row.work(self._config, self._engine)
            least_s = work.least_s(self._limits)
            entry |= {
                "limit_tokens_per_s": row.batch * row.new / least_s,
                "bound": work.bound(self._limits),
                "reached": least_s / row.seconds if row.seconds else None,
                "operations": work.operations,
                "bytes": work.num_bytes,
            }
        self.entries.append(entry)
        _tell(row_line(entry))


class Bench:
    """The model with random weights, and the times of its steps."""

    def __init__(self, folder: str, config: ModelConfig, args: Any, sizes: Sizes) -> None:
        self.device = torch.device(args.device, 0) if args.device != "cpu" else torch.device("cpu")
        self.model_config, self.sizes = config, sizes
        longest = max(*sizes.contexts, *sizes.prefill) + DECODE_TOKENS + 2
        self.config = EngineConfig(
            folder,
            device=args.device,
            dtype=args.dtype,
            load_format="dummy",
            quantization=args.quantization,
            kv_cache_dtype=args.kv_cache_dtype,
            max_model_len=longest,
            max_num_seqs=max(sizes.decode_batch),
            max_num_batched_tokens=max(*sizes.prefill, max(sizes.decode_batch), 8192),
            enable_prefix_caching=False,
            enforce_eager=args.enforce_eager,
        )
        dtype = getattr(torch, args.dtype)
        mesh = Mesh.create(Layout(), self.device)
        source = RandomSource(config, dtype, 0, self.device)
        placement = place(config, Layout(), 0, quantization=args.quantization)
        ops = ops_for(args.device, self.config)
        weights, self.loaded = load_weights(
            placement, source, dtype, self.device, new_builder=ops.builder
        )
        fitting = fitting_blocks(self.config, config, mesh, ops)
        self.num_blocks = max(fitting, self.config.blocks_per_sequence)
        self.worker = Worker(self.config, config, mesh, ops, weights, self.num_blocks)
        for cache in self.worker.caches:
            for part in cache.tensors:  # numbers such as keys and values are
                part.random_(-127, 128) if part.dtype == torch.int8 else part.normal_()
            for scales in (cache.key_scales, cache.value_scales):
                if scales is not None:
                    scales.fill_(0.01)

    def close(self) -> None:
        """Free the memory."""
        del self.worker

    def step(self, batch: int, context: int, new: int) -> float | None:
        """Median seconds of a step; None if the cache has no room for it."""
        blocks = -(-(context + new) // self.config.block_size)
        if batch * blocks > self.num_blocks:
            return None
        draw = random.Random(batch)
        row = SampleRow(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0)
        seconds = []
        # The first call compiles kernels and records a graph; the second may still warm up.
        for number in range(2 + self.sizes.repeats):
            plan = StepPlan(
                step=number,
                token_ids=draw.choices(range(self.model_config.vocab_size), k=batch * new),
                query_lens=[new] * batch,
                context_lens=[context] * batch,
                block_tables=[list(range(i * blocks, (i + 1) * blocks)) for i in range(batch)],
                sampled=list(range(batch)),
                positions=[0] * batch,
                samples=[row] * batch,
            )
            message = StepPlans.of([plan])
            _wait(self.device)
            started = time.perf_counter()
            pending = self.worker.execute(message, plan)
            assert pending is not None  # this rank is the only one
            pending.wait()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds[2:])

    def through_the_engine(self, batch: int, context: int) -> float | None:
        """Seconds of a decode step as a user sees it, with scheduler and text of all requests."""
        blocks = -(-(context + DECODE_TOKENS + 2) // self.config.block_size)
        if batch * blocks > self.num_blocks:
            return None
        info = EngineInfo(
            model=self.config.model,
            layout=Layout(),
            device=self.config.device,
            dtype=self.config.dtype,
            cache_dtype=self.config.cache_dtype,
            max_model_len=self.config.max_model_len,
            num_blocks=self.num_blocks,
            block_size=self.config.block_size,
            load_s=0,
            read_bytes=0,
            weight_bytes=0,
        )
        engine = Engine(self.config, self.model_config, self.worker, None, info)
        draw = random.Random(batch)
        params = SamplingParams(temperature=0, max_tokens=DECODE_TOKENS + 2, ignore_eos=True)
        for i in range(batch):
            prompt = draw.choices(range(self.model_config.vocab_size), k=context)
            engine.add(Request(id=str(i), prompt_token_ids=prompt, params=params))
        started_sequences: set[str] = set()
        while len(started_sequences) < batch and engine.has_unfinished:
            started_sequences |= {delta.id for delta in engine.step()}
        seconds = []
        for _ in range(DECODE_TOKENS // 2):
            started = time.perf_counter()
            if len(engine.step()) == batch:
                seconds.append(time.perf_counter() - started)
        while engine.has_unfinished:
            engine.step()
        return statistics.median(seconds) if seconds else None


class Transformers:
    """The closest native model of transformers: the same matrices and as many tokens.

    Qwen2-MoE adds a gate to the shared experts, one row of weights. DeepSeek-MoE itself is there as
    remote code only, which loops over experts. Settings: grouped_mm for experts, sdpa for
    attention; the cache as `generate` has it by default, and static, with which it compiles decode.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        import transformers

        self._device, self._vocab_size = device, config.vocab_size
        settings = transformers.Qwen2MoeConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=False,
            num_experts=config.n_routed_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            moe_intermediate_size=config.moe_intermediate_size,
            norm_topk_prob=config.norm_topk_prob,
            shared_expert_intermediate_size=config.shared_intermediate_size,
            mlp_only_layers=[i for i in range(config.num_hidden_layers) if not config.is_moe(i)],
            decoder_sparse_step=1,
            qkv_bias=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        settings._attn_implementation = "sdpa"
        settings._experts_implementation = "grouped_mm"
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                self._model = transformers.Qwen2MoeForCausalLM(settings).eval()
        finally:
            torch.set_default_dtype(before)
        self._model.to_empty(device=device)
        rotary = self._model.model.rotary_emb
        self._model.model.rotary_emb = type(rotary)(settings).to(device)
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
            parameter.normal_(0, parameter.shape[-1] ** -0.5)

    def seconds(self, batch: int, context: int, num_tokens: int, cache: str | None) -> float:
        """Seconds to continue random prompts by so many tokens."""
        prompts = torch.randint(self._vocab_size, (batch, context), device=self._device)
        _wait(self._device)
        started = time.perf_counter()
        self._model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            **({"cache_implementation": cache} if cache else {}),
        )
        _wait(self._device)
        return time.perf_counter() - started

    def decode(self, batch: int, context: int, cache: str | None) -> float:
        """Seconds of one decode step."""
        self.seconds(batch, context, 4, cache)
        first = self.seconds(batch, context, 1, cache)
        return (self.seconds(batch, context, 1 + DECODE_TOKENS, cache) - first) / DECODE_TOKENS

    def prefill(self, length: int) -> float:
        """Seconds of a prompt and its first token."""
        return min(self.seconds(1, length, 1, None) for _ in range(3))


# One after the other


def run(args: argparse.Namespace, folder: str, clock: Clock) -> dict[str, Any]:
    """Run all parts and return one report."""
    on_a_card = args.device != "cpu"
    sizes = ON_A_CARD if on_a_card else ELSEWHERE
    device = torch.device(args.device, 0) if on_a_card else torch.device("cpu")
    if on_a_card:
        torch.cuda.set_device(0)
    config = ModelConfig.from_pretrained(folder)
    report: dict[str, Any] = {
        "model": args.preset,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "kv_cache_dtype": args.kv_cache_dtype,
        "device": args.device,
        "machine": machine_name(args.device),
        "versions": {"moespan": __version__, "torch": torch.__version__, **_versions()},
        "skipped": [],
        "failed": [],
    }

    def part(name: str, needs_s: float, make: Callable[[], Any]) -> Any:
        """Make a part of the report if time is left; a failure becomes that part."""
        if clock.left_s() < (needs_s if on_a_card else 0):
            report["skipped"].append(f"{name}: {clock.left_s():.0f} s were left")
            return None
        _tell(f"{name} ...")
        started = time.perf_counter()
        try:
            report[name] = make()
        except Exception as error:  # the other parts are still useful
            report["failed"].append(f"{name}: {type(error).__name__}: {error}"[:500])
            report[name] = None
            _tell(f"FAILED {report['failed'][-1]}")
        report.setdefault("seconds", {})[name] = time.perf_counter() - started
        return report[name]

    def checks() -> list[dict[str, Any]]:
        from moespan.ops.cuda.ops import CudaOps

        ops = CudaOps()
        dtypes, quantizations = list(TOLERANCE), ops.quantizations
        if not on_a_card:
            # The interpreter is slow, cannot multiply bfloat16, and rounds to
            # 8-bit floats wrongly.
            dtypes = [torch.float32, torch.float16]
            quantizations = tuple({args.quantization} & {"int8", "w8a8"})
        with torch.inference_mode():
            return check_operations(ops, config, dtypes, quantizations, sizes, device)

    for name, check in (("operations", checks), ("verify", lambda: verify_oracles(args))):
        part(name, 60, check)
        _tell(*check_lines(name, report.get(name)))
    dtype = getattr(torch, args.dtype)
    limits = part("limits", 10, lambda: asdict_limits(measure_limits(device, dtype, sizes)))
    if limits:
        _tell(limits_line(limits))
    bench = Bench(folder, config, args, sizes)
    report["load_s"] = bench.loaded.seconds
    rows = Rows(config, bench.config, Limits(**limits) if limits else None)
    _tell(HEADING)

    def figures() -> int:
        for context in sizes.contexts:
            for batch in sizes.decode_batch:
                if clock.left_s() < 60 and on_a_card:
                    rows.add(Row("moespan", "decode", batch, context, 1, None, "no time left"))
                    continue
                seconds = bench.step(batch, context, 1)
                note = "" if seconds else "cache does not fit"
                rows.add(Row("moespan", "decode", batch, context, 1, seconds, note))
        for length in sizes.prefill:
            rows.add(Row("moespan", "prefill", 1, 0, length, bench.step(1, 0, length)))
        return len(rows.entries)

    def through_engine() -> int:
        for batch in sizes.engine_batch:
            context = sizes.contexts[0]
            seconds = bench.through_the_engine(batch, context)
            rows.add(Row("with scheduler", "decode", batch, context, 1, seconds))
        return len(sizes.engine_batch)

    part("moespan", 60, figures)
    part("scheduler", 45, through_engine)
    if bench.worker.graphs is not None:
        graphs = bench.worker.graphs
        report["graphs"] = {"recorded": graphs.num_recorded, "memory_bytes": graphs.memory_bytes}
    bench.close()
    gc.collect()
    if on_a_card:
        torch.cuda.empty_cache()
    if importlib.util.find_spec("transformers") is None:
        report["skipped"].append("transformers: not installed")
    else:
        part("transformers", 75, lambda: _peer(config, dtype, device, sizes, clock, rows))
    report["rows"] = rows.entries
    report["passed"] = not report["failed"] and all(
        entry["passed"] for name in ("operations", "verify") for entry in report.get(name) or []
    )
    return report


def _tell(*lines: str) -> None:
    """Print the figures known so far, so that nothing is lost if the command is cut short."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def asdict_limits(limits: Limits) -> dict[str, float]:
    """The limits as plain values for JSON."""
    return {
        "bytes_per_s": limits.bytes_per_s,
        "operations_per_s": limits.operations_per_s,
    }


def _peer(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    sizes: Sizes,
    clock: Clock,
    rows: Rows,
) -> int:
    """Rows of transformers: prefill, decode, then compiled decode, while time is left."""
    peer = Transformers(config, dtype, device)
    before = len(rows.entries)
    for length in sizes.prefill:
        rows.add(Row("transformers", "prefill", 1, 0, length, peer.prefill(length)))
    ways = {"transformers": None, "transformers, static": "static"}
    for name, cache in ways.items():
        for context in sizes.contexts[: 1 if cache else None]:
            for batch in sizes.decode_batch:
                if clock.left_s() < 30 and device.type != "cpu":
                    continue
                try:
                    seconds, note = peer.decode(batch, context, cache), ""
                except torch.OutOfMemoryError:
                    seconds, note = None, "out of memory"
                rows.add(Row(name, "decode", batch, context, 1, seconds, note))
    return len(rows.entries) - before


def _versions() -> dict[str, str]:
    names = ("triton", "transformers")
    return {
        name: importlib.metadata.version(name)
        for name in names
        if importlib.util.find_spec(name) is not None
    }


def table(report: dict[str, Any]) -> Iterator[str]:
    """The short table."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    weights = report["quantization"] or report["dtype"]
    yield f"{report['model']}, {weights}, {report['machine']}: {versions}"
    for name in ("operations", "verify"):
        yield from check_lines(name, report.get(name))
    if report.get("limits"):
        yield limits_line(report["limits"])
    for failed in report["failed"]:
        yield f"FAILED {failed}"
    for skipped in report["skipped"]:
        yield f"skipped: {skipped}"
    yield HEADING
    yield from map(row_line, report["rows"])


HEADING = (
    f"{'engine':<21}{'phase':<8}{'batch':>6}{'context':>8}{'new':>6}{'ms':>10}{'tokens/s':>10}"
    f"{'limit':>10}{'reached':>9}  bound by"
)


def check_lines(name: str, entries: list[dict[str, Any]] | None) -> Iterator[str]:
    """How many checks passed, and each that did not."""
    entries = entries or []
    failed = [entry for entry in entries if not entry["passed"]]
    yield f"{name}: {len(entries) - len(failed)} of {len(entries)} passed"
    for entry in failed:
        yield "  FAILED " + ", ".join(f"{key}={value}" for key, value in entry.items())


def limits_line(limits: dict[str, float]) -> str:
    """The limits of the card."""
    bandwidth, rate = limits.values()
    return f"limits: {bandwidth / 1e9:.0f} GB/s copied, {rate / 1e12:.1f} TFLOP/s"


def row_line(row: dict[str, Any]) -> str:
    """One figure as a line of the table."""
    start = (
        f"{row['engine']:<21}{row['phase']:<8}{row['batch']:>6}{row['context']:>8}{row['new']:>6}"
    )
    if row["seconds"] is None:
        return f"{start}  {row['note']}"
    return (
        f"{start}{1e3 * row['seconds']:>10.3f}{row['tokens_per_s']:>10.0f}"
        f"{row.get('limit_tokens_per_s', 0):>10.0f}{row.get('reached', 0):>9.1%}"
        f"  {row.get('bound', '')}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--preset", choices=PRESETS, default="16b")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    kinds = [name for name in QUANTIZATIONS if name != "int4"]  # of GPUs
    parser.add_argument("--quantization", choices=kinds)
    parser.add_argument("--kv-cache-dtype", choices=["auto", "int8"], default="auto")
    parser.add_argument("--enforce-eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--budget-s", type=float, default=540, help="parts begin within it")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
        read_scalars()
    elif not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu --preset tiny tries the script out")
    with tempfile.TemporaryDirectory() as folder:
        # Contexts of 4096 tokens are continued.
        raw = preset(args.preset, {"max_position_embeddings": 8192})
        Path(folder, "config.json").write_text(json.dumps(raw))
        report = run(args, folder, Clock(args.budget_s))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(*table(report), sep="\n")
    if not report["passed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
