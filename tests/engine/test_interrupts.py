"""After Ctrl-C an engine goes on with the next request, or every call says that it is dead."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from moespan import LLM, SamplingParams
from moespan.engine.engine import Engine
from moespan.engine.interrupts import hold_interrupts
from moespan.errors import EngineDeadError
from tests.support import QUICKSTART

GREEDY = SamplingParams(temperature=0)
LONG = SamplingParams(temperature=1, seed=1, max_tokens=100, ignore_eos=True)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def python_handles_ctrl_c() -> Iterator[None]:
    """As in a terminal; a test run in the background may ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(QUICKSTART), device="cpu", max_num_seqs=4) as llm:
        yield llm


def test_the_first_interrupt_waits_and_the_second_does_not():
    done = []
    with pytest.raises(KeyboardInterrupt), hold_interrupts():
        press()
        done.append("first")
        with hold_interrupts():  # the outer block holds
            done.append("nested")
        done.append("end")
    assert done == ["first", "nested", "end"]
    with pytest.raises(KeyboardInterrupt), hold_interrupts():
        press()
        press()
        done.append("never")
    assert done[-1] == "end"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        press()


def test_an_error_in_the_block_does_not_lose_the_interrupt():
    with pytest.raises(KeyboardInterrupt) as caught, hold_interrupts():
        press()
        raise ValueError("of the block")
    assert isinstance(caught.value.__context__, ValueError)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_program_that_does_not_handle_ctrl_c_keeps_its_handler(handler: Any):
    signal.signal(signal.SIGINT, handler)
    with hold_interrupts():
        assert signal.getsignal(signal.SIGINT) is handler


def test_other_threads_change_no_handler():
    found = []

    def work() -> None:
        with hold_interrupts():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def interrupt_at(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int = 1, presses: int = 1
) -> None:
    """Press Ctrl-C within call `number` of a method of the engine."""
    method, calls = getattr(Engine, name), 0

    def pressed(self: Engine, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            for _ in range(presses):
                press()
        return method(self, *args)

    monkeypatch.setattr(Engine, name, pressed)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("add", 1),
        ("add", 3),
        ("step", 1),
        ("step", 5),
        ("_broadcast", 3),
        ("_collect", 1),
        ("_collect", 4),
        ("_deltas", 7),
        ("abort", 1),
    ],
)
def test_an_engine_goes_on_after_an_interrupt_anywhere(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, name: str, number: int
):
    with monkeypatch.context() as patch:
        if name == "abort":  # a second interrupt, while the first one cleans up
            interrupt_at(patch, "step", 2)
        interrupt_at(patch, name, number)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["Story: Mia, mouse, forest."] * 6, LONG)
    assert llm.generate("681+734=", GREEDY)[0].outputs[0].text == "1415"
    assert llm.stats().num_running == llm.stats().num_waiting == 0


def test_an_interrupt_ends_only_its_own_stream(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    other = llm.stream([llm.request("681+734=", GREEDY), llm.request("12+30=", GREEDY)])
    first = next(other)
    with monkeypatch.context() as patch:
        interrupt_at(patch, "step", 2)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["Story: Mia, mouse, forest."] * 6, LONG)
    texts = {output.outputs[0].text for output in (first, *other)}
    assert texts == {"1415", "42"}


@pytest.mark.parametrize("name", ["_broadcast", "_collect", "_deltas"])
def test_a_step_that_is_cut_ends_the_engine_by_name(monkeypatch: pytest.MonkeyPatch, name: str):
    with LLM(str(QUICKSTART), device="cpu", max_num_seqs=4) as llm:
        with monkeypatch.context() as patch:
            interrupt_at(patch, name, 3, presses=2)
            with pytest.raises(KeyboardInterrupt):
                llm.generate(["Story: Mia, mouse, forest."] * 6, LONG)
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="cut short by KeyboardInterrupt; start"):
                llm.generate("681+734=", GREEDY)
        with pytest.raises(EngineDeadError):
            llm.stats()
    llm.close()


@pytest.mark.parametrize("name", ["_broadcast", "_collect", "_deltas"])
def test_any_other_error_in_a_step_ends_the_engine_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str
):
    def fail(*_: object) -> None:
        raise OSError("of a step")

    with LLM(str(QUICKSTART), device="cpu", max_num_seqs=4) as llm:
        with monkeypatch.context() as patch:
            patch.setattr(Engine, name, fail)
            with pytest.raises(OSError, match="of a step"):
                llm.generate(["Story: Mia, mouse, forest."] * 6, LONG)
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="cut short by OSError; start a new engine"):
                llm.generate("681+734=", GREEDY)
    llm.close()
