"""The routes of MindIE's server, for those who come from there (`--mindie-routes`).

| route | what it is here |
|---|---|
| `GET /v2/health/live`, `/v2/health/ready` | `/live`, `/ready` |
| `GET /v2/models/{model}/ready` | `/ready`, for a model that is served |
| `GET /health/timed-N` | 200 with `{"status":"healthy"}` if the engine gave a sign within N s |
| `POST /generate`, `/generate_stream` | TGI's `inputs` and `parameters` |
| `POST /infer` | the same, answered in MindIE's own form |
| `POST /v1/tokenizer` | number and texts of the tokens of a text |
| `GET /info`, `/metrics-json` | the model, and five numbers |
| `GET /stopService` | a drain, for those with the key |

A body becomes that of `/v1/completions`, so its fields follow the same rules. Errors have the
envelope of all other routes.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from moespan.engine.request import OutputDelta
from moespan.errors import RequestError, shown
from moespan.serve.answers import Answer, check_went_on
from moespan.serve.bodies import decode
from moespan.serve.delivery import Delivery, ignored_header
from moespan.serve.health import as_probe
from moespan.serve.intake import Intake
from moespan.serve.life import Life, State
from moespan.serve.metrics import Metrics
from moespan.serve.options import ServeOptions
from moespan.serve.pool import Pool
from moespan.serve.refusals import Refusal, bad, refusal_of
from moespan.serve.sampling import Job, completion_job, encode
from moespan.serve.served import ServedModel
from moespan.version import __version__

MOST_TIMED_S = 600
"""Largest N of `/health/timed-N`."""

OPEN_PATHS = frozenset(
    {
        b"/v2/health/live",
        b"/v2/health/ready",
        b"/health/timed",
        *(f"/health/timed-{seconds}".encode() for seconds in range(1, MOST_TIMED_S + 1)),
    }
)
"""Raw paths of probes, which need no key."""

_TIMED_S = 10
_MAX_NEW_TOKENS = 20  # TGI's default
_SAMPLES = ("temperature", "top_k", "top_p", "seed")  # any of them asks for sampling

_RENAMED = {
    "max_new_tokens": "max_tokens",
    "truncate": "truncate_prompt_tokens",
    "return_full_text": "echo",
    "stop": "stop",
    "seed": "seed",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "ignore_eos": "ignore_eos",
    "skip_special_tokens": "skip_special_tokens",
    "include_stop_str_in_output": "include_stop_str_in_output",
}
"""Field of `parameters` → the field of a completion."""

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (None, 1),
    "typical_p": (None, 1, 1.0),
    "watermark": (None, False),
    "top_n_tokens": (None, 0),
    "decoder_input_details": (None, False),
    "adapter_id": (None, "None"),
    "grammar": (None,),
}
"""Fields that would change the answer → values that ask for nothing."""

_HARMLESS = ("priority",)
_OURS = ("details", "do_sample", "timeout")


class GenerateBody(msgspec.Struct):
    """`POST /generate`, `/generate_stream`, `/infer`."""

    inputs: str
    parameters: dict[str, Any] | None = None
    stream: bool = False


class TokenizerBody(msgspec.Struct):
    """`POST /v1/tokenizer`."""

    inputs: str
    do_decode: bool = True


@dataclasses.dataclass(frozen=True)
class Asked:
    """A generation as MindIE's clients ask for it.

    Attributes:
        timeout_s: seconds after which the request ends with an error; None for the server's own.
        is_infer: whether the answer has MindIE's own form instead of TGI's.
    """

    job: Job
    has_details: bool
    timeout_s: float | None
    is_infer: bool


def mindie_routes(
    model: ServedModel, life: Life, metrics: Metrics, options: ServeOptions
) -> list[Route]:
    """The routes of this module."""
    full = functools.partial(metrics.reject, "queue_full")
    intake, pool = Intake(options, full), Pool(options.max_queued_requests, on_full=full)

    def generation(stream: bool | None, is_infer: bool) -> Callable[[HttpRequest], Awaitable[Any]]:
        async def handle(request: HttpRequest) -> Delivery:
            async with intake.body(request) as body:
                asked = await pool.run(ask, body, model, options, stream, is_infer)
            own = options
            if asked.timeout_s is not None:
                own = dataclasses.replace(options, request_timeout_s=asked.timeout_s)
            answer = InferAnswer(asked) if is_infer else TgiAnswer(asked)
            return Delivery(asked.job, life, own, answer=answer, end=b"")

        return handle

    async def tokenizer(request: HttpRequest) -> Response:
        async with intake.body(request) as body:
            reply, ignored = await pool.run(count_tokens, body, model, options)
        response = JSONResponse(reply)
        if ignored:
            response.raw_headers.append(ignored_header(ignored))
        return response

    return [
        *_probes(model, life),
        Route("/generate", generation(False, False), methods=["POST"]),
        Route("/generate_stream", generation(True, False), methods=["POST"]),
        Route("/infer", generation(None, True), methods=["POST"]),
        Route("/v1/tokenizer", tokenizer, methods=["POST"]),
        Route("/info", _reply(lambda: described(model, life, options))),
        Route("/metrics-json", _reply(lambda: five_numbers(life, metrics))),
        Route("/stopService", _stop(life)),
    ]


# Probes and the end.


def _probes(model: ServedModel, life: Life) -> list[Route]:
    async def live(request: HttpRequest) -> Response:
        return as_probe("")

    async def ready(request: HttpRequest) -> Response:
        return as_probe(life.reason)

    async def model_ready(request: HttpRequest) -> Response:
        model.name_of(request.path_params["model"])
        return as_probe(life.reason)

    async def timed(request: HttpRequest) -> Response:
        within_s = request.path_params.get("seconds", _TIMED_S)
        if not gave_sign(life, within_s):
            return as_probe(life.reason or "silent")
        # Their scripts compare this text, and kill all processes of Python if it differs.
        return Response('{"status":"healthy"}', media_type="application/json")

    return [
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2/models/{model:path}/versions/{version}/ready", model_ready),
        Route("/v2/models/{model:path}/ready", model_ready),
        Route("/health/timed", timed),
        Route("/health/timed-{seconds:int}", timed),
    ]


def gave_sign(life: Life, within_s: float) -> bool:
    """Whether the leader has spoken within so many seconds, or works while all ranks beat.

    A server that drains is well: probes must not kill what it lets finish.
    """
    if life.state not in (State.READY, State.OVERLOADED, State.DRAINING) or life.trouble:
        return False
    ages_s = life.beat_ages_s.values()
    works = life.num_live > 0 and bool(ages_s) and max(ages_s) <= within_s
    return works or life.silence_s <= within_s


def _stop(life: Life) -> Callable[[HttpRequest], Awaitable[Response]]:
    async def stop(request: HttpRequest) -> Response:
        if request.state.caller is None:
            raise Refusal(
                403,
                "this server has no keys, so that anybody could stop it; send SIGTERM, or give "
                "--api-key-file",
                code="key_needed",
            )
        life.drain()
        return JSONResponse({"status": "stopping", "unfinished": life.num_live})

    return stop


def _reply(make: Callable[[], Any]) -> Callable[[HttpRequest], Awaitable[Response]]:
    async def reply(request: HttpRequest) -> Response:
        return JSONResponse(make())

    return reply


# Generation.


def ask(
    body: bytes, model: ServedModel, options: ServeOptions, stream: bool | None, is_infer: bool
) -> Asked:
    """What a body asks for.

    Args:
        stream: whether the answer is streamed; None if the body says so.

    Raises:
        Refusal, RequestError: the request cannot be served as asked.
    """
    given, ignored = decode(body, GenerateBody, options.strict_fields)
    parameters = {
        name: value for name, value in (given.parameters or {}).items() if value is not None
    }
    ignored += _check(parameters)
    timeout_s = parameters.get("timeout")
    if timeout_s is not None and not (isinstance(timeout_s, int | float) and timeout_s > 0):
        raise bad(f"timeout={shown(timeout_s)} must be a number of seconds above 0", "timeout")
    details = bool(parameters.get("details", False))
    fields: dict[str, Any] = {"max_tokens": _MAX_NEW_TOKENS}
    fields |= {_RENAMED[name]: value for name, value in parameters.items() if name in _RENAMED}
    if not parameters.get("do_sample", any(name in parameters for name in _SAMPLES)):
        fields["temperature"] = 0
    if details:
        fields["logprobs"] = 0
    fields |= {"prompt": given.inputs, "stream": given.stream if stream is None else stream}
    try:
        job = completion_job(msgspec.json.encode(fields), model, options)
    except (Refusal, RequestError) as error:
        raise _renamed(refusal_of(error)) from None
    return Asked(
        dataclasses.replace(job, ignored=[*job.ignored, *ignored]), details, timeout_s, is_infer
    )


def _renamed(refusal: Refusal) -> Refusal:
    """A refusal of a completion in the words of the client, who sent MindIE's names."""
    message = str(refusal)
    for theirs, ours in (*_RENAMED.items(), ("inputs", "prompt")):
        if ours != "prompt" or refusal.param == "prompt":  # the word is also plain English
            message = re.sub(rf"\b{ours}\b", theirs, message, count=1)
        if refusal.param == ours:
            refusal.param = theirs
    refusal.args = (message,)
    return refusal


def _check(parameters: dict[str, Any]) -> list[str]:
    """Refuse parameters that cannot be honoured; → names of those without effect."""
    ignored = []
    for name, value in parameters.items():
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                raise bad(f"{name}={shown(value)} is refused: it is not supported", name)
        elif name not in _RENAMED and name not in _OURS:
            ignored.append(f"parameters.{name}")
    return [name for name in ignored if name.removeprefix("parameters.") not in _HARMLESS]


class TgiAnswer(Answer):
    """An answer in the form of Text Generation Inference."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked.job)
        self._asked = asked
        self._text = ""
        self._tokens: list[dict[str, Any]] = []
        if asked.job.echo:
            self._text = asked.job.texts[0] or ""

    def events(self, number: int, deltas: Sequence[OutputDelta]) -> Iterator[Any]:
        """One event for each token; the text of a delta comes with its last token."""
        for delta in deltas:
            tokens = self._take(delta)
            for token in tokens[:-1]:
                yield {"token": token, "generated_text": None, "details": None}
            is_last = delta.finish_reason is not None
            yield {
                "token": tokens[-1] if tokens else None,
                "generated_text": self._text if is_last else None,
                "details": self._details(delta) if is_last and self._asked.has_details else None,
            }

    def whole(self, deltas: Iterable[tuple[int, OutputDelta]]) -> Any:
        """The answer that is not streamed."""
        ((_, delta),) = deltas
        self._take(delta)
        reply: dict[str, Any] = {"generated_text": self._text}
        if self._asked.has_details:
            reply["details"] = self._details(delta, with_tokens=True)
        return reply

    def last_event(self) -> None:
        """There is no event of usage."""

    def _take(self, delta: OutputDelta) -> list[dict[str, Any]]:
        """Take in a delta; → its tokens."""
        check_went_on(delta)
        self.count(0, delta)
        self._text += delta.text
        tokens = [self._token(token_id) for token_id in delta.token_ids]
        for token, entry in zip(tokens, delta.logprobs, strict=False):
            token["logprob"] = entry.logprob
        if tokens:
            tokens[-1]["text"] = delta.text
        self._tokens += tokens
        return tokens

    def _token(self, token_id: int) -> dict[str, Any]:
        tokenizer = self.job.model.tokenizer
        is_special = tokenizer is not None and not tokenizer.decode_bytes((token_id,))
        return {"id": token_id, "text": "", "logprob": None, "special": is_special}

    def _details(self, delta: OutputDelta, with_tokens: bool = False) -> dict[str, Any]:
        reason = delta.finish_reason
        if reason == "stop":
            reason = "eos_token" if delta.stop_reason is None else "stop_sequence"
        details = {
            "finish_reason": reason,
            "generated_tokens": len(self._tokens),
            "seed": self.job.requests[0].params.seed,
        }
        return {**details, "prefill": [], "tokens": self._tokens} if with_tokens else details


class InferAnswer(TgiAnswer):
    """An answer in MindIE's own form: times in milliseconds, as this server sees them."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._told_at = time.monotonic()
        self._has_begun = False

    def events(self, number: int, deltas: Sequence[OutputDelta]) -> Iterator[Any]:
        """One event for each delta."""
        for delta in deltas:
            self._take(delta)
            now = time.monotonic()
            passed_ms = round((now - self._told_at) * 1e3, 2)
            event: dict[str, Any] = {
                "prefill_time": None if self._has_begun else passed_ms,
                "decode_time": passed_ms if self._has_begun else None,
                "token": {"id": delta.token_ids, "text": delta.text},
            }
            self._told_at, self._has_begun = now, True
            if delta.finish_reason is not None:
                event["generated_text"] = self._text
                if self._asked.has_details:
                    event["details"] = self._details(delta)
            yield event

    def whole(self, deltas: Iterable[tuple[int, OutputDelta]]) -> Any:
        """The answer that is not streamed."""
        ((_, delta),) = deltas
        self._take(delta)
        reply: dict[str, Any] = {"generated_text": self._text}
        if self._asked.has_details:
            reply["details"] = self._details(delta)
        return reply


# What is known.


def count_tokens(
    body: bytes, model: ServedModel, options: ServeOptions
) -> tuple[dict[str, Any], list[str]]:
    """Number and texts of the tokens of a text, and the names of fields without effect.

    Raises:
        Refusal: the text cannot be encoded.
    """
    given, ignored = decode(body, TokenizerBody, options.strict_fields)
    if model.tokenizer is None:
        raise Refusal(400, "this checkpoint has no tokenizer; send token ids", param="model")
    _, ids = encode(given.inputs, "inputs", model, add_special_tokens=True, may_exceed=True)
    texts = [model.tokenizer.token_text(one) for one in ids] if given.do_decode else []
    return {"token_number": len(ids), "tokens": texts}, ignored


def described(model: ServedModel, life: Life, options: ServeOptions) -> dict[str, Any]:
    """The model in TGI's form; null is what this server does not have."""
    info = life.info
    return {
        "docker_label": None,
        "max_batch_total_tokens": None if info is None else info.num_blocks * info.block_size,
        "max_best_of": 1,
        "max_concurrent_requests": options.max_queued_requests,
        "max_stop_sequences": None,
        "max_waiting_tokens": None,
        "sha": None,
        "validation_workers": None,
        "version": __version__,
        "waiting_served_ratio": None,
        "models": [
            {
                "model_device_type": None if info is None else info.device,
                "model_dtype": None if info is None else info.dtype,
                "model_id": name,
                "model_pipeline_tag": "text-generation",
                "model_sha": None,
                "max_total_tokens": model.max_model_len,
            }
            for name in model.names
        ],
        "max_input_length": model.max_model_len - 1,
    }


def five_numbers(life: Life, metrics: Metrics) -> dict[str, Any]:
    """Mean times in milliseconds, and what the engine has to do."""
    stats = None if life.pulse is None else life.pulse.stats
    numbers: dict[str, float] = {
        "TTFT": _mean_ms(metrics.first_token_s),
        "TBT": _mean_ms(metrics.inter_token_s),
        "waitingInferRequestNum": stats.num_waiting if stats else 0,
        "processingInferRequestNum": stats.num_running if stats else 0,
        "remainBlocks": stats.num_free_blocks if stats else 0,
    }
    result = [
        {"metric": [{"__name__": name, "job": "node"}], "value": f"{value:g}"}
        for name, value in numbers.items()
    ]
    return {"resultType": "vector", "result": result}


def _mean_ms(seconds: Collection[float]) -> float:
    return round(1e3 * sum(seconds) / len(seconds), 2) if seconds else 0.0
