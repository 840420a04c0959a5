"""The numbers of the server for Prometheus, and what `GET /metrics` answers.

`Life` tells what happens to requests and what the engine says about itself; the HTTP side counts
its own events. A scrape renders what is known, and asks the engine nothing. All names begin with
`moespan_` and have the label `model_name`. Metrics that vLLM has too are given a second time under
vLLM's name (`vllm:...`, with the label `engine`), so that its boards and routers work.

No label holds anything that a client sent.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from moespan.config import EngineConfig
from moespan.engine.info import EngineInfo, EngineStats, Pulse
from moespan.engine.request import OutputDelta, Request
from moespan.version import __version__

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4

FINISH_REASONS = ("stop", "length", "abort", "error", "timeout")
RESTART_REASONS = ("died", "silent", "start_failed")
REJECTIONS = ("starting", "engine_dead", "draining", "queue_full")

# vLLM's buckets, so that its boards show the same quantiles.
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_LAG_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)

_CACHE_LABELS = (
    *("block_size", "num_gpu_blocks", "kv_cache_size_tokens"),
    *("cache_dtype", "enable_prefix_caching"),
)
_BUILD_LABELS = ("version", "layout", "device", "dtype")

CLIENT_GONE = 499
"""Status, in logs and metrics, of a request whose client has left."""

_LATEST = 1000

_LINE = re.compile(rb"^(# (?:HELP|TYPE) )?moespan_(\w+)(\{)?", re.MULTILINE)

M = TypeVar("M", bound=MetricWrapperBase)


@dataclass(slots=True)
class _Continuation:
    """The tokens of one continuation: when the first and the last came, and how many."""

    first_at: float
    last_at: float
    num_tokens: int


@dataclass(slots=True)
class Course:
    """The times of one request, by the event loop's clock, and the tokens that it has got.

    Attributes:
        first_at: when the first token came, or an end without any.
        queued_s, prefill_s: seconds until the prompt's computation, and of it, measured in the
            engine.
        reasons: why continuations have ended.
        traceparent: the client's trace, as the header has it; empty for none.
        begun: continuations that have tokens, by index.
    """

    request: Request
    submitted_at: float
    first_at: float | None = None
    queued_s: float = 0.0
    prefill_s: float = 0.0
    begun: dict[int, _Continuation] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    traceparent: str = ""


class Metrics:
    """All metrics of one server.

    Attributes:
        num_prompt_tokens, num_generation_tokens: tokens so far.
        first_token_s, inter_token_s: of the latest requests and tokens.
    """

    def __init__(self, model_name: str, config: EngineConfig, *, alias_vllm: bool = True) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._model_name = model_name
        self._config = config
        self._alias_vllm = alias_vllm
        self._last_stats: EngineStats | None = None
        self._last_counts: dict[int, list[int]] = {}
        self.num_prompt_tokens = self.num_generation_tokens = 0
        self.first_token_s: deque[float] = deque(maxlen=_LATEST)
        self.inter_token_s: deque[float] = deque(maxlen=_LATEST)
        shared, own = _Maker(model_name), _Maker(model_name)
        self._make_requests(shared, config.max_model_len)
        self._make_engine(shared, own)
        self._make_server(own)
        self._shared, self._own = shared.registry, own.registry

    def render(self) -> bytes:
        """All metrics as text, for a scrape."""
        shared = prometheus_client.generate_latest(self._shared)
        text = shared + prometheus_client.generate_latest(self._own)
        return text + _LINE.sub(_alias, shared) if self._alias_vllm else text

    # What happens to requests.

    def take(self, course: Course, delta: OutputDelta, now: float) -> None:
        """A delta of the request has come."""
        if course.first_at is None and (delta.token_ids or delta.finish_reason is not None):
            self._begin_output(course, delta, now)
        num_tokens = len(delta.token_ids)
        if num_tokens:
            begun = course.begun.get(delta.index)
            if begun is None:
                course.begun[delta.index] = _Continuation(now, now, num_tokens)
            else:
                self._inter_token.observe(now - begun.last_at)
                self.inter_token_s.append(now - begun.last_at)
                begun.last_at = now
                begun.num_tokens += num_tokens
            self.num_generation_tokens += num_tokens
            self._generation_tokens.inc(num_tokens)
        if delta.finish_reason is not None:
            self._end_continuation(course, delta.index, delta.finish_reason)

    def end(self, course: Course, now: float, unfinished: Iterable[int], reason: str) -> None:
        """The request has ended; `reason` is that of continuations which did not finish."""
        for index in unfinished:
            self._end_continuation(course, index, reason)
        params = course.request.params
        self._e2e.observe(now - course.submitted_at)
        self._request_prompt_tokens.observe(len(course.request.prompt_token_ids))
        self._params_n.observe(params.n)
        if params.max_tokens is not None:
            self._params_max_tokens.observe(params.max_tokens)
        if course.first_at is not None:
            last_at = max((one.last_at for one in course.begun.values()), default=course.first_at)
            self._decode_time.observe(last_at - course.first_at)
            self._inference_time.observe(course.prefill_s + last_at - course.first_at)

    def _begin_output(self, course: Course, delta: OutputDelta, now: float) -> None:
        course.first_at = now
        num_tokens = len(course.request.prompt_token_ids)
        self.num_prompt_tokens += num_tokens
        self._prompt_tokens.inc(num_tokens)
        self._first_token.observe(now - course.submitted_at)
        self.first_token_s.append(now - course.submitted_at)
        if delta.timing is not None:
            course.queued_s = delta.timing.queued_s
            course.prefill_s = delta.timing.prefill_s
            self._queue_time.observe(delta.timing.queued_s)
            self._prefill_time.observe(delta.timing.prefill_s)

    def _end_continuation(self, course: Course, index: int, reason: str) -> None:
        course.reasons.append(reason)
        self._success[reason if reason in self._success else "error"].inc()
        one = course.begun.get(index)
        num_tokens = 0 if one is None else one.num_tokens
        self._request_generation_tokens.observe(num_tokens)
        if one is not None and num_tokens > 1:
            self._time_per_token.observe((one.last_at - one.first_at) / (num_tokens - 1))

    def reject(self, reason: str) -> None:
        """A request was refused; `reason` is one of `REJECTIONS`."""
        self._rejected[reason].inc()

    # What the engine says.

    def start(self, info: EngineInfo) -> None:
        """An engine is ready."""
        self._up.set(1)
        self._last_stats = None
        self._last_counts = {}
        self._cache_config.clear()
        self._cache_config.labels(
            self._model_name,
            str(info.block_size),
            str(info.num_blocks),
            str(info.num_blocks * info.block_size),
            info.cache_dtype,
            str(self._config.enable_prefix_caching),
        ).set(1)
        self._build.clear()
        self._build.labels(
            self._model_name, __version__, str(info.layout), info.device, info.dtype
        ).set(1)

    def stop(self) -> None:
        """The engine has ended: nothing runs, waits or holds blocks."""
        for gauge in (self._up, self._running, self._waiting, self._kv_usage):
            gauge.set(0)
        self._beat_age.clear()

    def restart(self, reason: str) -> None:
        """The engine is started again; `reason` is one of `RESTART_REASONS`."""
        self._restarts[reason].inc()

    def pulse(self, pulse: Pulse) -> None:
        """The engine tells its state."""
        stats, last = pulse.stats, self._last_stats
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_usage.set(stats.kv_usage)
        for name, counter in self._engine_counts.items():
            counter.inc(getattr(stats, name) - (0 if last is None else getattr(last, name)))
        for step in pulse.steps:
            self._steps.labels(self._model_name, step.kind).inc()
            self._step_seconds.observe(step.seconds)
            self._iteration_tokens.observe(step.num_tokens)
        self._last_stats = stats

    def count_experts(self, counts: dict[int, list[int]]) -> None:
        """The engine tells, for each layer, how many tokens chose each expert since its start."""
        if self._expert_tokens is None:
            return
        for layer, row in counts.items():
            last = self._last_counts.get(layer) or [0] * len(row)
            for expert, (count, before) in enumerate(zip(row, last, strict=True)):
                labels = self._model_name, str(layer), str(expert)
                self._expert_tokens.labels(*labels).inc(max(0, count - before))
        self._last_counts = counts

    def beats(self, ages_s: dict[int, float]) -> None:
        """How long ago each rank was last seen to run."""
        for rank, age_s in ages_s.items():
            self._beat_age.labels(self._model_name, str(rank)).set(age_s)

    # What the HTTP side counts.

    def answered(self, route: str, status: int) -> None:
        """A request was answered; `route` is the path of a route of ours, or `other`. The status
        is 499 if the client left before."""
        self._http_requests.labels(self._model_name, route, str(status)).inc()
        if status == CLIENT_GONE:
            self._disconnects.inc()

    def _make_requests(self, shared: _Maker, max_model_len: int) -> None:
        tokens = _up_to(max_model_len)
        self._prompt_tokens = shared.counter("prompt_tokens", "Prompt tokens computed or cached.")
        self._generation_tokens = shared.counter("generation_tokens", "Generated tokens.")
        self._success = shared.counters(
            "request_success", "Continuations that ended.", "finished_reason", FINISH_REASONS
        )
        self._first_token = shared.histogram(
            "time_to_first_token_seconds", "From the request to its first token.", _FIRST_TOKEN_S
        )
        self._inter_token = shared.histogram(
            "inter_token_latency_seconds", "Between two tokens of a continuation.", _TOKEN_S
        )
        self._time_per_token = shared.histogram(
            "request_time_per_output_token_seconds",
            "Mean time of the tokens of a continuation after its first.",
            _TOKEN_S,
        )
        self._e2e = shared.histogram(
            "e2e_request_latency_seconds", "From the request to its end.", _REQUEST_S
        )
        self._queue_time = shared.histogram(
            "request_queue_time_seconds", "From the request to its first step.", _REQUEST_S
        )
        self._prefill_time = shared.histogram(
            "request_prefill_time_seconds", "From the first step to the first token.", _REQUEST_S
        )
        self._inference_time = shared.histogram(
            "request_inference_time_seconds", "From the first step to the last token.", _REQUEST_S
        )
        self._decode_time = shared.histogram(
            "request_decode_time_seconds", "From the first token to the last.", _REQUEST_S
        )
        self._request_prompt_tokens = shared.histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", tokens
        )
        self._request_generation_tokens = shared.histogram(
            "request_generation_tokens", "Tokens of a continuation.", tokens
        )
        self._params_n = shared.histogram("request_params_n", "n of a request.", (1, 2, 5, 10, 20))
        self._params_max_tokens = shared.histogram(
            "request_params_max_tokens", "max_tokens of a request.", tokens
        )

    def _make_engine(self, shared: _Maker, own: _Maker) -> None:
        self._running = shared.gauge("num_requests_running", "Sequences that have blocks.")
        self._waiting = shared.gauge("num_requests_waiting", "Sequences that wait for blocks.")
        self._kv_usage = shared.gauge(
            "kv_cache_usage_perc", "Share of the KV cache that live sequences hold, within 0..1."
        )
        self._engine_counts = {
            "num_preemptions": shared.counter("num_preemptions", "Sequences that lost blocks."),
            "num_prefix_queried_tokens": shared.counter(
                "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
            ),
            "num_prefix_hit_tokens": shared.counter(
                "prefix_cache_hits", "Prompt tokens found in the prefix cache."
            ),
            "num_drafts": shared.counter(
                "spec_decode_num_drafts", "How often a sequence had drafts in a step."
            ),
            "num_draft_tokens": shared.counter(
                "spec_decode_num_draft_tokens", "Drafts that steps computed."
            ),
            "num_accepted_tokens": shared.counter(
                "spec_decode_num_accepted_tokens", "Drafts that were right."
            ),
        }
        self._iteration_tokens = shared.histogram(
            "iteration_tokens_total", "Tokens of a step.", _STEP_TOKENS
        )
        self._cache_config = shared.labelled(
            Gauge, "cache_config_info", "The KV cache.", *_CACHE_LABELS
        )
        self._build = own.labelled(Gauge, "build_info", "What runs.", *_BUILD_LABELS)
        self._up = own.gauge("engine_up", "1 while an engine runs, else 0.")
        self._restarts = own.counters(
            "engine_restarts", "Restarts of the engine.", "reason", RESTART_REASONS
        )
        self._beat_age = own.labelled(
            Gauge, "rank_beat_age_seconds", "Time since a rank was last seen to run.", "rank"
        )
        self._step_seconds = own.histogram("step_seconds", "Time of a step.", _STEP_S)
        self._steps = own.labelled(Counter, "steps", "Steps.", "kind")
        self._expert_tokens: Counter | None = None
        if self._config.expert_stats:
            self._expert_tokens = own.labelled(
                Counter, "expert_tokens", "Tokens that chose an expert.", "layer", "expert"
            )

    def _make_server(self, own: _Maker) -> None:
        self._rejected = own.counters(
            "rejected", "Requests that were not taken.", "reason", REJECTIONS
        )
        self._http_requests = own.labelled(Counter, "http_requests", "Answers.", "route", "status")
        self._disconnects = own.counter("disconnects", "Clients that left before their answer.")
        self.open_streams = own.gauge("open_streams", "Answers that are being streamed.")
        self.event_loop_lag = own.histogram(
            "event_loop_lag_seconds", "Delay of the event loop's timers.", _LAG_S
        )


def metrics_route(metrics: Metrics) -> Route:
    """`GET /metrics`."""

    async def scrape(request: HttpRequest) -> Response:
        return Response(metrics.render(), headers={"content-type": CONTENT_TYPE})

    return Route("/metrics", scrape)


class _Maker:
    """Makes metrics of one registry, with the server's prefix and the label `model_name`."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name

    def labelled(self, kind: type[M], name: str, meaning: str, *labels: str) -> M:
        """A metric that has more labels; the caller gives the value of `model_name`, too."""
        names = ("model_name", *labels)
        return kind(f"moespan_{name}", meaning, names, registry=self.registry)

    def gauge(self, name: str, meaning: str) -> Gauge:
        return self.labelled(Gauge, name, meaning).labels(self._model_name)

    def counter(self, name: str, meaning: str) -> Counter:
        return self.labelled(Counter, name, meaning).labels(self._model_name)

    def counters(
        self, name: str, meaning: str, label: str, values: Iterable[str]
    ) -> dict[str, Counter]:
        """One counter for each value of a label, all of them 0 from the start."""
        counter = self.labelled(Counter, name, meaning, label)
        return {value: counter.labels(self._model_name, value) for value in values}

    def histogram(self, name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(
            f"moespan_{name}", meaning, ("model_name",), buckets=buckets, registry=self.registry
        ).labels(self._model_name)


def _alias(line: re.Match[bytes]) -> bytes:
    """The beginning of a line with vLLM's name, and its label for the engine's number."""
    comment, name, brace = line.groups(default=b"")
    return comment + b"vllm:" + name + (b'{engine="0",' if brace else b"")


def _up_to(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `most`."""
    numbers = (digit * 10**power for power in range(10) for digit in (1, 2, 5))
    return [number for number in numbers if number <= most]
