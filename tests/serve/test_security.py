"""Who may call, and what hostile requests get. Tests are named after the flaws of other servers
that they keep out."""

from __future__ import annotations

import ast
import asyncio
import base64
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

import moespan.serve
from moespan.engine.request import SamplingParams
from moespan.errors import ConfigError
from moespan.front.api_key import API_KEY_VARIABLE
from moespan.serve.auth import Keys, check_reach
from moespan.serve.options import ServeOptions
from tests.serve.scene import (
    Served,
    Wired,
    envelope_of,
    error_of,
    play,
    play_wired,
    post_bytes,
    status_of,
)

PATHS = (
    "/v1/models",
    "/v1/completions",
    "/tokenize",
    "/tokenizer_info",
    "/load",
    "/version",
    "/ping",
    "/nothing",
    "/",
)


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    """Options of a server with two keys."""
    file = tmp_path / "keys"
    file.write_text("# comment\nalice a-secret\n\nanother-secret\n")
    return {"api_key_file": str(file)}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def basic(key: str, user: str = "me") -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{key}".encode()).decode()}


def get(target: bytes, host: bytes = b"x") -> bytes:
    return b"GET " + target + b" HTTP/1.1\r\nhost: " + host + b"\r\nconnection: close\r\n\r\n"


# Keys.


def test_everything_but_probes_needs_the_key_known_or_not(keys: dict[str, Any]):
    async def script(served: Served) -> None:
        for method in ("GET", "POST", "OPTIONS", "DELETE"):
            for path in PATHS:
                response = await served.http.request(method, path)
                assert response.status_code == 401, (method, path)
                assert error_of(response)["code"] == "invalid_api_key"
                assert "Bearer" in response.headers["www-authenticate"]
        for path in ("/health", "/live", "/ready"):
            assert (await served.http.get(path)).status_code == 200
        for headers in (bearer("a-secret"), bearer("another-secret"), basic("a-secret")):
            assert (await served.http.get("/v1/models", headers=headers)).status_code == 200
            assert (await served.http.get("/nothing", headers=headers)).status_code == 404

    play(script, **keys)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer a-secre",
        "Bearer a-secrets",
        "Bearer alice",
        "bearer A-SECRET",
        "Token a-secret",
        "a-secret",
        "Basic a-secret",
        "Basic " + base64.b64encode(b"a-secret").decode(),
        "Basic " + base64.b64encode(b"a-secret:").decode(),
        "Basic !!!",
    ],
)
def test_a_wrong_key_is_refused(value: str, keys: dict[str, Any]):
    async def script(served: Served) -> None:
        response = await served.http.get("/v1/models", headers={"authorization": value})
        assert response.status_code == 401

    play(script, **keys)


def test_keys_of_any_bytes_are_compared(keys: dict[str, Any]):
    """Text with other characters makes `hmac.compare_digest` raise."""

    async def script(served: Served) -> None:
        for value in (b"Bearer \xff\xfe", "Bearer ключ".encode(), b"Basic \xff"):
            headers = [(b"authorization", value)]
            response = await served.http.get("/v1/models", headers=headers)
            assert response.status_code == 401
        twice = [(b"authorization", b"Bearer a-secret")] * 2
        assert (await served.http.get("/v1/models", headers=twice)).status_code == 401

    play(script, **keys)


def test_keys_are_read_again(keys: dict[str, Any], caplog: pytest.LogCaptureFixture):
    options = ServeOptions(**keys)
    found = Keys(options, {})
    assert found.name_of(b"a-secret") == "alice"
    assert found.name_of(b"another-secret") == "line 4"
    Path(keys["api_key_file"]).write_text("bob b-secret\n")
    assert found.name_of(b"b-secret") is None
    found.reload()
    assert found.name_of(b"b-secret") == "bob" and found.name_of(b"a-secret") is None
    for broken in ("a b c", "x 1\nx 2", "", "# nothing"):
        Path(keys["api_key_file"]).write_text(broken)
        found.reload()
        assert found.name_of(b"b-secret") == "bob"
    Path(keys["api_key_file"]).unlink()
    found.reload()
    assert found.name_of(b"b-secret") == "bob"


def test_a_reload_without_a_file_says_that_no_key_has_changed(caplog: pytest.LogCaptureFixture):
    Keys(ServeOptions(), {API_KEY_VARIABLE: "a"}).reload()
    assert "SIGHUP changes no key" in caplog.text


def test_the_key_in_the_environment_is_taken_out_of_it(tmp_path: Path):
    environment = {API_KEY_VARIABLE: "from-env", "OTHER": "1"}
    keys = Keys(ServeOptions(api_key="given"), environment)
    assert environment == {"OTHER": "1"}
    assert keys.name_of(b"from-env") == API_KEY_VARIABLE and keys.name_of(b"given") == "--api-key"
    assert not Keys(ServeOptions(), {})
    for wrong in (ServeOptions(api_key=""), ServeOptions(api_key_file=str(tmp_path / "none"))):
        with pytest.raises(ConfigError):
            Keys(wrong, {})


def test_a_server_that_others_reach_needs_a_key():
    none, some = Keys(ServeOptions(), {}), Keys(ServeOptions(api_key="x"), {})
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(ConfigError, match="--allow-no-auth"):
            check_reach(ServeOptions(host=host), none)
        check_reach(ServeOptions(host=host), some)
        check_reach(ServeOptions(host=host, allow_no_auth=True), none)
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        check_reach(ServeOptions(host=host), none)
    check_reach(ServeOptions(host="0.0.0.0", uds="/tmp/x"), none)


# Browsers.


def test_a_page_of_another_origin_cannot_post(keys: dict[str, Any]):
    async def script(served: Served) -> None:
        body = {"prompt": "a"}

        async def post(**headers: str) -> httpx.Response:
            return await served.http.post("/v1/completions", json=body, headers=headers)

        own = {"origin": "http://localhost"}
        assert (await post(**basic("a-secret"), **own)).status_code == 200
        assert (await post(**basic("a-secret"))).status_code == 200
        for origin in (
            "http://evil.example",
            "null",
            "http://localhost.evil.example",
            "http://localhost:1",
        ):
            response = await post(**basic("a-secret"), origin=origin)
            assert response.status_code == 403
            assert error_of(response)["code"] == "foreign_origin"
            # A program that holds the key is no page.
            assert (await post(**bearer("a-secret"), origin=origin)).status_code == 200
        response = await served.http.post(
            "/v1/completions",
            content=json.dumps(body),
            headers={**basic("a-secret"), "content-type": "text/plain"},
        )
        assert response.status_code == 415

    play(script, **keys)


def test_a_name_that_a_page_points_at_this_machine_is_refused():
    """DNS rebinding, as of CVE-2024-28224 (Ollama): the page's own name, and so no other origin."""

    async def script(served: Served) -> None:
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "a"):
            for path in ("/", "/v1/models", "/metrics", "/ui/state"):
                response = await served.http.get(f"http://{host}:8000{path}")
                assert response.status_code == 403
                assert error_of(response)["code"] == "foreign_host"
            url = f"http://{host}:8000/v1/completions"
            assert (await served.http.post(url, json={"prompt": "a"})).status_code == 403
            assert (await served.http.get(f"http://{host}:8000/health")).status_code == 200
        for host in ("localhost", "LOCALHOST.", "my.localhost", "127.0.0.1", "[::1]", "192.0.2.1"):
            response = await served.http.get(f"http://{host}:8000/v1/models")
            assert response.status_code == 200, host
        assert served.ranks.seen == []

    play(script)


def test_names_that_are_allowed_and_servers_with_keys_take_any_name(keys: dict[str, Any]):
    async def models(served: Served, host: str, **headers: str) -> int:
        url = f"http://{host}:8000/v1/models"
        return (await served.http.get(url, headers=headers)).status_code

    async def listed(served: Served) -> None:
        assert await models(served, "ai.example.org") == 200
        assert await models(served, "ai.example.com") == 403

    async def keyed(served: Served) -> None:
        assert await models(served, "ai.example.com", **bearer("a-secret")) == 200
        assert await models(served, "ai.example.com") == 401

    async def anybody(served: Served) -> None:
        assert await models(served, "ai.example.com") == 200

    play(listed, allowed_hosts=("AI.example.org",))
    play(keyed, **keys)
    play(anybody, allowed_hosts=("*",))
    play(anybody, host="0.0.0.0", allow_no_auth=True)
    for wrong in ("http://x", "x:1", "a b", ""):
        with pytest.raises(ConfigError, match="--allowed-hosts"):
            ServeOptions(allowed_hosts=(wrong,))


def test_cross_origin_calls_are_off_unless_allowed():
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}

    async def off(served: Served) -> None:
        response = await served.http.options("/v1/completions", headers=preflight)
        assert response.status_code == 405
        assert not [name for name in response.headers if name.startswith("access-control")]

    async def on(served: Served) -> None:
        response = await served.http.options("/v1/completions", headers=preflight)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-credentials" not in response.headers
        response = await served.http.post(
            "/v1/completions", json={"prompt": "a"}, headers={"origin": "https://a.example"}
        )
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        response = await served.http.get("/nothing", headers={"origin": "https://a.example"})
        assert response.status_code == 404
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        preflight["origin"] = "https://b.example"
        response = await served.http.options("/v1/completions", headers=preflight)
        assert "access-control-allow-origin" not in response.headers

    play(off)
    play(on, allowed_origins=("https://a.example",))


def test_every_answer_has_the_headers_for_browsers(keys: dict[str, Any]):
    async def script(served: Served) -> None:
        for path in ("/live", "/v1/models", "/nothing"):
            headers = (await served.http.get(path)).headers
            assert "default-src 'self'" in headers["content-security-policy"]
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-request-id"] and "server" not in headers

    play(script, **keys)


# Flaws of other servers.


def test_cve_2026_48746_the_host_header_decides_nothing(keys: dict[str, Any]):
    async def script(served: Served, server: Wired) -> None:
        for host in (b"x/health?", b"x/live", b"/health", b"health", b"x/v1/../health#", b"a:b@c"):
            for target in (b"/v1/models", b"/v1/models?/health", b"/health/../v1/models"):
                answer = await server.ask(
                    b"GET "
                    + target
                    + b" HTTP/1.1\r\nhost: "
                    + host
                    + b"\r\nconnection: close\r\n\r\n"
                )
                assert status_of(answer) == 401, (host, target)
        for target in (
            b"http://x/health",
            b"//health",
            b"/health/",
            b"/health%2f",
            b"/%68ealth",
            b"/health;/v1/models",
            b"/HEALTH",
            b"/./health",
            b"/live/../v1/models",
            b"*",
        ):
            assert status_of(await server.ask(get(target))) == 401, target
        for target in (b"/health", b"/health?x=/v1/models"):
            assert status_of(await server.ask(get(target))) == 200, target

    play_wired(script, **keys)


def test_cve_2025_59425_keys_are_compared_in_constant_time():
    source = Path(moespan.serve.__file__).with_name("auth.py").read_text()
    (method,) = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == "name_of"
    ]
    assert "hmac.compare_digest" in ast.unparse(method)
    assert not [node for node in ast.walk(method) if isinstance(node, ast.Compare)]
    # Nothing leaves the loop before the last key.
    (loop,) = [node for node in ast.walk(method) if isinstance(node, ast.For)]
    assert not [n for n in ast.walk(loop) if isinstance(n, ast.Return | ast.Break)]


def test_cve_2025_48956_headers_are_limited():
    async def script(served: Served, server: Wired) -> None:
        for size in (16 << 10, 8 << 20):
            head = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * size + b"\r\n\r\n"
            answer = await server.ask(head)
            assert status_of(answer) == 431
            envelope_of(answer)

    play_wired(script)


def test_cve_2026_34756_counts_are_limited():
    async def script(served: Served) -> None:
        for body in (
            {"n": 2**31},
            {"n": 129},
            {"best_of": 10**9},
            {"logprobs": 10**6},
            {"prompt_logprobs": 10**6},
            {"stop": ["x"] * 10_000},
            {"stop": "x" * 100_000},
            {"prompt": ["a"] * 513},
            {"prompt": ["a"] * 512, "n": 3},
            {"prompt": [[5]] * 20_000},
            {"logit_bias": {str(token): 1 for token in range(5000)}},
            {"prompt": [5] * 1_000_000},
        ):
            response = await served.complete(**body)
            assert response.status_code == 400, body
            error_of(response)
        assert served.ranks.seen == []

    play(script)


def test_cve_2024_8768_empty_prompts_do_no_harm():
    async def script(served: Served) -> None:
        for prompt, status in (
            ("", 200),
            (" ", 200),
            ("\n", 200),
            ([0], 200),
            ([], 400),
            ([[]], 400),
        ):
            response = await served.complete(prompt=prompt)
            assert response.status_code == status, (prompt, response.text)
        chats: list[tuple[list[Any], int]] = [
            ([], 400),
            ([{}], 400),
            ([{"role": "user", "content": ""}], 200),
            ([{"role": "user", "content": []}], 200),
        ]
        for messages, status in chats:
            response = await served.post("/v1/chat/completions", messages=messages)
            assert response.status_code == status, response.text
        assert (await served.complete()).status_code == 200

    play(script)


def test_cve_2025_61620_a_request_brings_no_template():
    async def script(served: Served) -> None:
        evil = "{{ ''.__class__.__mro__ }}"
        for body in (
            {"chat_template": evil},
            {"chat_template_kwargs": {"chat_template": evil}},
            {"chat_template_kwargs": {"tokenize": True}},
        ):
            for path in ("/v1/chat/completions", "/tokenize"):
                messages = [{"role": "user", "content": "x"}]
                response = await served.post(path, messages=messages, **body)
                assert response.status_code == 400
                assert "a chat template never comes from a request" in response.text

    play(script)


def test_cve_2025_6242_nothing_is_fetched_for_a_request():
    async def script(served: Served) -> None:
        for part in (
            {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}},
            {"type": "input_audio", "input_audio": {}},
            {"type": "file", "file": {"file_id": "../../etc/passwd"}},
        ):
            message = {"role": "user", "content": [{"type": "text", "text": "x"}, part]}
            response = await served.post("/v1/chat/completions", messages=[message])
            assert response.status_code == 400
            assert "the model takes text only" in error_of(response)["message"]

    play(script)
    clients = {"httpx", "requests", "aiohttp", "urllib.request", "http.client", "ftplib"}
    for file in Path(moespan.serve.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not clients & set(names), file


def test_cve_2026_44223_no_pair_of_parameters_ends_the_engine():
    async def script(served: Served) -> None:
        values: dict[str, Any] = {
            "temperature": 0,
            "top_k": 1,
            "top_p": 0.01,
            "min_p": 1,
            "repetition_penalty": 2,
            "presence_penalty": 2,
            "frequency_penalty": -2,
            "logit_bias": {"5": 100},
            "seed": -(2**63),
            "logprobs": 20,
            "echo": True,
            "n": 2,
            "stop": ["4"],
            "min_tokens": 2,
        }
        for one, value in values.items():
            for other, second in values.items():
                response = await served.complete(**{one: value, other: second})
                assert response.status_code == 200, response.text
        for request in served.ranks.seen:
            assert SamplingParams(
                **{name: getattr(request.params, name) for name in SamplingParams.__struct_fields__}
            )

    play(script)


def test_cve_2025_62426_a_slow_template_holds_nobody_up():
    """`tokenize` and templates run beside the event loop."""

    async def script(served: Served, server: Wired) -> None:
        slow = {"messages": [{"role": "user", "content": "x" * 100_000}]}
        body = json.dumps(slow).encode()
        request = post_bytes("/tokenize", body, b"connection: close")
        asked = [asyncio.create_task(server.ask(request)) for _ in range(2)]
        worst = 0.0
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
            for _ in range(20):
                began = time.monotonic()
                assert (await client.get("/live")).status_code == 200
                worst = max(worst, time.monotonic() - began)
                await asyncio.sleep(0.005)
        assert worst < 2, worst
        for task in asked:
            assert status_of(await task) == 200

    play_wired(script)


def test_deep_json_is_refused():
    async def script(served: Served) -> None:
        for depth in (65, 5_000, 1_000_000):
            deep = b"[" * depth + b"]" * depth
            for field in (b"prompt", b"logit_bias", b"stop", b"response_format", b"messages"):
                for path in ("/v1/completions", "/v1/chat/completions"):
                    response = await served.http.post(
                        path,
                        content=b'{"' + field + b'": ' + deep + b"}",
                        headers={"content-type": "application/json"},
                    )
                    assert response.status_code == 400, (depth, field)
                    error_of(response)
            objects = b'{"a":' * depth + b"1" + b"}" * depth
            response = await served.http.post(
                "/v1/completions",
                content=b'{"prompt": "a", "response_format": ' + objects + b"}",
                headers={"content-type": "application/json"},
            )
            assert response.status_code == 400

    play(script)


def test_a_large_value_does_not_come_back_in_its_error():
    async def script(served: Served) -> None:
        big = "x" * 1_000_000
        for body in (
            {"stop": [big] * 2},
            {"n": big},
            {"model": big},
            {big: 1, "strict": 1},
            {"logit_bias": {big: 1}},
            {"response_format": {"type": big}},
            {"tool_choice": {big: 1}},
            {"lora": big},
            {"seed": 10**400},
        ):
            for response in (await served.complete(**body), await served.chat(**body)):
                assert len(response.content) < 4096
                assert len(response.headers.get("x-moespan-ignored-fields", "")) <= 1024

    play(script)


def test_no_client_text_reaches_the_log_unescaped(caplog: pytest.LogCaptureFixture):
    async def script(served: Served) -> None:
        for path in ("/x%0A[ERROR] fake", "/%1b[31m", "/%e2%80%aetxt"):
            await served.http.get(path)
        await served.complete(**{"evil\nfield\x1b[0m": 1})
        await served.http.get("/live", headers={"x-request-id": "a\tb"})

    with caplog.at_level("DEBUG", logger="moespan"):
        play(script, log_requests=True)
    text = "".join(record.getMessage() for record in caplog.records)
    assert "fake" in text and not [c for c in text if not c.isprintable()]


def test_requests_are_logged_without_the_probes(caplog: pytest.LogCaptureFixture):
    async def script(served: Served) -> None:
        for path in ("/live", "/health", "/ready", "/ping", "/load"):
            await served.http.get(path)
        await served.complete()

    with caplog.at_level("INFO", logger="moespan"):
        play(script, log_requests=True)
    told = [one.getMessage() for one in caplog.records if ", request " in one.getMessage()]
    assert len(told) == 1 and told[0].startswith("POST /v1/completions: 200")


def test_neither_prompts_nor_answers_nor_keys_are_logged(
    caplog: pytest.LogCaptureFixture, keys: dict[str, Any]
):
    async def script(served: Served) -> None:
        for headers in (bearer("a-secret"), bearer("wrong-secret")):
            for prompt in ("a private question", 5):
                await served.http.post("/v1/completions", json={"prompt": prompt}, headers=headers)

    with caplog.at_level("DEBUG", logger="moespan"):
        play(script, texts=["private answer"], log_requests=True, **keys)
    text = "".join(record.getMessage() for record in caplog.records)
    assert "request" in text
    for secret in ("private", "a-secret", "wrong-secret"):
        assert secret not in text


def test_prompts_and_answers_are_logged_if_asked_for(caplog: pytest.LogCaptureFixture):
    async def script(served: Served) -> None:
        await served.complete(prompt="a private\nquestion", stream=True)
        await served.complete(prompt=[[5, 6]])
        await served.chat("another")

    with caplog.at_level("INFO", logger="moespan"):
        play(script, texts=["a private answer"], log_prompts=True)
    text = "|".join(record.getMessage() for record in caplog.records)
    for told in (
        r"prompt 0: a private\nquestion",
        "prompt 0: [5, 6]",
        "answer 0: a private answer",
        r"prompt 0: <|begin|>User: another\n\nAssistant:",
    ):
        assert told in text


def test_errors_show_no_path_of_this_machine():
    async def script(served: Served) -> None:
        here = str(Path.cwd())
        odd: list[list[Any]] = [[], [{"role": "user", "content": "\x00"}]]
        for messages in odd:
            response = await served.post("/v1/chat/completions", messages=messages)
            assert here not in response.text and "Traceback" not in response.text
        assert here not in (await served.http.get("/tokenizer_info")).text

    play(script)
