"""Mends for the interpreter of Triton 3.6, so that it runs with NumPy 2.4."""

from __future__ import annotations

from typing import Any


def read_scalars() -> None:
    """Let the interpreter take an array of one element for a number, as that of Triton 3.7 does.

    Bounds of loops that a kernel has read from memory are such arrays. Call it before any kernel
    runs.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    if not hasattr(patch, "reads_scalars"):
        patch_tensor.reads_scalars = True  # type: ignore[attr-defined]
        interpreter._patch_lang_tensor = patch_tensor
