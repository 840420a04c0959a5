"""Where the tokens of a step are, and by which way they meet their experts. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moespan.config import Layout, ModelConfig
from moespan.parallel.fused import MOST_TOKENS, sent_tokens

LEAST_SAVED_BYTES = 1 << 20


def split_evenly(total: int, parts: int) -> list[int]:
    """Lengths of `parts` consecutive parts of `total`, the first ones one longer if need be."""
    size, extra = divmod(total, parts)
    return [size + (part < extra) for part in range(parts)]


def tp_groups_of(layout: Layout, rank: int) -> list[tuple[int, int]]:
    """(dp, sp) of each block, that is of tp ranks with the same tokens, that shares one set of
    experts with `rank`."""
    at = layout.coordinates(rank)
    own = at.dp * layout.sp + at.sp
    first = own - own % layout.ep_tp_groups
    return [divmod(block, layout.sp) for block in range(first, first + layout.ep_tp_groups)]


def tp_group_tokens(layout: Layout, rank: int, num_tokens: Sequence[int]) -> list[int]:
    """Tokens of each of `tp_groups_of`, from those of every replica."""
    return [split_evenly(num_tokens[dp], layout.sp)[sp] for dp, sp in tp_groups_of(layout, rank)]


def probability_met(config: ModelConfig, num_held: int) -> float:
    """Probability that a token chooses at least one of `num_held` given experts, n of E, if all
    choices of K experts are equally likely: 1 − C(E − n, K) / C(E, K)."""
    experts, chosen = config.n_routed_experts or 0, config.num_experts_per_tok
    return 1 - math.comb(experts - num_held, chosen) / math.comb(experts, chosen)


def mean_ranks_met(config: ModelConfig, layout: Layout) -> float:
    """On how many ranks of the ep group a token finds one of its experts, if all are equally likely
    and spread evenly."""
    held = split_evenly(config.n_routed_experts or 0, layout.ep)
    return sum(probability_met(config, num_held) for num_held in held)


def dispatch_of_step(
    asked: str,
    config: ModelConfig,
    layout: Layout,
    element_bytes: int,
    group_tokens: Sequence[int],
) -> str:
    """What `asked`, `auto` or a way, means for one step: `fused` is `all_to_all` where a rank would
    send more tokens than its operators take."""
    if asked == "auto":
        return choose_dispatch(config, layout, element_bytes, group_tokens)
    if asked == "fused" and sent_tokens(layout, group_tokens) > MOST_TOKENS:
        return "all_to_all"
    return asked


def choose_dispatch(
    config: ModelConfig, layout: Layout, element_bytes: int, group_tokens: Sequence[int]
) -> str:
    """The rule of `auto` for one step: `replicated` where all ranks of the ep group have the same
    tokens; else `all_to_all` as soon as it saves a rank `LEAST_SAVED_BYTES` in every layer against
    `all_gather`, which needs fewer calls, and no word from the device on how much goes where."""
    if layout.ep_tp_groups == 1:
        return "replicated"
    # What one tp rank sends of each token of its block, to and fro, on average.
    all_gather = layout.ep_tp_groups - 1
    all_to_all = all_gather * mean_ranks_met(config, layout) / layout.ep
    saved_per_token = 2 * (all_gather - all_to_all) * config.hidden_size * element_bytes
    saved_bytes = saved_per_token * max(group_tokens)
    return "all_to_all" if saved_bytes >= LEAST_SAVED_BYTES else "all_gather"
