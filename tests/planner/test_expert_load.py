"""The load of the busiest ep rank: against draws, and by counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moespan.checkpoint.experts import ExpertPlacement
from moespan.config import ModelConfig
from moespan.errors import ConfigError
from moespan.planner.expert_load import ExpertLoad, Routing, uniform_maximum
from tests.support import geometry

MODEL = ModelConfig.from_dict(
    geometry(n_routed_experts=16, num_experts_per_tok=4, num_hidden_layers=3)
)
CONTIGUOUS = ExpertPlacement(tuple(tuple(range(4 * rank, 4 * rank + 4)) for rank in range(4)), {})


def drawn(tokens: int, experts: int, chosen: int, num_ranks: int) -> ExpertLoad:
    random = np.random.default_rng(7)
    rows, met = [], []
    for _ in range(max(150, 6000 // tokens)):
        taken = np.argpartition(random.random((tokens, experts)), chosen - 1, axis=1)[:, :chosen]
        hits = np.bincount(taken.ravel(), minlength=experts).reshape(num_ranks, -1)
        rows.append(hits.sum(1).max())
        met.append((hits > 0).sum(1).max())
    return ExpertLoad(float(np.mean(rows)), float(np.mean(met)))


@pytest.mark.parametrize("tokens", [1, 3, 8, 40, 300])
@pytest.mark.parametrize(("experts", "chosen", "num_ranks"), [(64, 6, 2), (64, 6, 8), (16, 4, 4)])
def test_the_uniform_maximum_is_that_of_draws(
    tokens: int, experts: int, chosen: int, num_ranks: int
):
    expected = drawn(tokens, experts, chosen, num_ranks)
    found = uniform_maximum(tokens, experts, chosen, experts // num_ranks, num_ranks)
    assert found.rows == pytest.approx(expected.rows, rel=0.06 if tokens == 1 else 0.03)
    assert found.met == pytest.approx(expected.met, rel=0.06 if tokens == 1 else 0.03)


def test_one_rank_gets_every_row_and_many_tokens_reach_the_mean():
    assert uniform_maximum(10, 64, 6, 64, 1).rows == 60
    assert uniform_maximum(1 << 20, 64, 6, 8, 8).rows == pytest.approx(6 / 8 * 2**20, rel=0.005)
    # The exact and the normal distribution meet.
    below, above = (uniform_maximum(tokens, 64, 6, 8, 8).rows for tokens in (4096, 4097))
    assert 0 < above - below < 2


def test_even_counts_lead_to_the_uniform_load():
    even = Routing(MODEL, {layer: [100] * 16 for layer in (1, 2)})
    found, uniform = even.busiest(64, CONTIGUOUS), Routing(MODEL).busiest(64, CONTIGUOUS)
    assert found.rows == pytest.approx(uniform.rows, rel=0.03)
    assert found.met == pytest.approx(uniform.met, rel=0.03)


def test_a_hot_expert_loads_its_rank_and_copies_share_it():
    counts = {layer: [1000] + [10] * 15 for layer in (1, 2)}
    hot, even = Routing(MODEL, counts), Routing(MODEL)
    assert hot.busiest(64, CONTIGUOUS).rows > 1.3 * even.busiest(64, CONTIGUOUS).rows
    copied = ExpertPlacement(
        ((0, 1, 2, 3), (0, *range(4, 8)), (0, *range(8, 12)), (0, *range(12, 16))), {}
    )
    assert hot.busiest(64, copied).rows < 0.8 * hot.busiest(64, CONTIGUOUS).rows


def test_a_table_of_one_layer_counts_in_that_layer():
    counts = {1: [1000] * 4 + [10] * 12, 2: [100] * 16}
    routing = Routing(MODEL, counts)
    dealt = tuple(tuple(range(rank, 16, 4)) for rank in range(4))
    first, second = (ExpertPlacement(CONTIGUOUS.default, {layer: dealt}) for layer in (1, 2))
    now = routing.busiest(64, CONTIGUOUS).rows
    assert routing.busiest(64, first).rows < 0.7 * now
    assert routing.busiest(64, second).rows == pytest.approx(now, rel=0.05)


def test_draws_repeat_with_their_seed():
    counts = {layer: list(range(1, 17)) for layer in (1, 2)}
    first, again, other = (
        Routing(MODEL, counts, seed).busiest(9, CONTIGUOUS) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_counts_are_read_and_must_fit_the_model(tmp_path: Path):
    path = tmp_path / "counts.json"
    layers = [layer for layer in range(3) if MODEL.is_moe(layer)]
    path.write_text(json.dumps({"counts": {layer: [1] * 16 for layer in layers}}))
    assert Routing.read(str(path), MODEL).busiest(4, CONTIGUOUS).rows > 4
    path.write_text(json.dumps({"counts": {layer: [1] * 15 for layer in layers}}))
    with pytest.raises(ConfigError, match="needs 16 counts"):
        Routing.read(str(path), MODEL)
    path.write_text(json.dumps({"counts": {"9": [1] * 16}}))
    with pytest.raises(ConfigError, match=r"layers \[9\]"):
        Routing.read(str(path), MODEL)
    with pytest.raises(ConfigError, match="neither uniform nor a file"):
        Routing.read(str(tmp_path / "none.json"), MODEL)
