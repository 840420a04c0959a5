"""A model for tests of scheduling: a hash that reads and writes a real cache.

The value it writes for a token depends on all values before it, and a sample depends on all values
it reads. So a block that is shared wrongly, stale, or not recomputed changes the output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set as AbstractSet

from moespan.engine.request import Request, TokenLogprobs
from moespan.engine.step import PromptScores, Sampled, SampleRow, StepPlan, StepResult

VOCAB = 11
EOS = 0
START = 1  # the state before the first token


def write(state: int, token_id: int) -> int:
    """The keys and values of a token, given the state before it."""
    return hash((state, token_id))


def read(state: int, value: int) -> int:
    return hash((state, value, 2))


def sample(state: int, row: SampleRow) -> int:
    """The token that the model draws."""
    seen = (tuple(row.seen_prompt), tuple(sorted(row.seen_output.items())))
    draw = hash((state, row.seed, row.position, seen))
    allowed = [token_id for token_id in range(VOCAB) if token_id not in row.barred]
    return allowed[draw % len(allowed)]


def sampled(state: int, row: SampleRow) -> Sampled:
    token_id = sample(state, row)
    logprobs = None if row.logprobs is None else TokenLogprobs(token_id, float(state), [])
    return Sampled(token_id, logprobs)


def expected_states(token_ids: list[int]) -> list[int]:
    """The state of the model after each token."""
    states, state = [], START
    for token_id in token_ids:
        state = read(state, write(state, token_id))
        states.append(state)
    return states


def expected_output(request: Request, index: int, max_model_len: int, seed: int = 0) -> list[int]:
    """Continue a request alone, without cache and scheduler."""
    params = request.params
    output: list[int] = []
    first_seed = seed if params.seed is None else params.seed
    eos = [] if params.ignore_eos else [EOS]
    room = max_model_len - len(request.prompt_token_ids)
    while len(output) < min(room, params.max_tokens or room):
        repeats = params.repetition_penalty != 1
        row = SampleRow(
            sequence=0,
            temperature=1,
            top_p=1,
            top_k=0,
            min_p=0,
            seed=first_seed + index,
            position=len(output),
            seen_prompt=sorted(set(request.prompt_token_ids)) if repeats else [],
            seen_output=Counter(output) if params.penalizes else {},
            barred=eos + params.stop_token_ids if len(output) < params.min_tokens else [],
        )
        state = expected_states(request.prompt_token_ids + output)[-1]
        output.append(sample(state, row))
        if output[-1] in eos + params.stop_token_ids:
            break
    return output


class PagedModel:
    """Executes plans on a cache of slots."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[tuple[int, int], int] = {}
        self.sampled: list[int] = []  # by the last plan; the next may name these tokens by index

    def context(self, plan: StepPlan) -> list[list[int | None]]:
        """The cached values of each sequence before the step."""
        return [
            [self.slots.get(self.slot(table, position)) for position in range(context_len)]
            for table, context_len in zip(plan.block_tables, plan.context_lens, strict=True)
        ]

    def slot(self, table: list[int], position: int) -> tuple[int, int]:
        return table[position // self.block_size], position % self.block_size

    def execute(self, plan: StepPlan, corrupt: AbstractSet[int] = frozenset()) -> StepResult:
        """Compute a step; the sequences in `corrupt` that sample get garbage instead."""
        token_ids = [token if token >= 0 else self.sampled[~token] for token in plan.token_ids]
        states, start = [], 0  # states[sequence][query token]
        rows = zip(plan.query_lens, plan.context_lens, plan.block_tables, strict=True)
        for sequence, (query_len, context_len, table) in enumerate(rows):
            state, mine = START, []
            for position in range(context_len):
                state = read(state, self.slots[self.slot(table, position)])
            for i in range(query_len):
                value = write(state, token_ids[start + i])
                if sequence in corrupt:
                    value = -1
                self.slots[self.slot(table, context_len + i)] = value
                state = read(state, value)
                mine.append(state)
            states.append(mine)
            start += query_len
        assert start == len(plan.token_ids)
        last = [states[row.sequence][-1] for row in plan.samples]
        self.sampled = [sample(*pair) for pair in zip(last, plan.samples, strict=True)]
        return StepResult(
            samples=[
                Sampled(None) if row.sequence in corrupt else sampled(state, row)
                for state, row in zip(last, plan.samples, strict=True)
            ],
            prompts=[
                PromptScores(
                    [
                        TokenLogprobs(target, float(state), [])
                        for target, state in zip(row.targets, states[row.sequence], strict=False)
                    ]
                    if row.logprobs is not None
                    else [],
                    b"".join(
                        state.to_bytes(8, "big", signed=True) for state in states[row.sequence]
                    )
                    if row.logits
                    else b"",
                )
                for row in plan.prompts
            ],
        )
