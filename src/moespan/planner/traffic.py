"""The traffic of a step by formula: the calls and bytes that a rank's counters will show.

Nothing is run, and no torch is imported, so that a layout can be judged before there are ranks.
Tests hold the counters of real ranks to the formulas exactly. docs/parallelism.md has the formulas
in words.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moespan.checkpoint.experts import ExpertPlacement
from moespan.checkpoint.placement import cache_heads
from moespan.config import DTYPE_BYTES, Layout, ModelConfig
from moespan.parallel.counters import Traffic, sent_bytes
from moespan.parallel.fused import sent_tokens
from moespan.parallel.tokens import (
    dispatch_of_step,
    probability_met,
    split_evenly,
    tp_group_tokens,
    tp_groups_of,
)

Held = tuple[tuple[int, ...], ...]
"""For each ep rank, the experts of one layer that it holds."""

Choices = npt.NDArray[np.int64]
"""The experts that tokens chose, [T, K]."""

_COUNT_BYTES = 8  # rows that go to a rank, int64
_CHOICE_BYTES = 4 + 4  # a weight, float32, and the number of a physical expert, int32
_TOKEN_BYTES = 4


@dataclass(frozen=True)
class StepSize:
    """The sizes of one step that its traffic depends on.

    Attributes:
        num_tokens: tokens of each replica, T.
        num_rows: logit rows of each replica.
        choices: layer → the choices of each replica's router. None is uniform routing: `all_to_all`
            then counts its expected bytes, rounded to whole bytes in every call.
        num_sampled: tokens that each replica's previous step sampled, where its plan names some of
            them by their place; empty if no plan does.
    """

    num_tokens: Sequence[int]
    num_rows: Sequence[int]
    choices: Mapping[int, Sequence[Choices]] | None = None
    num_sampled: Sequence[int] = ()


def step_traffic(
    config: ModelConfig,
    layout: Layout,
    rank: int,
    dtype: str,
    step: StepSize,
    moe_dispatch: str = "auto",
    experts: ExpertPlacement | None = None,
) -> Traffic:
    """The traffic of `rank` over the model's axes in one step.

    Args:
        dtype: the dtype of activations.
        moe_dispatch: `auto` or one of the layout's `dispatches`.
        experts: which ep rank holds which experts; None is contiguous.
    """
    if not step.num_tokens[layout.coordinates(rank).dp] and layout.ep_tp_groups == 1:
        return Traffic()  # this replica sits the step out
    experts = experts or ExpertPlacement.make("contiguous", config, layout)
    counts = _Counts(config, layout, rank, dtype, step, moe_dispatch, experts)
    at = layout.coordinates(rank)
    counts.sampled()
    if at.pp == 0:
        counts.embed()
    else:
        counts.received()
    layers = layout.stages(config)[at.pp]
    counts.attention(len(layers))
    counts.dense(sum(not config.is_moe(layer) for layer in layers))
    for layer, number in _alike(config, layers, experts, step):
        counts.moe(layer, number)
    if at.pp < layout.pp - 1:
        counts.passed_on()
    else:
        counts.head()
    return counts.traffic


def _alike(
    config: ModelConfig, layers: range, experts: ExpertPlacement, step: StepSize
) -> Iterator[tuple[int, int]]:
    """MoE layers that send different bytes, each with the number of layers like it."""
    with_experts = [layer for layer in layers if config.is_moe(layer)]
    if step.choices is not None:
        yield from ((layer, 1) for layer in with_experts)
        return
    numbers = Counter(experts.of(layer) for layer in with_experts)
    for layer in with_experts:
        if number := numbers.pop(experts.of(layer), 0):
            yield layer, number


class _Counts:
    """Counts what one rank sends in a step, by the parts of `moespan.model.network`."""

    def __init__(
        self,
        config: ModelConfig,
        layout: Layout,
        rank: int,
        dtype: str,
        step: StepSize,
        moe_dispatch: str,
        experts: ExpertPlacement,
    ) -> None:
        self.traffic = Traffic()
        self._config, self._layout, self._rank = config, layout, rank
        self._step, self._experts = step, experts
        self._at = layout.coordinates(rank)
        self._ranks = {**layout.sizes, "ep_tp_groups": layout.ep_tp_groups, "ep_fused": layout.ep}
        self._element_bytes = DTYPE_BYTES[dtype]
        self._token_bytes = config.hidden_size * self._element_bytes
        self._num_tokens = step.num_tokens[self._at.dp]
        self._held_tokens = split_evenly(self._num_tokens, layout.sp)[self._at.sp]
        self._held_bytes = self._held_tokens * self._token_bytes
        self._group_tokens = tp_group_tokens(layout, rank, step.num_tokens)
        self._dispatch = dispatch_of_step(
            moe_dispatch, config, layout, self._element_bytes, self._group_tokens
        )

    def _count(
        self, axis: str, collective: str, module: str, num_bytes: int, calls: int = 1
    ) -> None:
        ranks = self._ranks[axis]
        # Nothing is sent for an empty tensor; only all_to_all is called all the same.
        if calls and ranks > 1 and (num_bytes or collective == "all_to_all"):
            sent = sent_bytes(collective, ranks, num_bytes)
            self.traffic.calls[axis, collective, module] += calls
            self.traffic.sent_bytes[axis, collective, module] += calls * sent

    def sampled(self) -> None:
        """Tokens of the previous step, from the rank that sampled them."""
        if self._at.sp or not any(self._step.num_sampled):
            return
        num_bytes = self._step.num_sampled[self._at.dp] * _TOKEN_BYTES
        if self._at.tp == 0:
            self._count("tp", "broadcast", "sampled", num_bytes)
        self._count("sp", "broadcast", "sampled", num_bytes)

    def embed(self) -> None:
        self._count("tp", "all_reduce", "embed", self._held_bytes)

    def received(self) -> None:
        """The hidden state of the previous stage, of which each tp rank received a part."""
        self._count("tp", "all_gather", "hidden", self._stage_part_bytes)

    def passed_on(self) -> None:
        """This tp rank's part of the hidden state, for the next stage."""
        self._count("pp", "send", "hidden", self._stage_part_bytes)

    @property
    def _stage_part_bytes(self) -> int:
        elements = self._held_tokens * self._config.hidden_size
        return -(-elements // self._layout.tp) * self._element_bytes

    def attention(self, layers: int) -> None:
        config, layout = self._config, self._layout
        head_bytes = config.head_dim * self._element_bytes
        query_bytes = config.num_attention_heads // (layout.tp * layout.sp) * head_bytes
        key_bytes = cache_heads(config, layout, self._rank) * head_bytes
        to_heads = (layout.sp - 1) * self._held_tokens * (query_bytes + 2 * key_bytes)
        self._count("sp", "all_to_all", "attention", to_heads, layers)
        to_tokens = (self._num_tokens - self._held_tokens) * query_bytes
        self._count("sp", "all_to_all", "attention", to_tokens, layers)
        self._count("tp", "all_reduce", "attention", self._held_bytes, layers)

    def dense(self, layers: int) -> None:
        self._count("tp", "all_reduce", "mlp", self._held_bytes, layers)

    def moe(self, layer: int, layers: int) -> None:
        """`layers` layers that are like `layer`."""
        if self._dispatch == "all_gather":
            self._all_gather(layers)
        elif self._dispatch == "fused":
            self._fused(layers)
        elif self._dispatch == "all_to_all":
            self._all_to_all(layer, layers)
        self._count("tp", "all_reduce", "moe", self._held_bytes, layers)

    @property
    def _choices_bytes(self) -> int:
        """Bytes of one token's choices."""
        return self._config.num_experts_per_tok * _CHOICE_BYTES

    def _all_gather(self, layers: int) -> None:
        most_tokens = max(self._group_tokens)
        gathered_bytes = most_tokens * self._token_bytes
        self._count("ep_tp_groups", "all_gather", "moe", gathered_bytes, layers)
        self._count(
            "ep_tp_groups", "all_gather", "router", most_tokens * self._choices_bytes, layers
        )
        reduced_bytes = self._layout.ep_tp_groups * gathered_bytes
        self._count("ep_tp_groups", "reduce_scatter", "moe", reduced_bytes, layers)

    def _fused(self, layers: int) -> None:
        num_tokens = sent_tokens(self._layout, self._group_tokens)
        num_bytes = num_tokens * self._config.num_experts_per_tok * self._token_bytes
        self._count("ep_fused", "dispatch", "moe", num_bytes, layers)
        self._count("ep_fused", "combine", "moe", num_bytes, layers)

    def _all_to_all(self, layer: int, layers: int) -> None:
        out, back = self._rows_sent(layer)
        self._count("ep", "all_to_all", "counts", (self._layout.ep - 1) * _COUNT_BYTES, layers)
        self._count("ep", "all_to_all", "router", round(out * self._choices_bytes), layers)
        self._count("ep", "all_to_all", "moe", round(out * self._token_bytes), layers)
        self._count("ep", "all_to_all", "moe", round(back * self._token_bytes), layers)

    def _rows_sent(self, layer: int) -> tuple[float, float]:
        """Rows that the rank sends to the ranks that hold their experts, and rows that it returns.

        All ranks of a tp group hold the same tokens, so no row is sent within the own group.
        """
        choices = self._step.choices
        return self._sum_rows(self._experts.of(layer), None if choices is None else choices[layer])

    def _sum_rows(self, held: Held, choices: Sequence[Choices] | None) -> tuple[float, float]:
        layout = self._layout
        ep_rank = layout.ep_rank(self._rank)
        own_group, out, back = ep_rank // layout.tp, 0.0, 0.0
        for group, (dp, sp) in enumerate(tp_groups_of(layout, self._rank)):
            lengths = split_evenly(self._step.num_tokens[dp], layout.sp)
            first, length = sum(lengths[:sp]), lengths[sp]
            chosen = None if choices is None else choices[dp][first : first + length]
            if group != own_group:
                back += float(_sum_met(self._config, held, 0, length, chosen)[ep_rank])
                continue
            parts = split_evenly(length, layout.tp)
            start, stop = (sum(parts[: self._at.tp + end]) for end in (0, 1))
            met = _sum_met(self._config, held, start, stop, chosen)
            out = float(met.sum() - met[group * layout.tp : (group + 1) * layout.tp].sum())
        return out, back

    def head(self) -> None:
        num_rows = self._step.num_rows[self._at.dp]
        self._count("sp", "all_reduce", "head", num_rows * self._token_bytes)
        if self._at.sp == 0:
            vocabulary = -(-self._config.vocab_size // self._layout.tp)
            num_bytes = num_rows * vocabulary * self._element_bytes
            self._count("tp", "all_gather", "head", num_bytes)


def _sum_met(
    config: ModelConfig, held: Held, start: int, stop: int, chosen: Choices | None
) -> npt.NDArray[np.float64]:
    """How many of the tokens `start:stop` of a tp group chose an expert of each ep rank, [ep].

    Args:
        chosen: the choices of all tokens of the group; None is the expected number if routing is
            uniform.
    """
    if chosen is None:
        turns = _turns(config, held)
        period = len(turns)
        # Numbers below `end` that leave each remainder; tokens take turns on replicas.
        below = [(end - np.arange(period) + period - 1) // period for end in (start, stop)]
        counts: npt.NDArray[np.float64] = (below[1] - below[0]) @ turns
        return counts
    holders = _holders(config, held)
    met = np.zeros((stop - start, len(held)))
    for row, experts in enumerate(chosen[start:stop].tolist()):
        for expert in experts:
            met[row, holders[expert][(start + row) % len(holders[expert])]] = 1
    total: npt.NDArray[np.float64] = met.sum(0)
    return total


@functools.lru_cache(maxsize=256)
def _turns(config: ModelConfig, held: Held) -> npt.NDArray[np.float64]:
    """Probability that a token chose an expert of an ep rank, [period, ep], by the token's number
    modulo the period in which tokens take turns on replicas of experts."""
    holders = _holders(config, held)
    period = math.lcm(*map(len, holders))
    turns = np.zeros((period, len(held)))
    for token in range(period):
        serves = Counter(ranks[token % len(ranks)] for ranks in holders)
        for rank in range(len(held)):
            turns[token, rank] = probability_met(config, serves[rank])
    return turns


def _holders(config: ModelConfig, held: Held) -> list[list[int]]:
    """The ep ranks that hold each expert."""
    return [
        [rank for rank, experts in enumerate(held) if expert in experts]
        for expert in range(config.n_routed_experts or 0)
    ]
