"""What one engine makes of a load, by simulation: for a search, and to compare with `bench`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec

from moespan.config import EngineConfig, ModelConfig
from moespan.planner.load import Load
from moespan.planner.outcome import Outcome, RequestTimes
from moespan.search.simulate import StepTimer, simulate


class Predicted(msgspec.Struct, frozen=True, kw_only=True):
    """What one simulation, or an estimate, says of one engine.

    Attributes:
        is_estimate: whether it comes from mean values only.
        concurrency: requests at a time; None if they come at a rate.
        num_replicas: that were simulated; the engine may have more.
    """

    outcome: Outcome
    is_estimate: bool = False
    concurrency: int | None = None
    num_replicas: int = 1
    num_preemptions: int = 0
    hit_share: float = 0.0
    steps: int = 0


def predict(
    timer: StepTimer,
    model: ModelConfig,
    config: EngineConfig,
    num_blocks: int,
    load: Load,
    *,
    slower: float = 1.0,
    give_up: Callable[[list[RequestTimes]], bool] | None = None,
    num_replicas: int | None = None,
) -> Predicted:
    """An engine with `num_blocks` blocks of KV cache under `load`.

    Args:
        timer: the times of its steps, such as a `StepCost`.
        slower: factor on the times of stages.
        give_up: see `simulate`.
        num_replicas: how many replicas are simulated, whose part of the load `load` is; the others
            do what these do at other times. None: all.
    """
    layout = config.layout
    replicas = num_replicas or layout.dp
    # Experts matter to the timer only.
    run = simulate(
        replace(config, layout=replace(layout, ep=1, dp=replicas)),
        num_blocks,
        model.vocab_size,
        timer,
        load,
        slower=slower,
        give_up=give_up,
        num_others=layout.dp - replicas,
    )
    outcome = Outcome.of(run.times, cut_end=load.concurrency is not None, is_cut=run.is_cut)
    more = layout.dp / replicas
    return Predicted(
        outcome=msgspec.structs.replace(
            outcome,
            tokens_per_s=more * outcome.tokens_per_s,
            requests_per_s=more * outcome.requests_per_s,
        ),
        concurrency=None if load.concurrency is None else round(more * load.concurrency),
        num_replicas=replicas,
        num_preemptions=run.num_preemptions,
        hit_share=run.hit_share,
        steps=run.num_steps,
    )
