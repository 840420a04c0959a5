"""The one message of a step: what every rank computes, and what the leader learns from it.

Plain integers and floats, in msgpack: it is broadcast, recorded and replayed as it is. Positions
and cache slots are not in it, because they follow from what is.
"""

from __future__ import annotations

import msgspec

from moespan.engine.request import TokenLogprobs


class SampleRow(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Sample one token after the last query token of `sequence`.

    It carries all that sampling needs, so that ranks keep no state of requests.

    Attributes:
        sequence: index into the plan's sequences.
        seed, position: the draw is a pure function of these two; `position` counts the tokens
            generated before.
        seen_prompt: distinct prompt token ids; only filled when a repetition penalty is on.
        seen_output: output token id -> count; only filled when a penalty is on.
        logit_bias: token id -> number to add.
        barred: token ids that must not be sampled (before `min_tokens`).
        logprobs: how many best tokens to report; None for no log probabilities at all.
    """

    sequence: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    position: int
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seen_prompt: list[int] = []
    seen_output: dict[int, int] = {}
    logit_bias: dict[int, float] = {}
    barred: list[int] = []
    logprobs: int | None = None


class PromptRow(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Report on the prompt tokens of `sequence` that this step computes.

    Attributes:
        sequence: index into the plan's sequences.
        targets: the prompt token that follows each query token (one fewer than the query tokens
            when the prompt ends in this step).
        logprobs: how many best tokens to report with each; None for no log probabilities.
        logits: whether to return the logits themselves, one row for each query token.
    """

    sequence: int
    targets: list[int]
    logprobs: int | None
    logits: bool


class StepPlan(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One step over a flattened batch of prefill chunks and decodes.

    Attributes:
        step: counts plans from 0.
        token_ids: the query tokens of all sequences, one sequence after the other [T]; `~i` is
            the token that `samples[i]` of this replica's plan before gets, which is in flight.
        query_lens: how many of them belong to each sequence [S]; their sum is T.
        context_lens: tokens of each sequence that are in the cache before this step [S].
        block_tables: cache blocks of each sequence, enough for context and query [S][blocks].
        samples: the sequences that get a token.
        prompts: the sequences whose prompt is reported on.
    """

    step: int
    token_ids: list[int]
    query_lens: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    samples: list[SampleRow]
    prompts: list[PromptRow] = []

    @property
    def is_ahead(self) -> bool:
        """Whether it names tokens that the plan before samples."""
        return min(self.token_ids, default=0) < 0

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one token, and no prompt is reported on."""
        return not self.prompts and all(length == 1 for length in self.query_lens)


class StepPlans(msgspec.Struct, frozen=True, tag="step"):
    """One step of all replicas, in the order of dp.

    Attributes:
        num_tokens: T of each replica; 0 where it has nothing to do.
        plans: the `StepPlan` of each, or None, encoded: a rank decodes only its own.
        is_decode: whether every sequence of every replica has one token, and no prompt is reported
            on.
        trace: whether ranks also record what the network computes inside (`moespan.engine.trace`).
    """

    num_tokens: list[int]
    plans: list[msgspec.Raw]
    is_decode: bool = False
    trace: bool = False

    @classmethod
    def of(cls, plans: list[StepPlan | None], trace: bool = False) -> StepPlans:
        """Put the replicas' plans together."""
        return cls(
            [0 if plan is None else len(plan.token_ids) for plan in plans],
            [msgspec.Raw(msgspec.msgpack.encode(plan)) for plan in plans],
            all(plan is None or plan.is_decode for plan in plans),
            trace,
        )

    def plan(self, replica: int) -> StepPlan | None:
        """The plan of one replica."""
        return msgspec.msgpack.decode(self.plans[replica], type=StepPlan | None)


class Sampled(msgspec.Struct, frozen=True, array_like=True):
    """What came of one `SampleRow`: `token_id` is None when its logits were not all finite."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None


class PromptScores(msgspec.Struct, frozen=True, array_like=True):
    """What came of one `PromptRow`: `logits` are float32 rows [positions, vocabulary] as bytes."""

    logprobs: list[TokenLogprobs]
    logits: bytes


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """One entry for each of the plan's `samples` and `prompts`, in their order."""

    samples: list[Sampled]
    prompts: list[PromptScores]
