"""The control channel: messages of the leader to all ranks, and between it and single ranks.

Messages are bytes and are never pickled. The channel has a group of its own on the CPU, so that
messages neither wait for the model's collectives nor mix with them.
"""

from __future__ import annotations

from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist

from moespan.parallel.beats import Beat, named
from moespan.parallel.counters import Traffic, sent_bytes

# Most plans fit into one broadcast of this size; a longer message takes a second broadcast.
_FRAME_BYTES = 16 << 10
_LENGTH_BYTES = 8
# Unfinished sends. Far fewer plans are in flight, so beyond this the oldest has long arrived.
_MOST_UNFINISHED = 256


class Control:
    """One rank's end of the channel. Without a group, the world has one rank.

    `kind` of a message names it in the traffic counters and is not sent. By its beat, a follower is
    idle while it waits for the leader's next message, and busy from then on.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        traffic: Traffic | None = None,
        beat: Beat | None = None,
    ) -> None:
        self._group = group
        self._size = 1 if group is None else group.size()
        self._traffic = traffic or Traffic()
        self._beat = beat or Beat()
        self._sending: deque[tuple[dist.Work, torch.Tensor]] = deque()

    @classmethod
    def create(cls, traffic: Traffic, timeout_s: float, beat: Beat | None = None) -> Control:
        """Make the group; all ranks call it together. No rank waits longer than `timeout_s`."""
        timeout = timedelta(seconds=timeout_s)
        group = dist.new_group(timeout=timeout, backend="gloo", group_desc="control")
        return cls(group, traffic, beat)

    def broadcast(self, message: bytes, kind: str) -> None:
        """On the leader: start sending `message` to all ranks. They may be some messages behind."""
        if self._group is None:
            return
        frame = torch.zeros(_FRAME_BYTES, dtype=torch.uint8)
        payload = _with_length(message)
        head = payload[:_FRAME_BYTES]
        frame[: len(head)] = head
        self._broadcast(frame, kind)
        if len(payload) > _FRAME_BYTES:
            self._broadcast(payload[_FRAME_BYTES:], kind)

    def receive_broadcast(self) -> bytes:
        """On every other rank: wait for the leader's next message."""
        frame = torch.empty(_FRAME_BYTES, dtype=torch.uint8)
        self._beat.idle()
        dist.broadcast(frame, 0, group=self._group)
        self._beat.busy()
        length = _length(frame)
        rest = length + _LENGTH_BYTES - _FRAME_BYTES
        if rest <= 0:
            return _to_bytes(frame[_LENGTH_BYTES : _LENGTH_BYTES + length])
        tail = torch.empty(rest, dtype=torch.uint8)
        dist.broadcast(tail, 0, group=self._group)
        return _to_bytes(frame[_LENGTH_BYTES:]) + _to_bytes(tail)

    def send(self, message: bytes, kind: str, rank: int = 0) -> None:
        """Start sending `message` to the leader or, on the leader, to another rank."""
        payload = _with_length(message)
        self._count("send", kind, len(payload))
        for part in (payload[:_LENGTH_BYTES], payload[_LENGTH_BYTES:]):
            if len(part):
                self._keep(dist.isend(part, rank, group=self._group), payload)

    def receive(self, rank: int) -> bytes:
        """Wait for the next message that `rank` sends to this rank alone."""
        head = torch.empty(_LENGTH_BYTES, dtype=torch.uint8)
        self._beat.enter(named("receive", "control", "", (rank,)))
        dist.recv(head, rank, group=self._group)
        body = torch.empty(_length(head), dtype=torch.uint8)
        if len(body):
            dist.recv(body, rank, group=self._group)
        self._beat.leave()
        return _to_bytes(body)

    def smallest(self, value: int) -> int:
        """The smallest `value` of all ranks, which call it together."""
        if self._group is None:
            return value
        least = torch.tensor(value)
        self._count("all_reduce", "smallest", least.element_size())
        self._beat.enter(named("all_reduce", "control", "smallest", tuple(range(self._size))))
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self._group)
        self._beat.leave()
        return int(least)

    def close(self) -> None:
        """Wait for unfinished sends and destroy the group."""
        while self._sending:
            self._sending.popleft()[0].wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _broadcast(self, data: torch.Tensor, kind: str) -> None:
        self._count("broadcast", kind, len(data))
        self._keep(dist.broadcast(data, 0, group=self._group, async_op=True), data)

    def _count(self, collective: str, kind: str, num_bytes: int) -> None:
        sent = sent_bytes(collective, self._size, num_bytes)
        self._traffic.count("control", collective, kind, sent)

    def _keep(self, work: dist.Work | None, data: torch.Tensor) -> None:
        """Keep `data` alive until it is sent. Raises the errors of much earlier messages."""
        assert work is not None
        self._sending.append((work, data))
        if len(self._sending) > _MOST_UNFINISHED:
            self._beat.enter(named("send", "control", "", ()))
            self._sending.popleft()[0].wait()
            self._beat.leave()


def _with_length(message: bytes) -> torch.Tensor:
    framed = bytearray(len(message).to_bytes(_LENGTH_BYTES, "little") + message)
    return torch.frombuffer(framed, dtype=torch.uint8)


def _length(frame: torch.Tensor) -> int:
    return int.from_bytes(_to_bytes(frame[:_LENGTH_BYTES]), "little")


def _to_bytes(data: torch.Tensor) -> bytes:
    content: bytes = data.numpy().tobytes()
    return content
