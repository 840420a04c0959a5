"""The search: all candidates by mean values, the best ones by simulation, the first ones thrice.

Memory comes first. What fits is estimated by mean values (`screen`). The Pareto front over TTFT,
TPOT and tokens/s, and what is within 15 % of it, is simulated with the real scheduler. The
candidates that are shown are simulated twice more, with times that are longer and shorter by the
profile's error: a target that is met at one end only is at risk. Imports no torch.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from moespan.config import EngineConfig, Layout, ModelConfig
from moespan.errors import ConfigError
from moespan.planner.cost import Line, ReplicaStep, StepCost, Times
from moespan.planner.expert_load import Routing
from moespan.planner.load import Load, drawn
from moespan.planner.outcome import Outcome, RequestTimes, Statistic, Target
from moespan.planner.prices import BY_LINKS, BY_RATES
from moespan.planner.profile import WORST_ERROR, Profile
from moespan.planner.work import Chunk
from moespan.search.candidates import Candidate, Memories, Space, candidate_of, layouts
from moespan.search.jobs import run_all
from moespan.search.predict import Predicted, predict
from moespan.search.screen import Demand, Estimate, Periods, Screen

NEAR_FRONT = 0.15
MOST_SIMULATED = 16
_HOPELESS = 5.0
_LEAST_COUNTED = 200
_ROUNDS, _MOST_SEQUENCES, _LEAST_OF_A_TRACE = 4, 400, 4000


@dataclass(frozen=True)
class Question:
    """What a plan is asked.

    Attributes:
        load: of all engines together; None: as many requests as possible, of `lengths`.
        lengths: prompt and output lengths, as `moespan.planner.load.distribution` takes them, where
            there is no load.
        targets: latencies to meet.
        num_requests: requests of each simulation.
        num_shown: candidates that are shown, and simulated three times.
        fast: estimate only; simulate nothing.
        worst: take upper bounds of latencies that are guesses.
        smallest: of layouts that differ in their replicas only, estimate the smallest engines only.
        jobs: cores to use; None: all.
        clip_to: tokens of the longest sequence, where there is no load.
        clip: whether longer prompts are cut there; else they are refused.
        trace: the file that the load comes from; None: lengths are drawn.
        speed: how much faster than in that file requests come.
        tell: called about once a second with what is being done.
        times, memories: what questions about the same profile, model and routing share.
    """

    space: Space
    profile: Profile
    model: ModelConfig
    routing: Routing
    load: Load | None
    lengths: tuple[str, str] = ("1024", "256")
    targets: tuple[Target, ...] = ()
    num_requests: int = 1000
    num_shown: int = 5
    seed: int = 0
    fast: bool = False
    worst: bool = False
    smallest: bool = False
    jobs: int | None = None
    clip_to: int | None = None
    clip: bool = False
    trace: str | None = None
    speed: float = 1.0
    tell: Callable[[str], None] = field(default=lambda doing: None, compare=False, repr=False)
    times: Times = field(default_factory=Times, compare=False, repr=False)
    memories: Memories = field(default_factory=dict, compare=False, repr=False)

    @property
    def goal(self) -> str:
        """What is best: `latency` at a given rate, else `throughput`."""
        return "latency" if self.load is not None and self.load.rate is not None else "throughput"

    @property
    def most_engines(self) -> float:
        """Engines that have a request each."""
        concurrency = self.load.concurrency if self.load is not None else None
        return math.inf if concurrency is None else concurrency

    def demand(self, engines: int) -> Demand:
        """The means of one engine's load."""
        load = self.load or self.sample
        prompt, output = load.mean_prompt_tokens, load.mean_output_tokens
        if self.load is None:
            return Demand(prompt, output)
        if load.concurrency is not None:
            return Demand(prompt, output, concurrency=max(1, round(load.concurrency / engines)))
        return Demand(prompt, output, rate=(load.rate or 0.0) / engines)

    @functools.cached_property
    def sample(self) -> Load:
        """Requests of the asked lengths, all at once."""
        load = drawn(*self.lengths, self.num_requests, seed=self.seed)
        if self.clip_to is None:
            return load
        return load.fitting(self.clip_to, self.clip)


@dataclass
class Found:
    """A candidate and what is predicted of it.

    Attributes:
        estimate: by mean values.
        predicted: simulated, or estimated where nothing is simulated.
        fast, slow: the same with shorter and longer times; None if not computed.
    """

    candidate: Candidate
    estimate: Estimate
    predicted: Predicted | None = None
    fast: Predicted | None = None
    slow: Predicted | None = None

    @property
    def outcome(self) -> Outcome:
        """Of one engine."""
        assert self.predicted is not None
        return self.predicted.outcome

    @property
    def tokens_per_s(self) -> float:
        """Of all engines."""
        return self.candidate.engines * self.outcome.tokens_per_s

    @property
    def tokens_per_device(self) -> float:
        """Output tokens per second and device."""
        return self.outcome.tokens_per_s / self.candidate.layout.world_size

    def excess(self, targets: Sequence[Target]) -> float:
        """The largest relative excess over a target; 0 or less if all are met."""
        if self.outcome.is_cut and targets:
            return max(_HOPELESS, *(one.missed_by(self.outcome) for one in targets))
        return max((one.missed_by(self.outcome) for one in targets), default=-1.0)

    def at_risk(self, targets: Sequence[Target]) -> bool:
        """Whether longer times would miss a target that is met."""
        if self.slow is None or self.excess(targets) > 0:
            return False
        slow = self.slow.outcome
        return slow.is_cut or any(one.missed_by(slow) > 0 for one in targets)


@dataclass
class Answer:
    """What a search found.

    Attributes:
        found: simulated candidates, the best first.
        num_layouts, num_settings, num_fitting, num_simulated: how much was looked at.
        screened: estimates of all that fit, for the front's picture.
    """

    question: Question
    found: list[Found]
    num_layouts: int
    num_settings: int
    num_combinations: int
    num_fitting: int
    num_simulated: int
    screened: list[Found] = field(default_factory=list)

    @property
    def met(self) -> bool:
        """Whether some candidate meets all targets."""
        return any(one.excess(self.question.targets) <= 0 for one in self.found)

    @property
    def shown(self) -> list[Found]:
        """The candidates to show: the best setting of each layout and quantization."""
        best: dict[tuple[object, ...], Found] = {}
        for one in self.found:
            config = one.candidate.config
            key = one.candidate.engines, config.layout, config.quantization, config.kv_cache_dtype
            best.setdefault(key, one)
        return list(best.values())[: self.question.num_shown]

    def too_close(self, one: Found) -> bool:
        """Whether a candidate's figures differ from the first one's by less than their
        intervals."""
        best = self.found[0]
        if one is best or one.predicted is None or one.predicted.is_estimate:
            return False
        if self.question.goal == "throughput":
            return one.tokens_per_s >= 0.98 * best.tokens_per_s
        return all(
            _overlap(target.of(one.outcome), target.of(best.outcome))
            for target in self.question.targets or (Target("tpot", "mean", 1.0),)
        )


def cost_of(question: Question, candidate: Candidate) -> StepCost:
    """The step times of a candidate's engines."""
    here = min(candidate.engines * candidate.layout.world_size, question.profile.devices_per_node)
    return StepCost(
        question.profile,
        question.model,
        candidate.config,
        question.routing,
        ranks_per_node=here,
        worst=question.worst,
        times=question.times,
    )


def explore(question: Question) -> Answer:
    """Answer a question; the same question gets the same answer."""
    screened = _screened(question)
    chosen = _promising(question, screened.found)
    if question.fast:
        for one in chosen:
            one.predicted = _as_predicted(question, one)
    else:
        simulated = _simulated(question, chosen, [1.0] * len(chosen))
        for one, predicted in zip(chosen, simulated, strict=True):
            one.predicted = predicted
    found = sorted(chosen, key=lambda one: _rank(question, one))
    answer = Answer(
        question,
        found,
        num_layouts=screened.num_layouts,
        num_settings=question.space.num_settings,
        num_combinations=screened.num_combinations,
        num_fitting=len(screened.found),
        num_simulated=0 if question.fast else len(chosen),
        screened=screened.found,
    )
    if not question.fast:
        _add_bands(question, answer.shown)
    return answer


def simulated_one(question: Question, one: Found) -> Found:
    """`one` with a simulation instead of its estimate."""
    return replace(one, predicted=_simulate(question, one, 1.0))


def typical_step(question: Question, one: Found) -> list[ReplicaStep]:
    """A decode step of each replica, as full as it is on average."""
    demand = question.demand(one.candidate.engines)
    layout = one.candidate.layout
    number = max(1, round(one.estimate.sequences / layout.pp))
    context = demand.prompt_tokens + demand.output_tokens / 2
    return [ReplicaStep(number, number, number, int(number * context))] * layout.dp


def prefill_step(question: Question, one: Found) -> list[ReplicaStep]:
    """A step in which the first replica computes a mean prompt and nothing else happens."""
    demand = question.demand(one.candidate.engines)
    tokens = int(min(demand.prompt_tokens, one.candidate.config.max_num_batched_tokens))
    prompt = ReplicaStep(tokens, 1, 0, 0, (Chunk(tokens, 0),))
    idle = ReplicaStep(0, 0, 0, 0)
    return [prompt, *[idle] * (one.candidate.layout.dp - 1)]


def unmeasured(question: Question, one: Found) -> list[str]:
    """Parts of a candidate's steps that come from rates and latencies instead of measured curves,
    the longest first. Parts that take 2 % of both steps or less together do not count."""
    cost = cost_of(question, one.candidate)
    lines = [
        *cost.lines(typical_step(question, one)),
        *cost.lines(prefill_step(question, one)),
    ]
    lines.sort(key=lambda line: -line.seconds)
    by_formula = [line for line in lines if line.source in (BY_RATES, BY_LINKS)]
    if sum(line.seconds for line in by_formula) <= 0.02 * sum(line.seconds for line in lines):
        return []
    return list(dict.fromkeys(line.part for line in by_formula))


def relative_error(question: Question, one: Found) -> float:
    """Relative error of a candidate's times: that of the profile, if it measured what the candidate
    needs."""
    profile = question.profile
    if profile.error is None and profile.is_calibrated and unmeasured(question, one):
        return WORST_ERROR
    return profile.relative_error


def shares(lines: Sequence[Line]) -> dict[str, float]:
    """Shares of a step: experts, attention, other operations, collectives, host."""
    sums: dict[str, float] = {}
    for line in lines:
        kind = line.kind
        if kind == "operation":
            kind = "experts" if line.part == "moe.experts" else "other operations"
            kind = "attention" if line.part == "attention" else kind
        sums[kind] = sums.get(kind, 0.0) + line.seconds
    total = sum(sums.values()) or 1.0
    return {kind: seconds / total for kind, seconds in sorted(sums.items(), key=lambda s: -s[1])}


class _Screened(NamedTuple):
    """Candidates with their estimates, the best first, and how many combinations were tried."""

    found: list[Found]
    num_layouts: int
    num_combinations: int


def _screened(question: Question) -> _Screened:
    """Estimates of what fits.

    Layouts that differ in their replicas only are a family. A replica does the same in all of them,
    and waits for fewer others in the smallest engines, whose leaders have least to do. So these
    stand for their family first, and only the best families are looked at as a whole.
    """
    pairs = layouts(question.space, question.model, question.profile)
    fewest = min((engines for engines, _ in pairs), default=0)
    most = max(fewest, question.most_engines)
    pairs = [(engines, layout) for engines, layout in pairs if engines <= most]
    settings = list(question.space.settings(Layout()))
    if not settings:
        raise ConfigError("each of --max-num-seqs exceeds each of --max-num-batched-tokens")
    smallest: dict[Layout, tuple[int, Layout]] = {}
    for pair in pairs:  # the smallest engines come first
        smallest.setdefault(pair[1].with_fewest_replicas, pair)
    found, number = _in_settings(question, list(smallest.values()), settings)
    if not question.smallest:
        near = _near_front(question, found)
        families = dict.fromkeys(one.candidate.layout.with_fewest_replicas for one in near)
        best = set(itertools.islice(families, _MOST_FAMILIES))
        first = set(smallest.values())
        others = [one for one in pairs if one[1].with_fewest_replicas in best and one not in first]
        if others:
            found += _estimated(question, others, settings)
            number += len(others) * len(settings)
    found.sort(key=lambda one: _estimated_rank(question, one))
    return _Screened(found, len(pairs), number)


def _in_settings(
    question: Question, pairs: Sequence[tuple[int, Layout]], settings: Sequence[EngineConfig]
) -> tuple[list[Found], int]:
    """Estimates of `pairs`, and how many combinations were tried. Where there are very many, all
    layouts get the middle setting, and only the best ones the others."""
    if len(pairs) * len(settings) <= _MOST_COMBINATIONS:
        return _estimated(question, pairs, settings), len(pairs) * len(settings)
    middle = settings[len(settings) // 2]
    found = _estimated(question, pairs, [middle])
    found.sort(key=lambda one: _estimated_rank(question, one))
    best = [(one.candidate.engines, one.candidate.layout) for one in found[:_MOST_PAIRS]]
    others = [one for one in settings if one != middle]
    found += _estimated(question, best, others)
    return found, len(pairs) + len(best) * len(others)


_MOST_COMBINATIONS, _MOST_PAIRS, _MOST_FAMILIES = 6000, 64, 12
_PARTS, _FEW = 32, 24


def _estimated(
    question: Question, pairs: Sequence[tuple[int, Layout]], settings: Sequence[EngineConfig]
) -> list[Found]:
    """Estimates of the layouts `pairs` in all `settings` that fit."""

    # Layouts that differ in their replicas only share most times, so one process takes them all.
    families: dict[Layout, list[tuple[int, Layout]]] = {}
    for engines, layout in pairs:
        families.setdefault(layout.with_fewest_replicas, []).append((engines, layout))
    alike = list(families.values())

    def estimates(part: int) -> list[tuple[Candidate, Estimate]]:
        found: list[tuple[Candidate, Estimate]] = []
        for engines, layout in itertools.chain(*alike[part::parts]):
            found += _estimates_of(question, engines, layout, settings)
        return found

    parts = min(_PARTS, len(alike)) if len(pairs) > _FEW else 1
    jobs = question.jobs if parts > 1 else 1
    answers = run_all(
        estimates,
        parts,
        list[tuple[Candidate, Estimate]],
        jobs,
        waiting=lambda: question.tell(f"estimating {len(pairs)} layouts"),
    )
    return [Found(candidate, estimate) for answer in answers for candidate, estimate in answer]


def _estimates_of(
    question: Question, engines: int, layout: Layout, settings: Sequence[EngineConfig]
) -> Iterator[tuple[Candidate, Estimate]]:
    """The candidates of one layout, with their estimates."""
    costs: dict[tuple[object, ...], tuple[StepCost, Periods]] = {}
    demand = question.demand(engines)
    for setting in settings:
        config = replace(setting, layout=layout)
        candidate = candidate_of(
            engines, config, question.model, question.profile, question.memories
        )
        if candidate is None:
            continue
        key = config.quantization, config.kv_cache_dtype
        if key not in costs:
            # Steps are padded to the same sizes below the largest number of sequences.
            most = replace(
                config,
                max_num_seqs=max(one.max_num_seqs for one in settings),
                max_num_batched_tokens=max(one.max_num_batched_tokens for one in settings),
            )
            costs[key] = cost_of(question, replace(candidate, config=most)), {}
        screen = Screen(costs[key][0], config, candidate.num_blocks, costs[key][1])
        if question.load is None:
            yield candidate, screen.capacity(demand, question.targets)
        else:
            yield candidate, screen.estimate(demand)


def _promising(question: Question, screened: Sequence[Found]) -> list[Found]:
    """What to simulate: of what is near the front the best ones, one setting of each layout
    first."""
    first_of_layout: list[Found] = []
    others: list[Found] = []
    seen = set()
    for one in _near_front(question, screened):
        key = one.candidate.engines, one.candidate.layout
        (others if key in seen else first_of_layout).append(one)
        seen.add(key)
    half = MOST_SIMULATED * 2 // 3
    return [*first_of_layout[:half], *others][:MOST_SIMULATED]


def _near_front(question: Question, screened: Sequence[Found]) -> list[Found]:
    """The Pareto front of the estimates and what is near it, the best ranks first: the front also
    has ends that no target asks for."""
    front = _front([_position(question, one) for one in screened])
    near = [
        one for one in screened if any(_is_near(_position(question, one), point) for point in front)
    ]
    return sorted(near, key=lambda one: _estimated_rank(question, one))


def _position(question: Question, one: Found) -> tuple[float, float, float]:
    """TTFT, TPOT, and seconds of a device for a token: the less, the better."""
    estimate = one.estimate
    per_device = estimate.tokens_per_s / one.candidate.layout.world_size
    return estimate.ttft_s, estimate.tpot_s, 1 / max(per_device, 1e-12)


def _front(points: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """The points that no other point beats in everything."""
    front: list[tuple[float, float, float]] = []
    for point in sorted(set(points)):
        if not any(all(a <= b for a, b in zip(other, point, strict=True)) for other in front):
            front.append(point)
    return front


def _is_near(point: tuple[float, ...], front: tuple[float, ...]) -> bool:
    return all(a <= (1 + NEAR_FRONT) * b for a, b in zip(point, front, strict=True))


def _estimated_rank(question: Question, one: Found) -> tuple[float, ...]:
    excess = max(one.estimate.excess(question.targets), 0.0)
    if question.goal == "latency":
        return excess, one.estimate.tpot_s + one.estimate.ttft_s / 100
    return excess, -one.candidate.engines * one.estimate.tokens_per_s


def _rank(question: Question, one: Found) -> tuple[float, ...]:
    """Candidates that meet all targets come first; then the least excess, or the best goal."""
    excess = max(one.excess(question.targets), 0.0)
    if question.goal == "throughput":
        return excess, -one.tokens_per_s
    worst = max(
        (1 + target.missed_by(one.outcome) for target in question.targets),
        default=0.0,
    )
    tpot = one.outcome.tpot_s.get("mean", Statistic(0.0)).value
    return excess, worst, tpot


def _simulated(
    question: Question, found: Sequence[Found], slower: Sequence[float]
) -> list[Predicted]:
    """Simulations of `found`, each with its factor on times."""
    return run_all(
        lambda index: _simulate(question, found[index], slower[index]),
        len(found),
        Predicted,
        question.jobs,
        waiting=lambda: question.tell(f"simulating {len(found)} layouts"),
    )


def _simulate(question: Question, one: Found, slower: float) -> Predicted:
    replicas = _replicas_to_simulate(question, one)
    return predict(
        cost_of(question, one.candidate),
        question.model,
        one.candidate.config,
        one.candidate.num_blocks,
        _load_of_replicas(question, one, replicas),
        slower=slower,
        give_up=functools.partial(_is_hopeless, question.targets),
        num_replicas=replicas,
    )


def _replicas_to_simulate(question: Question, one: Found) -> int:
    """So many that they hold enough sequences together; all of them where prompts may share
    prefixes, because then it matters which replica takes a request."""
    replicas = one.candidate.layout.dp
    if question.load is not None and question.load.shares_prefixes:
        return replicas
    return min(replicas, max(1, int(_MOST_SEQUENCES / max(one.estimate.sequences, 1.0))))


def _load_of_replicas(question: Question, one: Found, replicas: int) -> Load:
    """The load of `replicas` replicas of one engine, long enough for some mean latencies."""
    part = one.candidate.engines * one.candidate.layout.dp / replicas
    sequences = one.estimate.sequences * replicas
    if question.load is None:
        share = replace(question.sample, concurrency=max(1, round(sequences)))
    else:
        share = question.load.share(part, question.seed)
    most = max(question.num_requests, math.ceil(_ROUNDS * (share.concurrency or sequences)))
    if question.trace is not None:
        return replace(share, requests=share.requests[: max(most, _LEAST_OF_A_TRACE)])
    return share.extended(most)


def _is_hopeless(targets: Sequence[Target], times: list[RequestTimes]) -> bool:
    """Whether a target is missed by so much that the run need not go on."""
    if len(times) < _LEAST_COUNTED or not targets:
        return False
    outcome = Outcome.of(times)
    return any(one.missed_by(outcome) > _HOPELESS for one in targets)


def _add_bands(question: Question, found: Sequence[Found]) -> None:
    errors = [relative_error(question, one) for one in found]
    slow = _simulated(question, found, [1 + error for error in errors])
    fast = _simulated(question, found, [1 - error for error in errors])
    for one, longer, shorter in zip(found, slow, fast, strict=True):
        one.slow, one.fast = longer, shorter


def _as_predicted(question: Question, one: Found) -> Predicted:
    """An estimate in the form of a simulation."""
    estimate = one.estimate

    def statistics(latency: str) -> dict[str, Statistic]:
        return {
            name: Statistic(estimate.statistic_s(Target(latency, name, 1.0)))
            for name in ("mean", "p50", "p90", "p95", "p99")
        }

    demand = question.demand(one.candidate.engines)
    outcome = Outcome(
        ttft_s=statistics("ttft"),
        tpot_s=statistics("tpot"),
        tokens_per_s=estimate.tokens_per_s,
        requests_per_s=estimate.tokens_per_s / demand.output_tokens,
        num_requests=0,
        seconds=0.0,
    )
    return Predicted(outcome=outcome, is_estimate=True)


def _overlap(one: Statistic | None, other: Statistic | None) -> bool:
    if one is None or other is None:
        return True
    if one.half_width is None or other.half_width is None:
        return True
    return abs(one.value - other.value) <= one.half_width + other.half_width
