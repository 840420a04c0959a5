"""Ctrl-C during work that must not be cut: the interrupt waits until the work is done."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
    """Let the first Ctrl-C wait until the block has ended. The second one cuts the block short.

    Blocks may be nested; the outermost one holds. Outside the main thread, where Python delivers no
    signals, and where the program ignores Ctrl-C, this function does nothing.
    """
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if is_main else None
    if not callable(handler) or isinstance(handler, _Hold):
        yield
        return
    hold = _Hold(handler)
    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if hold.is_due:
            handler(signal.SIGINT, hold.frame)


class _Hold:
    """A handler of SIGINT that keeps the first interrupt, and passes on the others."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler
        self.is_due = False
        self.frame: FrameType | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        is_second, self.is_due, self.frame = self.is_due, not self.is_due, frame
        if is_second:
            self._handler(number, frame)
