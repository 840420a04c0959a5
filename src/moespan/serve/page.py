"""The page: its files, and the state of the server that the page shows.

The files lie in `serve/page/` as browsers get them: plain modules and CSS, nothing from elsewhere.
"""

from __future__ import annotations

import time
from importlib import resources
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from moespan.parallel.beats import Place
from moespan.serve.expert_watch import ExpertWatch
from moespan.serve.life import Life
from moespan.serve.metrics import Metrics

_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_MOST_REASON_CHARACTERS = 400


class File(NamedTuple):
    """A file of the page, as browsers get it."""

    content: bytes
    media_type: str


def page_routes(
    life: Life, metrics: Metrics, model: str, ranks_per_node: int, watch: ExpertWatch | None = None
) -> list[Route]:
    """The page at `/`, its files and its data below `/ui`.

    Args:
        watch: knows the tokens of each expert; None if they are not counted.
    """
    files = page_files()
    began = time.monotonic()

    def route(path: str, file: File) -> Route:
        async def answer(request: Request) -> Response:
            # The next version may have other files under the same names.
            headers = {"cache-control": "no-cache"}
            return Response(file.content, media_type=file.media_type, headers=headers)

        return Route(path, answer)

    async def state(request: Request) -> Response:
        about: dict[str, Any] = {"model": model, "uptime_s": time.monotonic() - began}
        # The first answer needs an engine that runs, and has told so.
        about["has_experts"] = watch is not None and life.pulse is not None
        return JSONResponse({**about, **shown_state(life, metrics, ranks_per_node)})

    data = [Route("/ui/state", state)]
    if watch is not None:
        data.append(_experts_route(watch))
    return [
        route("/", files.pop("index.html")),
        *(route(f"/ui/{name}", file) for name, file in files.items()),
        *data,
    ]


def _experts_route(watch: ExpertWatch) -> Route:
    async def experts(request: Request) -> Response:
        return JSONResponse({"counts": list((await watch.counts()).values())})

    return Route("/ui/experts", experts)


def page_files() -> dict[str, File]:
    """The files of the page by name."""
    found = {}
    for file in resources.files("moespan.serve").joinpath("page").iterdir():
        _, dot, ending = file.name.rpartition(".")
        found[file.name] = File(file.read_bytes(), _TYPES[dot + ending])
    return found


def shown_state(life: Life, metrics: Metrics, ranks_per_node: int) -> dict[str, Any]:
    """What the live view shows, for JSON. Asks the engine nothing."""
    info = life.info
    stats = None if life.pulse is None else life.pulse.stats
    return {
        "state": life.state.value,
        "trouble": life.trouble[:_MOST_REASON_CHARACTERS],
        "layout": "" if info is None else str(info.layout),
        "about": "" if info is None else f"{info.device}, {info.dtype}",
        "ranks": [_rank(life, place, ranks_per_node) for place in life.places()],
        "running": stats.num_running if stats else 0,
        "waiting": stats.num_waiting if stats else 0,
        "kv_usage": stats.kv_usage if stats else 0.0,
        "prefix_queried_tokens": stats.num_prefix_queried_tokens if stats else 0,
        "prefix_hit_tokens": stats.num_prefix_hit_tokens if stats else 0,
        "live_requests": life.num_live,
        "generated_tokens": metrics.num_generation_tokens,
        "restarts": life.num_restarts,
    }


def _rank(life: Life, place: Place, ranks_per_node: int) -> dict[str, Any]:
    at = None if life.info is None else life.info.layout.coordinates(place.rank)
    return {
        "rank": place.rank,
        "node": place.rank // ranks_per_node,
        "stage": at.pp if at else 0,
        "replica": at.dp if at else 0,
        "place": str(place),
        "is_busy": place.is_busy,
        "silent_s": life.beat_ages_s.get(place.rank, 0.0),
    }
