"""The front of one node, with ranks of the fake engine: `fake_node.py NODES_JSON RANKS [MODEL]`.

On node 0 it says "ready", then sends each line of its input as a request, and says what comes.
With the model `lives` it says the cause when the ranks have died, and a line `again` starts them
again, or a line `end WHY` tells the other nodes that it does not.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
import threading
from pathlib import Path

import msgspec

from moespan.config import EngineConfig, Layout, Nodes
from moespan.engine.info import Pulse
from moespan.engine.request import OutputDelta, Request, SamplingParams
from moespan.errors import MoespanError
from moespan.launch.lives import Lives, serve_node
from moespan.launch.ranks import RanksClient

PROGRAM = [str(Path(__file__).with_name("fake_rank.py"))]


def main() -> None:
    # Python ignores the signal if whoever started it does, as shells do for programs behind `&`.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nodes = msgspec.json.decode(sys.argv[1], type=Nodes)
    config = EngineConfig(
        sys.argv[3] if len(sys.argv) > 3 else "fake", Layout(int(sys.argv[2])), step_timeout_s=3.0
    )
    if nodes.node_rank > 0:
        serve_node(config, nodes, program=PROGRAM, comes_back=config.model == "lives")
    if config.model == "lives":
        asyncio.run(lead_lives(config, nodes))
        return
    with RanksClient(config, nodes=nodes, program=PROGRAM) as client:
        print("ready", flush=True)
        for line in sys.stdin:
            client.add(request(line))
            print(client.receive()[0].token_ids, flush=True)


def request(line: str) -> Request:
    return Request(id=line.strip(), prompt_token_ids=[3, 1, 4], params=SamplingParams())


async def lead_lives(config: EngineConfig, nodes: Nodes) -> None:
    lives, lines = Lives(config, nodes, program=PROGRAM), read_lines()
    while await lead_life(lives, lines):
        word, _, why = (await lines.get()).partition(" ")
        if word == "end":
            await asyncio.to_thread(lives.end, why)
            return


def read_lines() -> asyncio.Queue[str]:
    """The lines of the input; the last one is empty."""
    lines: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:
        for line in itertools.chain(sys.stdin, [""]):
            loop.call_soon_threadsafe(lines.put_nowait, line.strip())

    threading.Thread(target=read, daemon=True).start()
    return lines


async def lead_life(lives: Lives, lines: asyncio.Queue[str]) -> bool:
    """One life; → whether it died."""

    def hear(deltas: list[OutputDelta], pulse: Pulse) -> None:
        for delta in deltas:
            print(delta.token_ids, flush=True)

    ranks = await lives.start(hear)
    dead = asyncio.ensure_future(ranks.wait_dead())
    # The place of the other node's rank comes from its agent, later than the leader's word.
    while sum(place.is_ready for place in ranks.places()) < 2:
        await asyncio.sleep(0.1)
    print("ready", flush=True)
    while not dead.done():
        line = asyncio.ensure_future(lines.get())
        await asyncio.wait((line, dead), return_when=asyncio.FIRST_COMPLETED)
        if not line.done():
            line.cancel()
        elif line.result():
            ranks.add(request(line.result()))
        else:
            break
    if is_dead := dead.done():
        print(f"{dead.result()}".splitlines()[0], flush=True)
    await ranks.close()
    return is_dead


if __name__ == "__main__":
    try:
        main()
    except MoespanError as error:
        sys.exit(f"{type(error).__name__}: {error}")
