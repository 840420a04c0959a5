"""The routes of MindIE's server: probes that its scripts compare, generation, and the end."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from moespan.serve.life import State
from tests.serve.fake_ranks import pulse
from tests.serve.scene import Served, event_lines, play

KEY = {"authorization": "Bearer secret"}
HEALTHY = '{"status":"healthy"}'


def stream(response: httpx.Response) -> list[Any]:
    lines = event_lines(response)
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines]


def test_probes_have_the_very_answers_that_scripts_compare():
    async def script(served: Served) -> None:
        async def get(path: str) -> tuple[int, str]:
            response = await served.http.get(path, headers=KEY if "models" in path else None)
            return response.status_code, response.text

        assert await get("/v2/health/live") == (200, "")
        assert await get("/v2/health/ready") == (200, "")
        assert await get("/v2/models/models/quickstart/ready") == (200, "")
        assert await get("/v2/models/models/quickstart/versions/1/ready") == (200, "")
        assert (await get("/v2/models/another/ready"))[0] == 404
        for path in ("/health/timed", "/health/timed-3"):
            assert await get(path) == (200, HEALTHY)
        served.ranks.is_silent = True
        await asyncio.sleep(1.2)
        assert await get("/health/timed-1") == (503, "silent")
        assert await get("/health/timed-30") == (200, HEALTHY)
        served.ranks.is_stopped = True
        await asyncio.sleep(0.6)
        assert await get("/health/timed-30") == (503, "stalled")
        assert await get("/v2/health/ready") == (503, "stalled")

    play(script, mindie_routes=True, api_key="secret")


def test_a_server_that_drains_is_not_killed_by_their_scripts():
    async def script(served: Served) -> None:
        served.http.headers.update(KEY)
        asking = asyncio.create_task(served.post("/generate", inputs="12+30="))
        while not served.life.num_live:
            await asyncio.sleep(0)
        response = await served.http.get("/stopService")
        assert response.json() == {"status": "stopping", "unfinished": 1}
        assert served.life.state is State.DRAINING
        assert (await served.http.get("/health/timed-3")).text == HEALTHY
        assert (await served.http.get("/v2/health/ready")).status_code == 503
        served.ranks.holds = False
        assert (await asking).json() == {"generated_text": " 42"}

    play(script, holds=True, mindie_routes=True, api_key="secret")


def test_stopping_needs_a_key():
    async def without(served: Served) -> None:
        response = await served.http.get("/stopService")
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "key_needed"
        assert served.life.state is State.READY

    async def wrong(served: Served) -> None:
        assert (await served.http.get("/stopService")).status_code == 401
        assert served.life.state is State.READY

    play(without, mindie_routes=True)
    play(wrong, mindie_routes=True, api_key="secret")


def test_without_the_flag_there_are_no_such_routes():
    async def script(served: Served) -> None:
        for path in ("/v2/health/live", "/health/timed-3", "/stopService", "/info"):
            assert (await served.http.get(path)).status_code == 404
        assert (await served.post("/generate", inputs="12+30=")).status_code == 404

    play(script)


def test_generate_answers_as_tgi_does():
    async def script(served: Served) -> None:
        plain = await served.post("/generate", inputs="12+30=")
        assert plain.json() == {"generated_text": " 42"}
        (request,) = served.ranks.seen
        assert request.params.temperature == 0 and request.params.max_tokens == 20
        full = await served.post(
            "/generate",
            inputs="12+30=",
            parameters={"details": True, "return_full_text": True, "seed": 5, "stop": ["x"]},
        )
        reply = full.json()
        assert reply["generated_text"] == "12+30= 42"
        details = reply["details"]
        assert details["finish_reason"] == "eos_token" and details["seed"] == 5
        assert details["generated_tokens"] == len(details["tokens"])
        assert details["tokens"][-1]["special"] and not details["tokens"][0]["special"]
        assert all(token["logprob"] < 0 for token in details["tokens"])
        assert served.ranks.seen[-1].params.temperature == 1
        assert served.ranks.seen[-1].params.stop == ["x"]

    play(script, mindie_routes=True)


@pytest.mark.parametrize(
    "parameters, reason",
    [({}, "eos_token"), ({"max_new_tokens": 1}, "length"), ({"stop": ["2"]}, "stop_sequence")],
)
def test_streams_of_tgi_join_to_the_text(parameters: dict[str, Any], reason: str):
    async def script(served: Served) -> None:
        body = {"inputs": "12+30=", "parameters": {**parameters, "details": True}}
        *first, last = stream(await served.post("/generate_stream", **body))
        whole = (await served.post("/generate", **body)).json()
        assert "".join(one["token"]["text"] for one in (*first, last)) == whole["generated_text"]
        assert all(one["generated_text"] is None and one["details"] is None for one in first)
        assert last["generated_text"] == whole["generated_text"]
        assert last["details"]["finish_reason"] == reason
        assert last["details"]["generated_tokens"] == len(first) + 1

    play(script, mindie_routes=True)


def test_infer_has_a_form_of_its_own():
    async def script(served: Served) -> None:
        body: dict[str, Any] = {"inputs": "12+30=", "parameters": {"details": True}}
        first, *rest = stream(await served.post("/infer", stream=True, **body))
        assert first["prefill_time"] >= 0 and first["decode_time"] is None
        assert all(one["prefill_time"] is None and one["decode_time"] >= 0 for one in rest)
        assert "".join(one["token"]["text"] for one in (first, *rest)) == " 42"
        assert rest[-1]["generated_text"] == " 42"
        whole = (await served.post("/infer", **body)).json()
        assert whole == {"generated_text": " 42", "details": rest[-1]["details"]}

    play(script, mindie_routes=True)


@pytest.mark.parametrize(
    "body, words",
    [
        ({}, "inputs"),
        ({"inputs": 5}, "inputs"),
        ({"inputs": "a", "parameters": {"typical_p": 0.5}}, "typical_p=0.5"),
        ({"inputs": "a", "parameters": {"watermark": True}}, "watermark=True"),
        ({"inputs": "a", "parameters": {"best_of": 2}}, "best_of=2"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 0.5}}, "max_new_tokens=0.5"),
        ({"inputs": "a", "parameters": {"truncate": 0}}, "truncate=0"),
        ({"inputs": "a 1 " * 5000}, "and inputs has"),
        ({"inputs": "a", "parameters": {"timeout": -1}}, "timeout=-1"),
        ({"inputs": "a", "parameters": "b"}, "parameters"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], words: str):
    async def script(served: Served) -> None:
        response = await served.post("/generate", **body)
        assert response.status_code == 400 and words in response.json()["error"]["message"]

    play(script, mindie_routes=True)


def test_fields_without_effect_are_named():
    async def script(served: Served) -> None:
        response = await served.post(
            "/generate", inputs="12+30=", odd=1, parameters={"priority": 5, "colour": "red"}
        )
        assert response.status_code == 200
        assert response.headers["x-moespan-ignored-fields"] == "odd, parameters.colour"

    play(script, mindie_routes=True)


def test_the_tokenizer_the_model_and_five_numbers():
    async def script(served: Served) -> None:
        reply = (await served.post("/v1/tokenizer", inputs="12+30=")).json()
        assert reply["token_number"] == len(reply["tokens"]) > 3
        short = (await served.post("/v1/tokenizer", inputs="12+30=", do_decode=False)).json()
        assert short == {"token_number": reply["token_number"], "tokens": []}
        info = (await served.http.get("/info")).json()
        assert info["models"][0]["model_id"] == "models/quickstart"
        assert info["max_batch_total_tokens"] == 1024 * 4 and info["sha"] is None
        await served.post("/generate", inputs="12+30=")
        served.ranks.tell(pulse=pulse(running=2, waiting=3))
        reply = (await served.http.get("/metrics-json")).json()
        numbers = {one["metric"][0]["__name__"]: one["value"] for one in reply["result"]}
        assert float(numbers.pop("TTFT")) > 0 and float(numbers.pop("TBT")) >= 0
        assert numbers == {
            "waitingInferRequestNum": "3",
            "processingInferRequestNum": "2",
            "remainBlocks": "6",
        }

    play(script, mindie_routes=True)
