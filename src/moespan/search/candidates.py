"""What a search chooses from: engines × layouts × settings, and which of them fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moespan.config import EngineConfig, Layout, ModelConfig, all_layouts
from moespan.errors import ConfigError, LayoutError, shown
from moespan.planner.memory import ClassMemory, MachineMemory, RankMemory, memory_of_all
from moespan.planner.profile import Profile


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        base: the engine's options that all candidates share; its layout does not count.
        devices: all devices of the job.
        quantizations, kv_cache_dtypes, max_num_seqs, max_num_batched_tokens: values to try.
        only: axes with the degree that they must have.
    """

    base: EngineConfig
    devices: int
    quantizations: tuple[str | None, ...] = (None,)
    kv_cache_dtypes: tuple[str, ...] = ("auto",)
    max_num_seqs: tuple[int, ...] = (64, 128, 256)
    max_num_batched_tokens: tuple[int, ...] = (1024, 2048, 4096)
    only: tuple[tuple[str, int], ...] = ()

    def holds(self, one: Candidate) -> bool:
        """Whether a candidate's settings are among those of this space."""
        config = one.config
        return (
            config.quantization in self.quantizations
            and config.kv_cache_dtype in self.kv_cache_dtypes
            and config.max_num_seqs in self.max_num_seqs
            and config.max_num_batched_tokens in self.max_num_batched_tokens
        )

    @property
    def num_settings(self) -> int:
        """Settings of each layout."""
        return len(list(self.settings(Layout())))

    def settings(self, layout: Layout) -> Iterator[EngineConfig]:
        """All settings of a layout that hold together."""
        for quantization in self.quantizations:
            for kv_cache_dtype in self.kv_cache_dtypes:
                for seqs in self.max_num_seqs:
                    for tokens in self.max_num_batched_tokens:
                        if seqs <= tokens:
                            yield replace(
                                self.base,
                                layout=layout,
                                quantization=quantization,
                                kv_cache_dtype=kv_cache_dtype,
                                max_num_seqs=seqs,
                                max_num_batched_tokens=tokens,
                            )


@dataclass(frozen=True)
class Candidate:
    """Equal engines that share a load, and what each of their ranks holds.

    Attributes:
        engines: how many.
        config: the configuration of each.
        num_blocks: blocks of KV cache that fit, and no more than all sequences can use.
        memory: of the rank that can hold the fewest blocks, with these blocks.
    """

    engines: int
    config: EngineConfig
    num_blocks: int
    memory: RankMemory

    @property
    def layout(self) -> Layout:
        """The layout of each engine."""
        return self.config.layout

    def __str__(self) -> str:
        return f"{self.engines} × {str(self.layout).replace('×', ' ')}"


def parse_axes(text: str) -> tuple[tuple[str, int], ...]:
    """Axes and degrees in a text like `tp=2 ep=8 dp=4`, with spaces, commas or `×` in between.

    Raises:
        ConfigError: `text` is not like that.
    """
    found = {}
    for part in text.replace("×", " ").replace(",", " ").split():
        axis, _, degree = part.partition("=")
        if axis not in Layout.AXES or not degree.isdecimal() or int(degree) < 1:
            raise ConfigError(
                f"{shown(text)} is not a list of axes such as 'tp=2 ep=8 dp=4'; axes are "
                f"{', '.join(Layout.AXES)}"
            )
        found[axis] = int(degree)
    if not found:
        raise ConfigError("the list of axes is empty; write it like 'tp=2 ep=8 dp=4'")
    return tuple(found.items())


def engine_sizes(devices: int, per_node: int) -> list[int]:
    """Devices that one engine may have, if equal engines share all of them: engines divide a node,
    or have whole nodes."""
    return [
        size
        for size in range(1, devices + 1)
        if devices % size == 0 and (per_node % size == 0 or size % per_node == 0)
    ]


def layouts(space: Space, model: ModelConfig, profile: Profile) -> list[tuple[int, Layout]]:
    """Number of engines and layout of each, for all that the rules allow.

    tp·sp stays inside a node unless `only` asks for more: its collectives come twice in a layer.
    """
    per_node = profile.devices_per_node
    asked = dict(space.only)
    found = []
    for size in engine_sizes(space.devices, per_node):
        for layout in all_layouts(size, model):
            if any(getattr(layout, axis) != degree for axis, degree in asked.items()):
                continue
            is_asked = "tp" in asked or "sp" in asked
            if layout.tp * layout.sp > per_node and not is_asked:
                continue
            found.append((space.devices // size, layout))
    return found


def no_layout(space: Space, model: ModelConfig, profile: Profile) -> LayoutError:
    """Why `only` leaves no layout of a space, with the degrees that an axis could have."""
    sizes = engine_sizes(space.devices, profile.devices_per_node)
    possible = [one for size in sizes for one in all_layouts(size, model)]
    for axis, degree in space.only:
        usable = sorted({getattr(one, axis) for one in possible})
        if degree not in usable:
            return LayoutError(
                f"--only {axis}={degree}: no layout of {space.devices} devices has it; use "
                f"{axis}={', '.join(map(str, usable))}"
            )
    asked = " ".join(f"{axis}={degree}" for axis, degree in space.only)
    return LayoutError(
        f"--only {shown(asked)}: no layout of {space.devices} devices has all of these; leave one "
        "out"
    )


Memories = dict[EngineConfig, list[ClassMemory]]
"""What was counted before: configuration → memory of its classes of ranks."""


def candidate_of(
    engines: int,
    config: EngineConfig,
    model: ModelConfig,
    profile: Profile,
    memories: Memories | None = None,
) -> Candidate | None:
    """The candidate of a configuration; None if it cannot run, or does not fit into memory.

    Args:
        memories: shared by the candidates of one model and profile.
    """
    memories = {} if memories is None else memories
    small = replace(config, layout=config.layout.with_fewest_replicas)
    try:
        config.check(model)
        if small not in memories:
            machine = MachineMemory.of(config.device, profile.device)
            memories[small] = memory_of_all(small, model, machine)
    except (ConfigError, LayoutError):
        return None
    classes = memories[small]
    room = memory_room(profile, config.layout.world_size, engines)
    blocks, tightest = min(
        (
            (one.fitting_blocks(room - one.reserve_bytes(config.memory_reserve, room)), one)
            for one in classes
        ),
        key=lambda found: found[0],
    )
    wanted = config.max_num_seqs * config.layout.pp * config.blocks_per_sequence
    blocks = min(blocks, wanted)
    if blocks < config.blocks_per_sequence:
        return None
    return Candidate(engines, config, blocks, tightest.with_blocks(blocks))


def memory_room(profile: Profile, world_size: int, engines: int) -> int:
    """Bytes that each rank finds free: a device's, or its share of the host's."""
    memory = int(profile.device.memory_bytes.value)
    if any(level.topology == "host" for level in profile.levels):
        return memory // min(world_size * engines, profile.devices_per_node)
    return memory
