"""What layouts can carry: throughput and latency with ever more sequences, by mean values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from moespan.search.candidates import Candidate
from moespan.search.explore import Answer, Found, Question, cost_of
from moespan.search.screen import Estimate, Screen


class Curve(NamedTuple):
    """A candidate with ever more sequences, by mean values."""

    candidate: Candidate
    estimates: list[Estimate]


def curves(question: Question, answer: Answer) -> list[Curve]:
    """How throughput and latency go together in the most promising layouts, in their largest
    settings."""
    largest: dict[tuple[object, ...], Found] = {}
    for one in answer.screened:
        config = one.candidate.config
        key = one.candidate.engines, config.layout, config.quantization, config.kv_cache_dtype
        before = largest.get(key)
        if before is None and len(largest) == _MOST_CURVES:
            continue
        limits = config.max_num_seqs, config.max_num_batched_tokens
        if before is None or limits > _limits(before):
            largest[key] = one
    return [_curve(question, one.candidate) for one in largest.values()]


_MOST_CURVES = 40


def _limits(one: Found) -> tuple[int, int]:
    config = one.candidate.config
    return config.max_num_seqs, config.max_num_batched_tokens


def _curve(question: Question, candidate: Candidate) -> Curve:
    sweep = _screen(question, candidate).sweep(question.demand(candidate.engines))
    return Curve(candidate, [*sweep][::-1])


def _screen(question: Question, candidate: Candidate) -> Screen:
    return Screen(cost_of(question, candidate), candidate.config, candidate.num_blocks)


def capacity_of_all(question: Question, answer: Answer) -> float:
    """`capacity` of the layouts of `answer` in the settings that `question` allows. Of layouts that
    differ in their replicas only, the smallest engines stand for all: their leaders have least to
    do."""
    smallest: dict[tuple[object, ...], Found] = {}
    for one in answer.screened:
        config, layout = one.candidate.config, one.candidate.layout
        if not question.space.holds(one.candidate):
            continue
        limits = config.max_num_seqs, config.max_num_batched_tokens
        key = (*limits, layout.with_fewest_replicas, config.quantization, config.kv_cache_dtype)
        before = smallest.get(key)
        if before is None or layout.dp < before.candidate.layout.dp:
            smallest[key] = one
    return capacity(question, [one.candidate for one in smallest.values()])


def capacity(question: Question, candidates: Iterable[Candidate]) -> float:
    """Requests per second of all devices at the targets, by mean values: the best layout's."""
    best = 0.0
    for one in candidates:
        demand = question.demand(one.engines)
        found = _screen(question, one).capacity(demand, question.targets)
        if found.excess(question.targets) <= 0:
            best = max(best, one.engines * found.tokens_per_s)
    return best / question.demand(1).output_tokens
