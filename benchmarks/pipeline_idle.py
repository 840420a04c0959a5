"""Stages of a pipeline that stand idle while prompts are computed: counted, not timed.

The engine's own scheduler makes the plans, and each stage takes one stage-step for each plan. So
the figures are the same on every machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from moespan.config import EngineConfig, Layout
from moespan.planner.cost import ReplicaStep
from moespan.planner.load import Load, LoadRequest
from moespan.search.simulate import simulate


class StageSteps:
    """A timer for which every stage takes one unit of time for each plan, and all else nothing."""

    def __init__(self, stages: int) -> None:
        self._stages = stages

    def stages_s(self, step: Sequence[ReplicaStep]) -> list[float]:
        return [1.0] * self._stages

    def launch_s(self, step: Sequence[ReplicaStep]) -> float:
        return 0.0

    before_s = after_s = launch_s


class Row(NamedTuple):
    """Figures of a run.

    Attributes:
        first_token: stage-steps that pass until the first prompt has its first token.
        idle: share of all stage-steps, from 0 to 1.
    """

    pp: int
    prompts: int
    chunk: int
    plans: int
    first_token: float
    idle: float


def measure(pp: int, num_prompts: int, prompt_tokens: int, chunk: int) -> Row:
    """Compute prompts that arrive together, in chunks of at most `chunk` tokens."""
    config = EngineConfig(
        "",
        Layout(pp=pp),
        device="cpu",
        max_model_len=prompt_tokens + 1,
        max_num_seqs=min(64, chunk),
        max_num_batched_tokens=chunk,
        enable_prefix_caching=False,
    )
    load = Load(tuple(LoadRequest(0.0, prompt_tokens, 1) for _ in range(num_prompts)))
    num_blocks = num_prompts * config.blocks_per_sequence
    run = simulate(config, num_blocks, 64, StageSteps(pp), load)
    end = max(one.last_s for one in run.times)
    first = min(one.first_s for one in run.times)
    return Row(pp, num_prompts, chunk, run.num_steps, first, 1 - run.num_steps / end)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pp", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 512, 1024, 2048])
    args = parser.parse_args(argv)
    print(f"prompts of {args.prompt_tokens} tokens; times in stage-steps")
    print("  pp  prompts  chunk  plans  first token   idle")
    for pp in args.pp:
        for num_prompts in args.prompts:
            for chunk in args.chunks:
                row = measure(pp, num_prompts, args.prompt_tokens, chunk)
                print(
                    f"{row.pp:>4}{row.prompts:>9}{row.chunk:>7}{row.plans:>7}"
                    f"{row.first_token:>13.0f}{row.idle:>7.1%}"
                )


if __name__ == "__main__":
    main()
