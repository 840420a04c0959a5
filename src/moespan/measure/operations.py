"""Single operations of the network on random values, ready to be timed.

`moespan.measure.calibrate` makes curves of them, and `benchmarks/operations.py` prints them beside
the limits of the machine. Weights are used in turn, several copies of them, more than caches hold.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moespan.checkpoint.rounding import QuantizedWeight, quantize
from moespan.config import SCHEMES, ModelConfig, Scheme
from moespan.device import DEVICES
from moespan.engine.sampler import Sampling
from moespan.engine.step import SampleRow
from moespan.memory import is_host
from moespan.ops import AttentionBatch, ExpertBank, Ops, Rotation, Weight

Run = Callable[[], object]

# Bytes of the weights that are used in turn: more than caches hold.
TURN_BYTES = 1 << 30
# Random numbers that a matrix repeats.
_DRAWN = 1 << 22
_MOST_COPIES = 64
# A sweep that takes so many times the quickest one was disturbed.
_SLOW_SWEEP = 1.25


class Operations:
    """Makes calls of operations, named and shaped as in `moespan.planner.profile.Operation`.

    Args:
        turn_bytes: bytes of the copies that are used in turn.
    """

    def __init__(
        self,
        ops: Ops,
        model: ModelConfig,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        turn_bytes: int = TURN_BYTES,
    ) -> None:
        self._ops, self._model, self._device, self._dtype = ops, model, device, dtype
        self._turn_bytes = turn_bytes
        self._block = DEVICES[device.type].block_size
        self._weights: tuple[Any, Any] = ((), None)

    def run(self, op: str, shape: Mapping[str, int], scheme: str | None, rows: int) -> Run:
        """A call of `op` with `rows` rows. The weights of one shape are kept until the next."""
        make: Callable[[Mapping[str, int], str | None, int], Run] = getattr(self, f"_{op}")
        with torch.inference_mode():
            return make(shape, scheme, rows)

    def _linear(self, shape: Mapping[str, int], scheme: str | None, rows: int) -> Run:
        size = shape["n"], shape["k"]
        is_head = size[0] == self._model.vocab_size
        weights = self._in_turn(
            ("linear", size, scheme),
            lambda: self._prepared("head" if is_head else "qkv", size, scheme),
            size_bytes(size, _scheme(scheme)),
        )
        x = self._values(rows, size[1])
        return lambda: self._ops.linear(x, next(weights))

    def _mlp(self, shape: Mapping[str, int], scheme: str | None, rows: int) -> Run:
        up, down = (2 * shape["n"], shape["k"]), (shape["k"], shape["n"])
        pairs = self._in_turn(
            ("mlp", up, scheme),
            lambda: (self._prepared("gate_up", up, scheme), self._prepared("down", down, scheme)),
            size_bytes(up, _scheme(scheme)) + size_bytes(down, _scheme(scheme)),
        )
        x = self._values(rows, shape["k"])
        return lambda: self._ops.mlp(x, *next(pairs))

    def _route(self, shape: Mapping[str, int], scheme: str | None, rows: int) -> Run:
        number, hidden = shape["n"], shape["k"]
        chosen = min(self._model.num_experts_per_tok, number)
        values = torch.randn(number, hidden, device=self._device)
        router = self._ops.prepare("router", values.bfloat16().float())  # as checkpoints have it
        x = self._values(rows, hidden)
        return lambda: self._ops.route(x, router, chosen, False)

    def _experts(self, shape: Mapping[str, int], scheme: str | None, rows: int) -> Run:
        """`rows` pairs that meet `met` of the `experts` evenly."""
        held, met = shape["experts"], min(shape["met"], rows)
        chosen = max(min(self._model.num_experts_per_tok, met), 1)
        tokens = -(-rows // chosen)
        x = self._values(tokens, shape["k"])
        weights = torch.rand(tokens, chosen, device=self._device)
        pairs = torch.arange(tokens * chosen, device=self._device).view(tokens, chosen) % met
        turns = itertools.cycle(
            [torch.randperm(held, device=self._device)[pairs].int() for _ in range(8)]
        )
        bank = self.bank(held, shape["k"], shape["n"], scheme)
        return lambda: self._ops.experts(x, weights, next(turns), bank)

    def bank(self, held: int, hidden: int, width: int, scheme: str | None) -> ExpertBank:
        """A bank of `held` experts, kept until another shape is asked for."""
        up, down = (held, 2 * width, hidden), (held, hidden, width)
        (bank,) = self._kept(
            ("experts", up, scheme),
            lambda: (
                ExpertBank(
                    self._prepared("gate_up", up, scheme),
                    self._prepared("down", down, scheme),
                    0,
                    held,
                ),
            ),
        )
        found: ExpertBank = bank
        return found

    def _attention_decode(self, shape: Mapping[str, int], scheme: str | None, rows: int) -> Run:
        return self.attention(shape, scheme, [1] * rows, shape["context"])

    def _attention_prefill(self, shape: Mapping[str, int], scheme: str | None, rows: int) -> Run:
        return self.attention(shape, scheme, [rows], shape["context"])

    def attention(
        self, shape: Mapping[str, int], scheme: str | None, queries: list[int], context: int
    ) -> Run:
        """Sequences with `queries` new tokens each, after `context` others."""
        heads, kv_heads, size = shape["heads"], shape["kv_heads"], shape["head_dim"]
        blocks = -(-(context + queries[0]) // self._block)
        number = len(queries) * blocks
        dtype = torch.int8 if scheme == "int8" else self._dtype
        one = number * self._block * 2 * kv_heads * size * dtype.itemsize

        def make() -> Any:
            cache = self._ops.new_cache((number, self._block, kv_heads, size), dtype, self._device)
            for part in cache.tensors:
                if part.dtype == torch.int8:
                    part.random_(-127, 128)
                else:
                    part.normal_()
            return cache

        caches = self._in_turn(("attention", number, kv_heads, size, scheme), make, one)
        tables = torch.randperm(number).view(len(queries), blocks).tolist()
        batch = AttentionBatch.build(
            queries, [context] * len(queries), tables, self._block, self._device
        )
        q = self._values(sum(queries), heads * size).view(-1, heads, size)
        return lambda: self._ops.attention(q, next(caches), batch, size**-0.5)

    def _rope_to_cache(self, shape: Mapping[str, int], scheme: str | None, rows: int) -> Run:
        heads, kv_heads, size = shape["heads"], shape["kv_heads"], shape["head_dim"]
        blocks = -(-rows // self._block)
        cache = self._ops.new_cache(
            (blocks, self._block, kv_heads, size), self._dtype, self._device
        )
        angles = torch.rand(rows, size // 2, device=self._device)
        table = self._ops.rotary_table(angles.cos(), angles.sin(), self._dtype)
        rotation = Rotation(heads, kv_heads, *table)
        slots = torch.arange(rows, dtype=torch.int32, device=self._device)
        qkv = self._values(rows, (heads + 2 * kv_heads) * size).view(rows, -1, size)
        return lambda: self._ops.rope_to_cache(qkv, rotation, cache, slots)

    def _norm(self, shape: Mapping[str, int], scheme: str | None, rows: int) -> Run:
        weight = torch.ones(shape["k"], dtype=self._dtype, device=self._device)
        x, residual = self._values(rows, shape["k"]), self._values(rows, shape["k"])
        return lambda: self._ops.add_rms_norm(x, residual, weight, 1e-6)

    def _bias(self, shape: Mapping[str, int], scheme: str | None, rows: int) -> Run:
        bias, x = self._values(1, shape["k"])[0], self._values(rows, shape["k"])
        return lambda: x + bias

    def _embed(self, shape: Mapping[str, int], scheme: str | None, rows: int) -> Run:
        words = self._model.vocab_size
        (table,) = self._kept(("embed", shape["k"]), lambda: (self._values(words, shape["k"]),))
        ids = torch.randint(0, words, (rows,), dtype=torch.int32, device=self._device)
        return lambda: table.index_select(0, ids)

    def _sample(self, shape: Mapping[str, int], scheme: str | None, rows: int) -> Run:
        logits = self._values(rows, shape["n"])
        row = SampleRow(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=1)
        if is_host(self._device):  # elsewhere results are waited for while the next step runs
            return lambda: Sampling(logits, [row] * rows, [0] * rows).wait()
        return lambda: Sampling(logits, [row] * rows, [0] * rows)

    def _values(self, rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, device=self._device).to(self._dtype)

    def _prepared(self, name: str, shape: tuple[int, ...], scheme: str | None) -> Weight:
        values = torch.empty(shape, dtype=self._dtype, device=self._device)
        flat = values.view(-1)
        # Drawing all of a large matrix takes longer than its measurement.
        drawn = torch.randn(min(_DRAWN, len(flat)), device=self._device).mul_(0.02)
        for part in flat.split(_DRAWN):
            part.copy_(drawn[: len(part)])
        how = _scheme(scheme)
        if how is None:
            return self._ops.prepare(name, values)
        dtype = getattr(torch, how.storage)
        parts = quantize(values.view(-1, shape[-1]), dtype=dtype, group_size=how.group_size)
        integers, scales = (part.view(*shape[:-1], *part.shape[1:]) for part in parts)
        return self._ops.prepare(name, QuantizedWeight(integers, scales, how.activation_bits))

    def _in_turn(self, key: Any, make: Callable[[], Any], num_bytes: float) -> Iterator[Any]:
        count = min(max(1, round(self._turn_bytes / num_bytes)), _MOST_COPIES)
        return itertools.cycle(self._kept(key, lambda: [make() for _ in range(count)]))

    def _kept(self, key: Any, make: Callable[[], Any]) -> Any:
        if self._weights[0] != key:
            self._weights = ((), None)  # frees the previous ones first
            self._weights = (key, make())
        return self._weights[1]


def size_bytes(shape: tuple[int, ...], scheme: Scheme | None) -> float:
    """Bytes of a matrix, or a bank of them, in 16 bits or in a scheme."""
    row_bytes = 2 * shape[-1] if scheme is None else scheme.row_bytes(shape[-1])
    return float(torch.Size(shape[:-1]).numel() * row_bytes)


def _scheme(name: str | None) -> Scheme | None:
    return None if name is None else SCHEMES[name]


@dataclass(frozen=True)
class Times:
    """Seconds of repeated calls."""

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    def quantile_s(self, share: float) -> float:
        """The value that a `share` of the calls stays below."""
        ordered = sorted(self.seconds)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


class TimeSource(NamedTuple):
    """What is read before and after a call.

    Attributes:
        now, now_ns: in seconds, and in nanoseconds.
        one_thread: whether one thread has to compute, because it is its time.
    """

    now: Callable[[], float]
    now_ns: Callable[[], int]
    one_thread: bool


CLOCKS = {
    "wall": TimeSource(time.perf_counter, time.perf_counter_ns, False),
    "cpu": TimeSource(time.process_time, time.process_time_ns, True),
}
"""By name. CPU time of one thread repeats on a machine with busy neighbours."""


class Sweep:
    """Reads as much memory of the host as caches hold, which the rest of a step does between two
    calls of an operation: weights, inputs and code then come from memory again.

    The time that a sweep takes also tells whether other processes disturb the machine.

    Args:
        num_bytes: bytes to read.
        clock: one of `CLOCKS`.

    Attributes:
        least_s: seconds of the quickest sweep.
    """

    def __init__(self, num_bytes: int, clock: str = "wall") -> None:
        self._numbers = torch.ones(max(num_bytes // 4, 1))
        self._now = CLOCKS[clock].now
        self.least_s = math.inf
        self()

    def __call__(self) -> float:
        """Seconds that reading took."""
        started = self._now()
        self._numbers.sum()
        seconds = self._now() - started
        self.least_s = min(self.least_s, seconds)
        return seconds


def timed(
    run: Run,
    device: torch.device,
    *,
    clock: str = "wall",
    least: int = 3,
    most: int = 25,
    seconds: float = 0.05,
    sweep: Sweep | None = None,
) -> Times:
    """The times of a call, after one that warms up: `least` calls, and up to `most` until they
    have taken `seconds`.

    With a `sweep` each call finds cold caches. Calls whose sweep was slow do not count, as long as
    there are `least` others among twice as many tries.
    """
    now, synchronize = CLOCKS[clock].now, synchronizer(device)
    with torch.inference_mode():
        run()
        synchronize()
        taken: list[tuple[float, float]] = []  # of the sweep, and of the call after it
        counted: list[float] = []
        tries = most if sweep is None else 2 * most
        while len(taken) < tries and (
            len(counted) < least or (sum(counted) < seconds and len(counted) < most)
        ):
            before_s = sweep() if sweep is not None else 0.0
            started = now()
            run()
            synchronize()
            taken.append((before_s, now() - started))
            limit_s = _SLOW_SWEEP * sweep.least_s if sweep is not None else math.inf
            counted = [call_s for sweep_s, call_s in taken if sweep_s <= limit_s]
    if len(counted) < least:
        counted = [call_s for _, call_s in sorted(taken)[:least]]
    return Times(tuple(counted))


def in_graph(ops: Ops, run: Run, calls: int = 8) -> Run | None:
    """`calls` calls recorded as one graph, to be replayed; None where that is not possible."""
    if not ops.has_graphs:
        return None
    try:
        with torch.inference_mode():
            run()
            replay = ops.record(lambda: [run() for _ in range(calls)])
    except Exception:
        return None  # an operation that waits for the host cannot be recorded
    return lambda: replay([])


def synchronizer(device: torch.device) -> Callable[[], object]:
    """Waits for all work on `device`."""
    if is_host(device):
        return lambda: None
    wait: Callable[[], object] = torch.get_device_module(device).synchronize
    return wait
