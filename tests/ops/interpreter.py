"""Triton's interpreter, with its bfloat16 mended: it cuts float32 off instead of rounding it, and
takes the bits of bfloat16 for integers in products of matrices and when integers become bfloat16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until `monkeypatch` is undone, bfloat16 rounds as on a card, and products are of floats."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    convert, create_dot, cast = interpreter._convert_float, builder.create_dot, builder.cast_impl

    def mended_convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            rounded = torch.tensor(data.view(np.float32)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.view(np.uint16).astype(np.uint32) << 16
        return convert(data, source, target, rounding)

    def mended_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            interpreter.TensorHandle(
                mended_convert(part.data, tl.bfloat16, tl.float32, None).view(np.float32),
                tl.float32,
            )
            if part.dtype.scalar == tl.bfloat16
            else part
            for part in (a, b)
        )
        return create_dot(self, a, b, *rest)

    def mended_cast(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar.is_int():
            source = interpreter.TensorHandle(source.data.astype(np.float32), tl.float32)
        return cast(self, source, target)

    monkeypatch.setattr(interpreter, "_convert_float", mended_convert)
    monkeypatch.setattr(builder, "create_dot", mended_dot)
    monkeypatch.setattr(builder, "cast_impl", mended_cast)
