"""Questions to a running engine are answered between steps, under every kind of layout."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from moespan import SamplingParams
from moespan.checkpoint.random import make_checkpoint
from moespan.config import Layout
from moespan.engine.questions import Stats, Trace, Traffic
from moespan.engine.request import Request
from moespan.errors import RequestError
from tests.distributed.ranks import ONE_RANK, Ranks
from tests.support import geometry

COUNT, LENGTH = 7, 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions") / "model"
    make_checkpoint(folder, geometry(num_hidden_layers=4))
    return folder


def requests() -> list[Request]:
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    prompts = [[1 + number, 7, 3] for number in range(COUNT)]
    return [
        Request(id=str(number), prompt_token_ids=prompt, params=params)
        for number, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])
@pytest.mark.parametrize(
    "layout",
    [ONE_RANK, Layout(tp=2), Layout(pp=2), Layout(dp=2), Layout(ep=2, dp=2)],
    ids=str,
)
def test_questions_while_requests_run_change_no_token_and_mix_up_no_message(
    ranks: Ranks, model: Path, layout: Layout, ahead: bool
):
    if ahead and layout.pp > 1:
        pytest.skip("plans are made ahead on one stage only")
    expected = {
        output.request_id: output.outputs[0].token_ids
        for output in ranks.llm(model).stream((None, request) for request in requests())
    }
    llm = ranks.llm(model, layout, async_scheduling=ahead)
    client = llm._client
    tokens: dict[str, list[int]] = {request.id: [] for request in requests()}
    num_finished, sent = 0, [0]
    for request in requests():
        client.add(request)
    while num_finished < COUNT:
        for delta in client.receive():
            assert delta.error is None
            tokens[delta.id] += delta.token_ids
            num_finished += delta.finish_reason is not None
        stats = client.ask(Stats())
        assert stats.num_running + stats.num_waiting <= COUNT
        traffic = client.ask(Traffic())
        assert len(traffic) == layout.world_size
        sent.append(sum(row[4] for rows in traffic for row in rows))
        try:
            client.ask(Trace([1, 2, 3]))  # answered only if all requests have finished by then
        except RequestError as error:
            assert "idle" in str(error)
    assert tokens == expected
    assert sent == sorted(sent)
    assert len(llm.trace([1, 2, 3])[0].values) == 3
    assert llm.stats().kv_usage == 0


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(dp=2)], ids=str)
def test_one_thread_asks_while_another_receives(ranks: Ranks, model: Path, layout: Layout):
    llm = ranks.llm(model, layout)
    (expected,) = llm.stream([(None, requests()[0])])
    stop, answers = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            answers.append((llm.stats(), llm.traffic()))

    asking = threading.Thread(target=ask)
    asking.start()
    outputs = list(llm.stream((None, request) for request in requests()))
    stop.set()
    asking.join(60)
    assert not asking.is_alive()
    assert all(len(traffic) == layout.world_size for _, traffic in answers)
    first = next(output for output in outputs if output.request_id == expected.request_id)
    assert first.outputs == expected.outputs
    assert len(outputs) == COUNT
