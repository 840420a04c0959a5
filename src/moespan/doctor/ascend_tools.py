"""Parsers for the output of Ascend's programs. Pure functions of text.

Users of 910B and 910C servers have published the formats of `npu-smi info` and
`hccn_tool ... -tls -g`. The formats of the other `hccn_tool` queries are those of the vendor's
pages. Text in another format gives an empty result, never an exception. `moespan.machine.cann`
parses the files with versions.
"""

from __future__ import annotations

import re

import msgspec


class Npu(msgspec.Struct, frozen=True, kw_only=True):
    """One chip of `npu-smi info`. A card of A2 has one chip, a card of A3 two."""

    card: int
    chip: int
    name: str
    health: str
    address: str
    used_mb: int
    total_mb: int


class NpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """One process that uses a chip."""

    card: int
    chip: int
    pid: int
    name: str
    memory_mb: int


class NpuReport(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of `npu-smi info`."""

    version: str
    npus: list[Npu]
    processes: list[NpuProcess]


def parse_npu_smi(text: str) -> NpuReport:
    """The tables of `npu-smi info`.

    ```
    | npu-smi 25.0.rc1.1               Version: 25.0.rc1.1                     |
    | 0     910B3         | OK            | 97.5        41           0    / 0  |
    | 0                   | 0000:C1:00.0  | 0     0    / 0     3379 / 65536    |
    | 0       0           | 632268        | python3.1          | 197           |
    ```
    """
    version = re.search(r"Version:\s*(\S+)", text)
    npus: list[Npu] = []
    processes: list[NpuProcess] = []
    head: tuple[int, str, str] | None = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.lstrip().startswith("|") or len(cells) < 3:
            continue
        numbers = cells[0].split()
        if not numbers or not numbers[0].isdigit():
            continue
        if len(cells) >= 4 and cells[1].isdigit() and len(numbers) == 2:
            memory = re.match(r"\d+", cells[3])
            processes.append(
                NpuProcess(
                    card=int(numbers[0]),
                    chip=int(numbers[1]) if numbers[1].isdigit() else 0,
                    pid=int(cells[1]),
                    name=cells[2],
                    memory_mb=int(memory[0]) if memory else 0,
                )
            )
        elif re.match(r"[0-9A-Fa-f]{4}:[0-9A-Fa-f]{2}:", cells[1]) and head is not None:
            pairs = re.findall(r"(\d+)\s*/\s*(\d+)", cells[2])
            used, total = next((pair for pair in reversed(pairs) if pair[1] != "0"), ("0", "0"))
            card, name, health = head
            npus.append(
                Npu(
                    card=card,
                    chip=int(numbers[0]),
                    name=name,
                    health=health,
                    address=cells[1],
                    used_mb=int(used),
                    total_mb=int(total),
                )
            )
            head = None
        elif len(numbers) >= 2:
            head = int(numbers[0]), numbers[1], cells[1]
    return NpuReport(version=version[1] if version else "", npus=npus, processes=processes)


def parse_link(text: str) -> str:
    """`UP` or `DOWN`, from `hccn_tool -i N -link -g`, which prints `link status: UP`."""
    found = re.search(r"link status:\s*(\w+)", text, re.I)
    return found[1].upper() if found else ""


def parse_net_health(text: str) -> str:
    """The status in `hccn_tool -i N -net_health -g`, which prints `net health status: Success`."""
    found = re.search(r"net health status:\s*(.+)", text, re.I)
    return found[1].strip() if found else ""


def parse_netdetect(text: str) -> str:
    """The address in `hccn_tool -i N -netdetect -g`, which prints `netdetect address: A`."""
    found = re.search(r"netdetect address:\s*(\S+)", text, re.I)
    return found[1] if found else ""


def parse_ip(text: str) -> tuple[str, str]:
    """Address and mask in `hccn_tool -i N -ip -g`, which prints `ipaddr:A` and `netmask:M`."""
    address, mask = (
        re.search(rf"{name}\s*:\s*([0-9a-fA-F.:]+)", text) for name in ("ipaddr", "netmask")
    )
    return address[1] if address else "", mask[1] if mask else ""


def parse_tls(text: str) -> str:
    """`0` or `1`, from `hccn_tool -i N -tls -g`, which prints `dev_id:0, tls switch[0](0:disable,
    1:enable), ...`."""
    found = re.search(r"tls switch\[(\d)\]", text)
    return found[1] if found else ""


def parse_lldp(text: str) -> str:
    """The name of the switch in `hccn_tool -i N -lldp -g`: the line after `System Name TLV`."""
    found = re.search(r"System Name TLV\s*\n\s*(\S.*)", text)
    return found[1].strip() if found else ""
