"""The client of an engine in its own process: questions between steps, and a step that fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moespan.config import EngineConfig
from moespan.engine.client import LocalClient
from moespan.engine.questions import Question, Stats, Trace, Traffic
from moespan.engine.request import OutputDelta, Request, SamplingParams
from moespan.engine.results import Pending
from moespan.engine.worker import Worker
from moespan.errors import EngineDeadError, RequestError
from moespan.launch.local import join
from tests.support import write_config


def request(name: str, max_tokens: int) -> Request:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return Request(id=name, prompt_token_ids=[3, 1, 4], params=params)


@pytest.fixture(params=[False, True], ids=["", "ahead"])
def client(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[LocalClient]:
    folder = write_config(tmp_path / "model")
    client = join(config(folder, request.param))
    yield client
    client.close()


def config(folder: Path, ahead: bool) -> EngineConfig:
    return EngineConfig(
        str(folder),
        device="cpu",
        load_format="dummy",
        max_model_len=128,
        async_scheduling=ahead,
    )


def num_tokens(deltas: list[OutputDelta]) -> int:
    return sum(len(delta.token_ids) for delta in deltas)


def test_questions_between_steps_lose_no_token(client: LocalClient):
    client.add(request("a", 12))
    received: list[OutputDelta] = []
    ahead = client._engine._most_in_flight - 1
    while num_tokens(received) < 12:
        received += client.receive()
        assert client.ask(Traffic()) == [[]]
        # With a plan ahead, a question takes in up to two steps that `receive` has not returned.
        assert client.ask(Stats()).num_running == (num_tokens(received) < 12 - 2 * ahead)
    assert [delta.finish_reason for delta in received] == [None] * 11 + ["length"]
    assert client.receive() == []


def test_a_trace_is_refused_while_a_request_runs_which_goes_on(client: LocalClient):
    client.add(request("a", 6))
    received = client.receive()
    with pytest.raises(RequestError, match="a trace needs an idle engine"):
        client.ask(Trace([1, 2]))
    while num_tokens(received) < 6:
        received += client.receive()
    assert client.ask(Trace([1, 2]))[0].module == "embed"


def test_deltas_of_an_aborted_request_that_a_question_brought_are_dropped(client: LocalClient):
    client.add(request("a", 30))
    client.add(request("b", 4))
    received = client.receive()
    client.ask(Traffic())
    client.abort("a")
    while client._engine.has_unfinished:
        late = client.receive()
        assert {delta.id for delta in late} <= {"b"}
        received += late
    assert num_tokens([delta for delta in received if delta.id == "b"]) == 4
    assert client.ask(Stats()).kv_usage == 0


def test_a_question_waits_for_one_step_while_another_thread_receives(
    client: LocalClient, monkeypatch: pytest.MonkeyPatch
):
    step_s, execute = 0.02, Worker.execute

    def slow(*args: Any) -> Any:
        time.sleep(step_s)
        return execute(*args)

    monkeypatch.setattr(Worker, "execute", slow)
    received: list[OutputDelta] = []

    def receive() -> None:
        while num_tokens(received) < 200:
            received.extend(client.receive())

    receiver = threading.Thread(target=receive)
    client.add(request("a", 100))
    client.add(request("b", 100))
    receiver.start()
    with ThreadPoolExecutor() as pool:
        while not received:
            time.sleep(step_s)
        questions: list[Question[Any]] = [Stats(), Traffic()]
        futures = [pool.submit(client.ask, question) for question in questions * 4]
        answers: list[Any] = [future.result(60) for future in futures]
        assert receiver.is_alive()  # so none waited for the end
    receiver.join(60)
    assert [answer.num_running for answer in answers[::2]] == [2] * 4
    assert num_tokens(received) == 200


@pytest.mark.parametrize("owner", [Worker, Pending], ids=["started", "waited for"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_step_that_is_cut_short_leaves_a_dead_engine(
    client: LocalClient,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    error: type[BaseException],
):
    def fail(*_: object) -> None:
        raise error

    client.add(request("a", 6))
    client.receive()
    with monkeypatch.context() as patch:
        patch.setattr(owner, "execute" if owner is Worker else "wait", fail)
        with pytest.raises(error):
            while True:
                client.receive()
    questions: list[Question[Any]] = [Stats(), Traffic(), Trace([1])]
    for question in questions:
        with pytest.raises(EngineDeadError, match=f"cut short by {error.__name__}"):
            client.ask(question)
    with pytest.raises(EngineDeadError, match="start a new engine"):
        client.receive()
    with pytest.raises(EngineDeadError):
        client.add(request("b", 1))
    client.abort("a")


def test_a_closed_engine_answers_nothing(client: LocalClient):
    client.close()
    with pytest.raises(EngineDeadError, match="the engine is closed"):
        client.ask(Stats())


@pytest.mark.parametrize("owner", [Worker, Pending], ids=["started", "waited for"])
def test_a_dead_engine_is_replaced_by_reload(
    client: LocalClient, monkeypatch: pytest.MonkeyPatch, owner: type
):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    client.add(request("a", 6))
    with monkeypatch.context() as patch:
        patch.setattr(owner, "execute" if owner is Worker else "wait", fail)
        with pytest.raises(KeyboardInterrupt):
            client.receive()
    client.reload(config(Path(client.info.model), ahead=False))
    client.add(request("a", 2))
    assert num_tokens(client.receive() + client.receive()) == 2


def test_an_engine_closes_while_requests_run(client: LocalClient):
    client.add(request("a", 60))
    client.receive()
    client.close()
    with pytest.raises(EngineDeadError, match="the engine is closed"):
        client.receive()
