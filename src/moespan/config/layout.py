"""The layout: the size of each axis, the place of each rank, and the rules of a model."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from moespan.config.model import ModelConfig
from moespan.errors import LayoutError

# Most sizes of an axis that one error suggests.
_MOST_ADVICE = 6


@dataclass(frozen=True)
class Coordinates:
    """Position of one rank along each axis of a layout."""

    pp: int
    dp: int
    sp: int
    tp: int


@dataclass(frozen=True)
class Layout:
    """Degree of parallelism on each axis. Ranks are laid out as (pp, dp, sp, tp), tp fastest.

    Attributes:
        tp: tensor parallelism: heads, MLP widths and the vocabulary are split; tokens are
            replicated.
        ep: expert parallelism: whole routed experts are spread over the ranks of a stage. Either ep
            divides tp, and each expert is cut over tp/ep ranks. Or ep is tp·k, where k divides
            sp·dp.
        pp: pipeline parallelism: layers are split into stages.
        sp: sequence parallelism (Ulysses): the tokens of a step are split, and in attention the
            heads.
        dp: data parallelism: sequences are split over replicas.
        pipeline_layers: number of layers in each stage; None cuts the layers by cost (`stages`).
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1
    sp: int = 1
    dp: int = 1
    pipeline_layers: tuple[int, ...] | None = None

    AXES: ClassVar[tuple[str, ...]] = ("tp", "ep", "pp", "sp", "dp")

    def __post_init__(self) -> None:
        for axis, size in self.sizes.items():
            if size < 1:
                raise LayoutError(f"{axis}={size} must be at least 1")

    def __str__(self) -> str:
        parts = [f"{axis}={size}" for axis, size in self.sizes.items() if size > 1]
        return "×".join(parts) or "tp=1"

    def with_largest_ep(self, config: ModelConfig) -> Layout:
        """This layout with the largest ep that its other axes and the model allow."""
        return replace(self, ep=max(self._usable("ep", config), default=self.ep))

    @property
    def with_fewest_replicas(self) -> Layout:
        """This layout with only as many replicas as one set of experts needs. Its ranks hold the
        same, send the same, and take as long."""
        return replace(self, dp=self.ep_tp_groups // math.gcd(self.ep_tp_groups, self.sp))

    @property
    def sizes(self) -> dict[str, int]:
        """Axis → degree."""
        return {axis: getattr(self, axis) for axis in self.AXES}

    @property
    def world_size(self) -> int:
        """Number of ranks; ep adds no ranks."""
        return self.pp * self.stage_size

    @property
    def stage_size(self) -> int:
        """Number of ranks in one pipeline stage."""
        return self.dp * self.sp * self.tp

    @property
    def expert_slices(self) -> int:
        """Number of parts into which the width of each expert is cut."""
        return self.tp // self.ep if self.ep < self.tp else 1

    @property
    def ep_tp_groups(self) -> int:
        """Number of tp groups, each with its own tokens, that share one set of experts."""
        return max(self.ep // self.tp, 1)

    def coordinates(self, rank: int) -> Coordinates:
        """Position of `rank` (taken modulo the world size) along each axis."""
        rank, tp = divmod(rank, self.tp)
        rank, sp = divmod(rank, self.sp)
        rank, dp = divmod(rank, self.dp)
        return Coordinates(rank % self.pp, dp, sp, tp)

    def rank(self, at: Coordinates) -> int:
        """The rank at a position; the inverse of `coordinates`."""
        return ((at.pp * self.dp + at.dp) * self.sp + at.sp) * self.tp + at.tp

    def ep_rank(self, rank: int) -> int:
        """Number of the expert set that `rank` holds, from 0 to ep - 1."""
        at = self.coordinates(rank)
        if self.ep < self.tp:
            return at.tp // self.expert_slices
        return (at.dp * self.sp + at.sp) % self.ep_tp_groups * self.tp + at.tp

    def stages(self, config: ModelConfig) -> list[range]:
        """The layers of each stage."""
        lengths = self.pipeline_layers or balanced_stages(config, self.pp)
        ends = list(itertools.accumulate(lengths))
        return [range(end - length, end) for end, length in zip(ends, lengths, strict=True)]

    def check(self, config: ModelConfig) -> None:
        """Raise `LayoutError` if the model cannot be cut this way, naming the layouts that work.

        Widths and vocabularies need no rule: they are padded with zeros, which is exact.
        """
        for problem, axes in self._broken_rules(config):
            advice = [
                f"{axis}={', '.join(map(str, usable))}"
                for axis in axes
                if (usable := sorted(self._usable(axis, config)[:_MOST_ADVICE]))
            ]
            raise LayoutError(problem + (f"; use {' or '.join(advice)}" if advice else ""))

    def _broken_rules(self, config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each broken rule, and the axes that can each be changed to fix it."""
        for name, cut in (("tp", self.tp), ("tp·sp", self.tp * self.sp)):
            axes = ("tp",) if name == "tp" else ("tp", "sp")
            heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
            if heads % cut:
                yield f"{name}={cut} does not divide num_attention_heads={heads}", axes
            elif kv_heads % cut and cut % kv_heads:
                yield (
                    f"{name}={cut} and num_key_value_heads={kv_heads}: neither divides the other",
                    axes,
                )
        experts = config.n_routed_experts or 0
        if self.ep > 1 and not experts:
            yield f"ep={self.ep}, but the model has no routed experts", ("ep",)
        elif self.ep > 1 and self.ep > experts:
            yield f"ep={self.ep} exceeds n_routed_experts={experts}", ("ep",)
        elif self.tp % self.ep and (self.ep % self.tp or self.sp * self.dp % self.ep_tp_groups):
            yield (
                f"ep={self.ep} neither divides tp={self.tp} nor is tp times a divisor of "
                f"sp·dp={self.sp * self.dp}",
                ("ep",),
            )
        layers = config.num_hidden_layers
        if self.pp > layers:
            yield (
                f"pp={self.pp} exceeds num_hidden_layers={layers}: a stage would be empty",
                ("pp",),
            )
        if self.pipeline_layers is not None:
            given = ",".join(map(str, self.pipeline_layers))
            if len(self.pipeline_layers) != self.pp:
                stages = len(self.pipeline_layers)
                yield f"pipeline_layers={given} is for pp={stages}, not pp={self.pp}", ()
            elif min(self.pipeline_layers) < 1 or sum(self.pipeline_layers) != layers:
                yield (
                    f"pipeline_layers={given} must be positive and sum to "
                    f"num_hidden_layers={layers}",
                    (),
                )

    def _usable(self, axis: str, config: ModelConfig) -> list[int]:
        """Sizes of `axis` that fit while the other axes stay the same, nearest first."""
        most = max(config.num_attention_heads, config.num_hidden_layers, self.stage_size)
        sizes = [
            size
            for size in range(1, most + 1)
            if not any(self._with(axis, size)._broken_rules(config))
        ]
        return sorted(sizes, key=lambda size: abs(size - getattr(self, axis)))

    def _with(self, axis: str, size: int) -> Layout:
        change: dict[str, Any] = {axis: size}
        return replace(self, **change)

    @property
    def dispatches(self) -> tuple[str, ...]:
        """Dispatches that this layout allows, the default first (`moespan.parallel.dispatch`)."""
        return ("replicated",) if self.ep_tp_groups == 1 else ("all_gather", "all_to_all")

    def check_dispatch(self, dispatch: str) -> None:
        """Raise `LayoutError` if `dispatch` does not apply to this layout; `auto` always does."""
        if dispatch not in ("auto", *self.dispatches, *self._dispatches_of_npus):
            raise LayoutError(
                f"moe_dispatch={dispatch} does not apply to layout {self}; use auto or "
                f"{' or '.join(self.dispatches)}"
            )

    @property
    def _dispatches_of_npus(self) -> tuple[str, ...]:
        return ("fused",) if self.ep_tp_groups > 1 else ()


def all_layouts(world_size: int, config: ModelConfig) -> list[Layout]:
    """Every layout of `world_size` ranks that the model can be cut into."""
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    return [
        layout
        for tp, pp, sp, dp in itertools.product(divisors, repeat=4)
        if tp * pp * sp * dp == world_size
        for ep in divisors
        if not any((layout := Layout(tp, ep, pp, sp, dp))._broken_rules(config))
    ]


# Stages are balanced for a decode step of this many sequences. Such a step reads nearly all
# experts, as every larger step does, and still reads each weight for few tokens.
_BALANCED_TOKENS = 32


def balanced_stages(config: ModelConfig, pp: int) -> list[int]:
    """Number of layers in each of `pp` stages, such that the costliest stage costs the least.

    The cost of a layer is the number of weights that a decode step of 32 sequences reads. If each
    token chooses K of E experts, the step reads E·(1 − (1 − K/E)^32) experts on average. The head
    counts as part of the last layer. Among equally good cuts the most even one is taken.
    """
    return list(_balanced_stages(config, pp))


@functools.lru_cache(maxsize=1024)
def _balanced_stages(config: ModelConfig, pp: int) -> tuple[int, ...]:
    costs = [layer_cost(config, layer) for layer in range(config.num_hidden_layers)]
    costs[-1] += config.vocab_size * config.hidden_size
    sums = [0.0, *itertools.accumulate(costs)]
    # (cost of the costliest stage, sum of squares, lengths) of the best cut of the first layers.
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for _ in range(pp):
        longer = [
            (end, max(worst, cost), squares + cost**2, [*lengths, end - start])
            for start, (worst, squares, lengths) in best.items()
            for end in range(start + 1, len(sums))
            for cost in [sums[end] - sums[start]]
        ]
        best = {
            end: min(cut[1:] for cut in cuts)
            for end, cuts in itertools.groupby(sorted(longer), key=lambda cut: cut[0])
        }
    return tuple(best[len(costs)][2])


def layer_cost(config: ModelConfig, layer: int) -> float:
    """Number of weights of a layer that a decode step of 32 sequences reads."""
    head_width = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    cost = float(config.hidden_size * head_width)
    if not config.is_moe(layer):
        return cost + 3 * config.hidden_size * config.intermediate_size
    experts_read = (config.n_routed_experts or 0) * share_of_experts_read(config, _BALANCED_TOKENS)
    read = experts_read * config.moe_intermediate_size
    return cost + 3 * config.hidden_size * (read + config.shared_intermediate_size)


def share_of_experts_read(config: ModelConfig, num_tokens: int) -> float:
    """Expected share of a layer's experts that `num_tokens` tokens read, if each token chooses K of
    E experts at random: 1 − (1 − K/E)^T, so that E·(1 − (1 − K/E)^T) experts are read.

    The model must have routed experts.
    """
    return 1 - (1 - config.num_experts_per_tok / (config.n_routed_experts or 0)) ** num_tokens
