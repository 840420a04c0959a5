"""The beats of ranks: where each rank is in its work, readable from outside its process.

A file holds one record for each rank, then one for the agent and one for the front. Every process
maps the file into its memory, so a write is a store without a system call, and a reader needs no
help from the writer: it also sees where a process is that is stopped, or hangs inside foreign code.

A record holds two independent signs of life:

- the *place*: state, number of the step, layer, and the collective. The rank's own thread writes it
  (`Beat`), and each write raises the counter `changes`.
- the counter `alive`. A thread of its own raises it every `PULSE_S` (`Beat.start_pulse`), idle or
  not, as long as the process runs at all.

Imports no torch.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from collections.abc import Hashable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

PULSE_S = 0.5
"""Seconds between two changes of `alive`."""

ABSENT, STARTING, IDLE, BUSY, ENDING = range(5)
"""States of a rank. `STARTING` lasts until the model is loaded."""

_RECORD_BYTES = 512

# changes, is_inside, the peers (first rank, number, stride), the collective in UTF-8
_CHANGES_AT = 0
_ENTER = struct.Struct("<QBxxxIII160s")
_LEAVE = struct.Struct("<QB")
_PLACE_BYTES = 160

# state, is_first, layer, step
_STATE_AT = 192
_STATE = struct.Struct("<BBxxiq")
_LAYER_AT = _STATE_AT + 4
_LAYER = struct.Struct("<i")

_ALIVE_AT = 256
_ALIVE = struct.Struct("<Q")

_PROCESS_AT = 264
_PROCESS = struct.Struct("<qq")

_NO_COLLECTIVE = (0, 0, 0, b"")


class Place(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Where a rank is.

    Attributes:
        rank: number of the rank in the world.
        alive: counter that grows while the process runs.
        changes: counter that grows with the rank's work.
        state: `ABSENT`, `STARTING`, `IDLE`, `BUSY` or `ENDING`.
        step: number of the last step that the rank began, from 1; 0 before the first.
        is_first: the step is the first of its kind, so it may compile or allocate.
        layer: the layer that runs; -1 for none, or inside a recorded graph.
        is_inside: whether the rank is inside `collective`; otherwise it has left `collective`.
        collective: name, axis and module; empty if the step has had none.
        peers: ranks with which the rank communicates in `collective`, without itself.
        is_stopped: a signal or a debugger has stopped the process. Its agent finds that out.
    """

    rank: int
    alive: int = 0
    changes: int = 0
    state: int = ABSENT
    step: int = 0
    is_first: bool = False
    layer: int = -1
    is_inside: bool = False
    collective: str = ""
    peers: tuple[int, ...] = ()
    is_stopped: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether the rank has loaded the model."""
        return self.state in (IDLE, BUSY, ENDING)

    @property
    def is_busy(self) -> bool:
        """Whether the rank is at work that must come to an end."""
        return self.state == BUSY

    def __str__(self) -> str:
        """The place in words, to follow the name of the rank."""
        if self.state == IDLE:
            return f"idle after step {self.step}" if self.step else "idle before its first step"
        where = [f"in step {self.step}"]
        if not self.is_busy:
            where = ["ending" if self.state == ENDING else "starting"]
        if self.is_busy and self.layer >= 0:
            where.append(f"layer {self.layer}")
        if self.collective:
            where.append(f"{'in' if self.is_inside else 'after'} {self.collective}")
        return ", ".join(where)


class Beat:
    """One process's end: writes its own record. Without a file, nobody reads the record.

    A pair of `enter` and `leave` takes less than a microsecond.
    """

    def __init__(self, record: Any = None) -> None:
        self._record: Any = bytearray(_RECORD_BYTES) if record is None else record
        self._changes = 0
        self._state = ABSENT
        self._step = 0
        self._is_first = False
        self._kinds: set[Hashable] = set()  # of the steps that have run

    def start_pulse(self) -> None:
        """Raise `alive` every `PULSE_S` from a thread, as long as this process runs."""
        threading.Thread(target=self._pulse, name="beat", daemon=True).start()

    def is_of(self, pid: int, started: int) -> None:
        """The record is that of this process, which started then (`launch.fate.start_ticks`)."""
        _PROCESS.pack_into(self._record, _PROCESS_AT, pid, started)

    def starting(self) -> None:
        """The rank loads a model; no limit of time applies to its work."""
        self._kinds.clear()
        self._set(STARTING)

    def idle(self) -> None:
        """The rank waits for work."""
        self._set(IDLE)

    def busy(self) -> None:
        """The rank has got work."""
        self._set(BUSY)

    def ending(self) -> None:
        """The rank leaves its engine; no limit of time applies to that."""
        self._set(ENDING)

    def start_step(self, kind: Hashable) -> None:
        """The rank begins its next step. Steps of one kind take the same kernels, so only the first
        of each kind may have to compile or to allocate."""
        self._step += 1
        self._is_first = kind not in self._kinds
        self._kinds.add(kind)
        self._set(self._state)

    def layer(self, index: int) -> None:
        """The step gets to this layer."""
        _LAYER.pack_into(self._record, _LAYER_AT, index)

    def enter(self, collective: tuple[int, int, int, bytes]) -> None:
        """The rank calls a collective, named by `named`, and may have to wait in it."""
        self._changes += 1
        _ENTER.pack_into(self._record, _CHANGES_AT, self._changes, 1, *collective)

    def leave(self) -> None:
        """The rank has left the collective."""
        self._changes += 1
        _LEAVE.pack_into(self._record, _CHANGES_AT, self._changes, 0)

    def _set(self, state: int) -> None:
        self._changes += 1
        self._state = state
        _STATE.pack_into(self._record, _STATE_AT, state, self._is_first, -1, self._step)
        _ENTER.pack_into(self._record, _CHANGES_AT, self._changes, 0, *_NO_COLLECTIVE)

    def _pulse(self) -> None:
        alive = 0
        while True:
            alive += 1
            _ALIVE.pack_into(self._record, _ALIVE_AT, alive)
            time.sleep(PULSE_S)


@cache
def named(
    collective: str, axis: str, module: str, ranks: Sequence[int]
) -> tuple[int, int, int, bytes]:
    """A collective as `Beat.enter` takes it.

    Args:
        ranks: the ranks of the axis, as a range or tuple. Those of all axes have one stride.
    """
    text = f"{collective} over {axis}" if axis else collective
    text += f" ({module})" if module else ""
    first = ranks[0] if ranks else 0
    stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    return first, len(ranks), stride, text.encode()[:_PLACE_BYTES]


class Beats:
    """The file of all beats of one node.

    Args:
        path: the file, which `create` has made.
    """

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        self._view = memoryview(self._map)

    @staticmethod
    def size_bytes(num_records: int) -> int:
        """Bytes of the file. All of them must be allocated before the first write, since a store
        into a page that the file system has no room for kills the process."""
        return num_records * _RECORD_BYTES

    def beat(self, index: int) -> Beat:
        """The writer of one record."""
        return Beat(self._view[index * _RECORD_BYTES : (index + 1) * _RECORD_BYTES])

    def announce_end(self) -> None:
        """The front ends on purpose, and with it the ranks."""
        self.beat(self._front).ending()

    @property
    def end_is_announced(self) -> bool:
        """Whether the front has called `announce_end`. A front that goes without it has died."""
        return self.place(self._front, 0).state == ENDING

    @property
    def _front(self) -> int:
        return len(self._map) // _RECORD_BYTES - 1

    def alive(self, index: int) -> int:
        """The counter `alive` of one record."""
        (alive,) = _ALIVE.unpack_from(self._view, index * _RECORD_BYTES + _ALIVE_AT)
        return int(alive)

    def process(self, index: int) -> tuple[int, int]:
        """The process of one record and when it started, as `Beat.is_of` has them; zeros before."""
        pid, started = _PROCESS.unpack_from(self._view, index * _RECORD_BYTES + _PROCESS_AT)
        return int(pid), int(started)

    def place(self, index: int, rank: int) -> Place:
        """Where the rank of record `index` is, by the name `rank`."""
        data = self._stable(index)
        changes, is_inside, first, count, stride, text = _ENTER.unpack_from(data, _CHANGES_AT)
        state, is_first, layer, step = _STATE.unpack_from(data, _STATE_AT)
        (alive,) = _ALIVE.unpack_from(data, _ALIVE_AT)
        ranks = range(first, first + count * stride, stride) if count and stride else ()
        return Place(
            rank=rank,
            alive=alive,
            changes=changes,
            state=state if state <= ENDING else ABSENT,
            step=step,
            is_first=bool(is_first),
            layer=layer,
            is_inside=bool(is_inside),
            collective=text.rstrip(b"\0").decode(errors="replace"),
            peers=tuple(one for one in ranks if one != rank),
        )

    def _stable(self, index: int) -> bytes:
        """A copy of a record that no write has changed meanwhile, if the writer pauses at all."""
        record = self._view[index * _RECORD_BYTES : (index + 1) * _RECORD_BYTES]
        data = bytes(record)
        for _ in range(3):
            again = bytes(record)
            if again == data:
                break
            data = again
        return data
