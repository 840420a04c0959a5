"""Which ranks hold which tokens of a step, and the rule that chooses the dispatch.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from moespan.config import Layout, ModelConfig
from moespan.parallel.fused import MOST_TOKENS, sent_tokens

LEAST_SAVED_BYTES = 1 << 20
"""Bytes that `all_to_all` must save a rank in every layer before `auto` chooses it."""


def split_evenly(total: int, parts: int) -> list[int]:
    """Lengths of `parts` consecutive parts of `total`; the first parts are one longer if needed."""
    size, extra = divmod(total, parts)
    return [size + (part < extra) for part in range(parts)]


def tp_groups_of(layout: Layout, rank: int) -> list[tuple[int, int]]:
    """(dp, sp) of each tp group that shares one set of experts with `rank`.

    A tp group is the tp ranks that hold the same tokens.
    """
    at = layout.coordinates(rank)
    own = at.dp * layout.sp + at.sp
    first = own - own % layout.ep_tp_groups
    return [divmod(group, layout.sp) for group in range(first, first + layout.ep_tp_groups)]


def tp_group_tokens(layout: Layout, rank: int, num_tokens: Sequence[int]) -> list[int]:
    """Tokens of each of `tp_groups_of`, where `num_tokens` has the tokens of every replica."""
    return [split_evenly(num_tokens[dp], layout.sp)[sp] for dp, sp in tp_groups_of(layout, rank)]


def probability_met(config: ModelConfig, num_held: int) -> float:
    """Probability that a token chooses at least one of `num_held` given experts, n of E, if all
    choices of K experts are equally likely: 1 − C(E − n, K) / C(E, K)."""
    experts, chosen = config.n_routed_experts or 0, config.num_experts_per_tok
    return 1 - math.comb(experts - num_held, chosen) / math.comb(experts, chosen)


def mean_ranks_met(config: ModelConfig, layout: Layout) -> float:
    """Mean number of ranks of the ep group that hold one of a token's experts.

    Experts are taken as equally likely and evenly spread.
    """
    held = split_evenly(config.n_routed_experts or 0, layout.ep)
    return sum(probability_met(config, num_held) for num_held in held)


def dispatch_of_step(
    asked: str,
    config: ModelConfig,
    layout: Layout,
    element_bytes: int,
    group_tokens: Sequence[int],
) -> str:
    """The dispatch of one step, where `asked` is `auto` or a dispatch.

    `fused` becomes `all_to_all` in a step where a rank would send more tokens than its operators
    take.

    Args:
        group_tokens: tokens of each tp group of the ep group.
    """
    if asked == "auto":
        return choose_dispatch(config, layout, element_bytes, group_tokens)
    if asked == "fused" and sent_tokens(layout, group_tokens) > MOST_TOKENS:
        return "all_to_all"
    return asked


def choose_dispatch(
    config: ModelConfig, layout: Layout, element_bytes: int, group_tokens: Sequence[int]
) -> str:
    """The rule of `auto` for one step.

    `replicated` if all ranks of the ep group hold the same tokens. Else `all_to_all` if it saves a
    rank `LEAST_SAVED_BYTES` or more in every layer, compared with `all_gather`. Below that
    `all_gather`, which needs fewer calls and does not wait for the device to know how much goes
    where.
    """
    if layout.ep_tp_groups == 1:
        return "replicated"
    # Mean number of times that one tp rank sends a token of its group, in each direction.
    all_gather = layout.ep_tp_groups - 1
    all_to_all = all_gather * mean_ranks_met(config, layout) / layout.ep
    saved_per_token = 2 * (all_gather - all_to_all) * config.hidden_size * element_bytes
    saved_bytes = saved_per_token * max(group_tokens)
    return "all_to_all" if saved_bytes >= LEAST_SAVED_BYTES else "all_gather"
