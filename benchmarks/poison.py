"""Poisons uninitialised memory: a read before the first write gives NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_UNSET = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Poisoned(TorchDispatchMode):  # type: ignore[misc]
    """While active, `torch.empty` and similar functions return NaN, or the largest integer."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _UNSET:
            largest = torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max
            out.fill_(largest)
        return out
