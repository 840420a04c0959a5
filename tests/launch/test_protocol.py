"""Frames on the local socket between front and leader."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import msgspec
import pytest

from moespan.config import Layout
from moespan.engine.info import EngineInfo, EngineStats, Pulse, StepFigures
from moespan.engine.questions import AnyQuestion, ExpertCounts, Question, Stats, Trace, Traffic
from moespan.engine.request import OutputDelta, Request, SamplingParams, TokenLogprobs
from moespan.engine.trace import Observation
from moespan.errors import EngineDeadError, RequestError
from moespan.launch.protocol import (
    Abort,
    Add,
    Answered,
    Ask,
    Connection,
    Framing,
    FromFront,
    FromLeader,
    News,
    PeerGoneError,
    Ready,
)

INFO = EngineInfo(
    model="fake",
    layout=Layout(tp=2),
    device="cpu",
    dtype="float32",
    cache_dtype="float32",
    max_model_len=64,
    num_blocks=4,
    block_size=16,
    load_s=0.5,
    read_bytes=1,
    weight_bytes=2,
)
STATS = EngineStats(
    num_waiting=1,
    num_running=2,
    kv_usage=0.5,
    num_free_blocks=3,
    num_preemptions=4,
    num_prefix_queried_tokens=5,
    num_prefix_hit_tokens=6,
)
PULSE = Pulse([STATS, STATS], 7, [StepFigures("decode", 2, 0.25)])
Ends = tuple[Connection[FromLeader], Connection[FromFront]]


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    front, leader = socket.socketpair()
    yield front, leader
    front.close()
    leader.close()


@pytest.fixture
def ends(sockets: tuple[socket.socket, socket.socket]) -> Iterator[Ends]:
    front: Connection[FromLeader] = Connection(sockets[0], FromLeader)
    leader: Connection[FromFront] = Connection(sockets[1], FromFront)
    yield front, leader
    front.close()
    leader.close()


def test_every_message_arrives_as_it_was(ends: Ends) -> None:
    front, leader = ends
    params = SamplingParams(stop=["\n\n"], logit_bias={3: -1.5}, seed=7, max_tokens=None)
    asked = [Add([Request(id="a", prompt_token_ids=[1, 102399], params=params)]), Abort("b")]
    asked += [Ask(0, Stats()), Ask(1, Traffic()), Ask(2, Trace([1, 2]))]
    for message in asked:
        front.send(message)
    assert leader.receive(1) == asked

    logprobs = [TokenLogprobs(5, -0.25, [(5, -0.25), (6, -2.0)])]
    delta = OutputDelta(
        id="a", text="幻", token_ids=[5], logprobs=logprobs, prompt_logits=b"\0" * 8
    )
    told = [Ready(INFO), News([delta, OutputDelta(id="b", stop_reason=5)], PULSE)]
    told += [Answered(1, b"\x90"), Answered(2, refusal="not now")]
    for message in told:
        leader.send(message)
    assert front.receive(1) == told


def test_every_question_knows_the_type_of_its_answer() -> None:
    assert set(get_args(AnyQuestion)) == set(Question.__subclasses__())
    assert Stats.answer_type() is EngineStats
    assert Trace([1]).answer_type() == list[Observation]
    counts = {1: [3, 0], 10: [1, 2]}
    sent = msgspec.msgpack.encode(counts)
    assert msgspec.msgpack.decode(sent, type=ExpertCounts.answer_type()) == counts
    rows = [[("tp", "all_reduce", "mlp", 3, 12)]]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(rows), type=Traffic.answer_type()) == rows


def test_receive_returns_nothing_when_nothing_comes_in_time(ends: Ends) -> None:
    started = time.monotonic()
    assert ends[0].receive(0) == []
    assert ends[0].receive(0.25) == []
    assert 0.2 < time.monotonic() - started < 10


def test_a_message_larger_than_the_socket_does_not_block_its_sender(ends: Ends) -> None:
    front, leader = ends
    params = SamplingParams()
    large = Add([Request(id="large", prompt_token_ids=[70000] * 2_000_000, params=params)])
    front.send(large)
    front.send(Abort("large"))
    received: list[FromFront] = []
    while len(received) < 2:
        front.receive(0)
        received += leader.receive(0)
    assert received == [large, Abort("large")]


def test_frames_beyond_the_limit_are_refused_by_both_ends() -> None:
    small: Framing[FromFront] = Framing(FromFront, max_frame_bytes=64)
    with pytest.raises(RequestError, match="exceeds the limit of 64"):
        small.frame(Abort("x" * 100))
    small.feed(Framing(FromFront).frame(Abort("x" * 100)))
    with pytest.raises(EngineDeadError, match="exceeds the limit of 64"):
        small.take()


def test_a_frame_that_announces_too_much_is_refused_before_it_comes() -> None:
    framing: Framing[FromFront] = Framing(FromFront)
    framing.feed(struct.pack(">I", 2**32 - 1))
    with pytest.raises(EngineDeadError, match="exceeds the limit"):
        framing.take()


def test_messages_are_whole_however_their_bytes_are_cut() -> None:
    messages = [Abort("a" * 5), Abort("b" * 300), Ask(3, Stats())]
    framing: Framing[FromFront] = Framing(FromFront)
    taken = []
    for byte in b"".join(framing.frame(message) for message in messages):
        framing.feed(bytes([byte]))
        taken += framing.take()
    assert taken == messages


def test_a_message_that_does_not_fit_wakes_the_thread_that_waits(ends: Ends) -> None:
    front, leader = ends
    asked = Request(id="large", prompt_token_ids=[1] * 3_000_000, params=SamplingParams())
    large = Add([asked])
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(front.receive, 30)
        time.sleep(0.1)  # so that it waits, and for reading only
        front.send(large)
        assert front.is_behind
        started = time.monotonic()
        assert leader.receive(30) == [large]
        assert time.monotonic() - started < 20
        assert not front.is_behind
        leader.send(News([], PULSE))
        assert waiting.result(30) == [News([], PULSE)]


def test_messages_sent_before_the_end_are_received_before_the_error(ends: Ends) -> None:
    front, leader = ends
    front.send(Abort("never read"))
    leader.send(News([OutputDelta(id="a", finish_reason="stop")], PULSE))
    leader.close()
    assert front.receive(None) == [News([OutputDelta(id="a", finish_reason="stop")], PULSE)]
    with pytest.raises(PeerGoneError):
        front.receive(None)
    with pytest.raises(PeerGoneError):
        front.send(Abort("a"))
