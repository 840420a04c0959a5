"""The engine's worker on a simulated NPU: graphs, waits and kernels of a decode step."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moespan.config import EngineOptions, Layout, ModelConfig
from moespan.engine.step import StepPlan, StepPlans
from moespan.engine.worker import Worker
from moespan.model.network import Step
from moespan.ops import AttentionBatch, ops_for
from moespan.ops.npu.ops import NpuOps
from moespan.parallel.mesh import Mesh
from tests.ascend.inside.layer import needs_cache_mode
from tests.support import (
    Oracle,
    execute,
    geometry,
    greedy_row,
    make_worker,
    run_prompts,
    sampling_of,
)

NPU = torch.device("npu", 0)
# Heads of 128 and experts of 64, which the fused kernels take.
FUSED = ModelConfig.from_dict(
    geometry(
        hidden_size=256,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_intermediate_size=64,
        intermediate_size=64,
    )
)


# Matrices, and the cache.
INTEGERS = [{"quantization": "int8"}, {"quantization": "w8a8", "kv_cache_dtype": "int8"}]


def npu_worker(
    config: ModelConfig, source: Any = None, block_size: int = 16, **settings: Any
) -> Worker:
    mesh = Mesh.create(Layout(), NPU)
    ops = settings.pop("ops", None) or ops_for("npu")
    return make_worker(
        config, source, mesh, ops=ops, block_size=block_size, num_blocks=64, **settings
    )


@pytest.mark.parametrize(
    ("name", "enforce_eager"), [("tiny", False), ("tiny_gqa", True), ("tiny_gqa", False)]
)
def test_greedy_continuations_are_those_of_the_hugging_face_model(name: str, enforce_eager: bool):
    oracle = Oracle(name)
    worker = npu_worker(oracle.config, oracle.source(), enforce_eager=enforce_eager)
    runs = run_prompts(
        worker, oracle.prompts, block_size=16, num_blocks=64, most_chunk=64, num_generated=6
    )
    assert [run.generated for run in runs] == [tokens[:6] for tokens in oracle.greedy]
    assert (worker.graphs is None) == enforce_eager
    if worker.graphs is not None:
        assert 1 <= worker.graphs.num_recorded <= 4


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [("float16", {}), *(("bfloat16", settings) for settings in ({}, *INTEGERS))],
    ids=str,
)
def test_graphs_change_no_bit(dtype: str, settings: dict[str, str]):
    prompts = [[(7 * i + start) % 61 for i in range(length)] for start, length in ((0, 29), (5, 8))]
    runs = []
    for eager in (False, True):
        worker = npu_worker(FUSED, block_size=32, dtype=dtype, enforce_eager=eager, **settings)
        runs.append(run_prompts(worker, prompts, block_size=32, num_blocks=64, num_generated=12))
        assert worker.graphs is None or worker.graphs.num_recorded
    for captured, eager in zip(*runs, strict=True):
        assert captured.generated == eager.generated
        assert (captured.logits == eager.logits).all()


def decode(context_lens: list[int], **settings: Any) -> StepPlan:
    count = len(context_lens)
    return StepPlan(
        step=0,
        token_ids=list(range(count)),
        query_lens=[1] * count,
        context_lens=context_lens,
        block_tables=[[3 * i, 3 * i + 1, 3 * i + 2] for i in range(count)],
        **sampling_of(range(count), *[greedy_row(**settings)] * count),
    )


class Waits(TorchDispatchMode):
    """Lists operations that make the host wait: reads of values, and copies of unpinned memory."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        got = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        name = func.overloadpacket.__name__
        devices = {x.device.type for x in given}
        if "npu" in devices and not all(x.device.type == "npu" for x in got):
            is_asynchronous = name == "copy_" and args[2:] == (True,) and args[0].is_pinned()
            if not is_asynchronous:
                self.seen.append(f"{name} reads")
        elif name in ("item", "_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.seen.append(name)
        elif "cpu" in {x.device.type for x in given if x.dim()} and any(
            x.device.type == "npu" for x in got
        ):
            source = next(x for x in given if x.device.type == "cpu")
            if not source.is_pinned():
                self.seen.append(f"{name} sends")
        return result


@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize(
    ("settings", "integers"),
    [({}, {}), ({"temperature": 0.7, "top_p": 0.9}, {}), *(({}, one) for one in INTEGERS)],
    ids=str,
)
def test_decode_steps_are_started_ahead_without_a_wait_for_the_device(
    enforce_eager: bool, settings: dict[str, float], integers: dict[str, str]
):
    worker = npu_worker(
        FUSED, block_size=32, dtype="bfloat16", enforce_eager=enforce_eager, **integers
    )
    for pair in worker.caches:
        for cache in pair.tensors:
            cache.zero_()
    for length in range(3):
        execute(worker, decode([length, length + 20, length]))
    steps = [decode([3, 23, 3], **settings), decode([4, 24, 4], **settings)]
    steps[1].token_ids[:] = [~0, ~1, ~2]  # the tokens that the first step samples
    with Waits() as waits:
        started = [worker.execute(StepPlans.of([step])) for step in steps]
    assert waits.seen == []
    # The same tokens as with one step after another.
    results = [one.wait() for one in started if one is not None]
    first = execute(worker, steps[0])
    tokens = [sampled.token_id for sampled in first.samples]
    steps[1].token_ids[:] = [token for token in tokens if token is not None]
    assert results == [first, execute(worker, steps[1])]


KERNELS = {
    # all experts here, and half of them
    "whole": "AddRmsNorm Matmul InplaceCopy ApplyRotaryPosEmbV2 ScatterPaKvCache "
    "FusedInferAttentionScoreV3 Matmul AddRmsNorm InplaceCopy Matmul MoeGatingTopKSoftmax "
    "MoeInitRoutingV3 GroupedMatmulV5 SwiGlu GroupedMatmulV5 MoeTokenUnpermute "
    "Matmul SwiGlu Matmul Add",
    "half": "AddRmsNorm Matmul InplaceCopy ApplyRotaryPosEmbV2 ScatterPaKvCache "
    "FusedInferAttentionScoreV3 Matmul AddRmsNorm InplaceCopy Matmul MoeGatingTopKSoftmax "
    "MoeInitRoutingV3 GroupedMatmulV5 SwiGlu GroupedMatmulV5 "
    "ReduceSum LtScalar InplaceMaskedFillScalar RemainderTensorScalar MoeTokenUnpermute "
    "Matmul SwiGlu Matmul Add",
    "int8": "AddRmsNorm WeightQuantBatchMatmulV2 InplaceCopy ApplyRotaryPosEmbV2 ScatterPaKvCache "
    "FusedInferAttentionScoreV3 WeightQuantBatchMatmulV2 AddRmsNorm InplaceCopy Matmul "
    "MoeGatingTopKSoftmax MoeInitRoutingV3 GroupedMatmulV5 SwiGlu GroupedMatmulV5 "
    "MoeTokenUnpermute WeightQuantBatchMatmulV2 SwiGlu WeightQuantBatchMatmulV2 Add",
    "w8a8": "AddRmsNorm DynamicQuantV2 QuantMatmulV5 InplaceCopy ApplyRotaryPosEmbV2 "
    "ScatterPaKvCache FusedInferAttentionScoreV3 DynamicQuantV2 QuantMatmulV5 AddRmsNorm "
    "InplaceCopy Matmul MoeGatingTopKSoftmax MoeInitRoutingV3 GroupedMatmulV5 DequantSwigluQuantV2 "
    "GroupedMatmulV5 MoeTokenUnpermute DynamicQuantV2 QuantMatmulV5 SwiGlu DynamicQuantV2 "
    "QuantMatmulV5 Add",
    # as many as "whole", with the shared experts first, on the second of two streams
    "overlap": "AddRmsNorm Matmul InplaceCopy ApplyRotaryPosEmbV2 ScatterPaKvCache "
    "FusedInferAttentionScoreV3 Matmul AddRmsNorm InplaceCopy Matmul MoeGatingTopKSoftmax "
    "Matmul SwiGlu Matmul "
    "MoeInitRoutingV3 GroupedMatmulV5 SwiGlu GroupedMatmulV5 MoeTokenUnpermute Add",
    # and two IndexPut, which the stand-in does without a kernel
    "cache": "AddRmsNorm Matmul InplaceCopy ApplyRotaryPosEmbV2 FloorDivides RemainderTensorScalar "
    "DynamicQuantV2 DynamicQuantV2 ScatterPaKvCache FusedInferAttentionScoreV3 Matmul AddRmsNorm "
    "InplaceCopy Matmul MoeGatingTopKSoftmax MoeInitRoutingV3 GroupedMatmulV5 SwiGlu "
    "GroupedMatmulV5 MoeTokenUnpermute Matmul SwiGlu Matmul Add",
}
# Matrices of integers, and the other kernels that they launch.
SETTINGS: dict[str, dict[str, str]] = {
    "whole": {},
    "half": {},
    "int8": {"quantization": "int8"},
    "w8a8": {"quantization": "w8a8"},
    "overlap": {},
    "cache": {"kv_cache_dtype": "int8"},
}


@pytest.fixture(scope="module")
def launched() -> dict[str, str]:
    """Names of the kernels of each part, from one new process: only such a one can be traced."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.ascend.inside.test_decode"],
        env={**os.environ, "ASCEND_SIM_TRACE": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = {}
    for traced in result.stderr.split("--- ")[1:]:
        part, *lines = traced.splitlines()
        names = [line.split()[1].removeprefix("aclnn") for line in lines if "[cann] aclnn" in line]
        found[part] = " ".join(n for n in names if not n.endswith("GetWorkspaceSize"))
    return found


@needs_cache_mode
@pytest.mark.parametrize("part", SETTINGS)
def test_a_decode_layer_launches_these_kernels_and_no_others(launched: dict[str, str], part: str):
    assert launched[part] == KERNELS[part]


def run_layer(part: str) -> None:
    """Run one MoE layer of a decode step twice, with marks around the second run."""
    ops = NpuOps(options=EngineOptions(npu_overlap_shared=part == "overlap"))
    worker = npu_worker(FUSED, block_size=32, dtype="bfloat16", ops=ops, **SETTINGS[part])
    layer: Any = worker.model.layers[1]
    if part == "half":
        bank = layer.mlp.bank
        layer.mlp.bank = replace(bank, gate_up=bank.gate_up[:3], down=bank.down[:3])
    with torch.inference_mode():
        batch = AttentionBatch.build([1] * 3, [4, 40, 0], [[1], [2, 3], [4]], 32, NPU)
        step = Step(batch, [3], worker.model.rope(batch.positions))
        x = torch.ones(3, FUSED.hidden_size, device=NPU, dtype=torch.bfloat16)
        layer(x, x, worker.caches[1], step)
        print(f"--- {part}", file=sys.stderr, flush=True)
        layer(x, x, worker.caches[1], step)
        print("--- nothing", file=sys.stderr, flush=True)


if __name__ == "__main__":
    for each in SETTINGS:
        run_layer(each)
