"""Ranks that torchrun has started: torchrun --nproc-per-node 2 examples/torchrun.py

The program is the same as without torchrun. Rank 0 goes on after `LLM(...)` and prints; the other
ranks serve it inside `LLM(...)` and exit when it closes.
"""

import os
from pathlib import Path

from moespan import LLM, SamplingParams

MODEL = Path(__file__).parents[1] / "models" / "quickstart"


def main() -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "2"))
    with LLM(str(MODEL), tensor_parallel_size=ranks) as llm:
        for output in llm.generate(["681+734="], SamplingParams(temperature=0)):
            print(llm.info.layout, output.prompt, output.outputs[0].text)


if __name__ == "__main__":
    main()
