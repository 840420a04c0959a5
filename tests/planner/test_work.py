"""The work of a step equals the work that is counted by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moespan import ModelConfig
from moespan.checkpoint.placement import count_parameters
from moespan.checkpoint.presets import preset
from moespan.config import EngineConfig
from moespan.planner.work import Limits, Work, step_work

SIXTEEN_B = ModelConfig.from_dict(preset("16b", {}))
TABLE = SIXTEEN_B.vocab_size * SIXTEEN_B.hidden_size
ATTENDED = 4 * SIXTEEN_B.hidden_size * SIXTEEN_B.num_hidden_layers
"""Operations of one token that attends to one token."""


def work_16b(num_sequences: int, num_new: int, context: float, dtype: str = "float32") -> Work:
    return step_work(SIXTEEN_B, EngineConfig("", dtype=dtype), num_sequences, num_new, context)


def test_one_token_reads_the_active_parameters_and_multiplies_all_but_the_embedding():
    _, active = count_parameters(SIXTEEN_B)
    work = work_16b(1, 1, 0)
    assert work.operations == pytest.approx(2 * (active - TABLE) + ATTENDED)
    read = active - TABLE + SIXTEEN_B.hidden_size
    cached = SIXTEEN_B.kv_bytes_per_token("float32")
    assert work.num_bytes == pytest.approx(4 * read + cached)


def test_large_batches_read_every_weight_once():
    total, _ = count_parameters(SIXTEEN_B)
    cached = 1000 * SIXTEEN_B.kv_bytes_per_token("float32")
    read = total - TABLE + 1000 * SIXTEEN_B.hidden_size
    assert work_16b(1000, 1, 0).num_bytes == pytest.approx(4 * read + cached, rel=1e-6)


def test_a_prompt_attends_to_half_of_its_square_and_needs_one_row_of_logits():
    one, many = work_16b(1, 1, 0), work_16b(1, 100, 0)
    head = 2 * TABLE
    pairs = 100 * 101 // 2 - 100
    assert many.operations == pytest.approx(100 * (one.operations - head) + head + ATTENDED * pairs)


def test_a_step_of_four_layers_in_bytes_counted_by_hand():
    # One dense layer and three MoE layers. 8 tokens read 64 · (1 - (58/64)^8) = 34.9 experts.
    config = ModelConfig.from_dict(preset("16b-4l", {}))
    hidden, width, dense, vocabulary, context = 2048, 1408, 10944, 102400, 100
    experts = 64 * (1 - (58 / 64) ** 8)
    matrices = (
        4 * 4 * hidden * hidden  # attention
        + 3 * hidden * dense
        + 3 * (2 + experts) * 3 * hidden * width
        + vocabulary * hidden  # head
        + 8 * hidden  # rows of the embedding
        + (2 * 4 + 1) * hidden  # norms
    )
    routers = 3 * 64 * hidden * 4
    cache = 8 * (context + 1) * 4 * 2 * hidden * 2
    work = step_work(config, EngineConfig("", dtype="bfloat16"), 8, 1, context)
    assert work.num_bytes == pytest.approx(2 * matrices + routers + cache)


def test_a_model_without_experts_reads_none():
    dense = ModelConfig.from_dict(preset("tiny", {"n_routed_experts": None}))
    total, _ = count_parameters(dense)
    work = step_work(dense, EngineConfig("", dtype="float32"), 1, 1, 0)
    table = dense.vocab_size * dense.hidden_size
    read = total - table + dense.hidden_size
    assert work.num_bytes == pytest.approx(4 * read + dense.kv_bytes_per_token("float32"))


def test_the_slower_of_the_two_limits_is_the_limit():
    limits = Limits(bytes_per_s=10, operations_per_s=100)
    assert Work(operations=50, num_bytes=20).least_s(limits) == 2
    assert Work(operations=50, num_bytes=20).bound(limits) == "memory"
    assert Work(operations=500, num_bytes=20).least_s(limits) == 5
    assert Work(operations=500, num_bytes=20).bound(limits) == "compute"
    assert Limits.mean(limits, Limits(30, 300)) == Limits(20, 200)


def test_counting_needs_no_torch():
    code = "import moespan.planner.work, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
