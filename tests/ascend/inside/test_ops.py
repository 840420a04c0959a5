"""NPU operations compute what the reference computes."""

from __future__ import annotations

import pytest
import torch

from moespan.errors import ConfigError
from moespan.ops import Ops, ops_for
from moespan.ops.npu import NpuOps
from tests.ops.contract import OpsContract


class TestNpuOps(OpsContract):
    device = torch.device("npu", 0)
    block_size = 16

    @pytest.fixture
    def ops(self) -> Ops:
        return ops_for("npu")


class TestNpuOpsOfA310P(TestNpuOps):
    """The operators that it goes without, on a device that has them."""

    @pytest.fixture
    def ops(self) -> Ops:
        return NpuOps("Ascend310P3")

    @pytest.fixture(autouse=True)
    def no_bfloat16(self, request: pytest.FixtureRequest) -> None:
        if getattr(request.node, "callspec", None) and torch.bfloat16 in (
            request.node.callspec.params.values()
        ):
            pytest.skip("has no bfloat16")

    def test_bfloat16_is_refused_by_name(self, ops: Ops):
        with pytest.raises(ConfigError, match="Ascend310P3 has no bfloat16; use --dtype float16"):
            ops.prepare("norm", torch.ones(2, dtype=torch.bfloat16))
