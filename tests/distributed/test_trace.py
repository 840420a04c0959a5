"""Values inside the network are the same under every layout, and a trace finds where a bug is.

The bugs are planted in the program of the ranks (`buggy_rank.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moespan.config import Layout
from moespan.engine.trace import Observation
from moespan.errors import LayoutError, RequestError
from moespan.measure.verify import Reference
from moespan.measure.verify_layouts import trace_against_reference, verify_layouts
from tests.distributed.buggy_rank import BUGS
from tests.distributed.ranks import ONE_RANK, Ranks, oracle, oracle_reference
from tests.support import ORACLES, assert_close

SIXTEEN = oracle("sixteen")


def trace_reference(name: str) -> Reference:
    """The Hugging Face model's logits, hidden states and router choices for one prompt."""
    return Reference(oracle(name) / "ref" / "inside.safetensors")


def places(observations: list[Observation]) -> list[tuple[int, str]]:
    return [(one.layer, one.module) for one in observations]


# Without bugs


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, ep=4, sp=2),
        Layout(pp=4),
        Layout(ep=4, sp=4),
        Layout(dp=2, ep=2, pp=2),
        Layout(tp=2, ep=4, pp=2, sp=2),
    ],
    ids=str,
)
def test_the_trace_of_every_layout_is_that_of_one_rank(ranks: Ranks, layout: Layout):
    ids = trace_reference("sixteen").ids("p0")
    expected = ranks.llm(SIXTEEN).trace(ids)
    modules = ["attention", "router.experts", "router.weights", "hidden"]
    assert places(expected) == [
        (-1, "embed"),
        (0, "attention"),
        (0, "hidden"),
        *itertools.product(range(1, 5), modules),
    ]
    for dispatch in layout.dispatches:
        llm = ranks.llm(SIXTEEN, layout, dispatch)
        for _ in range(2):  # it leaves nothing behind
            ours = llm.trace(ids)
            assert places(ours) == places(expected)
            for one, other in zip(ours, expected, strict=True):
                assert_close(one.values, other.values, 1e-4)
        assert llm.stats().kv_usage == 0


@pytest.mark.parametrize("name", ORACLES)
def test_the_inside_is_that_of_the_hugging_face_model(ranks: Ranks, name: str):
    reference = trace_reference(name)
    for layout in (ONE_RANK, Layout(tp=2), Layout(sp=2, ep=2), Layout(pp=2)):
        llm = ranks.llm(oracle(name), layout)
        assert trace_against_reference(llm, reference, 2e-4) == {}


def test_a_wrong_reference_is_named_by_prompt_layer_and_module(ranks: Ranks, tmp_path: Path):
    tensors = load_file(SIXTEEN / "ref" / "inside.safetensors")
    tensors["p0.hidden3"][5, 7] += 1.0
    save_file(tensors, tmp_path / "wrong.safetensors")
    llm = ranks.llm(SIXTEEN, Layout(tp=2))
    found = trace_against_reference(llm, Reference(tmp_path / "wrong.safetensors"), 2e-4)
    assert list(found) == ["p0"]
    assert found["p0"].startswith("layer 2, hidden: first at token 5, by ")


def test_a_trace_is_refused_for_a_prompt_that_is_too_long_and_the_engine_goes_on(ranks: Ranks):
    llm = ranks.llm(SIXTEEN, Layout(tp=2), max_num_batched_tokens=64)
    with pytest.raises(RequestError, match="65 tokens in one step of at most"):
        llm.trace([3] * 65)
    with pytest.raises(RequestError, match=r"is not within 0\.\.511"):
        llm.trace([512])
    assert len(llm.trace([3] * 64)[0].values) == 64


def test_ranks_are_not_cut_into_another_number_of_ranks(ranks: Ranks):
    llm = ranks.llm(SIXTEEN, Layout(tp=2))
    with pytest.raises(LayoutError, match="layout tp=4 has 4 ranks, but 2 are running"):
        llm.relayout(Layout(tp=4))
    with pytest.raises(LayoutError, match="moe_dispatch=all_to_all does not apply to layout tp=2"):
        llm.relayout(Layout(tp=2), "all_to_all")
    llm.relayout(Layout(pp=2))
    assert llm.info.layout == Layout(pp=2)


# With a bug


@pytest.fixture(scope="module")
def bug_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file from which the ranks of `buggy` read the name of their bug."""
    return tmp_path_factory.mktemp("bugs") / "bug"


@pytest.fixture(scope="module")
def buggy(bug_file: Path) -> Iterator[Ranks]:
    with Ranks([str(Path(__file__).with_name("buggy_rank.py")), str(bug_file)]) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return oracle_reference("sixteen", tmp_path_factory.mktemp("reference"), num_greedy_tokens=2)


# Each bug with a layout that shows it, and the first place where it shows. Stages are layers 0 to 2
# and 3 to 4.
SEEN = {
    "the embedding is not summed": (Layout(tp=4), "embed"),
    "attention is not summed": (Layout(tp=2, sp=2), "layer 0, attention"),
    "the experts are not summed": (Layout(tp=4, ep=2), "layer 1, hidden"),
    "physical experts are shifted": (Layout(tp=2, ep=4, dp=2), "layer 1, hidden"),
    "tokens come back from experts in another order": (Layout(ep=4, sp=4), "layer 1, hidden"),
    "halves of sp are swapped": (Layout(tp=2, sp=2), "layer 0, attention"),
    "parts are swapped between stages": (Layout(tp=2, pp=2), "layer 3, attention"),
    "a stage begins a layer too late": (Layout(pp=2, dp=2), "layer 3, attention"),
    "the vocabulary is shuffled": (Layout(tp=4), "none in the layers"),
}


def test_every_bug_is_looked_for():
    assert set(BUGS) == {"none", *SEEN}


@pytest.mark.parametrize("bug", SEEN)
def test_a_bug_fails_and_is_named_by_the_layer_and_module_where_it_begins(
    buggy: Ranks, ranks: Ranks, bug_file: Path, reference: Reference, bug: str
):
    layout, place = SEEN[bug]
    bug_file.write_text("none")
    llm = buggy.llm(SIXTEEN, Layout(dp=4))
    bug_file.write_text(bug)
    # The last dispatch is the one that shows tokens that return in the wrong order.
    *_, report = verify_layouts(llm, [layout], reference, lambda: ranks.llm(SIXTEEN))
    assert report.layout == layout and report.dispatch == layout.dispatches[-1]
    assert report.report.failures
    assert report.first_difference is not None
    assert place in report.first_difference
    assert report.to_dict()["passed"] is False


def test_ranks_without_a_bug_pass_and_no_one_rank_engine_is_started(
    buggy: Ranks, bug_file: Path, reference: Reference
):
    bug_file.write_text("none")
    layouts = [Layout(tp=2, ep=4, sp=2), Layout(tp=2, pp=2)]
    llm = buggy.llm(SIXTEEN, layouts[0])

    def one_rank():
        raise AssertionError("nothing failed")

    reports = list(verify_layouts(llm, layouts, reference, one_rank))
    assert [(one.layout, one.dispatch) for one in reports] == [
        (layouts[0], "all_gather"),
        (layouts[0], "all_to_all"),
        (layouts[1], "replicated"),
    ]
    assert not any(one.report.failures or one.first_difference for one in reports)
    assert [set(one.sent_bytes_per_token) for one in reports] == [
        {"tp", "sp", "ep_tp_groups"},
        {"tp", "sp", "ep"},
        {"tp", "pp"},
    ]
    assert all(np.isfinite(list(one.sent_bytes_per_token.values())).all() for one in reports)
