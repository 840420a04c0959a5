"""Counts what one decode step costs the host and the AI CPU of an NPU.

    bash tools/ascend_sim/run.sh --python tools/ascend_sim/count_decode.py [LAYERS] [NAME=VALUE ...]

One rank runs a narrow model of random weights in bfloat16, with as many layers as the 16B model has
(28), or LAYERS. NAME=VALUE are options of `LLM`, such as `npu_update_first=True`. The numbers are
for one decode step: launches of kernels by the host, replays of graphs, launches in the updates of
graphs, and operations that a 910B runs on its AI CPU. They are the difference between a long and a
short continuation, divided by their steps.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from moespan.checkpoint.presets import preset

SHORT, LONG = 3, 5
SAMPLING: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.7},
    "temperature, top_k, top_p": {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
}
CONFIG = {
    "hidden_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 64,
    "intermediate_size": 128,
    "vocab_size": 512,
}
KINDS = {
    "launches": "[cann] aclnn",
    "replays": "[graph] replay",
    "updates": "[graph] update",
    "AI CPU": "[aicpu]",
}


def main() -> None:
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 28
    options = dict(word.split("=", 1) for word in sys.argv[2:])
    config = {**CONFIG, "num_hidden_layers": layers}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(preset("16b", config)))
        print("| decode step | " + " | ".join(KINDS) + " |")
        print("|---" * (len(KINDS) + 1) + "|")
        for eager in (True, False):
            for kind, sampling in SAMPLING.items():
                job = {"folder": folder, "eager": eager, "sampling": sampling}
                counts = count({**job, "options": options})
                name = f"{'eager' if eager else 'recorded'}, {kind}"
                print(f"| {name} | " + " | ".join(f"{x:g}" for x in counts.values()) + " |")


def count(job: dict[str, Any]) -> dict[str, float]:
    """The lines of each kind that one decode step traces."""
    ran = subprocess.run(
        [sys.executable, __file__],
        env={
            **os.environ,
            "ASCEND_SIM_TRACE": "1",
            "ASCEND_SIM_AICPU": "1",
            "ASCEND_SIM_HBM_GIB": "1",
            "COUNT_DECODE": json.dumps(job),
        },
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        sys.exit(ran.stderr[-2000:])
    parts = [part.splitlines() for part in ran.stderr.split("--- ")]
    traced = {part[0]: part[1:] for part in parts if part}

    def number(length: int, mark: str) -> int:
        lines = traced[str(length)]
        return sum(mark in x and not x.endswith("GetWorkspaceSize") for x in lines)

    return {
        kind: (number(LONG, mark) - number(SHORT, mark)) / (LONG - SHORT)
        for kind, mark in KINDS.items()
    }


def run(job: dict[str, Any]) -> None:
    """Generate twice, with a mark before each."""
    from moespan import LLM, SamplingParams

    options = {name: ast.literal_eval(value) for name, value in job["options"].items()}
    with LLM(
        job["folder"],
        device="npu",
        dtype="bfloat16",
        load_format="dummy",
        enforce_eager=job["eager"],
        max_num_seqs=1,
        max_model_len=128,
        num_blocks=4,
        bind="off",
        **options,
    ) as llm:
        prompt = {"prompt_token_ids": [1, 2, 3]}
        for length in (2, SHORT, LONG):  # the first one records
            print(f"--- {length}", file=sys.stderr, flush=True)
            params = SamplingParams(max_tokens=length, seed=1, ignore_eos=True, **job["sampling"])
            llm.generate([prompt], params)
        print("--- end", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if "COUNT_DECODE" in os.environ:
        run(json.loads(os.environ["COUNT_DECODE"]))
    else:
        main()
