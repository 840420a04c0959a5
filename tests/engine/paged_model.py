"""A model for tests of scheduling: a hash that reads and writes a real cache.

The value it writes for a token depends on all values before it, and a sample depends on all values
it reads. So a block that is shared wrongly, stale, or not recomputed changes the output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set as AbstractSet

from moespan.engine.constraints import Constraint
from moespan.engine.request import Request, TokenLogprobs
from moespan.engine.step import PromptScores, Sampled, SampleRow, StepPlan, StepResult
from moespan.errors import RequestError

VOCAB = 11
EOS = 0
START = 1  # the state before the first token


def write(state: int, token_id: int) -> int:
    """The keys and values of a token, given the state before it."""
    return hash((state, token_id))


def read(state: int, value: int) -> int:
    return hash((state, value, 2))


def sample(state: int, row: SampleRow, position: int) -> int:
    """The token that the model draws."""
    seen = (tuple(row.seen_prompt), tuple(sorted(row.seen_output.items())))
    draw = hash((state, row.seed, position, seen))
    allowed = [token_id for token_id in range(VOCAB) if may_come(token_id, row)]
    return allowed[draw % len(allowed)]


def may_come(token_id: int, row: SampleRow) -> bool:
    """Whether the row rules a token out."""
    is_allowed = row.allowed is None or row.allowed[token_id // 8] >> token_id % 8 & 1
    return bool(is_allowed) and token_id not in row.barred


def by_grammar(output: tuple[int, ...]) -> set[int]:
    """The tokens that may follow `output` in a grammar that all of the output decides."""
    draw = hash((output, 3))
    if output and draw % 13 == 0:
        raise RequestError(f"the grammar fails after {len(output)} tokens")
    if output and draw % 7 == 0:
        return {EOS}
    follows = {token for token in range(1, VOCAB) if hash((output, token)) % 3} or {1}
    return follows | {EOS} if draw % 2 else follows


class FakeMatcher:
    """The state of one continuation in that grammar."""

    def __init__(self, output: tuple[int, ...] = ()) -> None:
        self.output = output

    def copy(self) -> FakeMatcher:
        return FakeMatcher(self.output)

    def accept(self, token_id: int) -> None:
        assert token_id in by_grammar(self.output), "a token that was ruled out"
        self.output = (*self.output, token_id)

    def allowed(self) -> bytes:
        return as_mask(by_grammar(self.output))


def as_mask(token_ids: AbstractSet[int]) -> bytes:
    return sum(1 << token_id for token_id in token_ids).to_bytes(-(-VOCAB // 8), "little")


def runs(request: Request) -> list[list[int]]:
    """The bad words of a request; the words of these tests are token ids with spaces between."""
    return [[int(token) for token in word.split()] for word in request.params.bad_words]


def constraint_of(request: Request, grammar: bool) -> Constraint | None:
    matcher = FakeMatcher() if grammar else None
    if matcher is None and not request.params.constrains:
        return None
    return Constraint(request.params, VOCAB, frozenset({EOS}), runs(request), matcher)


def sampled(state: int, row: SampleRow, position: int) -> Sampled:
    token_id = sample(state, row, position)
    logprobs = None if row.logprobs is None else TokenLogprobs(token_id, float(state), [])
    return Sampled(token_id, logprobs)


def expected_states(token_ids: list[int]) -> list[int]:
    """The state of the model after each token."""
    states, state = [], START
    for token_id in token_ids:
        state = read(state, write(state, token_id))
        states.append(state)
    return states


def allowed_after(request: Request, output: list[int], grammar: bool) -> set[int]:
    """The tokens that may follow `output`; raises where the grammar fails."""
    params = request.params
    may_stop = len(output) >= params.min_tokens
    ends = {*params.stop_token_ids} | (set() if params.ignore_eos else {EOS})
    allowed = by_grammar(tuple(output)) if grammar else set(range(VOCAB))
    if grammar and (params.ignore_eos or not may_stop):
        allowed -= {EOS}
    if params.allowed_token_ids is not None:
        allowed &= set(params.allowed_token_ids)
    for *beginning, last in runs(request):
        if output[len(output) - len(beginning) :] == beginning:
            allowed -= {last}
    return allowed if may_stop else allowed - ends


def expected_output(
    request: Request, index: int, max_model_len: int, seed: int = 0, grammar: bool = False
) -> list[int]:
    """Continue a request alone, without cache and scheduler."""
    params = request.params
    output: list[int] = []
    first_seed = seed if params.seed is None else params.seed
    eos = [] if params.ignore_eos else [EOS]
    room = max_model_len - len(request.prompt_token_ids)
    most = room if params.max_tokens is None else min(room, params.max_tokens)
    while len(output) < most:
        repeats = params.repetition_penalty != 1
        row = SampleRow(
            temperature=1,
            top_p=1,
            top_k=0,
            min_p=0,
            seed=first_seed + index,
            seen_prompt=sorted(set(request.prompt_token_ids)) if repeats else [],
            seen_output=Counter(output) if params.penalizes else {},
            allowed=as_mask(allowed_after(request, output, grammar)),
        )
        state = expected_states(request.prompt_token_ids + output)[-1]
        output.append(sample(state, row, len(output)))
        if output[-1] in eos + params.stop_token_ids:
            break
        try:
            rest = allowed_after(request, output, grammar)
        except RequestError:
            break
        if not rest - {EOS} and (not rest or grammar):
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
        last = [states[sequence][-1] for sequence in plan.sampled]
        asked = list(zip(last, plan.samples, plan.positions, strict=True))
        self.sampled = [sample(*one) for one in asked]
        return StepResult(
            samples=[
                Sampled(None) if sequence in corrupt else sampled(*one)
                for sequence, one in zip(plan.sampled, asked, strict=True)
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
