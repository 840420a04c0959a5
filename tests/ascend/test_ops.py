"""NPU operations compute what the reference computes. Needs the stand-in for CANN, or an NPU:
`bash tools/ascend_sim/run.sh --python -m pytest tests/ascend`."""

from __future__ import annotations

import pytest
import torch

from moespan.ops import Ops, ops_for
from tests.ops.contract import OpsContract

pytest.importorskip("torch_npu", reason="torch_npu is not here: see this module's first line")


class TestNpuOps(OpsContract):
    device = torch.device("npu", 0)
    block_size = 16

    @pytest.fixture
    def ops(self) -> Ops:
        return ops_for("npu")
