"""The nodes of a job as its launcher describes them in the environment.

`nodes_of` finds how many nodes there are, which of them this is, and the address of node 0, in the
variables of these launchers, the first of them first:

- the user: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT;
- Slurm, if `srun` started one task on each node: SLURM_STEP_NUM_NODES or SLURM_NNODES,
  SLURM_NODEID, and the first host of SLURM_STEP_NODELIST or SLURM_JOB_NODELIST, or
  SLURM_LAUNCH_NODE_IPADDR;
- torchrun's own variables, which Kubeflow sets: PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR,
  PET_MASTER_PORT;
- LeaderWorkerSet: LWS_GROUP_SIZE, LWS_WORKER_INDEX, LWS_LEADER_ADDRESS;
- Open MPI, if it started one process on each node: OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK;
- Hydra (MPICH, Intel MPI), likewise: PMI_SIZE, PMI_RANK;
- indexed jobs of Kubernetes, beside NNODES: JOB_COMPLETION_INDEX.

Rules:

- A flag wins over the environment, field by field. `--nnodes 1` ignores the environment.
- Two variables that give different numbers are an error that names both.
- A launcher of one process, or of several on one node, is ignored. So a program in the script of
  `sbatch`, or one of `mpirun -n 2` on one machine, runs for itself.
- Under `torchrun` nothing is read: it starts the ranks of all nodes.
- With several nodes, a node's number and the address of node 0 must be known.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from moespan.errors import ConfigError
from moespan.machine.launcher import is_launched


class Found(NamedTuple):
    """A value for a field of `Nodes`, and the variable that it comes from."""

    value: Any
    source: str


class _Names(NamedTuple):
    """The variables of one launcher for each field, the first that is set counts."""

    nnodes: tuple[str, ...]
    node_rank: tuple[str, ...]
    master_addr: tuple[str, ...] = ()
    master_port: tuple[str, ...] = ()


_USER = _Names(("NNODES",), ("NODE_RANK",), ("MASTER_ADDR",), ("MASTER_PORT",))
_SLURM = _Names(
    ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
    ("SLURM_NODEID",),
    ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_LAUNCH_NODE_IPADDR"),
)
_TORCHRUN = _Names(("PET_NNODES",), ("PET_NODE_RANK",), ("PET_MASTER_ADDR",), ("PET_MASTER_PORT",))
_LEADER_WORKER = _Names(("LWS_GROUP_SIZE",), ("LWS_WORKER_INDEX",), ("LWS_LEADER_ADDRESS",))
_OPEN_MPI = _Names(("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_RANK",))
_HYDRA = _Names(("PMI_SIZE",), ("PMI_RANK",))
_KUBERNETES = _Names((), ("JOB_COMPLETION_INDEX",))


def nodes_of(
    environ: Mapping[str, str], given: Mapping[str, Any] | None = None
) -> dict[str, Found]:
    """The fields of `Nodes` that the environment sets and `given` does not; empty for one node.

    Args:
        given: fields that the user has set otherwise, with their values.

    Raises:
        ConfigError: two variables disagree, or the environment describes several nodes without the
            number of this node or the address of node 0.
    """
    given = given or {}
    if given.get("nnodes") == 1 or is_launched(environ):
        return {}
    launchers = list(_launchers(environ))
    found: dict[str, Found] = {}
    for field in ("nnodes", "node_rank", "master_addr", "master_port"):
        if field not in given and (one := _field(environ, launchers, field)) is not None:
            found[field] = one
    if "nnodes" not in given and ("nnodes" not in found or found["nnodes"].value == 1):
        if "nnodes" not in found and (rank := found.get("node_rank")) and rank.value > 0:
            raise ConfigError(
                f"{rank.source}={rank.value} is set without the number of nodes; set NNODES, or "
                f"unset {rank.source}"
            )
        return {}
    if "nnodes" in found:
        nnodes = found["nnodes"]
        for field, variable in (("node_rank", "NODE_RANK"), ("master_addr", "MASTER_ADDR")):
            if field not in found and field not in given:
                flag = f"--{field.replace('_', '-')}"
                raise ConfigError(
                    f"{nnodes.source}={nnodes.value} describes several nodes without {field}; set "
                    f"{variable} or pass {flag}, or pass --nnodes 1 to use this machine alone"
                )
    return found


def first_host(hosts: str) -> str:
    """The first host of a list as Slurm writes it: `node07` of `node[07-09,12],gpu5`.

    Raises:
        ValueError: the list is empty, or a bracket is not closed.
    """
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]+\])+", hosts.strip())
    if first is None or hosts.strip()[first.end() : first.end() + 1] not in ("", ","):
        raise ValueError(f"{hosts!r} is not a list of hosts")
    # In each bracket the first number of the first range, with its zeros.
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _launchers(environ: Mapping[str, str]) -> Iterator[_Names]:
    """The launchers that count here, in the order of the docstring."""
    yield _USER
    nodes, tasks = (
        _first(environ, names)
        for names in (_SLURM.nnodes, ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))
    )
    # The script of `sbatch` has SLURM_NNODES too, but no step: it runs once, on one node.
    if nodes and tasks and tasks.value == nodes.value and _is_number(environ, "SLURM_STEP_ID"):
        yield from _if_several(environ, _SLURM)
    yield from _if_several(environ, _TORCHRUN)
    yield from _if_several(environ, _LEADER_WORKER)
    for names, local in (
        (_OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        (_HYDRA, "MPI_LOCALNRANKS"),
    ):
        if environ.get(local) == "1":
            yield from _if_several(environ, names)
    if _is_number(environ, "NNODES"):
        yield _KUBERNETES


def _if_several(environ: Mapping[str, str], names: _Names) -> Iterator[_Names]:
    nnodes = _first(environ, names.nnodes)
    if nnodes is not None and nnodes.value > 1:
        yield names


def _field(environ: Mapping[str, str], launchers: list[_Names], field: str) -> Found | None:
    """The value of one field.

    Raises:
        ConfigError: two launchers give different numbers. Addresses may be spelled differently.
    """
    is_text = field == "master_addr"
    each = (_first(environ, getattr(names, field), is_text) for names in launchers)
    found = [one for one in each if one is not None]
    for other in found[1:]:
        if not is_text and other.value != found[0].value:
            flag = f"--{field.replace('_', '-')}"
            raise ConfigError(
                f"{found[0].source}={found[0].value} and {other.source}={other.value} disagree "
                f"about {field}; unset one of them, or pass {flag}"
            )
    return found[0] if found else None


def _first(
    environ: Mapping[str, str], variables: tuple[str, ...], is_text: bool = False
) -> Found | None:
    """The first of `variables` that is set to a number, or to a text."""
    for name in variables:
        text = environ.get(name, "")
        if is_text and text:
            try:
                return Found(first_host(text) if name.endswith("NODELIST") else text, name)
            except ValueError:
                continue
        if not is_text and (number := _number(text)) is not None:
            return Found(number, name)
    return None


def _is_number(environ: Mapping[str, str], name: str) -> bool:
    return _number(environ.get(name, "")) is not None


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,9}", text.strip()) else None


def main() -> None:
    """Print the number of nodes, for run.sh: of `--nnodes N` in the arguments, or as found here."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--nnodes", type=int, default=argparse.SUPPRESS)
    given = vars(parser.parse_known_args()[0])
    try:
        found = nodes_of(os.environ, given)
    except ConfigError as error:
        sys.exit(f"moespan: {error}")
    print(given.get("nnodes", found["nnodes"].value if found else 1))


if __name__ == "__main__":
    main()
