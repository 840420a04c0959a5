"""The counted memory of a step is that of the real step, tensor by tensor."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from torch.utils._python_dispatch import _disable_current_modes

from moespan.checkpoint.placement import place
from moespan.checkpoint.presets import preset
from moespan.config import EngineConfig, Layout, ModelConfig
from moespan.ops import ops_for
from moespan.planner.activations import Step, activations
from moespan.planner.temporaries import operations_of
from tests.ops import interpreter
from tests.planner import live_tensors
from tests.planner.live_tensors import run_step

MODEL = ModelConfig.from_dict(
    preset(
        "16b",
        {
            "num_hidden_layers": 2,
            "vocab_size": 1024,
            "n_routed_experts": 16,
            "hidden_size": 256,
            "intermediate_size": 704,
            "moe_intermediate_size": 176,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        },
    )
)
NATIVE = type(ops_for("cpu")).__name__ == "NativeCpuOps"
TOP_P = {"temperature": 1.0, "top_p": 0.9}


def counted_and_real(
    layout: Layout, rank: int = 0, sampling: str = "greedy", **options: Any
) -> tuple[float, float]:
    """Most bytes of tensors in a step."""
    settings = {"dtype": "bfloat16", "max_num_batched_tokens": 256, "max_num_seqs": 4, **options}
    config = EngineConfig("", layout, max_model_len=64, load_format="dummy", **settings)
    parameters = place(MODEL, layout, rank, quantization=config.quantization).parameters
    counted = activations(config, MODEL, rank, parameters, Step(sampling=sampling))
    real, scratch = run_step(config, MODEL, rank, TOP_P if sampling == "truncated" else {})
    if config.dtype == "bfloat16":
        # Reserved for all pairs of tokens and experts; the kernels write less of it.
        assert 0.2 * scratch < counted.scratch_bytes <= scratch
    return counted.peak_bytes, real


@pytest.mark.skipif(not NATIVE, reason="no compiler for the kernels")
@pytest.mark.parametrize(
    ("layout", "rank", "options"),
    [
        (Layout(), 0, {}),
        (Layout(), 0, {"quantization": "int8", "kv_cache_dtype": "int8"}),
        (Layout(tp=2), 1, {}),
        (Layout(tp=2), 0, {"max_num_seqs": 192}),
        (Layout(tp=2, ep=2), 0, {}),
        (Layout(pp=2), 0, {}),
        (Layout(pp=2), 1, {}),
        (Layout(sp=2), 0, {}),
        (Layout(sp=2, ep=2), 1, {}),
        (Layout(dp=2, ep=2), 0, {"moe_dispatch": "all_gather"}),
        (Layout(tp=2, sp=2, ep=4), 1, {}),
    ],
)
def test_a_counted_step_is_the_real_one_on_every_rank(
    layout: Layout, rank: int, options: dict[str, Any]
) -> None:
    counted, real = counted_and_real(layout, rank, **options)
    assert counted == pytest.approx(real, rel=0.005)


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}])
def test_a_counted_step_in_plain_torch_is_the_real_one(options: dict[str, Any]) -> None:
    counted, real = counted_and_real(Layout(), dtype="float32", **options)
    assert counted == pytest.approx(real, rel=0.02)


@pytest.mark.skipif(not NATIVE, reason="no compiler for the kernels")
def test_sampling_counts_where_it_takes_most() -> None:
    counted, real = counted_and_real(Layout(), sampling="truncated", max_num_seqs=192)
    # A running sum copies its input inside torch, which a recording of tensors does not see.
    assert real <= counted < 1.25 * real


def test_a_step_of_other_devices_can_be_counted_without_torch() -> None:
    code = """
import sys
from moespan.config import EngineConfig, Layout, ModelConfig
from moespan.checkpoint.presets import preset
from moespan.planner.memory import memory_of_all
model = ModelConfig.from_dict(preset("16b", {}))
for device in ("cuda", "npu", "cpu"):
    for dispatch in ("auto", "all_gather", "all_to_all"):
        layout = Layout(tp=2, ep=8, dp=4)
        config = EngineConfig("", layout, device=device, moe_dispatch=dispatch)
        (one,) = memory_of_all(config, model)
        assert one.one.num_ranks == 8
        assert 50e6 < one.activations.total_bytes < 2e9, one.activations
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_implementation_has_a_count() -> None:
    for device in ("cpu", "cuda", "npu"):
        for dtype in ("bfloat16", "float32"):
            config = EngineConfig("", device=device, dtype=dtype)
            assert operations_of(config, 128).rotary_bytes > 0


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_a_counted_step_of_a_gpu_is_the_one_in_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.runtime.interpreter import GridExecutor

    from moespan.ops.cuda.ops import CudaOps

    interpreter.fix_floats(monkeypatch)
    launch = GridExecutor.__call__

    def unrecorded(self: Any, *args: Any, **kwargs: Any) -> None:
        """A launch, without the tensors by which the interpreter computes."""
        with _disable_current_modes():
            launch(self, *args, **kwargs)
        del args, kwargs
        gc.collect()  # the interpreter's circles hold the arguments

    gc.freeze()  # only what is new is searched
    monkeypatch.setattr(GridExecutor, "__call__", unrecorded)
    monkeypatch.setattr(live_tensors, "ops_for", lambda device, config: CudaOps())
    small = {"hidden_size": 64, "intermediate_size": 176, "moe_intermediate_size": 44}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 256}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    model = ModelConfig.from_dict(preset("16b", {**small, **heads, **experts}))
    limits: dict[str, Any] = {"max_num_batched_tokens": 48, "max_num_seqs": 2}
    layout = Layout(dp=2, ep=2)
    on_host = EngineConfig("", layout, max_model_len=64, moe_dispatch="all_gather", **limits)
    parameters = place(model, layout, 0).parameters
    greedy = Step(sampling="greedy")
    counted = activations(replace(on_host, device="cuda"), model, 0, parameters, greedy)
    try:
        real, _ = live_tensors.run_step(on_host, model, 0, {})
    finally:
        gc.unfreeze()
    assert counted.peak_bytes == pytest.approx(real, rel=0.01)
