"""Corrects the 16-bit and 8-bit floats of Triton's interpreter.

The interpreter truncates float32 to bfloat16. It treats the bits of bfloat16 as integers in matrix
products and in conversions from integers. It rounds to 8-bit floats away from zero without a carry,
and treats their NaN as a number.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# The scripts find each other where they lie, as when they are run.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from old_triton import read_scalars

_WIDER = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def fix_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until `monkeypatch` is undone, floats round as on a card, and products are of floats."""
    import triton.language as tl
    from triton.runtime import interpreter

    read_scalars()
    builder = interpreter.InterpreterBuilder
    convert, create_dot, cast = interpreter._convert_float, builder.create_dot, builder.cast_impl

    def fixed_convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.float8e4nv):
            # `cvt.rn.satfinite`
            limited = torch.tensor(data.view(np.float32)).clamp(-448, 448)
            return limited.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if source == tl.float8e4nv:
            read = torch.tensor(data.view(np.uint8)).view(torch.float8_e4m3fn)
            bits = getattr(torch, f"uint{target.primitive_bitwidth}")
            return read.to(_WIDER[target.name]).view(bits).numpy()
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.tensor(data.view(np.float32)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.view(np.uint16).astype(np.uint32) << 16
        return convert(data, source, target, rounding)

    def fixed_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            interpreter.TensorHandle(
                fixed_convert(part.data, tl.bfloat16, tl.float32, None).view(np.float32),
                tl.float32,
            )
            if part.dtype.scalar == tl.bfloat16
            else part
            for part in (a, b)
        )
        return create_dot(self, a, b, *rest)

    def fixed_cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            source = interpreter.TensorHandle(source.data.astype(np.float32), tl.float32)
        return cast(self, source, target)

    monkeypatch.setattr(interpreter, "_convert_float", fixed_convert)
    monkeypatch.setattr(builder, "create_dot", fixed_dot)
    monkeypatch.setattr(builder, "cast_impl", fixed_cast)
