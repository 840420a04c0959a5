"""Seconds of one operation or collective on a machine, from its profile.

A measured curve comes first and is interpolated on logarithmic scales. Where a profile has none,
the time of an operation is a floor for each kernel, and the longer of its reading and its
arithmetic. That of a collective is a latency, and its bytes over the rate of the links. Imports no
torch.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moespan.config import DTYPE_BYTES, SCHEMES
from moespan.device import DEVICES
from moespan.errors import ConfigError
from moespan.parallel.counters import sent_bytes
from moespan.planner.profile import Collective, Figure, Level, Operation, Profile
from moespan.planner.work import Task

_US = 1e-6

ATTENTION_SHARE = 0.5
"""Share of the rate of large products that attention of a prompt reaches; a guess."""

OTHER_LATENCY = 0.7
"""Latency of other collectives, as a share of an all-reduce's: 5.3 to 10.6 of 6.4 to 15.8 us over 2
to 8 H100s (AIConfigurator's tables of NCCL 2.29)."""


BY_RATES = "floor + max(bytes/rate, operations/rate)"
"""Source of an operation's time without a measured curve."""

BY_LINKS = "latency + bytes/rate"
"""Source of a collective's time without a measured curve."""


class Price(NamedTuple):
    """Seconds on the device, and where the figure comes from."""

    seconds: float
    source: str


@dataclass(frozen=True)
class _Curve:
    """Points of a measured curve, ascending."""

    at: Sequence[int]
    us: Sequence[float]
    source: str

    def seconds(self, at: float) -> float:
        """Interpolated; below the first point its time, beyond the last one in proportion."""
        sizes, times = self.at, self.us
        if at <= sizes[0]:
            return times[0] * _US
        if at >= sizes[-1]:
            return times[-1] * max(at / max(sizes[-1], 1), 1.0) * _US
        right = bisect.bisect_left(sizes, at)
        low, high = max(sizes[right - 1], 0.5), sizes[right]
        share = math.log(at / low) / math.log(high / low)
        return float(times[right - 1] * (times[right] / times[right - 1]) ** share) * _US


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """The value at `at` between points (position, value), on logarithmic scales; the nearest
    point's beyond the ends."""
    points = sorted(points)
    if at <= points[0][0]:
        return points[0][1]
    for (low, first), (high, second) in itertools.pairwise(points):
        if at <= high:
            share = math.log(at / max(low, 0.5)) / math.log(high / max(low, 0.5))
            return float(first * (second / first) ** share)
    return points[-1][1]


class Prices:
    """Times on one machine.

    Args:
        dtype: dtype of activations.
        sharers: ranks that share one host's memory and cores, where the profile says that the ranks
            of a node do; their times multiply.
        worst: take the upper bounds of latencies that are guesses.

    Attributes:
        sharers: factor on times that these ranks make; 1 where they share nothing.

    Raises:
        ConfigError: the profile lacks a figure that every time needs.
    """

    def __init__(
        self, profile: Profile, dtype: str, sharers: int = 1, *, worst: bool = False
    ) -> None:
        self._profile, self._dtype = profile, dtype
        self._is_host = DEVICES[profile.device.kind].is_host
        shares = any(level.topology == "host" for level in profile.levels)
        self._slower = self.sharers = sharers if shares else 1
        self._levels = {one.name: one for one in profile.levels}
        self._worst = worst
        self._operations: dict[tuple[object, ...], list[Operation]] = defaultdict(list)
        for one in profile.operations:
            self._operations[one.op, one.dtype, one.scheme].append(one)
        self._collectives: dict[tuple[str, str, bool], list[Collective]] = defaultdict(list)
        for link in profile.collectives:
            self._collectives[link.kind, link.level, link.graph].append(link)
        self._element_bytes = DTYPE_BYTES[dtype]
        self._bytes_per_s = _value("device.bytes_per_s", profile.device.bytes_per_s)
        self._floor_s = _value("device.floor_us", profile.device.floor_us, 0) * _US
        self._row_s = _value("launch.node_us", profile.launch.node_us, 0) * _US
        self.eager_s = _value("launch.eager_us", profile.launch.eager_us, 0) * _US
        self.replay_s = _value("launch.replay_us", profile.launch.replay_us, 0) * _US
        self.wait_s = _value("launch.wait_us", profile.launch.wait_us, 0) * _US
        self.step_s = _value("launch.step_us", profile.launch.step_us, 0) * _US
        self.layer_s = _value("launch.layer_us", profile.launch.layer_us, 0) * _US
        self._skew_s = _value("launch.skew_us", profile.launch.skew_us, 0) * _US

    @property
    def options(self) -> tuple[int, bool]:
        """A key that differs between unequal prices of one profile."""
        return self.sharers, self._worst

    def level(self, name: str) -> Level:
        """The level of this name."""
        return self._levels[name]

    def task(self, task: Task, graph: bool) -> Price:
        """One operation, once."""
        if task.op == "experts":
            found = self._experts(task, graph)
        else:
            found = self._measured(task.op, dict(task.shape), task.scheme, task.rows, graph)
        return found or self._formula(task)

    def decode_attention(self, task: Task, sequences: int, context: float, graph: bool) -> Price:
        """Attention of `sequences` with one new token each, and `context` tokens on average."""
        return self._attention("attention_decode", task, sequences, context, graph)

    def prefill_attention(self, task: Task, new: int, context: float) -> Price:
        """Attention of a chunk of `new` tokens of one prompt after `context` others."""
        return self._attention("attention_prefill", task, new, context, False)

    def collective(
        self, kind: str, level: Level, ranks: int, num_bytes: float, graph: bool, inside: int = 1
    ) -> Price:
        """One collective of `num_bytes`, as `sent_bytes` means them, with the wait for the slowest
        rank.

        Args:
            level: the outermost level that its ranks cross.
            inside: how many of its ranks are in one unit of the level below.
        """
        if ranks == 1:
            return Price(0.0, "one rank")
        curves = self._collectives.get((kind, level.name, graph)) or self._collectives.get(
            (kind, level.name, not graph)
        )
        if curves and not self._worst:
            points = [
                (float(one.ranks), self._from_curve(one, kind, level, num_bytes, inside))
                for one in curves
            ]
            source = next((one.source for one in curves if one.ranks == ranks), curves[0].source)
            most = max(one.ranks for one in curves)
            further = 0.0
            if ranks > most:  # more ranks than were measured take longer by what latencies grow
                further = self._latency_s(kind, level, ranks, graph)
                further -= self._latency_s(kind, level, most, graph)
            return Price(_between(points, ranks) + further, source or "measured")
        latency = self._latency_s(kind, level, ranks, graph)
        sent = sent_bytes(kind, ranks, int(num_bytes))
        seconds = latency + self._sending_s(level, ranks, sent, inside) + self._skew_s
        return Price(seconds, BY_LINKS)

    def _from_curve(
        self, one: Collective, kind: str, level: Level, num_bytes: float, inside: int
    ) -> float:
        """Seconds on a measured curve, and of the wait; beyond the curve's end further bytes go at
        the rate of the links."""
        skew_s = self._skew_s if one.skew_us is None else one.skew_us * _US
        if num_bytes <= one.bytes[-1]:
            return skew_s + _Curve(one.bytes, one.us, one.source).seconds(num_bytes)
        base_s = skew_s + one.us[-1] * _US
        further = sent_bytes(kind, one.ranks, int(num_bytes - one.bytes[-1]))
        if len(one.bytes) > 1 and one.us[-1] > one.us[-2]:
            rate = (one.bytes[-1] - one.bytes[-2]) / ((one.us[-1] - one.us[-2]) * _US)
            return base_s + (num_bytes - one.bytes[-1]) / rate
        return base_s + self._sending_s(level, one.ranks, further, inside)

    def _latency_s(self, kind: str, level: Level, ranks: int, graph: bool) -> float:
        known: Mapping[int, Figure] = level.latency_us
        if graph and level.graph_latency_us and kind == "all_reduce":
            known = level.graph_latency_us
        if self._worst and level.worst_latency_us:
            known = level.worst_latency_us
        if not known:
            return 0.0
        points = sorted((float(at), figure.value) for at, figure in known.items())
        us = _between(points, ranks)
        if ranks > points[-1][0]:  # by the logarithm
            steps = math.log2(ranks / points[-1][0])
            last = points[-1][1] - points[-2][1] if len(points) > 1 else points[-1][1] / 2
            us += last * steps
        share = 1.0 if kind == "all_reduce" else OTHER_LATENCY
        return us * share * _US

    def _sending_s(self, level: Level, ranks: int, sent: float, inside: int) -> float:
        """Seconds for `sent` bytes of every rank: those for ranks in the same unit of the level
        below go over its links, the others over this level's."""
        outside = sent
        seconds = 0.0
        below = self._below(level)
        if below is not None and inside > 1:
            across = (ranks - inside) / max(ranks - 1, 1)
            outside = sent * across
            seconds = (sent - outside) / self._rate(below, inside)
        return seconds + outside / self._rate(level, ranks)

    def _below(self, level: Level) -> Level | None:
        index = [one.name for one in self._profile.levels].index(level.name)
        return self._profile.levels[index - 1] if index else None

    def _rate(self, level: Level, ranks: int) -> float:
        rate = _value(f"levels.{level.name}.bytes_per_s", level.bytes_per_s)
        if level.topology == "mesh" and level.devices and level.devices > 1:
            return rate * min(ranks - 1, level.devices - 1) / (level.devices - 1)
        return rate / self._slower if level.topology == "host" else rate

    def level_of(self, span: int) -> Level:
        """The innermost level that joins `span` neighbouring devices.

        Raises:
            ConfigError: no level joins so many.
        """
        for level in self._profile.levels:
            if level.devices is None or level.devices >= span:
                return level
        raise ConfigError(
            f"hardware {self._profile.name} knows no links between {span} devices: plan fewer, "
            f"calibrate as many ranks of a node (such as -tp {span}), or put the "
            "measured figures over a built-in profile's links, as in --hardware 910b3+FILE.json"
        )

    def inside(self, level: Level, ranks: int, stride: int) -> int:
        """How many of `ranks` ranks, `stride` apart, are in one unit of the level below."""
        below = self._below(level)
        if below is None or below.devices is None:
            return 1
        return max(1, min(ranks, below.devices // stride))

    def _measured(
        self, op: str, shape: Mapping[str, int], scheme: str | None, rows: float, graph: bool
    ) -> Price | None:
        found = [
            one
            for one in self._operations.get((op, self._dtype, scheme), ())
            if all(getattr(one, name) == size for name, size in shape.items())
        ]
        if not found:
            return None
        one = next((one for one in found if one.graph == graph), found[0])
        seconds = _Curve(one.rows, one.us, one.source).seconds(rows)
        return Price(seconds * self._slower, one.source or "measured")

    def _experts(self, task: Task, graph: bool) -> Price | None:
        """Between the curves of the nearest numbers of different experts met."""
        shape = dict(task.shape)
        curves = [
            one
            for one in self._operations.get((task.op, self._dtype, task.scheme), ())
            if (one.n, one.k, one.experts) == (shape["n"], shape["k"], shape["experts"])
        ]
        if not curves:
            return None
        graphs = [one for one in curves if one.graph == graph] or curves
        points = [
            (float(one.met), _Curve(one.rows, one.us, one.source).seconds(task.rows))
            for one in graphs
        ]
        return Price(
            _between(points, max(task.met, 0.5)) * self._slower, graphs[0].source or "measured"
        )

    def _attention(self, op: str, task: Task, rows: int, context: float, graph: bool) -> Price:
        shape = dict(task.shape)
        curves = [
            one
            for one in self._operations.get((op, self._dtype, task.scheme), ())
            if all(getattr(one, name) == size for name, size in shape.items())
        ]
        if not curves:
            return self._formula(task)
        graphs = [one for one in curves if one.graph == graph] or curves
        points = sorted(
            (one.context, _Curve(one.rows, one.us, one.source).seconds(rows)) for one in graphs
        )
        return Price(_linear(points, context) * self._slower, graphs[0].source or "measured")

    def _formula(self, task: Task) -> Price:
        moved = task.work.num_bytes + self._activation_bytes(task)
        reading = moved / self._bytes_per_s
        computing = task.work.operations / self._rate_of(task)
        floors = task.products * self._floor_s + (task.kernels - task.products) * self._row_s
        seconds = floors + max(reading, computing) * self._slower
        return Price(seconds, BY_RATES)

    def _rate_of(self, task: Task) -> float:
        rates = self._profile.device.operations_per_s
        dtype = self._dtype
        if task.op == "attention":
            return _rate(rates, dtype) * ATTENTION_SHARE
        if task.scheme is not None and task.op in ("linear", "mlp", "experts"):
            scheme = SCHEMES[task.scheme]
            if scheme.activation_bits == 8:
                dtype = scheme.dtype
        return _rate(rates, dtype)

    def _activation_bytes(self, task: Task) -> float:
        """Bytes of inputs and outputs that the operation moves, as the network has them."""
        shape = dict(task.shape)
        n, k = shape.get("n", 0), shape.get("k", 0)
        heads = shape.get("heads", 0) + 2 * shape.get("kv_heads", 0)
        elements = {
            "linear": n + k,
            "mlp": 2 * k + 4 * n,
            "route": n + k,
            "experts": 3 * k + 4 * n,
            "norm": 4 * k,
            "bias": 2 * k,
            "embed": k,
            "sample": 3 * n,
            "rope_to_cache": 2 * heads * shape.get("head_dim", 0),
            "attention": 2 * shape.get("heads", 0) * shape.get("head_dim", 0),
        }[task.op]
        return task.rows * elements * self._element_bytes


def _linear(points: Sequence[tuple[float, float]], at: float) -> float:
    """Between points (position, value), and beyond the ends in a straight line."""
    if len(points) == 1:
        return points[0][1]
    right = min(max(bisect.bisect_left([point[0] for point in points], at), 1), len(points) - 1)
    (low, first), (high, second) = points[right - 1], points[right]
    value = first + (second - first) * (at - low) / (high - low)
    return max(value, min(first, second) * 0.1)


def _rate(rates: Mapping[str, Figure], dtype: str) -> float:
    if dtype not in rates:
        raise ConfigError(
            f"the profile has no operations_per_s of {dtype}; it has {', '.join(rates)}: use one "
            "of them as --dtype, or calibrate"
        )
    return rates[dtype].value


def _value(name: str, figure: Figure | None, default: float | None = None) -> float:
    if figure is not None:
        return figure.value
    if default is None:
        raise ConfigError(
            f"the profile has no {name}; name a built-in one as its base, or calibrate"
        )
    return default
