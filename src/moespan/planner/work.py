"""The work of a step by formula: arithmetic operations, bytes to read, and the least time for both.

The formulas read the placement table and the model's geometry. Nothing is run, and no torch is
imported. `moespan.measure.probe` measures the limits that the least time depends on.

`RankWork` has the work of one rank, operation by operation; `step_work` is the sum for one rank
that holds the whole model. `moespan.planner.cost` makes time of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec

from moespan.checkpoint.experts import ExpertPlacement
from moespan.checkpoint.placement import Parameter, cache_heads, place
from moespan.config import (
    SCHEMES,
    EngineConfig,
    Layout,
    ModelConfig,
    Scheme,
    share_of_experts_read,
)


class Limits(msgspec.Struct, frozen=True):
    """The rates that all devices of a job reach together."""

    bytes_per_s: float
    operations_per_s: float

    @classmethod
    def mean(cls, before: Limits, after: Limits) -> Limits:
        """The limits that held between two measurements."""
        return cls(
            (before.bytes_per_s + after.bytes_per_s) / 2,
            (before.operations_per_s + after.operations_per_s) / 2,
        )


class Work(NamedTuple):
    """Unavoidable work: arithmetic operations, and bytes to read."""

    operations: float
    num_bytes: float

    def least_s(self, limits: Limits) -> float:
        """Least seconds of any program: the longer of the two, each at its limit."""
        return max(self.operations / limits.operations_per_s, self.num_bytes / limits.bytes_per_s)

    def bound(self, limits: Limits) -> str:
        """The part of the work that takes longer: `compute` or `memory`."""
        compute_s = self.operations / limits.operations_per_s
        return "compute" if compute_s > self.num_bytes / limits.bytes_per_s else "memory"


@dataclass(frozen=True)
class Task:
    """One operation of `moespan.ops` in a step of one rank.

    Attributes:
        part: where in `moespan.model.network` it is.
        op: its name in a profile (`moespan.planner.profile.Operation`).
        shape: the fields of a profile that tell operations of one name apart.
        scheme: name of the scheme of a quantised matrix, or `int8` of a cache; None is floats.
        rows: rows of its input; of experts, pairs of a row and an expert.
        count: how often a step has it, in layers of one kind.
        work: the work of one of them.
        products: products with a matrix or a bank of matrices; 0 for operations on rows.
        kernels: kernels that it launches where each is launched by itself.
        met: of experts, how many different ones.
    """

    part: str
    op: str
    shape: tuple[tuple[str, int], ...]
    scheme: str | None
    rows: float
    count: int
    work: Work
    products: int
    kernels: int
    met: float = 0.0


class Chunk(NamedTuple):
    """Part of a prompt that a step computes: `new` tokens after `context` others."""

    new: int
    context: float


_KERNELS = {"linear": 1, "mlp": 3, "route": 3, "experts": 5, "attention": 1, "rope_to_cache": 1}
_KERNELS |= {"norm": 1, "embed": 1, "sample": 6}


class RankWork:
    """The work of one rank in a step, by operation.

    Layers of one kind are alike, so each operation is counted once with its number of layers.

    Args:
        rank: any rank of the stage. Its expert share counts.

    Attributes:
        num_experts: routed experts of one layer that the rank holds.
        num_layers, num_moe_layers: layers of its stage, and those of them with experts.
    """

    def __init__(
        self, config: ModelConfig, engine: EngineConfig, layout: Layout | None = None, rank: int = 0
    ) -> None:
        layout = engine.layout if layout is None else layout
        self._config, self._engine, self._layout = config, engine, layout
        at = layout.coordinates(rank)
        layers = layout.stages(config)[at.pp]
        self._is_first = at.pp == 0
        self._is_last = at.pp == layout.pp - 1
        one_set = rank % max(layout.ep, layout.tp)
        self._parts = parts_of(config, layout.tp, layout.ep, one_set, engine.quantization)
        self.num_moe_layers = sum(config.is_moe(layer) for layer in layers)
        self._num_dense = len(layers) - self.num_moe_layers
        self.num_layers = len(layers)
        held = ExpertPlacement.make(engine.expert_placement, config, layout)
        self.num_experts = len(held.default[layout.ep_rank(rank)])
        self._heads = config.num_attention_heads // (layout.tp * layout.sp)
        self._kv_heads = cache_heads(config, layout, rank)
        self._token_cache_bytes = 2 * self._kv_heads * config.kv_bytes_per_head(engine.cache_dtype)

    def dense_tasks(self, tokens: float, rows: float) -> Iterator[Task]:
        """Everything but experts and attention, for `tokens` that the rank holds outside attention
        and `rows` of logits."""
        if self._is_first:
            yield self._embed(tokens)
        yield from self._layer_tasks("attention", self.num_layers, tokens)
        yield self._rope(tokens)
        yield from self._layer_tasks("dense", self._num_dense, tokens)
        yield from self._layer_tasks("moe", self.num_moe_layers, tokens)
        if self._is_last:
            yield from self._head(tokens, rows)

    def expert_task(self, rows: float, met: float) -> Task | None:
        """The routed experts of one layer: `rows` pairs of a token and an expert of this rank,
        which meet `met` different ones; None if the stage has none."""
        parameters = [one for name, one in self._parts["moe"].items() if ".experts." in name]
        if not parameters or not self.num_moe_layers:
            return None
        share = met / self.num_experts
        each = [math.prod(one.shape) / self.num_experts for one in parameters]
        work = Work(
            2 * rows * sum(each),
            share * sum(one.num_bytes(self._engine.dtype) for one in parameters),
        )
        down = next(
            one for name, one in self._parts["moe"].items() if name.endswith("experts.down")
        )
        shape = (("k", down.shape[1]), ("n", down.shape[2]), ("experts", self.num_experts))
        scheme = _scheme_name(down.scheme)
        return Task(
            "moe.experts", "experts", shape, scheme, rows, self.num_moe_layers, work, 2,
            _KERNELS["experts"], met,
        )  # fmt: skip

    def attention_task(self, sequences: int, cached: float, chunks: Sequence[Chunk]) -> Task:
        """Attention of one layer: `sequences` with one new token and `cached` tokens in all, new
        ones included, and chunks of prompts."""
        pairs = cached + sum(new * (context + (new + 1) / 2) for new, context in chunks)
        total = cached + sum(new + context for new, context in chunks)
        work = Work(
            4 * self._heads * self._config.head_dim * pairs, total * self._token_cache_bytes
        )
        rows = sequences + sum(chunk.new for chunk in chunks)
        return Task(
            "attention.attention", "attention", self.attention_shape, self._cache_scheme, rows,
            self.num_layers, work, 1, _KERNELS["attention"],
        )  # fmt: skip

    @property
    def attention_shape(self) -> tuple[tuple[str, int], ...]:
        """Heads of this rank inside attention, as a profile names them."""
        heads = (("heads", self._heads), ("kv_heads", self._kv_heads))
        return (*heads, ("head_dim", self._config.head_dim))

    @property
    def _cache_scheme(self) -> str | None:
        return "int8" if self._engine.cache_dtype == "int8" else None

    def _embed(self, tokens: float) -> Task:
        # A token reads one row. Tied weights are counted once, by the head.
        hidden, work = self._config.hidden_size, Work(0, 0)
        if not self._config.tie_word_embeddings:
            table = self._parts["embed"]["embed"]
            work = Work(0, table.num_bytes(self._engine.dtype) / table.shape[0] * tokens)
        return self._rowwise("embed", "embed", (("k", hidden),), tokens, 1, work)

    def _rope(self, tokens: float) -> Task:
        return self._rowwise(
            "attention.rope", "rope_to_cache", self.attention_shape, tokens, self.num_layers,
            Work(0, 0),
        )  # fmt: skip

    def _head(self, tokens: float, rows: float) -> Iterator[Task]:
        config = self._config
        yield from self._tasks("norm", self._parts["norm"], 1, tokens)
        part = "embed" if config.tie_word_embeddings else "head"
        head = self._parts[part][part]
        yield self._product("head", "linear", [head], rows, 1)
        yield self._rowwise("sample", "sample", (("n", config.vocab_size),), rows, 1, Work(0, 0))

    def _layer_tasks(self, kind: str, count: int, tokens: float) -> Iterator[Task]:
        if count:
            yield from self._tasks(kind, self._parts[kind], count, tokens)

    def _tasks(
        self, kind: str, parameters: dict[str, Parameter], count: int, tokens: float
    ) -> Iterator[Task]:
        """The operations that meet `parameters`, without routed experts."""
        mlps: dict[str, list[Parameter]] = {}
        for name, parameter in parameters.items():
            part, _, leaf = name.rpartition(".")
            if ".experts." in name:
                continue
            if leaf in ("gate_up", "down"):
                mlps.setdefault(part, []).append(parameter)
            elif leaf == "router":
                yield self._product(f"{kind}.router", "route", [parameter], tokens, count)
            elif len(parameter.shape) == 2:
                yield self._product(f"{kind}.{leaf}", "linear", [parameter], tokens, count)
            else:  # a norm's weight, or a bias
                size, label = parameter.shape[0], kind if kind == leaf else f"{kind}.{leaf}"
                work = Work(2 * size * tokens, parameter.num_bytes(self._engine.dtype))
                op = "norm" if leaf == "norm" else "bias"
                yield self._rowwise(label, op, (("k", size),), tokens, count, work)
        for part, matrices in mlps.items():
            label = f"{kind}.{part.rpartition('.')[2]}" if kind == "moe" else f"{kind}.mlp"
            yield self._product(label, "mlp", matrices, tokens, count)

    def _product(
        self, part: str, op: str, matrices: list[Parameter], rows: float, count: int
    ) -> Task:
        """Products of the same rows; the last of `matrices` names the shape."""
        work = Work(
            2 * rows * sum(math.prod(one.shape) for one in matrices),
            sum(one.num_bytes(self._engine.dtype) for one in matrices),
        )
        last = matrices[-1]
        n, k = last.shape
        shape = (("n", k), ("k", n)) if op == "mlp" else (("n", n), ("k", k))
        scheme = _scheme_name(last.scheme)
        return Task(part, op, shape, scheme, rows, count, work, len(matrices), _KERNELS[op])

    def _rowwise(
        self,
        part: str,
        op: str,
        shape: tuple[tuple[str, int], ...],
        rows: float,
        count: int,
        work: Work,
    ) -> Task:
        return Task(part, op, shape, None, rows, count, work, 0, _KERNELS.get(op, 1))


def _scheme_name(scheme: Scheme | None) -> str | None:
    """The name of a scheme. A head whose input is not rounded has the name of the others' scheme
    if no scheme is exactly like it."""
    if scheme is None:
        return None
    alike = (name for name, one in SCHEMES.items() if one == scheme)
    return next(alike, next(n for n, one in SCHEMES.items() if one.dtype == scheme.dtype))


def step_work(
    config: ModelConfig, engine: EngineConfig, num_sequences: int, num_new: int, context: float
) -> Work:
    """The work of one step: each of `num_sequences` sequences gets `num_new` tokens after `context`
    others.

    Operations are two for each weight that a token meets, and four for each element of a query and
    each token that it attends to. The head meets only the last token of a sequence.

    Bytes are those of the weights, as the engine keeps them and read once, and of the KV cache. T
    tokens that choose K of E experts each read E·(1 − (1 − K/E)^T) of them, if routing is as even
    as that of random weights. A trained router is less even, and its tokens read fewer experts.
    Activations are not counted.

    The whole model counts, however it is laid out: each weight is on some rank and has to be read.
    """
    whole = RankWork(config, replace(engine, expert_placement="contiguous"), Layout())
    tokens = num_sequences * num_new
    tasks = list(whole.dense_tasks(tokens, num_sequences))
    chunks = [Chunk(num_new, context)] * num_sequences
    tasks.append(whole.attention_task(0, 0.0, chunks))
    if whole.num_moe_layers:
        met = whole.num_experts * share_of_experts_read(config, tokens)
        experts = whole.expert_task(tokens * config.num_experts_per_tok, met)
        tasks += [] if experts is None else [experts]
    return Work(
        sum(task.count * task.work.operations for task in tasks),
        sum(task.count * task.work.num_bytes for task in tasks),
    )


@functools.lru_cache(maxsize=4096)
def parts_of(
    config: ModelConfig, tp: int, ep: int, rank: int, quantization: str | None
) -> dict[str, dict[str, Parameter]]:
    """Kind of part → name → parameter in one layer of that kind: `embed`, `attention`, `dense`,
    `moe`, `norm` and `head`. `rank` is one of those that hold one set of experts."""
    kinds = [config.is_moe(layer) for layer in range(config.num_hidden_layers)]
    examples = {kind: kinds.index(kind) for kind in (False, True) if kind in kinds}
    # Layers of one kind are alike, so the first ones are enough.
    short = replace(config, num_hidden_layers=max(examples.values()) + 1)
    one_set = Layout(tp, ep, dp=max(ep // tp, 1))
    placed = place(short, one_set, rank, quantization=quantization)
    found: dict[str, dict[str, Parameter]] = {
        kind: {} for kind in ("embed", "attention", "dense", "moe", "norm", "head")
    }
    first = next(iter(examples.values()))
    for name, parameter in placed.parameters.items():
        if not name.startswith("layers."):
            found[name][name] = parameter
            continue
        _, layer, part, *_ = name.split(".")
        if part == "attention" and int(layer) == first:
            found["attention"][name] = parameter
        elif part == "mlp" and int(layer) in examples.values():
            found["moe" if config.is_moe(int(layer)) else "dense"][name] = parameter
    return found
