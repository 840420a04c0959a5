"""CUDA operations compute what the reference computes; on the CPU, in Triton's interpreter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moespan.checkpoint.rounding import QuantizedWeight, quantize, round_rows
from moespan.config import ModelConfig
from moespan.model.network import Step
from moespan.ops import (
    AttentionBatch,
    CpuOps,
    ExpertBank,
    KVCache,
    Ops,
    ReferenceOps,
    Rotation,
)
from tests.ops import interpreter
from tests.ops.contract import (
    DTYPES,
    KINDS,
    REFERENCE,
    OpsContract,
    QuantizedContract,
    assert_close,
    make_batch,
)
from tests.support import Oracle, geometry, make_worker, run_prompts

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from poison import Poisoned

pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter.fix_floats(monkeypatch)


@pytest.fixture
def ops() -> Ops:
    from moespan.ops.cuda.ops import CudaOps

    return CudaOps()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.sampled(3)  # the interpreter is slow; each combination meets one of three dtypes
class TestCudaOps(OpsContract):
    head_sizes = (80,)
    most_tokens = 21

    @pytest.fixture
    def ops(self, ops: Ops) -> Iterator[Ops]:
        with Poisoned():
            yield ops


@pytest.mark.sampled(3)
class TestCudaOpsOf8Bits(QuantizedContract):
    head_sizes = (6,)
    most_tokens = 21

    @pytest.fixture
    def ops(self, ops: Ops) -> Iterator[Ops]:
        with Poisoned():
            yield ops


# Routing


@pytest.mark.parametrize(
    ("num_tokens", "num_chosen", "num_physical", "first", "held"),
    [(1, 1, 1, 0, 1), (7, 6, 64, 0, 64), (300, 3, 40, 8, 13), (90, 6, 64, 63, 1)],
)
def test_pairs_are_sorted_by_expert_and_the_sort_is_stable(
    num_tokens: int, num_chosen: int, num_physical: int, first: int, held: int
):
    from moespan.ops.cuda.routing import sort_pairs

    generator = torch.Generator().manual_seed(0)
    shape = num_tokens, num_chosen
    physical_ids = torch.randint(0, num_physical + 1, shape, generator=generator)
    physical_ids[::2] = first  # far more on one expert than on the others
    with Poisoned():
        order = sort_pairs(physical_ids.int(), first, held, block_m=16)
    flat = physical_ids.flatten()
    mine = ((flat >= first) & (flat < first + held)).nonzero()[:, 0]
    expected = mine[flat[mine].argsort(stable=True)]
    assert order.pairs[: len(mine)].tolist() == expected.tolist()
    covered = 0
    for expert, start, rows in order.tiles.tolist():
        if rows:
            assert start == covered and rows <= 16
            assert flat[order.pairs[start : start + rows]].tolist() == [first + expert] * rows
            covered += rows
    assert covered == len(mine)


def test_equal_logits_choose_the_first_experts(ops: Ops):
    weights, chosen = ops.route(torch.ones(3, 8), torch.ones(6, 8), 2, True)
    assert chosen.tolist() == [[0, 1]] * 3
    assert weights.tolist() == [[0.5, 0.5]] * 3


# The 8-bit cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [6, 80])
def test_rotated_keys_are_rounded_into_an_int8_cache(ops: Ops, head_size: int, dtype: torch.dtype):
    shape = (3, 4, 2, head_size)
    ours, theirs = (KVCache.zeros(shape, torch.int8, CPU) for _ in range(2))
    slots = torch.tensor([5, 0, 11], dtype=torch.int32)
    qkv = random(3, 4 + 2 * 2, head_size, dtype=dtype)
    qkv[1, 5:] = 0
    angles = random(3, head_size // 2)
    rotation = Rotation(4, 2, angles.cos(), angles.sin())
    q = ops.rope_to_cache(qkv.clone(), rotation, ours, slots)
    expected = REFERENCE.rope_to_cache(qkv, rotation, theirs, slots)
    assert_close(q, expected.contiguous(), dtype)
    for found, wanted in zip(ours.tensors, theirs.tensors, strict=True):
        # A rotated element between two integers may be rounded to either.
        assert (found.float() - wanted.float()).abs().max() <= (
            1 if found.dtype == torch.int8 else 1e-4
        )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_nan_and_infinity_survive_8_bit_products(ops: Ops, dtype: torch.dtype):
    x = torch.ones(6, 16)
    x[1, 3], x[4, 5] = torch.nan, torch.inf
    weight = QuantizedWeight(torch.ones(8, 16).to(dtype), torch.ones(8), 8)
    for tokens in (x, x[:2]):
        finite = ops.linear(tokens, weight).isfinite().all(-1)
        assert finite.tolist() == tokens.isfinite().all(-1).tolist()


def test_nan_and_infinity_survive_an_int8_cache(ops: Ops):
    x = torch.ones(6, 16)
    x[1, 3], x[4, 5] = torch.nan, torch.inf
    cache = KVCache.zeros((2, 4, 1, 16), torch.int8, CPU)
    ops.write_cache(x[:, None], x[:, None], cache, torch.arange(6, dtype=torch.int32))
    assert cache.key_scales is not None
    assert cache.key_scales.flatten()[:6].isfinite().tolist() == x.isfinite().all(-1).tolist()


# 8-bit floats


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("width", [1, 300, 4100])
def test_rows_are_rounded_as_the_reference_rounds_them(width: int, dtype: torch.dtype):
    from moespan.ops.cuda.rows import quantize

    x = random(4, width)
    x[1] *= torch.logspace(-8, 4, width)  # subnormal numbers, too
    x[2] = 0
    x[3] = 1e-40  # its scale is smaller than any that gives a quotient of 448
    with Poisoned():
        values, scales = quantize(x, dtype)
    expected, expected_scales = round_rows(x, dtype=dtype)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(values[:3].float(), expected[:3].float())
    assert values.float().isfinite().all()


@pytest.mark.parametrize("choice", ["random", "all on one", "none here"])
@pytest.mark.parametrize("num_tokens", [1, 37])
def test_experts_of_8_bit_floats_at_odd_sizes(ops: Ops, num_tokens: int, choice: str):
    kind, (first, held, num_physical, width, hidden) = KINDS["fp8"], (3, 5, 11, 34, 7)
    shapes = (held, 2 * hidden, width), (held, width, hidden)
    matrices = [
        QuantizedWeight(values.view(shape), scales.view(shape[:-1]), kind.activation_bits)
        for shape in shapes
        for values, scales in [quantize(random(*shape).flatten(0, 1), dtype=kind.dtype)]
    ]
    x, weights = random(num_tokens, width, dtype=torch.bfloat16), random(num_tokens, 4).softmax(-1)
    physical_ids = random(num_tokens, num_physical).argsort(-1)[:, :4].int()
    if choice != "random":
        one = first if choice == "all on one" else num_physical
        physical_ids = torch.full_like(physical_ids, one)
    args = (x, weights, physical_ids, ExpertBank(matrices[0], matrices[1], first, num_physical))
    with Poisoned():
        found = ops.experts(*args)
    assert_close(found, REFERENCE.experts(*args), torch.bfloat16, kind.flip)


@pytest.mark.parametrize(
    ("capability", "takes"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)]
)
def test_cards_without_8_bit_floats_do_not_take_them(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], takes: bool
):
    from moespan.ops.cuda.ops import CudaOps

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert CudaOps().quantizations == (("int8", "w8a8", "fp8") if takes else ("int8", "w8a8"))


# Attention split over the keys of a sequence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_decodes_are_split_and_joined(ops: Ops, dtype: torch.dtype):
    from moespan.ops.cuda import attention

    context_lens = [511, 0, 130]
    batch, num_blocks = make_batch([1, 1, 1], context_lens, 32, CPU)
    assert attention._num_splits(3 * 2, batch.block_tables, 32) == 4
    cache = KVCache(*(random(num_blocks, 32, 2, 16, dtype=dtype, seed=s) for s in (1, 2)))
    q = random(3, 4, 16, dtype=dtype)
    with Poisoned():
        found = ops.attention(q, cache, batch, 0.3)
    assert_close(found, REFERENCE.attention(q, cache, batch, 0.3), dtype)


def test_decode_reads_lengths_from_the_device_only(ops: Ops):
    # A recorded graph keeps the host integers of its recording.
    batch, num_blocks = make_batch([1, 1], [9, 4], 4, CPU)
    stale = AttentionBatch(
        [1, 1], [0, 0], batch.block_tables, batch.slots, batch.positions, batch.lengths
    )
    cache = KVCache(*(random(num_blocks, 4, 2, 16, seed=seed) for seed in (1, 2)))
    q = random(2, 2, 16)
    found = ops.attention(q, cache, stale, 0.3)
    assert_close(found, REFERENCE.attention(q, cache, batch, 0.3), torch.float32)


# The whole network


def test_the_network_of_8_bit_floats_computes_what_plain_torch_does(ops: Ops):
    config = ModelConfig.from_dict(geometry())
    ours, theirs = (
        make_worker(config, ops=one, quantization="fp8", enforce_eager=True)
        for one in (ops, ReferenceOps())
    )
    prompt = list(range(6))  # in a step of FEW_TOKENS + 1 tokens, and a step of one
    (found,), (expected,) = (run_prompts(one, [prompt], most_chunk=5) for one in (ours, theirs))
    assert abs(found.logits - expected.logits).max() <= 1e-4 * abs(expected.logits).max()


@pytest.mark.parametrize("name", ["tiny_gqa", "sixteen"])
def test_the_network_computes_the_hugging_face_models_logits(name: str, ops: Ops):
    oracle = Oracle(name)
    shortest = min(range(len(oracle.prompts)), key=lambda i: len(oracle.prompts[i]))
    worker = make_worker(oracle.config, oracle.source(), ops=ops, enforce_eager=True)
    prompt = oracle.prompts[shortest][:7]
    (run,) = run_prompts(worker, [prompt], most_chunk=5)
    theirs = oracle.logits[shortest][: len(prompt)]
    assert abs(run.logits - theirs).max() <= 1e-5 * abs(theirs).max()


def test_without_a_card_decode_steps_run_without_graphs_with_one_notice(
    ops: Ops, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from moespan import log

    monkeypatch.setattr(log, "_said", set())
    config = ModelConfig.from_dict(geometry())
    ours = make_worker(config, ops=ops)
    theirs = make_worker(config)
    prompt = [list(range(5))]
    (found,) = run_prompts(ours, prompt, num_generated=2)
    (expected,) = run_prompts(theirs, prompt, num_generated=2)
    assert found.generated == expected.generated
    assert capsys.readouterr().err.count("decode steps are not recorded as graphs") == 1


# The kernels that a card would launch

_NOT_LAUNCHED = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "expand", "permute"),
    *("select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unsqueeze"),
    *("view", "empty", "empty_like", "empty_strided", "new_empty", "unbind", "chunk"),
}


class Launches(TorchDispatchMode):
    """Names of the kernels that a card would run: Triton kernels, one for each torch operation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        from triton.runtime.interpreter import GridExecutor

        self.names: list[str] = []
        self._in_kernel = False
        call = GridExecutor.__call__

        def note(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.names.append(executor.fn.__name__)
            self._in_kernel = True  # the interpreter copies tensors
            call(executor, *args, **kwargs)
            self._in_kernel = False

        monkeypatch.setattr(GridExecutor, "__call__", note)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name not in _NOT_LAUNCHED and not self._in_kernel:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def decode_launches(ops: Ops, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches of one MoE layer with shared experts, in a decode step over 512 cache slots."""
    config = ModelConfig.from_dict(geometry(n_routed_experts=16))
    worker = make_worker(config, ops=ops, dtype="bfloat16", enforce_eager=True)
    tables = [list(range(i * 128, (i + 1) * 128)) for i in range(num_tokens)]
    # All blocks exist. Nothing is read past the lengths.
    tables = [[block % 256 for block in table] for table in tables]
    batch = AttentionBatch.build([1] * num_tokens, [3] * num_tokens, tables, 4, CPU)
    step = Step(batch, [num_tokens], worker.model.rope(batch.positions))
    worker._dispatch.begin_step([num_tokens])
    for cache in worker.caches[1].tensors:
        cache.zero_()
    x, residual = (random(num_tokens, 32, dtype=torch.bfloat16, seed=s) for s in (0, 1))
    with Launches(monkeypatch) as launches:
        worker.model.layers[1](x, residual, worker.caches[1], step)
    return launches.names


def test_one_token_takes_13_launches_in_a_moe_layer(ops: Ops, monkeypatch: pytest.MonkeyPatch):
    assert decode_launches(ops, 1, monkeypatch) == [
        "_norm_kernel",
        "mm",
        "_rope_kernel",
        "_decode_kernel",
        "_join_kernel",
        "mm",
        "_norm_kernel",
        "_logits_kernel",
        "_choose_kernel",
        "_few_gate_up_kernel",
        "_few_down_kernel",
        "_few_gate_up_kernel",
        "_few_down_kernel",
    ]


def test_larger_batches_take_16(ops: Ops, monkeypatch: pytest.MonkeyPatch):
    names = decode_launches(ops, 8, monkeypatch)
    assert names[9:] == [
        "_order_kernel",
        "_gate_up_kernel",
        "_down_kernel",
        "_sum_kernel",
        "mm",
        "_swiglu_kernel",
        "addmm_",
    ]
    assert len(names) == 16
    assert len(decode_launches(ReferenceOps(), 8, monkeypatch)) > 5 * 16
    assert len(decode_launches(CpuOps(), 8, monkeypatch)) > 3 * 16
