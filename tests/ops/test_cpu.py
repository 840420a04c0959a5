"""CPU operations compute what the reference computes."""

from __future__ import annotations

import pytest

from moespan.ops import CpuOps, Ops
from tests.ops.contract import OpsContract


class TestCpuOps(OpsContract):
    @pytest.fixture
    def ops(self) -> Ops:
        return CpuOps()
