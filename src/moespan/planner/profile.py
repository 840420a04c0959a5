"""The profile of a machine: how fast it computes, sends and reads, and what its memory holds.

A profile is a JSON file. `moespan calibrate` writes one, and `hardware.json` holds those of
machines that others described. Every figure says where it comes from. `moespan.planner.cost` turns
figures into the time of a step, `moespan.planner.memory` into memory. Imports no torch.

Times are in microseconds, sizes in bytes, rates in units per second and one direction. "Measured"
curves are interpolated between their points, which are in ascending order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import msgspec

from moespan import files
from moespan.device import DEVICES
from moespan.errors import ConfigError, shown

SCHEMA = 1

Origin = Literal["vendor", "measured", "derived", "guess"]

WORST_ERROR, _CALIBRATED_ERROR = 0.4, 0.15

_MOST_BYTES = 16 << 20


class _Strict(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """Fields in a profile are known ones, so that a mistyped name is an error."""


class Figure(_Strict, frozen=True, kw_only=True, rename={"origin": "from"}):
    """One number and where it comes from.

    Attributes:
        value: the number; the median, if it is measured.
        origin: `from` in JSON: the vendor or its tools, a measurement, a formula over such, or a
            guess.
        source: whose figure it is, or the command that measured it.
        p10, p90, n: percentiles and number of measurements.
    """

    value: float
    origin: Origin
    source: str = ""
    p10: float | None = None
    p90: float | None = None
    n: int | None = None


class Made(_Strict, frozen=True, kw_only=True):
    """Where and how a calibrated profile was made.

    Attributes:
        machine: processor and devices, as `moespan.measure.probe.machine_name` has them.
        torch, cann, cuda, moespan: versions; empty if a machine has none.
        commands: what was run.
        seconds: how long the calibration took.
        clock: `wall`, or `cpu` where CPU time of one thread was measured.
        complete: False if the calibration was interrupted.
    """

    machine: str = ""
    torch: str = ""
    cann: str = ""
    cuda: str = ""
    moespan: str = ""
    commands: list[str] = []
    seconds: float = 0.0
    clock: str = "wall"
    complete: bool = True


class DeviceFigures(_Strict, frozen=True, kw_only=True):
    """One device, as the system shows it: on an A3 a die is one.

    Attributes:
        kind: a name in `moespan.device.DEVICES`.
        memory_bytes: memory that a rank finds free when it starts. On the host it is shared by all
            ranks of a node.
        base_bytes: memory of a rank with its runtime and no weights.
        allocator_slack: share of a step's tensors that the allocator holds beside them.
        graph_bytes: pairs (padded size of a decode step, bytes of its recorded graph).
        communicator_bytes: ranks of a process group → bytes that its communicator takes.
        bytes_per_s: rate at which large operations read memory.
        operations_per_s: dtype (`bfloat16`, `float16`, `float32`, `int8`, ...) → rate that large
            products reach, dense.
        peak_bytes_per_s, peak_operations_per_s: the same by the data sheet; for readers only.
        floor_us: least time of one product inside a graph, beside its reading.
        cores: physical cores, where ranks compute on the host.
    """

    kind: str
    memory_bytes: Figure
    base_bytes: Figure | None = None
    allocator_slack: Figure | None = None
    graph_bytes: list[tuple[int, float]] = []
    communicator_bytes: dict[int, Figure] = {}
    bytes_per_s: Figure | None = None
    operations_per_s: dict[str, Figure] = {}
    peak_bytes_per_s: Figure | None = None
    peak_operations_per_s: dict[str, Figure] = {}
    floor_us: Figure | None = None
    cores: int | None = None


class Operation(_Strict, frozen=True, kw_only=True, rename={"origin": "from"}):
    """The time of one operation of `moespan.ops` by its rows, measured in a warm state.

    | op                  | shape                          | rows                               |
    |---------------------|--------------------------------|------------------------------------|
    | `linear`            | n × k matrix                   | rows of the input                  |
    | `mlp`               | k hidden, n width              | rows of the input                  |
    | `route`             | n experts, k hidden            | rows of the input                  |
    | `experts`           | k hidden, n width, `experts`   | pairs of a row and an expert; they |
    |                     | held, `met` different ones met | meet `met` experts evenly          |
    | `attention_decode`  | heads, kv_heads, head_dim,     | sequences of one new token         |
    |                     | `context` tokens each          |                                    |
    | `attention_prefill` | heads, kv_heads, head_dim,     | new tokens of one sequence         |
    |                     | `context` tokens before        |                                    |
    | `rope_to_cache`     | heads, kv_heads, head_dim      | rows of the input                  |
    | `norm`              | k hidden                       | rows of the input                  |
    | `embed`             | k hidden                       | rows of the input                  |
    | `sample`            | n words                        | sampled rows                       |

    Attributes:
        dtype: dtype of the activations.
        scheme: scheme of a quantised matrix, or `int8` of an int8 KV cache; None is floats.
        rows, us: points of the curve.
        graph: whether it ran inside a recorded graph.
        p10_us, p90_us, n: percentiles at each point, and measurements of each.
    """

    op: str
    n: int = 0
    k: int = 0
    experts: int = 0
    met: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    context: int = 0
    dtype: str = "bfloat16"
    scheme: str | None = None
    rows: list[int]
    us: list[float]
    graph: bool = False
    origin: Origin = "measured"
    source: str = ""
    p10_us: list[float] = []
    p90_us: list[float] = []
    samples: int | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that two curves of different operations differ in."""
        shape = self.n, self.k, self.experts, self.met, self.heads, self.kv_heads, self.head_dim
        return self.op, *shape, self.context, self.dtype, self.scheme, self.graph


class Launch(_Strict, frozen=True, kw_only=True):
    """What it costs the host and the device to begin an operation.

    Attributes:
        eager_us: one kernel from the leader's thread.
        replay_us: a whole recorded graph.
        node_us: one kernel inside a graph.
        wait_us: the host learns a number from the device.
        skew_us: waiting for the slowest rank in one collective.
        step_us, layer_us: a rank's own Python for a step and for each layer, beside its operations,
            where the host computes. Elsewhere `eager_us` of each kernel has it.
    """

    eager_us: Figure | None = None
    replay_us: Figure | None = None
    node_us: Figure | None = None
    wait_us: Figure | None = None
    skew_us: Figure | None = None
    step_us: Figure | None = None
    layer_us: Figure | None = None


class Level(_Strict, frozen=True, kw_only=True):
    """One level of the network, from the innermost one outwards.

    Attributes:
        name: `pair`, `node`, `pod` or `cluster`.
        devices: devices that this level joins; None: as many as there are.
        nodes: machines that were measured.
        topology: `mesh` (each pair has a link of its own), `switch`, `ring` or `host` memory.
        bytes_per_s: what one device sends when it sends to all others of the level.
        latency_us: number of ranks → time of an all-reduce of a few bytes; between two numbers it
            grows by the logarithm.
        graph_latency_us: the same inside a recorded graph, where that differs.
        worst_latency_us: an upper bound, where `latency_us` is a guess that decides between
            layouts. The plan then gives a second answer for it.
    """

    name: str
    devices: int | None = None
    nodes: int | None = None
    topology: Literal["mesh", "switch", "ring", "host"] = "switch"
    bytes_per_s: Figure | None = None
    latency_us: dict[int, Figure] = {}
    graph_latency_us: dict[int, Figure] = {}
    worst_latency_us: dict[int, Figure] = {}


class Collective(_Strict, frozen=True, kw_only=True, rename={"origin": "from"}):
    """The time of one collective by its message.

    Attributes:
        kind: a collective of `moespan.parallel.counters.sent_bytes`.
        level: the outermost level that its ranks cross.
        ranks: how many take part.
        bytes: the message, `num_bytes` of `sent_bytes`.
        us: time of the slowest rank, the median over calls.
        graph: whether it was recorded in a graph.
        skew_us: what it takes longer after work, of a small message; None is `Launch.skew_us`.
    """

    kind: str
    level: str
    ranks: int
    bytes: list[int]
    us: list[float]
    graph: bool = False
    skew_us: float | None = None
    origin: Origin = "measured"
    source: str = ""
    p10_us: list[float] = []
    p90_us: list[float] = []
    samples: int | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that two curves of different collectives differ in."""
        return self.kind, self.level, self.ranks, self.graph


class Broadcast(_Strict, frozen=True, kw_only=True, rename={"origin": "from"}):
    """The leader's message of a step: `us[i][j]` to `ranks[i]` ranks with `bytes[j]` bytes."""

    ranks: list[int]
    bytes: list[int]
    us: list[list[float]]
    origin: Origin = "measured"
    source: str = ""


class HostFigures(_Strict, frozen=True, kw_only=True):
    """The leader's work for one step: `step_us`, and `sequence_us` for each sequence of all its
    replicas; `broadcast` sends the plans, and `result_us` takes one replica's results from another
    rank."""

    step_us: Figure | None = None
    sequence_us: Figure | None = None
    broadcast: Broadcast | None = None
    result_us: Figure | None = None


class RoutingFigures(_Strict, frozen=True, kw_only=True, rename={"origin": "from"}):
    """The routing that `experts` were measured with: `uniform`, or a file of counts."""

    origin: str = "uniform"


class Profile(_Strict, frozen=True, kw_only=True):
    """One type of machine.

    Attributes:
        schema: version of this format.
        base: the built-in profile that fills in what a file leaves out.
        made: where a calibrated profile was made; None for a built-in one.
        error: relative error of times that this profile leads to; None judges by the origins.
    """

    schema: int
    name: str
    base: str | None = None
    title: str = ""
    made: Made | None = None
    error: Figure | None = None
    device: DeviceFigures
    operations: list[Operation] = []
    launch: Launch = Launch()
    levels: list[Level] = []
    collectives: list[Collective] = []
    host: HostFigures = HostFigures()
    routing: RoutingFigures = RoutingFigures()

    @property
    def devices_per_node(self) -> int:
        """Devices in one machine."""
        inside = [level.devices for level in self.levels if level.name in ("pair", "node")]
        return max((devices for devices in inside if devices), default=1)

    @property
    def is_calibrated(self) -> bool:
        """Whether operations and host were measured to the end. Which curves a layout needs beside
        them, `moespan.search.explore.unmeasured` knows."""
        is_complete = self.made is None or self.made.complete
        return bool(self.operations and self.host.step_us and is_complete)

    @property
    def relative_error(self) -> float:
        """Relative error of a step's time: 40 %, or 15 % if it is calibrated."""
        if self.error is not None:
            return self.error.value
        return _CALIBRATED_ERROR if self.is_calibrated else WORST_ERROR

    def leaves(self) -> Iterator[tuple[str, str, str]]:
        """Path, origin and source of every figure and curve."""
        yield from _leaves("", self)


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str, str]]:
    if isinstance(value, Figure | Operation | Collective | Broadcast):
        yield path, value.origin, value.source
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from _leaves(f"{path}.{name}" if path else name, getattr(value, name))
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _leaves(f"{path}.{key}", one)
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _leaves(f"{path}[{index}]", one)


def names() -> list[str]:
    """Names of the built-in profiles."""
    return list(_built_in())


def load(name: str) -> Profile:
    """The built-in profile `name`, or the one in a JSON file.

    A file with a `base` takes from that built-in profile what it leaves out. `BASE+FILE.json` names
    the base in place of the file.

    Raises:
        ConfigError: there is no such profile, or it breaks the format.
    """
    known = {key.lower(): key for key in _built_in()}
    given, plus, file = name.partition("+")
    is_over = bool(plus) and given.lower() in known
    path = Path(file if is_over else name)
    if path.suffix != ".json":
        if name.lower() not in known:
            raise ConfigError(
                f"hardware {shown(name)} is neither a .json file nor one of "
                f"{', '.join(_built_in())}"
            )
        return _checked(_built_in()[known[name.lower()]], name)
    try:
        raw = files.read_json(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a profile: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a JSON {type(raw).__name__}, not an object")
    base = given if is_over else raw.get("base")
    if base is not None:
        if not isinstance(base, str) or base.lower() not in known:
            raise ConfigError(f"{path}: base={shown(base)} is not one of {', '.join(_built_in())}")
        raw = merged(_built_in()[known[base.lower()]], raw)
    return _checked(raw, str(path))


def save(profile: Profile, path: str | Path) -> None:
    """Write a profile as JSON, so that an interrupted write leaves the previous file."""
    path = Path(path)
    text = msgspec.json.format(msgspec.json.encode(profile), indent=1)
    partial = path.with_name(path.name + ".partial")
    files.write(partial, text + b"\n")
    partial.replace(path)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with everything that `over` has, both as JSON objects.

    Objects are merged key by key, figures replaced as a whole. A curve replaces the curve of the
    same operation or collective, and a level that of the same name.
    """
    result = dict(base)
    for key, value in over.items():
        before = base.get(key)
        if key in _CURVES and isinstance(value, list) and isinstance(before, list):
            result[key] = _merged_curves(key, before, value)
        elif key == "levels" and isinstance(value, list) and isinstance(before, list):
            result[key] = _merged_levels(before, value)
        elif isinstance(value, dict) and isinstance(before, dict) and "value" not in value:
            result[key] = merged(before, value)
        else:
            result[key] = value
    return result


_CURVES: dict[str, type[Operation] | type[Collective]] = {
    "operations": Operation,
    "collectives": Collective,
}


def _merged_levels(before: list[Any], over: list[Any]) -> list[Any]:
    """The levels of `before`, from the inside outwards, with those of `over` in their places."""
    given = {_converted(raw, Level, "levels").name: raw for raw in over}
    merged = [given.pop(level["name"], level) for level in before]
    return merged + list(given.values())


def _merged_curves(kind: str, before: list[Any], over: list[Any]) -> list[Any]:
    def key(raw: Any) -> tuple[Any, ...]:
        curve: Operation | Collective = _converted(raw, _CURVES[kind], kind)
        return curve.key

    replaced = {key(raw) for raw in over}
    return [raw for raw in before if key(raw) not in replaced] + over


def _checked(raw: dict[str, Any], name: str) -> Profile:
    if raw.get("schema") != SCHEMA:
        raise ConfigError(
            f"{name}: schema={shown(raw.get('schema'))} is not {SCHEMA}, the one that this version "
            "reads; calibrate again"
        )
    profile: Profile = _converted(raw, Profile, name)
    if profile.device.kind not in DEVICES:
        raise ConfigError(
            f"{name}: kind={shown(profile.device.kind)} is not one of {', '.join(DEVICES)}"
        )
    for operation in profile.operations:
        _check_curve(f"{name}: operation {operation.op}", operation.rows, operation.us)
    for collective in profile.collectives:
        where = f"{name}: {collective.kind} over {collective.ranks} ranks"
        _check_curve(where, collective.bytes, collective.us)
    return profile


def _converted(raw: Any, kind: type[Any], name: str) -> Any:
    try:
        return msgspec.convert(raw, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name} is not a profile: {error}") from None


def _check_curve(where: str, at: list[int], us: list[float]) -> None:
    """Raise `ConfigError` unless a curve has points in ascending order with times above 0."""
    if not at or len(at) != len(us):
        raise ConfigError(f"{where}: {len(at)} sizes and {len(us)} times; give one time for each")
    if any(a >= b for a, b in itertools.pairwise(at)) or at[0] < 0:
        raise ConfigError(f"{where}: the sizes {shown(at)} must ascend")
    if not all(0 < time < float("inf") for time in us):
        raise ConfigError(f"{where}: the times {shown(us)} must be above 0")


@functools.cache
def _built_in() -> dict[str, dict[str, Any]]:
    """Name → JSON object of each built-in profile."""
    text = resources.files("moespan.planner").joinpath("hardware.json").read_bytes()
    found: dict[str, dict[str, Any]] = msgspec.json.decode(text)
    return found
