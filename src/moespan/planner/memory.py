"""The memory of every rank under a layout, counted before anything is loaded.

One model serves `info`, the doctor, the planner, and the engine itself, which sizes its KV cache
with it. The placement table and the model's geometry give all sizes; nothing is read but the
model's config, and no torch is imported.

Ranks whose parameters have the same shapes form a class, and each class is counted once: a stage,
and how many experts of each layer an ep rank holds. Places in tp, sp and dp change no shape.

| part          | what                                                                           |
|---------------|--------------------------------------------------------------------------------|
| base          | Python, torch and its libraries; on a device the runtime's context             |
| weights       | parameters as the operations hold them, and the rotary table                   |
| cache         | blocks of the KV cache, and those that padded decode steps write to            |
| activations   | most that a step takes beside these (`activations.py`)                         |
| graphs        | recorded decode steps                                                          |
| communicators | buffers of process groups                                                      |
| slack         | memory that the allocator holds and nothing uses                               |
| loading       | most beyond the base while weights are loaded; it is gone when steps run       |
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec

from moespan.checkpoint.experts import ExpertPlacement
from moespan.checkpoint.placement import (
    Parameter,
    Placement,
    cache_bytes_per_token,
    count_parameters,
    place,
)
from moespan.config import (
    DTYPE_BYTES,
    QUANTIZATIONS,
    Coordinates,
    EngineConfig,
    Layout,
    ModelConfig,
)
from moespan.device import DEVICES
from moespan.errors import ConfigError
from moespan.parallel.buffers import hccl_bytes, largest_messages
from moespan.planner.activations import Activations, Step, activations
from moespan.planner.temporaries import operations_of
from moespan.planner.work import parts_of

if TYPE_CHECKING:
    from moespan.planner.profile import DeviceFigures

_CACHE_DTYPES = (*DTYPE_BYTES, "int8")

# Rows of a report on a prompt whose probabilities are computed at once (`moespan.engine.results`).
REPORTED_ROWS = 256


class RankMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of memory that one rank takes, by part, as they are counted or measured.

    Attributes:
        base_bytes, weight_bytes, activation_bytes, graph_bytes, communicator_bytes: see the table
            of this module. Memory that operations keep between steps counts as activations.
        cache_bytes: reserved for the KV cache.
        touched_bytes: the part of it that is in use. On the host, pages take memory once they are
            written; a device has all of them at once.
        slack_bytes: held by the allocator and unused.
        loading_bytes: most beyond the base while weights were loaded.
    """

    base_bytes: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0
    touched_bytes: int = 0
    activation_bytes: int = 0
    graph_bytes: int = 0
    communicator_bytes: int = 0
    slack_bytes: int = 0
    loading_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Most bytes that the rank has in memory while it runs steps."""
        return (
            self.base_bytes
            + self.weight_bytes
            + self.touched_bytes
            + self.activation_bytes
            + self.graph_bytes
            + self.communicator_bytes
            + self.slack_bytes
        )

    @property
    def peak_bytes(self) -> int:
        """Most bytes at any time, loading included."""
        return max(self.total_bytes, self.base_bytes + self.loading_bytes)


@dataclass(frozen=True)
class MachineMemory:
    """What a machine adds to the memory that can be counted.

    Attributes:
        base_bytes: memory of a rank before it loads anything.
        slack: share of a step's tensors that the allocator holds beside them.
        recorded_bytes: memory of each recorded decode step beside its tensors.
        communicator_bytes: ranks of a process group → bytes of its communicator.
    """

    base_bytes: int = 0
    slack: float = 0.0
    recorded_bytes: int = 0
    communicator_bytes: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: str, figures: DeviceFigures | None = None) -> MachineMemory:
        """Of a profile's device; what the profile leaves out, or all of it, is as `device.py` has
        it for devices of this kind."""
        device = DEVICES[kind]
        found = cls(device.base_bytes, device.slack, device.recorded_bytes)
        if figures is None:
            return found
        base, slack = figures.base_bytes, figures.allocator_slack
        graphs = [size for _, size in figures.graph_bytes]
        return cls(
            int(base.value) if base is not None else found.base_bytes,
            slack.value if slack is not None else found.slack,
            int(max(graphs)) if graphs else found.recorded_bytes,
            {ranks: int(one.value) for ranks, one in figures.communicator_bytes.items()},
        )

    def group_bytes(self, ranks: int, default_bytes: int) -> int:
        """Bytes of the communicator of a group: of the nearest number of ranks that is known."""
        known = self.communicator_bytes
        if not known:
            return default_bytes
        return known[min(known, key=lambda size: abs(size - ranks))]


@dataclass(frozen=True)
class RankClass:
    """Ranks whose parameters have the same shapes.

    Attributes:
        rank: the one of them that takes most memory: first in sp, and the speaker of its replica if
            the stage is the last one.
        num_ranks: how many there are.
        parameters: name → what each of them holds.
    """

    rank: int
    num_ranks: int
    parameters: Mapping[str, Parameter]


def rank_classes(config: EngineConfig, model: ModelConfig) -> list[RankClass]:
    """The classes of all ranks, in the order of stages.

    `place` runs once for each class, and not for each rank.

    Raises:
        ConfigError, LayoutError: as `footprint`.
    """
    layout = config.layout
    experts = ExpertPlacement.make(config.expert_placement, model, layout)
    # The ranks of a stage, from its first one on, up to a whole set of experts.
    one_set = range(max(layout.ep, layout.tp))
    found: list[RankClass] = []
    for pp, stage in enumerate(layout.stages(model)):
        first = layout.rank(Coordinates(pp, 0, 0, 0))
        held = _held_experts(experts, model, stage, layout.ep)
        alike = Counter(held[layout.ep_rank(first + at)] for at in one_set)
        for counts, number in alike.items():
            ranks = [first + at for at in one_set if held[layout.ep_rank(first + at)] == counts]
            rank = min(ranks, key=lambda rank: _order(layout.coordinates(rank)))
            share = layout.stage_size // len(one_set)
            if isinstance(config.expert_placement, str) and model.quantization is None:
                place_in_set = rank % len(one_set)
                parameters = _stage_parameters(
                    model, layout, stage, place_in_set, config.quantization
                )
            else:
                parameters = place(model, layout, rank, experts, config.quantization).parameters
            found.append(RankClass(rank, number * share, parameters))
    return found


def _stage_parameters(
    model: ModelConfig, layout: Layout, stage: range, number: int, quantization: str | None
) -> dict[str, Parameter]:
    """Parameters of rank `number` of those that hold one set of experts, where layers of one kind
    are alike. They are as `place` has them, which costs more."""
    parts = parts_of(model, layout.tp, layout.ep, number, quantization)
    is_last = stage.stop == model.num_hidden_layers
    found: dict[str, Parameter] = {}
    if stage.start == 0 or (is_last and model.tie_word_embeddings):
        found |= parts["embed"]
    for layer in stage:
        for part in ("attention", "moe" if model.is_moe(layer) else "dense"):
            for name, parameter in parts[part].items():
                found[f"layers.{layer}.{name.split('.', 2)[2]}"] = parameter
    if is_last:
        found |= parts["norm"] | parts["head"]
    return found


def _order(at: Coordinates) -> tuple[int, int]:
    """Ranks that take more memory come first."""
    return at.sp, at.tp


def _held_experts(
    experts: ExpertPlacement, model: ModelConfig, stage: range, ep: int
) -> list[tuple[int, ...]]:
    """For each ep rank, how many experts it holds in each MoE layer of `stage`."""
    tables = [experts.of(layer) for layer in stage if model.is_moe(layer)]
    return [tuple(len(table[ep_rank]) for table in tables) for ep_rank in range(ep)]


@dataclass(frozen=True)
class ClassMemory:
    """The memory of one class of ranks, but for the number of its cache blocks.

    Attributes:
        one: the class.
        without_cache: all parts but the cache.
        block_bytes: one block of the KV cache, all layers of the stage.
        scratch_blocks: blocks of the cache that only padded decode steps write to.
        activations: the step that takes most.
        report_bytes: most that a step takes that reports on a whole prompt.
    """

    one: RankClass
    without_cache: RankMemory
    block_bytes: int
    scratch_blocks: int
    activations: Activations
    report_bytes: int

    def with_blocks(self, num_blocks: int, touched: float = 1.0) -> RankMemory:
        """All parts, with a cache of `num_blocks` blocks, of which a share is `touched`."""
        cache = (num_blocks + self.scratch_blocks) * self.block_bytes
        return msgspec.structs.replace(
            self.without_cache, cache_bytes=cache, touched_bytes=int(cache * touched)
        )

    def reserve_bytes(self, share: float, memory_bytes: int) -> int:
        """What is left free of `memory_bytes`: a share, but no less than a report on a prompt takes
        beyond any other step."""
        more = self.report_bytes - self.activations.total_bytes
        return max(int(share * memory_bytes), more)

    def fitting_blocks(self, room_bytes: int, taken: RankMemory | None = None) -> int:
        """Blocks that fit into `room_bytes`, which the rank finds free beside what it has `taken`;
        None for nothing."""
        taken = taken or RankMemory()
        wanted = self.without_cache.total_bytes - taken.total_bytes
        return int((room_bytes - wanted) // self.block_bytes) - self.scratch_blocks


def class_memory(
    config: EngineConfig,
    model: ModelConfig,
    one: RankClass,
    machine: MachineMemory | None = None,
    step: Step | None = None,
) -> ClassMemory:
    """The memory of the ranks of a class.

    Args:
        machine: None is as `device.py` has it.
        step: the step that decides; None is the one of the engine's limits that takes most.
    """
    machine = machine or MachineMemory.of(config.device)
    layout = config.layout
    operations = operations_of(config, model.head_dim)
    parameters = one.parameters.items()
    weights = sum(operations.held_bytes(name, parameter) for name, parameter in parameters)
    weights += config.max_model_len * operations.rotary_bytes
    most = activations(config, model, one.rank, one.parameters, step)
    sizes = config.graph_sizes
    graphs = 0
    if sizes:
        # All recorded steps share one pool of memory, as large as the largest of them needs.
        largest = Step(sizes[-1], sizes[-1], "greedy")
        pool = activations(config, model, one.rank, one.parameters, largest).peak_bytes
        graphs = pool + len(sizes) * machine.recorded_bytes
    token = cache_bytes_per_token(model, layout, one.rank, config.cache_dtype)
    parts = RankMemory(
        base_bytes=machine.base_bytes,
        weight_bytes=weights,
        activation_bytes=most.total_bytes,
        graph_bytes=graphs,
        communicator_bytes=_communicator_bytes(config, model, machine),
        slack_bytes=int(machine.slack * most.peak_bytes),
    )
    return ClassMemory(
        one,
        parts,
        token * config.block_size,
        -(-sizes[-1] // config.block_size) if sizes else 0,
        most,
        most.scratch_bytes + _report_bytes(config, model, one.rank),
    )


def memory_of_all(
    config: EngineConfig,
    model: ModelConfig,
    machine: MachineMemory | None = None,
    step: Step | None = None,
) -> list[ClassMemory]:
    """The memory of every class of ranks.

    Raises:
        ConfigError, LayoutError: as `footprint`.
    """
    return [class_memory(config, model, one, machine, step) for one in rank_classes(config, model)]


def memory_of_rank(
    config: EngineConfig,
    model: ModelConfig,
    rank: int,
    machine: MachineMemory | None = None,
    step: Step | None = None,
) -> ClassMemory:
    """The memory of exactly this rank, which may be less than that of the fullest of its class."""
    placement = _placement(config, model, rank)
    return class_memory(config, model, RankClass(rank, 1, placement.parameters), machine, step)


def loading_bytes(config: EngineConfig, model: ModelConfig, rank: int, num_readers: int = 1) -> int:
    """Most bytes beyond the base while `rank` loads its weights.

    Parameters fill up as their pieces come. Beside them there are the pieces that are being read,
    and parts of rows that wait for their scales (`moespan.checkpoint.loader`).
    """
    placement = _placement(config, model, rank)
    operations = operations_of(config, model.head_dim)
    held = {
        name: operations.held_bytes(name, parameter)
        for name, parameter in placement.parameters.items()
    }
    element = DTYPE_BYTES[config.dtype]
    elements: Counter[str] = Counter()
    for piece in placement.pieces:
        elements[piece.parameter] += piece.num_elements
    now = waiting = most = 0.0
    reading: list[float] = []
    is_host = DEVICES[config.device].is_host
    for piece in placement.pieces:
        size = piece.num_elements * element
        if is_host:  # elsewhere pieces are read into memory of the host
            reading = [*reading, float(size)][-num_readers:]
        if piece.tensor in placement.cut_rows:
            waiting += size
        now += held[piece.parameter] * piece.num_elements / elements[piece.parameter]
        most = max(most, now + waiting + sum(reading))
    return int(most)


def _placement(config: EngineConfig, model: ModelConfig, rank: int) -> Placement:
    experts = ExpertPlacement.make(config.expert_placement, model, config.layout)
    if config.load_format == "dummy" and model.quantization:
        quantization = config.quantization or model.quantization.scheme
        model = replace(model, quantization=None)
        return place(model, config.layout, rank, experts, quantization)
    return place(model, config.layout, rank, experts, config.quantization)


def _communicator_bytes(config: EngineConfig, model: ModelConfig, machine: MachineMemory) -> int:
    """Bytes of all process groups of the busiest rank."""
    device = DEVICES[config.device]
    if device.has_group_buffers:
        return hccl_bytes(config, model)
    layout = config.layout
    ranks = {"pp": 2, "ep": layout.ep, "ep_tp_groups": layout.ep_tp_groups}
    return sum(
        machine.group_bytes(ranks.get(axis) or getattr(layout, axis), device.group_bytes)
        * (min(layout.pp - 1, 2) if axis == "pp" else 1)
        for axis in largest_messages(config, model)
    )


def _report_bytes(config: EngineConfig, model: ModelConfig, rank: int) -> int:
    """Logits of all tokens of a step, the hidden states beside them, and the probabilities that are
    computed at once."""
    layout = config.layout
    if layout.coordinates(rank).pp < layout.pp - 1:
        return 0
    tokens = config.max_num_batched_tokens
    logits = tokens * model.vocab_size * DTYPE_BYTES[config.dtype]
    hidden = 6 * tokens * model.hidden_size * DTYPE_BYTES[config.dtype]
    copies = 3 if layout.tp > 1 else 1
    return hidden + copies * logits + 3 * min(tokens, REPORTED_ROWS) * model.vocab_size * 4


@dataclass(frozen=True)
class Footprint:
    """Sizes of a model, alone and cut by a layout.

    Attributes:
        parameters: parameters of the model.
        active_parameters: parameters that one token uses.
        bytes: dtype or quantization → bytes of all weights on one rank. Quantizations that the
            model cannot run with are left out: a quantised checkpoint runs with some only, and rows
            must be whole groups.
        kv_bytes_per_token: dtype of the KV cache → bytes of one token, all layers and heads.
        dtype: dtype of weights and activations in the engine.
        quantization: the scheme that the weights run in; None if they are floats.
        kv_cache_dtype: dtype of the KV cache.
        layout: axis → its degree.
        pipeline_layers: number of layers of each stage.
        weight_bytes_per_rank: each rank's bytes of weights, padding and scales included.
        kv_bytes_per_token_per_rank: each rank's bytes of KV cache for a token of its replica.
    """

    parameters: int
    active_parameters: int
    bytes: dict[str, int]
    kv_bytes_per_token: dict[str, int]
    dtype: str
    quantization: str | None
    kv_cache_dtype: str
    layout: dict[str, int]
    pipeline_layers: list[int]
    weight_bytes_per_rank: list[int]
    kv_bytes_per_token_per_rank: list[int]


def footprint(config: EngineConfig, model: ModelConfig) -> Footprint:
    """The sizes of `model` with the layout, dtypes, quantization and placement of `config`.

    Raises:
        ConfigError: the quantization or the expert placement does not fit the model.
        LayoutError: tp would cut through a group of the quantization.
    """
    layout, stored = config.layout, model.quantization
    total, active = count_parameters(model)
    weights, cache = _bytes_per_rank(config, model)
    return Footprint(
        parameters=total,
        active_parameters=active,
        bytes={
            **{dtype: total * size for dtype, size in DTYPE_BYTES.items()},
            **_quantized_bytes(model, config.dtype),
        },
        kv_bytes_per_token={dtype: model.kv_bytes_per_token(dtype) for dtype in _CACHE_DTYPES},
        dtype=config.dtype,
        quantization=stored.running_as(config.quantization) if stored else config.quantization,
        kv_cache_dtype=config.cache_dtype,
        layout=layout.sizes,
        pipeline_layers=[len(stage) for stage in layout.stages(model)],
        weight_bytes_per_rank=weights,
        kv_bytes_per_token_per_rank=cache,
    )


@dataclass(frozen=True)
class Fit:
    """Memory of the rank with the fewest tokens of cache left.

    Attributes:
        memory: its parts, without a cache.
        cache_bytes_per_token: bytes of KV cache for a token of its replica.
        room_bytes: bytes that the rank finds free; None if that is not known.
        reserve_bytes: bytes of them that stay free.
        cache_tokens: tokens of KV cache that remain; meaningless without `room_bytes`.
        sequence_tokens: tokens of the longest sequence.
    """

    memory: RankMemory
    cache_bytes_per_token: int
    room_bytes: int | None
    reserve_bytes: int
    cache_tokens: int
    sequence_tokens: int

    @property
    def has_communicators(self) -> bool:
        """Whether process groups take memory."""
        return self.memory.communicator_bytes > 0


def fit(
    config: EngineConfig,
    model: ModelConfig,
    room_bytes: int | None,
    machine: MachineMemory | None = None,
) -> Fit:
    """Memory of the rank with the fewest tokens of cache left, if each rank finds `room_bytes`
    free before it starts.

    Raises:
        ConfigError, LayoutError: as `footprint`.
    """
    fits = []
    for one in memory_of_all(config, model, machine):
        room = room_bytes or 0
        reserve = one.reserve_bytes(config.memory_reserve, room)
        blocks = one.fitting_blocks(room - reserve)
        token = one.block_bytes // config.block_size
        tokens = blocks * config.block_size
        longest = config.max_model_len
        fits.append(Fit(one.without_cache, token, room_bytes, reserve, tokens, longest))
    return min(fits, key=lambda one: one.cache_tokens)


def _bytes_per_rank(config: EngineConfig, model: ModelConfig) -> tuple[list[int], list[int]]:
    """Bytes of weights, and of KV cache for one token, on each rank."""
    layout = config.layout
    experts = ExpertPlacement.make(config.expert_placement, model, layout)
    stages = layout.stages(model)
    held = [_held_experts(experts, model, stage, layout.ep) for stage in stages]
    of_class: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
    weights, cache = [], []
    for rank in range(layout.world_size):
        pp = rank // layout.stage_size
        key = pp, held[pp][layout.ep_rank(rank)]
        if key not in of_class:
            placement = place(model, layout, rank, experts, config.quantization)
            token_bytes = cache_bytes_per_token(model, layout, rank, config.cache_dtype)
            of_class[key] = placement.num_bytes(config.dtype), token_bytes
        weights.append(of_class[key][0])
        cache.append(of_class[key][1])
    return weights, cache


def _quantized_bytes(model: ModelConfig, dtype: str) -> dict[str, int]:
    """Quantization that the model can run with → bytes of all weights."""
    stored = model.quantization
    found = {}
    for name in stored.same_weights if stored else QUANTIZATIONS:
        with contextlib.suppress(ConfigError):  # rows need not be whole groups
            found[name] = place(model, Layout(), 0, quantization=name).num_bytes(dtype)
    return found
