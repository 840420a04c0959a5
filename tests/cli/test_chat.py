"""`moespan chat` holds a conversation, with an engine here or with a server."""

from __future__ import annotations

import http.server
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moespan.cli import main
from moespan.errors import MoespanError, RequestError
from moespan.front.conversation import Conversation, Ending
from moespan.front.remote import ServerAnswerer
from tests.support import QUICKSTART

USER = "681+734="


class Scripted:
    """Answers with the number of messages it was asked with, or as `outcome` says."""

    def __init__(self, outcome: BaseException | None = None) -> None:
        self.asked: list[Any] = []
        self.outcome = outcome

    def answer(self, messages, say):
        self.asked.append(list(messages))
        say(f"{len(messages)} ")
        if self.outcome is not None:
            raise self.outcome
        say("messages")
        return Ending("stop", 2)


class Server(http.server.ThreadingHTTPServer):
    """A server of OpenAI's chat protocol with scripted answers.

    Attributes:
        stream: the bytes that follow each request for an answer.
        status: the status of that answer.
        requests: pairs of path and decoded body.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.stream, self.status = b"", 200
        self.requests: list[tuple[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self._send(200, json.dumps({"data": [{"id": "first"}, {"id": "second"}]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body))
        self.server.keys.append(self.headers["Authorization"])
        self._send(self.server.status, self.server.stream)

    def _send(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def events(*contents: Any, done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(content)}\n\n" for content in contents]
    return "".join([": ping\n\n", *lines, "data: [DONE]\n\n" * done]).encode()


def piece(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": finish_reason}]}


@pytest.fixture
def chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the verb in this process on lines of stdin."""

    def run(lines: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        with pytest.raises(SystemExit) as exit_:
            main(["chat", *map(str, arguments)])
        return int(exit_.value.code or 0), *capsys.readouterr()

    return run


def test_each_question_is_asked_with_all_turns_before_it():
    answerer = Scripted()
    conversation = Conversation(answerer, system="be brief")
    conversation.ask("one", lambda piece: None)
    conversation.ask("two", lambda piece: None)
    assert [message["content"] for message in answerer.asked[1]] == [
        "be brief",
        "one",
        "2 messages",
        "two",
    ]
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "be brief"}]


def test_an_empty_answer_is_kept_with_its_question():
    class Silent:
        def answer(self, messages, say):
            return Ending("stop", 1)

    conversation = Conversation(Silent())
    conversation.ask("one", lambda piece: None)
    assert [message["content"] for message in conversation.turns] == ["one", ""]


@pytest.mark.parametrize("outcome", [KeyboardInterrupt(), MoespanError("gone")])
def test_the_part_of_an_answer_before_its_interruption_is_kept(outcome):
    conversation = Conversation(Scripted(outcome))
    with pytest.raises(type(outcome)):
        conversation.ask("one", lambda piece: None)
    assert [message["content"] for message in conversation.turns] == ["one", "1"]


def test_an_engine_answers_line_by_line_and_the_conversation_is_saved(chat, tmp_path):
    saved = tmp_path / "talk.json"
    code, out, err = chat(
        f"{USER}\n\n/system\n/save\n/save {saved}\n/nonsense\n/quit\nnot read\n",
        QUICKSTART,
    )
    assert code == 0
    assert out.strip().endswith("1415")
    assert "/save needs the name of a file" in err
    assert "'/nonsense' is no command" in err
    assert "tokens/s" in err
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[1]["content"] == out.strip()


def test_a_conversation_that_is_too_long_ends_no_program(chat):
    code, out, err = chat(f"{'9' * 4000}\n{USER}\n", QUICKSTART, "--quiet")
    assert code == 1  # a script learns that a question was refused
    assert "4000" in err or "max_model_len" in err or "tokens" in err
    assert out.strip() == "1415"


def test_a_file_that_cannot_be_saved_ends_no_program(chat, server):
    code, _, err = chat("/save /no/such/folder/a.json\n", server.url)
    assert code == 0
    assert "not saved" in err


def test_a_server_streams_the_answer_and_gets_the_whole_conversation(chat, server, monkeypatch):
    monkeypatch.setenv("MOESPAN_API_KEY", "secret")
    server.stream = events(
        piece("for"), piece("ty", "stop"), {"choices": [], "usage": {"completion_tokens": 2}}
    )
    code, out, err = chat(f"{USER}\n//slash\n", server.url + "/v1/", "--top-k", "3")
    assert code == 0
    assert out == "forty\nforty\n"
    assert "[2 tokens" in err
    path, body = server.requests[1]
    assert path == "/v1/chat/completions"
    assert [message["content"] for message in body["messages"]] == [USER, "forty", "/slash"]
    assert (body["model"], body["top_k"], body["stream"]) == ("first", 3, True)
    assert not body.keys() & {"temperature", "max_tokens"}  # the server's defaults hold
    assert server.keys == ["Bearer secret"] * 2


@pytest.mark.parametrize(
    ("stream", "status", "kind", "words"),
    [
        (events(piece("a"), {"error": {"message": "ranks died"}}), 200, MoespanError, "ranks died"),
        (events(piece("a"), done=False), 200, MoespanError, "before the answer's end"),
        (events(piece("a")), 200, MoespanError, "before the answer's end"),
        (b"data: [1]\n\n", 200, MoespanError, "does not speak"),
        (b"data: {\n\n", 200, MoespanError, "does not speak"),
        (b'{"error": {"message": "too long"}}', 400, RequestError, "too long"),
        (b'{"error": {"message": "no key"}}', 401, MoespanError, "--api-key-file"),
        (b"<html>", 502, MoespanError, "502"),
    ],
)
def test_each_failure_of_a_server_is_one_line(server, stream, status, kind, words):
    server.stream, server.status = stream, status
    answerer = ServerAnswerer(server.url, {})
    with pytest.raises(MoespanError) as caught:
        answerer.answer([{"role": "user", "content": "?"}], lambda piece: None)
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_of_the_reader_of_an_answer_is_not_blamed_on_the_server(server):
    server.stream = events(piece("a", "stop"))

    def say(piece: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        ServerAnswerer(server.url, {}).answer([{"role": "user", "content": "?"}], say)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["http://"], "is no address"),
        (["localhost:8000"], "did you mean http://localhost:8000?"),
        (["{server}", "--served-model-name", "third"], "it has 'first', 'second'"),
        (["{server}", "-tp", "2"], "--tensor-parallel-size"),
        (["{server}", "--top-p", "2"], "top_p=2.0"),
        (["{server}", "--api-key-file", "/dev/zero"], "not a regular file"),
        ([str(QUICKSTART), "--served-model-name", "a"], "goes with a server"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(chat, server, arguments, words):
    code, out, err = chat("", *(word.format(server=server.url) for word in arguments))
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_a_server_that_is_not_there_is_one_line(chat):
    code, out, err = chat("", "http://127.0.0.1:1")
    assert (code, out) == (1, "")
    assert "cannot be reached" in err and err.count("\n") == 1


def test_a_key_file_is_read_without_its_newline(chat, server, tmp_path: Path):
    key = tmp_path / "key"
    key.write_text("abc\n")
    server.stream = events(piece("a", "stop"))
    assert chat("?\n", server.url, "--api-key-file", key)[0] == 0
    assert server.keys == ["Bearer abc"]
