"""Messages between the leader and the other ranks: the plan of a step, its result, and the rest.

Plain integers and floats, in msgpack: a plan is broadcast, recorded and replayed as it is. It has
no positions and no cache slots, because they follow from its other fields.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from moespan.config import EngineConfig
from moespan.engine.request import TokenLogprobs


class SampleRow(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """How to sample one token. Most sequences say the same at each step, with the same object.

    A row and its position are everything that sampling needs, so ranks keep no state of requests.

    Attributes:
        seed: the draw is a pure function of it and of the position.
        seen_prompt: distinct prompt token ids; empty without a repetition penalty.
        seen_output: output token id -> count; empty without any penalty.
        logit_bias: token id -> number to add.
        barred: token ids that must not be sampled (before `min_tokens`, or in `bad_words`).
        allowed: the only tokens that may be sampled: bit t % 8 of byte t // 8 is token t. None
            allows all. In broadcasts it is empty (`moespan.engine.masks`).
        logprobs: number of best tokens to report; None for no log probabilities.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seen_prompt: list[int] = []
    seen_output: dict[int, int] = {}
    logit_bias: dict[int, float] = {}
    barred: list[int] = []
    allowed: bytes | None = None
    logprobs: int | None = None

    def allows(self, token_id: int) -> bool:
        """Whether the token may be sampled."""
        is_allowed = self.allowed is None or self.allowed[token_id // 8] >> token_id % 8 & 1
        return bool(is_allowed) and token_id not in self.barred


class PromptRow(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Report on the prompt tokens of `sequence` that this step computes.

    Attributes:
        sequence: index into the plan's sequences.
        targets: the prompt token after each query token; the prompt's last one has none.
        logprobs: number of best tokens to report with each; None for no log probabilities.
        logits: whether to return the logits too, one row for each query token.
    """

    sequence: int
    targets: list[int]
    logprobs: int | None
    logits: bool


class StepPlan(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One step over a flattened batch of prefill chunks and decodes.

    Each draft of a sequence's next tokens (`moespan.engine.drafts`) is a sequence of its own here:
    of one token, at its position, in the same blocks. Within a layer a step writes all keys and
    values before it reads any, so a draft sees the tokens before it. Nothing else knows drafts.

    Attributes:
        step: number of the plan, from 0.
        token_ids: query tokens, one sequence after the other [T]; `~i` stands for the token that
            `samples[i]` of the previous, still unfinished plan of this replica will get.
        query_lens: query tokens of each sequence [S]; their sum is T.
        context_lens: tokens of each sequence in the cache before this step [S].
        block_tables: cache blocks of each sequence, enough for context and query [S][blocks].
        sampled: sequences that get a token after their last query token, as indices [R].
        positions: tokens generated before each of these tokens [R].
        samples: how to sample each of them [R].
        prompts: sequences whose prompt is reported on.
    """

    step: int
    token_ids: list[int] = []
    query_lens: list[int] = []
    context_lens: list[int] = []
    block_tables: list[list[int]] = []
    sampled: list[int] = []
    positions: list[int] = []
    samples: list[SampleRow] = []
    prompts: list[PromptRow] = []

    @property
    def is_ahead(self) -> bool:
        """Whether a token is one that the previous plan samples."""
        return min(self.token_ids, default=0) < 0

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one token, and no prompt is reported on."""
        return not self.prompts and all(length == 1 for length in self.query_lens)


class StepPlans(msgspec.Struct, frozen=True, tag="step"):
    """One step of all replicas, in the order of dp.

    Attributes:
        num_tokens: T of each replica; 0 for an idle one.
        plans: encoded `StepPlan | None` of each replica; a rank decodes only its own.
        is_decode: whether all plans are (`StepPlan.is_decode`).
        trace: whether ranks record values inside the network (`moespan.engine.trace`).
    """

    num_tokens: list[int]
    plans: list[msgspec.Raw]
    is_decode: bool = False
    trace: bool = False

    @classmethod
    def of(cls, plans: list[StepPlan | None], trace: bool = False) -> StepPlans:
        """Encode the replicas' plans."""
        return cls(
            [0 if plan is None else len(plan.token_ids) for plan in plans],
            [msgspec.Raw(msgspec.msgpack.encode(plan)) for plan in plans],
            all(plan is None or plan.is_decode for plan in plans),
            trace,
        )

    def plan(self, replica: int) -> StepPlan | None:
        """The plan of one replica."""
        return msgspec.msgpack.decode(self.plans[replica], type=StepPlan | None)


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """The leader is alive."""


class Report(msgspec.Struct, frozen=True, tag="report"):
    """Every follower sends its traffic counters, what memory it takes, or its experts' counts."""

    what: Literal["traffic", "memory", "experts"] = "traffic"


class Close(msgspec.Struct, frozen=True, tag="close"):
    """This engine ends; `config` is that of the next one, if any."""

    config: EngineConfig | None


FromLeader = StepPlans | Heartbeat | Report | Close
"""Everything that the leader broadcasts; each rank takes the messages in their order."""


class Sampled(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Result of a `SampleRow`; `token_id` is None if its logits were not all finite."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None


class PromptScores(msgspec.Struct, frozen=True, array_like=True):
    """Result of a `PromptRow`; `logits` are float32 rows [positions, vocabulary] as bytes."""

    logprobs: list[TokenLogprobs]
    logits: bytes


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """One entry for each of the plan's `samples` and `prompts`, in their order."""

    samples: list[Sampled]
    prompts: list[PromptScores]
