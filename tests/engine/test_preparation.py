"""Requests wait for their constraints without making others wait, and fail alone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import wait

import pytest

from moespan import LLM, SamplingParams
from moespan.engine.constraints import Constraint
from moespan.engine.preparation import Preparation, Prepared
from moespan.engine.request import Request
from moespan.errors import EngineDeadError, RequestError
from tests.support import QUICKSTART

PARAMS = SamplingParams(allowed_token_ids=[3], bad_words=["x"], temperature=0, max_tokens=2)


def request(id: str) -> Request:
    return Request(id=id, prompt_token_ids=[1], params=PARAMS)


def make(request: Request) -> Constraint:
    return Constraint(request.params, 8, frozenset({0}))


def take_all(preparation: Preparation) -> list[Prepared]:
    taken: list[Prepared] = []
    deadline = time.monotonic() + 10
    while len(preparation) and time.monotonic() < deadline:
        taken += preparation.take(may_wait=True)
    return taken


def test_ready_requests_come_in_the_order_of_arrival_with_their_constraints():
    preparation = Preparation(make)
    assert not preparation and not list(preparation.take(may_wait=True))
    for id in "abc":
        preparation.start(request(id), seed=ord(id))
    wait([one._constraint for one in preparation._waiting.values()], timeout=10)
    taken = list(preparation.take(may_wait=True))
    assert [(one.request.id, one.seed) for one in taken] == [("a", 97), ("b", 98), ("c", 99)]
    assert all(one.constraint.allowed == bytes([8]) for one in taken)
    preparation.close()


def test_a_request_that_takes_long_lets_later_ones_pass_and_can_be_dropped():
    go_on = threading.Event()

    def slow(request: Request) -> Constraint:
        if request.id == "slow":
            assert go_on.wait(10)
        return make(request)

    preparation = Preparation(slow)
    preparation.start(request("slow"), 0)
    preparation.start(request("fast"), 0)
    taken: list[str] = []
    while not taken:
        taken += [one.request.id for one in preparation.take(may_wait=True)]
    assert taken == ["fast"] and "slow" in preparation
    preparation.drop("slow")
    preparation.drop("unknown")
    assert not preparation
    go_on.set()
    preparation.close()


class PanicError(BaseException):
    """What a library of Rust raises when it panics."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RequestError("the grammar is wrong"), "the grammar is wrong"),
        (OSError("x"), "the constraint failed with OSError"),
        (PanicError("x"), "the constraint failed with PanicError"),
    ],
)
def test_whatever_fails_is_the_error_of_that_request(error: BaseException, message: str):
    def fail(request: Request) -> Constraint:
        raise error

    preparation = Preparation(fail)
    preparation.start(request("a"), 0)
    (one,) = take_all(preparation)
    with pytest.raises(RequestError, match=f"^{message}$"):
        _ = one.constraint
    preparation.close()


def test_an_engine_goes_on_while_a_constraint_is_made(monkeypatch: pytest.MonkeyPatch):
    go_on = threading.Event()
    of = Constraint.of

    def slow(*args) -> Constraint:
        assert go_on.wait(20)
        return of(*args)

    monkeypatch.setattr(Constraint, "of", slow)
    with LLM(str(QUICKSTART), device="cpu", max_num_seqs=4) as llm:
        held = llm.stream([llm.request("1+1=", PARAMS)])
        client = llm._client
        _, first = llm.request("1+1=", PARAMS)
        client.add(first)
        client.add(Request(id=first.id, prompt_token_ids=[1], params=PARAMS))  # the id is in use
        (refused,) = client.receive()
        assert refused.error is not None and "in use" in refused.error
        greedy = SamplingParams(temperature=0, max_tokens=8)
        assert llm.generate("681+734=", greedy)[0].outputs[0].text == "1415"
        client.abort(first.id)
        go_on.set()
        (output,) = held
        assert output.outputs[0].token_ids == [3, 3]
        llm._client.add(llm.request("1+1=", PARAMS)[1])
    with pytest.raises(EngineDeadError):
        client.receive()
