"""Objects of a process, in a child that was forked from it.

The child has a copy of each object, and shares what stands behind it: sockets, mapped memory,
folders, other processes. What the child did to these, its parent would suffer. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from moespan.errors import EngineDeadError


class Owner:
    """The process that makes this object. It alone may use what the object stands for."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this process is that one, and not a fork of it."""
        return os.getpid() == self._process

    def check(self) -> None:
        """Raise `EngineDeadError` in a fork."""
        if not self.is_here:
            raise EngineDeadError(
                f"this engine belongs to process {self._process}, from which this process "
                f"({os.getpid()}) was forked; start processes by spawn or forkserver, and make an "
                "engine in each"
            )


def only_here(call: Callable[[], object]) -> Callable[[], None]:
    """`call`, which does nothing in forks of this process."""
    owner = Owner()

    def guarded() -> None:
        if owner.is_here:
            call()

    return guarded
