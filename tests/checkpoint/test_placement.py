"""The placement table covers every weight, as often as it must be held, in matching parts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from moespan.checkpoint.placement import (
    Piece,
    Placement,
    Share,
    cache_bytes_per_token,
    cache_heads,
    checkpoint_tensors,
    count_parameters,
    place,
    tolerated_tensors,
)
from moespan.checkpoint.presets import PRESETS
from moespan.config import Layout, ModelConfig, all_layouts
from tests.support import ORACLES, Oracle, geometry
from tests.tiers import examples

Cut = tuple[ModelConfig, Layout]


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """A geometry and a layout that fits; widths, vocabulary and experts need not be divisible."""
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    raw: dict[str, Any] = geometry(
        hidden_size=heads * draw(st.sampled_from([2, 4])),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=draw(st.integers(1, 30)),
        intermediate_size=draw(st.integers(1, 20)),
        moe_intermediate_size=draw(st.integers(1, 9)),
        n_routed_experts=draw(st.sampled_from([None, 1, 3, 4])),
        num_experts_per_tok=1,
        n_shared_experts=draw(st.sampled_from([None, 1, 2])),
        first_k_dense_replace=draw(st.integers(0, 2)),
        num_hidden_layers=draw(st.integers(2, 4)),
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )
    config = ModelConfig.from_dict(raw)
    return config, draw(st.sampled_from(all_layouts(draw(st.integers(1, 8)), config)))


def placements(config: ModelConfig, layout: Layout) -> list[Placement]:
    return [place(config, layout, rank) for rank in range(layout.world_size)]


def copies(name: str, config: ModelConfig, layout: Layout) -> int:
    """Number of ranks that must hold each element of a tensor."""
    replicas = layout.dp * layout.sp
    if ".experts." in name:
        return layout.stage_size // max(layout.tp, layout.ep)
    if name.endswith(("norm.weight", "mlp.gate.weight", "o_proj.bias")):
        return layout.tp * replicas
    if ".k_proj." in name or ".v_proj." in name:
        return max(1, layout.tp // config.num_key_value_heads) * replicas
    if name == "model.embed_tokens.weight" and config.tie_word_embeddings and layout.pp > 1:
        return 2 * replicas  # the last stage has it as its head
    return replicas


@settings(max_examples=examples(200))
@given(cuts())
def test_all_ranks_together_hold_every_element_as_often_as_they_must(
    cut: Cut,
):
    config, layout = cut
    held = {name: np.zeros(shape, int) for name, shape in checkpoint_tensors(config).items()}
    for placement in placements(config, layout):
        for piece in placement.pieces:
            held[piece.tensor][piece.tensor_index] += 1
    for name, counts in held.items():
        assert (counts == copies(name, config, layout)).all(), name


@settings(max_examples=examples(200))
@given(cuts())
def test_pieces_fit_their_parameters_and_never_overlap_or_touch_padding(
    cut: Cut,
):
    config, layout = cut
    for placement in placements(config, layout):
        written = {
            name: np.zeros(parameter.shape, int) for name, parameter in placement.parameters.items()
        }
        for piece in placement.pieces:
            target = written[piece.parameter][piece.index]
            assert target.size == piece.num_elements > 0
            lengths = tuple(part.stop - part.start for part in piece.tensor_index)
            assert target.shape == lengths
            assert piece.num_rows == lengths[0]
            target += 1
        assert all(counts.max() <= 1 for counts in written.values())
        # Every element that is read is written. Padding is never written.
        assert sum(counts.sum() for counts in written.values()) == placement.num_elements_read


@settings(max_examples=examples(200))
@given(cuts())
def test_ranks_of_a_stage_hold_parameters_of_the_same_names_and_shapes_but_for_experts(cut: Cut):
    config, layout = cut

    def shapes(placement: Placement) -> dict[str, object]:
        return {
            name: parameter.shape[1:] if "experts" in name else parameter.shape
            for name, parameter in placement.parameters.items()
        }

    held = placements(config, layout)
    for start in range(0, layout.world_size, layout.stage_size):
        first, *others = held[start : start + layout.stage_size]
        assert all(shapes(other) == shapes(first) for other in others)


@settings(max_examples=examples(200))
@given(cuts())
def test_padding_is_less_than_one_element_per_rank_for_each_length_that_is_cut(
    cut: Cut,
):
    config, layout = cut
    tp = layout.tp
    for name, parameter in place(config, layout, 0).parameters.items():
        if name in ("embed", "head"):
            assert 0 <= parameter.shape[0] * tp - config.vocab_size < tp
        if name.endswith("shared.down"):
            assert 0 <= parameter.shape[1] * tp - config.shared_intermediate_size < tp
        if name.endswith("experts.down"):
            slices = layout.expert_slices
            assert 0 <= parameter.shape[2] * slices - config.moe_intermediate_size < slices


def by_tensor(placement: Placement) -> dict[str, Piece]:
    found = {piece.tensor: piece for piece in placement.pieces}
    assert len(found) == len(placement.pieces)
    return found


@settings(max_examples=examples(200))
@given(cuts())
def test_gate_up_and_down_of_a_rank_are_of_the_same_neurons(cut: Cut):
    config, layout = cut
    for placement in placements(config, layout):
        pieces = by_tensor(placement)
        for name, down in pieces.items():
            if not name.endswith("down_proj.weight"):
                continue
            gate = pieces[name.replace("down_proj", "gate_proj")]
            up = pieces[name.replace("down_proj", "up_proj")]
            assert gate.tensor_index[0] == up.tensor_index[0] == down.tensor_index[1]
            width = placement.parameters[down.parameter].shape[-1]
            assert placement.parameters[gate.parameter].shape[-2] == 2 * width
            assert gate.index[-2].start == down.index[-1].start == 0
            assert up.index[-2].start == width


@settings(max_examples=examples(200))
@given(cuts())
def test_a_rank_holds_the_kv_heads_that_its_queries_read(cut: Cut):
    config, layout = cut
    size, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    for placement in placements(config, layout):
        pieces = by_tensor(placement)
        layer = min(name.split(".")[2] for name in pieces if ".self_attn." in name)
        attention = f"model.layers.{layer}.self_attn"
        queries, keys, values = (pieces[f"{attention}.{name}_proj.weight"] for name in "qkv")
        assert keys.tensor_index == values.tensor_index
        q_rows, k_rows = queries.tensor_index[0], keys.tensor_index[0]
        heads = range(q_rows.start // size, q_rows.stop // size)
        kv_heads = range(k_rows.start // size, k_rows.stop // size)
        local_group = len(heads) // len(kv_heads)
        for local, head in enumerate(heads):
            assert kv_heads[local // local_group] == head // group
        # Stacked in this order, without a gap.
        assert [piece.index[0].start for piece in (queries, keys, values)] == [
            0,
            len(heads) * size,
            (len(heads) + len(kv_heads)) * size,
        ]
        # The output projection takes the columns of the same heads.
        assert pieces[f"{attention}.o_proj.weight"].tensor_index[1] == q_rows


@settings(max_examples=examples(100))
@given(cuts())
def test_the_heads_of_a_replica_are_in_the_cache_of_as_many_ranks_as_they_must(cut: Cut):
    config, layout = cut
    heads = [cache_heads(config, layout, rank) for rank in range(layout.world_size)]
    assert len(set(heads)) == 1
    copies = max(1, layout.tp * layout.sp // config.num_key_value_heads)
    assert heads[0] * layout.tp * layout.sp == config.num_key_value_heads * copies
    size = sum(
        cache_bytes_per_token(config, layout, rank, "bfloat16") for rank in range(layout.world_size)
    )
    assert size == config.kv_bytes_per_token("bfloat16") * copies * layout.dp


@given(total=st.integers(0, 60), parts=st.integers(1, 9), unit=st.integers(1, 5))
def test_shares_are_equal_lengths_that_cover_the_whole_in_order(total: int, parts: int, unit: int):
    total *= unit
    shares = [Share.of(total, parts, part, unit) for part in range(parts)]
    assert len({share.length for share in shares}) == 1
    assert shares[0].length % unit == 0
    assert [i for share in shares for i in range(share.start, share.stop)] == list(range(total))
    assert all(share.stop - share.start <= share.length for share in shares)


def test_only_the_router_has_a_dtype_of_its_own():
    placement = place(ModelConfig.from_dict(geometry()), Layout(), 0)
    own = {name for name, parameter in placement.parameters.items() if parameter.dtype}
    assert own == {"layers.1.mlp.router", "layers.2.mlp.router"}
    assert placement.parameters["layers.1.mlp.router"].dtype == "float32"
    elements = sum(math.prod(parameter.shape) for parameter in placement.parameters.values())
    router_elements = 2 * 6 * 32
    assert placement.num_bytes("float32") == 4 * elements
    assert placement.num_bytes("bfloat16") == 2 * elements + 2 * router_elements


@pytest.mark.parametrize("name", ORACLES)
def test_names_and_shapes_are_those_of_real_checkpoints(name: str):
    oracle = Oracle(name)
    tensors = checkpoint_tensors(oracle.config)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in oracle.folder.glob("*.safetensors"):
        with safe_open(str(file), "pt") as handle:
            for key in handle.keys():  # noqa: SIM118
                shapes[key] = tuple(handle.get_slice(key).get_shape())
    assert tensors == shapes
    assert count_parameters(oracle.config)[0] == sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
def test_the_16b_model_is_cut_into_equal_parts(tp: int):
    config = ModelConfig.from_dict(PRESETS["16b"])
    sizes = {place(config, Layout(tp=tp), rank).num_bytes("bfloat16") for rank in {0, tp - 1}}
    total, _ = count_parameters(config)
    replicated = 28 * 2 * 2048 + 2048 + 27 * 64 * 2048
    # No padding: all lengths are multiples of 16. The routers take twice the bytes.
    expected = 2 * ((total - replicated) // tp + replicated) + 2 * 27 * 64 * 2048
    assert sizes == {expected}


def test_tied_embeddings_have_no_head_but_tolerate_one_in_the_checkpoint():
    tied = ModelConfig.from_dict(geometry(tie_word_embeddings=True))
    assert "head" not in place(tied, Layout(), 0).parameters
    assert "lm_head.weight" not in checkpoint_tensors(tied)
    assert "lm_head.weight" in set(tolerated_tensors(tied))
    untied = ModelConfig.from_dict(geometry())
    assert "lm_head.weight" in checkpoint_tensors(untied)
    assert "lm_head.weight" not in set(tolerated_tensors(untied))
