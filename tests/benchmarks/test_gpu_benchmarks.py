"""The scripts for a GPU run from end to end where there is none, and report what they find."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")
# The scripts find each other where they lie, as when they are run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu
import tune_moe
from poison import Poisoned

from moespan import ModelConfig
from tests.ops import interpreter
from tests.support import geometry


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = replace(gpu.ELSEWHERE, check_tokens=(3,), contexts=(8,), repeats=1)
    monkeypatch.setattr(gpu, "ELSEWHERE", sizes)
    monkeypatch.setattr(gpu, "verify_oracles", lambda args: [])
    # A quarter of the preset's heads and experts, as Triton's interpreter takes seconds for each.
    monkeypatch.setattr(gpu, "preset", lambda name, overrides: geometry())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no transformers


def test_one_command_checks_and_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    small(monkeypatch)
    file = tmp_path / "new" / "gpu.json"
    gpu.main(["--device", "cpu", "--preset", "tiny", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["passed"] and len(report["operations"]) >= 20
    assert report["skipped"] == ["transformers: not installed"]
    cases = [(row["engine"], row["phase"], row["batch"], row["new"]) for row in report["rows"]]
    assert cases == [
        ("moespan", "decode", 1, 1),
        ("moespan", "decode", 3, 1),
        ("moespan", "prefill", 1, 8),
        ("with scheduler", "decode", 2, 1),
    ]
    assert all(row["reached"] > 0 and row["limit_tokens_per_s"] > 0 for row in report["rows"])
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["moespan"] * 3 + ["with"]
    assert set(lines[1:]) - set(told.err.splitlines()) == {"skipped: transformers: not installed"}


def test_a_part_that_breaks_off_fails_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    small(monkeypatch)

    def broken(*args: object) -> list[object]:
        raise ZeroDivisionError("in a kernel")

    monkeypatch.setattr(gpu, "check_operations", broken)
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--preset", "tiny"])
    told = capsys.readouterr()
    line = "FAILED operations: ZeroDivisionError: in a kernel"
    assert line in told.err.splitlines() and line in told.out.splitlines()
    assert "moespan" in told.out.splitlines()[-2], "the other parts were made"


def test_a_wrong_operation_fails_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    small(monkeypatch)
    wrong = ("mlp", torch.tensor([1.0, torch.nan]), torch.ones(2))
    monkeypatch.setattr(gpu, "operation_checks", lambda *args: [wrong])
    monkeypatch.setattr(gpu, "product_checks", lambda *args: [])
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--preset", "tiny"])
    assert "FAILED operation=mlp" in capsys.readouterr().out


def test_products_of_8_bit_floats_are_checked_like_those_of_other_weights(
    monkeypatch: pytest.MonkeyPatch,
):
    from moespan.ops.cuda.ops import CudaOps

    interpreter.fix_floats(monkeypatch)
    sizes = replace(gpu.ELSEWHERE, check_tokens=(6,), check_blocks=2)
    config, cpu = ModelConfig.from_dict(geometry()), torch.device("cpu")
    with torch.inference_mode():
        rows = gpu.check_operations(CudaOps(), config, [torch.bfloat16], ["fp8"], sizes, cpu)
    checked = [row for row in rows if row.get("quantization") == "fp8"]
    assert len(checked) == 6
    assert all(row["passed"] for row in rows)


def test_what_is_handed_out_unset_is_poisoned():
    with Poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2).new_empty(2).isnan().all()
        assert torch.empty_like(torch.zeros(2, dtype=torch.int8)).tolist() == [127, 127]
        assert torch.zeros(2).tolist() == [0, 0]


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_tiles_are_found_for_every_kernel(quantization: str | None):
    config = ModelConfig.from_dict(geometry())
    found = tune_moe.tune(config, torch.float32, quantization, torch.device("cpu"), quick=True)
    assert {key.split()[2] for key in found} == {quantization or "float32"}
    kernels = {key.split()[0] for key in found}
    assert kernels == {"few_gate_up", "few_down", "gate_up", "down"}
    for table in found.values():
        assert table[-1]["rows"] == tune_moe.MOST_ROWS and table[0]["BLOCK_N"] >= 4
