"""CPU operations compute what the reference computes."""

from __future__ import annotations

import pytest
import torch

from moespan.ops import CpuOps, Ops, ops_for
from tests.ops.contract import OpsContract


class TestPlainCpuOps(OpsContract):
    @pytest.fixture
    def ops(self) -> Ops:
        return CpuOps()


class TestCpuOps(OpsContract):
    """What `ops_for` gives for the dtype of the test: the kernels, for bfloat16."""

    @pytest.fixture
    def ops(self, request: pytest.FixtureRequest) -> Ops:
        return ops_for("cpu", request.node.callspec.params.get("dtype", torch.bfloat16))
