"""CPU operations compute what the reference computes."""

from __future__ import annotations

import pytest
import torch

from moespan.config import EngineConfig
from moespan.ops import CpuOps, Ops, ops_for
from tests.ops.contract import OpsContract, QuantizedContract


class TestPlainCpuOps(OpsContract, QuantizedContract):
    @pytest.fixture
    def ops(self) -> Ops:
        return CpuOps()


class TestCpuOps(OpsContract, QuantizedContract):
    """The operations of `ops_for` for the dtype of the test: the kernels for bfloat16."""

    @pytest.fixture
    def ops(self, request: pytest.FixtureRequest) -> Ops:
        dtype = request.node.callspec.params.get("dtype", torch.bfloat16)
        return ops_for("cpu", EngineConfig("unused", dtype=str(dtype).removeprefix("torch.")))
