"""The choice of the device."""

from __future__ import annotations

import sys

import pytest

from moespan import log
from moespan.errors import ConfigError
from moespan.machine import device
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


def test_a_device_that_is_here_and_does_not_work_is_named_before_the_host_takes_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(device, "_present", lambda: ["npu", "cpu"])
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    monkeypatch.setattr(log, "_said", set())
    assert choose_device("auto") == "cpu"
    said = capsys.readouterr().err
    assert said.startswith(
        "moespan: this machine has a device 'npu', which is not usable: torch_npu"
    )
    assert said.count("\n") == 1
