"""Expert placement by rules and by tables, and the errors of tables."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moespan.checkpoint.experts import ExpertPlacement, expert_rule
from moespan.checkpoint.placement import place
from moespan.config import ExpertTable, Layout, ModelConfig
from moespan.errors import ConfigError
from tests.support import geometry

CONFIG = ModelConfig.from_dict(geometry(n_routed_experts=6))  # layers 1 and 2 have experts
TWO = Layout(tp=2, ep=2)


@given(experts=st.integers(1, 40), ep=st.integers(1, 40))
def test_rules_spread_all_experts_evenly(experts: int, ep: int):
    config = ModelConfig.from_dict(geometry(n_routed_experts=experts, num_experts_per_tok=1))
    for rule in ("contiguous", "round_robin"):
        held = ExpertPlacement.make(rule, config, Layout(tp=ep, ep=ep)).of(1)
        assert sorted(expert for rank in held for expert in rank) == list(range(experts))
        assert max(map(len, held)) - min(map(len, held)) <= 1


def test_contiguous_and_round_robin_order():
    assert ExpertPlacement.make("contiguous", CONFIG, TWO).of(1) == ((0, 1, 2), (3, 4, 5))
    assert ExpertPlacement.make("round_robin", CONFIG, TWO).of(1) == ((0, 2, 4), (1, 3, 5))


def test_a_file_sets_all_layers_or_single_layers_and_may_repeat_experts(tmp_path: Path):
    table = {"default": [[5, 4, 3], [2, 1, 0]], "2": [[0, 1, 2], [3, 4, 5, 0]]}
    file = tmp_path / "experts.json"
    file.write_text(json.dumps(table))
    placement = ExpertPlacement.make(expert_rule(str(file)), CONFIG, TWO)
    assert placement.of(1) == ((5, 4, 3), (2, 1, 0))
    assert placement.of(2) == ((0, 1, 2), (3, 4, 5, 0))
    rows = {
        piece.tensor: piece.index[0]
        for piece in place(CONFIG, TWO, 1, placement).pieces
        if "layers.2.mlp.experts" in piece.tensor
    }
    assert rows["model.layers.2.mlp.experts.0.down_proj.weight"] == 3
    assert not any(".experts.1." in name for name in rows)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"default": [[0, 1, 2]]}, "expert placement lists 1 ranks, but ep=2"),
        ({"default": [[0, 1, 2], [3, 4]]}, "expert placement: no rank has the experts [5]"),
        ({"default": [[0, 1, 2, 3, 4, 5], []]}, "ep rank 1 has no expert, or one twice"),
        ({"default": [[0, 1, 2, 2], [3, 4, 5]]}, "ep rank 0 has no expert, or one twice"),
        ({"default": [[0, 1, 2], [3, 4, 5, 6]]}, "ep rank 1 has unknown experts [6]"),
        ({"0": [[0, 1, 2], [3, 4, 5]]}, "placement of layer 0: the model has no experts there"),
        ({"9": [[0, 1, 2], [3, 4, 5]]}, "placement of layer 9: the model has no experts there"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_by_name(table: ExpertTable, said: str):
    with pytest.raises(ConfigError, match=re.escape(said)):
        ExpertPlacement.make(table, CONFIG, TWO)


@pytest.mark.parametrize(
    "content",
    [
        '{"default": [1, 2]}',
        '{"first": [[0], [1]]}',
        '{"default": [["0"], [true]]}',
        '{"²": [[0], [1]]}',
        f'{{"{"9" * 5000}": [[0], [1]]}}',
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: str):
    file = tmp_path / "experts.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match="must be a layer number or 'default'"):
        expert_rule(str(file))


@pytest.mark.parametrize("experts", [[0, 10**400], [*range(100_000)]])
def test_experts_are_never_listed_whole(experts: list[int]):
    with pytest.raises(ConfigError, match="ep rank 0 has unknown experts") as caught:
        ExpertPlacement.make({"default": [experts, [1, 2]]}, CONFIG, TWO)
    assert len(str(caught.value)) < 200


def test_a_fifo_in_place_of_the_file_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "experts.json")
    with pytest.raises(ConfigError, match="it is a FIFO, not a regular file"):
        expert_rule(str(tmp_path / "experts.json"))


def test_a_name_that_is_neither_rule_nor_file_is_refused():
    with pytest.raises(ConfigError, match="hottest is neither contiguous nor round_robin nor a"):
        expert_rule("hottest")
