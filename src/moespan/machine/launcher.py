"""The variables by which torchrun, or a launcher like it, tells a process that it is a rank.

An empty variable counts as not set: scripts leave such variables behind. Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from moespan.errors import ConfigError

_NEEDED = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_IS = ("is", "are")


class Launched(NamedTuple):
    """The place of this process among the ranks that a launcher has started.

    Attributes:
        local_world_size: ranks on this node; None if the launcher does not say.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int | None


def is_launched(environ: Mapping[str, str]) -> bool:
    """Whether RANK and WORLD_SIZE name one of several ranks. Unlike `launched` it never raises."""
    world_size = environ.get("WORLD_SIZE", "").strip()
    several = re.fullmatch(r"[0-9]{1,9}", world_size) is not None and int(world_size) > 1
    return several and bool(environ.get("RANK", "").strip())


def launched(environ: Mapping[str, str] = os.environ) -> Launched | None:
    """The place that the launcher gives; None if this process is not one of its several ranks.

    Raises:
        ConfigError: RANK and WORLD_SIZE are set, but other variables of a launcher are not, or a
            number is none.
    """
    if not (environ.get("RANK", "").strip() and environ.get("WORLD_SIZE", "").strip()):
        return None
    if (world_size := _number(environ, "WORLD_SIZE")) <= 1:
        return None
    missing = [name for name in _NEEDED if not environ.get(name, "").strip()]
    if missing:
        raise ConfigError(
            f"RANK={environ['RANK']} and WORLD_SIZE={world_size} say that a launcher has started "
            f"this process as a rank, but {' and '.join(missing)} {_IS[len(missing) > 1]} not set; "
            "start the program with torchrun, which sets all of them, or unset RANK and "
            "WORLD_SIZE, and moespan starts its ranks itself"
        )
    return Launched(
        rank=_number(environ, "RANK"),
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK"),
        local_world_size=(
            _number(environ, "LOCAL_WORLD_SIZE")
            if environ.get("LOCAL_WORLD_SIZE", "").strip()
            else None
        ),
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name].strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ConfigError(
            f"{name}={text[:40]!r} is not a number; torchrun sets it, and without torchrun it must "
            "not be set: unset it"
        )
    return int(text)
