"""moespan in the stand-in, started as a user starts it; layouts are tested in `inside`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiers

ORACLE = "tests/data/oracle/tiny"
REFERENCE = ("--reference", f"{ORACLE}/ref/ref_logits.safetensors")
SMALL = {"ASCEND_SIM_HBM_GIB": "1"}


@pytest.mark.parametrize(
    ("cann", "dtype"),
    tiers.every([("9.0.0", "bfloat16"), ("9.1.0", "bfloat16"), ("9.1.0", "auto")], nth=2),
)
def test_two_npus_compute_what_the_hugging_face_model_computes(ascend_sim, cann, dtype):
    result = ascend_sim(
        *("verify", ORACLE, *REFERENCE, "--device", "npu", "-tp", "2", "--dtype", dtype),
        ASCEND_SIM_CANN=cann,
        **SMALL,
    )
    assert result.returncode == 0, result.stdout
    assert "\npassed" in result.stdout


def test_more_ranks_than_devices(ascend_sim):
    result = ascend_sim(
        "verify", ORACLE, *REFERENCE, "--device", "npu", "-tp", "2", ASCEND_SIM_DEVICES="1"
    )
    assert result.returncode == 2
    assert "local rank 1 has no device: 1 npu devices are visible" in result.stdout


# torch-npu 2.9.0 on CANN 8.5.0: its cache write knows no `cache_mode`.
OLD = {"ASCEND_SIM_CANN": "8.5.0", "ASCEND_SIM_OLD_WHEEL": "1", **SMALL}


def test_an_old_cann_is_refused_at_the_start(ascend_sim):
    result = ascend_sim("verify", ORACLE, *REFERENCE, "--device", "npu", **OLD)
    assert result.returncode == 2
    assert (
        "CANN 8.5.0 is not supported: moespan needs CANN 9.0.0 or later; install" in result.stdout
    )
    assert "MOESPAN_UNSUPPORTED_CANN=1 starts nevertheless" in result.stdout


def test_an_old_wheel_never_writes_the_cache_in_tiles(ascend_sim):
    result = ascend_sim(
        *("verify", ORACLE, *REFERENCE, "--device", "npu", "--dtype", "bfloat16"),
        MOESPAN_UNSUPPORTED_CANN="1",
        **OLD,
    )
    assert "PA_NZ" not in result.stdout and "\npassed" in result.stdout, result.stdout


def test_a_profile_of_an_npu_is_measured_and_a_plan_reads_it(ascend_sim, tmp_path: Path):
    """The way from end to end; its figures are those of this machine's processor."""
    profile, plan = tmp_path / "npu.json", tmp_path / "plan.json"
    small = ("--max-num-seqs", "2", "--max-num-batched-tokens", "16", "--max-model-len", "64")
    result = ascend_sim(
        *("calibrate", "--preset", "tiny", "--device", "npu", "--seconds", "1"),
        *(*small, "--out", str(profile)),
        **SMALL,
    )
    assert result.returncode == 0, result.stdout
    found = json.loads(profile.read_text())
    assert found["device"]["kind"] == "npu" and found["made"]["machine"] == "Ascend910B3"
    launch = {name for name, one in found["launch"].items() if one and one["from"] == "measured"}
    assert {"node_us", "eager_us", "wait_us"} <= launch
    assert found["host"]["step_us"]["from"] == "measured"
    result = ascend_sim(
        *("plan", "--preset", "tiny", "--hardware", str(profile), "--devices", "1"),
        *("--input", "16", "--output", "4", "--rate", "1", "--num-requests", "20"),
        *("--json", str(plan)),
    )
    assert result.returncode == 0, result.stdout
    assert "1 × npu, 1.0 GiB usable" in result.stdout
    assert json.loads(plan.read_text())
