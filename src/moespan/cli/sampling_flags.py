"""Flags of the sampling parameters, for the verbs that sample."""

from __future__ import annotations

import argparse
from typing import Any

NAMES = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
)
"""Sampling parameters that have a flag of every verb that samples."""


def add_sampling_flags(
    parser: argparse.ArgumentParser,
    when: str = "",
    *,
    max_tokens: int | None = 128,
    temperature: float | None = 0.0,
) -> None:
    """A flag for each of `NAMES`.

    Args:
        when: when these values count, if not always.
        max_tokens, temperature: defaults of these flags; None for a verb with its own.
    """
    group = parser.add_argument_group(f"sampling ({when})" if when else "sampling")
    group.add_argument(
        "--max-tokens", "--max-new-tokens", type=int, metavar="N", default=max_tokens
    )
    group.add_argument("--min-tokens", type=int, metavar="N")
    group.add_argument(
        "--temperature", type=float, metavar="F", default=temperature, help="0 is greedy (0)"
    )
    group.add_argument("--top-p", type=float, metavar="F")
    group.add_argument("--top-k", type=int, metavar="N")
    group.add_argument("--min-p", type=float, metavar="F")
    group.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    group.add_argument("--repetition-penalty", type=float, metavar="F")
    group.add_argument("--presence-penalty", type=float, metavar="F")
    group.add_argument("--frequency-penalty", type=float, metavar="F")
    group.add_argument(
        "--stop", nargs="+", action="extend", metavar="TEXT", help="strings that end the output"
    )
    group.add_argument("--stop-token-ids", nargs="+", action="extend", type=int, metavar="ID")
    group.add_argument("--ignore-eos", action="store_true", default=None)


def sampling_of(args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """The parameters that flags set: those of `NAMES`, and `more` of the verb's own."""
    given = {name: getattr(args, name) for name in (*NAMES, *more)}
    return {name: value for name, value in given.items() if value is not None}
