"""Spans of requests for an OTLP collector: extra `otel`, and only with --otlp-traces-endpoint.

| span | from, to |
|---|---|
| `request` | handed to the engine, ended; its parent is the client's `traceparent` |
| `queue` | handed over, its first step; measured in the engine |
| `prefill` | its first step, its first token; measured in the engine |
| `decode` | first token, last token; as the server sees them |

Spans hold numbers and ids, and neither prompts nor answers. A thread of the library sends them; a
collector that is away loses spans, and holds nothing up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from moespan.errors import ConfigError, install_hint
from moespan.serve.metrics import Course
from moespan.version import __version__


class Tracing:
    """Makes the spans of requests that have ended.

    Args:
        tracer: of OpenTelemetry.
        parent_of: the context of a `traceparent` header.
        within: the context of a span, for its children.
        shut_down: sends what is left.
    """

    def __init__(
        self,
        model_name: str,
        tracer: Any,
        parent_of: Callable[[str], Any],
        within: Callable[[Any], Any],
        shut_down: Callable[[], object],
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._model_name = model_name
        self._tracer = tracer
        self._parent_of, self._within, self._clock_ns = parent_of, within, clock_ns
        self.shut_down = shut_down

    @classmethod
    def to(cls, endpoint: str, model_name: str) -> Tracing:
        """Send spans to the collector at `endpoint`, such as `http://host:4318/v1/traces`.

        Raises:
            ConfigError: the extra is missing.
        """
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise ConfigError(
                f"--otlp-traces-endpoint needs OpenTelemetry; {install_hint('otel')}"
            ) from None
        resource = Resource.create({"service.name": "moespan", "service.version": __version__})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        propagator = TraceContextTextMapPropagator()
        return cls(
            model_name,
            provider.get_tracer("moespan", __version__),
            lambda header: propagator.extract({"traceparent": header}),
            trace.set_span_in_context,
            provider.shutdown,
        )

    def tell(self, course: Course, now: float) -> None:
        """Make the spans of a request that ends at `now`, by the clock of `course`."""
        now_ns = self._clock_ns()

        def wall_ns(at: float) -> int:
            return now_ns - int((now - at) * 1e9)

        whole = self._tracer.start_span(
            "request",
            context=self._parent_of(course.traceparent) if course.traceparent else None,
            start_time=wall_ns(course.submitted_at),
            attributes=self._attributes(course),
        )
        for name, start, end in _parts(course):
            part = self._tracer.start_span(
                name, context=self._within(whole), start_time=wall_ns(start)
            )
            part.end(end_time=wall_ns(end))
        whole.end(end_time=now_ns)

    def _attributes(self, course: Course) -> dict[str, Any]:
        request = course.request
        return {
            "gen_ai.request.model": self._model_name,
            "gen_ai.request.id": request.id,
            "gen_ai.request.n": request.params.n,
            "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
            "gen_ai.usage.output_tokens": sum(one.num_tokens for one in course.begun.values()),
            "gen_ai.response.finish_reasons": course.reasons,
        }


def _parts(course: Course) -> Iterator[tuple[str, float, float]]:
    """Name, start and end of each part that the request got to."""
    if course.first_at is None:
        return
    began_at = course.first_at - course.prefill_s
    yield "queue", began_at - course.queued_s, began_at
    yield "prefill", began_at, course.first_at
    last_at = max((one.last_at for one in course.begun.values()), default=course.first_at)
    yield "decode", course.first_at, last_at
