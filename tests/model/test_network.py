"""The network computes what the Hugging Face model and a second, plain implementation compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moespan.checkpoint.random import RandomSource
from moespan.config import ModelConfig
from moespan.engine.worker import Worker
from moespan.ops import AttentionBatch, CpuOps, Ops, ReferenceOps
from tests.plain_model import plain_logits
from tests.support import CPU, ORACLES, Oracle, assert_close, geometry, make_worker, run_prompts

FLOAT32 = 2e-4


@pytest.fixture(scope="module", params=ORACLES)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return Oracle(request.param)


class OverlappingOps(CpuOps):
    """Shared experts beside the routed ones, as on a second stream."""

    has_second_stream = True


@pytest.mark.parametrize("ops", [CpuOps(), ReferenceOps(), OverlappingOps()], ids=type)
def test_logits_of_whole_prompts_are_those_of_the_hugging_face_model(oracle: Oracle, ops: Ops):
    worker = make_worker(oracle.config, oracle.source(), ops=ops)
    for prompt, expected in zip(oracle.prompts, oracle.logits, strict=True):
        (run,) = run_prompts(worker, [prompt])
        assert_close(run.logits, expected, FLOAT32)


@pytest.mark.parametrize(("most_chunk", "block_size"), [(1, 1), (7, 3), (40, 16), (256, 256)])
def test_logits_do_not_depend_on_chunks_or_on_other_sequences(
    oracle: Oracle, most_chunk: int, block_size: int
):
    num_blocks = 5 * -(-256 // block_size)
    worker = make_worker(
        oracle.config, oracle.source(), block_size=block_size, num_blocks=num_blocks
    )
    prompts = oracle.prompts if most_chunk > 1 else oracle.prompts[:3]
    runs = run_prompts(
        worker,
        prompts,
        block_size=block_size,
        num_blocks=num_blocks,
        most_chunk=most_chunk,
        seed=most_chunk,
    )
    for run, expected in zip(runs, oracle.logits, strict=False):
        assert_close(run.logits, expected, FLOAT32)


def test_greedy_continuations_are_those_of_the_hugging_face_model(oracle: Oracle):
    worker = make_worker(oracle.config, oracle.source())
    runs = run_prompts(worker, oracle.prompts, most_chunk=64, num_generated=24)
    assert [run.generated for run in runs] == oracle.greedy


class RecordingOps(CpuOps):
    """Keeps the router's decisions, layer after layer."""

    def __init__(self) -> None:
        self.routed: list[tuple[Tensor, Tensor]] = []

    def route(
        self, x: Tensor, router: Tensor, num_chosen: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        self.routed.append(super().route(x, router, num_chosen, renormalize))
        return self.routed[-1]


def test_router_chooses_the_experts_and_weights_of_the_hugging_face_model(oracle: Oracle):
    ops = RecordingOps()
    worker = make_worker(oracle.config, oracle.source(), ops=ops)
    layers = [i for i in range(oracle.config.num_hidden_layers) if oracle.config.is_moe(i)]
    for name, prompt in zip(oracle.names, oracle.prompts, strict=True):
        ops.routed.clear()
        run_prompts(worker, [prompt], most_chunk=256, seed=len(prompt))
        per_layer = [ops.routed[at :: len(layers)] for at in range(len(layers))]
        for layer, steps in zip(layers, per_layer, strict=True):
            weights, chosen = (torch.cat(parts) for parts in zip(*steps, strict=True))
            expected = oracle.tensors[f"{name}.layer{layer}.topk_idx"]
            expected_weights = oracle.tensors[f"{name}.layer{layer}.topk_weight"]
            chosen, order = chosen.sort(-1)
            expected, expected_order = expected.sort(-1)
            assert torch.equal(chosen, expected)
            torch.testing.assert_close(
                weights.gather(-1, order),
                expected_weights.gather(-1, expected_order),
                rtol=1e-4,
                atol=1e-6,
            )


GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped-query attention": {"num_key_value_heads": 2},
    "one KV head": {"num_key_value_heads": 1},
    "null KV heads": {"num_key_value_heads": None},
    "attention bias": {"attention_bias": True, "num_key_value_heads": 2},
    "tied embeddings": {"tie_word_embeddings": True},
    "no shared experts": {"n_shared_experts": None},
    "dense": {"n_routed_experts": None},
    "experts in every second layer": {"moe_layer_freq": 2, "num_hidden_layers": 5},
    "experts from the first layer": {"first_k_dense_replace": 0},
    "renormalised top-k": {"norm_topk_prob": True},
    "renormalised top-1 keeps its weight": {"norm_topk_prob": True, "num_experts_per_tok": 1},
    "all experts chosen": {"num_experts_per_tok": 6},
    "linear rope scaling": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "another rope base": {"rope_theta": 500.0},
    "another epsilon": {"rms_norm_eps": 0.1},
    "one layer, one head": {"num_hidden_layers": 1, "num_attention_heads": 1}
    | {"num_key_value_heads": 1},
}


def random_model(raw: dict[str, Any]) -> tuple[Worker, RandomSource]:
    config = ModelConfig.from_dict(raw)
    source = RandomSource(config, torch.float32, seed=3)
    return make_worker(config, source), source


@pytest.mark.parametrize("overrides", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_every_geometry_computes_what_the_plain_model_computes(overrides: dict[str, Any]):
    raw = geometry(**overrides)
    worker, source = random_model(raw)
    prompts = [[(7 * i + start) % 61 for i in range(length)] for start, length in ((0, 29), (5, 8))]
    runs = run_prompts(worker, prompts, most_chunk=10, seed=1)
    for run, prompt in zip(runs, prompts, strict=True):
        expected = plain_logits(raw, source.draw, prompt)
        assert_close(run.logits, expected.numpy(), FLOAT32)


def test_bfloat16_stays_near_float32():
    raw = geometry(n_routed_experts=None, hidden_size=64, vocab_size=200)
    config = ModelConfig.from_dict(raw)
    exact, rounded = (make_worker(config, dtype=dtype) for dtype in ("float32", "bfloat16"))
    prompt = list(range(40))
    (expected,) = run_prompts(exact, [prompt])
    (run,) = run_prompts(rounded, [prompt], most_chunk=9)
    assert_close(run.logits, expected.logits, 0.1)


def test_observers_see_the_embedding_and_the_hidden_state_after_every_layer():
    raw = geometry()
    worker, source = random_model(raw)
    prompt = [3, 1, 4]
    batch = AttentionBatch.build([3], [0], [[7]], block_size=4, device=CPU)
    seen: list[tuple[int, str, Tensor]] = []
    logits = worker.model(
        torch.tensor(prompt),
        worker.caches,
        batch,
        torch.tensor([0, 2]),
        lambda layer, module, value: seen.append((layer, module, value.clone())),
    )
    dense, moe = (
        ["attention", "hidden"],
        ["attention", "router.experts", "router.weights", "hidden"],
    )
    assert [(layer, module) for layer, module, _ in seen] == [
        (-1, "embed"),
        *((0, module) for module in dense),
        *((layer, module) for layer in (1, 2) for module in moe),
    ]
    assert torch.equal(seen[0][2], source.draw("model.embed_tokens.weight")[prompt])
    last = torch.nn.functional.rms_norm(seen[-1][2], (raw["hidden_size"],), eps=1e-6)
    expected = last[[0, 2]] @ source.draw("lm_head.weight").T
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
