"""The routes by which probes, load balancers and operators ask how the server is.

| route | 200 if |
|---|---|
| `/live` | the event loop turns |
| `/health`, `/ping` | every rank of every node shows signs of life, and nothing drains |
| `/ready` | as `/health`, and the queue has room |

Otherwise they answer 503 with one word: `starting`, `overloaded`, `recovering`, `stalled`,
`draining` or `ended`. None of them asks the engine or waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from moespan.errors import shortened
from moespan.serve.life import Life, State
from moespan.version import __version__

_MOST_OF_AN_ERROR = 4096  # characters of the last error in the verbose answer


def health_routes(life: Life, may_see: Callable[[Request], bool]) -> list[Route]:
    """The routes of this module.

    Args:
        may_see: whether a request brought the key, where the server has one.
    """

    async def live(request: Request) -> Response:
        return PlainTextResponse("")

    async def health(request: Request) -> Response:
        word = unhealthy(life)
        if "verbose" in request.query_params and may_see(request):
            return JSONResponse(described(life), 503 if word else 200)
        return as_probe(word)

    async def ready(request: Request) -> Response:
        return as_probe(life.reason)

    async def load(request: Request) -> Response:
        return JSONResponse({"server_load": life.num_live})

    async def version(request: Request) -> Response:
        return JSONResponse({"version": __version__})

    return [
        Route("/live", live),
        Route("/health", health),
        Route("/ping", health, methods=["GET", "POST"]),
        Route("/ready", ready),
        Route("/load", load),
        Route("/version", version),
    ]


def unhealthy(life: Life) -> str:
    """One word why the engine is not well; empty if it is. A full queue is no illness."""
    return "" if life.state is State.OVERLOADED and not life.trouble else life.reason


def described(life: Life) -> dict[str, Any]:
    """The state of the server for operators, for JSON."""
    places = life.places()
    return {
        "state": life.state.value,
        "reason": life.reason,
        "trouble": life.trouble,
        "restarts": life.num_restarts,
        "live_requests": life.num_live,
        "queued_requests": life.num_queued,
        "queued_tokens": life.num_queued_tokens,
        "last_error": None if life.last_error is None else _cut(life.last_error),
        "ranks": [
            {
                "rank": place.rank,
                "place": str(place),
                "beat_age_s": round(life.beat_ages_s.get(place.rank, 0.0), 1),
                "is_stopped": place.is_stopped,
            }
            for place in places
        ],
    }


def _cut(error: Exception) -> str:
    return "\n".join(shortened(line, 400) for line in str(error).splitlines())[:_MOST_OF_AN_ERROR]


def as_probe(word: str) -> Response:
    """The answer to a probe: 200, or 503 with the one word why not."""
    return PlainTextResponse(word, 503 if word else 200)
