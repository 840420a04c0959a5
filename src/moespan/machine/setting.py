"""One environment variable of the ranks, and the facts of a machine that variables depend on."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

US, USER, NOBODY = "moespan", "you", "nobody"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One variable as the ranks will have it.

    Attributes:
        value: None if it is left unset.
        set_by: `moespan`, `you`, or `nobody`.
        why: the reason for the value, or for leaving the variable unset.
        reference: the document that gives the reason.
        per_rank: ranks differ in the value, so each rank sets its own; `value` is for display.
    """

    name: str
    value: str | None
    set_by: str
    why: str = ""
    reference: str = ""
    per_rank: bool = False


@dataclass(frozen=True)
class Machine:
    """Facts about the machine on which the settings depend, besides the config and the model.

    Attributes:
        architecture: as `uname -m` prints it.
        chip: `910B` (A2), `910C` (A3), `310P`, or empty if there is none or it is not known.
        threads: OpenMP threads of each rank of this node; empty if we do not start its ranks.
        nnodes: number of nodes of the job.
        address: address of this node on the network that connects the nodes.
        interface: the network interface with that address; empty if the choice is not ours.
        libgomp: path of the OpenMP library in torch's wheel; empty if there is none.
        has_torch_npu: whether the package torch-npu is installed.
    """

    architecture: str = "x86_64"
    chip: str = ""
    threads: tuple[int, ...] = ()
    nnodes: int = 1
    address: str = ""
    interface: str = "lo"
    libgomp: str = ""
    has_torch_npu: bool = False


def ours(
    name: str, value: object, why: str, reference: str = "", per_rank: bool = False
) -> Setting:
    """A variable that we set, if the user has not."""
    return Setting(
        name=name, value=str(value), set_by=US, why=why, reference=reference, per_rank=per_rank
    )


def unset(name: str, why: str, reference: str = "") -> Setting:
    """A variable that we leave unset on purpose."""
    return Setting(name=name, value=None, set_by=NOBODY, why=why, reference=reference)
