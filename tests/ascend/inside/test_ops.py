"""NPU operations compute what the reference computes."""

from __future__ import annotations

import pytest
import torch

from moespan.ops import Ops, ops_for
from tests.ops.contract import OpsContract


class TestNpuOps(OpsContract):
    device = torch.device("npu", 0)
    block_size = 16

    @pytest.fixture
    def ops(self) -> Ops:
        return ops_for("npu")
