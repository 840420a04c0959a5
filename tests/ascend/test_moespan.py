"""moespan itself in the stand-in: the engine on pretend NPUs computes what the reference says."""

from __future__ import annotations

import pytest

ORACLE = "tests/data/oracle/sixteen"
REFERENCE = ("--reference", f"{ORACLE}/ref/ref_logits.safetensors")
SMALL = {"ASCEND_SIM_HBM_GIB": "1"}
EIGHT_RANKS = ["tp=8,ep=8", "tp=4,pp=2,ep=4", "tp=2,sp=4,ep=8"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_npu_computes_what_the_hugging_face_model_computes(ascend_sim, dtype):
    result = ascend_sim("verify", ORACLE, *REFERENCE, "--device", "npu", "--dtype", dtype, **SMALL)
    assert result.returncode == 0, result.stdout
    assert "\npassed" in result.stdout


@pytest.mark.parametrize(
    ("dtype", "mode", "layouts"),
    [
        ("float32", "graphs", EIGHT_RANKS),
        ("float32", "eager", ["tp=2,dp=2,ep=4", "pp=4"]),
        ("bfloat16", "graphs", ["tp=2,dp=2,ep=4", "tp=2,pp=2,ep=2"]),
    ],
    ids=["8_float32_graphs", "4_float32_eager", "4_bfloat16_graphs"],
)
def test_layouts_over_hccl_compute_what_the_hugging_face_model_computes(
    ascend_sim, dtype, mode, layouts
):
    script = "tests/ascend/inside/layouts.py"
    arguments = [script, ORACLE, REFERENCE[1], dtype, mode, *layouts]
    result = ascend_sim("--python", *arguments, timeout=540, **SMALL)
    assert result.returncode == 0, result.stdout
    runs = [
        line for line in result.stdout.splitlines() if line.startswith(("tp=", "ep=", "sp=", "pp="))
    ]
    assert len(runs) >= len(layouts)
    assert all(run.endswith("passed") for run in runs), result.stdout


def test_more_ranks_than_devices(ascend_sim):
    result = ascend_sim(
        "verify", ORACLE, *REFERENCE, "--device", "npu", "-tp", "2", ASCEND_SIM_DEVICES="1"
    )
    assert result.returncode == 1
    assert "local rank 1 has no device: 1 npu devices are visible" in result.stdout
