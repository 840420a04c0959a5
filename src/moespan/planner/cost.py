"""Seconds of a step under a layout: of each stage on its busiest rank, and of the leader.

A step is the sum of its operations and collectives, which `prices` has the times of. A stage waits
for its slowest replica, whether replicas share experts or not, and each layer for the busiest ep
rank. Decode steps are padded and recorded as the engine does. The leader's work and its broadcast
go on beside the device as far as plans are made ahead (`moespan.search.simulate`). Imports no
torch.

Times are kept for a grid of sizes, dense up to 32 and then 16 to an octave, so that a simulation
asks for most of them once. Costs of many layouts share the times of stages that are alike
(`Times`): a stage's time does not depend on how many replicas there are, and stages with the same
layers take the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from moespan.checkpoint.experts import ExpertPlacement
from moespan.config import DTYPE_BYTES, EngineConfig, Layout, ModelConfig
from moespan.device import DEVICES
from moespan.parallel.counters import Traffic
from moespan.parallel.tokens import dispatch_of_step, tp_groups_of
from moespan.planner.expert_load import Routing
from moespan.planner.prices import Price, Prices
from moespan.planner.profile import Level, Profile
from moespan.planner.traffic import StepSize, step_traffic
from moespan.planner.work import Chunk, RankWork, Task

BEFORE_SHARE = 0.5
"""Share of the leader's work that comes before a step (plans, inputs); the rest takes in results.
`benchmarks/engine_overhead.py`: 40 to 60 %."""

_LEADER = 0, 0
"""Replica and stage of the rank that leads."""

_SEQUENCE_BYTES, _BLOCK_BYTES, _TOKEN_BYTES = 40, 3, 3
"""Bytes of a plan for a sequence, for each of its blocks, and for a token, in msgpack."""


class ReplicaStep(NamedTuple):
    """What one replica computes in a step.

    Attributes:
        tokens: all of them.
        rows: rows of logits.
        sequences: sequences with one new token.
        cached: tokens of these sequences, the new ones included.
        chunks: chunks of prompts.
    """

    tokens: int
    rows: int
    sequences: int
    cached: int
    chunks: tuple[Chunk, ...] = ()

    @property
    def num_sequences(self) -> int:
        """All sequences."""
        return self.sequences + len(self.chunks)


IDLE = ReplicaStep(0, 0, 0, 0)


@dataclass(frozen=True)
class Line:
    """A part of a step in an explanation.

    Attributes:
        part: where in the network, or the collective's axis, kind and module.
        kind: `operation`, `collective` or `host`.
        count: how often.
        seconds: all of them together.
        source: where the figure comes from.
    """

    part: str
    kind: str
    count: int
    seconds: float
    source: str


class _Times(NamedTuple):
    """Seconds on the device, and the kernels that an eager step launches for them."""

    seconds: float
    kernels: float


class Times:
    """Times that several costs of steps share, which have the same profile, model, routing, dtype
    of activations, and expert placement."""

    def __init__(self) -> None:
        self.stages: dict[tuple[object, ...], _Stage] = {}
        self.operations: dict[tuple[object, ...], tuple[_Grid, _Grid]] = {}


class StepCost:
    """The times of an engine's steps.

    Args:
        ranks_per_node: ranks of all engines on one machine; None: as many as one engine has there.
        worst: take upper bounds of latencies that are guesses.
        times: shared with the costs of other layouts; None: with none.
    """

    def __init__(
        self,
        profile: Profile,
        model: ModelConfig,
        config: EngineConfig,
        routing: Routing,
        *,
        ranks_per_node: int | None = None,
        worst: bool = False,
        times: Times | None = None,
    ) -> None:
        self._profile, self._config, self._layout = profile, config, config.layout
        layout = config.layout
        sharers = ranks_per_node or min(layout.world_size, profile.devices_per_node)
        prices = Prices(profile, config.dtype, sharers, worst=worst)
        self._groups = _replica_groups(layout)
        self._stages = _stages(times or Times(), prices, model, config, routing)
        self._hidden_s: dict[int, float] = {}

    def stages_s(self, step: Sequence[ReplicaStep]) -> list[float]:
        """Seconds of each stage for one step of all replicas."""
        is_decode = not any(one.chunks for one in step)
        # Groups that compute the same take the same time, so each kind is counted once.
        kinds: set[tuple[ReplicaStep, ...]]
        if len(self._groups) == len(step):
            kinds = {(one,) for one in set(step)}
        else:
            kinds = {tuple(step[dp] for dp in group) for group in self._groups}
        alike = {stage: stage.seconds(kinds, is_decode) for stage in set(self._stages)}
        return [alike[stage] for stage in self._stages]

    def computing_s(self, step: Sequence[ReplicaStep], replica: int) -> list[float]:
        """Seconds that a rank of one replica computes in each stage for a step, without its waits
        for ranks and replicas that have more to compute."""
        group = next(group for group in self._groups if replica in group)
        members = tuple(step[dp] for dp in group)
        is_decode = not any(one.chunks for one in step)
        own = group.index(replica)
        alike = {stage: stage.computing_s(members, own, is_decode) for stage in set(self._stages)}
        found = [alike[stage] for stage in self._stages]
        places = [(replica, stage) for stage in range(self._layout.pp)]
        for stage, place in enumerate(places):
            found[stage] += 0.0 if place == _LEADER else self._broadcast_s(step)
        if places[-1] != _LEADER:
            found[-1] += self._result_s
        return found

    @property
    def _result_s(self) -> float:
        """Seconds for one replica's results from another rank."""
        figure = self._profile.host.result_us
        return figure.value * 1e-6 if figure else 0.0

    def launch_s(self, step: Sequence[ReplicaStep]) -> float:
        """Seconds that the leader spends on starting the first stage's kernels."""
        return self._stages[0].launch_s(*self._first(step))

    def _first(self, step: Sequence[ReplicaStep]) -> tuple[tuple[ReplicaStep, ...], bool]:
        """Steps of the first replicas that share experts, and whether all replicas decode."""
        return tuple(step[dp] for dp in self._groups[0]), not any(one.chunks for one in step)

    def lines(self, step: Sequence[ReplicaStep], stage: int = 0) -> list[Line]:
        """The parts of a step on the busiest rank of a stage, and the leader's."""
        found = self._stages[stage].lines(*self._first(step))
        num_sequences = sum(one.num_sequences for one in step)
        found.append(Line("leader: plans and results", "host", 1, self.leader_s(step), "host"))
        sent = self._broadcast_s(step)
        if sent:
            source = "host.broadcast"
            found.append(Line(f"plans of {num_sequences} sequences", "host", 1, sent, source))
        return found

    def leader_s(self, step: Sequence[ReplicaStep]) -> float:
        """Seconds of the leader's own work for a step."""
        host = self._profile.host
        each = host.sequence_us.value if host.sequence_us else 0.0
        fixed = host.step_us.value if host.step_us else 0.0
        return (fixed + each * sum(one.num_sequences for one in step)) * 1e-6

    def before_s(self, step: Sequence[ReplicaStep]) -> float:
        """Seconds of the leader until a step's plans are out."""
        return BEFORE_SHARE * self.leader_s(step) + self._broadcast_s(step)

    def after_s(self, step: Sequence[ReplicaStep]) -> float:
        """Seconds of the leader to take in a step's results."""
        own_s = (1 - BEFORE_SHARE) * self.leader_s(step)
        if not self._result_s:
            return own_s
        senders = step if self._layout.pp > 1 else step[1:]
        return own_s + self._result_s * sum(one.tokens > 0 for one in senders)

    def _broadcast_s(self, step: Sequence[ReplicaStep]) -> float:
        if self._layout.world_size == 1 or self._profile.host.broadcast is None:
            return 0.0
        block = self._config.block_size
        num_bytes = 64 + sum(
            _TOKEN_BYTES * one.tokens
            + _SEQUENCE_BYTES * one.num_sequences
            + _BLOCK_BYTES
            * (one.cached + sum(new + context for new, context in one.chunks))
            / block
            for one in step
        )
        size = 1 << max(int(num_bytes) - 1, 1).bit_length()
        if size not in self._hidden_s:
            self._hidden_s[size] = _broadcast_s(self._profile, self._layout.world_size, size)
        return self._hidden_s[size]


class _Kind(NamedTuple):
    """The properties of a stage that its time depends on, beside layout and options of the engine.

    Attributes:
        num_layers, num_moe_layers: layers, and those of them with experts.
        is_first, is_last: its place in the pipeline.
        link: level that joins it with the next stage, and how many of the two are in one unit
            below.
    """

    num_layers: int
    num_moe_layers: int
    is_first: bool
    is_last: bool
    link: tuple[str, int]


def _stages(
    times: Times, prices: Prices, model: ModelConfig, config: EngineConfig, routing: Routing
) -> list[_Stage]:
    """The stages of a pipeline; those that are alike are the same object."""
    layout = config.layout
    least = layout.with_fewest_replicas
    link = ("", 1)
    if layout.pp > 1:
        level = prices.level_of(layout.stage_size + 1)
        link = level.name, prices.inside(level, 2, layout.stage_size)
    shared = (
        *(least, config.quantization, config.cache_dtype, tuple(config.graph_sizes)),
        *(config.plans_ahead, config.moe_dispatch, prices.options),
    )
    found = []
    for number, layers in enumerate(layout.stages(model)):
        num_moe = sum(map(model.is_moe, layers))
        is_last = number == layout.pp - 1
        kind = _Kind(len(layers), num_moe, number == 0, is_last, link)
        key = (kind, *shared)
        if key not in times.stages:
            rank = number * least.stage_size
            small = replace(config, layout=least)
            times.stages[key] = _Stage(times, prices, model, small, routing, rank, kind)
        found.append(times.stages[key])
    return found


class _Stage:
    """The times of one stage on its busiest rank, for replicas that share experts.

    Args:
        config: with as few replicas as share experts.
        rank: the first one of the stage.
    """

    def __init__(
        self,
        times: Times,
        prices: Prices,
        model: ModelConfig,
        config: EngineConfig,
        routing: Routing,
        rank: int,
        kind: _Kind,
    ) -> None:
        layout = config.layout
        self._prices, self._model, self._config, self._layout = prices, model, config, layout
        self._routing, self._rank, self._link = routing, rank, kind.link
        self._is_host = DEVICES[config.device].is_host
        self._sizes = config.graph_sizes
        self._held = ExpertPlacement.make(config.expert_placement, model, layout)
        self._num_sharing = len(_replica_groups(layout)[0])
        self._element_bytes = DTYPE_BYTES[config.dtype]
        self._work = RankWork(model, config, layout, rank)
        key = (layout.tp, layout.sp, kind[:4], config.quantization, prices.sharers)
        if key not in times.operations:
            times.operations[key] = (
                _Grid(lambda at, graph: self._sum(self._token_tasks(at), graph)),
                _Grid(lambda at, graph: self._sum(self._row_tasks(at), graph)),
            )
        self._of_tokens, self._of_rows = times.operations[key]
        self._of_group: dict[tuple[int, int, int, bool], _Times] = {}
        self._experts: dict[tuple[int, bool, bool], _Times] = {}
        self._of_members = functools.lru_cache(maxsize=1 << 9)(self._group_s)

    def seconds(self, groups: Iterable[tuple[ReplicaStep, ...]], is_decode: bool) -> float:
        """Seconds of the slowest replicas, each group of which shares experts."""
        slowest = 0.0
        for members in groups:
            most = max(one.tokens for one in members)
            if not most:
                continue
            size = self._padded(most) if is_decode else None
            slowest = max(slowest, self._of_members(members, most, size))
        return slowest

    def computing_s(self, members: tuple[ReplicaStep, ...], replica: int, is_decode: bool) -> float:
        """Seconds of member `replica` of those that share experts."""
        most = max(one.tokens for one in members)
        size = self._padded(most) if is_decode else None
        return self._group_s(members, most, size, replica) if most else 0.0

    def launch_s(self, members: tuple[ReplicaStep, ...], is_decode: bool) -> float:
        """Seconds of the host that starts the kernels for these replicas."""
        most = max(one.tokens for one in members)
        if not most:
            return 0.0
        if is_decode and self._padded(most):
            return self._prices.replay_s
        if self._dispatch(most) == "all_to_all":  # the host waits in every layer
            return self._of_members(members, most, None)
        tokens = -(-members[0].tokens // self._layout.sp)
        kernels = (
            self._of_tokens(tokens, False).kernels + self._of_rows(members[0].rows, False).kernels
        )
        kernels += self._work.num_layers * _KERNELS_BESIDE
        return kernels * self._prices.eager_s

    def _group_s(
        self,
        members: tuple[ReplicaStep, ...],
        most: int,
        size: int | None,
        replica: int | None = None,
    ) -> float:
        """Seconds of the replicas that share experts, all together, or of one without waits."""
        graph = size is not None
        counted = members if replica is None else members[replica : replica + 1]
        own = [self._own(one, size) for one in set(counted) if one.tokens or len(members) > 1]
        total = size * len(members) if size else sum(one.tokens for one in members)
        most_tokens = size or most
        most_rows = size or max(one.rows for one in members)
        expert = self._expert_times(self._expert_tokens(total), graph, replica is not None)
        sent = self._group_times(most_tokens, total, most_rows, graph)
        device = max(one.seconds for one in own) + expert.seconds + sent.seconds
        if self._is_host:
            return device + self._host_s
        if graph:
            return device + self._prices.replay_s
        kernels = max(one.kernels for one in own) + expert.kernels + sent.kernels
        return max(device, kernels * self._prices.eager_s)

    def _own(self, one: ReplicaStep, size: int | None) -> _Times:
        """A replica's own operations: all but experts."""
        graph = size is not None
        tokens = -(-(size or one.tokens) // self._layout.sp)
        dense = self._of_tokens(tokens, graph)
        rows = self._of_rows(size or one.rows, graph)
        attention, layers = self._attention(one, size), self._work.num_layers
        return _Times(
            dense.seconds + rows.seconds + layers * attention.seconds,
            dense.kernels + rows.kernels + layers * attention.kernels,
        )

    def _attention(self, one: ReplicaStep, size: int | None) -> _Times:
        """Attention of one layer."""
        prices, seconds, kernels = self._prices, 0.0, 0.0
        if one.sequences:
            task = self._work.attention_task(one.sequences, one.cached, ())
            context = one.cached / one.sequences
            price = prices.decode_attention(task, size or one.sequences, context, size is not None)
            seconds, kernels = price.seconds, task.kernels
        for chunk in one.chunks:
            task = self._work.attention_task(0, 0, (chunk,))
            seconds += prices.prefill_attention(task, chunk.new, chunk.context).seconds
            kernels += task.kernels
        return _Times(seconds, kernels)

    def _attention_source(self, one: ReplicaStep, size: int | None) -> str:
        prices, chunks = self._prices, one.chunks[:1]
        if chunks:
            task = self._work.attention_task(0, 0, chunks)
            return prices.prefill_attention(task, chunks[0].new, chunks[0].context).source
        task = self._work.attention_task(one.sequences, one.cached, ())
        context = one.cached / max(one.sequences, 1)
        return prices.decode_attention(task, one.sequences, context, size is not None).source

    def lines(self, members: Sequence[ReplicaStep], is_decode: bool) -> list[Line]:
        """All parts of the step on replicas that share experts."""
        most = max(one.tokens for one in members)
        size = self._padded(most) if is_decode else None
        graph = size is not None
        total = size * len(members) if size else sum(one.tokens for one in members)
        first = max(members, key=lambda one: one.tokens)
        tokens = -(-(size or first.tokens) // self._layout.sp)
        tasks = [*self._token_tasks(tokens), *self._row_tasks(size or first.rows)]
        expert = self._expert_of(self._expert_tokens(total))
        tasks += [expert] if expert else []
        found = [
            Line(task.part, "operation", task.count, task.count * price.seconds, price.source)
            for task in tasks
            for price in [self._prices.task(task, graph)]
        ]
        attention, layers = self._attention(first, size), self._work.num_layers
        source = self._attention_source(first, size)
        found.append(Line("attention", "operation", layers, layers * attention.seconds, source))
        for name, count, price in self._sent(size or most, total, size or first.rows, graph):
            found.append(Line(name, "collective", count, count * price.seconds, price.source))
        if self._host_s:
            found.append(Line("between operations", "host", 1, self._host_s, "launch.layer_us"))
        if graph:
            found.append(Line("replay", "host", 1, self._prices.replay_s, "launch.replay_us"))
        return sorted(found, key=lambda line: -line.seconds)

    @property
    def _host_s(self) -> float:
        """Seconds of a step between its operations, where the host computes."""
        if not self._is_host:
            return 0.0
        prices = self._prices
        return (prices.step_s + self._work.num_layers * prices.layer_s) * prices.sharers

    def _padded(self, tokens: int) -> int | None:
        """The size of the recorded step; None if it is not recorded (`engine.worker`)."""
        size = next((one for one in self._sizes if one >= tokens), None)
        if size is None or self._dispatch(size) == "all_to_all":
            return None
        return size

    def _dispatch(self, tokens: int) -> str:
        layout = self._layout
        groups = [-(-tokens // layout.sp)] * layout.ep_tp_groups
        asked = self._config.moe_dispatch
        return dispatch_of_step(asked, self._model, layout, self._element_bytes, groups)

    def _expert_tokens(self, total: int) -> int:
        """Tokens of one set of experts, of `total` tokens of the replicas that share it."""
        layout = self._layout
        return -(-total * layout.ep_tp_groups // (layout.sp * self._num_sharing))

    def _expert_times(self, tokens: int, graph: bool, mean: bool = False) -> _Times:
        """Experts of all layers on the busiest rank of each layer, or on the mean rank."""
        key = rounded(tokens), graph, mean
        if key not in self._experts:
            task = self._expert_of(key[0], mean)
            self._experts[key] = self._sum([task] if task else [], graph)
        return self._experts[key]

    def _expert_of(self, tokens: int, mean: bool = False) -> Task | None:
        load_of = self._routing.mean if mean else self._routing.busiest
        load = load_of(tokens, self._held)
        return self._work.expert_task(load.rows, load.met)

    def _group_times(self, most: int, total: int, rows: int, graph: bool) -> _Times:
        """All collectives of a step."""
        key = rounded(most), rounded(total), rounded(rows), graph
        if key not in self._of_group:
            seconds = kernels = 0.0
            for _, count, price in self._sent(*key):
                seconds += count * price.seconds
                kernels += count
            self._of_group[key] = _Times(seconds, kernels)
        return self._of_group[key]

    def _sent(
        self, most: int, total: int, rows: int, graph: bool
    ) -> Iterator[tuple[str, int, Price]]:
        """Name, calls and price of each collective."""
        prices = self._prices
        traffic = self._traffic(most, total, rows)
        for (axis, kind, module), calls in sorted(traffic.calls.items()):
            ranks, level, inside = self._links(axis)
            message = _message_bytes(kind, ranks, traffic.sent_bytes[axis, kind, module] / calls)
            price = prices.collective(kind, level, ranks, message, graph, inside)
            yield f"{axis} {kind} {module}", calls, price
        if "all_to_all" in {kind for axis, kind, _ in traffic.calls if axis == "ep"}:
            waits = self._work.num_moe_layers
            yield "ep counts on the host", waits, Price(self._prices.wait_s, "launch.wait_us")

    def _links(self, axis: str) -> tuple[int, Level, int]:
        """Ranks that an axis joins, the outermost level that they cross, and how many of them are
        in one unit of the level below."""
        prices = self._prices
        if axis == "pp":
            name, inside = self._link
            return 2, prices.level(name), inside
        ranks, stride = _axis(self._layout, axis)
        level = prices.level_of((ranks - 1) * stride + 1)
        return ranks, level, prices.inside(level, ranks, stride)

    def _traffic(self, most: int, total: int, rows: int) -> Traffic:
        """Calls and bytes of the rank if the fullest replica has `most` of `total` tokens."""
        layout = self._layout
        others = self._num_sharing - 1
        rest = max(total - most, 0) // others if others else 0
        tokens = [most] + [min(rest, most)] * (layout.dp - 1)
        sampled = [rows] * layout.dp if self._config.plans_ahead else []
        step = StepSize(tokens, [rows] * layout.dp, num_sampled=sampled)
        config = self._config
        return step_traffic(
            self._model, layout, self._rank, config.dtype, step, config.moe_dispatch, self._held
        )

    def _token_tasks(self, tokens: float) -> list[Task]:
        return [one for one in self._work.dense_tasks(tokens, 0) if one.part not in _BY_ROWS]

    def _row_tasks(self, rows: float) -> list[Task]:
        return [one for one in self._work.dense_tasks(0, rows) if one.part in _BY_ROWS]

    def _sum(self, tasks: Sequence[Task], graph: bool) -> _Times:
        prices = self._prices
        return _Times(
            sum(task.count * prices.task(task, graph).seconds for task in tasks),
            sum(task.count * task.kernels for task in tasks),
        )


# Attention, experts, and about two collectives of each layer.
_KERNELS_BESIDE = 8

_BY_ROWS = ("head", "sample")
_GRID_BITS = 4


def rounded(at: int) -> int:
    """`at`, or the next multiple of 1/16 of the power of two below it."""
    step = 1 << max(at.bit_length() - 1 - _GRID_BITS, 0)
    return -(-at // step) * step


class _Grid:
    """A function of a size, computed at points of a grid and in a straight line between them."""

    def __init__(self, compute: Callable[[int, bool], _Times]) -> None:
        self._at = functools.lru_cache(maxsize=None)(compute)

    def __call__(self, at: int, graph: bool) -> _Times:
        step = 1 << max(at.bit_length() - 1 - _GRID_BITS, 0)
        low = at // step * step
        below = self._at(low, graph)
        if low == at:
            return below
        above, share = self._at(low + step, graph), (at - low) / step
        return _Times(
            below.seconds + share * (above.seconds - below.seconds),
            below.kernels + share * (above.kernels - below.kernels),
        )


def _replica_groups(layout: Layout) -> list[list[int]]:
    """Replicas that share experts with each other, and so wait for each other in each layer."""
    if layout.ep_tp_groups == 1:
        return [[dp] for dp in range(layout.dp)]
    found: list[list[int]] = []
    for unit in range(0, layout.dp * layout.sp, layout.ep_tp_groups):
        rank = unit * layout.tp
        members = sorted({dp for dp, _ in tp_groups_of(layout, rank)})
        if not found or members != found[-1]:
            found.append(members)
    return found


def _axis(layout: Layout, axis: str) -> tuple[int, int]:
    """How many ranks an axis joins, and how far apart they are."""
    return {
        "tp": (layout.tp, 1),
        "sp": (layout.sp, layout.tp),
        "ep": (layout.ep, 1),
        "ep_fused": (layout.ep, 1),
        "ep_tp_groups": (layout.ep_tp_groups, layout.tp),
    }[axis]


def _message_bytes(kind: str, ranks: int, sent: float) -> float:
    """The message of a collective in which a rank sends `sent` bytes; inverts `sent_bytes`."""
    others = max(ranks - 1, 1)
    share = {
        "all_reduce": ranks / (2 * others),
        "all_gather": 1 / others,
        "reduce_scatter": ranks / others,
        "broadcast": 1 / others,
    }
    return sent * share.get(kind, 1.0)


def _broadcast_s(profile: Profile, ranks: int, num_bytes: int) -> float:
    """Seconds of the leader's message, interpolated on logarithmic scales in both directions."""
    table = profile.host.broadcast
    assert table is not None
    rows = [_log_between(table.bytes, times, num_bytes) for times in table.us]
    return _log_between(table.ranks, rows, ranks) * 1e-6


def _log_between(at: Sequence[float], values: Sequence[float], wanted: float) -> float:
    if len(at) == 1 or wanted <= at[0]:
        return values[0]
    right = next((i for i, one in enumerate(at) if one >= wanted), len(at) - 1)
    low, high = at[right - 1], at[right]
    share = math.log(wanted / low) / math.log(high / low)
    return values[right - 1] * math.exp(share * math.log(values[right] / values[right - 1]))
