"""moespan in the stand-in, started as a user starts it; layouts are tested in `inside`."""

from __future__ import annotations

ORACLE = "tests/data/oracle/tiny"
REFERENCE = ("--reference", f"{ORACLE}/ref/ref_logits.safetensors")
SMALL = {"ASCEND_SIM_HBM_GIB": "1"}


def test_two_npus_compute_what_the_hugging_face_model_computes(ascend_sim):
    result = ascend_sim("verify", ORACLE, *REFERENCE, "--device", "npu", "-tp", "2", **SMALL)
    assert result.returncode == 0, result.stdout
    assert "\npassed" in result.stdout


def test_more_ranks_than_devices(ascend_sim):
    result = ascend_sim(
        "verify", ORACLE, *REFERENCE, "--device", "npu", "-tp", "2", ASCEND_SIM_DEVICES="1"
    )
    assert result.returncode == 1
    assert "local rank 1 has no device: 1 npu devices are visible" in result.stdout
