"""`verify` passes the right model within the tolerance of its dtype, and fails all others."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from moespan import LLM
from moespan.config import Layout, ModelConfig
from moespan.errors import ConfigError, RequestError
from moespan.measure.verify import (
    PromptReport,
    Reference,
    Rounding,
    Tolerance,
    VerifyReport,
    tolerance,
    verify,
    write_reference,
)
from tests.support import DATA, ORACLES, QUICKSTART, altered_checkpoint, geometry, write_config

EXACT = Tolerance(relative=2e-4, kl=None, top1=None, greedy=True)


def reference_path(name: str) -> Path:
    return DATA / "oracle" / name / "ref" / "ref_logits.safetensors"


def model(folder: Path, dtype: str = "float32", **settings: Any) -> LLM:
    return LLM(str(folder), device="cpu", dtype=dtype, max_num_batched_tokens=256, **settings)


def altered_reference(target: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Reference:
    """The reference of the oracle `tiny`, changed."""
    tensors = load_file(reference_path("tiny"))
    change(tensors)
    save_file(tensors, target / "changed.safetensors")
    return Reference(target / "changed.safetensors")


@pytest.fixture(scope="module")
def tiny() -> Iterator[LLM]:
    with model(DATA / "oracle" / "tiny") as llm:
        yield llm


# References that pass


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_oracles_pass_in_every_dtype(name: str, dtype: str):
    with model(DATA / "oracle" / name, dtype) as llm:
        report = verify(llm, Reference(reference_path(name)))
    assert report.failures == []
    assert report.dtype == dtype
    assert report.layout == Layout()
    assert report.top1 >= 0.95
    if dtype == "float32":
        assert report.max_relative_diff < 1e-5
        assert report.mean_kl < 1e-9
        for prompt in report.prompts:
            assert prompt.greedy_equal
            assert prompt.first_divergence is None


def test_the_quickstart_model_passes_its_own_reference():
    with model(QUICKSTART) as llm:
        assert verify(llm, Reference(QUICKSTART / "reference.safetensors")).failures == []


def test_prompts_are_reported_by_their_names_in_their_order(tmp_path: Path, tiny: LLM):
    def rename(tensors: dict[str, np.ndarray]) -> None:
        for key in [key for key in tensors if key.startswith("p1.")]:
            tensors[key.replace("p1.", "p12.")] = tensors.pop(key)

    report = verify(tiny, altered_reference(tmp_path, rename))
    assert [prompt.name for prompt in report.prompts] == ["p0", "p2", "p3", "p4", "p12"]
    assert [prompt.num_tokens for prompt in report.prompts] == [1, 32, 100, 181, 7]
    assert report.failures == []


def test_without_a_greedy_continuation_the_logits_alone_decide(tmp_path: Path, tiny: LLM):
    def drop(tensors: dict[str, np.ndarray]) -> None:
        for key in [key for key in tensors if key.endswith(".greedy")]:
            del tensors[key]

    report = verify(tiny, altered_reference(tmp_path, drop))
    assert report.failures == []
    assert {prompt.greedy_equal for prompt in report.prompts} == {None}


def test_a_reference_that_is_written_is_the_one_that_passes(tmp_path: Path, tiny: LLM):
    path = tmp_path / "made.safetensors"
    prompts = [[5], [3, 1, 4, 1, 5], [9] * 40]
    write_reference(tiny, path, prompts, num_greedy_tokens=6)
    reference = Reference(path)
    assert reference.prompts == ["p0", "p1", "p2"]
    assert [reference.ids(name) for name in reference.prompts] == prompts
    assert reference.logits("p2").shape == (40, 512)
    assert [len(reference.greedy(name) or []) for name in reference.prompts] == [6] * 3
    report = verify(tiny, reference)
    assert report.failures == []
    assert report.max_abs_diff < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization": "int8"},
        {"quantization": "w8a8"},
        {"quantization": "fp8"},
        {"kv_cache_dtype": "int8"},
        {"quantization": "w8a8", "kv_cache_dtype": "int8"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_8_bits_stay_within_their_tolerance_of_the_model_of_floats(
    settings: dict[str, str], dtype: str
):
    with model(DATA / "oracle" / "tiny_gqa", dtype, **settings) as llm:
        report = verify(llm, Reference(reference_path("tiny_gqa")))
    assert report.failures == []
    # Floats with three bits after the first are four times as coarse as integers of a row.
    assert report.top1 >= (0.8 if report.quantization == "fp8" else 0.9)
    # The 8 bits are in use: in float32 no other rounding makes so large a difference.
    assert dtype == "bfloat16" or report.max_relative_diff > 1e-3
    assert report.quantization == settings.get("quantization")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_4_bits_stay_within_their_tolerance_of_the_model_of_floats(dtype: str):
    with model(DATA / "oracle" / "tiny_gqa", dtype, quantization="int4") as llm:
        report = verify(llm, Reference(reference_path("tiny_gqa")))
    assert report.failures == []
    assert report.top1 >= 0.7
    assert report.max_relative_diff > 1e-2


def test_a_reference_of_integers_is_held_to_the_contract_of_the_dtype(tmp_path: Path):
    path = tmp_path / "made.safetensors"
    with model(DATA / "oracle" / "tiny", quantization="int8") as llm:
        write_reference(llm, path, [[5], [3, 1, 4, 1, 5]], num_greedy_tokens=6)
        report = verify(llm, Reference(path))
    assert report.tolerance == EXACT
    assert report.failures == []


# References that fail


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.2.mlp.shared_experts.up_proj.weight",
    ],
)
def test_another_weight_fails(tmp_path: Path, name: str, dtype: str):
    folder = altered_checkpoint(
        DATA / "oracle" / "tiny", tmp_path / "changed", name, lambda weight: weight.neg_()
    )
    with model(folder, dtype) as llm:
        report = verify(llm, Reference(reference_path("tiny")))
    assert any("max |Δ|" in failure or "mean KL" in failure for failure in report.failures)
    assert report.to_dict()["passed"] is False


def test_a_small_change_of_one_weight_fails_in_float32(tmp_path: Path):
    def nudge(weight: torch.Tensor) -> None:
        weight[3] *= 1.05

    name = "model.layers.0.mlp.down_proj.weight"
    folder = altered_checkpoint(DATA / "oracle" / "tiny", tmp_path / "changed", name, nudge)
    with model(folder) as llm:
        failures = verify(llm, Reference(reference_path("tiny"))).failures
    assert "of the largest logit, over 2e-04" in failures[0]


def test_another_greedy_token_fails_and_is_named(tmp_path: Path, tiny: LLM):
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["p2.greedy"][5] += 1

    report = verify(tiny, altered_reference(tmp_path, change))
    assert report.failures == ["p2: greedy token 5 differs"]
    assert [prompt.first_greedy_divergence for prompt in report.prompts] == [
        None, None, 5, None, None,
    ]  # fmt: skip


def test_a_nan_of_the_model_fails_and_names_the_prompt(tmp_path: Path):
    def spoil(weight: torch.Tensor) -> None:
        weight[0, 0] = torch.nan

    name = "model.layers.2.self_attn.o_proj.weight"
    folder = altered_checkpoint(DATA / "oracle" / "tiny", tmp_path / "changed", name, spoil)
    with (
        model(folder) as llm,
        pytest.raises(RequestError, match=r"^p\d: the logits at position \d+ are not finite"),
    ):
        verify(llm, Reference(reference_path("tiny")))


@pytest.mark.parametrize("name", ["p0", "p2", "p4"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_of_the_reference_fails_wherever_it_is(
    tmp_path: Path, tiny: LLM, name: str, value: float
):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{name}.logits"][0, 3] = value

    report = verify(tiny, altered_reference(tmp_path, spoil))
    assert "max |Δ| is" in report.failures[0]
    # The printed report is JSON, which has no NaN.
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["max_abs_diff"] is None
    assert plain["passed"] is False


def test_the_reference_of_another_model_is_refused_by_its_shape(tmp_path: Path):
    folder = write_config(tmp_path / "small", vocab_size=600)
    with (
        model(folder, load_format="dummy") as llm,
        pytest.raises(
            ConfigError, match=r"p\d\.logits has shape \[\d+, 512\].*use a reference of this model"
        ),
    ):
        verify(llm, Reference(reference_path("tiny")))


def test_a_reference_whose_prompt_does_not_fit_names_it(tmp_path: Path):
    folder = write_config(tmp_path / "small")
    with (
        model(folder, load_format="dummy") as llm,
        pytest.raises(RequestError, match=r"^p\d: prompt_token_ids: token id \d+ is not within"),
    ):
        verify(llm, Reference(reference_path("tiny")))


def test_the_reference_of_another_model_of_the_same_shape_fails(tiny: LLM):
    report = verify(tiny, Reference(reference_path("sixteen")))
    assert len(report.failures) > 1


# Malformed references


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, r"has no prompt p0\.ids; write one with --write-reference"),
        ({"x.ids": [1]}, r"has no prompt p0\.ids"),
        ({"p0.ids": [1]}, r"has no p0\.logits"),
        ({"p0.ids": [1.0], "p0.logits": [[1.0]]}, r"p0\.ids is F64 of shape \[1\]; it must"),
        ({"p0.ids": [[1]], "p0.logits": [[1.0]]}, r"p0\.ids is I64 of shape \[1, 1\]; it must"),
        ({"p0.ids": [1], "p0.logits": [1.0]}, r"p0\.logits is F64 of shape \[1\]; it must"),
        ({"p0.ids": [1], "p0.logits": [[1]]}, r"p0\.logits is I64 of shape \[1, 1\]; it must"),
    ],
)
def test_a_malformed_reference_is_refused(tmp_path: Path, tensors: dict[str, Any], says: str):
    path = tmp_path / "reference.safetensors"
    save_file({key: np.array(value) for key, value in tensors.items()}, path)
    with pytest.raises(ConfigError, match=says):
        Reference(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path):
    whole = reference_path("tiny").read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[: len(whole) // 2])
    for path in (cut, tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            Reference(path)


# Tolerance and report


@pytest.mark.parametrize(("dtype", "u"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
@pytest.mark.parametrize("logit_std", [0.5, 3.0])
def test_the_tolerance_of_sixteen_bits_follows_its_formula(dtype: str, u: float, logit_std: float):
    config = ModelConfig.from_dict(geometry(num_hidden_layers=5, num_experts_per_tok=3))
    sigma = u * math.sqrt(8 * 5 / 3)  # 8 roundings in each of 5 layers
    variance = sigma**2 + 2 * 4 * u / 3**2  # 4 MoE layers, 3 experts for a token
    found = tolerance(dtype, config, logit_std)
    assert found.relative == pytest.approx(6 * sigma + 1 / 3)
    assert found.kl == pytest.approx(logit_std**2 * variance / 2)
    assert found.top1 == pytest.approx(1 - 2 * math.sqrt(variance))
    assert not found.greedy


def test_a_dense_model_has_no_experts_that_swap():
    config = ModelConfig.from_dict(geometry(n_routed_experts=None))
    sigma = 2.0**-8 * math.sqrt(8)
    found = tolerance("bfloat16", config, 1.0)
    assert found.relative == pytest.approx(6 * sigma)
    assert found.kl == pytest.approx(sigma**2 / 2)


def test_the_tolerance_of_float32_is_a_contract():
    assert tolerance("float32", ModelConfig.from_dict(geometry()), 1.0) == EXACT


@pytest.mark.parametrize(
    ("kind", "error"),
    # Steps of 4/127 deviations; 2⁻⁴ of an element, in either direction.
    [("int8", 4 / 127 / math.sqrt(12)), ("float8_e4m3fn", 2**-4 / math.sqrt(3))],
)
def test_each_kind_of_8_bit_tensor_widens_the_tolerance(kind: str, error: float):
    config = ModelConfig.from_dict(geometry())
    limits = [
        tolerance("float32", config, 1.0, Rounding(*kinds))
        for kinds in ((), (kind,), (kind, kind), (kind, kind, "int8"))
    ]
    assert [limit.greedy for limit in limits] == [True, False, False, False]
    assert limits[0].relative < limits[1].relative < limits[2].relative < limits[3].relative
    # In four products of each of three layers.
    assert limits[1].relative == pytest.approx(6 * error * math.sqrt(4 * 3) + 1 / 2)


PROMPT = PromptReport(
    name="p0",
    num_tokens=10,
    max_abs_diff=0.001,
    max_abs_logit=10.0,
    mean_kl=0.01,
    max_kl=0.1,
    top1=0.9,
    first_divergence=None,
    greedy_equal=True,
    first_greedy_divergence=None,
)


def report_of(*prompts: PromptReport, limit: Tolerance = EXACT) -> VerifyReport:
    return VerifyReport("float32", None, "float32", Layout(), limit, list(prompts))


def test_a_report_counts_every_position_the_same():
    report = report_of(PROMPT, replace(PROMPT, num_tokens=30, mean_kl=0.05, top1=0.5))
    assert report.mean_kl == pytest.approx(0.04)
    assert report.top1 == pytest.approx(0.6)
    assert report.failures == []


def test_a_report_measures_by_the_largest_logit_of_all():
    report = report_of(PROMPT, replace(PROMPT, max_abs_diff=0.0025, max_abs_logit=5.0))
    assert report.max_relative_diff == pytest.approx(2.5e-4)
    assert report.failures == ["max |Δ| is 2.50e-04 of the largest logit, over 2e-04"]
    assert report_of(replace(PROMPT, max_abs_diff=0.0, max_abs_logit=0.0)).failures == []


def test_every_broken_rule_is_named():
    limit = Tolerance(relative=1e-5, kl=1e-3, top1=0.95, greedy=False)
    assert report_of(replace(PROMPT, greedy_equal=False), limit=limit).failures == [
        "max |Δ| is 1.00e-04 of the largest logit, over 1e-05",
        "mean KL is 1.00e-02 nats, over 1e-03",
        "top-1 agreement is 90.00%, under 95%",
    ]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_nan_of_one_prompt_is_not_lost_among_the_others(at: int):
    prompts = [PROMPT] * 3
    prompts[at] = replace(PROMPT, max_abs_diff=math.nan, mean_kl=math.nan)
    report = report_of(*prompts)
    assert math.isnan(report.max_relative_diff)
    assert math.isnan(report.mean_kl)
    assert report.failures == ["max |Δ| is nan of the largest logit, over 2e-04"]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_reference_that_is_no_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], object]
):
    make(tmp_path / "reference")
    with pytest.raises(ConfigError, match=r"cannot be read: it is .*not a regular file"):
        Reference(tmp_path / "reference")


def test_names_that_only_look_like_prompts_are_passed_over(tmp_path: Path):
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["p².ids"] = tensors[f"p{'9' * 5000}.ids"] = tensors["p0.ids"]

    reference = altered_reference(tmp_path, add)
    assert reference.prompts == Reference(reference_path("tiny")).prompts
