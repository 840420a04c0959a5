"""The nodes of a job, as launchers describe them."""

from __future__ import annotations

from typing import Any

import pytest

from moespan.cli import main
from moespan.errors import ConfigError
from moespan.machine.cluster import first_host, nodes_of
from tests.support import QUICKSTART

# One task on each of two nodes, started by `srun` inside an allocation.
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
    "SLURM_JOB_NODELIST": "npu[07-08]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}
USER = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}


def values(environ: dict[str, str], **given: Any) -> dict[str, object]:
    return {name: one.value for name, one in nodes_of(environ, given).items()}


@pytest.mark.parametrize(
    ("environ", "address"),
    [
        (USER, "10.0.0.1"),
        (SLURM, "npu07"),
        ({**SLURM, "SLURM_JOB_NODELIST": ""}, "10.0.0.7"),
        ({**SLURM, "SLURM_STEP_NODELIST": "npu08,npu10"}, "npu08"),
        (
            {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "job-worker-0"},
            "job-worker-0",
        ),
        (
            {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "job-0.svc"},
            "job-0.svc",
        ),
        (
            {
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
                "MASTER_ADDR": "a",
            },
            "a",
        ),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "1", "MASTER_ADDR": "a"}, "a"),
        ({"NNODES": "2", "JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "job-0.svc"}, "job-0.svc"),
    ],
    ids=["user", "slurm", "slurm launch", "slurm step", "pet", "lws", "ompi", "hydra", "k8s"],
)
def test_the_second_of_two_nodes(environ: dict[str, str], address: str) -> None:
    assert values(environ) == {"nnodes": 2, "node_rank": 1, "master_addr": address}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"},
        {"NNODES": "1", "NODE_RANK": "0"},
        {"NODE_RANK": "0"},
        {"JOB_COMPLETION_INDEX": "3"},
        {"LWS_GROUP_SIZE": "1", "LWS_WORKER_INDEX": "0", "LWS_LEADER_ADDRESS": "a"},
        # One task in an allocation of one node, and a program in the script of `sbatch`.
        {**SLURM, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"},
        {name: value for name, value in SLURM.items() if "STEP" not in name},
        # Ranks of another program.
        {**SLURM, "SLURM_STEP_NUM_TASKS": "16"},
        {
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
        {"PMI_SIZE": "16", "PMI_RANK": "3", "MPI_LOCALNRANKS": "8"},
        {"PMI_SIZE": "2", "PMI_RANK": "1"},
        {"PET_NNODES": "1:4", "PET_MASTER_ADDR": "a"},
        # torchrun starts all ranks itself.
        {**USER, "RANK": "1", "WORLD_SIZE": "2"},
    ],
    ids=str,
)
def test_a_program_that_runs_for_itself(environ: dict[str, str]) -> None:
    assert nodes_of(environ) == {}


def test_launchers_of_one_process_do_not_contradict_the_user() -> None:
    one = {
        **{**SLURM, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"},
        **{"PET_NNODES": "1", "PET_NODE_RANK": "0", "LWS_GROUP_SIZE": "1", "LWS_WORKER_INDEX": "0"},
    }
    assert values({**one, **USER}) == {"nnodes": 2, "node_rank": 1, "master_addr": "10.0.0.1"}


def test_flags_win_field_by_field() -> None:
    assert values(USER, nnodes=1) == {}
    assert values(USER, nnodes=4) == {"node_rank": 1, "master_addr": "10.0.0.1"}
    assert values(USER, node_rank=0, master_addr="a") == {"nnodes": 2}
    assert values({**SLURM, "NNODES": "3"}, nnodes=2)["node_rank"] == 1
    # Without the environment the flags are all there is.
    assert values({}, nnodes=2) == {}


@pytest.mark.parametrize(
    ("environ", "error"),
    [
        ({**SLURM, "NNODES": "4"}, "NNODES=4 and SLURM_STEP_NUM_NODES=2 disagree about nnodes"),
        ({**SLURM, "NODE_RANK": "0"}, "NODE_RANK=0 and SLURM_NODEID=1 disagree about node_rank"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "without node_rank; set NODE_RANK or pass --node-r"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "without master_addr; set MASTER_ADDR or pass --mas"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 is set without the number of nodes; set NNODES"),
    ],
)
def test_contradictions_and_gaps_are_errors(environ: dict[str, str], error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        nodes_of(environ)
    assert error in str(caught.value)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("node[007-009,12],gpu5", "node007"),
        ("rack[2,5]n[03-04]-ib,other", "rack2n03-ib"),
        ("a-b[1]", "a-b1"),
    ],
)
def test_compact_lists_of_hosts(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


@pytest.mark.parametrize("hosts", ["", "node[1-2", ",a"])
def test_what_is_not_a_list_of_hosts(hosts: str) -> None:
    with pytest.raises(ValueError):
        first_host(hosts)


def test_print_env_shows_the_nodes_and_where_they_come_from(monkeypatch, capsys) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit_:
        main(["generate", str(QUICKSTART), "-tp", "2", "--print-env", "--master-addr", "127.0.0.1"])
    assert exit_.value.code == 0
    assert (
        "nnodes=2 (SLURM_STEP_NUM_NODES), node_rank=1 (SLURM_NODEID), "
        "master_addr=127.0.0.1 (--master-addr), master_port=29500 (default)"
    ) in capsys.readouterr().out
