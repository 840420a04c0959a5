"""The application: which route is answered by what."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from moespan.serve.auth import OPEN_PATHS, Auth, Keys
from moespan.serve.delivery import Delivery, ignored_header
from moespan.serve.edge import OTHER, Edge, OnEnd
from moespan.serve.health import health_routes
from moespan.serve.intake import Intake
from moespan.serve.life import Life
from moespan.serve.options import ServeOptions
from moespan.serve.pool import Pool
from moespan.serve.replies import ModelCard, ModelList
from moespan.serve.responses import response_job
from moespan.serve.sampling import Job, chat_job, completion_job, try_form
from moespan.serve.served import ServedModel
from moespan.serve.tokenization import detokenize, tokenize, tokenizer_info

Handler = Callable[[Request], Awaitable[Any]]

_NUM_FORMS = 2  # tried at a time; each keeps a child process busy


def make_app(
    model: ServedModel,
    life: Life,
    keys: Keys,
    options: ServeOptions,
    *,
    more_routes: Sequence[BaseRoute] = (),
    open_paths: frozenset[bytes] = frozenset(),
    on_end: OnEnd = lambda route, status: None,
) -> ASGIApp:
    """The ASGI application.

    Args:
        more_routes: routes beside those of this module, under the same rules.
        open_paths: raw paths among them that need no key.
        on_end: called at the end of every request with its route and status.
    """
    routes = [
        *health_routes(life, lambda request: not keys or request.state.caller is not None),
        *_openai_routes(model, life, options),
        *more_routes,
    ]
    app: ASGIApp = Auth(_Routes(routes), keys, options, OPEN_PATHS | open_paths)
    app = Edge(app, options, on_end)
    if options.allowed_origins:  # outside, so that pages can read errors too
        app = CORSMiddleware(
            app,
            allow_origins=options.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "x-moespan-ignored-fields", "retry-after"],
        )
    return app


class _Routes:
    """ASGI: the routes, and the name of the one that matches for logs and metrics."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        self._router = Router(list(routes), redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or raise HTTPException."""
        scope["state"]["route"] = self._name(scope)
        await self._router(scope, receive, send)

    def _name(self, scope: Scope) -> str:
        for route in self._router.routes:
            if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
                return route.path
        return OTHER


def _openai_routes(model: ServedModel, life: Life, options: ServeOptions) -> list[Route]:
    full = functools.partial(life.metrics.reject, "queue_full")
    most = options.max_queued_requests
    intake, pool = Intake(options, full), Pool(most, on_full=full)
    forms = Pool(most, _NUM_FORMS, "the form of their output to be tried", on_full=full)

    async def deliver(job: Job, **form: Any) -> Delivery:
        if job.form is not None:
            await forms.run(try_form, job)
        return Delivery(job, life, options, **form)

    def generation(make_job: Callable[[bytes, ServedModel, ServeOptions], Job]) -> Handler:
        async def handle(request: Request) -> Delivery:
            async with intake.body(request) as body:
                job = await pool.run(make_job, body, model, options)
            return await deliver(job)

        return handle

    async def response(request: Request) -> Delivery:
        async with intake.body(request) as body:
            answer = await pool.run(response_job, body, model, options)
        return await deliver(answer.job, answer=answer, end=b"")

    def tokens(answer: Callable[[bytes, ServedModel, ServeOptions], Any]) -> Handler:
        async def handle(request: Request) -> Response:
            async with intake.body(request) as body:
                reply, ignored = await pool.run(answer, body, model, options)
            return _json(reply, ignored)

        return handle

    async def models(request: Request) -> Response:
        return _json(ModelList([_card(model, name) for name in model.names]))

    async def one_model(request: Request) -> Response:
        return _json(_card(model, model.name_of(request.path_params["id"])))

    async def info(request: Request) -> Response:
        return _json(tokenizer_info(model))

    return [
        Route("/v1/completions", generation(completion_job), methods=["POST"]),
        Route("/v1/chat/completions", generation(chat_job), methods=["POST"]),
        Route("/v1/responses", response, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{id:path}", one_model),
        Route("/tokenize", tokens(tokenize), methods=["POST"]),
        Route("/detokenize", tokens(detokenize), methods=["POST"]),
        Route("/tokenizer_info", info),
    ]


def _card(model: ServedModel, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        created=model.created,
        root=model.root,
        max_model_len=model.max_model_len,
        context_length=model.max_model_len,
    )


def _json(value: Any, ignored: Sequence[str] = ()) -> Response:
    response = Response(msgspec.json.encode(value), media_type="application/json")
    if ignored:
        response.raw_headers.append(ignored_header(ignored))
    return response
