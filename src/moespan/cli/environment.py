"""`--print-env`: prints the environment variables that the ranks would get."""

from __future__ import annotations

import argparse

from moespan.cli.flags import describe_nodes, settings_of


def print_environment(args: argparse.Namespace) -> int:
    """Print the environment variables that the ranks would get, and start nothing."""
    from moespan.machine.binding import binding_here
    from moespan.machine.environment import describe, environment_here
    from moespan.machine.interfaces import address_towards, interface_of

    _, config, nodes = settings_of(args).resolve(to_run=False)
    ranks = nodes.ranks_per_node(config.layout)
    threads = (
        [part.threads for part in binding_here(config.bind, config.device, ranks).ranks]
        if config.layout.world_size > 1
        else []
    )
    address, interface = "", "lo"
    if nodes.nnodes > 1:
        address = address_towards(nodes.master_addr) or ""
        interface = (interface_of(address) if address else None) or ""
    print(*describe(environment_here(config, threads, nodes.nnodes, address, interface)), sep="\n")
    print(f"\n{describe_nodes(args)}")
    return 0
