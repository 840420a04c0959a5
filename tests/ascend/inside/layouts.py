"""Runs layouts one after the other on the same ranks and pretend NPUs, and compares each with a
reference: `layouts.py MODEL REFERENCE DTYPE EAGER LAYOUT...`, a layout being `tp=4,pp=2,ep=4`."""

from __future__ import annotations

import sys

from moespan import LLM
from moespan.config import Layout
from moespan.verify import Reference, verify


def main() -> None:
    model, reference_file, dtype, eager, *texts = sys.argv[1:]
    sizes = [dict(part.split("=") for part in text.split(",")) for text in texts]
    layouts = [Layout(**{axis: int(size) for axis, size in one.items()}) for one in sizes]
    reference = Reference(reference_file)
    with LLM(
        model,
        tensor_parallel_size=layouts[0].world_size,
        device="npu",
        dtype=dtype,
        enforce_eager=eager == "eager",
    ) as llm:
        for layout in layouts:
            for dispatch in layout.dispatches:
                llm.relayout(layout, dispatch)
                report = verify(llm, reference)
                print(layout, dispatch, *(report.failures or ["passed"]), flush=True)


if __name__ == "__main__":
    main()
