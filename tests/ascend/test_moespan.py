"""moespan itself in the stand-in: how ranks start on NPUs, and what it says where they cannot."""

from __future__ import annotations

import pytest

VERIFY = ("verify", "models/quickstart", "--device", "npu", "--dtype", "float32")
REFERENCE = ("--reference", "models/quickstart/reference.safetensors")


@pytest.mark.parametrize("layout", [(), ("-tp", "2")], ids=["one_rank", "two_ranks"])
def test_all_but_the_operations_is_there(ascend_sim, layout):
    result = ascend_sim(*VERIFY, *REFERENCE, *layout, ASCEND_SIM_HBM_GIB="1")
    assert result.returncode == 1
    assert "moespan: device 'npu' is not implemented yet" in result.stdout


def test_more_ranks_than_devices(ascend_sim):
    result = ascend_sim(*VERIFY, *REFERENCE, "-tp", "2", ASCEND_SIM_DEVICES="1")
    assert result.returncode == 1
    assert "local rank 1 has no device: 1 npu devices are visible" in result.stdout
