"""The commands that start a candidate: one for each engine, on each of its nodes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import NamedTuple

from moespan.device import DEVICES
from moespan.planner.profile import Profile
from moespan.search.candidates import Candidate

FIRST_PORT = 8000

MODEL_PLACE = "MODEL"
"""Stands in commands for the folder of a model that was given as a preset."""

KEYS_PLACE = "KEYS"
"""Stands in commands for the file of a server's keys."""


class Command(NamedTuple):
    """One command.

    Attributes:
        node: the machine that it is for, from 0.
        engine: the engine that it starts, from 0.
        environment: variables before the command.
        arguments: of `moespan`, the verb first.
    """

    node: int
    engine: int
    environment: dict[str, str]
    arguments: list[str]

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, "moespan", *map(shlex.quote, self.arguments)])


def start_commands(candidate: Candidate, model: str, profile: Profile) -> list[Command]:
    """All commands, in the order of nodes and engines.

    A job on several nodes listens to the network and demands a key: a load balancer or a user that
    asks it may be on another machine.
    """
    per_node, size = profile.devices_per_node, candidate.layout.world_size
    is_remote = candidate.engines * size > per_node
    found = []
    for engine in range(candidate.engines):
        first = engine * size
        num_nodes = -(-size // per_node)
        for node_rank in range(num_nodes):
            node = first // per_node + node_rank
            arguments = ["serve", model, *engine_flags(candidate)]
            environment = {}
            if is_remote and node_rank == 0:
                arguments += ["--host", "0.0.0.0", "--api-key-file", KEYS_PLACE]
            if num_nodes > 1:
                arguments += ["--nnodes", str(num_nodes), "--node-rank", str(node_rank)]
                arguments += ["--master-addr", f"node{first // per_node}"]
            elif size < per_node and candidate.engines > 1:
                number = first % per_node
                arguments += ["--port", str(FIRST_PORT + number // size)]
                devices = ",".join(map(str, range(number, number + size)))
                variable = DEVICES[candidate.config.device].visible_variable
                environment = {variable: devices} if variable else {}
            found.append(Command(node, engine, environment, arguments))
    return found


def bench_command(candidate: Candidate, model: str, load_flags: Sequence[str]) -> str:
    """The command that measures one engine under its share of the load."""
    return shlex.join(["moespan", "bench", model, *engine_flags(candidate), *load_flags])


def engine_flags(candidate: Candidate) -> list[str]:
    """The flags of the layout, the limits and the dtypes. The cache is the planned one."""
    config, layout = candidate.config, candidate.layout
    flags = []
    for axis, degree in layout.sizes.items():
        if degree > 1:
            flags += [f"-{axis}", str(degree)]
    flags += ["--device", config.device, "--dtype", config.dtype]
    if config.quantization is not None:
        flags += ["--quantization", config.quantization]
    if config.kv_cache_dtype != "auto":
        flags += ["--kv-cache-dtype", config.kv_cache_dtype]
    flags += ["--max-model-len", str(config.max_model_len)]
    flags += ["--max-num-seqs", str(config.max_num_seqs)]
    flags += ["--max-num-batched-tokens", str(config.max_num_batched_tokens)]
    return [*flags, "--num-blocks", str(candidate.num_blocks)]
