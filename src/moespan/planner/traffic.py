"""What a step sends, by formula: the traffic that a rank's counters will show.

Nothing is run, and no torch is imported: a layout can be judged before there are ranks. Tests hold
the counters of real ranks to it exactly. The formulas, in words: docs/parallelism.md.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
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

Choices = npt.NDArray[np.int64]
"""The experts that tokens chose, [T, K]."""

_COUNT_BYTES = 8  # how many rows go to a rank, int64
_CHOICE_BYTES = 4 + 4  # a weight, float32, and a slot, int32
_TOKEN_BYTES = 4


@dataclass(frozen=True)
class StepSize:
    """One step, as far as traffic depends on it.

    Attributes:
        num_tokens: T of each replica.
        num_rows: logit rows of each replica.
        num_sampled: tokens of each replica's step before, where its plan names them by their place;
            empty if none does.
        choices: layer → of each replica, what its router chose. None for uniform routing: then
            `all_to_all` is given its expected bytes, rounded to whole ones in every call.
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
    """What `rank` sends over the model's axes in one step.

    Args:
        dtype: of activations.
        moe_dispatch: `auto` or one of the layout's `dispatches`.
        experts: which ep rank holds which experts; None is contiguous.
    """
    traffic = Traffic()
    at = layout.coordinates(rank)
    if not step.num_tokens[at.dp] and layout.ep_tp_groups == 1:
        return traffic  # this replica sits the step out
    ranks = {**layout.sizes, "ep_tp_groups": layout.ep_tp_groups, "ep_fused": layout.ep}

    def count(axis: str, collective: str, module: str, num_bytes: int) -> None:
        # Nothing is sent for an empty tensor; only all_to_all is called all the same.
        if ranks[axis] > 1 and (num_bytes or collective == "all_to_all"):
            sent = sent_bytes(collective, ranks[axis], num_bytes)
            traffic.count(axis, collective, module, sent)

    element_bytes = DTYPE_BYTES[dtype]
    token_bytes = config.hidden_size * element_bytes
    held_tokens = split_evenly(step.num_tokens[at.dp], layout.sp)[at.sp]
    other_tokens = step.num_tokens[at.dp] - held_tokens
    held_bytes = held_tokens * token_bytes
    stage_part_bytes = -(-held_tokens * config.hidden_size // layout.tp) * element_bytes

    query_bytes = config.num_attention_heads // (layout.tp * layout.sp) * config.head_dim
    query_bytes *= element_bytes
    key_bytes = cache_heads(config, layout, rank) * config.head_dim * element_bytes

    blocks = tp_group_tokens(layout, rank, step.num_tokens)
    way = dispatch_of_step(moe_dispatch, config, layout, element_bytes, blocks)
    experts = experts or ExpertPlacement.make("contiguous", config, layout)

    if at.tp == 0 and at.sp == 0 and any(step.num_sampled):
        count("tp", "broadcast", "sampled", step.num_sampled[at.dp] * _TOKEN_BYTES)
    if at.sp == 0 and any(step.num_sampled):
        count("sp", "broadcast", "sampled", step.num_sampled[at.dp] * _TOKEN_BYTES)
    # From here on in the order of the network.
    if at.pp == 0:
        count("tp", "all_reduce", "embed", held_bytes)
    else:
        count("tp", "all_gather", "hidden", stage_part_bytes)
    for layer in layout.stages(config)[at.pp]:
        to_heads = (layout.sp - 1) * held_tokens * (query_bytes + 2 * key_bytes)
        count("sp", "all_to_all", "attention", to_heads)
        count("sp", "all_to_all", "attention", other_tokens * query_bytes)
        count("tp", "all_reduce", "attention", held_bytes)
        if not config.is_moe(layer):
            count("tp", "all_reduce", "mlp", held_bytes)
            continue
        if way == "all_gather":
            count("ep_tp_groups", "all_gather", "moe", max(blocks) * token_bytes)
            choice_bytes = config.num_experts_per_tok * _CHOICE_BYTES
            count("ep_tp_groups", "all_gather", "router", max(blocks) * choice_bytes)
            count(
                "ep_tp_groups",
                "reduce_scatter",
                "moe",
                layout.ep_tp_groups * max(blocks) * token_bytes,
            )
        elif way == "fused":
            rows = sent_tokens(layout, blocks) * config.num_experts_per_tok
            count("ep_fused", "dispatch", "moe", rows * token_bytes)
            count("ep_fused", "combine", "moe", rows * token_bytes)
        elif way == "all_to_all":
            choices = None if step.choices is None else step.choices[layer]
            out, back = _rows_sent(config, layout, rank, step, experts.of(layer), choices)
            count("ep", "all_to_all", "counts", (layout.ep - 1) * _COUNT_BYTES)
            choice_bytes = config.num_experts_per_tok * _CHOICE_BYTES
            count("ep", "all_to_all", "router", round(out * choice_bytes))
            count("ep", "all_to_all", "moe", round(out * token_bytes))
            count("ep", "all_to_all", "moe", round(back * token_bytes))
        count("tp", "all_reduce", "moe", held_bytes)
    if at.pp < layout.pp - 1:
        count("pp", "send", "hidden", stage_part_bytes)
        return traffic
    num_rows = step.num_rows[at.dp]
    count("sp", "all_reduce", "head", num_rows * token_bytes)
    if at.sp == 0:
        vocabulary = -(-config.vocab_size // layout.tp)
        count("tp", "all_gather", "head", num_rows * vocabulary * element_bytes)
    return traffic


def _rows_sent(
    config: ModelConfig,
    layout: Layout,
    rank: int,
    step: StepSize,
    held: tuple[tuple[int, ...], ...],
    choices: Sequence[Choices] | None,
) -> tuple[float, float]:
    """Rows that `rank` sends to the ranks that hold their experts, and that it sends back.

    Tokens of its own block are on all ranks of the block, so neither leaves it.
    """
    ep_rank, tp_rank = layout.ep_rank(rank), layout.coordinates(rank).tp
    own_block, out, back = ep_rank // layout.tp, 0.0, 0.0
    for block, (dp, sp) in enumerate(tp_groups_of(layout, rank)):
        lengths = split_evenly(step.num_tokens[dp], layout.sp)
        first, length = sum(lengths[:sp]), lengths[sp]
        chosen = None if choices is None else choices[dp][first : first + length]
        met = _met(config, held, length, chosen)
        if block != own_block:
            back += float(met[:, ep_rank].sum())
            continue
        parts = split_evenly(length, layout.tp)
        mine = met[sum(parts[:tp_rank]) : sum(parts[: tp_rank + 1])]
        met_here = mine[:, block * layout.tp : (block + 1) * layout.tp]
        out = float(mine.sum() - met_here.sum())
    return out, back


def _met(
    config: ModelConfig,
    held: tuple[tuple[int, ...], ...],
    num_tokens: int,
    chosen: Choices | None,
) -> npt.NDArray[np.float64]:
    """The probability that a token of a block meets one of its experts on an ep rank, [T, ep]: 0 or
    1 if it is known what was chosen."""
    num_experts = config.n_routed_experts or 0
    holders = [
        [rank for rank, experts in enumerate(held) if expert in experts]
        for expert in range(num_experts)
    ]
    if chosen is not None:
        met = np.zeros((num_tokens, len(held)))
        for token, experts in enumerate(chosen.tolist()):
            for expert in experts:  # tokens take turns on replicas
                met[token, holders[expert][token % len(holders[expert])]] = 1
        return met
    period = math.lcm(*map(len, holders))
    turns = np.zeros((period, len(held)))
    for token in range(period):
        serves = Counter(ranks[token % len(ranks)] for ranks in holders)
        for rank in range(len(held)):
            turns[token, rank] = probability_met(config, serves[rank])
    return turns[np.arange(num_tokens) % period]
