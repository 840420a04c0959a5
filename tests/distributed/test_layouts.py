"""Every layout computes what the Hugging Face model computes, or else what one rank computes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from moespan.checkpoint.quantize import quantize_checkpoint
from moespan.checkpoint.random import make_checkpoint
from moespan.config import Layout, ModelConfig, all_layouts
from moespan.measure.verify import Reference, verify, write_reference
from tests import tiers
from tests.distributed.ranks import Ranks, cases, oracle, oracle_reference
from tests.support import ORACLES, geometry

Case = tuple[Layout, str]
"""A layout and a dispatch that applies to it."""

# Of the 64 layouts of 8 ranks, these have every axis alone and beside every other one.
# `MOESPAN_TEST_ALL=1` and `moespan verify --all-layouts 8` run all.
OF_EIGHT = [
    Layout(tp=8, ep=8),
    Layout(dp=8, ep=8),
    Layout(sp=8, ep=4),
    Layout(tp=2, pp=4),
    Layout(tp=4, ep=2, pp=2),
    Layout(tp=4, ep=8, sp=2),
    Layout(tp=2, ep=8, sp=2, dp=2),
    Layout(tp=2, ep=4, pp=2, dp=2),
    Layout(pp=2, sp=2, dp=2, ep=4),
]


def sampled(cases: Iterable[Case]) -> list[Case]:
    """The first case that has an axis of some size, or some axes together under some dispatch."""
    kept, seen = [], set[Any]()
    for layout, dispatch in cases:
        sizes = [(axis, size) for axis, size in layout.sizes.items() if size > 1]
        traits = {*sizes, (tuple(axis for axis, _ in sizes), dispatch)}
        if not traits <= seen:
            kept.append((layout, dispatch))
            seen |= traits
    return kept


def every_case(name: str) -> list[Case]:
    config = ModelConfig.from_pretrained(oracle(name))
    if name == "sixteen":
        layouts = [*all_layouts(2, config), *all_layouts(4, config)]
        layouts += all_layouts(8, config) if tiers.ALL else OF_EIGHT
        found = list(cases(config, layouts))
        return found if tiers.ALL else sampled(found)
    # The other oracles' geometries meet every axis alone, and tp beside others.
    layouts = [*all_layouts(2, config), Layout(tp=2, pp=2), Layout(tp=2, ep=4, dp=2)]
    return list(cases(config, layouts))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    folder = tmp_path_factory.mktemp("references")
    return {name: oracle_reference(name, folder, num_greedy_tokens=5) for name in ORACLES}


@pytest.mark.parametrize(
    ("name", "layout", "dispatch"),
    [
        pytest.param(name, layout, dispatch, id=f"{name}-{layout}-{dispatch}")
        for world_size in (2, 4, 8)
        for name in ORACLES
        for layout, dispatch in every_case(name)
        if layout.world_size == world_size
    ],
)
def test_float32_is_what_the_hugging_face_model_computes(
    ranks: Ranks, references: dict[str, Reference], name: str, layout: Layout, dispatch: str
):
    report = verify(ranks.llm(oracle(name), layout, dispatch), references[name])
    assert not report.failures
    assert report.tolerance.relative == 2e-4
    assert all(prompt.greedy_equal for prompt in report.prompts)


def test_the_chosen_layouts_of_eight_ranks_have_every_pair_of_axes():
    pairs = {
        pair
        for layout in OF_EIGHT
        for pair in itertools.combinations([axis for axis, n in layout.sizes.items() if n > 1], 2)
    }
    assert pairs == set(itertools.combinations(Layout.AXES, 2))
    assert all(layout.world_size == 8 for layout in OF_EIGHT)


def test_the_sample_has_every_size_of_an_axis_and_every_pair_of_axes_under_every_dispatch():
    config = ModelConfig.from_pretrained(oracle("sixteen"))
    everything = list(cases(config, [*all_layouts(2, config), *all_layouts(4, config), *OF_EIGHT]))
    sample = sampled(everything)
    assert len(sample) < len(everything)

    def pairs(chosen: list[Case]) -> set[tuple[Any, str]]:
        return {
            (pair, dispatch)
            for layout, dispatch in chosen
            for pair in itertools.combinations([a for a, n in layout.sizes.items() if n > 1], 2)
        }

    assert pairs(sample) == pairs(everything)
    for axis in Layout.AXES:
        sizes = {layout.sizes[axis] for layout, _ in everything}
        assert {layout.sizes[axis] for layout, _ in sample} == sizes


@pytest.mark.parametrize(
    "layout",
    [Layout(tp=4, ep=4), Layout(tp=2, ep=4, sp=2), Layout(dp=2, ep=2, pp=2), Layout(sp=4, ep=4)],
    ids=str,
)
def test_bfloat16_stays_within_its_tolerance(
    ranks: Ranks, references: dict[str, Reference], layout: Layout
):
    for dispatch in layout.dispatches:
        llm = ranks.llm(oracle("sixteen"), layout, dispatch, dtype="bfloat16")
        assert not verify(llm, references["sixteen"]).failures


# Geometries that the oracles have not. None of them divides by 4: neither its 26, 10 and 20 columns
# of MLPs, nor its 61 tokens, nor its 6 experts.

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention bias": {"attention_bias": True},
    "tied embeddings": {"tie_word_embeddings": True},
    "tied, one layer a stage": {"tie_word_embeddings": True, "num_hidden_layers": 4},
    "dense": {"n_routed_experts": None, "n_shared_experts": None},
    "no shared experts": {"n_shared_experts": None},
    "one KV head": {"num_key_value_heads": 1, "attention_bias": True},
    "two KV heads": {"num_key_value_heads": 2},
    "renormalized weights": {"norm_topk_prob": True},
    "every other layer dense": {"num_hidden_layers": 4, "moe_layer_freq": 2},
    "linear rope scaling": {"rope_scaling": {"type": "linear", "factor": 4.0}},
}
FOR_GEOMETRIES = [Layout(tp=4, ep=2), Layout(tp=2, sp=2, ep=4), Layout(tp=2, pp=2)]
LAYOUTS_OF: dict[str, list[Layout]] = {
    "plain": [*FOR_GEOMETRIES, Layout(tp=4, ep=4), Layout(sp=2, dp=2, ep=4)],
    "dense": [Layout(tp=4), Layout(tp=2, sp=2), Layout(pp=2, dp=2)],
    "tied, one layer a stage": [Layout(pp=4)],
    "one KV head": [Layout(tp=4), Layout(tp=2, sp=2), Layout(sp=4, ep=2)],
    "two KV heads": [Layout(tp=4), Layout(tp=2, sp=2), Layout(sp=4, ep=2)],
}


def test_no_width_of_the_geometries_divides_by_four():
    raw = geometry()
    shared = raw["n_shared_experts"] * raw["moe_intermediate_size"]
    for width in ("intermediate_size", "moe_intermediate_size", "vocab_size", "n_routed_experts"):
        assert raw[width] % 4
    assert shared % 8


PROMPTS = [[5], [3, 1, 4, 1, 5, 9, 2], list(range(2, 35))]


def assert_like_one_rank(
    ranks: Ranks, model: Path, layouts: list[Layout], folder: Path, **settings: Any
) -> None:
    """Every layout, with every dispatch that applies, gives the logits and tokens of one rank."""
    write_reference(ranks.llm(model), folder / "one_rank.safetensors", PROMPTS, 5)
    reference = Reference(folder / "one_rank.safetensors")
    for layout, dispatch in cases(ModelConfig.from_pretrained(model), layouts):
        report = verify(ranks.llm(model, layout, dispatch, **settings), reference)
        assert not report.failures, f"{layout}, {dispatch}"


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry_gives_what_one_rank_gives(ranks: Ranks, tmp_path: Path, name: str):
    make_checkpoint(tmp_path / "model", geometry(**GEOMETRIES[name]))
    layouts = LAYOUTS_OF.get(name, FOR_GEOMETRIES)
    assert_like_one_rank(ranks, tmp_path / "model", layouts, tmp_path)


# Integers

FOR_INTEGERS = [Layout(tp=4, ep=2), Layout(tp=2, sp=2, ep=4), Layout(pp=2, dp=2, ep=2)]


# Of 4 bits no layout may cut a group, and widths are padded to whole ones.
WHOLE_GROUPS = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "moe_intermediate_size": 96,
}


@pytest.mark.parametrize("is_stored", [False, True], ids=["made while loading", "stored"])
@pytest.mark.parametrize(("scheme", "sizes"), [("int8", {}), ("int4", WHOLE_GROUPS)])
def test_integers_of_weights_are_the_same_in_every_layout(
    ranks: Ranks, tmp_path: Path, scheme: str, sizes: dict[str, int], is_stored: bool
):
    folder = tmp_path / "model"
    make_checkpoint(folder, geometry(num_key_value_heads=2, **sizes))
    settings: dict[str, Any] = {"quantization": scheme}
    if is_stored:
        quantize_checkpoint(folder, tmp_path / "stored", scheme)
        folder, settings = tmp_path / "stored", {}
    write_reference(ranks.llm(folder, **settings), tmp_path / "one_rank.safetensors", PROMPTS, 5)
    reference = Reference(tmp_path / "one_rank.safetensors")
    for layout, dispatch in cases(ModelConfig.from_pretrained(folder), FOR_INTEGERS):
        report = verify(ranks.llm(folder, layout, dispatch, **settings), reference)
        assert report.quantization == scheme
        assert report.tolerance.relative == 2e-4
        assert not report.failures, f"{layout}, {dispatch}"


@pytest.mark.parametrize("quantization", ["w8a8", "fp8"])
def test_rounded_activations_and_caches_stay_within_their_tolerance(
    ranks: Ranks, references: dict[str, Reference], quantization: str
):
    config = ModelConfig.from_pretrained(oracle("sixteen"))
    for layout, dispatch in cases(config, FOR_INTEGERS):
        llm = ranks.llm(
            oracle("sixteen"), layout, dispatch, quantization=quantization, kv_cache_dtype="int8"
        )
        report = verify(llm, references["sixteen"])
        assert report.cache_dtype == "int8"
        assert not report.failures, f"{layout}, {dispatch}"


# Where experts are, and where stages begin, by hand

FOR_PLACEMENTS = [
    Layout(tp=4, ep=4),
    Layout(tp=2, ep=4, sp=2),
    Layout(ep=4, dp=4),
    Layout(ep=4, sp=4),
]


def test_round_robin_experts_give_what_one_rank_gives(ranks: Ranks, tmp_path: Path):
    make_checkpoint(tmp_path / "model", geometry())
    assert_like_one_rank(
        ranks, tmp_path / "model", FOR_PLACEMENTS, tmp_path, expert_placement="round_robin"
    )


def test_a_table_with_replicas_of_experts_gives_what_one_rank_gives(ranks: Ranks, tmp_path: Path):
    make_checkpoint(tmp_path / "model", geometry())
    table = {"default": [[5, 0], [1, 0, 2], [3, 5], [0, 4]], "2": [[0], [1, 2, 3, 4, 5], [2], [2]]}
    (tmp_path / "table.json").write_text(json.dumps(table))
    assert_like_one_rank(
        ranks,
        tmp_path / "model",
        FOR_PLACEMENTS,
        tmp_path,
        expert_placement=str(tmp_path / "table.json"),
    )


def test_stages_cut_by_hand_give_what_one_rank_gives(ranks: Ranks, tmp_path: Path):
    make_checkpoint(tmp_path / "model", geometry(num_hidden_layers=5))
    layouts = [
        Layout(tp=2, pp=2, pipeline_layers=(4, 1)),
        Layout(dp=2, ep=2, pp=2, pipeline_layers=(1, 4)),
        Layout(pp=4, pipeline_layers=(1, 1, 2, 1)),
    ]
    assert_like_one_rank(ranks, tmp_path / "model", layouts, tmp_path)
