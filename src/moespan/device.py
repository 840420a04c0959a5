"""The devices that the engine knows, one row each. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name: as torch and `--device` name it.
        block_size: tokens of a KV block that suit its attention kernel.
    """

    name: str
    block_size: int


DEVICES: dict[str, Device] = {
    device.name: device for device in (Device("cpu", 32), Device("cuda", 32), Device("npu", 128))
}
