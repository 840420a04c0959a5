"""The control channel: the leader's messages to all ranks. Bytes in, bytes out; never pickled."""

from __future__ import annotations

import torch
import torch.distributed as dist

# Most plans fit into one broadcast of this size; a longer one takes a second.
_FRAME_BYTES = 16 << 10
_LENGTH_BYTES = 8


def broadcast(message: bytes | None) -> bytes:
    """Send `message` from rank 0 to all ranks; the others pass None. Returns the message.

    It blocks until rank 0 sends, at most the timeout with which torch.distributed was started.
    """
    frame = torch.zeros(_FRAME_BYTES, dtype=torch.uint8)
    if message is not None:
        payload = len(message).to_bytes(_LENGTH_BYTES, "little") + message[: _FRAME_BYTES - 8]
        frame[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    dist.broadcast(frame, 0)
    head: bytes = frame.numpy().tobytes()
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    rest = length - (_FRAME_BYTES - _LENGTH_BYTES)
    if rest <= 0:
        return head[_LENGTH_BYTES : _LENGTH_BYTES + length]
    tail = (
        torch.empty(rest, dtype=torch.uint8)
        if message is None
        else torch.frombuffer(bytearray(message[-rest:]), dtype=torch.uint8)
    )
    dist.broadcast(tail, 0)
    rest_of_message: bytes = tail.numpy().tobytes()
    return head[_LENGTH_BYTES:] + rest_of_message


def smallest(value: int) -> int:
    """The least of all ranks' `value`s."""
    least = torch.tensor(value)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)
