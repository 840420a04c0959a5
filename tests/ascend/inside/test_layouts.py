"""The engine on several simulated NPUs computes what the Hugging Face model computes, with every
layout, dispatch and option."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from moespan import LLM
from moespan.config import Layout
from moespan.measure.verify import Reference, verify
from tests import tiers
from tests.ascend.inside.ranks import run_program
from tests.support import DATA

MODEL = DATA / "oracle" / "sixteen"
# Prompts of the reference, and the number of generated tokens.
PROMPTS, NUM_GREEDY = ("p1", "p2"), 4


@dataclass(frozen=True)
class Case:
    """One engine.

    Attributes:
        dispatches: dispatches to test, one after another.
        uses: collectives that the engine must use.
    """

    layout: Layout
    dtype: str = "float32"
    dispatches: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    uses: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [str(self.layout), self.dtype, *self.dispatches]
        return " ".join(parts + [f"{name}={value}" for name, value in self.settings.items()])


EAGER = {"enforce_eager": True}
INT8 = {"quantization": "int8"}
W8A8 = {"quantization": "w8a8", "kv_cache_dtype": "int8"}
FUSED: dict[str, Any] = {"dispatches": ("fused",), "uses": ("dispatch", "combine")}
OPTIONS: dict[str, Any] = {
    "npu_maskless_decode": True,
    "npu_overlap_shared": True,
    "npu_scatter_prefill": 3,
    "npu_update_first": True,
}
HIERARCHICAL: dict[str, Any] = {"moe_dispatch": "fused", "npu_hierarchical_dispatch": True}
CASES = {
    1: [
        *(Case(Layout(), dtype) for dtype in ("float32", "bfloat16", "float16")),
        Case(Layout(), "float16", settings=INT8),
    ],
    4: [
        Case(Layout(tp=2, dp=2, ep=4), settings=EAGER),
        Case(Layout(pp=4), settings=EAGER),
        Case(Layout(tp=2, pp=2, ep=2), "bfloat16"),
        Case(Layout(tp=2, dp=2, ep=4), "bfloat16", ("all_gather", "fused"), {}, ("dispatch",)),
        Case(Layout(tp=2, sp=2, ep=4), "bfloat16", **FUSED, settings=EAGER),
        Case(Layout(tp=4), "bfloat16", settings={"npu_fused_all_reduce": 3}),
        Case(Layout(tp=4, ep=2), "float16", settings={"npu_weight_format": "nz"}),
        Case(Layout(tp=4, ep=4), settings={"npu_overlap_shared": True}),
        Case(Layout(tp=2, dp=2, ep=4), "bfloat16", settings=OPTIONS),
        Case(Layout(tp=4), settings=INT8),
        Case(Layout(tp=4, ep=4), "bfloat16", settings=W8A8),
        Case(Layout(dp=4, ep=4), "float16", ("all_to_all", "fused"), W8A8, ("dispatch",)),
    ],
    8: tiers.every(
        [
            Case(Layout(tp=8, ep=8)),
            Case(Layout(tp=8)),
            Case(Layout(tp=2, sp=4, ep=8)),
            Case(Layout(tp=4, pp=2, ep=4)),
        ],
        nth=2,
    ),
    16: [
        Case(Layout(tp=2, dp=8, ep=16), "bfloat16", **FUSED),
        Case(Layout(tp=2, dp=8, ep=16), "bfloat16", **FUSED, settings=HIERARCHICAL),
    ],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some prompts of the reference, with short continuations, because ranks share few cores."""
    tensors = load_file(MODEL / "ref" / "ref_logits.safetensors")
    kept = {name: x for name, x in tensors.items() if name.split(".")[0] in PROMPTS}
    short = {n: x[:NUM_GREEDY] if n.endswith("greedy") else x for n, x in kept.items()}
    path = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    save_file(short, path)
    return path


def failures(cases: list[Case], path: Path) -> list[str]:
    """The failures of each case, and rank 0's calls of each collective."""
    first = cases[0].layout
    names = ("tensor", "expert", "pipeline", "sequence", "data")
    sizes: dict[str, Any] = {
        f"{name}_parallel_size": size
        for name, size in zip(names, first.sizes.values(), strict=True)
    }
    settings: dict[str, Any] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "num_blocks": 64,
        "bind": "off",
    }
    wrong = []
    with LLM(str(MODEL), **sizes, device="npu", dtype="float32", **settings) as llm:
        start = llm.config
        for case in cases:
            for dispatch in case.dispatches or case.layout.dispatches:
                changes = {"moe_dispatch": "auto", "dtype": case.dtype, **case.settings}
                llm.config = replace(start, **changes)
                llm.relayout(case.layout, dispatch)
                report = verify(llm, Reference(path))
                said = list(report.failures)
                traffic = llm.traffic()
                used = {row[1] for rows in traffic for row in rows}
                said += [
                    f"no {one}" for one in case.uses if dispatch == "fused" and one not in used
                ]
                graphs = llm._client._engine._worker.graphs  # type: ignore[attr-defined]
                if graphs is not None and not graphs.num_recorded and dispatch != "all_to_all":
                    said.append("no graph was recorded")
                wrong += [f"{case} {dispatch}: {one}" for one in said]
    return wrong


# Layouts of 8 ranks run on the oldest release that is supported, the others on the recommended one.
@pytest.mark.parametrize(
    ("world_size", "cann"),
    [(size, "9.0.0" if size == 8 else "9.1.0") for size in CASES]
    + [(size, "9.1.0" if size == 8 else "9.0.0") for size in CASES if tiers.ALL],
)
def test_layouts_over_hccl_compute_what_the_hugging_face_model_computes(
    world_size: int, cann: str, reference: Path
):
    result = run_program(
        world_size,
        failures,
        CASES[world_size],
        reference,
        ASCEND_SIM_DEVICES=str(world_size),
        ASCEND_SIM_HBM_GIB="2",
        ASCEND_SIM_CANN=cann,
    )
    assert result == []
