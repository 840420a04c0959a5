"""The front of one node, with ranks of the fake engine: `fake_node.py NODES_JSON RANKS [MODEL]`.

On node 0 it says "ready", then sends each line of its input as a request, and says what comes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from moespan.config import EngineConfig, Layout, Nodes
from moespan.engine.request import Request, SamplingParams
from moespan.errors import MoespanError
from moespan.launch.ranks import RanksClient, serve_node

PROGRAM = [str(Path(__file__).with_name("fake_rank.py"))]


def main() -> None:
    nodes = msgspec.json.decode(sys.argv[1], type=Nodes)
    config = EngineConfig(
        sys.argv[3] if len(sys.argv) > 3 else "fake", Layout(int(sys.argv[2])), step_timeout_s=3.0
    )
    if nodes.node_rank > 0:
        serve_node(config, nodes, program=PROGRAM)
    with RanksClient(config, nodes=nodes, program=PROGRAM) as client:
        print("ready", flush=True)
        for line in sys.stdin:
            client.add(
                Request(id=line.strip(), prompt_token_ids=[3, 1, 4], params=SamplingParams())
            )
            print(client.receive()[0].token_ids, flush=True)


if __name__ == "__main__":
    try:
        main()
    except MoespanError as error:
        sys.exit(f"{type(error).__name__}: {error}")
