"""The quickstart model does what it was trained for, and the engine computes it right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from moespan import LLM, SamplingParams
from moespan.measure.verify import Reference, verify
from tests.quickstart.files import MODEL, tasks

GREEDY = SamplingParams(temperature=0, max_tokens=100)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(MODEL), device="cpu", max_model_len=256) as llm:
        yield llm


@pytest.mark.parametrize("form", ["plain", "chat"])
@pytest.mark.parametrize(("task", "num_items"), [("sum", 60), ("sort", 60), ("story", 20)])
def test_held_out_items_are_answered_exactly(llm: LLM, task: str, num_items: int, form: str):
    prompts = [prompt for prompt, _ in tasks.heldout(task, num_items)]
    if form == "plain":
        outputs = llm.generate(prompts, GREEDY)
    else:
        outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], GREEDY)
    right = [
        output.outputs[0].finish_reason == "stop"
        and tasks.is_correct(task, prompt, output.outputs[0].text)
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    assert sum(right) >= 0.95 * num_items


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization": "int8"},
        {"quantization": "w8a8"},
        {"quantization": "fp8"},
        {"quantization": "int4"},
        {"kv_cache_dtype": "int8"},
        {"quantization": "w8a8", "kv_cache_dtype": "int8"},
    ],
    ids=str,
)
def test_8_and_4_bits_answer_held_out_items_nearly_as_well(settings: dict[str, Any]):
    with LLM(str(MODEL), device="cpu", max_model_len=256, **settings) as llm:
        for task in ("sum", "sort"):
            prompts = [prompt for prompt, _ in tasks.heldout(task, 60)]
            outputs = llm.generate(prompts, GREEDY)
            right = [
                tasks.is_correct(task, prompt, output.outputs[0].text)
                for prompt, output in zip(prompts, outputs, strict=True)
            ]
            assert sum(right) >= 0.9 * 60


def test_float32_logits_are_those_of_the_network_that_was_trained():
    with LLM(str(MODEL), device="cpu", dtype="float32", max_model_len=256) as llm:
        report = verify(llm, Reference(MODEL / "reference.safetensors"))
    assert report.failures == []
    assert len(report.prompts) == 5
