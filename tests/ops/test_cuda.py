"""CUDA operations compute what the reference computes; here on the CPU, in Triton's interpreter."""

from __future__ import annotations

import pytest

from moespan.ops import Ops
from tests.ops import interpreter
from tests.ops.contract import OpsContract

pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")


@pytest.fixture(autouse=True)
def mended(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter.mend(monkeypatch)


class TestCudaOps(OpsContract):
    @pytest.fixture
    def ops(self) -> Ops:
        from moespan.ops.cuda import CudaOps

        return CudaOps()
