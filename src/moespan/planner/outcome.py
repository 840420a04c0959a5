"""What users of an engine see under a load: latencies and throughput, predicted or measured.

`moespan.search.simulate` and `moespan bench --load` make the same figures from the same times, so
that a plan and a measurement can be laid side by side. Imports no torch.

- TTFT: from the arrival of a request to its first token.
- TPOT: (last token - first token) / (tokens - 1), of requests with more than one token.

The requests of the first mean latency, and of the first tenth, are the warm-up and do not count:
the engine fills meanwhile. Intervals come from the means of batches of consecutive requests (95 %,
Student's t).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from moespan.errors import ConfigError, shown

STATISTICS = ("mean", "p50", "p90", "p95", "p99")

WARM_UP_SHARE = 0.1
_BATCHES = 10
_T_95 = 2.262
"""Student's t for 95 % and 9 degrees of freedom."""


class RequestTimes(NamedTuple):
    """When a request came, and its first and last token. Seconds of one clock."""

    arrival_s: float
    first_s: float
    last_s: float
    output_tokens: int

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.first_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.last_s - self.first_s) / (self.output_tokens - 1)


class Statistic(msgspec.Struct, frozen=True):
    """A value and the half width of its 95 % interval; both in the unit of the latency.

    Too few requests, or an estimate, have no interval: then `half_width` is None.
    """

    value: float
    half_width: float | None = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one load.

    Attributes:
        ttft_s, tpot_s: statistic → value; empty if no request has one.
        tokens_per_s, requests_per_s: output in the measured time.
        num_requests: requests that count.
        seconds: the measured time.
        is_cut: whether the run was given up, because a target was out of reach.
    """

    ttft_s: dict[str, Statistic]
    tpot_s: dict[str, Statistic]
    tokens_per_s: float
    requests_per_s: float
    num_requests: int
    seconds: float
    is_cut: bool = False

    @classmethod
    def of(
        cls, times: Sequence[RequestTimes], *, cut_end: bool = False, is_cut: bool = False
    ) -> Outcome:
        """The figures of requests in the order of their arrival.

        Args:
            cut_end: the measured time ends with the last arrival; else with the last token.

        Raises:
            ConfigError: there is no request.
        """
        if not times:
            raise ConfigError("no request has ended; there is nothing to report")
        counted = times[_warm_up(times) :]
        began = counted[0].arrival_s
        ended = max(one.last_s for one in times)
        if cut_end and times[-1].arrival_s > began:
            ended = times[-1].arrival_s
        seconds = max(ended - began, 1e-9)
        tokens = sum(_tokens_within(one, began, ended) for one in times)
        per_request = sum(one.output_tokens for one in counted) / len(counted)
        several = [one for one in counted if one.output_tokens > 1]
        return cls(
            ttft_s=_statistics([one.ttft_s for one in counted]),
            tpot_s=_statistics([one.tpot_s for one in several]),
            tokens_per_s=tokens / seconds,
            requests_per_s=tokens / per_request / seconds,
            num_requests=len(counted),
            seconds=seconds,
            is_cut=is_cut,
        )


class Target(NamedTuple):
    """A latency that users want: `tpot` at most `seconds` at `statistic`."""

    latency: str
    statistic: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.latency.upper()} {self.statistic} ≤ {in_words(self.seconds)}"

    def of(self, outcome: Outcome) -> Statistic | None:
        """The outcome's figure for this target; None if no request has one."""
        figures = outcome.ttft_s if self.latency == "ttft" else outcome.tpot_s
        return figures.get(self.statistic)

    def missed_by(self, outcome: Outcome) -> float:
        """Relative excess over the target; 0 or less if it is met."""
        found = self.of(outcome)
        return 0.0 if found is None else found.value / self.seconds - 1


def parse_target(latency: str, text: str) -> Target:
    """A target such as `40ms@p99` or `1.5s`, which is p90.

    Raises:
        ConfigError: `text` is none.
    """
    amount, _, statistic = text.partition("@")
    unit = "ms" if amount.endswith("ms") else "s" if amount.endswith("s") else ""
    try:
        seconds = float(amount.removesuffix(unit)) * (0.001 if unit == "ms" else 1)
    except ValueError:
        seconds = math.nan
    statistic = statistic or "p90"
    if not unit or not 0 < seconds < math.inf or statistic not in STATISTICS:
        raise ConfigError(
            f"{latency}={shown(text)} is not a time with its statistic, such as 40ms@p99 or 2s; "
            f"statistics are {', '.join(STATISTICS)}"
        )
    return Target(latency, statistic, seconds)


def in_words(seconds: float) -> str:
    """Seconds for people: `31 ms`, `0.41 s`, `12 s`."""
    if seconds < 0.1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def percentile(values: Sequence[float], share: float) -> float:
    """Smallest of `values` such that at least `share` of all values are not larger."""
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


def _warm_up(times: Sequence[RequestTimes]) -> int:
    """How many requests come while the engine fills: those of the first mean latency, and the first
    tenth at least. Where more than half of all come by then, there is no steady state to wait for.
    """
    least = int(WARM_UP_SHARE * len(times))
    latency_s = statistics.fmean(one.last_s - one.arrival_s for one in times)
    filled_s = times[0].arrival_s + latency_s
    early = sum(one.arrival_s < filled_s for one in times)
    return max(least, early) if 2 * early <= len(times) else least


def _statistics(values: Sequence[float]) -> dict[str, Statistic]:
    if not values:
        return {}
    size = len(values) // _BATCHES
    batches = [values[i * size : (i + 1) * size] for i in range(_BATCHES)] if size else []
    found = {}
    for name in STATISTICS:
        half = None
        if batches:
            parts = [_statistic(name, batch) for batch in batches]
            half = _T_95 * statistics.stdev(parts) / math.sqrt(_BATCHES)
        found[name] = Statistic(_statistic(name, values), half)
    return found


def _statistic(name: str, values: Sequence[float]) -> float:
    if name == "mean":
        return statistics.fmean(values)
    return percentile(values, int(name[1:]) / 100)


def _tokens_within(one: RequestTimes, began: float, ended: float) -> float:
    """Tokens of a request between two times, if all after the first are evenly spaced."""
    first = 1.0 if began <= one.first_s <= ended else 0.0
    span = one.last_s - one.first_s
    if one.output_tokens == 1 or span <= 0:
        return first * one.output_tokens
    inside = min(one.last_s, ended) - max(one.first_s, began)
    return first + (one.output_tokens - 1) * max(inside, 0.0) / span
