"""The sampler draws from exactly the requested distribution, for each row separately.

All tests run for both kinds of sums: in float64 as on CPUs and GPUs, and in integers as on NPUs.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace as replace_row
from torch import Tensor

from moespan.device import CPU, DEVICES
from moespan.engine import sampler
from moespan.engine.sampler import token_logprobs
from moespan.engine.step import Sampled, SampleRow

# 99.9 % quantile of the chi-square distribution, by degrees of freedom.
CHI_SQUARE = {5: 20.5, 8: 26.1}


@pytest.fixture(autouse=True, scope="module", params=[False, True], ids=["float64", "integers"])
def in_integers(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether this CPU sums the distribution in integers, as an NPU does."""
    with patch.dict(DEVICES, cpu=replace(CPU, samples_in_integers=request.param)):
        yield request.param


float64_only = pytest.mark.parametrize("in_integers", [False], indirect=True, scope="module")
integers_only = pytest.mark.parametrize("in_integers", [True], indirect=True, scope="module")


class Draw(SampleRow, frozen=True, array_like=True, kw_only=True):
    """A row, and the position at which it samples."""

    position: int = 0


def row(**settings: Any) -> Draw:
    """A draw at temperature 1 from the whole distribution, unless `settings` say otherwise."""
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0}
    return Draw(**{**neutral, **settings})


def sample(logits: Tensor, rows: list[Draw]) -> list[Sampled]:
    return sampler.sample(logits, list(rows), [each.position for each in rows])


def choose(logits: Tensor | list[float], **settings: Any) -> int | None:
    (sampled,) = sample(torch.as_tensor(logits, dtype=torch.float32)[None], [row(**settings)])
    return sampled.token_id


def draws(logits: list[float], rows: list[Draw]) -> list[int]:
    """One token for each of `rows`, all from the same logits."""
    sampled = sample(torch.tensor(logits).expand(len(rows), -1), rows)
    tokens = [entry.token_id for entry in sampled]
    assert None not in tokens
    return tokens  # type: ignore[return-value]


def chi_square(tokens: list[int], probabilities: np.ndarray) -> float:
    expected = probabilities * len(tokens)
    counts = np.bincount(tokens, minlength=len(probabilities))
    return float(((counts - expected) ** 2 / expected).sum())


def softmax(logits: list[float] | np.ndarray, temperature: float = 1.0) -> np.ndarray:
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def test_temperature_zero_takes_the_best_token_with_any_other_settings():
    logits = [0.1, 3.0, 2.9, -1.0]
    assert choose(logits, temperature=0.0) == 1
    assert choose(logits, temperature=0.0, top_k=3, top_p=0.5, min_p=0.1, seed=7) == 1


LOGITS = [0.3, -1.0, 1.2, 0.0, -0.4, 0.9]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("varied", ["position", "seed"])
def test_draws_follow_the_softmax_at_the_temperature(temperature: float, varied: str):
    tokens = draws(LOGITS, [row(temperature=temperature, **{varied: i}) for i in range(6000)])
    assert chi_square(tokens, softmax(LOGITS, temperature)) < CHI_SQUARE[5]


def test_truncated_draws_follow_the_rest_of_the_distribution():
    tokens = draws([*LOGITS, -3.0, -4.0], [row(position=i, top_k=6) for i in range(6000)])
    assert chi_square(tokens, softmax(LOGITS)) < CHI_SQUARE[5]


def test_draws_at_neighbouring_positions_are_independent():
    logits = [0.0, 0.5, -0.5]
    tokens = draws(logits, [row(position=i, seed=11) for i in range(9001)])
    pairs = [3 * first + second for first, second in itertools.pairwise(tokens)]
    probabilities = softmax(logits)
    assert chi_square(pairs, np.outer(probabilities, probabilities).ravel()) < CHI_SQUARE[8]


def naive_kept(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> set[int]:
    """Tokens that may be drawn: min_p and top_k first, then top_p of the remaining mass."""
    probabilities = softmax(logits, temperature)
    order = sorted(range(len(logits)), key=lambda token: (-probabilities[token], token))
    threshold = min_p * probabilities.max()
    assume(all(abs(p - threshold) > 1e-6 or min_p in (0, 1) for p in probabilities))
    order = [token for token in order if probabilities[token] >= threshold]
    if top_k > 0:
        order = order[:top_k]
    total = sum(probabilities[token] for token in order)
    kept, mass = set(), 0.0
    for token in order:
        assume(top_p == 1 or abs(mass - top_p) > 1e-6)
        if top_p == 1 or mass < top_p:
            kept.add(token)
        mass += probabilities[token] / total
    return kept


@given(
    logits=st.lists(st.integers(-6, 6).map(lambda n: n / 4), min_size=1, max_size=8),
    temperature=st.sampled_from([1.0, 1.7]),
    top_k=st.sampled_from([-1, 0, 1, 2, 3, 5, 8, 100]),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0)),
)
def test_top_k_top_p_and_min_p_keep_exactly_the_right_tokens(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
):
    settings: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    settings["temperature"] = temperature
    expected = naive_kept(logits, **settings)
    # No token is rarer than 1 in 160, so that each shows up among so many.
    assert set(draws(logits, [row(position=i, **settings) for i in range(3000)])) == expected


def test_top_p_applies_to_the_mass_that_top_k_leaves():
    # Half of the mass is the best token's among the best two, not among all.
    logits = [1.0, 0.9, *[0.8] * 30]
    tokens = draws(logits, [row(position=i, top_k=2, top_p=0.5) for i in range(50)])
    assert set(tokens) == {0}


def kept_in_order(logits: Tensor, each: Draw) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of float32 logits [V] in order, 0 where a token is not kept, and their ids."""
    temperature = max(each.temperature, 1e-6)
    ordered, order = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    best = ordered[0].clone()
    if each.top_k > 0:
        ordered[each.top_k :] = 0
    ordered[ordered < best * each.min_p] = 0
    kept = ordered.double().numpy()
    is_partial = 0 < each.top_k < len(kept) or each.min_p > 0
    if each.top_p < 1:
        mass_before = np.concatenate([[0.0], kept.cumsum()[:-1]])
        share = float(np.float32(each.top_p)) * (kept.cumsum()[-1] if is_partial else 1.0)
        kept[1:][mass_before[1:] >= share] = 0
    return kept, order.numpy()


def full_sort_draw(logits: Tensor, each: Draw) -> int:
    """The token of a truncated draw from float32 logits [V], by sorting the whole vocabulary."""
    kept, order = kept_in_order(logits, each)
    mass = kept.cumsum()
    target = sampler._uniform(each.seed, each.position) * mass[-1]
    return int(order[np.searchsorted(mass, target, side="right")])


@float64_only
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.integers(1, 3000),
    scale=st.sampled_from([0.0, 0.3, 2.0, 5.0, 40.0]),
    # Few different values, as in bfloat16, make ties, also where candidates end.
    step=st.sampled_from([0.0, 1 / 16, 1.0]),
    first=st.sampled_from([1, 2, 30, 256]),
    growth=st.sampled_from([2, 32]),
)
def test_candidates_give_the_token_that_sorting_the_vocabulary_gives(
    seed: int, vocab_size: int, scale: float, step: float, first: int, growth: int
):
    rng = random.Random(seed)
    logits = torch.randn(24, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    if step:
        logits = (logits / step).round() * step
    rows = [
        row(
            temperature=rng.choice([0.3, 1.0, 1.5]),
            top_k=rng.choice([0, 0, 1, 5, first, first + 1, 300]),
            top_p=rng.choice([1.0, 0.1, 0.5, 0.95, 0.9999]),
            min_p=rng.choice([0.0, 0.0, 0.02, 0.3, 1.0]),
            seed=rng.getrandbits(62),
        )
        for _ in logits
    ]
    rows = [each for each in rows if sampler._is_truncated(each)]
    expected = [full_sort_draw(*pair) for pair in zip(logits, rows, strict=False)]
    with patch.multiple(sampler, _FIRST_CANDIDATES=first, _GROWTH=growth):
        assert [one.token_id for one in sample(logits[: len(rows)], rows)] == expected
    # The path of a device, where the host does not ask whether candidates suffice.
    with patch.object(sampler, "on_host", lambda tensor: False):
        assert [one.token_id for one in sample(logits[: len(rows)], rows)] == expected


@integers_only
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.integers(1, 3000),
    scale=st.sampled_from([0.0, 0.3, 2.0, 5.0, 40.0]),
    step=st.sampled_from([0.0, 1 / 16, 1.0]),
)
def test_integers_keep_the_tokens_that_sorting_the_vocabulary_keeps(
    seed: int, vocab_size: int, scale: float, step: float
):
    rng = random.Random(seed)
    logits = torch.randn(24, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    if step:
        logits = (logits / step).round() * step
    rows = [
        row(
            temperature=rng.choice([0.3, 1.0, 1.5]),
            top_k=rng.choice([1, 5, 30, 300, 1025]),
            min_p=rng.choice([0.0, 0.0, 0.02, 0.3, 1.0]),
            top_p=rng.choice([1.0, 0.1, 0.5, 0.95]),
            seed=rng.getrandbits(62),
        )
        for _ in logits
    ]
    for sampled, values, each in zip(sample(logits, rows), logits, rows, strict=True):
        kept, order = kept_in_order(values, each)
        mass = kept.cumsum() / kept.sum()
        assert sampled.token_id is not None
        place = order.tolist().index(sampled.token_id)
        # Rounding to 2⁻³⁰ may move the place at which top_p ends, not more.
        assert kept[place] > 0 or abs(mass[place - 1] - 1) < 1e-5


@integers_only
def test_rows_of_a_small_top_k_are_not_sorted(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the vocabulary was sorted")

    monkeypatch.setattr(sampler, "_draw_of_sorted", refuse)
    rows = [row(position=i, top_k=k, top_p=0.9) for i, k in enumerate([1, 7, 1024])]
    assert len(sample(torch.randn(3, 5000), rows)) == 3


@integers_only
def test_a_draw_in_integers_by_example():
    # Weights 2²⁹, 2²⁸, 2²⁸ of 2³⁰: half of the 31-bit numbers modulo 2³⁰ draw the first token.
    logits = [math.log(0.5), math.log(0.25), math.log(0.25)]
    expected = []
    for position in range(200):
        number = int(sampler._uniform(9, position) * 2**31) % 2**30
        expected.append(0 if number < 2**29 else 1 if number < 3 * 2**28 else 2)
    rows = [row(seed=9, position=position) for position in range(200)]
    assert draws(logits, rows) == expected


@integers_only
def test_unlikely_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should():
    # One token has half of the mass, 100,000 share the other half.
    logits = torch.zeros(100_001)
    logits[0] = math.log(100_000)
    tokens = [
        one.token_id
        for one in sample(logits.expand(400, -1), [row(position=i) for i in range(400)])
    ]
    firsts = sum(token == 0 for token in tokens)
    assert 150 < firsts < 250
    rest = [token for token in tokens if token]
    assert len(set(rest)) > 0.95 * len(rest)
    assert 35_000 < sum(rest) / len(rest) < 65_000


@float64_only
def test_rows_that_are_settled_early_are_not_drawn_again():
    looked_at = []

    def spy(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
        looked_at.append((len(probabilities), count))
        return best(probabilities, count)

    best = sampler._best
    logits = torch.zeros(3, 20000)
    logits[:2, 77] = 30.0
    rows = [row(top_p=0.9), row(min_p=0.1), row(top_p=0.2)]
    with patch.object(sampler, "_best", spy):
        assert [one.token_id for one in sample(logits, rows)][:2] == [77, 77]
    assert looked_at == [(3, 256), (1, 8192), (1, 20000)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_logits_are_sampled_by_their_exact_values(dtype: torch.dtype):
    rng = random.Random(3)
    logits = torch.randn(200, 400, generator=torch.Generator().manual_seed(3)).to(dtype)
    rows = [random_row(rng, 400) for _ in logits]
    # So coarse that several logits are often the best.
    coarse = logits.round()
    assert sample(logits, rows) == sample(logits.float(), rows)
    assert sample(coarse, rows) == sample(coarse.float(), rows)
    firsts = [values.index(max(values)) for values in coarse.tolist()]
    assert [one.token_id for one in sample(coarse, [row(temperature=0.0)] * 200)] == firsts


def mask(token_ids: Iterable[int], vocab_size: int) -> bytes:
    """The set of these tokens as rows have it."""
    return sum(1 << token for token in set(token_ids)).to_bytes(-(-vocab_size // 8), "little")


@pytest.mark.parametrize("vocab_size", [1, 7, 8, 9, 1000, 2501])
@pytest.mark.parametrize("all_rows", [True, False])
def test_a_mask_is_the_same_as_barring_all_other_tokens(vocab_size: int, all_rows: bool):
    rng = random.Random(vocab_size)
    logits = torch.randn(60, vocab_size, generator=torch.Generator().manual_seed(1))
    masked, barred = [], []
    for number in range(60):
        plain = replace_row(random_row(rng, vocab_size), barred=[], allowed=None)
        allowed = rng.sample(range(vocab_size), rng.randint(1, vocab_size))
        if not all_rows and number % 3:
            masked.append(plain)
            barred.append(plain)
            continue
        others = sorted(set(range(vocab_size)) - set(allowed))
        masked.append(replace_row(plain, allowed=mask(allowed, vocab_size)))
        barred.append(replace_row(plain, barred=others))
    found = sample(logits, masked)
    assert found == sample(logits, barred)
    for sampled, each in zip(found, masked, strict=True):
        if each.allowed is not None and sampled.token_id is not None:
            assert each.allowed[sampled.token_id // 8] >> sampled.token_id % 8 & 1


def test_log_probabilities_are_those_without_a_mask():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    allowed = mask([2], 3)
    for temperature in (0.0, 1.0):
        each = row(temperature=temperature, allowed=allowed, logprobs=1)
        (sampled,) = sample(logits, [each])
        assert sampled.token_id == 2 and sampled.logprobs is not None
        logprobs = logits.log_softmax(-1)[0]
        assert sampled.logprobs.logprob == pytest.approx(float(logprobs[2]))
        assert [token for token, _ in sampled.logprobs.top] == [0]


def random_row(rng: random.Random, vocab_size: int) -> Draw:
    def some_tokens(most: int) -> list[int]:
        return rng.sample(range(vocab_size), rng.randint(0, min(most, vocab_size)))

    return row(
        temperature=rng.choice([0.0, 0.5, 1.0, 2.0]),
        top_k=rng.choice([0, 0, -1, 1, 5, 1000]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.3]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        seed=rng.getrandbits(62),
        position=rng.randrange(5000),
        repetition_penalty=rng.choice([1.0, 1.3, 0.8]),
        presence_penalty=rng.choice([0.0, 0.7, -0.7]),
        frequency_penalty=rng.choice([0.0, 0.4, -0.4]),
        seen_prompt=rng.choice([[], some_tokens(9)]),
        seen_output=rng.choice([{}, {token: rng.randint(1, 4) for token in some_tokens(9)}]),
        logit_bias=rng.choice([{}, {token: rng.uniform(-9, 9) for token in some_tokens(4)}]),
        barred=rng.choice([[], some_tokens(5)]),
        allowed=rng.choice([None, None, mask({0, *some_tokens(20)}, vocab_size)]),
        logprobs=rng.choice([None, 0, 3]),
    )


def test_a_row_gets_the_same_token_in_any_batch():
    rng = random.Random(5)
    logits = torch.randn(300, 50, generator=torch.Generator().manual_seed(5)) * 2
    rows = [random_row(rng, 50) for _ in logits]
    alone = [sample(logits[i : i + 1], [each])[0] for i, each in enumerate(rows)]
    assert sample(logits, rows) == alone
    for _ in range(20):
        batch = rng.sample(range(len(rows)), rng.randint(2, 12))
        assert sample(logits[batch], [rows[i] for i in batch]) == [alone[i] for i in batch]


def test_other_seeds_and_positions_give_other_tokens():
    flat = [0.0] * 1000
    first = draws(flat, [row(seed=1, position=i) for i in range(20)])
    assert first == draws(flat, [row(seed=1, position=i) for i in range(20)])
    assert len(set(first)) > 15
    assert first != draws(flat, [row(seed=2, position=i) for i in range(20)])


def naive_adjusted(logits: list[float], each: Draw) -> list[float]:
    adjusted = list(logits)
    for token, bias in each.logit_bias.items():
        adjusted[token] += bias
    for token in {*each.seen_prompt, *each.seen_output}:
        penalty = each.repetition_penalty
        adjusted[token] *= 1 / penalty if adjusted[token] > 0 else penalty
    for token, count in each.seen_output.items():
        adjusted[token] -= each.presence_penalty + count * each.frequency_penalty
    for token in each.barred:
        adjusted[token] = -np.inf
    if each.allowed is not None:
        allowed = np.unpackbits(np.frombuffer(each.allowed, np.uint8), bitorder="little")
        adjusted = [x if allowed[token] else -np.inf for token, x in enumerate(adjusted)]
    return adjusted


def test_bias_penalties_bars_and_masks_change_the_logits_by_their_formula():
    rng = random.Random(8)
    rows, logits = [], []
    for _ in range(400):
        each = random_row(rng, 12)
        rows.append(row(**{**as_settings(each), "temperature": 0.0}))
        logits.append([rng.uniform(-2, 2) for _ in range(12)])
    expected = [int(np.argmax(naive_adjusted(*pair))) for pair in zip(logits, rows, strict=True)]
    tokens = [entry.token_id for entry in sample(torch.tensor(logits), rows)]
    assert tokens == expected
    plain = torch.tensor(logits).argmax(-1).tolist()
    assert sum(ours != before for ours, before in zip(tokens, plain, strict=True)) > 100


def as_settings(each: Draw) -> dict[str, Any]:
    return {name: getattr(each, name) for name in each.__struct_fields__}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"seen_prompt": [0], "repetition_penalty": 2.0}, 1),  # 2.0 / 2 < 1.5
        ({"seen_prompt": [0, 1], "repetition_penalty": 2.0}, 0),  # 1.0 > 0.75
        ({"seen_output": {0: 1}, "presence_penalty": 0.6}, 1),
        ({"seen_output": {0: 5}, "presence_penalty": 0.4}, 0),  # once, not five times
        ({"seen_output": {0: 5}, "frequency_penalty": 0.2}, 1),  # five times
        ({"seen_prompt": [0], "presence_penalty": 2.0, "frequency_penalty": 2.0}, 0),  # output only
        ({"logit_bias": {2: 3.1}}, 2),
        ({"barred": [0]}, 1),
        ({"barred": [2], "logit_bias": {2: 100.0}}, 0),
    ],
)
def test_penalties_and_biases_by_example(settings: dict[str, Any], expected: int):
    assert choose([2.0, 1.5, -1.0], temperature=0.0, **settings) == expected


def test_negative_logits_are_multiplied_by_the_repetition_penalty():
    settings = {"temperature": 0.0, "seen_output": {0: 1}, "repetition_penalty": 3.0}
    assert choose([-1.0, -2.0], **settings) == 1
    assert choose([-1.0, -4.0], **settings) == 0


def test_the_given_logits_are_not_changed():
    logits = torch.randn(2, 9)
    before = logits.clone()
    sample(logits, [row(barred=[1], logit_bias={2: 5.0}, top_k=2), row()])
    assert torch.equal(logits, before)


def test_logprobs_are_of_the_raw_distribution_and_include_the_token():
    logits = [0.5, 2.0, 1.0, -1.0]
    settings = {
        "temperature": 0.1,
        "top_k": 1,
        "barred": [1],
        "logit_bias": {3: 50.0},
        "seen_output": {2: 1},
        "logprobs": 2,
    }
    (sampled,) = sample(torch.tensor([logits]), [row(**settings)])
    raw = np.log(softmax(logits))
    assert sampled.token_id == 3
    assert sampled.logprobs is not None
    assert sampled.logprobs.token_id == 3
    assert sampled.logprobs.logprob == pytest.approx(raw[3], abs=1e-6)
    assert [token for token, _ in sampled.logprobs.top] == [1, 2]
    assert [value for _, value in sampled.logprobs.top] == pytest.approx([raw[1], raw[2]], abs=1e-6)


def test_every_row_gets_as_many_logprobs_as_it_asked_for():
    rows = [row(logprobs=count) for count in (None, 0, 1, 5)]
    sampled = sample(torch.randn(4, 30, generator=torch.Generator().manual_seed(0)), rows)
    assert sampled[0].logprobs is None
    tops = [entry.logprobs.top for entry in sampled if entry.logprobs is not None]
    assert [len(top) for top in tops] == [0, 1, 5]


def test_no_more_logprobs_than_the_vocabulary_has_tokens():
    (scores,) = token_logprobs(torch.tensor([[1.0, 2.0, 0.0]]), [2], num_top=20)
    assert [token for token, _ in scores.top] == [1, 0, 2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_gets_no_token_and_others_are_unaffected(
    bad: float, temperature: float
):
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    rows = [row(temperature=temperature, position=i, top_p=0.9, logprobs=1) for i in range(3)]
    healthy = sample(logits, rows)
    logits[1, 7] = bad
    sampled = sample(logits, rows)
    assert (sampled[1].token_id, sampled[1].logprobs) == (None, None)
    assert [sampled[0], sampled[2]] == [healthy[0], healthy[2]]


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-45, 5e-324])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_a_tiny_temperature_is_greedy(temperature: float, truncation: dict[str, Any]):
    logits = [-30.0, 25.0, 24.9, 3.0]
    rows = [row(temperature=temperature, position=i, **truncation) for i in range(50)]
    assert set(draws(logits, rows)) == {1}


@pytest.mark.parametrize("top_k", [-1, 0, 3, 4, 10**6])
def test_a_top_k_beyond_the_vocabulary_keeps_all(top_k: int):
    rows = [row(position=i, top_k=top_k) for i in range(200)]
    assert set(draws([0.0, 0.0, 0.0], rows)) == {0, 1, 2}


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 2}, {"top_p": 0.01}, {"min_p": 1.0}, {"temperature": 0.0}]
)
def test_the_only_token_that_is_not_barred_is_taken(settings: dict[str, Any]):
    for position in range(20):
        barred = [0, 1, 2, 4]
        assert choose([9.0, 8.0, 7.0, -9.0, 6.0], barred=barred, position=position, **settings) == 3


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-52])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 4}])
def test_a_token_of_no_probability_is_never_drawn(
    monkeypatch: pytest.MonkeyPatch, uniform: float, truncation: dict[str, Any]
):
    monkeypatch.setattr(sampler, "_uniform", lambda seed, position: uniform)
    assert choose([-1000.0, 0.0, -1000.0, 0.0, -1000.0], **truncation) in (1, 3)


def test_no_rows_give_no_tokens():
    assert sample(torch.empty(0, 10), []) == []
