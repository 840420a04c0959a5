"""Versions of CANN and torch_npu that work together, and the copies of their table."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from moespan.errors import ConfigError
from moespan.machine import cann
from moespan.machine.device import choose_device

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("torch_npu", "row"),
    [
        ("2.9.0.post2", "9.0.0"),
        ("2.9.0.post2+gitabc", "9.0.0"),
        ("2.9.0.post4", "9.0.0"),
        ("2.9.0.post6", "9.1.0"),
        ("2.9.0.post9", "9.1.0"),
        ("2.8.0.post5", "9.0.0"),
        ("2.10.0.post7", "9.1.0"),
        ("2.12.0", "9.1.0"),
        ("2.12.0.post3", "9.1.0"),
        ("2.9.0", None),
        ("2.8.0.post2", None),
        ("2.10.0.post2", None),
        ("2.13.0", None),
    ],
)
def test_later_posts_belong_to_the_row_of_an_earlier_one(torch_npu: str, row: str | None) -> None:
    assert cann.cann_of(torch_npu) == row


@pytest.mark.parametrize(
    ("torch_npu", "version", "supported", "listed"),
    [
        ("2.10.0.post4", "9.1.0", True, True),
        ("2.10.0.post4", "9.1.1", True, True),
        ("2.9.0.post2", "9.0.0", True, True),
        ("2.9.0.post2", "", True, True),
        ("2.9.0.post2", "9.1.0", False, False),
        ("2.13.0", "9.1.0", True, False),
        ("2.12.0", "9.3.0", True, False),
        ("2.9.0", "8.5.0", False, False),
        ("2.9.0", "", False, False),
        ("2.8.0", "8.3.RC1", False, False),
        ("2.13.0", "8.5.0", False, False),
    ],
)
def test_verdicts(torch_npu: str, version: str, supported: bool, listed: bool) -> None:
    verdict = cann.judge(torch_npu, version)
    assert (verdict.is_supported, verdict.is_listed) == (supported, listed), verdict
    assert bool(verdict.fix) == (not listed)


def test_the_recommended_versions_are_listed_and_the_least_is_the_oldest() -> None:
    assert cann.judge(cann.RECOMMENDED_TORCH_NPU, cann.RECOMMENDED_CANN).is_listed
    assert list(cann.TORCH_NPU_OF_CANN)[-1] == cann.LEAST_CANN


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Pretends that a torch_npu and a CANN are installed."""

    def install(torch_npu: str, version: str) -> None:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: torch_npu)
        (tmp_path / "version.cfg").write_text(f"toolkit_running_version=[7.7.0:{version}]\n")
        monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))

    return install


def test_an_engine_on_an_unsupported_cann_is_refused_with_the_fix(installed, monkeypatch) -> None:
    installed("2.9.0", "8.5.0")
    with pytest.raises(
        ConfigError,
        match=r"CANN 8\.5\.0 is not .* install CANN 9\.1\.0, torch 2\.10\.0 and .*_CANN=1",
    ):
        choose_device("npu")
    monkeypatch.setenv("MOESPAN_UNSUPPORTED_CANN", "1")
    cann.check_installed()


def test_a_supported_cann_is_accepted(installed) -> None:
    installed("2.10.0.post6", "9.1.0")
    cann.check_installed()


@pytest.mark.parametrize("name", ["ascend.md", "ascend.zh.md"])
def test_the_documents_repeat_the_table(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d[\d.]+)\D.* \| (\d.*) \|$", text, re.MULTILINE)
    table = {row: tuple(re.split(", |、", versions)) for row, versions in rows}
    assert table == cann.TORCH_NPU_OF_CANN
    assert f"torch-npu=={cann.RECOMMENDED_TORCH_NPU}" in text
    assert cann.TRY_ANYWAY in text
