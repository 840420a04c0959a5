"""The choice of the device."""

from __future__ import annotations

import sys

import pytest

from moespan.errors import ConfigError
from moespan.machine.device import choose_device


def test_torch_npu_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    with pytest.raises(ConfigError, match=r"torch_npu does not load .* source set_env\.sh"):
        choose_device("npu")
    assert choose_device("cpu") == "cpu"


def test_torch_npu_is_there_without_cann(monkeypatch, tmp_path):
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open it')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"\(libhccl\.so: cannot open it\)"):
        choose_device("npu")
