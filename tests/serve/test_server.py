"""Sockets, options, the OpenAPI document, and what a start refuses."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import ssl
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from moespan.cli import main
from moespan.cli import serve as verb
from moespan.errors import ConfigError
from moespan.serve.openapi import document, openapi
from moespan.serve.options import ServeOptions, flag_of, flags_table, options
from moespan.serve.server import (
    PortTakenError,
    Server,
    check_open_files,
    listen,
    listen_apart,
    url_of,
)
from tests.serve.scene import Served, Wired, play, quickstart

ROOT = Path(__file__).resolve().parents[2]


def test_the_reference_has_the_table_that_the_flags_are_made_of():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    table = "\n".join(flags_table())
    assert table in page, f"put this into docs/cli.md:\n{table}"


def test_every_option_has_a_meaning_and_says_when_to_change_it():
    for one in options():
        assert one.metadata["help"] and one.metadata["when"], one.name


def test_flags_follow_from_the_names_of_options():
    assert flag_of("read_timeout_s") == "--read-timeout"
    assert flag_of("max_body_mib") == "--max-body-mib"


@pytest.mark.parametrize(
    "given",
    [
        {"port": -1},
        {"port": 65536},
        {"max_n": 129},
        {"max_logprobs": 21},
        {"max_body_mib": 0},
        {"read_timeout_s": 0},
        {"ssl_certfile": "x"},
        {"ssl_ca_certs": "x"},
        {"root_path": "x"},
        {"allowed_origins": ("example.org",)},
        {"allowed_origins": ("https://example.org/",)},
        {"allowed_origins": (5,)},
        {"root_path": "/x/"},
        {"max_queued_requests": 0},
    ],
)
def test_options_out_of_bounds_are_refused(given):
    with pytest.raises(ConfigError):
        ServeOptions(**given)


def test_origins_are_taken_as_words_or_as_vllms_list():
    def origins(*words: str) -> tuple[str, ...]:
        parser = argparse.ArgumentParser()
        verb.add_flags(parser)
        return verb._chosen(parser.parse_args(["--allowed-origins", *words])).allowed_origins

    assert origins("https://a.example", "http://b:1") == ("https://a.example", "http://b:1")
    assert origins('["*"]') == ("*",)
    with pytest.raises(ConfigError, match="must be \\* or like"):
        origins('["*"')


def test_a_port_that_is_taken_is_one_clear_error():
    with listen(ServeOptions(port=0)) as sock:
        port = sock.getsockname()[1]
        assert url_of(sock, ServeOptions()) == f"http://127.0.0.1:{port}"
        with pytest.raises(PortTakenError, match=f"--port {port} cannot be listened on: Address"):
            listen(ServeOptions(port=port))
    for host in ("256.0.0.1", "203.0.113.1"):
        with pytest.raises(PortTakenError, match=host):
            listen(ServeOptions(host=host, port=0))


def test_the_management_port_is_a_second_socket_under_the_same_rules(tmp_path: Path):
    assert listen_apart(ServeOptions()) == []
    (sock,) = listen_apart(ServeOptions(management_port=0))
    with sock:
        port = sock.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"--management-port {port} cannot be listened on"):
            listen_apart(ServeOptions(management_port=port))
    behind_a_socket: dict[str, Any] = {"uds": str(tmp_path / "sock"), "host": "0.0.0.0"}
    assert ServeOptions(**behind_a_socket).is_loopback
    assert not ServeOptions(**behind_a_socket, management_port=0).is_loopback


def test_a_taken_port_ends_the_verb_with_code_2_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
):
    with listen(ServeOptions(port=0)) as sock:
        port = str(sock.getsockname()[1])
        with pytest.raises(SystemExit) as caught:
            main(["serve", "no/such/model", "--port", port])
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "Address already in use" in lines[0]


def test_a_server_for_others_without_a_key_does_not_start(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["serve", "models/quickstart", "--host", "0.0.0.0", "--port", "0"])
    assert caught.value.code == 2
    assert "--allow-no-auth" in capsys.readouterr().err


def test_a_unix_socket_is_for_this_user_and_a_dead_one_is_replaced(tmp_path: Path):
    path = tmp_path / "sock"
    chosen = ServeOptions(uds=str(path))
    with listen(chosen) as sock:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert url_of(sock, chosen) == f"unix:{path}"
        with pytest.raises(PortTakenError):
            listen(chosen)
    listen(chosen).close()  # the file is still there, and nobody listens
    path.unlink()
    path.write_text("a file")
    with pytest.raises(PortTakenError):
        listen(chosen)
    assert path.read_text() == "a file"


def test_a_certificate_makes_https(tmp_path: Path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subprocess.run(
        [*command, "-subj", "/CN=localhost", "-keyout", str(key), "-out", str(cert)],
        check=True,
        capture_output=True,
    )
    paths: dict[str, Any] = {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}

    async def script(served: Served) -> None:
        async with Wired(served) as server:
            trusting = ssl.create_default_context(cafile=str(cert))
            trusting.check_hostname = False
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=trusting)
            writer.write(b"GET /live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
            writer.close()

    play(script, port=0, **paths)
    with pytest.raises(ConfigError, match="--ssl-certfile"):
        Server(lambda *_: None, ServeOptions(ssl_certfile=str(key), ssl_keyfile=str(cert)))  # type: ignore[arg-type]
    os.mkfifo(tmp_path / "fifo")
    encrypt = ["openssl", "pkey", "-aes256", "-passout", "pass:secret", "-in", str(key)]
    subprocess.run([*encrypt, "-out", str(tmp_path / "encrypted")], check=True)
    for field, name, says in (
        ("ssl_keyfile", "encrypted", "--ssl-keyfile .* is encrypted, .*openssl pkey"),
        ("ssl_certfile", "fifo", "--ssl-certfile .*it is a FIFO"),
        ("ssl_keyfile", "fifo", "--ssl-keyfile .*it is a FIFO"),
        ("ssl_ca_certs", "gone.pem", "--ssl-ca-certs .* cannot be read: .*No such file"),
    ):
        options = ServeOptions(**{**paths, field: str(tmp_path / name)})
        with pytest.raises(ConfigError, match=says):
            Server(lambda *_: None, options)  # type: ignore[arg-type]


def test_a_prefix_of_a_proxy_is_taken_with_and_without():
    async def script(served: Served) -> None:
        for prefix in ("", "/llm"):
            assert (await served.http.get(f"{prefix}/live")).status_code == 200
            response = await served.http.get(f"{prefix}/v1/models")
            assert response.status_code == 401
            headers = {"authorization": "Bearer k"}
            response = await served.http.get(f"{prefix}/v1/models", headers=headers)
            assert response.status_code == 200
        for path in ("/llm/llm/live", "/llmlive", "/other/live"):
            assert (await served.http.get(path)).status_code == 401

    play(script, root_path="/llm", api_key="k")


def test_forwarded_headers_are_not_believed_by_default():
    options_ = ServeOptions()
    server = Server(lambda *_: None, options_)  # type: ignore[arg-type]
    assert not server.config.proxy_headers
    server = Server(lambda *_: None, ServeOptions(forwarded_allow_ips="10.0.0.1"))  # type: ignore[arg-type]
    assert server.config.proxy_headers and server.config.forwarded_allow_ips == "10.0.0.1"


def test_the_openapi_document_describes_every_route(capsys: pytest.CaptureFixture[str]):
    described = openapi()
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--print-openapi"])
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out) == json.loads(document()) == described

    async def script(served: Served) -> None:
        for path, methods in described["paths"].items():
            for method in ("get", "post") if path != "/ping" else ("get",):
                response = await served.http.request(method, path)
                assert (response.status_code == 405) is (method not in methods), (path, method)

    play(script)
    for schema in json.dumps(described).split('"$ref": "')[1:]:
        name = schema.partition('"')[0].rpartition("/")[2]
        assert name in described["components"]["schemas"]


def test_tokens_and_text_as_lm_eval_asks_for_them():
    async def script(served: Served) -> None:
        tokenizer = quickstart().tokenizer
        assert tokenizer is not None
        info = (await served.http.get("/tokenizer_info")).json()
        assert (info["bos_token"], info["eos_token"], info["pad_token"]) == (
            "<|begin|>",
            "<|end|>",
            "<|end|>",
        )
        assert info["chat_template"] == tokenizer.chat_template
        for add in (True, False):
            body = (await served.post("/tokenize", prompt="12 森", add_special_tokens=add)).json()
            assert body == {
                "count": len(body["tokens"]),
                "max_model_len": 512,
                "tokens": tokenizer.encode("12 森", add_special_tokens=add),
                "token_strs": None,
            }
            back = (await served.post("/detokenize", tokens=body["tokens"])).json()
            assert back == {"prompt": ("<|begin|>" if add else "") + "12 森"}
        messages = [{"role": "user", "content": "hi"}]
        body = (await served.post("/tokenize", messages=messages, return_token_strs=True)).json()
        text = tokenizer.apply_chat_template(messages)
        assert body["tokens"] == tokenizer.encode(text, add_special_tokens=False)
        assert "".join(body["token_strs"]) == text
        for path, bad in (
            ("/tokenize", {}),
            ("/tokenize", {"prompt": "a", "messages": messages}),
            ("/tokenize", {"prompt": 5}),
            ("/detokenize", {}),
            ("/detokenize", {"tokens": [512]}),
            ("/detokenize", {"tokens": ["a"]}),
            ("/tokenize", {"prompt": "a", "model": "none"}),
        ):
            response = await served.post(path, **bad)
            assert response.status_code in (400, 404), (path, bad)
        response = await served.post("/tokenize", prompt="x" * (2 << 20))
        assert response.status_code == 400 and "1048576" in response.text

    play(script)


def test_a_limit_of_files_under_which_nobody_is_accepted_is_refused(
    monkeypatch: pytest.MonkeyPatch,
):
    for most, says in ((9, "may open 9 files, .* ulimit -n 65536"), (64, None), (-1, None)):
        monkeypatch.setattr("resource.getrlimit", lambda _, most=most: (most, most))
        with pytest.raises(ConfigError, match=says) if says else contextlib.nullcontext():
            check_open_files()
